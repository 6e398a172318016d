package filter

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// name returns the namespace and name of an object.
func (o Object) name() (namespace, name string, err error) {
	meta, err := wire.ReadMeta(o.Encoding, o.Data, false)
	return meta.Namespace, meta.Name, err
}

// edit changes an object by one of two functions, for Protobuf and for JSON.
// The latter returns false if it changed nothing.
func (o Object) edit(proto func([]byte) ([]byte, error), text func(tree) bool) ([]byte, error) {
	if o.Encoding == wire.Protobuf {
		return proto(o.Data)
	}
	var object tree
	d := json.NewDecoder(bytes.NewReader(o.Data))
	d.UseNumber() // keeps the digits of what is not understood here
	if err := d.Decode(&object); err != nil {
		return nil, fmt.Errorf("read object: %w", err)
	}
	if !text(object) {
		return o.Data, nil
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(object); err != nil {
		return nil, fmt.Errorf("write object: %w", err)
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// tree is a JSON object.
type tree = map[string]any

// items are the objects of a member that is an array.
func items(object tree, name string) func(yield func(tree) bool) {
	return func(yield func(tree) bool) {
		list, _ := object[name].([]any)
		for _, item := range list {
			if t, ok := item.(tree); ok && !yield(t) {
				return
			}
		}
	}
}

// keepItems leaves in an array of objects those that keep returns true for. It
// reports whether others were there.
func keepItems(object tree, name string, keep func(tree) bool) bool {
	list, _ := object[name].([]any)
	left := slices.DeleteFunc(slices.Clone(list), func(item any) bool {
		t, ok := item.(tree)
		return ok && !keep(t)
	})
	if len(left) == len(list) {
		return false
	}
	object[name] = left
	return true
}

// field is one field of a message.
type field struct {
	num    protowire.Number
	whole  []byte // tag and value
	value  []byte // of a field with a length, else nil
	number uint64 // of a varint
}

// first reads the first field of a message that is not empty.
func first(message []byte) (field, error) {
	num, typ, n := protowire.ConsumeTag(message)
	if n < 0 {
		return field{}, fmt.Errorf("read object: %w", protowire.ParseError(n))
	}
	f := field{num: num}
	var m int
	switch typ { //nolint:exhaustive // the others hold nothing that is read here
	case protowire.BytesType:
		f.value, m = protowire.ConsumeBytes(message[n:])
	case protowire.VarintType:
		f.number, m = protowire.ConsumeVarint(message[n:])
	default:
		m = protowire.ConsumeFieldValue(num, typ, message[n:])
	}
	if m < 0 {
		return field{}, fmt.Errorf("read object: %w", protowire.ParseError(m))
	}
	f.whole = message[:n+m]
	return f, nil
}

// fields calls f for each field of a message.
func fields(message []byte, f func(field) error) error {
	for len(message) > 0 {
		next, err := first(message)
		if err != nil {
			return err
		}
		if err := f(next); err != nil {
			return err
		}
		message = message[len(next.whole):]
	}
	return nil
}

// rewrite returns a message in which to's result stands for each field: the
// field itself, another in its place, or nothing.
func rewrite(message []byte, to func(field) ([]byte, error)) ([]byte, error) {
	out := make([]byte, 0, len(message)+32)
	err := fields(message, func(f field) error {
		b, err := to(f)
		out = append(out, b...)
		return err
	})
	return out, err
}

// drop leaves out of a message the fields that keep returns false for. Without
// any it returns the message itself.
func drop(message []byte, keep func(field) (bool, error)) ([]byte, error) {
	var out []byte
	from, at := 0, 0 // up to from it is copied
	for at < len(message) {
		f, err := first(message[at:])
		if err != nil {
			return message, err
		}
		end := at + len(f.whole)
		kept, err := keep(f)
		if err != nil {
			return message, err
		}
		if !kept {
			if out == nil {
				out = make([]byte, 0, len(message)-len(f.whole))
			}
			out = append(out, message[from:at]...)
			from = end
		}
		at = end
	}
	if out == nil {
		return message, nil
	}
	return append(out, message[from:]...), nil
}

// text is a string of a message.
func text(message []byte, num protowire.Number) (string, error) {
	out, err := bytesOf(message, num)
	return string(out), err
}

// bytesOf is the value of a message's field; the last, if there are several.
func bytesOf(message []byte, num protowire.Number) (value []byte, err error) {
	for len(message) > 0 {
		f, err := first(message)
		if err != nil {
			return nil, err
		}
		if f.num == num {
			value = f.value
		}
		message = message[len(f.whole):]
	}
	return value, nil
}

// pair reads an entry of a map of strings.
func pair(entry []byte) (key, value []byte, err error) {
	for len(entry) > 0 {
		f, err := first(entry)
		if err != nil {
			return nil, nil, err
		}
		switch f.num {
		case 1:
			key = f.value
		case 2:
			value = f.value
		}
		entry = entry[len(f.whole):]
	}
	return key, value, nil
}

// bytesField is a field with a length.
func bytesField(num protowire.Number, value []byte) []byte {
	out := make([]byte, 0, len(value)+8)
	return protowire.AppendBytes(protowire.AppendTag(out, num, protowire.BytesType), value)
}

// numberField is a field with a number.
func numberField(num protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), value)
}
