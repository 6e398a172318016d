package wire

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	sigsjson "sigs.k8s.io/json"
)

// codec holds what is derived from the linked types, once, on first use.
type codec struct {
	plans plans
	pool  sync.Pool // of *transcoder
}

var shared = sync.OnceValue(func() *codec {
	return &codec{
		plans: plans{byType: make(map[reflect.Type]*message)},
		pool:  sync.Pool{New: func() any { return new(transcoder) }},
	}
})

// ToJSON appends the JSON that the API server gives for Protobuf object data.
// withType says whether kind and apiVersion come first; items of a list lack
// them. It returns ErrUnknownKind, or ErrUnknownField if the object holds a
// field that would be lost.
//
// It walks the wire format by a plan made from the Go type's struct tags and
// never builds the Go value.
func ToJSON(dst []byte, apiVersion, kind string, object []byte, withType bool) ([]byte, error) {
	c := shared()
	gvk := gvkOf(apiVersion, kind)
	plan, err := c.plans.of(gvk)
	if err != nil {
		return dst, fmt.Errorf("write %s as JSON: %w", gvk, err)
	}
	var prefix []byte
	if withType {
		prefix = appendJSONType(prefix, apiVersion, kind)
	}
	var out []byte
	if plan == nil {
		out, err = typedToJSON(dst, apiVersion, kind, object, withType)
	} else {
		t := c.pool.Get().(*transcoder) //nolint:errcheck // the pool holds nothing else
		out, err = t.message(dst, plan, prefix, object, 0)
		t.reset()
		c.pool.Put(t)
	}
	if err != nil {
		return dst, fmt.Errorf("write %s as JSON: %w", gvk, err)
	}
	return out, nil
}

// FromJSON returns the Protobuf object data of an object in JSON. It refuses
// unknown and duplicate fields, and another type than the given.
func FromJSON(apiVersion, kind string, text []byte) ([]byte, error) {
	gvk := gvkOf(apiVersion, kind)
	obj, err := kinds().New(gvk)
	if err != nil {
		return nil, fmt.Errorf("read JSON of %s: %w", gvk, ErrUnknownKind)
	}
	m, ok := obj.(protoMessage)
	if !ok {
		return nil, fmt.Errorf("read JSON of %s: %w in protobuf", gvk, ErrUnknownKind)
	}
	strict, err := sigsjson.UnmarshalStrict(text, obj)
	if err == nil {
		err = errors.Join(strict...)
	}
	if err != nil {
		return nil, fmt.Errorf("read JSON of %s: %w: %w", gvk, ErrMalformed, err)
	}
	if got := obj.GetObjectKind().GroupVersionKind(); !got.Empty() && got != gvk {
		return nil, fmt.Errorf("read JSON of %s: %w", gvk, malformed("object is a %s", got))
	}
	data, err := m.Marshal()
	if err != nil {
		return nil, fmt.Errorf("write %s as protobuf: %w", gvk, err)
	}
	return data, nil
}

// typedToJSON is ToJSON by way of the Go type.
func typedToJSON(dst []byte, apiVersion, kind string, object []byte, withType bool) ([]byte, error) {
	obj, err := kinds().New(gvkOf(apiVersion, kind))
	if err != nil {
		return nil, ErrUnknownKind
	}
	if withType {
		obj.GetObjectKind().SetGroupVersionKind(gvkOf(apiVersion, kind))
	}
	return appendTyped(dst, obj, object)
}

// appendTyped decodes data into m and writes m's JSON. The type's own decoder
// drops unknown fields in silence; that m encodes to the same bytes shows
// that there were none.
func appendTyped(dst []byte, m any, data []byte) ([]byte, error) {
	pm, ok := m.(protoMessage)
	if !ok {
		return nil, ErrUnknownKind
	}
	if err := pm.Unmarshal(data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if len(data) > 0 {
		again, err := pm.Marshal()
		if err != nil || !bytes.Equal(again, data) {
			return nil, fmt.Errorf("%w in %T", ErrUnknownField, m)
		}
	}
	text, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return append(dst, text...), nil
}

// transcoder holds the stacks of one walk, so that walks allocate nothing.
type transcoder struct {
	heads []head
	occs  []occ
	pairs []pair
}

// head is the chain of a field's occurrences in a message: places in
// transcoder.occs counted from 1, 0 for none.
type head struct{ first, last int32 }

// occ is one occurrence of a field: the bits of a number, or the place of
// bytes in the message. It holds no pointer, which spares the collector.
type occ struct {
	v    uint64
	next int32
}

func place(offset, length int) uint64 { return uint64(offset)<<32 | uint64(length) }

// in returns the bytes of an occurrence in its message.
func (o occ) in(data []byte) []byte {
	offset := o.v >> 32
	return data[offset : offset+o.v&math.MaxUint32]
}

// pair is one entry of a map.
type pair struct{ key, value []byte }

func (t *transcoder) reset() {
	const most = 16 << 10 // entries worth keeping
	if cap(t.occs) > most || cap(t.heads) > most || cap(t.pairs) > most {
		*t = transcoder{}
		return
	}
	// The pool must not keep objects alive.
	clear(t.pairs[:cap(t.pairs)])
	t.heads, t.occs, t.pairs = t.heads[:0], t.occs[:0], t.pairs[:0]
}

// message writes a message as an object that starts with the members of
// prefix.
func (t *transcoder) message(dst []byte, m *message, prefix, data []byte, depth int) ([]byte, error) {
	dst = append(dst, '{')
	open := len(dst)
	dst = append(dst, prefix...)
	dst, err := t.members(dst, m, data, open, depth)
	return append(dst, '}'), err
}

// members writes the members of a message into the object that opened before
// dst[open].
func (t *transcoder) members(dst []byte, m *message, data []byte, open, depth int) ([]byte, error) {
	if depth > maxDepth {
		return dst, malformed("nested too deeply")
	}
	base, top := len(t.heads), len(t.occs)
	if err := t.gather(m, data); err != nil {
		return dst, err
	}
	var err error
	for i, silent := range m.silent {
		h := t.heads[base+i]
		if silent && h.first == 0 {
			continue
		}
		f := &m.fields[i]
		switch {
		case f.shape == inline:
			dst, err = t.members(dst, f.value.msg, t.merged(h, data), open, depth+1)
		case h.first == 0:
			dst, err = t.absent(dst, f, open, depth)
		default:
			dst, err = t.present(dst, f, h, data, open, depth)
		}
		if err != nil {
			return dst, err
		}
	}
	t.heads, t.occs = t.heads[:base], t.occs[:top]
	return dst, nil
}

// gather pushes a head for each field of m and chains up the occurrences.
func (t *transcoder) gather(m *message, data []byte) error {
	base := len(t.heads)
	t.heads = slices.Grow(t.heads, len(m.fields))[:base+len(m.fields)]
	clear(t.heads[base:])
	if len(data) > math.MaxInt32 {
		return malformed("object of %d bytes", len(data))
	}
	for at := 0; at < len(data); {
		num, typ, b, v, n := field(data[at:])
		if n < 0 {
			return malformed("protobuf field: %v", protowire.ParseError(n))
		}
		at += n
		if int(num) >= len(m.byNum) || m.byNum[num] < 0 {
			return fmt.Errorf("%w: number %d", ErrUnknownField, num)
		}
		i := m.byNum[num]
		h := &t.heads[base+int(i)]
		f := &m.fields[i]
		want := f.value.wire
		if want == protowire.VarintType && typ == protowire.BytesType && f.shape == list {
			for len(b) > 0 { // packed
				v, n := protowire.ConsumeVarint(b)
				if n < 0 {
					return malformed("packed field: %v", protowire.ParseError(n))
				}
				t.push(h, v)
				b = b[n:]
			}
			continue
		}
		if typ != want {
			return malformed("field %d has wire type %d", num, typ)
		}
		if want == protowire.BytesType {
			v = place(at-len(b), len(b))
		}
		t.push(h, v)
	}
	return nil
}

func (t *transcoder) push(h *head, v uint64) {
	t.occs = append(t.occs, occ{v: v})
	at := int32(len(t.occs))
	if h.last == 0 {
		h.first = at
	} else {
		t.occs[h.last-1].next = at
	}
	h.last = at
}

// merged returns the bytes of a message field; parts of one message merge
// when concatenated.
func (t *transcoder) merged(h head, data []byte) []byte {
	if h.first == 0 {
		return nil
	}
	if h.first == h.last {
		return t.occs[h.first-1].in(data)
	}
	var b []byte
	for i := h.first; i > 0; i = t.occs[i-1].next {
		b = append(b, t.occs[i-1].in(data)...)
	}
	return b
}

// name writes the comma and the name before a member's value.
func name(dst []byte, f *member, open int) []byte {
	if len(dst) > open {
		dst = append(dst, ',')
	}
	return append(dst, f.name...)
}

// absent writes a field that the message lacks, and that is not silent then:
// the zero of its Go type.
func (t *transcoder) absent(dst []byte, f *member, open, depth int) ([]byte, error) {
	if f.nilable() {
		return append(name(dst, f, open), "null"...), nil
	}
	return t.value(name(dst, f, open), &f.value, nil, 0, depth)
}

func (t *transcoder) present(dst []byte, f *member, h head, data []byte, open, depth int) (_ []byte, err error) {
	isBytes := f.value.wire == protowire.BytesType
	switch f.shape {
	case list:
		dst = append(name(dst, f, open), '[')
		for i := h.first; i > 0; i = t.occs[i-1].next {
			if i != h.first {
				dst = append(dst, ',')
			}
			o := t.occs[i-1]
			var b []byte
			if isBytes {
				b = o.in(data)
			}
			if dst, err = t.value(dst, &f.value, b, o.v, depth); err != nil {
				return dst, err
			}
		}
		return append(dst, ']'), nil
	case mapping:
		return t.mapping(name(dst, f, open), f, h, data, depth)
	}
	o := t.occs[h.last-1]
	var b []byte
	if isBytes {
		b = o.in(data)
		if h.first != h.last && f.value.op > opFloat64 {
			b = t.merged(h, data)
		}
	}
	if f.shape == one && (f.omitEmpty && f.value.isEmpty(b, o.v) || f.omitZero && len(b) == 0) {
		return dst, nil
	}
	return t.value(name(dst, f, open), &f.value, b, o.v, depth)
}

// isEmpty says whether omitempty leaves a value out. It never does so with
// structs.
func (v *value) isEmpty(b []byte, n uint64) bool {
	switch v.op {
	case opString, opBytes, opItems:
		return len(b) == 0
	case opBool, opInt64:
		return n == 0
	case opInt32:
		return int32(n) == 0
	case opFloat64:
		return math.Float64frombits(n) == 0
	}
	return false
}

func (t *transcoder) mapping(dst []byte, f *member, h head, data []byte, depth int) (_ []byte, err error) {
	base := len(t.pairs)
	for i := h.first; i > 0; i = t.occs[i-1].next {
		var p pair
		for entry := t.occs[i-1].in(data); len(entry) > 0; {
			num, typ, b, _, n := field(entry)
			switch {
			case n < 0:
				return dst, malformed("map entry: %v", protowire.ParseError(n))
			case num > 2:
				return dst, fmt.Errorf("%w: number %d of a map entry", ErrUnknownField, num)
			case typ != protowire.BytesType:
				return dst, malformed("map entry field %d has wire type %d", num, typ)
			case num == 1:
				p.key = b
			default:
				p.value = b
			}
			entry = entry[n:]
		}
		t.pairs = append(t.pairs, p)
	}
	dst = append(dst, '{')
	for i, p := range sortPairs(t.pairs[base:]) {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(appendJSONString(dst, p.key), ':')
		if dst, err = t.value(dst, &f.value, p.value, 0, depth); err != nil {
			return dst, err
		}
	}
	t.pairs = t.pairs[:base]
	return append(dst, '}'), nil
}

// value writes one value. b holds bytes and messages, n the
// bits of numbers; nil and 0 are the zero of each type.
func (t *transcoder) value(dst []byte, v *value, b []byte, n uint64, depth int) ([]byte, error) {
	switch v.op {
	case opString:
		return appendJSONString(dst, b), nil
	case opBytes:
		dst = append(dst, '"')
		dst = base64.StdEncoding.AppendEncode(dst, b)
		return append(dst, '"'), nil
	case opBool:
		return strconv.AppendBool(dst, n != 0), nil
	case opInt32:
		return strconv.AppendInt(dst, int64(int32(n)), 10), nil
	case opInt64:
		return strconv.AppendInt(dst, int64(n), 10), nil
	case opFloat64:
		text, err := json.Marshal(math.Float64frombits(n))
		if err != nil {
			return dst, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		return append(dst, text...), nil
	case opMessage:
		return t.message(dst, v.msg, v.prefix, b, depth+1)
	case opItems:
		return appendItems(dst, b)
	case opTime:
		return appendTime(dst, b, time.RFC3339)
	case opMicroTime:
		return appendTime(dst, b, metav1.RFC3339Micro)
	case opQuantity:
		return appendQuantity(dst, b)
	case opIntOrString:
		return appendIntOrString(dst, b)
	case opFieldsV1:
		return appendFieldsV1(dst, b)
	default:
		return appendTyped(dst, reflect.New(v.typ).Interface(), b)
	}
}

// only reads a message whose known fields are numbered 1 to last, and calls
// f for each.
func only(data []byte, last protowire.Number, f func(num protowire.Number, typ protowire.Type, b []byte, v uint64) error) error {
	for len(data) > 0 {
		num, typ, b, v, n := field(data)
		if n < 0 {
			return malformed("protobuf field: %v", protowire.ParseError(n))
		}
		if num > last {
			return fmt.Errorf("%w: number %d", ErrUnknownField, num)
		}
		if err := f(num, typ, b, v); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func appendItems(dst, data []byte) ([]byte, error) {
	dst = append(dst, '[')
	open := len(dst)
	err := only(data, 1, func(_ protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
		if typ != protowire.BytesType {
			return malformed("item has wire type %d", typ)
		}
		if len(dst) > open {
			dst = append(dst, ',')
		}
		dst = appendJSONString(dst, b)
		return nil
	})
	return append(dst, ']'), err
}

// appendTime writes a metav1.Time or, by its layout, a MicroTime.
func appendTime(dst, data []byte, layout string) ([]byte, error) {
	if len(data) == 0 {
		return append(dst, "null"...), nil
	}
	var seconds, nanos int64
	err := only(data, 2, func(num protowire.Number, typ protowire.Type, _ []byte, v uint64) error {
		if typ != protowire.VarintType {
			return malformed("timestamp has wire type %d", typ)
		}
		if num == 1 {
			seconds = int64(v)
		} else {
			nanos = int64(int32(v))
		}
		return nil
	})
	if err != nil {
		return dst, err
	}
	if layout == time.RFC3339 {
		nanos = 0
	}
	at := time.Unix(seconds, int64(time.Duration(nanos).Truncate(time.Microsecond))).UTC()
	if at.IsZero() {
		return append(dst, "null"...), nil
	}
	dst = append(dst, '"')
	dst = at.AppendFormat(dst, layout)
	return append(dst, '"'), nil
}

func appendQuantity(dst, data []byte) ([]byte, error) {
	var q resource.Quantity
	err := only(data, 1, func(_ protowire.Number, typ protowire.Type, b []byte, _ uint64) (err error) {
		if typ != protowire.BytesType {
			return malformed("quantity has wire type %d", typ)
		}
		if q, err = resource.ParseQuantity(string(b)); err != nil {
			return fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		return nil
	})
	if err != nil {
		return dst, err
	}
	dst = append(dst, '"')
	var buf [32]byte
	number, suffix := q.CanonicalizeBytes(buf[:0])
	dst = append(append(dst, number...), suffix...)
	return append(dst, '"'), nil
}

func appendIntOrString(dst, data []byte) ([]byte, error) {
	var typ, number uint64
	var text []byte
	err := only(data, 3, func(num protowire.Number, wire protowire.Type, b []byte, v uint64) error {
		switch {
		case num == 1 && wire == protowire.VarintType:
			typ = v
		case num == 2 && wire == protowire.VarintType:
			number = v
		case num == 3 && wire == protowire.BytesType:
			text = b
		default:
			return malformed("field %d of an int-or-string has wire type %d", num, wire)
		}
		return nil
	})
	switch {
	case err != nil:
		return dst, err
	case typ == 0:
		return strconv.AppendInt(dst, int64(int32(number)), 10), nil
	case typ == 1:
		return appendJSONString(dst, text), nil
	}
	return dst, malformed("int-or-string of type %d", typ)
}

func appendFieldsV1(dst, data []byte) ([]byte, error) {
	var raw []byte
	err := only(data, 1, func(_ protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
		if typ != protowire.BytesType {
			return malformed("managed fields have wire type %d", typ)
		}
		raw = b
		return nil
	})
	if err != nil {
		return dst, err
	}
	if len(raw) == 0 {
		return append(dst, "null"...), nil
	}
	if raw[0] != '{' { // CBOR, or nothing that we know
		return appendTyped(dst, &metav1.FieldsV1{}, data)
	}
	return appendCompact(dst, raw)
}

// appendCompact writes JSON text as encoding/json writes a RawMessage:
// without white space and with HTML escaped.
func appendCompact(dst, text []byte) ([]byte, error) {
	s := scanner{data: text}
	if err := s.skip(); err != nil {
		return dst, err
	}
	if err := s.end(); err != nil {
		return dst, err
	}
	if !mayChange(text) {
		return append(dst, text...), nil
	}
	out, err := json.Marshal(json.RawMessage(text))
	if err != nil {
		return dst, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return append(dst, out...), nil
}

// mayChange says whether appendCompact may write text differently.
func mayChange(text []byte) bool {
	for _, c := range text {
		if changing[c] {
			return true
		}
	}
	return false
}

// changing holds white space, HTML and 0xe2, which starts U+2028 and U+2029.
var changing = [256]bool{' ': true, '\t': true, '\n': true, '\r': true, '<': true, '>': true, '&': true, 0xe2: true}
