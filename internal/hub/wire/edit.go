package wire

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Edit returns Protobuf object data in which the field at a path of JSON names
// has a value. A value of nil takes the field away; one that is not there is no
// error then. A list's element is named by its index. What is missing above
// the field is made, but no elements of lists.
//
// Values are those of a [View], and a view within one keeps what this build
// does not know. Nothing but the field is touched.
func Edit(apiVersion, kind string, object []byte, path []string, value any) ([]byte, error) {
	gvk := gvkOf(apiVersion, kind)
	plan, err := shared().plans.of(gvk)
	if err == nil && plan == nil {
		err = ErrUnknownKind
	}
	if err == nil {
		object, err = plan.edit(object, path, value)
	}
	if err != nil {
		return nil, fmt.Errorf("edit %s: %w", gvk, err)
	}
	return object, nil
}

// edit is Edit for a message.
func (m *message) edit(data []byte, path []string, value any) ([]byte, error) {
	r, ok := m.byName()[path[0]]
	if !ok {
		return nil, fmt.Errorf("there is no field %q", path[0])
	}
	return within(data, r.in, func(data []byte) ([]byte, error) {
		if len(path) == 1 {
			put, err := r.member.encode(r.num, value)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path[0], err)
			}
			return replace(data, r.num, put)
		}
		out, err := r.member.editIn(data, r.num, path[1:], value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path[0], err)
		}
		return out, nil
	})
}

// within changes a message that is in others.
func within(data []byte, in []protowire.Number, change func([]byte) ([]byte, error)) ([]byte, error) {
	if len(in) == 0 {
		return change(data)
	}
	inner, err := joined(data, in[0])
	if err != nil {
		return nil, err
	}
	out, err := within(inner, in[1:], change)
	if err != nil {
		return nil, err
	}
	if inner == nil && len(out) == 0 {
		return data, nil
	}
	return replace(data, in[0], appendBytesField(nil, in[0], out))
}

// editIn changes what is below a member of a message.
func (f *member) editIn(data []byte, num protowire.Number, path []string, value any) ([]byte, error) {
	switch f.shape {
	case list:
		return f.editElement(data, num, path, value)
	case mapping:
		return f.editEntry(data, num, path, value)
	}
	if f.value.op != opMessage {
		return nil, fmt.Errorf("it has no field %q", path[0])
	}
	return within(data, []protowire.Number{num}, func(in []byte) ([]byte, error) { return f.value.msg.edit(in, path, value) })
}

func (f *member) editElement(data []byte, num protowire.Number, path []string, value any) ([]byte, error) {
	index, err := strconv.ParseUint(path[0], 10, 31)
	if err != nil {
		return nil, fmt.Errorf("%q is no index of a list", path[0])
	}
	var put []byte
	found := false
	err = f.elements(data, num, func(i int, b []byte, n uint64) error {
		if i != int(index) {
			put = f.value.append(put, num, b, n)
			return nil
		}
		found = true
		if len(path) > 1 {
			if f.value.op != opMessage {
				return fmt.Errorf("it has no field %q", path[1])
			}
			if b, err = f.value.msg.edit(b, path[1:], value); err != nil {
				return fmt.Errorf("%s: %w", path[0], err)
			}
		} else {
			if value == nil {
				return nil
			}
			if b, n, err = f.value.encode(value, 0); err != nil {
				return fmt.Errorf("%s: %w", path[0], err)
			}
		}
		put = f.value.append(put, num, b, n)
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case found:
		return replace(data, num, put)
	case value == nil:
		return data, nil
	}
	return nil, fmt.Errorf("the list has no element %s", path[0])
}

func (f *member) editEntry(data []byte, num protowire.Number, path []string, value any) ([]byte, error) {
	var entries [][]byte
	var old []byte
	at := -1 // where the key is
	err := occurrences(data, num, func(typ protowire.Type, entry []byte, _ uint64) error {
		if typ != protowire.BytesType {
			return malformed("field %d has wire type %d", num, typ)
		}
		p, err := readPair(entry)
		if string(p.key) != path[0] {
			entries = append(entries, entry)
			return err
		}
		if old = p.value; at < 0 { // the last counts
			at, entries = len(entries), append(entries, nil)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var b []byte
	switch {
	case len(path) > 1 && f.value.op != opMessage:
		return nil, fmt.Errorf("it has no field %q", path[1])
	case len(path) > 1:
		b, err = f.value.msg.edit(old, path[1:], value)
	case value != nil:
		b, _, err = f.value.encode(value, 0)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path[0], err)
	case at < 0 && (value == nil || len(path) > 1 && len(b) == 0):
		return data, nil
	case at < 0:
		at, entries = len(entries), append(entries, nil)
	}
	if len(path) > 1 || value != nil {
		entries[at] = appendPair(nil, path[0], b)
	}
	var put []byte
	for _, entry := range entries {
		if entry != nil {
			put = appendBytesField(put, num, entry)
		}
	}
	return replace(data, num, put)
}

// replace returns a message with other fields of a number.
func replace(data []byte, num protowire.Number, put []byte) ([]byte, error) {
	out := make([]byte, 0, len(data)+len(put))
	placed := false
	for at := 0; at < len(data); {
		got, _, _, _, size := field(data[at:])
		if size < 0 {
			return nil, malformed("protobuf field: %v", protowire.ParseError(size))
		}
		switch {
		case got != num:
			out = append(out, data[at:at+size]...)
		case !placed:
			out = append(out, put...)
			placed = true
		}
		at += size
	}
	if !placed {
		out = append(out, put...)
	}
	return out, nil
}

// encode returns the fields of a member with a value.
func (f *member) encode(num protowire.Number, x any) ([]byte, error) { return f.encodeDeep(num, x, 0) }

func (f *member) encodeDeep(num protowire.Number, x any, depth int) (out []byte, err error) {
	if x == nil {
		return nil, nil
	}
	switch f.shape {
	case list:
		items, ok := x.([]any)
		if !ok {
			return nil, fmt.Errorf("it is a list, and %s is given", kindOf(x))
		}
		for i, item := range items {
			b, n, err := f.value.encode(item, depth)
			if err != nil {
				return nil, fmt.Errorf("%d: %w", i, err)
			}
			out = f.value.append(out, num, b, n)
		}
		return out, nil
	case mapping:
		names, get, ok := object(x)
		if !ok {
			return nil, fmt.Errorf("it is a map, and %s is given", kindOf(x))
		}
		for _, name := range names {
			item, _ := get(name)
			b, _, err := f.value.encode(item, depth)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			out = appendBytesField(out, num, appendPair(nil, name, b))
		}
		return out, nil
	}
	b, n, err := f.value.encode(x, depth)
	if err != nil {
		return nil, err
	}
	return f.value.append(nil, num, b, n), nil
}

// object returns what a value has as a JSON object.
func object(x any) (names []string, get func(string) (any, bool), ok bool) {
	switch x := x.(type) {
	case map[string]any:
		return slices.Sorted(maps.Keys(x)), func(name string) (any, bool) { v, ok := x[name]; return v, ok }, true
	case interface {
		Names() []string
		Get(name string) (any, bool)
	}:
		names := x.Names()
		slices.Sort(names)
		return names, x.Get, true
	}
	return nil, nil, false
}

// kindOf says what a value is.
func kindOf(x any) string {
	switch x.(type) {
	case string:
		return "a string"
	case bool:
		return "a bool"
	case int64, float64:
		return "a number"
	case []any:
		return "a list"
	case nil:
		return "null"
	}
	return "an object"
}

// append writes a field with a value.
func (v *value) append(dst []byte, num protowire.Number, b []byte, n uint64) []byte {
	dst = protowire.AppendTag(dst, num, v.wire)
	switch v.wire {
	case protowire.VarintType:
		return protowire.AppendVarint(dst, n)
	case protowire.Fixed64Type:
		return protowire.AppendFixed64(dst, n)
	default:
		return protowire.AppendBytes(dst, b)
	}
}

// appendPair writes an entry of a map.
func appendPair(dst []byte, key string, b []byte) []byte {
	return appendBytesField(appendStringField(dst, 1, key), 2, b)
}

// encode returns the bytes, or the bits, of a value that JSON has.
func (v *value) encode(x any, depth int) (b []byte, n uint64, err error) {
	wrong := func(want string) error { return fmt.Errorf("it is %s, and %s is given", want, kindOf(x)) }
	switch v.op {
	case opString, opBytes:
		s, ok := x.(string)
		if !ok {
			return nil, 0, wrong("a string")
		}
		if b = []byte(s); v.op == opBytes {
			if b, err = base64.StdEncoding.DecodeString(s); err != nil {
				return nil, 0, fmt.Errorf("it is bytes in base64: %w", err)
			}
		}
		return b, 0, nil
	case opBool:
		t, ok := x.(bool)
		if !ok {
			return nil, 0, wrong("a bool")
		}
		if t {
			n = 1
		}
		return nil, n, nil
	case opInt32, opInt64:
		i, ok := x.(int64)
		if f, isFloat := x.(float64); isFloat && f == math.Trunc(f) && math.Abs(f) < 1<<53 {
			i, ok = int64(f), true
		}
		if !ok {
			return nil, 0, wrong("a whole number")
		}
		if v.op == opInt32 && int64(int32(i)) != i {
			return nil, 0, fmt.Errorf("%d does not fit into 32 bits", i)
		}
		return nil, uint64(i), nil
	case opFloat64:
		f, ok := x.(float64)
		if i, isInt := x.(int64); isInt {
			f, ok = float64(i), true
		}
		if !ok {
			return nil, 0, wrong("a number")
		}
		return nil, math.Float64bits(f), nil
	case opMessage:
		b, err = v.message(x, depth+1)
		return b, 0, err
	default:
		b, err = v.typed(x)
		return b, 0, err
	}
}

func (v *value) message(x any, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, malformed("nested too deeply")
	}
	if view, ok := x.(*View); ok && view.plan == v.msg {
		return view.data, nil
	}
	names, get, ok := object(x)
	if !ok {
		return nil, fmt.Errorf("it is an object, and %s is given", kindOf(x))
	}
	var out []byte
	for _, name := range names {
		if v.prefix != nil && (name == "apiVersion" || name == "kind") {
			continue // not on the wire
		}
		r, ok := v.msg.byName()[name]
		if !ok {
			return nil, fmt.Errorf("there is no field %q", name)
		}
		item, _ := get(name)
		put, err := r.member.encodeDeep(r.num, item, depth)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if len(put) == 0 {
			continue
		}
		out, err = within(out, r.in, func(data []byte) ([]byte, error) { return append(data, put...), nil })
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// typed encodes a value of a type with its own JSON, by that type.
func (v *value) typed(x any) ([]byte, error) {
	var m protoMessage
	switch v.op {
	case opTime:
		m = &metav1.Time{}
	case opMicroTime:
		m = &metav1.MicroTime{}
	case opQuantity:
		m = &resource.Quantity{}
	case opIntOrString:
		m = &intstr.IntOrString{}
	case opFieldsV1:
		m = &metav1.FieldsV1{}
	case opItems:
		items, ok := x.([]any)
		if !ok {
			return nil, fmt.Errorf("it is a list, and %s is given", kindOf(x))
		}
		var out []byte
		for _, item := range items {
			s, ok := item.(string)
			if !ok {
				return nil, fmt.Errorf("it is a list of strings, and %s is in it", kindOf(item))
			}
			out = appendStringField(out, 1, s)
		}
		return out, nil
	default:
		var ok bool
		if m, ok = reflect.TypeAssert[protoMessage](reflect.New(v.typ)); !ok {
			return nil, ErrUnknownKind
		}
	}
	text, err := json.Marshal(unviewed(x))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	out, err := m.Marshal()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return out, nil
}

// unviewed is a value without views.
func unviewed(x any) any {
	if list, ok := x.([]any); ok {
		out := make([]any, len(list))
		for i := range list {
			out[i] = unviewed(list[i])
		}
		return out
	}
	names, get, ok := object(x)
	if !ok {
		return x
	}
	out := map[string]any{}
	for _, name := range names {
		item, _ := get(name)
		out[name] = unviewed(item)
	}
	return out
}
