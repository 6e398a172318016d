// Package gentle lets pods end one after the other that the cloud ended while
// it could not be heard.
//
// What was decided during a cut reaches a node in one moment when the link is
// back. The pods that it ends then stop together, on this node and on all
// others that return with it. Here each of them waits for its turn, at a rate
// that the nodes of a pool share, and is announced by an event before.
package gentle

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// maxWaiting bounds the pods that wait; a kubelet's own limit is 110. One
	// more does not wait for itself, only for those before it.
	maxWaiting = 512
	// burst is how many pods of a pool may end at once.
	burst = 5
	// tellBudget is how long an event may take, and passBudget the disk.
	tellBudget = 5 * time.Second
	passBudget = 10 * time.Second
)

// Config is what a gate needs.
type Config struct {
	// Rate is how many pods of a pool end in a minute.
	Rate float64
	// Most is how long any of them waits.
	Most time.Duration
	// Nodes is how many nodes share the rate, this one included. It must not
	// block.
	Nodes func() int
	// Tell announces the end of a pod, due at a time.
	Tell func(ctx context.Context, e Ending, due time.Time) error

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Ending is a pod that is to end.
type Ending struct {
	Namespace, Name, UID string
	Why                  string
}

// Waiting is an ending that waits.
type Waiting struct {
	Ending

	Since, Due time.Time
	Told       bool // its event is written
}

// Gate lets endings pass. Use New, then Run.
type Gate struct {
	cfg      Config
	held     prometheus.Counter
	released *prometheus.CounterVec
	unsaid   prometheus.Counter

	mu      sync.Mutex // guards the following
	queue   []*turn
	full    time.Time     // when all of the burst is free again
	resumed time.Time     // when turns of an earlier life were taken over; zero: full tells all
	phase   float64       // of this node then, in turns
	changed chan struct{} // closed when the queue or what is told of it changes
}

type turn struct {
	Ending

	since time.Time
	told  bool
	pass  func(context.Context) error
	gone  chan struct{} // closed when it passes
}

// New returns a gate.
func New(cfg Config) *Gate {
	g := &Gate{
		cfg: cfg, changed: make(chan struct{}),
		held: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_gentle_held_total",
			Help: "Pods whose end in the cloud, decided while the node was away, had to wait for its turn.",
		}),
		released: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_gentle_released_total",
			Help: "Pods that have waited, by why they wait no more: turn, or overdue.",
		}, []string{"why"}),
		unsaid: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_gentle_events_failed_total",
			Help: "Events about the coming end of a pod that could not be written.",
		}),
	}
	cfg.Registerer.MustRegister(g.held, g.released, g.unsaid, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "node_yurthub_gentle_pending",
		Help: "Pods whose end in the cloud, decided while the node was away, waits for its turn.",
	}, func() float64 { return float64(len(g.Waiting())) }))
	return g
}

// Hold lets an ending wait. The channel is closed when it may pass, after a
// call of pass; nil: now. It does not block.
func (g *Gate) Hold(e Ending, pass func(context.Context) error) <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.holdLocked(e, 0, pass)
}

// Resume is Hold for an ending that has waited for some time in an earlier life
// of the gate. When the last one passed there is not known: the first waits as
// long as if that was just now.
func (g *Gate) Resume(e Ending, waited time.Duration, pass func(context.Context) error) <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.queue) == 0 {
		g.resumed, g.phase = time.Now(), rand.Float64()
	}
	return g.holdLocked(e, min(max(0, waited), g.cfg.Most), pass)
}

func (g *Gate) holdLocked(e Ending, waited time.Duration, pass func(context.Context) error) <-chan struct{} {
	if len(g.queue) >= maxWaiting {
		return nil
	}
	now := time.Now()
	if len(g.queue) == 0 && g.full.Before(now) {
		g.full = now
		if n := g.nodes(); n > burst {
			// Not all nodes of the pool may begin with one.
			g.full = now.Add(rand.N(min(g.each(n), g.cfg.Most/10)))
		}
	}
	t := &turn{Ending: e, since: now.Add(-waited), pass: pass, gone: make(chan struct{})}
	g.queue = append(g.queue, t)
	g.held.Inc()
	g.turnLocked()
	return t.gone
}

func (g *Gate) turnLocked() {
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *Gate) nodes() int { return max(1, g.cfg.Nodes()) }

// each is the time that one ending takes on one of n nodes.
func (g *Gate) each(n int) time.Duration {
	return time.Duration(float64(time.Minute) * float64(n) / g.cfg.Rate)
}

// paceLocked returns the time that one ending takes, which is short enough for
// all to pass in time, and how many pass at once.
func (g *Gate) paceLocked(now time.Time) (each time.Duration, free int) {
	n := g.nodes()
	each = g.each(n)
	if len(g.queue) > 0 {
		left := g.queue[len(g.queue)-1].since.Add(g.cfg.Most).Sub(now)
		each = max(0, min(each, left/time.Duration(len(g.queue))))
	}
	return each, max(1, burst/n)
}

// fullLocked returns when all of the burst is free again. How many nodes there
// are may not be known yet when turns are taken over.
func (g *Gate) fullLocked(each time.Duration, free int) time.Time {
	full := g.full
	if g.resumed.IsZero() {
		return full
	}
	then := g.resumed.Add(time.Duration(free) * each)
	if g.nodes() > burst {
		then = then.Add(time.Duration(g.phase * float64(each)))
	}
	if full.Before(then) {
		full = then
	}
	return full
}

// dueLocked returns when each of the queue passes, as it stands.
func (g *Gate) dueLocked(now time.Time) []time.Time {
	each, free := g.paceLocked(now)
	full, out := g.fullLocked(each, free), make([]time.Time, len(g.queue))
	for i, t := range g.queue {
		at := full.Add(-time.Duration(free-1) * each)
		if at.Before(now) {
			at = now
		}
		if last := t.since.Add(g.cfg.Most); at.After(last) {
			at = last
		}
		out[i] = at
		if full.Before(at) {
			full = at
		}
		full = full.Add(each)
	}
	return out
}

// Waiting returns what waits, the next first.
func (g *Gate) Waiting() []Waiting {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]Waiting, 0, len(g.queue))
	for i, due := range g.dueLocked(time.Now()) {
		t := g.queue[i]
		out = append(out, Waiting{t.Ending, t.since, due, t.told})
	}
	return out
}

// Run lets endings pass until ctx ends.
func (g *Gate) Run(ctx context.Context) error {
	var telling sync.WaitGroup
	telling.Go(func() { g.tell(ctx) })
	defer telling.Wait()
	for {
		head, why, wait, changed := g.next()
		if head != nil {
			if !g.letGo(ctx, head, why) {
				return nil
			}
			continue
		}
		var timer <-chan time.Time // never
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-timer:
		}
	}
}

// next returns whose turn it is, and why. If it is nobody's, it returns after
// how long to come back, 0: not before the change.
func (g *Gate) next() (head *turn, why string, wait time.Duration, changed <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.queue) == 0 {
		return nil, "", 0, g.changed
	}
	now := time.Now()
	head, due, last := g.queue[0], g.dueLocked(now)[0], g.queue[0].since.Add(g.cfg.Most)
	switch {
	case !now.Before(last):
		return head, "overdue", 0, nil
	case head.told && !now.Before(due):
		return head, "turn", 0, nil
	case head.told:
		return nil, "", due.Sub(now), g.changed
	}
	return nil, "", last.Sub(now), g.changed
}

// letGo lets the head of the queue pass, unless ctx ends first: then it waits for
// its turn in the next life.
func (g *Gate) letGo(ctx context.Context, head *turn, why string) bool {
	passing, cancel := context.WithTimeout(ctx, passBudget)
	err := head.pass(passing)
	cancel()
	if ctx.Err() != nil {
		return false
	}
	log := g.cfg.Log.With("pod", head.Namespace+"/"+head.Name)
	if err != nil {
		log.Warn("a pod ends, and could begin again if the hub is restarted now", "err", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	each, free := g.paceLocked(now)
	g.full, g.resumed = g.fullLocked(each, free), time.Time{}
	if g.full.Before(now) {
		g.full = now
	}
	g.full = g.full.Add(each)
	g.queue = g.queue[1:]
	close(head.gone)
	g.released.WithLabelValues(why).Inc()
	log.Info("a pod ends as the cloud decided while the node was away",
		"cause", head.Why, "waited", now.Sub(head.since).Round(time.Millisecond))
	return true
}

// tell announces endings, each once, in their order.
func (g *Gate) tell(ctx context.Context) {
	for {
		t, due, changed := g.untold()
		if t == nil {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			continue
		}
		telling, cancel := context.WithTimeout(ctx, tellBudget)
		err := g.cfg.Tell(telling, t.Ending, due)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			g.unsaid.Inc()
			g.cfg.Log.Warn("the end of a pod is not announced", "pod", t.Namespace+"/"+t.Name, "err", err)
		}
		g.mu.Lock()
		t.told = true
		g.turnLocked()
		g.mu.Unlock()
	}
}

func (g *Gate) untold() (t *turn, due time.Time, changed <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := g.dueLocked(time.Now())
	for i, t := range g.queue {
		if !t.told {
			return t, all[i], g.changed
		}
	}
	return nil, due, g.changed
}
