package wire

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
)

// Event is one event of a watch.
type Event struct {
	// Type is ADDED, MODIFIED, DELETED, BOOKMARK or ERROR.
	Type             string
	APIVersion, Kind string
	// Object is object data; the caller owns it.
	Object []byte
}

// EventReader reads the events of a watch.
type EventReader struct {
	r    *bufio.Reader
	enc  Encoding
	max  int
	text []byte // the JSON document being read; reused
}

// NewEventReader returns a reader of the events in r, which is not read by
// others from now on. A frame of more than maxFrame bytes is refused before
// memory is taken for it.
func NewEventReader(r io.Reader, enc Encoding, maxFrame int) *EventReader {
	return &EventReader{r: bufio.NewReaderSize(r, 16<<10), enc: enc, max: maxFrame}
}

// Read returns the next event. It returns io.EOF at a clean end,
// io.ErrUnexpectedEOF if the stream ends inside a frame, and errors of the
// underlying reader unchanged. After an error the reader is of no use.
func (er *EventReader) Read() (Event, error) {
	if er.enc == Protobuf {
		return er.readProto()
	}
	return er.readJSON()
}

func (er *EventReader) readProto() (Event, error) {
	var head [4]byte
	if _, err := io.ReadFull(er.r, head[:]); err != nil {
		return Event{}, err // io.EOF only if nothing was read
	}
	size := binary.BigEndian.Uint32(head[:])
	if uint64(size) > uint64(er.max) {
		return Event{}, fmt.Errorf("watch frame of %d bytes: %w", size, ErrTooLarge)
	}
	frame, err := readN(er.r, int(size))
	if err != nil {
		return Event{}, err
	}
	var ev Event
	var extension []byte
	err = fields(frame, func(num protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
		switch {
		case typ != protowire.BytesType:
			return malformed("event field %d has wire type %d", num, typ)
		case num == 1:
			ev.Type = string(b)
		case num == 2:
			extension = b
		}
		return nil
	})
	if err != nil {
		return Event{}, fmt.Errorf("read watch event: %w", err)
	}
	var body []byte
	err = fields(extension, func(num protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
		if num == 1 && typ == protowire.BytesType {
			body = b
		}
		return nil
	})
	if err == nil {
		ev.APIVersion, ev.Kind, ev.Object, err = readEnvelope(body)
	}
	if err != nil {
		return Event{}, fmt.Errorf("read watch event: %w", err)
	}
	return ev, nil
}

// readN reads n bytes, taking memory as they come: a peer that announces a
// large frame must send it to make us hold it.
func readN(r io.Reader, n int) ([]byte, error) {
	const step = 64 << 10
	buf := make([]byte, 0, min(n, step))
	for len(buf) < n {
		if len(buf) == cap(buf) {
			grown := make([]byte, len(buf), min(n, 4*cap(buf)))
			copy(grown, buf)
			buf = grown
		}
		m, err := io.ReadFull(r, buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+m]
		if errors.Is(err, io.EOF) {
			return nil, io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
	}
	return buf, nil
}

func (er *EventReader) readJSON() (Event, error) {
	text, err := er.document()
	if err != nil {
		return Event{}, err
	}
	var ev Event
	var object []byte
	s := scanner{data: text}
	err = s.object(func(key []byte) (err error) {
		switch string(key) {
		case "type":
			ev.Type, err = s.str()
		case "object":
			object, err = s.value()
		default:
			err = s.skip()
		}
		return err
	})
	if err == nil {
		err = s.end()
	}
	if err == nil {
		ev.APIVersion, ev.Kind, err = readJSONType(object)
	}
	if err != nil {
		return Event{}, fmt.Errorf("read watch event: %w", err)
	}
	ev.Object = append([]byte(nil), object...)
	return ev, nil
}

// document reads one JSON object; it only counts braces, the grammar is
// checked later.
func (er *EventReader) document() ([]byte, error) { //nolint:gocyclo // a state machine, without a call per byte
	// A rare large event must not be held for the life of the watch.
	if cap(er.text) > 1<<20 {
		er.text = nil
	}
	er.text = er.text[:0]
	depth, inString, escaped := 0, false, false
	for {
		if er.r.Buffered() == 0 {
			if _, err := er.r.Peek(1); err != nil {
				if errors.Is(err, io.EOF) && depth > 0 {
					err = io.ErrUnexpectedEOF
				}
				return nil, err
			}
		}
		chunk, err := er.r.Peek(er.r.Buffered())
		if err != nil {
			return nil, err
		}
		used, done := 0, false
		for used < len(chunk) && !done {
			c := chunk[used]
			used++
			switch {
			case escaped:
				escaped = false
			case inString:
				escaped = c == '\\'
				inString = c != '"'
			case c == '"':
				inString = true
			case c == '{' || c == '[':
				depth++
			case c == '}' || c == ']':
				depth--
				done = depth <= 0
			}
			if depth == 0 && !done {
				if c != ' ' && c != '\n' && c != '\r' && c != '\t' {
					return nil, fmt.Errorf("read watch event: %w", malformed("json: want object, got %q", c))
				}
			}
		}
		if len(er.text)+used > er.max {
			return nil, fmt.Errorf("watch event: %w", ErrTooLarge)
		}
		er.text = append(er.text, chunk[:used]...)
		if _, err := er.r.Discard(used); err != nil {
			return nil, err
		}
		if done {
			return er.text, nil
		}
		if depth == 0 {
			er.text = er.text[:0] // white space between documents
		}
	}
}

// AppendEvent writes one whole frame of a watch as the API server does.
func AppendEvent(dst []byte, enc Encoding, typ, apiVersion, kind string, object []byte) []byte {
	if enc == Protobuf {
		body := envelopeSize(apiVersion, kind, len(object))
		extension := bytesFieldSize(body)
		event := bytesFieldSize(len(typ)) + bytesFieldSize(extension)
		dst = binary.BigEndian.AppendUint32(dst, uint32(event))
		dst = appendStringField(dst, 1, typ)
		dst = append(dst, 0x12)
		dst = protowire.AppendVarint(dst, uint64(extension))
		dst = append(dst, 0x0a)
		dst = protowire.AppendVarint(dst, uint64(body))
		dst = appendEnvelopeStart(dst, apiVersion, kind, len(object))
		dst = append(dst, object...)
		return appendEnvelopeEnd(dst)
	}
	dst = append(dst, `{"type":`...)
	dst = appendJSONString(dst, typ)
	dst = append(dst, `,"object":`...)
	dst = append(dst, object...)
	return append(dst, "}\n"...)
}

// AppendBookmark writes a BOOKMARK frame that holds a [Bookmark].
func AppendBookmark(dst []byte, enc Encoding, apiVersion, kind string, version uint64, initialEventsEnd bool) []byte {
	return AppendEvent(dst, enc, "BOOKMARK", apiVersion, kind,
		Bookmark(enc, apiVersion, kind, version, initialEventsEnd))
}

// ReadBookmark returns what the object of a BOOKMARK event says.
func ReadBookmark(enc Encoding, object []byte) (version uint64, initialEventsEnd bool, err error) {
	m, err := ReadMeta(enc, object, false)
	if err != nil {
		return 0, false, fmt.Errorf("read bookmark: %w", err)
	}
	if m.Version == 0 {
		return 0, false, fmt.Errorf("read bookmark: %w", malformed("no resource version"))
	}
	end, err := annotation(enc, object, metav1.InitialEventsAnnotationKey)
	if err != nil {
		return 0, false, fmt.Errorf("read bookmark: %w", err)
	}
	return m.Version, end == "true", nil
}

// annotation returns the value of one annotation, "" if it is not set.
func annotation(enc Encoding, object []byte, name string) (value string, err error) {
	if enc == Protobuf {
		err = fields(object, func(num protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
			if num != fieldMetadata || typ != protowire.BytesType {
				return nil
			}
			return fields(b, func(num protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
				if num != fieldAnnotations || typ != protowire.BytesType {
					return nil
				}
				p, err := readPair(b)
				if string(p.key) == name {
					value = string(p.value)
				}
				return err
			})
		})
		return value, err
	}
	meta, err := jsonMember(object, "metadata")
	if err != nil || meta == nil {
		return "", err
	}
	annotations, err := jsonMember(meta, "annotations")
	if err != nil || annotations == nil {
		return "", err
	}
	s := scanner{data: annotations}
	err = s.object(func(key []byte) error {
		v, err := s.str()
		if string(key) == name {
			value = v
		}
		return err
	})
	return value, err
}

// AppendStatusEvent writes an ERROR frame. The type of status is filled in.
func AppendStatusEvent(dst []byte, enc Encoding, status *metav1.Status) []byte {
	object, err := statusObject(enc, status)
	if err != nil {
		// A Status holds strings and numbers only.
		panic("wire: marshal status: " + err.Error())
	}
	return AppendEvent(dst, enc, "ERROR", "v1", "Status", object)
}

func statusObject(enc Encoding, status *metav1.Status) ([]byte, error) {
	if enc == Protobuf {
		return status.Marshal()
	}
	typed := *status
	typed.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	return json.Marshal(&typed)
}

// ReadStatus decodes the object of an ERROR event, or of an error answer.
func ReadStatus(enc Encoding, object []byte) (*metav1.Status, error) {
	status := &metav1.Status{}
	var err error
	if enc == Protobuf {
		err = status.Unmarshal(object)
	} else {
		err = utiljson.Unmarshal(object, status)
	}
	if err != nil {
		return nil, fmt.Errorf("read status: %w: %w", ErrMalformed, err)
	}
	return status, nil
}

func formatVersion(version uint64) string { return strconv.FormatUint(version, 10) }
