package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"unicode/utf8"
)

// maxDepth bounds recursion; encoding/json refuses the same.
const maxDepth = 10000

// scanner walks JSON text without building values. It checks the grammar of
// everything that it passes over.
type scanner struct {
	data []byte
	pos  int
}

func (s *scanner) fail(what string) error {
	return malformed("json: %s at offset %d", what, s.pos)
}

// peek skips white space and returns the next byte, 0 at the end.
func (s *scanner) peek() byte {
	for s.pos < len(s.data) {
		switch c := s.data[s.pos]; c {
		case ' ', '\t', '\n', '\r':
			s.pos++
		default:
			return c
		}
	}
	return 0
}

// end checks that only white space follows.
func (s *scanner) end() error {
	if s.peek() != 0 || s.pos < len(s.data) {
		return s.fail("trailing bytes")
	}
	return nil
}

// object calls f for each member of the object that comes next; f must
// consume the value. A null counts as an empty object.
func (s *scanner) object(f func(key []byte) error) error {
	if s.peek() == 'n' {
		return s.literal("null")
	}
	if s.peek() != '{' {
		return s.fail("want object")
	}
	s.pos++
	if s.peek() == '}' {
		s.pos++
		return nil
	}
	for {
		key, err := s.stringBytes()
		if err != nil {
			return err
		}
		if s.peek() != ':' {
			return s.fail("want colon")
		}
		s.pos++
		if err := f(key); err != nil {
			return err
		}
		switch s.peek() {
		case ',':
			s.pos++
		case '}':
			s.pos++
			return nil
		default:
			return s.fail("want comma or brace")
		}
	}
}

// array calls f for each element of the array that comes next; f must
// consume it. A null counts as an empty array.
func (s *scanner) array(f func() error) error {
	if s.peek() == 'n' {
		return s.literal("null")
	}
	if s.peek() != '[' {
		return s.fail("want array")
	}
	s.pos++
	if s.peek() == ']' {
		s.pos++
		return nil
	}
	for {
		if err := f(); err != nil {
			return err
		}
		switch s.peek() {
		case ',':
			s.pos++
		case ']':
			s.pos++
			return nil
		default:
			return s.fail("want comma or bracket")
		}
	}
}

// value returns the text of the value that comes next.
func (s *scanner) value() ([]byte, error) {
	s.peek()
	start := s.pos
	if err := s.skip(); err != nil {
		return nil, err
	}
	return s.data[start:s.pos], nil
}

// skip passes over one value. It keeps its own stack, one bit a level, so
// that deep input costs no goroutine stack.
func (s *scanner) skip() error {
	var stack []byte // '{' or '[' for each open level
	for {
		switch c := s.peek(); c {
		case '{', '[':
			if len(stack) == maxDepth {
				return s.fail("nested too deeply")
			}
			s.pos++
			if s.peek() != c+2 { // '}' and ']' follow by two
				stack = append(stack, c)
				if c == '{' {
					if err := s.memberName(); err != nil {
						return err
					}
				}
				continue
			}
			s.pos++
		default:
			if err := s.scalar(c); err != nil {
				return err
			}
		}
		// A value has ended: close what it completes.
		for {
			if len(stack) == 0 {
				return nil
			}
			open := stack[len(stack)-1]
			c := s.peek()
			if c == open+2 {
				s.pos++
				stack = stack[:len(stack)-1]
				continue
			}
			if c != ',' {
				return s.fail("want comma")
			}
			s.pos++
			if open == '{' {
				if err := s.memberName(); err != nil {
					return err
				}
			}
			break
		}
	}
}

// scalar passes over the string, literal or number that c begins.
func (s *scanner) scalar(c byte) error {
	switch c {
	case '"':
		_, err := s.rawString()
		return err
	case 't':
		return s.literal("true")
	case 'f':
		return s.literal("false")
	case 'n':
		return s.literal("null")
	}
	return s.number()
}

func (s *scanner) memberName() error {
	if s.peek() != '"' {
		return s.fail("want member name")
	}
	if _, err := s.rawString(); err != nil {
		return err
	}
	if s.peek() != ':' {
		return s.fail("want colon")
	}
	s.pos++
	return nil
}

func (s *scanner) literal(word string) error {
	if !bytes.HasPrefix(s.data[s.pos:], []byte(word)) {
		return s.fail("want " + word)
	}
	s.pos += len(word)
	return nil
}

func (s *scanner) digits() bool {
	start := s.pos
	for s.pos < len(s.data) && '0' <= s.data[s.pos] && s.data[s.pos] <= '9' {
		s.pos++
	}
	return s.pos > start
}

func (s *scanner) at(chars string) bool {
	return s.pos < len(s.data) && bytes.IndexByte([]byte(chars), s.data[s.pos]) >= 0
}

func (s *scanner) number() error {
	if s.at("-") {
		s.pos++
	}
	if s.at("0") {
		s.pos++
	} else if !s.digits() {
		return s.fail("want value")
	}
	if s.at(".") {
		s.pos++
		if !s.digits() {
			return s.fail("want digit")
		}
	}
	if s.at("eE") {
		s.pos++
		if s.at("+-") {
			s.pos++
		}
		if !s.digits() {
			return s.fail("want digit")
		}
	}
	return nil
}

// rawString returns the text between the quotes of the string that comes
// next, escapes as they are.
func (s *scanner) rawString() ([]byte, error) {
	s.pos++ // the quote
	start := s.pos
	for s.pos < len(s.data) {
		c := s.data[s.pos]
		if c >= 0x20 && c != '"' && c != '\\' {
			s.pos++
			continue
		}
		if c == '"' {
			s.pos++
			return s.data[start : s.pos-1], nil
		}
		if c != '\\' {
			return nil, s.fail("control character in string")
		}
		if err := s.escape(); err != nil {
			return nil, err
		}
	}
	return nil, s.fail("string not closed")
}

func (s *scanner) escape() error {
	s.pos++
	if s.pos == len(s.data) {
		return s.fail("string not closed")
	}
	switch s.data[s.pos] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		s.pos++
		return nil
	case 'u':
		s.pos++
		for range 4 {
			if !s.at("0123456789abcdefABCDEF") {
				return s.fail("want hex digit")
			}
			s.pos++
		}
		return nil
	}
	return s.fail("bad escape")
}

// stringBytes returns the value of the string that comes next. It is a part
// of the data unless the string holds escapes or invalid UTF-8.
func (s *scanner) stringBytes() ([]byte, error) {
	if s.peek() != '"' {
		return nil, s.fail("want string")
	}
	start := s.pos
	raw, err := s.rawString()
	if err != nil {
		return nil, err
	}
	if bytes.IndexByte(raw, '\\') < 0 && utf8.Valid(raw) {
		return raw, nil
	}
	var v string
	if err := json.Unmarshal(s.data[start:s.pos], &v); err != nil {
		return nil, fmt.Errorf("%w: json string: %w", ErrMalformed, err)
	}
	return []byte(v), nil
}

// str returns the string that comes next; null counts as empty.
func (s *scanner) str() (string, error) {
	if s.peek() == 'n' {
		return "", s.literal("null")
	}
	b, err := s.stringBytes()
	return string(b), err
}

const hexDigits = "0123456789abcdef"

// appendJSONString writes a string as encoding/json does with HTML escaping.
func appendJSONString[T string | []byte](dst []byte, src T) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(src); {
		if b := src[i]; b < utf8.RuneSelf {
			if plain[b] {
				i++
				continue
			}
			dst = append(dst, src[start:i]...)
			switch b {
			case '\\', '"':
				dst = append(dst, '\\', b)
			case '\b':
				dst = append(dst, '\\', 'b')
			case '\f':
				dst = append(dst, '\\', 'f')
			case '\n':
				dst = append(dst, '\\', 'n')
			case '\r':
				dst = append(dst, '\\', 'r')
			case '\t':
				dst = append(dst, '\\', 't')
			default:
				dst = append(dst, '\\', 'u', '0', '0', hexDigits[b>>4], hexDigits[b&0xf])
			}
			i++
			start = i
			continue
		}
		n := min(len(src)-i, utf8.UTFMax)
		c, size := utf8.DecodeRuneInString(string(src[i : i+n]))
		if c == utf8.RuneError && size == 1 {
			dst = append(dst, src[start:i]...)
			dst = append(dst, `\ufffd`...)
			i += size
			start = i
			continue
		}
		// U+2028 and U+2029 are line ends in JavaScript.
		if c == '\u2028' || c == '\u2029' {
			dst = append(dst, src[start:i]...)
			dst = append(dst, '\\', 'u', '2', '0', '2', hexDigits[c&0xf])
			i += size
			start = i
			continue
		}
		i += size
	}
	dst = append(dst, src[start:]...)
	return append(dst, '"')
}

// plain holds the ASCII bytes that need no escape.
var plain = func() (t [utf8.RuneSelf]bool) {
	for c := range t {
		switch {
		case c < 0x20, c == '"', c == '\\', c == '<', c == '>', c == '&':
		default:
			t[c] = true
		}
	}
	return t
}()
