package wire

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// List is a list answer taken apart.
type List struct {
	// APIVersion and Kind are those of the list, such as v1 and PodList.
	APIVersion, Kind string
	Version          uint64
	// Continue is the token for the next page, "" on the last.
	Continue string
	// Remaining is remainingItemCount, nil if the server did not say.
	Remaining *int64
	// Items holds object data. Items are parts of the body, except JSON
	// items that lack their apiVersion and kind: those are copies with the
	// type filled in.
	Items [][]byte
}

// ReadList takes the body of a list answer apart.
func ReadList(enc Encoding, body []byte) (List, error) {
	read := readListJSON
	if enc == Protobuf {
		read = readListProto
	}
	l, err := read(body)
	if err != nil {
		return List{}, fmt.Errorf("read list: %w", err)
	}
	return l, nil
}

func readListProto(body []byte) (l List, err error) {
	var raw []byte
	l.APIVersion, l.Kind, raw, err = readEnvelope(body)
	if err != nil {
		return List{}, err
	}
	err = fields(raw, func(num protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
		switch {
		case typ != protowire.BytesType:
			return malformed("list field %d has wire type %d", num, typ)
		case num == 1:
			return l.readProtoMeta(b)
		case num == 2:
			l.Items = append(l.Items, slices.Clip(b))
		}
		return nil
	})
	return l, err
}

func (l *List) readProtoMeta(meta []byte) error {
	return fields(meta, func(num protowire.Number, typ protowire.Type, b []byte, v uint64) (err error) {
		switch {
		case num == 2 && typ == protowire.BytesType:
			l.Version, err = parseVersion(b)
		case num == 3 && typ == protowire.BytesType:
			l.Continue = string(b)
		case num == 4 && typ == protowire.VarintType:
			n := int64(v)
			l.Remaining = &n
		}
		return err
	})
}

func readListJSON(body []byte) (l List, err error) {
	s := scanner{data: body}
	err = s.object(func(key []byte) (err error) {
		switch string(key) {
		case "apiVersion":
			l.APIVersion, err = s.str()
		case "kind":
			l.Kind, err = s.str()
		case "metadata":
			err = l.readJSONMeta(&s)
		case "items":
			l.Items = nil
			err = s.array(func() error {
				v, err := s.value()
				l.Items = append(l.Items, slices.Clip(v))
				return err
			})
		default:
			err = s.skip()
		}
		return err
	})
	if err != nil {
		return List{}, err
	}
	if err := s.end(); err != nil {
		return List{}, err
	}
	for i, item := range l.Items {
		if l.Items[i], err = withType(item, l.APIVersion, itemKind(l.Kind)); err != nil {
			return List{}, err
		}
	}
	return l, nil
}

func (l *List) readJSONMeta(s *scanner) error {
	return s.object(func(key []byte) (err error) {
		switch string(key) {
		case "resourceVersion":
			var v string
			if v, err = s.str(); err == nil {
				l.Version, err = parseVersion(v)
			}
		case "continue":
			l.Continue, err = s.str()
		case "remainingItemCount":
			var v []byte
			if v, err = s.value(); err != nil || string(v) == "null" {
				return err
			}
			n, err := strconv.ParseInt(string(v), 10, 64)
			if err != nil {
				return malformed("remaining item count %q", v)
			}
			l.Remaining = &n
		default:
			err = s.skip()
		}
		return err
	})
}

// withType returns a JSON object with its type, as the API server writes it
// at the front of an object of a built-in kind.
func withType(object []byte, apiVersion, kind string) ([]byte, error) {
	v, k, err := readJSONType(object)
	if err != nil {
		return nil, err
	}
	if v != "" && k != "" {
		return object, nil
	}
	if v != "" || k != "" {
		return nil, malformed("item with half a type %q %q", v, k)
	}
	s := scanner{data: object}
	if s.peek() != '{' {
		return nil, s.fail("want object")
	}
	s.pos++
	out := make([]byte, 0, len(object)+len(apiVersion)+len(kind)+32)
	out = appendJSONType(append(out, '{'), apiVersion, kind)
	if s.peek() != '}' {
		out = append(out, ',')
	}
	return append(out, object[s.pos:]...), nil
}

func appendJSONType(dst []byte, apiVersion, kind string) []byte {
	dst = append(dst, `"kind":`...)
	dst = appendJSONString(dst, kind)
	dst = append(dst, `,"apiVersion":`...)
	return appendJSONString(dst, apiVersion)
}

// ListHeader is everything of a list but its items.
type ListHeader struct {
	// APIVersion and Kind are those of the list, such as v1 and PodList.
	APIVersion, Kind string
	Version          uint64
	Continue         string
	Remaining        *int64
}

// ItemSize is the number of bytes by which an item of n bytes adds to a
// list's itemsSize.
func ItemSize(enc Encoding, n int) int {
	if enc == Protobuf {
		return bytesFieldSize(n)
	}
	return n + 1
}

// AppendListStart writes a list's body up to its items. itemsSize is the sum
// of the ItemSize of all items; only Protobuf needs it.
func AppendListStart(dst []byte, enc Encoding, h ListHeader, itemsSize int) []byte {
	if enc == Protobuf {
		meta := h.appendProtoMeta(nil)
		dst = appendEnvelopeStart(dst, h.APIVersion, h.Kind, bytesFieldSize(len(meta))+itemsSize)
		return appendBytesField(dst, 1, meta)
	}
	if h.custom() {
		dst = append(dst, `{"apiVersion":`...)
		dst = appendJSONString(dst, h.APIVersion)
		return append(dst, `,"items":[`...)
	}
	dst = appendJSONType(append(dst, '{'), h.APIVersion, h.Kind)
	dst = append(dst, `,"metadata":{`...)
	dst = h.appendJSONMeta(dst)
	return append(dst, `},"items":[`...)
}

// AppendItem writes one item of a list. JSON items of built-in kinds carry no
// type inside a list: see ToJSON.
func AppendItem(dst []byte, enc Encoding, first bool, object []byte) []byte {
	if enc == Protobuf {
		return appendBytesField(dst, 2, object)
	}
	if !first {
		dst = append(dst, ',')
	}
	return append(dst, object...)
}

// AppendListEnd writes what follows a list's items. h is the header given to
// AppendListStart.
//
// The API server writes an empty JSON list of PartialObjectMetadata as null;
// this does the same if dst still ends with the list's start.
func AppendListEnd(dst []byte, enc Encoding, h ListHeader) []byte {
	if enc == Protobuf {
		return appendEnvelopeEnd(dst)
	}
	if h.custom() {
		dst = append(dst, `],"kind":`...)
		dst = appendJSONString(dst, h.Kind)
		dst = append(dst, `,"metadata":{`...)
		dst = h.appendCustomMeta(dst)
		return append(dst, "}}\n"...)
	}
	if start := []byte(`"items":[`); h.Kind == "PartialObjectMetadataList" && bytes.HasSuffix(dst, start) {
		return append(dst[:len(dst)-1], "null}\n"...)
	}
	return append(dst, "]}\n"...)
}

// custom says whether this is a list of custom resources, whose members the
// API server sorts by name.
func (h ListHeader) custom() bool { return !Known(h.APIVersion, itemKind(h.Kind)) }

func (h ListHeader) version() string {
	if h.Version == 0 {
		return ""
	}
	return strconv.FormatUint(h.Version, 10)
}

func (h ListHeader) appendProtoMeta(dst []byte) []byte {
	dst = appendStringField(dst, 1, "") // selfLink
	dst = appendStringField(dst, 2, h.version())
	dst = appendStringField(dst, 3, h.Continue)
	if h.Remaining != nil {
		dst = protowire.AppendTag(dst, 4, protowire.VarintType)
		dst = protowire.AppendVarint(dst, uint64(*h.Remaining))
	}
	return dst
}

func (h ListHeader) appendJSONMeta(dst []byte) []byte {
	comma := ""
	if v := h.version(); v != "" {
		dst = append(dst, `"resourceVersion":"`...)
		dst = append(dst, v...)
		dst = append(dst, '"')
		comma = ","
	}
	if h.Continue != "" {
		dst = append(dst, comma...)
		dst = append(dst, `"continue":`...)
		dst = appendJSONString(dst, h.Continue)
		comma = ","
	}
	if h.Remaining != nil {
		dst = append(dst, comma...)
		dst = append(dst, `"remainingItemCount":`...)
		dst = strconv.AppendInt(dst, *h.Remaining, 10)
	}
	return dst
}

// appendCustomMeta sorts by name and never leaves the token out, as the API
// server does for unstructured lists.
func (h ListHeader) appendCustomMeta(dst []byte) []byte {
	dst = append(dst, `"continue":`...)
	dst = appendJSONString(dst, h.Continue)
	if h.Remaining != nil {
		dst = append(dst, `,"remainingItemCount":`...)
		dst = strconv.AppendInt(dst, *h.Remaining, 10)
	}
	dst = append(dst, `,"resourceVersion":"`...)
	dst = append(dst, h.version()...)
	return append(dst, '"')
}
