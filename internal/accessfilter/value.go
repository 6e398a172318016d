package accessfilter

import (
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
	Names() []string
}

// tree is an object in JSON.
type tree map[string]any

func (t tree) Get(name string) (any, bool) { v, ok := t[name]; return v, ok }
func (t tree) Names() []string             { return slices.Sorted(maps.Keys(t)) }

// adapter makes values of CEL of those of objects, and of all others as usual.
type adapter struct{}

func (adapter) NativeToValue(x any) ref.Val {
	switch x := x.(type) {
	case map[string]any:
		return &members{Members: tree(x)}
	case Members:
		return &members{Members: x}
	case []any:
		return types.NewDynamicList(adapter{}, x)
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
	return types.DefaultTypeAdapter.NativeToValue(x)
}

// members is a map of CEL.
type members struct{ Members }

var _ traits.Mapper = (*members)(nil)

func (*members) Type() ref.Type { return types.MapType }
func (m *members) Value() any   { return m.Members }

func (m *members) Find(key ref.Val) (ref.Val, bool) {
	name, ok := key.(types.String)
	if !ok {
		return nil, false
	}
	v, ok := m.Members.Get(string(name))
	if !ok {
		return nil, false
	}
	return adapter{}.NativeToValue(v), true
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

func (m *members) Size() ref.Val { return types.Int(len(m.Names())) }

func (m *members) Iterator() traits.Iterator {
	return types.NewStringList(adapter{}, m.Names()).Iterator()
}

func (m *members) Equal(other ref.Val) ref.Val {
	o, ok := other.(traits.Mapper)
	names := m.Names()
	if !ok || o.Size() != types.Int(len(names)) {
		return types.False
	}
	for _, name := range names {
		mine, _ := m.Find(types.String(name))
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
func native(v ref.Val, depth int) (any, error) {
	if depth > deepest {
		return nil, fmt.Errorf("the value is more than %d levels deep", deepest)
	}
	switch v := v.(type) {
	case *members:
		switch m := v.Members.(type) {
		case tree:
			return map[string]any(m), nil
		case nodeSet:
			out := map[string]any{}
			for name := range m {
				out[name] = true
			}
			return out, nil
		}
		return v.Members, nil
	case *types.Optional:
		if !v.HasValue() {
			return nil, nil //nolint:nilnil // null
		}
		return native(v.GetValue(), depth)
	case traits.Lister:
		out := []any{}
		for it := v.Iterator(); it.HasNext() == types.True; {
			x, err := native(it.Next(), depth+1)
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
			x, err := native(v.Get(key), depth+1)
			if err != nil {
				return nil, err
			}
			out[string(name)] = x
		}
		return out, nil
	case *types.Err:
		return nil, v
	}
	return scalar(v)
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
