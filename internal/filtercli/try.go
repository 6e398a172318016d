package filtercli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/diff"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
	sigsjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/accessfilter"
)

const (
	// page is how many objects are held at a time.
	page = 200
	// progressEvery is how often one hears of a long work.
	progressEvery = 2 * time.Second
)

// What becomes of an object.
const (
	Kept    = "kept"
	Changed = "changed"
	Dropped = "dropped"
	Failed  = "failed" // an expression fails, and the object stays as it is
)

// Result is what becomes of one object, as a component sees it.
type Result struct {
	Result    string `json:"result"`
	Component string `json:"component"`
	Resource  string `json:"resource"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	// By are the filters that did something, and the fields that say it.
	By []string `json:"by,omitempty"`
	// Diff is what changes, in unified form.
	Diff  string `json:"diff,omitempty"`
	Error string `json:"error,omitempty"`
}

// Sums count objects as components see them.
type Sums struct {
	Objects int `json:"objects"`
	Kept    int `json:"kept"`
	Changed int `json:"changed"`
	Dropped int `json:"dropped"`
	Failed  int `json:"failed"`
}

var (
	nodes = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	pools = v1beta2.GroupVersion.WithResource("nodepools")
)

// place reads where the node stands.
func (t *trial) place(ctx context.Context) (*accessfilter.Place, error) {
	node, err := t.client.Resource(nodes).Get(ctx, t.node, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("read node %s: %w", t.node, err)
	}
	p := &accessfilter.Place{Node: t.node, Labels: node.GetLabels(), Pool: node.GetLabels()[apps.NodePoolLabel]}
	if p.Pool == "" {
		return p, nil
	}
	pool, err := t.client.Resource(pools).Get(ctx, p.Pool, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || meta.IsNoMatchError(err) {
		fmt.Fprintf(t.progress, "warning: there is no NodePool %s; a filter that asks for pool.nodes does nothing\n", p.Pool)
		return p, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pool %s: %w", p.Pool, err)
	}
	names, _, err := unstructured.NestedStringSlice(pool.Object, "status", "nodes")
	if err != nil {
		return nil, fmt.Errorf("read pool %s: %w", p.Pool, err)
	}
	p.Nodes = map[string]struct{}{}
	for _, name := range names {
		p.Nodes[name] = struct{}{}
	}
	return p, nil
}

// try shows the objects of one resource to its components, a page at a time.
func (t *trial) try(ctx context.Context, place *accessfilter.Place, target target) error {
	scenes := make([]*accessfilter.Scene, len(target.components))
	for i, component := range target.components {
		scenes[i] = accessfilter.NewScene(component, place)
	}
	options := metav1.ListOptions{Limit: page, LabelSelector: t.selector}
	seen, namespace := 0, t.namespace
	if r, _ := t.served(target.resource); !r.Namespaced {
		namespace = ""
	}
	for {
		list, err := t.client.Resource(target.resource).Namespace(namespace).List(ctx, options)
		if err != nil {
			return fmt.Errorf("list %s: %w", target.resource.GroupResource(), err)
		}
		for i := range list.Items {
			text, err := list.Items[i].MarshalJSON()
			if err != nil {
				return fmt.Errorf("read one of %s: %w", target.resource.GroupResource(), err)
			}
			for j, component := range target.components {
				r := t.show(scenes[j], component, target.resource, text)
				r.Namespace, r.Name = list.Items[i].GetNamespace(), list.Items[i].GetName()
				if err := t.tell(r); err != nil {
					return err
				}
			}
		}
		seen += len(list.Items)
		if time.Since(t.told) > progressEvery {
			if !t.told.IsZero() {
				fmt.Fprintf(t.progress, "looked at %d %s\n", seen, target.resource.GroupResource())
			}
			t.told = time.Now()
		}
		if options.Continue = list.GetContinue(); options.Continue == "" {
			return nil
		}
	}
}

// show applies all filters to an object, one after the other.
func (t *trial) show(s *accessfilter.Scene, component string, resource schema.GroupVersionResource, object []byte) Result {
	r := Result{Result: Kept, Component: component, Resource: resource.GroupResource().String()}
	now := object
	for _, f := range t.filters {
		if !f.Applies(component, resource) {
			continue
		}
		next, verdict, err := f.ShowJSON(s, now)
		if err == nil && len(verdict.Edits) > 0 {
			err = fits(now, next)
		}
		switch {
		case err != nil:
			// The hub leaves the object as it is for this filter, and goes on.
			r.Result, r.Error = Failed, strings.TrimPrefix(r.Error+"; "+f.Name+": "+err.Error(), "; ")
			continue
		case verdict.Dropped != nil:
			r.By = append(r.By, f.Name+" "+verdict.Dropped.String())
			if r.Result != Failed {
				r.Result = Dropped
			}
			return r
		}
		for _, e := range verdict.Edits {
			r.By = append(r.By, f.Name+" "+e.By.String())
		}
		now = next
	}
	before, err := yaml.JSONToYAML(object)
	if err == nil {
		var after []byte
		if after, err = yaml.JSONToYAML(now); err == nil {
			r.Diff = unified(before, after)
		}
	}
	switch {
	case err != nil:
		r.Result, r.Error = Failed, err.Error()
	case r.Result == Failed:
	case r.Diff != "":
		r.Result = Changed
	default:
		r.By = nil // what it set was there
	}
	return r
}

// fits returns an error if an object of Kubernetes' own has no place for what
// was set: the hub edits these by the types of their fields.
func fits(before, after []byte) error {
	was, err := misfits(before)
	if err != nil {
		return err
	}
	is, err := misfits(after)
	if err == nil {
		is = slices.DeleteFunc(is, func(e error) bool {
			return slices.ContainsFunc(was, func(w error) bool { return w.Error() == e.Error() })
		})
		err = errors.Join(is...)
	}
	if err != nil {
		return fmt.Errorf("the object has no place for what is set: %w", err)
	}
	return nil
}

// misfits are the fields of an object that its Go type lacks.
func misfits(object []byte) ([]error, error) {
	var head metav1.TypeMeta
	if err := json.Unmarshal(object, &head); err != nil {
		return nil, err
	}
	typed, err := scheme.Scheme.New(head.GroupVersionKind())
	if runtime.IsNotRegisteredError(err) {
		return nil, nil // a custom resource
	}
	if err != nil {
		return nil, err
	}
	return sigsjson.UnmarshalStrict(object, typed)
}

// unified is the difference without the head that names files.
func unified(before, after []byte) string {
	out := string(diff.Diff("cluster", before, "seen", after))
	_, out, _ = strings.Cut(out, "\n") // the command line of diff
	return out
}

func (t *trial) tell(r Result) error {
	t.sums.Objects++
	switch r.Result {
	case Kept:
		t.sums.Kept++
	case Changed:
		t.sums.Changed++
	case Dropped:
		t.sums.Dropped++
	case Failed:
		t.sums.Failed++
	}
	if r.Result == Kept && !t.kept {
		return nil
	}
	if t.output == "json" {
		return t.line(r)
	}
	name := r.Name
	if r.Namespace != "" {
		name = r.Namespace + "/" + r.Name
	}
	text := fmt.Sprintf("%-8s%s %s for %s", r.Result, r.Resource, name, r.Component)
	if len(r.By) > 0 {
		text += ", by " + strings.Join(r.By, ", ")
	}
	if r.Error != "" {
		text += ": " + r.Error
	}
	fmt.Fprintln(t.out, text)
	for line := range strings.Lines(r.Diff) {
		fmt.Fprint(t.out, "    "+line)
	}
	return nil
}

func (t *trial) line(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	_, err = fmt.Fprintln(t.out, string(text))
	return err
}

// end tells the sums. Filters that fail are an error.
func (t *trial) end() error {
	if t.output == "json" {
		if err := t.line(struct {
			Sums Sums `json:"sums"`
		}{t.sums}); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(t.out, "%d objects, counted for each component: %d dropped, %d changed, %d kept, %d failed.\n",
			t.sums.Objects, t.sums.Dropped, t.sums.Changed, t.sums.Kept, t.sums.Failed)
	}
	if t.sums.Failed > 0 {
		return fmt.Errorf("a filter failed on %d objects and left them as they were; guard the expression, as by has(object.spec.field)", t.sums.Failed)
	}
	return nil
}
