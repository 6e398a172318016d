package wire

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// View is an object of Protobuf object data as its JSON has it, read as far as
// it is asked for. What this build does not know is not seen, and not touched.
//
// Its values are what encoding/json makes of JSON, but for whole numbers,
// which are int64, and objects, which are *View or *ViewMap.
type View struct {
	plan  *message
	data  []byte
	extra map[string]string // members that are not on the wire
}

// NewView returns the view of an object. The error is ErrUnknownKind for kinds
// that have no Go type here.
func NewView(apiVersion, kind string, object []byte) (*View, error) {
	gvk := gvkOf(apiVersion, kind)
	plan, err := shared().plans.of(gvk)
	if err == nil && plan == nil {
		err = ErrUnknownKind
	}
	if err != nil {
		return nil, fmt.Errorf("view %s: %w", gvk, err)
	}
	return &View{plan, object, map[string]string{"apiVersion": apiVersion, "kind": kind}}, nil
}

// Get returns a member. A value that cannot be read is an error.
func (v *View) Get(name string) (any, bool) {
	if s, ok := v.extra[name]; ok {
		return s, true
	}
	route, ok := v.plan.byName()[name]
	if !ok {
		return nil, false
	}
	data := v.data
	for _, in := range route.in {
		var err error
		if data, err = joined(data, in); err != nil {
			return err, true
		}
	}
	x, ok, err := route.member.read(data, route.num)
	if err != nil {
		return err, true
	}
	return x, ok
}

// Names returns the names of the members that the object has.
func (v *View) Names() []string {
	var out []string
	for name := range v.extra {
		out = append(out, name)
	}
	for name := range v.plan.byName() {
		if _, ok := v.Get(name); ok && v.extra[name] == "" {
			out = append(out, name)
		}
	}
	return out
}

// ViewMap is a map of an object, as a View is an object.
type ViewMap struct {
	member *member
	num    protowire.Number
	data   []byte // of the message that holds the map
}

// Get returns an entry.
func (m *ViewMap) Get(key string) (any, bool) {
	var found any
	ok := false
	err := occurrences(m.data, m.num, func(entry []byte, _ uint64) error {
		k, v, err := readPair(entry)
		if err != nil || string(k) != key {
			return err
		}
		ok = true // the last counts
		found, err = m.member.value.read(v, 0)
		return err
	})
	if err != nil {
		return err, true
	}
	return found, ok
}

// Names returns the keys.
func (m *ViewMap) Names() []string {
	var out []string
	seen := map[string]struct{}{}
	_ = occurrences(m.data, m.num, func(entry []byte, _ uint64) error { // Get says what is wrong
		k, _, err := readPair(entry)
		if _, ok := seen[string(k)]; !ok && err == nil {
			seen[string(k)] = struct{}{}
			out = append(out, string(k))
		}
		return err
	})
	return out
}

// route leads to a member of a message by its JSON name: through messages
// whose members are inline.
type route struct {
	in     []protowire.Number
	num    protowire.Number
	member *member
}

// byName are the members of a message and of those inline.
func (m *message) byName() map[string]route {
	m.once.Do(func() {
		m.routes = map[string]route{}
		for num, i := range m.byNum {
			if i < 0 {
				continue
			}
			n, f := protowire.Number(num), &m.fields[i]
			if f.shape != inline {
				m.routes[strings.Trim(string(f.name), `":`)] = route{num: n, member: f}
				continue
			}
			for name, r := range f.value.msg.byName() {
				r.in = append([]protowire.Number{n}, r.in...)
				m.routes[name] = r
			}
		}
	})
	return m.routes
}

// read returns a member of a message; false if JSON has none of it.
func (f *member) read(data []byte, num protowire.Number) (any, bool, error) {
	switch f.shape {
	case list:
		return f.list(data, num)
	case mapping:
		some := false
		err := occurrences(data, num, func([]byte, uint64) error { some = true; return nil })
		if !some || err != nil {
			return nil, !f.omitEmpty, err
		}
		return &ViewMap{f, num, data}, true, nil
	}
	var b []byte
	var n uint64
	count := 0
	err := occurrences(data, num, func(value []byte, number uint64) error {
		if (value != nil) != (f.value.wire == protowire.BytesType) {
			return malformed("field %d has the wrong wire type", num)
		}
		if count++; count > 1 && f.value.op > opFloat64 {
			value = append(slices.Clip(b), value...) // parts of a message merge
		}
		b, n = value, number
		return nil
	})
	switch {
	case err != nil:
		return nil, false, err
	case count == 0 && f.nilable():
		return nil, !f.omitEmpty, nil
	case f.shape == one && (f.omitEmpty && f.value.isEmpty(b, n) || f.omitZero && len(b) == 0):
		return nil, false, nil
	}
	x, err := f.value.read(b, n)
	return x, true, err
}

func (f *member) list(data []byte, num protowire.Number) (any, bool, error) {
	var out []any
	err := f.elements(data, num, func(_ int, b []byte, n uint64) error {
		x, err := f.value.read(b, n)
		out = append(out, x)
		return err
	})
	if out == nil || err != nil {
		return nil, !f.omitEmpty, err
	}
	return out, true, nil
}

// elements calls each for the elements of a list, packed or not.
func (f *member) elements(data []byte, num protowire.Number, each func(i int, b []byte, n uint64) error) error {
	i := 0
	return occurrences(data, num, func(b []byte, n uint64) error {
		if (b != nil) == (f.value.wire == protowire.BytesType) {
			i++
			return each(i-1, b, n)
		}
		if f.value.wire != protowire.VarintType {
			return malformed("field %d has the wrong wire type", num)
		}
		for len(b) > 0 {
			n, size := protowire.ConsumeVarint(b)
			if size < 0 {
				return malformed("packed field: %v", protowire.ParseError(size))
			}
			if err := each(i, nil, n); err != nil {
				return err
			}
			b = b[size:]
			i++
		}
		return nil
	})
}

// read returns a value as JSON has it. Nil and 0 are the zero of each type.
func (v *value) read(b []byte, n uint64) (any, error) {
	switch v.op {
	case opString:
		if !utf8.Valid(b) {
			return string([]rune(string(b))), nil // as JSON: one mark for each byte
		}
		return string(b), nil
	case opBytes:
		return base64.StdEncoding.EncodeToString(b), nil
	case opBool:
		return n != 0, nil
	case opInt32:
		return int64(int32(n)), nil
	case opInt64:
		return int64(n), nil
	case opMessage:
		out := &View{plan: v.msg, data: b}
		if v.prefix != nil {
			if err := json.Unmarshal([]byte("{"+strings.TrimSuffix(string(v.prefix), ",")+"}"), &out.extra); err != nil {
				return nil, fmt.Errorf("read the type of a nested object: %w", err)
			}
		}
		return out, nil
	default:
		var t transcoder
		text, err := t.value(nil, v, b, n, 0)
		if err != nil {
			return nil, err
		}
		return parse(text)
	}
}

// parse reads JSON as a View has its values.
func parse(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var out any
	if err := d.Decode(&out); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return numbers(out)
}

func numbers(x any) (_ any, err error) {
	switch x := x.(type) {
	case json.Number:
		if i, err := x.Int64(); err == nil {
			return i, nil
		}
		f, err := x.Float64()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		return f, nil
	case map[string]any:
		for k, in := range x {
			if x[k], err = numbers(in); err != nil {
				return nil, err
			}
		}
	case []any:
		for i, in := range x {
			if x[i], err = numbers(in); err != nil {
				return nil, err
			}
		}
	}
	return x, nil
}

// occurrences calls each for the fields of a number, with the bytes or the bits
// of the number.
func occurrences(data []byte, num protowire.Number, each func(b []byte, n uint64) error) error {
	for len(data) > 0 {
		got, typ, b, n, size := field(data)
		if size < 0 {
			return malformed("protobuf field: %v", protowire.ParseError(size))
		}
		if got == num {
			if typ != protowire.BytesType {
				b = nil
			} else if b == nil {
				b = []byte{}
			}
			if err := each(b, n); err != nil {
				return err
			}
		}
		data = data[size:]
	}
	return nil
}

// joined returns a message within a message.
func joined(data []byte, num protowire.Number) ([]byte, error) {
	var out []byte
	err := occurrences(data, num, func(b []byte, _ uint64) error {
		if out == nil {
			out = slices.Clip(b)
		} else {
			out = append(out, b...)
		}
		return nil
	})
	return out, err
}

// readPair reads an entry of a map of strings to something with a length.
func readPair(entry []byte) (key, value []byte, err error) {
	for len(entry) > 0 {
		num, typ, b, _, n := field(entry)
		switch {
		case n < 0:
			return nil, nil, malformed("map entry: %v", protowire.ParseError(n))
		case typ != protowire.BytesType && num <= 2:
			return nil, nil, malformed("map entry field %d has wire type %d", num, typ)
		case num == 1:
			key = b
		case num == 2:
			value = b
		}
		entry = entry[n:]
	}
	return key, value, nil
}
