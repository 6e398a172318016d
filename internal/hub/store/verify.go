package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"

	"github.com/cespare/xxhash/v2"
)

// What bbolt's format looks like. Numbers are in the byte order of the
// machine. A page is a header of 16 bytes (id 8, flags 2, count 2, overflow
// 4), then the elements of 16 bytes each, which say where in the page, and
// in the overflow pages that follow it, their keys and values are.
const (
	pageHeader   = 16
	pageElement  = 16
	bucketHeader = 16 // root page, or 0 for a page inside the value; sequence

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10

	bucketLeaf = 0x01 // flag of a leaf element that is a bucket

	metaSize  = 64 // the last 8 are the checksum of those before
	metaMagic = 0xED0CDAED
	firstPage = 2 // after the two meta pages
)

// findings is what verify learned of a file that bbolt may open.
type findings struct {
	empty   bool     // no store was begun in it
	suspect []string // buckets that may have lost keys
}

// verify reads the structure of a whole file, before bbolt maps it, and
// returns ErrDamaged unless bbolt can walk all of it. bbolt has no checksum
// on pages: it panics on a page that makes no sense, faults or recurses for
// ever on a wrong reference, partly on goroutines where nobody can recover.
// Its own check has the same flaws. On the way verify compares the digests.
func verify(f *os.File) (findings, error) {
	st, err := f.Stat()
	if err != nil {
		return findings{}, err
	}
	if st.Size() == 0 {
		return findings{empty: true}, nil
	}
	found, err := verifyImage(f, st.Size())
	if err != nil {
		return findings{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return found, nil
}

type verifier struct {
	f    io.ReaderAt
	page int64
	hwm  uint64 // pages from here on were never used
	seen []bool // pages that are referred to
	leaf []byte // the leaf at hand
}

type meta struct {
	at, pageSize        int64
	root, freelist, hwm uint64
	txid                uint64
}

// A bucketRef is an entry of the root of the file.
type bucketRef struct {
	name     string
	root     uint64
	sequence uint64
	inline   []byte
}

func verifyImage(f io.ReaderAt, size int64) (findings, error) {
	m, err := newestMeta(f)
	if err != nil {
		return findings{}, err
	}
	if m.hwm < firstPage || m.hwm > uint64(size/m.pageSize) {
		return findings{}, fmt.Errorf("%d pages used, file has %d bytes", m.hwm, size)
	}
	v := &verifier{f: f, page: m.pageSize, hwm: m.hwm, seen: make([]bool, m.hwm)}
	var refs []bucketRef
	err = v.tree(m.root, nil, nil, func(k []byte, flags uint32, val []byte) error {
		if flags != bucketLeaf || len(val) < bucketHeader {
			return fmt.Errorf("%q is not a bucket", k)
		}
		refs = append(refs, bucketRef{
			name:     string(k),
			root:     binary.NativeEndian.Uint64(val),
			sequence: binary.NativeEndian.Uint64(val[8:]),
			inline:   bytes.Clone(val[bucketHeader:]),
		})
		return nil
	})
	if err != nil {
		return findings{}, err
	}
	found, err := v.buckets(refs)
	if err != nil {
		return findings{}, err
	}
	return found, v.freelist(m.freelist)
}

// newestMeta returns the later one of the two meta pages that are intact.
func newestMeta(f io.ReaderAt) (meta, error) {
	m, err := readMeta(f, 0)
	// The second page tells the page size if the first cannot.
	for at := int64(1 << 10); err != nil && at <= 1<<24; at *= 2 {
		if m, err = readMeta(f, at); err == nil && m.pageSize != at {
			err = errors.New("meta page at the wrong place")
		}
	}
	if err != nil {
		return meta{}, err
	}
	if other, err := readMeta(f, m.pageSize); err == nil && other.pageSize == m.pageSize && other.txid > m.txid {
		m = other
	}
	return m, nil
}

func readMeta(f io.ReaderAt, at int64) (meta, error) {
	var b [pageHeader + metaSize]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return meta{}, fmt.Errorf("read meta page: %w", err)
	}
	u := binary.NativeEndian
	body := b[pageHeader:]
	sum := fnv.New64a()
	_, _ = sum.Write(body[:metaSize-8])
	m := meta{
		at:       at,
		pageSize: int64(u.Uint32(body[8:])),
		root:     u.Uint64(body[16:]),
		freelist: u.Uint64(body[32:]),
		hwm:      u.Uint64(body[40:]),
		txid:     u.Uint64(body[48:]),
	}
	if u.Uint32(body) != metaMagic || u.Uint64(body[metaSize-8:]) != sum.Sum64() || m.pageSize < 1<<10 {
		return meta{}, errors.New("meta page does not match its checksum")
	}
	return m, nil
}

// buckets walks every bucket and compares the digests.
func (v *verifier) buckets(refs []bucketRef) (found findings, err error) {
	var names, stored uint64
	found.empty = true
	for _, ref := range refs {
		switch {
		case ref.name == metaBucket:
			found.empty, stored = false, ref.sequence
		case ref.name[:min(len(ref.name), 1)] == dataPrefix:
			names ^= xxhash.Sum64String(ref.name)
		case ref.name != quarantineBucket:
			return findings{}, fmt.Errorf("unknown bucket %q", ref.name)
		}
		sound, err := v.bucket(ref)
		if err != nil {
			return findings{}, fmt.Errorf("bucket %q: %w", ref.name, err)
		}
		if !sound && ref.name[:1] == dataPrefix {
			found.suspect = append(found.suspect, ref.name[1:])
		}
	}
	if names != stored {
		return findings{}, errors.New("a bucket is lost")
	}
	return found, nil
}

// bucket walks one bucket and reports whether it holds what it should.
func (v *verifier) bucket(ref bucketRef) (sound bool, err error) {
	sound = true
	digest := uint64(0)
	leaf := func(k []byte, flags uint32, val []byte) error {
		if flags != 0 {
			return fmt.Errorf("%q is not a value", k)
		}
		if ref.name[:1] != dataPrefix {
			return nil
		}
		digest ^= storedCheck(val)
		if _, err := parseHeader(ref.name[1:], string(k), val); err != nil {
			sound = false
		}
		return nil
	}
	if ref.root == 0 {
		err = v.node(ref.inline, nil, nil, leaf)
	} else {
		err = v.tree(ref.root, nil, nil, leaf)
	}
	return sound && digest == ref.sequence, err
}

type leafFunc func(key []byte, flags uint32, value []byte) error

// tree walks the pages from id down. Keys must begin at from and end before
// to; nil is no bound.
func (v *verifier) tree(id uint64, from, to []byte, leaf leafFunc) error {
	p, err := v.read(id)
	if err == nil {
		err = v.node(p, from, to, leaf)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// read returns a page with its overflow. A leaf is valid until the next.
func (v *verifier) read(id uint64) ([]byte, error) {
	if id < firstPage || id >= v.hwm {
		return nil, errors.New("out of range")
	}
	var h [pageHeader]byte
	if _, err := v.f.ReadAt(h[:], int64(id)*v.page); err != nil {
		return nil, err
	}
	u := binary.NativeEndian
	pages := uint64(u.Uint32(h[12:])) + 1
	if u.Uint64(h[:]) != id || id+pages > v.hwm {
		return nil, errors.New("wrong id or size")
	}
	for i := id; i < id+pages; i++ {
		if v.seen[i] {
			return nil, errors.New("referred to twice")
		}
		v.seen[i] = true
	}
	buf := v.leaf
	size := int64(pages) * v.page
	if u.Uint16(h[8:]) != leafPage || int64(cap(buf)) < size {
		buf = make([]byte, size)
	}
	buf = buf[:size]
	if u.Uint16(h[8:]) == leafPage {
		v.leaf = buf
	}
	_, err := v.f.ReadAt(buf, int64(id)*v.page)
	return buf, err
}

// node checks one page and what is below it.
func (v *verifier) node(p, from, to []byte, leaf leafFunc) error {
	if len(p) < pageHeader {
		return errors.New("cut short")
	}
	u := binary.NativeEndian
	kind, count := u.Uint16(p[8:]), int(u.Uint16(p[10:]))
	if pageHeader+count*pageElement > len(p) {
		return errors.New("more elements than fit")
	}
	if kind != leafPage && (kind != branchPage || count == 0) {
		return fmt.Errorf("kind %d with %d elements", kind, count)
	}
	var last []byte
	for i := range count {
		at := pageHeader + i*pageElement
		e := p[at : at+pageElement]
		var pos, ksize, vsize uint32
		if kind == leafPage {
			pos, ksize, vsize = u.Uint32(e[4:]), u.Uint32(e[8:]), u.Uint32(e[12:])
		} else {
			pos, ksize = u.Uint32(e), u.Uint32(e[4:])
		}
		begin := uint64(at) + uint64(pos)
		end := begin + uint64(ksize)
		if ksize == 0 || end+uint64(vsize) > uint64(len(p)) {
			return errors.New("element outside the page")
		}
		key := p[begin:end:end]
		if !inOrder(i, key, from, last, to) {
			return errors.New("keys out of order")
		}
		last = key
		if kind == leafPage {
			if err := leaf(key, u.Uint32(e), p[end:end+uint64(vsize)]); err != nil {
				return err
			}
			continue
		}
		limit := to
		if i+1 < count {
			var err error
			if limit, err = branchKey(p, i+1); err != nil {
				return err
			}
		}
		if err := v.tree(u.Uint64(e[8:]), key, limit, leaf); err != nil {
			return err
		}
	}
	return nil
}

// inOrder reports whether the i-th key of a page may follow last. bbolt finds
// a page in its parent by the first key, so that one must be from itself.
func inOrder(i int, key, from, last, to []byte) bool {
	if to != nil && bytes.Compare(key, to) >= 0 {
		return false
	}
	if i == 0 {
		return from == nil || bytes.Equal(key, from)
	}
	return bytes.Compare(key, last) > 0
}

// branchKey returns the key of an element that node has yet to look at.
func branchKey(p []byte, i int) ([]byte, error) {
	at := pageHeader + i*pageElement
	begin := uint64(at) + uint64(binary.NativeEndian.Uint32(p[at:]))
	end := begin + uint64(binary.NativeEndian.Uint32(p[at+4:]))
	if end > uint64(len(p)) || begin == end {
		return nil, errors.New("element outside the page")
	}
	return p[begin:end:end], nil
}

// freelist checks that the pages that bbolt will write to next are unused.
func (v *verifier) freelist(id uint64) error {
	p, err := v.read(id)
	if err != nil {
		return fmt.Errorf("freelist page %d: %w", id, err)
	}
	u := binary.NativeEndian
	if u.Uint16(p[8:]) != freelistPage {
		return fmt.Errorf("page %d is not a freelist", id)
	}
	count, ids := uint64(u.Uint16(p[10:])), p[pageHeader:]
	if count == 0xFFFF {
		count, ids = u.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return errors.New("freelist longer than its page")
	}
	for i := range count {
		free := u.Uint64(ids[i*8:])
		if free < firstPage || free >= v.hwm || v.seen[free] {
			return fmt.Errorf("page %d cannot be free", free)
		}
		v.seen[free] = true
	}
	return nil
}
