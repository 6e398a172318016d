package wire

import (
	"google.golang.org/protobuf/encoding/protowire"
)

// magic starts every Protobuf body of the Kubernetes API.
const magic = "k8s\x00"

// fields calls f for each field of a message. b is the payload of a
// length-delimited field, v the value of a varint; other wire types, which
// the Kubernetes API uses only for floats, are passed by their raw bits.
func fields(msg []byte, f func(num protowire.Number, typ protowire.Type, b []byte, v uint64) error) error {
	for len(msg) > 0 {
		num, typ, b, v, n := field(msg)
		if n < 0 {
			return malformed("protobuf field: %v", protowire.ParseError(n))
		}
		if err := f(num, typ, b, v); err != nil {
			return err
		}
		msg = msg[n:]
	}
	return nil
}

// field reads the first field of a message; n is negative if it is damaged.
func field(msg []byte) (num protowire.Number, typ protowire.Type, b []byte, v uint64, n int) {
	var tag uint64
	var t int
	if len(msg) > 0 && msg[0] < 0x80 {
		tag, t = uint64(msg[0]), 1
	} else if tag, t = protowire.ConsumeVarint(msg); t < 0 {
		return 0, 0, nil, 0, t
	}
	num, typ = protowire.DecodeTag(tag)
	if num < protowire.MinValidNumber {
		return 0, 0, nil, 0, -1
	}
	var m int
	switch typ {
	case protowire.BytesType:
		b, m = protowire.ConsumeBytes(msg[t:])
	case protowire.VarintType:
		v, m = protowire.ConsumeVarint(msg[t:])
	case protowire.Fixed64Type:
		v, m = protowire.ConsumeFixed64(msg[t:])
	case protowire.Fixed32Type:
		var w uint32
		w, m = protowire.ConsumeFixed32(msg[t:])
		v = uint64(w)
	default:
		m = protowire.ConsumeFieldValue(num, typ, msg[t:])
	}
	if m < 0 {
		return 0, 0, nil, 0, m
	}
	return num, typ, b, v, t + m
}

func appendBytesField(dst []byte, num protowire.Number, b []byte) []byte {
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	return protowire.AppendBytes(dst, b)
}

func appendStringField(dst []byte, num protowire.Number, s string) []byte {
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	return protowire.AppendString(dst, s)
}

// bytesFieldSize is the size of a length-delimited field with a number
// below 16.
func bytesFieldSize(n int) int { return 1 + protowire.SizeBytes(n) }

// typeMetaSize is the size of the runtime.TypeMeta message.
func typeMetaSize(apiVersion, kind string) int {
	return bytesFieldSize(len(apiVersion)) + bytesFieldSize(len(kind))
}

// envelopeSize is the size of a whole Protobuf body that holds n bytes.
func envelopeSize(apiVersion, kind string, n int) int {
	return len(magic) + bytesFieldSize(typeMetaSize(apiVersion, kind)) + bytesFieldSize(n) + 4
}

// appendEnvelopeStart writes a body's bytes up to its n bytes of raw message.
func appendEnvelopeStart(dst []byte, apiVersion, kind string, n int) []byte {
	dst = append(dst, magic...)
	dst = append(dst, 0x0a)
	dst = protowire.AppendVarint(dst, uint64(typeMetaSize(apiVersion, kind)))
	dst = appendStringField(dst, 1, apiVersion)
	dst = appendStringField(dst, 2, kind)
	dst = append(dst, 0x12)
	return protowire.AppendVarint(dst, uint64(n))
}

// appendEnvelopeEnd writes the empty contentEncoding and contentType, which
// the API server never leaves out.
func appendEnvelopeEnd(dst []byte) []byte { return append(dst, 0x1a, 0, 0x22, 0) }

// readEnvelope opens a Protobuf body. raw is a part of body.
func readEnvelope(body []byte) (apiVersion, kind string, raw []byte, err error) {
	if len(body) < len(magic) || string(body[:len(magic)]) != magic {
		return "", "", nil, malformed("no protobuf magic")
	}
	err = fields(body[len(magic):], func(num protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
		if typ != protowire.BytesType {
			return malformed("envelope field %d has wire type %d", num, typ)
		}
		switch num {
		case 1:
			return fields(b, func(num protowire.Number, typ protowire.Type, b []byte, _ uint64) error {
				switch {
				case typ != protowire.BytesType:
					return malformed("type field %d has wire type %d", num, typ)
				case num == 1:
					apiVersion = string(b)
				case num == 2:
					kind = string(b)
				}
				return nil
			})
		case 2:
			raw = b
		case 3:
			if len(b) > 0 {
				return malformed("content encoding %q", b)
			}
		case 4:
			if len(b) > 0 && string(b) != "application/vnd.kubernetes.protobuf" {
				return malformed("content type %q", b)
			}
		}
		return nil
	})
	if err != nil {
		return "", "", nil, err
	}
	return apiVersion, kind, raw, nil
}
