// Package wire reads and writes Kubernetes API bytes without decoding them
// into Go types: watch frames, lists, single objects, bookmarks and statuses,
// in JSON and in Protobuf.
//
// The hub's replica keeps each object as the bytes that came, so that a field
// that this build does not know is never lost. "Object data" in this package
// means these bytes: for Protobuf the naked message, without the k8s\0 magic,
// the runtime.Unknown envelope and the TypeMeta; for JSON the object's text
// with apiVersion and kind.
//
// Everything written equals what kube-apiserver writes, byte for byte. All
// functions are pure and safe for concurrent use; input is never trusted.
package wire

import (
	"errors"
	"fmt"
	"strings"
)

// Encoding is how an object is written on the wire.
type Encoding uint8

// The encodings of the Kubernetes API that the hub keeps. The values are
// stored on disk.
const (
	JSON     Encoding = 1
	Protobuf Encoding = 2
)

// String returns a word for logs.
func (e Encoding) String() string {
	switch e {
	case JSON:
		return "json"
	case Protobuf:
		return "protobuf"
	default:
		return fmt.Sprintf("encoding(%d)", uint8(e))
	}
}

var (
	// ErrMalformed is wrapped by every error about bytes that are not what
	// the Kubernetes API sends.
	ErrMalformed = errors.New("malformed API bytes")
	// ErrTooLarge says that a frame exceeds the reader's limit.
	ErrTooLarge = errors.New("frame exceeds limit")
	// ErrUnknownField says that an object holds a field that this build's
	// types lack, so it cannot be transcoded without loss.
	ErrUnknownField = errors.New("unknown field")
	// ErrUnknownKind says that no Go type is known for a kind.
	ErrUnknownKind = errors.New("unknown kind")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// itemKind is the kind of the items of a list kind.
func itemKind(listKind string) string { return strings.TrimSuffix(listKind, "List") }
