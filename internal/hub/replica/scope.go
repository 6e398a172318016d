package replica

import (
	"net/url"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/selection"

	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// Scope is a slice of one resource: what one upstream stream carries. Empty
// fields do not narrow it.
type Scope struct {
	Resource  schema.GroupVersionResource `json:"resource"`
	Namespace string                      `json:"namespace,omitempty"`
	Fields    string                      `json:"fields,omitempty"` // canonical, as fields.Selector prints it
	Labels    string                      `json:"labels,omitempty"` // canonical, as labels.Selector prints it
}

// ScopeOf returns the slice that a list or watch asks for.
func ScopeOf(info request.Info) Scope {
	s := Scope{Resource: info.Resource, Namespace: info.Namespace}
	if o := info.Options; o != nil {
		if o.FieldSelector != nil {
			s.Fields = o.FieldSelector.String()
		}
		if o.LabelSelector != nil {
			s.Labels = o.LabelSelector.String()
		}
	}
	if info.Name != "" {
		s.Fields = fieldName + "=" + info.Name
	}
	return s
}

// ID names the scope in the store and in logs. It is unique.
func (s Scope) ID() string {
	var b strings.Builder
	b.WriteString(s.Resource.Group + "/" + s.Resource.Version + "/" + s.Resource.Resource)
	query := url.Values{}
	for name, value := range map[string]string{"namespace": s.Namespace, "fields": s.Fields, "labels": s.Labels} {
		if value != "" {
			query.Set(name, value)
		}
	}
	if len(query) > 0 {
		b.WriteString("?" + query.Encode())
	}
	return b.String()
}

// path returns the URL path at which the cloud lists the scope.
func (s Scope) path() string {
	prefix := "/apis/" + s.Resource.Group + "/" + s.Resource.Version
	if s.Resource.Group == "" {
		prefix = "/api/" + s.Resource.Version
	}
	if s.Namespace != "" {
		prefix += "/namespaces/" + url.PathEscape(s.Namespace)
	}
	return prefix + "/" + s.Resource.Resource
}

// query returns the selectors as URL parameters.
func (s Scope) query() url.Values {
	q := url.Values{}
	if s.Fields != "" {
		q.Set("fieldSelector", s.Fields)
	}
	if s.Labels != "" {
		q.Set("labelSelector", s.Labels)
	}
	return q
}

// covers reports whether every object of narrow is in s, and the hub can
// tell which objects of s are in narrow.
func (s Scope) covers(narrow Scope) bool {
	if s == narrow {
		return true
	}
	if s.Resource != narrow.Resource || (s.Namespace != "" && s.Namespace != narrow.Namespace) {
		return false
	}
	if !fieldsCover(s.Fields, narrow.Fields) || !labelsCover(s.Labels, narrow.Labels) {
		return false
	}
	_, ok := newMatcher(s, narrow)
	return ok
}

func fieldsCover(wide, narrow string) bool {
	if wide == "" || wide == narrow {
		return true
	}
	w, err1 := fields.ParseSelector(wide)
	n, err2 := fields.ParseSelector(narrow)
	if err1 != nil || err2 != nil {
		return false
	}
	for _, want := range w.Requirements() {
		found := false
		for _, have := range n.Requirements() {
			found = found || have == want
		}
		if !found {
			return false
		}
	}
	return true
}

func labelsCover(wide, narrow string) bool {
	if wide == "" || wide == narrow {
		return true
	}
	w, err1 := labels.Parse(wide)
	n, err2 := labels.Parse(narrow)
	if err1 != nil || err2 != nil {
		return false
	}
	wants, _ := w.Requirements()
	haves, _ := n.Requirements()
	for _, want := range wants {
		found := false
		for _, have := range haves {
			found = found || have.String() == want.String()
		}
		if !found {
			return false
		}
	}
	return true
}

// The fields that the hub can select by. The last two are those of pods.
const (
	fieldName      = "metadata.name"
	fieldNamespace = "metadata.namespace"
	fieldNode      = "spec.nodeName"
	fieldPhase     = "status.phase"
)

// matcher tells which objects of a scope belong to a narrower one.
type matcher struct {
	namespace string
	labels    labels.Selector      // nil: all
	fields    []fields.Requirement // only those that the hub can evaluate
}

// newMatcher returns the matcher for narrow within wide. It reports false
// when narrow selects by a field that the hub does not know how to read.
func newMatcher(wide, narrow Scope) (matcher, bool) {
	var m matcher
	if narrow.Namespace != wide.Namespace {
		m.namespace = narrow.Namespace
	}
	if narrow.Labels != wide.Labels && narrow.Labels != "" {
		sel, err := labels.Parse(narrow.Labels)
		if err != nil {
			return m, false
		}
		m.labels = sel
	}
	if narrow.Fields == "" {
		return m, true
	}
	sel, err := fields.ParseSelector(narrow.Fields)
	if err != nil {
		return m, false
	}
	held := map[fields.Requirement]bool{}
	if wideSel, err := fields.ParseSelector(wide.Fields); err == nil {
		for _, r := range wideSel.Requirements() {
			held[r] = true
		}
	}
	for _, r := range sel.Requirements() {
		// A phase that the cloud selected by may not be the one that local
		// readers see.
		if held[r] && (r.Field != fieldPhase || !isPods(narrow.Resource)) {
			continue
		}
		switch r.Field {
		case fieldName:
		case fieldNamespace:
			// Objects without a namespace do not have the field, and across
			// namespaces the hub cannot tell which objects these are.
			if narrow.Namespace == "" {
				return m, false
			}
		case fieldNode, fieldPhase:
			if !isPods(narrow.Resource) {
				return m, false
			}
		default:
			return m, false
		}
		m.fields = append(m.fields, r)
	}
	return m, true
}

func isPods(r schema.GroupVersionResource) bool { return r.Group == "" && r.Resource == "pods" }

// all reports whether the matcher takes every object of its scope.
func (m matcher) all() bool {
	return m.namespace == "" && m.labels == nil && len(m.fields) == 0
}

// byKey reports whether the object's key alone decides.
func (m matcher) byKey() bool {
	if m.labels != nil {
		return false
	}
	return !slices.ContainsFunc(m.fields, func(r fields.Requirement) bool { return r.Field == fieldNode || r.Field == fieldPhase })
}

// matchesKey is matches for a matcher that is decided by the key alone.
func (m matcher) matchesKey(key string) bool {
	if len(m.fields) == 0 && m.namespace == "" {
		return true
	}
	namespace, name := SplitKey(key)
	return m.matches(&wire.Meta{Namespace: namespace, Name: name})
}

// mayMatch reports whether some object of that key could match.
func (m matcher) mayMatch(key string) bool {
	m.labels = nil
	return m.without(fieldNode, fieldPhase).matchesKey(key)
}

// without returns the matcher that takes any value of some fields.
func (m matcher) without(names ...string) matcher {
	m.fields = slices.DeleteFunc(slices.Clone(m.fields), func(r fields.Requirement) bool { return slices.Contains(names, r.Field) })
	return m
}

// matches reports whether an object of the scope belongs to the narrower one.
func (m matcher) matches(meta *wire.Meta) bool {
	if m.namespace != "" && meta.Namespace != m.namespace {
		return false
	}
	if m.labels != nil && !m.labels.Matches(labels.Set(meta.Labels)) {
		return false
	}
	for _, r := range m.fields {
		var value string
		switch r.Field {
		case fieldName:
			value = meta.Name
		case fieldNamespace:
			value = meta.Namespace
		case fieldNode:
			value = meta.NodeName
		case fieldPhase:
			value = meta.Phase
		}
		if (value == r.Value) != (r.Operator != selection.NotEquals) {
			return false
		}
	}
	return true
}

// keyOf returns the key of an object within its scope. The order of keys is
// the order in which the API server lists.
func keyOf(namespace, name string) string {
	if namespace == "" {
		return name
	}
	return namespace + "/" + name
}

// SplitKey returns the namespace and name that an object's key is made of.
func SplitKey(key string) (namespace, name string) {
	if namespace, name, ok := strings.Cut(key, "/"); ok {
		return namespace, name
	}
	return "", key
}
