package wire

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// Annotate returns object data with some of its annotations set, and those
// whose value is nil taken away. Everything else stays, known or not.
func Annotate(enc Encoding, object []byte, set map[string]*string) ([]byte, error) {
	edit := annotateJSON
	if enc == Protobuf {
		edit = annotateProto
	}
	out, err := edit(object, set)
	if err != nil {
		return nil, fmt.Errorf("annotate: %w", err)
	}
	return out, nil
}

func annotateProto(object []byte, set map[string]*string) ([]byte, error) {
	var meta, rest []byte
	for len(object) > 0 {
		num, typ, b, _, n := field(object)
		switch {
		case n < 0:
			return nil, malformed("object: %v", protowire.ParseError(n))
		case num == fieldMetadata && typ == protowire.BytesType:
			kept, err := withoutAnnotations(b, set)
			if err != nil {
				return nil, err
			}
			meta = append(meta, kept...) // two parts of one message merge so
		default:
			rest = append(rest, object[:n]...)
		}
		object = object[n:]
	}
	for _, key := range slices.Sorted(maps.Keys(set)) {
		if value := set[key]; value != nil {
			meta = appendBytesField(meta, fieldAnnotations, appendPair(nil, key, []byte(*value)))
		}
	}
	return append(appendBytesField(nil, fieldMetadata, meta), rest...), nil
}

// withoutAnnotations returns metadata without the annotations of these names.
func withoutAnnotations(meta []byte, names map[string]*string) (out []byte, err error) {
	for len(meta) > 0 {
		num, typ, b, _, n := field(meta)
		if n < 0 {
			return nil, malformed("metadata: %v", protowire.ParseError(n))
		}
		drop := false
		if num == fieldAnnotations && typ == protowire.BytesType {
			p, err := readPair(b)
			if err != nil {
				return nil, err
			}
			_, drop = names[string(p.key)]
		}
		if !drop {
			out = append(out, meta[:n]...)
		}
		meta = meta[n:]
	}
	return out, nil
}

func annotateJSON(object []byte, set map[string]*string) ([]byte, error) {
	return inMember(object, "metadata", func(meta []byte) ([]byte, error) {
		return inMember(meta, "annotations", func(annotations []byte) ([]byte, error) {
			members, err := membersOf(annotations)
			if err != nil {
				return nil, err
			}
			for key, value := range set {
				if value == nil {
					delete(members, key)
				} else {
					members[key] = appendJSONString(nil, *value)
				}
			}
			return json.Marshal(members)
		})
	})
}

// inMember replaces a member of an object, which f gets as text, nil if the
// object lacks it.
func inMember(object []byte, name string, f func(text []byte) ([]byte, error)) ([]byte, error) {
	members, err := membersOf(object)
	if err != nil {
		return nil, err
	}
	if members[name], err = f(members[name]); err != nil {
		return nil, err
	}
	return json.Marshal(members)
}

// membersOf returns the members of an object, each as it is written. No text,
// or null, has none. Of two with one name nobody knows which counts.
func membersOf(object []byte) (map[string]json.RawMessage, error) {
	members := map[string]json.RawMessage{}
	if object == nil {
		return members, nil
	}
	s := scanner{data: object}
	err := s.object(func(key []byte) (err error) {
		if _, twice := members[string(key)]; twice {
			return malformed("json: member %q twice", key)
		}
		members[string(key)], err = s.value()
		return err
	})
	if err != nil {
		return nil, err
	}
	return members, s.end()
}
