package wire

import (
	"fmt"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// Meta is what the hub must know of an object to index and select it.
type Meta struct {
	Namespace, Name, UID string
	// Version is metadata.resourceVersion, 0 if unset.
	Version uint64
	// Labels is nil if the object has none.
	Labels map[string]string
	// NodeName is spec.nodeName of a Pod, else "".
	NodeName string
	// Phase is status.phase of a Pod, else "".
	Phase string
	// DeletionTimestamp says whether metadata.deletionTimestamp is set.
	DeletionTimestamp bool
}

// ReadMeta scans object data for its Meta. pod says that the object is a Pod,
// whose NodeName and Phase are wanted. The result shares no memory with data.
func ReadMeta(enc Encoding, data []byte, pod bool) (Meta, error) {
	var m Meta
	var err error
	if enc == Protobuf {
		err = m.readProto(data, pod)
	} else {
		err = m.readJSON(data, pod)
	}
	if err != nil {
		return Meta{}, fmt.Errorf("read metadata: %w", err)
	}
	return m, nil
}

func parseVersion[T string | []byte](s T) (uint64, error) {
	if len(s) == 0 {
		return 0, nil
	}
	v, err := strconv.ParseUint(string(s), 10, 64)
	if err != nil {
		return 0, malformed("resource version %q", s)
	}
	return v, nil
}

// Numbers of the fields of ObjectMeta, PodSpec, PodStatus and their parents.
const (
	fieldMetadata protowire.Number = 1 // of every object

	fieldPodSpec  protowire.Number = 2
	fieldNodeName protowire.Number = 10

	fieldPodStatus protowire.Number = 3
	fieldPhase     protowire.Number = 1

	fieldName              protowire.Number = 1
	fieldNamespace         protowire.Number = 3
	fieldUID               protowire.Number = 5
	fieldResourceVersion   protowire.Number = 6
	fieldDeletionTimestamp protowire.Number = 9
	fieldLabels            protowire.Number = 11
	fieldAnnotations       protowire.Number = 12
)

func (m *Meta) readProto(data []byte, pod bool) error {
	for len(data) > 0 {
		num, typ, b, _, n := field(data)
		switch {
		case n < 0:
			return malformed("object: %v", protowire.ParseError(n))
		case typ != protowire.BytesType:
		case num == fieldMetadata:
			if err := m.readProtoMetadata(b); err != nil {
				return err
			}
		case num == fieldPodSpec && pod:
			if err := readProtoString(b, fieldNodeName, &m.NodeName); err != nil {
				return err
			}
		case num == fieldPodStatus && pod:
			if err := readProtoString(b, fieldPhase, &m.Phase); err != nil {
				return err
			}
		}
		data = data[n:]
	}
	return nil
}

func (m *Meta) readProtoMetadata(data []byte) error {
	for len(data) > 0 {
		num, typ, b, _, n := field(data)
		if n < 0 {
			return malformed("metadata: %v", protowire.ParseError(n))
		}
		data = data[n:]
		if typ != protowire.BytesType {
			continue
		}
		switch num {
		case fieldName:
			m.Name = string(b)
		case fieldNamespace:
			m.Namespace = string(b)
		case fieldUID:
			m.UID = string(b)
		case fieldResourceVersion:
			v, err := parseVersion(b)
			if err != nil {
				return err
			}
			m.Version = v
		case fieldDeletionTimestamp:
			m.DeletionTimestamp = true
		case fieldLabels:
			p, err := readPair(b)
			if err != nil {
				return err
			}
			if m.Labels == nil {
				m.Labels = make(map[string]string)
			}
			m.Labels[string(p.key)] = string(p.value)
		}
	}
	return nil
}

// readProtoString sets value to the message's string field want, if it is there.
func readProtoString(data []byte, want protowire.Number, value *string) error {
	for len(data) > 0 {
		num, typ, b, _, n := field(data)
		if n < 0 {
			return malformed("field %d: %v", want, protowire.ParseError(n))
		}
		if num == want && typ == protowire.BytesType {
			*value = string(b)
		}
		data = data[n:]
	}
	return nil
}

func (m *Meta) readJSON(data []byte, pod bool) error {
	s := scanner{data: data}
	err := s.object(func(key []byte) error {
		switch {
		case string(key) == "metadata":
			return m.readJSONMetadata(&s)
		case pod && string(key) == "spec":
			return s.member("nodeName", &m.NodeName)
		case pod && string(key) == "status":
			return s.member("phase", &m.Phase)
		}
		return s.skip()
	})
	if err != nil {
		return err
	}
	return s.end()
}

// member sets value to the string member want of the object that comes next,
// if it is there.
func (s *scanner) member(want string, value *string) error {
	return s.object(func(key []byte) (err error) {
		if string(key) != want {
			return s.skip()
		}
		*value, err = s.str()
		return err
	})
}

func (m *Meta) readJSONMetadata(s *scanner) error {
	return s.object(func(key []byte) (err error) {
		switch string(key) {
		case "name":
			m.Name, err = s.str()
		case "namespace":
			m.Namespace, err = s.str()
		case "uid":
			m.UID, err = s.str()
		case "resourceVersion":
			var v string
			if v, err = s.str(); err == nil {
				m.Version, err = parseVersion(v)
			}
		case "deletionTimestamp":
			m.DeletionTimestamp = s.peek() != 'n'
			err = s.skip()
		case "labels":
			m.Labels = nil
			err = s.object(func(key []byte) error {
				v, err := s.str()
				if err != nil {
					return err
				}
				if m.Labels == nil {
					m.Labels = make(map[string]string)
				}
				m.Labels[string(key)] = v
				return nil
			})
		default:
			err = s.skip()
		}
		return err
	})
}
