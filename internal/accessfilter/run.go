package accessfilter

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/interpreter"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Scene is where objects are seen: by which component on which node.
type Scene struct {
	component ref.Val
	node      ref.Val // nil: not known yet
	pool      ref.Val // nil: not known yet
}

// fixed is a map of a scene: its members are values of CEL, so that none is
// made when it is asked.
type fixed struct {
	tree
	names func() []string // sorted
}

func (f fixed) Names() []string { return f.names() }

func newFixed(t tree) ref.Val {
	return &members{Members: fixed{t, sync.OnceValue(func() []string { return slices.Sorted(maps.Keys(t)) })}}
}

// Place is a node and the pool it is in.
type Place struct {
	Node   string
	Labels map[string]string
	Pool   string // empty: in none
	// Nodes are those of the pool; nil while they are not known.
	Nodes map[string]struct{}
}

// NewScene returns how things are seen by a component at a place; nil: it is
// not known where that is. A node that is in no pool is alone.
func NewScene(component string, p *Place) *Scene {
	s := &Scene{component: types.String(component)}
	if p == nil {
		return s
	}
	nodeLabels := tree{}
	for k, v := range p.Labels {
		nodeLabels[k] = types.String(v)
	}
	s.node = newFixed(tree{"name": types.String(p.Node), "labels": newFixed(nodeLabels)})
	nodes := p.Nodes
	if p.Pool == "" {
		nodes = map[string]struct{}{p.Node: {}}
	}
	if nodes != nil {
		set := &members{Members: nodeSet{nodes, sync.OnceValue(func() []string { return slices.Sorted(maps.Keys(nodes)) })}}
		s.pool = newFixed(tree{"name": types.String(p.Pool), "nodes": set})
	}
	return s
}

// nodeSet is a map that has true for each node.
type nodeSet struct {
	nodes map[string]struct{}
	names func() []string // sorted
}

func (s nodeSet) Get(name string) (any, bool) { _, ok := s.nodes[name]; return types.True, ok }
func (nodeSet) Text(string) ([]byte, bool)    { return nil, false }
func (s nodeSet) Names() []string             { return s.names() }

// Verdict is what a filter makes of an object.
type Verdict struct {
	// Dropped is what hides the object, spec.drop or spec.keep; nil: it is seen.
	Dropped *field.Path
	// Edits are the changes to it, in order.
	Edits []Edit
}

// Edit is a change of one field.
type Edit struct {
	// By is what makes it, as spec.set[0].
	By   *field.Path
	Path []string
	// Value is nil if the field is removed.
	Value any
}

// RunError says why a filter could not be applied to an object. Its text may
// hold what the object holds; Kind does not.
type RunError struct {
	Field *field.Path
	// Kind is what kind of error it is.
	Kind string
	Err  error
}

func (e *RunError) Error() string { return fmt.Sprintf("%s: %v", e.Field, e.Err) }
func (e *RunError) Unwrap() error { return e.Err }

// Brief is the error without anything of the object.
func (e *RunError) Brief() string { return fmt.Sprintf("%s: %s", e.Field, e.Kind) }

// kindsOfError are what may be said of an error, by how CEL's begin.
var kindsOfError = []string{
	"no such key", "no such overload", "no matching overload", "index out of bounds", "division by zero",
	"type conversion error", "integer overflow",
}

func (e *expression) fail(err error) error {
	kind := "the expression fails"
	if strings.Contains(err.Error(), "cost limit exceeded") {
		kind = "the expression costs too much"
	}
	for _, k := range kindsOfError {
		if strings.HasPrefix(err.Error(), k) {
			kind = k
		}
	}
	return &RunError{e.at, kind, err}
}

// variables are those of one object's expressions.
type variables struct {
	scene  *Scene
	object members
	work   work
}

func (v *variables) ResolveName(name string) (any, bool) {
	switch name {
	case objectVariable:
		return &v.object, true
	case componentVariable:
		return v.scene.component, true
	case nodeVariable:
		return v.scene.node, v.scene.node != nil
	case poolVariable:
		return v.scene.pool, v.scene.pool != nil
	case workVariable:
		return &v.work, true
	}
	return nil, false
}

func (*variables) Parent() interpreter.Activation { return nil }

// Run decides on an object. While what the filter goes by is not known, it
// changes nothing. The error is a [RunError]; the object stays as it is then.
func (f *Filter) Run(s *Scene, object Members) (Verdict, error) {
	if f.usesNode && s.node == nil || f.usesPool && s.pool == nil {
		return Verdict{}, nil
	}
	if f.uncounted > 0 {
		r := newRun(s, object)
		r.vars.work.longest = f.uncounted
		if v, err := f.run(r); !r.vars.work.over {
			return v, err
		}
	}
	r := newRun(s, object)
	r.counted = true
	return f.run(r)
}

func (f *Filter) run(r *run) (Verdict, error) {
	for _, e := range []struct {
		*expression
		hides bool
	}{{f.drop, true}, {f.keep, false}} {
		if e.expression == nil {
			continue
		}
		switch hides, err := r.holds(e.expression); {
		case err != nil:
			return Verdict{}, err
		case hides == e.hides:
			return Verdict{Dropped: e.at}, nil
		}
	}
	var out Verdict
	for _, c := range f.changes {
		if c.when != nil {
			switch ok, err := r.holds(c.when); {
			case err != nil:
				return Verdict{}, err
			case !ok:
				continue
			}
		}
		edit := Edit{By: c.at, Path: c.path}
		if c.value != nil {
			v, err := r.eval(c.value)
			if err != nil {
				return Verdict{}, err
			}
			if edit.Value, err = r.native(v, 0); err != nil {
				return Verdict{}, c.value.fail(err)
			}
		}
		out.Edits = append(out.Edits, edit)
	}
	return out, nil
}

// run is one run of a filter.
type run struct {
	vars    variables
	counted bool
	cost    uint64
}

func newRun(s *Scene, object Members) *run {
	r := &run{vars: variables{scene: s, work: work{left: mostWork}}}
	r.vars.object = members{Members: object, work: &r.vars.work}
	return r
}

func (r *run) holds(e *expression) (bool, error) {
	v, err := r.eval(e)
	if err != nil {
		return false, err
	}
	b, ok := v.(types.Bool)
	if !ok {
		return false, &RunError{e.at, "the expression is no bool", errors.New("the expression is no bool")}
	}
	return bool(b), nil
}

func (r *run) eval(e *expression) (ref.Val, error) {
	program := e.uncounted
	if r.counted {
		program = e.counted
	}
	v, details, err := program.Eval(&r.vars)
	if details != nil && details.ActualCost() != nil {
		r.cost += *details.ActualCost()
	}
	switch {
	case r.vars.work.left < 0: // whatever became of the error
		err = errWork
	case err == nil && r.cost > mostCost:
		err = fmt.Errorf("the filter's expressions cost more than %d together: cost limit exceeded", mostCost)
	}
	if err != nil {
		return nil, e.fail(err)
	}
	return v, nil
}

// ShowJSON shows an object in JSON to the filter. It returns what is seen of
// it, which is nil if the filter hides it, and the verdict.
func (f *Filter) ShowJSON(s *Scene, object []byte) ([]byte, Verdict, error) {
	t, err := ParseJSON(object)
	if err != nil {
		return object, Verdict{}, err
	}
	v, err := f.Run(s, t)
	if err != nil || v.Dropped != nil || len(v.Edits) == 0 {
		if v.Dropped != nil {
			object = nil
		}
		return object, v, err
	}
	out, err := EditJSON(t, v)
	if err != nil {
		return object, Verdict{}, err
	}
	return out, v, nil
}

// ParseJSON reads an object in JSON. Numbers keep their digits.
func ParseJSON(object []byte) (Members, error) {
	var t tree
	d := json.NewDecoder(bytes.NewReader(object))
	d.UseNumber()
	if err := d.Decode(&t); err != nil {
		return nil, fmt.Errorf("read object: %w", err)
	}
	if t == nil {
		return nil, errors.New("read object: it is null")
	}
	return t, nil
}

// EditJSON writes an object of [ParseJSON] as a verdict has it. The error is a
// [RunError].
func EditJSON(object Members, v Verdict) ([]byte, error) {
	t, ok := object.(tree)
	if !ok {
		return nil, errors.New("edit object: it is not in JSON")
	}
	var x any = map[string]any(t)
	for _, e := range v.Edits {
		var err error
		if x, err = put(x, e.Path, e.Value); err != nil {
			return nil, e.Fail(err)
		}
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(x); err != nil {
		return nil, fmt.Errorf("write object: %w", err)
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// Fail is the error for an edit that could not be made.
func (e Edit) Fail(err error) error {
	return &RunError{e.By, "the object has no place for the value", err}
}

// put returns a value in which what is at a path is another; what is shared is
// not changed.
func put(x any, path []string, value any) (any, error) {
	switch x := x.(type) {
	case map[string]any:
		in, ok := x[path[0]]
		if value == nil && !ok {
			return x, nil
		}
		out := maps.Clone(x)
		switch {
		case len(path) > 1:
			var err error
			if in == nil {
				in = map[string]any{} // what is missing above a field
			}
			if out[path[0]], err = put(in, path[1:], value); err != nil {
				return nil, fmt.Errorf("%s: %w", path[0], err)
			}
		case value == nil:
			delete(out, path[0])
		default:
			out[path[0]] = value
		}
		return out, nil
	case []any:
		i, err := strconv.ParseUint(path[0], 10, 31)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%q is no index of a list", path[0])
		case i >= uint64(len(x)) && value == nil:
			return x, nil
		case i >= uint64(len(x)):
			return nil, fmt.Errorf("the list has no element %s", path[0])
		}
		out := slices.Clone(x)
		switch {
		case len(path) > 1:
			if out[i], err = put(out[i], path[1:], value); err != nil {
				return nil, fmt.Errorf("%s: %w", path[0], err)
			}
		case value == nil:
			out = slices.Delete(out, int(i), int(i)+1)
		default:
			out[i] = value
		}
		return out, nil
	}
	return nil, fmt.Errorf("it has no field %q", path[0])
}
