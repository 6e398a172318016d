package accessfilter

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"time"

	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/common/types/traits"
)

// Members is an object whose members are found when they are asked for. Their
// values are strings, bools, int64, float64, []any, nil, Members, and errors
// for what cannot be read. Names are sorted, so that an expression that goes
// through them says the same each time.
type Members interface {
	Get(name string) (any, bool)
	// Text may return a member that is a string, if that is quicker than Get. It
	// is part of the object, and not to be changed.
	Text(name string) ([]byte, bool)
	Names() []string
}

// tree is an object in JSON.
type tree map[string]any

func (t tree) Get(name string) (any, bool) { v, ok := t[name]; return v, ok }
func (tree) Text(string) ([]byte, bool)    { return nil, false }
func (t tree) Names() []string             { return slices.Sorted(maps.Keys(t)) }

// work bounds what a run reads of its object, whatever CEL takes that for: it
// counts one for an object that is compared with another, however large.
type work struct {
	left int
	// longest bounds the lists, maps and strings of the object; 0: no bound.
	longest int
	// over is set once a longer one was met.
	over bool
}

// mostWork bounds the values that a filter reads of one object, again and again
// or not. To read one takes some 100 ns.
const mostWork = 200_000

var errWork = types.WrapErr(fmt.Errorf("the filter reads more than %d values of an object: cost limit exceeded", mostWork)).(*types.Err) //nolint:errcheck // it is one

// take counts work. It returns an error once there was too much.
func (w *work) take(n int) ref.Val {
	if w == nil { // of a scene
		return nil
	}
	if w.left -= n; w.left < 0 {
		return errWork
	}
	return nil
}

// fits returns an error for what is too long. A run that is not counted ends
// with it, and is done again with all counted.
func (w *work) fits(n int) ref.Val {
	if w == nil || w.longest == 0 || n <= w.longest {
		return nil
	}
	w.over = true
	return errLong
}

var errLong = types.NewErr("too long to be read without counting")

// value makes a value of CEL of one of an object.
func (w *work) value(x any) ref.Val {
	if failed := w.take(1); failed != nil {
		return failed
	}
	switch x := x.(type) {
	case string:
		if failed := w.fits(len(x)); failed != nil {
			return failed
		}
		return types.String(x)
	case bool:
		return types.Bool(x)
	case int64:
		return types.Int(x)
	case float64:
		return types.Double(x)
	case nil:
		return types.NullValue
	case map[string]any:
		return &members{Members: tree(x), work: w}
	case Members:
		return &members{Members: x, work: w}
	case []any:
		return w.list(x)
	case json.Number:
		if i, err := x.Int64(); err == nil {
			return types.Int(i)
		}
		f, err := x.Float64()
		if err != nil {
			return types.NewErr("a number that cannot be read")
		}
		return types.Double(f)
	case error:
		return types.WrapErr(x)
	}
	return types.NewErr("a value that cannot be read")
}

func (w *work) list(items []any) ref.Val {
	if failed := cmp.Or(w.take(len(items)), w.fits(len(items))); failed != nil {
		return failed
	}
	out := make([]ref.Val, len(items))
	var objects []members // of one piece, for there may be thousands
	for i, item := range items {
		var in Members
		switch x := item.(type) {
		case map[string]any:
			in = tree(x)
		case Members:
			in = x
		default:
			out[i] = w.value(item)
			continue
		}
		if objects == nil {
			objects = make([]members, len(items)-i)
		}
		o := &objects[0]
		objects = objects[1:]
		o.Members, o.work = in, w
		out[i] = o
	}
	return &list{types.NewRefValList(adapter{}, out), out, w}
}

// list is a list of an object.
type list struct {
	traits.Lister
	items []ref.Val
	work  *work
}

func (l *list) IsZeroValue() bool { return len(l.items) == 0 }

func (l *list) Iterator() traits.Iterator { return &iterator{left: l.items} }

func (l *list) Equal(other ref.Val) ref.Val {
	o, ok := other.(traits.Lister)
	if !ok || o.Size() != types.Int(len(l.items)) || l.work.take(len(l.items)) != nil {
		return types.False
	}
	for i, mine := range l.items {
		if types.Equal(mine, o.Get(types.Int(i))) != types.True {
			return types.False
		}
	}
	return types.True
}

// iterator goes through items.
type iterator struct {
	traits.Iterator // has what no iterator is asked for
	left            []ref.Val
}

func (i *iterator) HasNext() ref.Val { return types.Bool(len(i.left) > 0) }

func (i *iterator) Next() ref.Val {
	if len(i.left) == 0 {
		return nil
	}
	v := i.left[0]
	i.left = i.left[1:]
	return v
}

// adapter makes values of CEL of those that a run has.
type adapter struct{}

func (adapter) NativeToValue(x any) ref.Val {
	if v, ok := x.(ref.Val); ok {
		return v
	}
	return types.DefaultTypeAdapter.NativeToValue(x)
}

// members is a map of CEL: an object, or a map of one. It belongs to one run,
// or to a scene, which has no work to count and where nothing is kept.
type members struct {
	Members
	work  *work
	asked int
	found *found // nil: nothing is kept yet
}

// keptAfter is how often an object is asked before it is kept what it said, for
// most are asked a few times only.
const keptAfter = 3

// found is what was read of an object.
type found struct {
	few   []member
	many  map[string]ref.Val // once they are not few; nil for what is not there
	names []string           // once asked for
}

type member struct {
	name  string
	value ref.Val // nil: it is not there
}

// fewMost is how many are looked through one by one.
const fewMost = 8

var _ traits.Mapper = (*members)(nil)

func (*members) Type() ref.Type      { return types.MapType }
func (m *members) Value() any        { return m.Members }
func (m *members) IsZeroValue() bool { return len(m.sorted()) == 0 }

func (m *members) Find(key ref.Val) (ref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return nil, false
	}
	v := m.member(string(name))
	return v, v != nil
}

// member returns a member; nil: it is not there.
func (m *members) member(name string) ref.Val {
	switch {
	case m.work == nil:
		if v, ok := m.Members.Get(name); ok {
			return v.(ref.Val) //nolint:errcheck // a scene holds no other
		}
		return nil
	case m.asked < keptAfter:
		m.asked++
		return m.read(name)
	case m.found == nil:
		m.found = &found{}
	}
	f := m.found
	if f.many != nil {
		v, ok := f.many[name]
		if !ok {
			v = m.read(name)
			f.many[name] = v
		}
		return v
	}
	for i := range f.few {
		if f.few[i].name == name {
			return f.few[i].value
		}
	}
	v := m.read(name)
	if len(f.few) < fewMost {
		f.few = append(f.few, member{name, v})
		return v
	}
	f.many = make(map[string]ref.Val, 2*fewMost)
	for _, one := range f.few {
		f.many[one.name] = one.value
	}
	f.many[name] = v
	return v
}

// text is member for one that is a string, which is not kept; false: it is
// none, or it is time to keep it.
func (m *members) text(name string) ([]byte, bool) {
	if m.work == nil || m.asked >= keptAfter {
		return nil, false
	}
	s, ok := m.Text(name)
	if !ok {
		return nil, false
	}
	m.asked++
	return s, m.work.fits(len(s)) == nil && m.work.take(1) == nil
}

func (m *members) read(name string) ref.Val {
	if s, ok := m.Text(name); ok {
		if failed := cmp.Or(m.work.take(1), m.work.fits(len(s))); failed != nil {
			return failed
		}
		return types.String(s)
	}
	if v, ok := m.Members.Get(name); ok {
		return m.work.value(v)
	}
	return nil
}

// sorted are the names of the members, in an order that is always the same.
func (m *members) sorted() []string {
	if m.found != nil && m.found.names != nil {
		return m.found.names
	}
	names := m.Names()
	if m.work == nil {
		return names
	}
	if m.work.take(len(names)) != nil || m.work.fits(len(names)) != nil {
		return nil
	}
	for _, name := range names {
		if m.work.fits(len(name)) != nil {
			return nil
		}
	}
	if m.found == nil {
		m.found = &found{}
	}
	m.found.names = names
	return names
}

func (m *members) Get(key ref.Val) ref.Val {
	v, ok := m.Find(key)
	if !ok {
		return types.NewErr("no such key: %v", key)
	}
	return v
}

func (m *members) Contains(key ref.Val) ref.Val {
	_, ok := m.Find(key)
	return types.Bool(ok)
}

func (m *members) Size() ref.Val { return types.Int(len(m.sorted())) }

func (m *members) Iterator() traits.Iterator {
	names := m.sorted()
	if failed := m.work.take(len(names)); failed != nil {
		names = nil
	}
	out := make([]ref.Val, len(names))
	for i, name := range names {
		out[i] = types.String(name)
	}
	return &iterator{left: out}
}

func (m *members) Equal(other ref.Val) ref.Val {
	o, ok := other.(traits.Mapper)
	names := m.sorted()
	if !ok || o.Size() != types.Int(len(names)) || m.work.take(len(names)) != nil {
		return types.False
	}
	for _, name := range names {
		mine := m.member(name)
		its, ok := o.Find(types.String(name))
		if !ok || types.Equal(mine, its) != types.True {
			return types.False
		}
	}
	return types.True
}

func (m *members) ConvertToType(t ref.Type) ref.Val {
	switch t {
	case types.MapType:
		return m
	case types.TypeType:
		return types.MapType
	}
	return types.NewErr("type conversion error from '%s' to '%s'", types.MapType, t)
}

func (*members) ConvertToNative(t reflect.Type) (any, error) {
	return nil, fmt.Errorf("an object is not made a %s", t)
}

// deepest bounds how deep a value may be.
const deepest = 64

// native is a value as objects have them. What is part of an object stays the
// part that it is.
func (r *run) native(v ref.Val, depth int) (any, error) {
	if depth > deepest {
		return nil, fmt.Errorf("the value is more than %d levels deep", deepest)
	}
	switch v := v.(type) {
	case *members:
		if v.work == nil {
			break // it is no part
		}
		var failed ref.Val
		t, text := v.Members.(tree)
		if in, ok := v.Members.(interface{ Len() int }); ok {
			failed = v.work.take(in.Len() / 16)
		} else {
			failed = v.work.take(weight(v.Members))
		}
		switch {
		case failed != nil:
			return nil, errWork
		case text:
			return map[string]any(t), nil
		}
		return v.Members, nil
	case *types.Optional:
		if !v.HasValue() {
			return nil, nil //nolint:nilnil // null
		}
		return r.native(v.GetValue(), depth)
	case *types.Err:
		return nil, v
	}
	if r.vars.work.take(length(v)) != nil {
		return nil, errWork
	}
	switch v := v.(type) {
	case traits.Lister:
		out := []any{}
		for it := v.Iterator(); it.HasNext() == types.True; {
			x, err := r.native(it.Next(), depth+1)
			if err != nil {
				return nil, err
			}
			out = append(out, x)
		}
		return out, nil
	case traits.Mapper:
		out := map[string]any{}
		for it := v.Iterator(); it.HasNext() == types.True; {
			key := it.Next()
			name, ok := key.(types.String)
			if !ok {
				return nil, fmt.Errorf("a field's name is a string, not a %s", key.Type().TypeName())
			}
			x, err := r.native(v.Get(key), depth+1)
			if err != nil {
				return nil, err
			}
			out[string(name)] = x
		}
		return out, nil
	}
	return scalar(v)
}

// weight is what an object in JSON takes to be written.
func weight(x any) int {
	out := 1
	switch x := x.(type) {
	case tree:
		return weight(map[string]any(x))
	case map[string]any:
		for name, in := range x {
			out += len(name)/16 + weight(in)
		}
	case []any:
		for _, in := range x {
			out += weight(in)
		}
	case string:
		out += len(x) / 16
	}
	return out
}

// scalar is native for what holds no other values.
func scalar(v ref.Val) (any, error) {
	switch v := v.(type) {
	case types.String:
		return string(v), nil
	case types.Bool:
		return bool(v), nil
	case types.Int:
		return int64(v), nil
	case types.Uint:
		if v > math.MaxInt64 {
			return nil, fmt.Errorf("%d is too large", v)
		}
		return int64(v), nil
	case types.Double:
		if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
			return nil, fmt.Errorf("JSON has no %v", v)
		}
		return float64(v), nil
	case types.Null:
		return nil, nil //nolint:nilnil // null
	case types.Bytes:
		return base64.StdEncoding.EncodeToString(v), nil
	case types.Timestamp:
		return v.UTC().Format(time.RFC3339), nil
	case types.Duration:
		return v.String(), nil
	}
	return nil, fmt.Errorf("a field cannot be a %s", v.Type().TypeName())
}
