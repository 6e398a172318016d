package replica

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// accessGlass is some AccessFilters, of which it is known in Go what they do.
type accessGlass struct {
	version uint64
	rules   map[string]*accessRule // those that compiled last, by name
}

// accessRule is an AccessFilter that does something to values that end with a
// digit. It is one per resource, whose values are in different places.
type accessRule struct {
	kind  accessKind
	digit string
	of    map[string]*accessfilter.Filter
}

type accessKind int

const (
	drops    accessKind = iota
	stains              // with + and a condition
	rewrites            // by a loop
	fails               // on each object that it would drop
	broken              // and does not compile
	accessKinds
)

func (g *accessGlass) next(rng *rand.Rand, version uint64) mind {
	out := &accessGlass{version, maps.Clone(g.rules)}
	if out.rules == nil {
		out.rules = map[string]*accessRule{}
	}
	for range 1 + rng.IntN(2) {
		name := fmt.Sprint("filter-", rng.IntN(4))
		if rng.IntN(3) == 0 {
			delete(out.rules, name)
			continue
		}
		kind, digit := accessKind(rng.IntN(int(accessKinds))), fmt.Sprint(rng.IntN(10))
		if rule, err := newAccessRule(kind, digit); err == nil {
			out.rules[name] = rule
		} // else the last good one stays
	}
	return out
}

// accessCompiled are the filters that were made before: that takes its time.
var accessCompiled sync.Map

func newAccessRule(kind accessKind, digit string) (*accessRule, error) {
	rule := &accessRule{kind, digit, map[string]*accessfilter.Filter{}}
	for resource, path := range map[string]string{"configmaps": "/data/value", "widgets": "/spec/value"} {
		key := fmt.Sprint(kind, digit, resource)
		if f, ok := accessCompiled.Load(key); ok {
			rule.of[resource] = f.(*accessfilter.Filter)
			continue
		}
		value := "object" + strings.ReplaceAll(path, "/", ".")
		ends := fmt.Sprintf("%s.endsWith('%s')", value, digit)
		var spec v1alpha1.AccessFilterSpec
		switch kind {
		case drops:
			spec.Drop = ends
		case stains:
			spec.Set = []v1alpha1.AccessFilterSet{{Path: path, Value: value + " + ' through " + digit + "'", When: ends}}
		case rewrites:
			spec.Set = []v1alpha1.AccessFilterSet{{Path: path, Value: "'" + digit + "'", When: fmt.Sprintf("[%s].exists(v, v.endsWith('%s'))", value, digit)}}
		case fails:
			spec.Drop = ends + " && int('x' + " + value + ") > 3"
		default:
			spec.Drop = ends + "("
		}
		f, err := accessfilter.Compile(&v1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: spec})
		if err != nil {
			return nil, fmt.Errorf("compile %+v: %w", spec, err)
		}
		accessCompiled.Store(key, f)
		rule.of[resource] = f
	}
	return rule, nil
}

func (g *accessGlass) Version() uint64 { return g.version }

func (g *accessGlass) Same(_ schema.GroupVersionResource, other Filter) bool {
	o, ok := other.(*accessGlass)
	return ok && maps.Equal(o.rules, g.rules)
}

func (g *accessGlass) inOrder() []*accessRule {
	var out []*accessRule
	for _, name := range slices.Sorted(maps.Keys(g.rules)) {
		out = append(out, g.rules[name])
	}
	return out
}

func (g *accessGlass) sees(value string) (string, bool) {
	for _, rule := range g.inOrder() {
		if !strings.HasSuffix(value, rule.digit) {
			continue
		}
		switch rule.kind {
		case drops:
			return "", false
		case stains:
			value += " through " + rule.digit
		case rewrites:
			value = rule.digit
		}
	}
	return value, true
}

func (g *accessGlass) Show(r schema.GroupVersionResource, k Kind, object []byte) ([]byte, bool) {
	scene := accessfilter.NewScene("reader", nil)
	for _, rule := range g.inOrder() {
		f := rule.of[r.Resource]
		if k.Encoding != wire.Protobuf {
			// An error leaves the object as it was.
			if object, _, _ = f.ShowJSON(scene, object); object == nil {
				return nil, false
			}
			object = bytes.Clone(object)
			continue
		}
		view, err := wire.NewView(k.APIVersion, k.Kind, object)
		if err != nil {
			panic(err)
		}
		v, err := f.Run(scene, view)
		if err != nil {
			continue
		}
		if v.Dropped != nil {
			return nil, false
		}
		for _, e := range v.Edits {
			if object, err = wire.Edit(k.APIVersion, k.Kind, object, e.Path, e.Value); err != nil {
				panic(err)
			}
		}
	}
	return object, true
}
