package wire

import (
	"bytes"
	"encoding/json"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
)

// ReadObject opens the body of an answer that holds one object. The object
// data is a part of body.
func ReadObject(enc Encoding, body []byte) (apiVersion, kind string, object []byte, err error) {
	if enc == Protobuf {
		apiVersion, kind, object, err = readEnvelope(body)
	} else {
		object = bytes.TrimSpace(body)
		apiVersion, kind, err = readJSONType(object)
	}
	if err != nil {
		return "", "", nil, fmt.Errorf("read object: %w", err)
	}
	return apiVersion, kind, object, nil
}

// readJSONType scans the whole of an object for its type.
func readJSONType(object []byte) (apiVersion, kind string, err error) {
	s := scanner{data: object}
	err = s.object(func(key []byte) (err error) {
		switch string(key) {
		case "apiVersion":
			apiVersion, err = s.str()
		case "kind":
			kind, err = s.str()
		default:
			err = s.skip()
		}
		return err
	})
	if err != nil {
		return "", "", err
	}
	return apiVersion, kind, s.end()
}

// AppendObject writes the body of an answer that holds one object.
func AppendObject(dst []byte, enc Encoding, apiVersion, kind string, object []byte) []byte {
	if enc == Protobuf {
		dst = appendEnvelopeStart(dst, apiVersion, kind, len(object))
		dst = append(dst, object...)
		return appendEnvelopeEnd(dst)
	}
	dst = append(dst, object...)
	return append(dst, '\n')
}

// PartialMetadata returns the object data of the meta.k8s.io/v1
// PartialObjectMetadata of an object. For Protobuf it may share memory with
// object.
func PartialMetadata(enc Encoding, object []byte) ([]byte, error) {
	if enc == Protobuf {
		return partialProto(object)
	}
	// The API server passes the metadata of a custom resource through the
	// typed struct, which orders its fields and drops unknown ones.
	meta, err := jsonMember(object, "metadata")
	if err != nil {
		return nil, fmt.Errorf("read metadata: %w", err)
	}
	partial := metav1.PartialObjectMetadata{
		TypeMeta: metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadata"},
	}
	if meta != nil {
		if err := utiljson.Unmarshal(meta, &partial.ObjectMeta); err != nil {
			return nil, fmt.Errorf("read metadata: %w: %w", ErrMalformed, err)
		}
	}
	return json.Marshal(&partial)
}

// PartialMetadataOf is PartialMetadata for an object of a known kind. It also
// drops the annotations that the API server's internal version holds as
// fields, and so never shows in a PartialObjectMetadata or a Table.
func PartialMetadataOf(enc Encoding, apiVersion, kind string, object []byte) ([]byte, error) {
	partial, err := PartialMetadata(enc, object)
	if err != nil || apiVersion != "apps/v1" || enc != Protobuf {
		return partial, err
	}
	var hidden string
	switch kind {
	case "DaemonSet":
		hidden = appsv1.DeprecatedTemplateGeneration
	case "Deployment":
		hidden = appsv1.DeprecatedRollbackTo
	default:
		return partial, nil
	}
	var m metav1.PartialObjectMetadata
	if v, err := annotation(enc, partial, hidden); err != nil || v == "" {
		return partial, err
	}
	if err := m.Unmarshal(partial); err != nil {
		return nil, fmt.Errorf("read metadata: %w: %w", ErrMalformed, err)
	}
	delete(m.Annotations, hidden)
	return m.Marshal()
}

func partialProto(object []byte) ([]byte, error) {
	var out []byte
	for rest := object; len(rest) > 0; {
		num, _, _, _, n := field(rest)
		if n < 0 {
			return nil, malformed("object: %v", protowire.ParseError(n))
		}
		if num == fieldMetadata {
			if out == nil {
				out = rest[:n:n]
			} else { // two parts of one message merge when concatenated
				out = append(out, rest[:n]...)
			}
		}
		rest = rest[n:]
	}
	if out == nil {
		out = []byte{0x0a, 0}
	}
	return out, nil
}

// jsonMember returns the text of one member of an object, nil if it lacks it.
func jsonMember(object []byte, name string) (text []byte, err error) {
	s := scanner{data: object}
	err = s.object(func(key []byte) error {
		v, err := s.value()
		if string(key) == name {
			text = v
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return text, s.end()
}
