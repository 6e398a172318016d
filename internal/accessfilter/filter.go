// Package accessfilter compiles and runs AccessFilters: CEL expressions that
// say what components on nodes see otherwise than it is. The hub runs them,
// yurt-manager checks them and yurtadm tries them, all by this package.
//
// The expressions are those of the API server's policies, in its own
// environment; see docs/decisions/0018.
package accessfilter

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/google/cel-go/cel"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/cel/library"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

const (
	// mostCost bounds what a filter's expressions may cost on one object, each
	// and together, in CEL's units: some milliseconds. An EndpointSlice with its
	// 1000 endpoints can be gone through a few times.
	mostCost = 50_000
	// textMost bounds the characters of an expression, and changesMost those
	// that a filter sets or removes, as the definition of the type does.
	textMost    = 4096
	changesMost = 16
	// doublesMost bounds the macros that write what they are called on twice:
	// each on another doubles the expression before it is compiled.
	doublesMost = 8
)

// Filter is a compiled AccessFilter. It is immutable.
type Filter struct {
	Name       string
	Generation int64
	// Version is the resource version of the AccessFilter.
	Version string

	priority   int32
	components sets.Set[string]
	resources  sets.Set[schema.GroupVersionResource]
	selector   selector

	drop, keep *expression
	changes    []change // in the order in which they are made
	// uncounted is the length of the longest list, map or string of an object
	// for which nothing needs to be counted; 0: there is none.
	uncounted int
	usesPool  bool // what is known of the pool
	usesNode  bool // what is known of the node
}

// change is a field that is set, or removed if value is nil.
type change struct {
	at    *field.Path
	path  pointer
	when  *expression // nil: always
	value *expression
}

// expression is a compiled one.
type expression struct {
	at   *field.Path
	text string
	// Both do the same.
	counted, uncounted cel.Program
}

// Compile compiles a filter to be run. The error is of type [Problems].
func Compile(af *v1alpha1.AccessFilter) (*Filter, error) {
	run, err := anyObject()
	if err != nil {
		return nil, Problems{{Field: field.NewPath("spec"), Message: err.Error()}}
	}
	c := compiler{env: run.counted, uncounted: run.uncounted}
	f := c.filter(af)
	return f, c.problems.err()
}

// Order sorts filters as they are applied.
func Order(filters []*Filter) {
	slices.SortFunc(filters, func(a, b *Filter) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.Name, b.Name))
	})
}

// Applies reports whether a component is to see a resource by the filter.
func (f *Filter) Applies(component string, resource schema.GroupVersionResource) bool {
	return f.components.Has(component) && f.resources.Has(resource)
}

// Uses returns the components and resources that the filter is for.
func (f *Filter) Uses() (components []string, resources []schema.GroupVersionResource) {
	return sets.List(f.components), f.resources.UnsortedList()
}

// UsesPlace reports whether what the filter makes of an object depends on the
// node or its pool.
func (f *Filter) UsesPlace() bool { return f.usesNode || f.usesPool }

// Selects reports whether the filter is for a node of that pool, which is empty
// for one in none, and with those labels.
func (f *Filter) Selects(pool string, nodeLabels map[string]string) bool {
	return f.selector.selects(pool, nodeLabels)
}

// Selects is [Filter.Selects] for a filter that may not compile. The error is
// of type [Problems].
func Selects(spec *v1alpha1.AccessFilterSpec, pool string, nodeLabels map[string]string) (bool, error) {
	s, problem := selectorOf(spec)
	if problem != nil {
		return false, Problems{*problem}
	}
	return s.selects(pool, nodeLabels), nil
}

// selector says which nodes a filter is for.
type selector struct {
	pools  sets.Set[string] // nil: all
	labels labels.Selector
}

func selectorOf(spec *v1alpha1.AccessFilterSpec) (selector, *Problem) {
	out := selector{labels: labels.Everything()}
	if len(spec.Pools) > 0 {
		out.pools = sets.New(spec.Pools...)
	}
	if spec.NodeSelector == nil {
		return out, nil
	}
	var err error
	if out.labels, err = metav1.LabelSelectorAsSelector(spec.NodeSelector); err != nil {
		return out, &Problem{Field: field.NewPath("spec", "nodeSelector"), Text: metav1.FormatLabelSelector(spec.NodeSelector), Message: err.Error()}
	}
	return out, nil
}

func (s selector) selects(pool string, nodeLabels map[string]string) bool {
	return (s.pools == nil || s.pools.Has(pool)) && s.labels.Matches(labels.Set(nodeLabels))
}

// compiler goes through a filter in one environment.
type compiler struct {
	env       *cel.Env
	uncounted *cel.Env // nil: expressions are checked, and not to be run
	// value returns the type that a path's values are to have, nil: any.
	value    func(text string, p pointer) (*cel.Type, int, error)
	problems Problems
	used     sets.Set[string] // variables, once compiled
	compiled []*cel.Ast
}

func (c *compiler) fail(at *field.Path, text string, line, column int, message string) {
	c.problems = append(c.problems, Problem{Field: at, Text: text, Line: line, Column: column, Message: message})
}

func (c *compiler) filter(af *v1alpha1.AccessFilter) *Filter {
	c.used, c.compiled = sets.New[string](), nil
	spec, at := &af.Spec, field.NewPath("spec")
	f := &Filter{
		Name: af.Name, Generation: af.Generation, Version: af.ResourceVersion, priority: spec.Priority,
		components: sets.New(spec.Components...), resources: sets.New[schema.GroupVersionResource](),
	}
	for i, r := range spec.Resources {
		gvr := schema.GroupVersionResource{Group: r.Group, Version: r.Version, Resource: r.Resource}
		if f.components.Has("kubelet") && alwaysSeen.Has(gvr.GroupResource()) {
			c.fail(at.Child("resources").Index(i), r.Resource, 0, 0, "what kubelet sees of pods, nodes and leases is not filtered: its pods would stop")
		}
		f.resources.Insert(gvr)
	}
	s, problem := selectorOf(spec)
	if problem != nil {
		c.problems = append(c.problems, *problem)
	}
	f.selector = s
	f.drop = c.expression(at.Child("drop"), spec.Drop, cel.BoolType)
	f.keep = c.expression(at.Child("keep"), spec.Keep, cel.BoolType)
	if spec.Drop == "" && spec.Keep == "" && len(spec.Set)+len(spec.Remove) == 0 {
		c.fail(at, "", 0, 0, "the filter does nothing: give one of drop, keep, set and remove")
	}
	if len(spec.Set) > changesMost || len(spec.Remove) > changesMost {
		c.fail(at, "", 0, 0, fmt.Sprintf("the filter sets or removes more than %d fields", changesMost))
		return f
	}
	for i, set := range spec.Set {
		at := at.Child("set").Index(i)
		path, want := c.path(at.Child("path"), set.Path)
		f.changes = append(f.changes, change{
			at: at, path: path, when: c.expression(at.Child("when"), set.When, cel.BoolType),
			value: c.required(at.Child("value"), set.Value, want),
		})
	}
	for i, remove := range spec.Remove {
		at := at.Child("remove").Index(i)
		path, _ := c.path(at.Child("path"), remove.Path)
		f.changes = append(f.changes, change{at: at, path: path, when: c.expression(at.Child("when"), remove.When, cel.BoolType)})
	}
	f.uncounted = c.uncountedUpTo()
	f.usesPool, f.usesNode = c.used.Has(poolVariable), c.used.Has(nodeVariable)
	return f
}

// alwaysSeen is what kubelet is shown as it is. A pod that it no longer sees
// it stops.
var alwaysSeen = sets.New(
	schema.GroupResource{Resource: "pods"}, schema.GroupResource{Resource: "nodes"},
	schema.GroupResource{Group: "coordination.k8s.io", Resource: "leases"},
)

// path reads a path, and the type that its values are to have.
func (c *compiler) path(at *field.Path, text string) (pointer, *cel.Type) {
	p, column, err := parsePointer(text)
	if err != nil {
		c.fail(at, text, min(column, 1), column, err.Error())
		return nil, nil
	}
	if c.value == nil {
		return p, nil
	}
	want, column, err := c.value(text, p)
	if err != nil {
		c.fail(at, text, 1, column, err.Error())
	}
	return p, want
}

func (c *compiler) required(at *field.Path, text string, want *cel.Type) *expression {
	if text == "" {
		c.fail(at, text, 0, 0, "an expression is needed")
		return nil
	}
	return c.expression(at, text, want)
}

// expression compiles one whose value is to be of a type; nil: of any that
// JSON has. One that is empty is nil.
func (c *compiler) expression(at *field.Path, text string, want *cel.Type) *expression {
	if text == "" {
		return nil
	}
	if len(text) > textMost {
		c.fail(at, text[:excerptMost], 0, 0, fmt.Sprintf("the expression has %d bytes, more than %d", len(text), textMost))
		return nil
	}
	if n := strings.Count(text, "optMap") + strings.Count(text, "optFlatMap"); n > doublesMost {
		c.fail(at, text, 1, 1, fmt.Sprintf("the expression has %d of optMap and optFlatMap, more than %d", n, doublesMost))
		return nil
	}
	ast, issues := c.env.Compile(text)
	if issues.Err() != nil {
		c.problems = append(c.problems, fromIssues(at, text, issues)...)
		return nil
	}
	if got := ast.OutputType(); want != nil && !got.IsExactType(cel.DynType) && !want.IsAssignableType(got) {
		c.fail(at, text, 1, 1, fmt.Sprintf("the expression is of type %s, and %s is wanted", got, want))
		return nil
	}
	for _, ref := range ast.NativeRep().ReferenceMap() {
		c.used.Insert(ref.Name)
	}
	if tooHeavy(ast) {
		c.fail(at, text, 1, 1, "the expression puts lists and maps into one another so often that nobody could read them")
		return nil
	}
	e := &expression{at: at, text: text}
	if c.uncounted == nil {
		return e
	}
	c.compiled = append(c.compiled, ast)
	var err error
	if e.counted, err = c.env.Program(ast, careful(c.env)); err == nil {
		e.uncounted, err = c.uncounted.Program(ast, careful(c.env), quickly(ast), cel.EvalOptions(cel.OptOptimize),
			cel.OptimizeRegex(library.FindRegexOptimization, library.FindAllRegexOptimization))
	}
	if err != nil {
		c.fail(at, text, 1, 1, err.Error())
	}
	return e
}

// uncountedUpTo returns how long lists, maps and strings of an object may be
// while all expressions together cost less than they may; 0: not even short ones.
func (c *compiler) uncountedUpTo() int {
	for longest := uint64(1 << 20); longest >= 16; longest /= 2 {
		cost := uint64(0)
		for _, ast := range c.compiled {
			cost = add(cost, costOf(ast, longest))
		}
		if cost <= mostCost {
			return int(longest) //nolint:gosec // not large
		}
	}
	return 0
}
