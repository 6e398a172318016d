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
	noted  map[string]bool
	disk   error

	stop  func()
	ended chan struct{}
}

func newBed(t *testing.T, nodes int, change func(*Config)) *bed {
	t.Helper()
	b := &bed{
		begin: time.Now(), told: map[string]time.Duration{}, due: map[string]time.Duration{}, passed: map[string]time.Duration{},
		noted: map[string]bool{}, ended: make(chan struct{}),
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
	b.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		close(b.ended)
	})
	t.Cleanup(b.stop)
	return b
}

// hold holds pods that are called by their number.
func (b *bed) hold(t *testing.T, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		name := fmt.Sprintf("pod-%03d", i)
		b.await(t, name, b.Hold(Ending{Namespace: "shop", Name: name}, b.pass(name)))
	}
}

// pass is what the gate calls before a pod passes.
func (b *bed) pass(name string) func(context.Context) error {
	return func(context.Context) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.noted[name] = true
		return b.disk
	}
}

func (b *bed) await(t *testing.T, name string, gone <-chan struct{}) {
	t.Helper()
	if gone == nil {
		t.Fatalf("%s is not held", name)
	}
	go func() {
		select {
		case <-gone:
		case <-b.ended:
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.passed[name] = time.Since(b.begin)
		if !b.noted[name] {
			t.Errorf("%s passes and nobody has noted it", name)
		}
	}()
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
		if b.Hold(Ending{Name: "more"}, b.pass("more")) != nil {
			t.Error("one too many is held")
		}
		<-time.After(10 * time.Minute)
		synctest.Wait()
		if got := b.passedBy(time.Hour); got != maxWaiting {
			t.Errorf("%d passed", got)
		}
	})
}

// resume takes over what waits at the gate of an earlier life.
func (b *bed) resume(t *testing.T, before *bed) {
	t.Helper()
	for _, w := range before.Waiting() {
		b.await(t, w.Name, b.Resume(w.Ending, time.Since(w.Since), b.pass(w.Name)))
	}
}

// TestPaceGoesOnAfterARestart: who waited goes on waiting, in the same order and
// at the same pace, without another burst, and no longer in all than one may; a
// gate that is always restarted lets all pass all the same.
func TestPaceGoesOnAfterARestart(t *testing.T) {
	for name, nodes := range map[string]int{"one node": 1, "twenty": 20} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				known := 0 // how many nodes there are is not known at first
				slow := func(c *Config) { c.Nodes = func() int { return known } }
				b := newBed(t, nodes, nil)
				each := b.each(nodes)
				b.hold(t, 0, 12)
				<-time.After(5*time.Second + each*3/2)
				synctest.Wait()
				before := b.passedBy(time.Hour)
				b.stop()

				again := newBed(t, nodes, slow)
				again.resume(t, b)
				known = nodes
				synctest.Wait()
				if n := len(again.Waiting()); before < 1 || n != 12-before {
					t.Fatalf("%d passed, %d wait", before, n)
				}
				passed := 0
				for i := 1; i <= 3; i++ {
					<-time.After(each)
					synctest.Wait()
					now := again.passedBy(time.Hour)
					if now < i-1 || now > i || now < passed {
						t.Fatalf("%d passed after %d turns", now, i)
					}
					passed = now
				}
				if passed == 0 {
					t.Fatal("none has passed")
				}
				<-time.After(again.cfg.Most - time.Since(b.begin))
				synctest.Wait()
				if n := len(again.Waiting()); n != 0 {
					t.Errorf("%d have waited longer than any may", n)
				}
			})
		})
	}
	t.Run("again and again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t, 20, nil)
			b.hold(t, 0, 12)
			for range 60 {
				<-time.After(b.each(20) / 4)
				b.stop()
				next := newBed(t, 20, nil)
				next.resume(t, b)
				next.begin, b = b.begin, next
			}
			synctest.Wait()
			if n := len(b.Waiting()); n != 0 {
				t.Errorf("%d have waited longer than any may", n)
			}
		})
	})
}

// TestADiskThatFails: it delays no turn.
func TestADiskThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, 1, nil)
		b.disk = errors.New("full")
		b.hold(t, 0, 2)
		synctest.Wait()
		if b.passedBy(0) != 2 {
			t.Error("a pod waits for the disk")
		}
	})
}

// TestStoppedAtATurn: a gate that is stopped while it notes a turn lets nobody
// pass.
func TestStoppedAtATurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, 1, nil)
		gone := b.Hold(Ending{Name: "a"}, func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		synctest.Wait()
		b.stop()
		select {
		case <-gone:
			t.Error("it passed")
		default:
		}
		if len(b.Waiting()) != 1 {
			t.Error("it does not wait any more")
		}
	})
}
