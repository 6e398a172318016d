package replica

import (
	"bytes"
	"encoding/binary"
)

// A splice says how an object becomes another that is much like it: pieces of
// the one to copy and to pass over, and bytes to put in. It is what a lens keeps
// of an object that a filter changed, and is mostly a few bytes.
type splice []byte

const (
	// spliceMatch is how many bytes must be the same for two places to be
	// taken for one.
	spliceMatch = 32
	// spliceNear is how far is looked for the end of a small change.
	spliceNear = 256
	// splicePut is how many bytes may come in the place of others before all
	// of the rest is put in.
	splicePut = 40
)

// spliceOf returns how from becomes to.
func spliceOf(from, to []byte) splice {
	var out splice
	for {
		same := commonPrefix(from, to)
		from, to = from[same:], to[same:]
		if len(to) == 0 {
			return out.append(same, 0, nil) // the rest of from is of no use
		}
		skip, put := resume(from, to)
		out = out.append(same, skip, to[:put])
		from, to = from[skip:], to[put:]
		if len(to) == 0 {
			return out
		}
	}
}

func (s splice) append(same, skip int, put []byte) splice {
	s = binary.AppendUvarint(s, uint64(same)) //nolint:gosec // a length
	s = binary.AppendUvarint(s, uint64(skip)) //nolint:gosec // a length
	s = binary.AppendUvarint(s, uint64(len(put)))
	return append(s, put...)
}

// resume returns where from and to go on alike: after how many bytes of each.
func resume(from, to []byte) (skip, put int) {
	if at := find(from, to); at >= 0 {
		return at, 0
	}
	near := from[:min(len(from), spliceNear)]
	for put := range min(splicePut, len(to)) {
		if at := find(near, to[put:]); at >= 0 {
			return at, put
		}
	}
	if at := len(from) - spliceMatch; at >= 0 {
		if put := bytes.Index(to, from[at:]); put >= 0 {
			return at, put
		}
	}
	return len(from), len(to)
}

// find returns where in from the beginning of to is.
func find(from, to []byte) int {
	if len(to) >= spliceMatch {
		return bytes.Index(from, to[:spliceMatch])
	}
	if bytes.HasSuffix(from, to) {
		return len(from) - len(to)
	}
	return -1
}

func commonPrefix(a, b []byte) int {
	n, i := min(len(a), len(b)), 0
	for i+8 <= n && binary.NativeEndian.Uint64(a[i:]) == binary.NativeEndian.Uint64(b[i:]) {
		i += 8
	}
	for i < n && a[i] == b[i] {
		i++
	}
	return i
}

// apply appends to dst what from becomes. It is for the very bytes that the
// splice was made of.
func (s splice) apply(dst, from []byte) []byte {
	for len(s) > 0 {
		var same, skip, put int
		same, s = s.length()
		skip, s = s.length()
		put, s = s.length()
		dst = append(dst, from[:same]...)
		dst = append(dst, s[:put]...)
		from, s = from[same+skip:], s[put:]
	}
	return dst
}

func (s splice) length() (int, splice) {
	v, n := binary.Uvarint(s)
	return int(v), s[n:] //nolint:gosec // it was one
}
