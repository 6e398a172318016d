// Package filter decides how programs on an edge node see the cluster, so that
// it fits the edge: traffic stays in the pool, pods find the API at the hub,
// and what only the cloud needs is not there.
//
// A filter is a pure function of an object, as the bytes that came, and of a
// State, which is immutable. It changes what it is there for; every other
// field, known here or not, stays as it is. Filters are no access control: who
// is shown what goes by what a program calls itself, and whoever may read an
// object may read it unfiltered.
package filter

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// Object is an object as it came.
type Object struct {
	Resource schema.GroupVersionResource
	Encoding wire.Encoding
	Data     []byte
}

// Filter is one rule about what a program sees.
type Filter struct {
	// Name is that of OpenYurt's filter, by which it is turned off and by which
	// ConfigMap yurt-hub-cfg gives it to more components.
	Name      string
	Resources []schema.GroupResource
	// Components see it without being named in yurt-hub-cfg.
	Components []string
	// EdgeOnly is set for those that make no sense on a node of the cloud.
	EdgeOnly bool

	// uses returns the parts of the state that the filter looks at.
	uses func(*State) [2]any
	// show returns the object as it is to be seen, or false if it is not. What
	// is not changed is returned as it came. An object that cannot be read is
	// shown as it is.
	show func(*State, Object) ([]byte, bool, error)
}

// All are the filters, in the order in which they are applied.
func All() []*Filter {
	return []*Filter{
		masterService(), inClusterConfig(), serviceEnvUpdater(),
		discardCloudService(), nodePortIsolation(), serviceTopology(), forwardKubeSvcTraffic(),
	}
}

// Config says which filters there are.
type Config struct {
	Off bool
	// Disabled are names of filters that are not applied.
	Disabled []string
	// Cloud is set on a node of the cloud.
	Cloud bool
}

// Check returns an error for a name that no filter has.
func (c Config) Check() error {
	for _, name := range c.Disabled {
		if !slices.ContainsFunc(All(), func(f *Filter) bool { return f.Name == name }) {
			var names []string
			for _, f := range All() {
				names = append(names, f.Name)
			}
			return fmt.Errorf("no filter is called %q: there are %s", name, strings.Join(names, ", "))
		}
	}
	return nil
}

// Table tells what each component sees. It is immutable.
type Table struct {
	components map[string]*Reader
	others     *Reader
	filtered   map[use]struct{}
}

// use is a resource that a component sees filtered, in all versions if it names
// none.
type use struct {
	component string
	resource  schema.GroupVersionResource
}

// New returns the table for a state. extra are the further components of a
// filter, by its name.
//
// Programs come after all filters, so they see what a component would have
// seen without them.
func New(c Config, s *State, extra map[string][]string) *Table {
	t := &Table{components: map[string]*Reader{}, others: &Reader{state: s}, filtered: map[use]struct{}{}}
	if c.Off {
		return t
	}
	for _, f := range All() {
		if slices.Contains(c.Disabled, f.Name) || c.Cloud && f.EdgeOnly {
			continue
		}
		for _, component := range slices.Concat(f.Components, extra[f.Name]) {
			r := t.reader(component)
			for _, resource := range f.Resources {
				if chain := r.chains[resource]; !slices.ContainsFunc(chain, func(g *Filter) bool { return g.Name == f.Name }) {
					r.chains[resource] = append(chain, f)
					t.filtered[use{component, resource.WithVersion("")}] = struct{}{}
				}
			}
		}
	}
	for _, p := range s.Programs {
		components, resources := p.Uses()
		for _, component := range components {
			r := t.reader(component)
			for _, resource := range resources {
				r.programs.of[resource] = append(r.programs.of[resource], p)
				t.filtered[use{component, resource}] = struct{}{}
			}
		}
	}
	return t
}

// reader returns the reader of a component that sees something filtered.
func (t *Table) reader(component string) *Reader {
	r, ok := t.components[component]
	if !ok {
		s := t.others.state
		r = &Reader{s, map[schema.GroupResource][]*Filter{}, programs{
			accessfilter.NewScene(component, s.Place.scene()), map[schema.GroupVersionResource][]*Program{},
		}}
		t.components[component] = r
	}
	return r
}

// Filters reports whether a component is shown a resource otherwise than it is.
func (t *Table) Filters(component string, resource schema.GroupVersionResource) bool {
	_, ok := t.filtered[use{component, resource.GroupResource().WithVersion("")}]
	if !ok {
		_, ok = t.filtered[use{component, resource}]
	}
	return ok
}

// Adds returns the resources that somebody sees otherwise than they are who saw
// them as they are by another table.
func (t *Table) Adds(to *Table) []schema.GroupResource {
	var out []schema.GroupResource
	for u := range t.filtered {
		if r := u.resource.GroupResource(); !to.Filters(u.component, u.resource) && !slices.Contains(out, r) {
			out = append(out, r)
		}
	}
	return out
}

// Components are those that see something otherwise than it is.
func (t *Table) Components() []string { return slices.Collect(maps.Keys(t.components)) }

// Reader returns how a component sees the cluster. One that the table does not
// know sees everything as it is.
func (t *Table) Reader(component string) *Reader {
	if r, ok := t.components[component]; ok {
		return r
	}
	return t.others
}

// Reader is how one component sees the cluster. It is a replica.Filter.
type Reader struct {
	state    *State
	chains   map[schema.GroupResource][]*Filter
	programs programs
}

// Version is the newest resource version of what the filters go by.
func (r *Reader) Version() uint64 { return r.state.Version }

// Same reports whether another reader sees every object of a resource alike.
func (r *Reader) Same(resource schema.GroupVersionResource, other replica.Filter) bool {
	o, ok := other.(*Reader)
	if !ok {
		return false
	}
	return slices.EqualFunc(r.chains[resource.GroupResource()], o.chains[resource.GroupResource()], func(a, b *Filter) bool {
		return a.Name == b.Name && a.uses(r.state) == b.uses(o.state)
	}) && slices.EqualFunc(r.programs.of[resource], o.programs.of[resource], func(a, b *Program) bool {
		return a == b && (!a.UsesPlace() || r.state.Place == o.state.Place)
	})
}

// Show returns an object as the component sees it, or false if it does not.
func (r *Reader) Show(resource schema.GroupVersionResource, k replica.Kind, object []byte) ([]byte, bool) {
	for _, f := range r.chains[resource.GroupResource()] {
		shown, ok, err := f.show(r.state, Object{resource, k.Encoding, object})
		if err != nil {
			continue // whoever reads it has the same trouble with it
		}
		if !ok {
			return nil, false
		}
		object = shown
	}
	return r.programs.show(resource, k, object)
}

// Component is what a program calls itself: the first word of its User-Agent.
func Component(userAgent string) string {
	name, _, _ := strings.Cut(userAgent, "/")
	return strings.ToLower(name)
}

// Extra reads ConfigMap yurt-hub-cfg: the components that each filter is given
// beside its own, separated by commas. Forms of old hold as well: a key
// filter_servicetopology, and a component with what it asks for after a slash.
func Extra(data map[string]string) map[string][]string {
	out := map[string][]string{}
	for _, f := range All() {
		for word := range strings.SplitSeq(data[f.Name]+","+data["filter_"+f.Name], ",") {
			if word, _, _ = strings.Cut(strings.ToLower(strings.TrimSpace(word)), "/"); word != "" && len(out[f.Name]) < maxExtra {
				out[f.Name] = append(out[f.Name], word)
			}
		}
	}
	return out
}

// maxExtra bounds the components of a filter: each costs an index per scope.
const maxExtra = 32
