package wire

import (
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// SetVersion returns a copy of the object data with another
// metadata.resourceVersion. Everything else stays byte for byte.
func SetVersion(enc Encoding, object []byte, version uint64) ([]byte, error) {
	text := strconv.FormatUint(version, 10)
	if enc == Protobuf {
		return setProtoVersion(object, text)
	}
	var start, end int
	s := &scanner{data: object}
	err := s.object(func(key []byte) error {
		if string(key) != "metadata" {
			return s.skip()
		}
		return s.object(func(key []byte) error {
			if string(key) != "resourceVersion" {
				return s.skip()
			}
			s.peek()
			start = s.pos
			err := s.skip()
			end = s.pos
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	if end == 0 {
		return nil, malformed("object has no metadata.resourceVersion")
	}
	out := make([]byte, 0, len(object)+len(text))
	out = append(out, object[:start]...)
	out = strconv.AppendQuote(out, text)
	return append(out, object[end:]...), nil
}

func setProtoVersion(object []byte, text string) ([]byte, error) {
	const objectMeta, resourceVersion = 1, 6
	out := make([]byte, 0, len(object)+len(text)+8)
	for rest := object; len(rest) > 0; {
		num, typ, b, _, n := field(rest)
		if n < 0 {
			return nil, malformed("protobuf field: %v", protowire.ParseError(n))
		}
		if num != objectMeta || typ != protowire.BytesType {
			out = append(out, rest[:n]...)
			rest = rest[n:]
			continue
		}
		meta := make([]byte, 0, len(b)+len(text))
		for inner := b; len(inner) > 0; {
			num, _, _, _, n := field(inner)
			if n < 0 {
				return nil, malformed("protobuf field: %v", protowire.ParseError(n))
			}
			if num == resourceVersion {
				meta = appendStringField(meta, resourceVersion, text)
			} else {
				meta = append(meta, inner[:n]...)
			}
			inner = inner[n:]
		}
		out = appendBytesField(out, objectMeta, meta)
		rest = rest[n:]
	}
	return out, nil
}
