package replica

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// TestSplice: whatever is made of an object, the splice makes it too, and what
// is much like the object takes little.
func TestSplice(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	piece := func(i int) []byte {
		return fmt.Appendf(nil, "\x12\x40\n\x0a10.%d.%d.%d\x12\x04\x08\x01\x10\x01\x1a\x00*\x06node-%d", i%7, i%13, i, i%50)
	}
	splices, objects, most := 0, 0, 0.0
	for range 3000 {
		var from, to []byte
		from = append(from, "metadata version 12345 of a slice"...)
		to = append(to, fmt.Sprintf("metadata version %d of a slice", rng.IntN(1_000_000))...)
		keep := rng.Float64()
		for i := range rng.IntN(60) {
			p := piece(i)
			from = append(from, p...)
			if rng.Float64() < keep {
				to = append(to, p...)
			}
			if rng.IntN(40) == 0 {
				to = append(to, "something that was not there"...)
			}
		}
		from = append(from, "ports and what follows"...)
		to = append(to, "ports and what follows"...)
		s := spliceOf(from, to)
		if got := s.apply(nil, from); !bytes.Equal(got, to) {
			t.Fatalf("%q becomes %q, want %q", from, got, to)
		}
		most = max(most, float64(len(s))/float64(len(from)+len(to)))
		splices, objects = splices+len(s), objects+len(to)
	}
	if splices > objects/3 || most > 0.7 {
		t.Errorf("splices take %d bytes for objects of %d, one %.2f of its objects", splices, objects, most)
	}
	for range 3000 {
		random := func() []byte {
			out := make([]byte, rng.IntN(200))
			for i := range out {
				out[i] = "ab"[rng.IntN(2)]
			}
			return out
		}
		from, to := random(), random()
		if got := spliceOf(from, to).apply([]byte("x"), from); !bytes.Equal(got[1:], to) {
			t.Fatalf("%q becomes %q, want %q", from, got, to)
		}
	}
}

func FuzzSplice(f *testing.F) {
	f.Add([]byte("an object of some length, so that it can be found again"), []byte("an object of length, so that it can be found again"))
	f.Fuzz(func(t *testing.T, from, to []byte) {
		if got := spliceOf(from, to).apply(nil, from); !bytes.Equal(got, to) {
			t.Fatalf("%q becomes %q, want %q", from, got, to)
		}
	})
}

// A version of another length is a few bytes.
func TestSpliceOfAVersion(t *testing.T) {
	th := &thing{resource: "configmaps", namespace: "ns", name: "a", value: string(bytes.Repeat([]byte("0123456789"), 1000)), version: 99}
	object := th.data(t)
	for _, version := range []uint64{1, 100, 1 << 40} {
		to, err := wire.SetVersion(wire.Protobuf, object, version)
		if err != nil {
			t.Fatal(err)
		}
		if s := spliceOf(object, to); len(s) > 40 {
			t.Errorf("version %d takes %d bytes", version, len(s))
		}
	}
}
