package wire

import "fmt"

// ToJSON appends the JSON that the API server gives for Protobuf object data.
// withType says whether kind and apiVersion come first; items of a list lack
// them. It returns ErrUnknownKind, or ErrUnknownField if the object holds a
// field that would be lost.
func ToJSON(dst []byte, apiVersion, kind string, object []byte, withType bool) ([]byte, error) {
	return nil, fmt.Errorf("%s %s: %w", apiVersion, kind, ErrUnknownKind)
}

// FromJSON returns the Protobuf object data of an object in JSON. It refuses
// unknown and duplicate fields.
func FromJSON(apiVersion, kind string, text []byte) ([]byte, error) {
	return nil, fmt.Errorf("%s %s: %w", apiVersion, kind, ErrUnknownKind)
}
