package gentle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bed is a gate in a synctest bubble, and the times at which its pods were
// told and passed.
type bed struct {
	*Gate
	begin time.Time

	mu     sync.Mutex
	told   map[string]time.Duration
	due    map[string]time.Duration
	passed map[string]time.Duration
}

func newBed(t *testing.T, nodes int, change func(*Config)) *bed {
	t.Helper()
	b := &bed{
		begin: time.Now(), told: map[string]time.Duration{}, due: map[string]time.Duration{}, passed: map[string]time.Duration{},
	}
	cfg := Config{
		Rate: 30, Most: 10 * time.Minute, Nodes: func() int { return nodes },
		Tell: func(_ context.Context, e Ending, due time.Time) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.told[e.Name], b.due[e.Name] = time.Since(b.begin), due.Sub(b.begin)
			return nil
		},
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&cfg)
	}
	b.Gate = New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := b.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return b
}

// hold holds pods that are called by their number.
func (b *bed) hold(t *testing.T, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		name := fmt.Sprintf("pod-%03d", i)
		gone := b.Hold(Ending{Namespace: "shop", Name: name})
		if gone == nil {
			t.Fatalf("%s is not held", name)
		}
		go func() {
			<-gone
			b.mu.Lock()
			defer b.mu.Unlock()
			b.passed[name] = time.Since(b.begin)
		}()
	}
}

// passedBy returns how many have passed at a time since the beginning.
func (b *bed) passedBy(d time.Duration) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, at := range b.passed {
		if at <= d {
			n++
		}
	}
	return n
}

// TestPace: a burst at once, then one after the other, each announced before,
// with the time at which it passes.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, 1, nil)
		b.hold(t, 0, 20)
		synctest.Wait()
		if got := b.passedBy(0); got != burst {
			t.Fatalf("%d passed at once", got)
		}
		if w := b.Waiting(); len(w) != 15 || w[0].Name != "pod-005" || w[0].Due.Sub(b.begin) != 2*time.Second || !w[14].Told {
			t.Errorf("waiting: %+v", w)
		}
		for i := 1; i <= 15; i++ {
			<-time.After(2 * time.Second) // 30 a minute
			synctest.Wait()
			if got := b.passedBy(time.Hour); got != burst+i {
				t.Fatalf("%d passed after %d turns", got, i)
			}
		}
		var last time.Duration
		for _, name := range slices.Sorted(maps.Keys(b.passed)) {
			if b.passed[name] < last {
				t.Errorf("%s passed before its turn", name)
			}
			last = b.passed[name]
		}
		for name, at := range b.passed {
			if told, ok := b.told[name]; !ok || told > at || b.due[name] != at {
				t.Errorf("%s passed after %s, told %v after %s that it does after %s", name, at, ok, told, b.due[name])
			}
		}
		if w := b.Waiting(); len(w) != 0 {
			t.Errorf("%d wait", len(w))
		}
		// The burst comes back with time.
		<-time.After(time.Hour)
		before := b.passedBy(24 * time.Hour)
		b.hold(t, 20, 30)
		synctest.Wait()
		if got := b.passedBy(24*time.Hour) - before; got != burst {
			t.Errorf("%d passed at once an hour later", got)
		}
		<-time.After(time.Minute)
	})
}

// TestPoolSharesTheRate: what all nodes of a pool do together is the pool's rate.
func TestPoolSharesTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes = 20
		var all []*bed
		for range nodes {
			b := newBed(t, nodes, func(c *Config) { c.Most = 24 * time.Hour })
			b.hold(t, 0, 12)
			all = append(all, b)
		}
		count := func() (n int) {
			for _, b := range all {
				n += b.passedBy(time.Hour)
			}
			return n
		}
		synctest.Wait()
		if got := count(); got > burst {
			t.Errorf("%d passed at once", got)
		}
		// Each node's turn comes every 40 seconds, the first at a moment of its own.
		for i := 1; i <= 5; i++ {
			<-time.After(40 * time.Second)
			synctest.Wait()
			if got := count(); got != i*nodes {
				t.Errorf("%d passed after %d s, want %d", got, i*40, i*nodes)
			}
		}
		<-time.After(time.Hour)
	})
}

// TestNothingWaitsLonger: with more than fit into the bound, all pass within
// it, evenly.
func TestNothingWaitsLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, 100, nil)
		b.hold(t, 0, 200)
		<-time.After(5 * time.Minute)
		synctest.Wait()
		if got := b.passedBy(time.Hour); got < 80 || got > 110 {
			t.Errorf("%d of 200 passed at half time", got)
		}
		<-time.After(5 * time.Minute)
		synctest.Wait()
		if got := b.passedBy(time.Hour); got != 200 {
			t.Errorf("%d of 200 passed", got)
		}
	})
}

// TestTelling: nothing passes before its event is written, but for what has
// waited as long as it may; an event that fails holds up nothing.
func TestTelling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		written := make(chan struct{})
		b := newBed(t, 1, func(c *Config) {
			tell := c.Tell
			c.Tell = func(ctx context.Context, e Ending, due time.Time) error {
				switch e.Name {
				case "pod-000":
					return errors.New("no")
				case "pod-001":
					<-written
				}
				return tell(ctx, e, due)
			}
			c.Most = time.Minute
		})
		b.hold(t, 0, 3)
		<-time.After(30 * time.Second)
		synctest.Wait()
		if got := strings.Join(slices.Sorted(maps.Keys(b.passed)), " "); got != "pod-000" {
			t.Errorf("passed: %s", got)
		}
		<-time.After(30 * time.Second)
		synctest.Wait()
		if got := strings.Join(slices.Sorted(maps.Keys(b.passed)), " "); got != "pod-000 pod-001 pod-002" {
			t.Errorf("passed: %s", got)
		}
		close(written)
		synctest.Wait()
		if testutil.ToFloat64(b.unsaid) != 1 || testutil.ToFloat64(b.held) != 3 ||
			testutil.ToFloat64(b.released.WithLabelValues("turn")) != 1 || testutil.ToFloat64(b.released.WithLabelValues("overdue")) != 2 {
			t.Error("miscounted")
		}
	})
}

// TestManyWait: the queue is bounded.
func TestManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, 1000, nil)
		b.hold(t, 0, maxWaiting)
		if b.Hold(Ending{Name: "more"}) != nil {
			t.Error("one too many is held")
		}
		<-time.After(10 * time.Minute)
		synctest.Wait()
		if got := b.passedBy(time.Hour); got != maxWaiting {
			t.Errorf("%d passed", got)
		}
	})
}
