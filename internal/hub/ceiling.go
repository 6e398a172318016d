package hub

import (
	"math"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

const (
	// defaultMemory is the ceiling where GOMEMLIMIT names none.
	defaultMemory = 300 << 20
	// memoryCheckEvery is how old a look at the memory may be.
	memoryCheckEvery = 100 * time.Millisecond
)

// setCeiling makes Go keep below a ceiling of memory: GOMEMLIMIT, which the
// unit sets, or the default.
func setCeiling() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(defaultMemory)
	}
}

// ceiling tells when the memory in use comes near the limit. A collector that
// works against the limit takes the processor from everybody; before that,
// what can come back later is sent away.
type ceiling struct {
	limit uint64
	read  func() uint64 // the memory that cannot be freed now

	mu      sync.Mutex // guards the following
	checked time.Time
	near    bool
}

func newCeiling() *ceiling {
	limit := debug.SetMemoryLimit(-1)
	if limit <= 0 {
		limit = math.MaxInt64
	}
	return &ceiling{limit: uint64(limit), read: memoryInUse}
}

// short reports whether four fifths of the ceiling are in use.
func (c *ceiling) short() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.checked) >= memoryCheckEvery {
		c.checked, c.near = now, c.read() > c.limit/5*4
	}
	return c.near
}

// memoryInUse is what the last collection left, and what is not the heap's.
func memoryInUse() uint64 {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/stacks:bytes"},
		{Name: "/memory/classes/metadata/mspan/inuse:bytes"},
		{Name: "/memory/classes/metadata/other:bytes"},
		{Name: "/memory/classes/other:bytes"},
		{Name: "/memory/classes/os-stacks:bytes"},
	}
	metrics.Read(samples)
	var sum uint64
	for _, s := range samples {
		if s.Value.Kind() == metrics.KindUint64 {
			sum += s.Value.Uint64()
		}
	}
	return sum
}
