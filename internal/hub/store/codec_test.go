package store

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

func testCodec(tb testing.TB) *codec {
	tb.Helper()
	c, err := newCodec(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func TestValueIsTiedToItsPlace(t *testing.T) {
	c := testCodec(t)
	for _, data := range [][]byte{nil, []byte("small"), bytes.Repeat([]byte("compressed "), 500)} {
		r := Record{Version: 7, Encoding: 3, Data: data}
		v := c.seal([]byte("before"), "bucket", "key", r)[len("before"):]
		out, h, err := c.open([]byte("x"), "bucket", "key", v)
		if err != nil || !bytes.Equal(out[1:], data) || h != (Header{Version: 7, Encoding: 3, Size: len(data)}) {
			t.Fatalf("%+v, %v", h, err)
		}
		for _, at := range [][2]string{{"bucket", "kez"}, {"bucke", "tkey"}, {"bucketk", "ey"}, {"", "key"}} {
			if _, _, err := c.open(nil, at[0], at[1], v); err == nil {
				t.Errorf("opened at %q", at)
			}
			if _, err := parseHeader(at[0], at[1], v); err == nil {
				t.Errorf("header accepted at %q", at)
			}
		}
		again := c.seal(nil, "bucket", "key", r)
		if bytes.Equal(again, v) {
			t.Error("sealed twice to the same bytes")
		}
		for i := range len(v) * 8 {
			v[i/8] ^= 1 << (i % 8)
			if out, _, err := c.open([]byte("x"), "bucket", "key", v); err == nil || string(out) != "x" {
				t.Errorf("opened with bit %d of byte %d flipped", i%8, i/8)
			}
			v[i/8] ^= 1 << (i % 8)
		}
		for n := range v {
			if _, _, err := c.open(nil, "bucket", "key", v[:n]); err == nil {
				t.Errorf("opened with %d of %d bytes", n, len(v))
			}
		}
	}
}

func TestOpenAllocatesNothing(t *testing.T) {
	c := testCodec(t)
	data := bytes.Repeat([]byte("an object of the usual size "), 400)
	v := c.seal(nil, "bucket", "key", Record{Data: data})
	buf := make([]byte, 0, 2*len(data))
	avg := testing.AllocsPerRun(100, func() {
		if _, _, err := c.open(buf, "bucket", "key", v); err != nil {
			t.Fatal(err)
		}
	})
	if avg > 2 { // under the race detector a pool drops things at random
		t.Errorf("%v allocations", avg)
	}
}

func FuzzSealOpen(f *testing.F) {
	f.Add("b", "k", uint64(1), byte(2), []byte("data"), uint(3))
	f.Add("", "", uint64(0), byte(0), bytes.Repeat([]byte{1, 2}, 2000), uint(1<<40))
	c := testCodec(f)
	f.Fuzz(func(t *testing.T, bucket, key string, version uint64, encoding byte, data []byte, flip uint) {
		r := Record{Version: version, Encoding: encoding, Data: data}
		v := c.seal(nil, bucket, key, r)
		out, h, err := c.open(nil, bucket, key, v)
		if err != nil || !bytes.Equal(out, data) || h.Version != version || h.Encoding != encoding {
			t.Fatalf("%+v, %v", h, err)
		}
		v[flip/8%uint(len(v))] ^= 1 << (flip % 8)
		if _, _, err := c.open(nil, bucket, key, v); err == nil {
			t.Fatal("opened with a bit flipped")
		}
	})
}

// Values under a key that is known to the writer of the file, so that what
// is below the seal is met too.
func FuzzOpenValue(f *testing.F) {
	c := testCodec(f)
	f.Add(true, c.seal(nil, "b", "k", Record{Data: bytes.Repeat([]byte("x"), 2000)}))
	f.Add(false, []byte{formatV1})
	f.Fuzz(func(_ *testing.T, seal bool, v []byte) {
		if seal { // v is taken for compressed data
			s := c.get()
			defer c.put(s)
			sealed := c.seal(nil, "b", "k", Record{})[:headerSize]
			sealed[1] = flagS2
			sum := checkOf("b", "k", sealed[:atCheck])
			binary.LittleEndian.PutUint64(sealed[atCheck:], sum)
			s.aad = appendAAD(s.aad[:0], "b", "k", sealed)
			v = c.aead.Seal(sealed, sealed[atNonce:atCheck], v, s.aad)
		}
		_, _, _ = c.open(nil, "b", "k", v)
	})
}

// FuzzVerify overwrites parts of a small but complete file.
func FuzzVerify(f *testing.F) {
	path := filepath.Join(f.TempDir(), "store")
	s, err := Open(f.Context(), Config{Path: path, Key: bytes.Repeat([]byte{7}, 32)})
	if err != nil {
		f.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for range 3 {
		b := NewBatch()
		for i := range 40 {
			b.Put("b", string(rune('a'+i)), Record{Data: make([]byte, 1<<rng.IntN(10))})
			b.Put("c", string(rune('a'+i)), Record{Data: []byte{byte(rng.Uint32())}})
		}
		if err := s.Commit(f.Context(), b); err != nil {
			f.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	image = image[:min(len(image), 256<<10)] // the rest is a hole
	if _, err := verifyImage(bytes.NewReader(image), int64(len(image))); err != nil {
		f.Fatal(err)
	}
	for page := range uint32(20) {
		f.Add(page*4096+8, []byte{1, 0, 0xff})
		f.Add(page*4096+16, []byte{0xff, 0xff, 0xff, 0xff, 1})
	}
	f.Fuzz(func(_ *testing.T, at uint32, with []byte) {
		bad := bytes.Clone(image)
		copy(bad[int(at)%len(bad):], with)
		_, _ = verifyImage(bytes.NewReader(bad), int64(len(bad)))
	})
}
