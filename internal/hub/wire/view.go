package wire

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// View is an object of Protobuf object data as its JSON has it, read as far as
// it is asked for. What this build does not know is not seen, and not touched.
//
// Its values are what encoding/json makes of JSON, but for whole numbers,
// which are int64, and objects, which are *View or *ViewMap.
//
// A View is for one goroutine. Of a large message it remembers what was asked
// for: an expression that asks once per element of a list would else go
// through all of its bytes each time.
type View struct {
	plan   *message
	data   []byte
	depth  int
	named  metav1.TypeMeta // what it is, which is not on the wire; empty within an object
	memory map[string]answer
}

// large is the least size in bytes of a message that is remembered.
const large = 1 << 10

// answer is what Get returned.
type answer struct {
	value any
	ok    bool
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
	return &View{plan: plan, data: object, named: metav1.TypeMeta{APIVersion: apiVersion, Kind: kind}}, nil
}

func (v *View) typed(name string) string {
	switch name {
	case "apiVersion":
		return v.named.APIVersion
	case "kind":
		return v.named.Kind
	}
	return ""
}

// Get returns a member. A value that cannot be read is an error.
func (v *View) Get(name string) (any, bool) {
	if s := v.typed(name); s != "" {
		return s, true
	}
	route, ok := v.plan.byName()[name]
	if !ok {
		return nil, false
	}
	if a, ok := v.memory[name]; ok {
		return a.value, a.ok
	}
	x, ok, err := v.read(route)
	if err != nil {
		x, ok = err, true
	}
	if len(v.data) >= large {
		if v.memory == nil {
			v.memory = map[string]answer{}
		}
		v.memory[name] = answer{x, ok}
	}
	return x, ok
}

func (v *View) read(r route) (_ any, _ bool, err error) {
	data := v.data
	for _, in := range r.in {
		if data, err = joined(data, in); err != nil {
			return nil, false, err
		}
	}
	return r.member.read(data, r.num, v.depth)
}

// Text is Get for members that are strings, at less cost: the bytes are those of
// the object. It returns false if it is none, or not there.
func (v *View) Text(name string) ([]byte, bool) {
	route, ok := v.plan.byName()[name]
	if !ok || len(route.in) > 0 || route.member.value.op != opString || route.member.shape > pointer {
		return nil, false
	}
	var found []byte
	there := false
	for data := v.data; len(data) > 0; {
		num, typ, b, _, size := field(data)
		if size < 0 || num == route.num && typ != protowire.BytesType {
			return nil, false // Get says what is wrong
		}
		if num == route.num {
			found, there = b, true
		}
		data = data[size:]
	}
	if !there || len(found) == 0 && route.member.shape == one || !utf8.Valid(found) {
		return nil, false
	}
	return found, true
}

// Len is the length of the object on the wire.
func (v *View) Len() int { return len(v.data) }

// Names returns the names of the members that the object has, sorted.
func (v *View) Names() []string {
	var out []string
	for _, name := range []string{"apiVersion", "kind"} {
		if v.typed(name) != "" {
			out = append(out, name)
		}
	}
	for name := range v.plan.byName() {
		if _, ok := v.Get(name); ok && v.typed(name) == "" {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// ViewMap is a map of an object, as a View is an object.
type ViewMap struct {
	value *value
	depth int
	pairs []pair // sorted by key
}

// Text leaves all to Get.
func (*ViewMap) Text(string) ([]byte, bool) { return nil, false }

// Len is the length of the map on the wire, or somewhat less.
func (m *ViewMap) Len() int {
	out := 0
	for _, p := range m.pairs {
		out += len(p.key) + len(p.value)
	}
	return out
}

// Get returns an entry. A value that cannot be read is an error.
func (m *ViewMap) Get(key string) (any, bool) {
	i, ok := slices.BinarySearchFunc(m.pairs, key, func(p pair, key string) int { return strings.Compare(string(p.key), key) })
	if !ok {
		return nil, false
	}
	x, err := m.value.read(m.pairs[i].value, 0, m.depth)
	if err != nil {
		return err, true
	}
	return x, true
}

// Names returns the keys, sorted.
func (m *ViewMap) Names() []string {
	out := make([]string, len(m.pairs))
	for i, p := range m.pairs {
		out[i] = string(p.key)
	}
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
func (f *member) read(data []byte, num protowire.Number, depth int) (any, bool, error) {
	switch f.shape {
	case list:
		return f.list(data, num, depth)
	case mapping:
		pairs, err := pairsOf(data, num)
		if pairs == nil || err != nil {
			return nil, !f.omitEmpty, err
		}
		return &ViewMap{&f.value, depth, pairs}, true, nil
	}
	var b []byte
	var n uint64
	count := 0
	err := occurrences(data, num, func(typ protowire.Type, value []byte, number uint64) error {
		if typ != f.value.wire {
			return malformed("field %d has wire type %d", num, typ)
		}
		count++
		b, n = value, number
		return nil
	})
	if count > 1 && f.value.op > opFloat64 && err == nil {
		b, err = joined(data, num)
	}
	switch {
	case err != nil:
		return nil, false, err
	case count == 0 && f.nilable():
		return nil, !f.omitEmpty, nil
	case f.shape == one && (f.omitEmpty && f.value.isEmpty(b, n) || f.omitZero && len(b) == 0):
		return nil, false, nil
	}
	x, err := f.value.read(b, n, depth)
	return x, true, err
}

func (f *member) list(data []byte, num protowire.Number, depth int) (any, bool, error) {
	count := 0
	if err := f.elements(data, num, func(int, []byte, uint64) error { count++; return nil }); err != nil || count == 0 {
		return nil, !f.omitEmpty, err
	}
	out := make([]any, count)
	var views []View // of one piece, for there may be thousands
	if f.value.op == opMessage && f.value.prefix == nil && depth < maxDepth {
		views = make([]View, count)
	}
	err := f.elements(data, num, func(i int, b []byte, n uint64) (err error) {
		if views != nil {
			views[i] = View{plan: f.value.msg, data: b, depth: depth + 1}
			out[i] = &views[i]
			return nil
		}
		out[i], err = f.value.read(b, n, depth)
		return err
	})
	if err != nil {
		return nil, !f.omitEmpty, err
	}
	return out, true, nil
}

// elements calls each for the elements of a list, packed or not.
func (f *member) elements(data []byte, num protowire.Number, each func(i int, b []byte, n uint64) error) error {
	i := 0
	return occurrences(data, num, func(typ protowire.Type, b []byte, n uint64) error {
		if typ == f.value.wire {
			i++
			return each(i-1, b, n)
		}
		if f.value.wire != protowire.VarintType || typ != protowire.BytesType {
			return malformed("field %d has wire type %d", num, typ)
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
func (v *value) read(b []byte, n uint64, depth int) (any, error) {
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
		if depth >= maxDepth {
			return nil, malformed("nested too deeply")
		}
		out := &View{plan: v.msg, data: b, depth: depth + 1}
		if v.prefix != nil {
			if err := json.Unmarshal([]byte("{"+strings.TrimSuffix(string(v.prefix), ",")+"}"), &out.named); err != nil {
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

// occurrences calls each for the fields of a number, as [fields] does.
func occurrences(data []byte, num protowire.Number, each func(typ protowire.Type, b []byte, n uint64) error) error {
	for len(data) > 0 {
		got, typ, b, n, size := field(data)
		if size < 0 {
			return malformed("protobuf field: %v", protowire.ParseError(size))
		}
		if got == num {
			if err := each(typ, b, n); err != nil {
				return err
			}
		}
		data = data[size:]
	}
	return nil
}

// joined returns a message within a message, whose parts are merged; nil if
// there is none.
func joined(data []byte, num protowire.Number) ([]byte, error) {
	var out []byte
	err := occurrences(data, num, func(typ protowire.Type, b []byte, _ uint64) error {
		switch {
		case typ != protowire.BytesType:
			return malformed("field %d has wire type %d", num, typ)
		case out == nil:
			out = slices.Clip(b)
		default:
			out = append(out, b...)
		}
		return nil
	})
	return out, err
}

// pairsOf returns the entries of a map, sorted by key.
func pairsOf(data []byte, num protowire.Number) ([]pair, error) {
	var out []pair
	err := occurrences(data, num, func(typ protowire.Type, entry []byte, _ uint64) error {
		if typ != protowire.BytesType {
			return malformed("field %d has wire type %d", num, typ)
		}
		p, err := readPair(entry)
		out = append(out, p)
		return err
	})
	return sortPairs(out), err
}

// readPair reads an entry of a map of strings to something with a length.
func readPair(entry []byte) (p pair, err error) {
	for len(entry) > 0 {
		num, typ, b, _, n := field(entry)
		switch {
		case n < 0:
			return pair{}, malformed("map entry: %v", protowire.ParseError(n))
		case typ != protowire.BytesType && num <= 2:
			return pair{}, malformed("map entry field %d has wire type %d", num, typ)
		case num == 1:
			p.key = b
		case num == 2:
			p.value = b
		}
		entry = entry[n:]
	}
	return p, nil
}

// sortPairs sorts the entries of a map by key; of a key the last counts.
func sortPairs(pairs []pair) []pair {
	if slices.IsSortedFunc(pairs, func(a, b pair) int { return cmp.Or(bytes.Compare(a.key, b.key), -1) }) {
		return pairs
	}
	slices.SortStableFunc(pairs, func(a, b pair) int { return bytes.Compare(a.key, b.key) })
	out := pairs[:0]
	for i, p := range pairs {
		if i+1 == len(pairs) || !bytes.Equal(p.key, pairs[i+1].key) {
			out = append(out, p)
		}
	}
	return out
}
