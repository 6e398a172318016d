package condition

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// edge is a Node and the facts of its hub. The test holds mu but while it lets
// time go by.
type edge struct {
	t      *testing.T
	mu     sync.Mutex
	facts  Facts
	node   *corev1.Node
	writes []time.Time
	events []corev1.Event
	fail   error
	off    bool
	writer *Writer
}

func newEdge(t *testing.T) *edge {
	f := well()
	now := time.Now()
	f.Link.Since = now
	f.Certificate.NotBefore, f.Certificate.NotAfter = now, now.AddDate(1, 0, 0)
	e := &edge{t: t, facts: f, node: &corev1.Node{}}
	e.mu.Lock()
	return e
}

// run starts the writer and returns what stops it.
func (e *edge) run() (stop func()) {
	e.writer = New(Config{
		NodeName: "edge-1", Off: e.off,
		Facts: func() Facts {
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.facts
		},
		Node: func() (*corev1.Node, error) {
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.node, nil
		},
		PatchStatus: func(_ context.Context, patch []byte) error {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.writes = append(e.writes, time.Now())
			if e.fail != nil {
				return e.fail
			}
			before, err := json.Marshal(e.node)
			if err != nil {
				return err
			}
			after, err := strategicpatch.StrategicMergePatch(before, patch, corev1.Node{})
			if err != nil {
				return err
			}
			e.node = &corev1.Node{}
			return json.Unmarshal(after, e.node)
		},
		AddEvent: func(_ context.Context, _ string, text []byte) error {
			e.mu.Lock()
			defer e.mu.Unlock()
			var event corev1.Event
			err := json.Unmarshal(text, &event)
			e.events = append(e.events, event)
			return err
		},
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	ctx, cancel := context.WithCancel(e.t.Context())
	done := make(chan error, 1)
	go func() { done <- e.writer.Run(ctx) }()
	return func() {
		cancel()
		e.mu.Unlock()
		defer e.mu.Lock()
		if err := <-done; err != nil {
			e.t.Error(err)
		}
	}
}

// pass lets time go by.
func (e *edge) pass(d time.Duration) {
	e.mu.Unlock()
	<-time.After(d)
	synctest.Wait()
	e.mu.Lock()
}

func (e *edge) cut() { e.facts.Link = LinkFacts{Since: time.Now(), Reason: "connection refused"} }
func (e *edge) heal() {
	e.facts.Link = LinkFacts{Up: true, Since: time.Now()}
}

func (e *edge) reasons() string {
	var out []string
	for _, event := range e.events {
		out = append(out, event.Reason)
	}
	return strings.Join(out, " ")
}

func TestWritesOnChangeOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t)
		defer e.run()()
		e.pass(24 * time.Hour)
		if len(e.writes) != 1 || len(e.node.Status.Conditions) != 6 || len(e.events) != 0 {
			t.Fatalf("a day of nothing: %d writes, %d conditions, events %s; want 1, 6 and none",
				len(e.writes), len(e.node.Status.Conditions), e.reasons())
		}
		e.cut()
		e.pass(time.Minute)
		e.facts.Journal.Status = 1
		e.pass(time.Minute)
		e.heal()
		e.facts.Journal.Status = 0
		e.pass(time.Minute)
		if got, want := e.reasons(), "YurtHubLinkRefused YurtHubLinkRestored"; got != want {
			t.Errorf("events %s, want %s", got, want)
		}
		if last := e.events[1]; !strings.Contains(last.Message, "after 2m0s without (Refused)") || last.Type != corev1.EventTypeNormal ||
			string(last.InvolvedObject.UID) != "edge-1" {
			t.Errorf("event of the return: %+v", last)
		}
		if got := testutil.ToFloat64(e.writer.writes.WithLabelValues("status", "kept")); got != float64(len(e.writes)) {
			t.Errorf("metric says %v writes, were %d", got, len(e.writes))
		}
	})
}

// TestShortCutIsNotTold: the flash and the link are not paid for a blink.
func TestShortCutIsNotTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t)
		defer e.run()()
		e.pass(time.Minute)
		for range 100 {
			e.cut()
			e.pass(5 * time.Second)
			e.heal()
			e.pass(5 * time.Second)
		}
		if len(e.writes) != 1 || len(e.events) != 0 {
			t.Errorf("%d writes, events %s; want one write, at the start", len(e.writes), e.reasons())
		}
	})
}

func TestFlappingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t)
		defer e.run()()
		const hours = 10
		for range hours * 60 {
			e.cut()
			e.pass(30 * time.Second)
			e.heal()
			e.pass(30 * time.Second)
		}
		if most := writeBurst + hours*12 + 1; len(e.writes) > most || len(e.writes) < hours*6 {
			t.Errorf("%d writes in %d hours, want at most %d and not none", len(e.writes), hours, most)
		}
		if most := 2*hours*6 + 2; len(e.events) > most {
			t.Errorf("%d events in %d hours, want at most %d", len(e.events), hours, most)
		}
		told := int32(0)
		names := map[string]bool{}
		for _, event := range e.events {
			told += event.Count
			names[event.Name] = true
		}
		if told <= int32(len(e.events)) || len(names) != len(e.events) {
			t.Errorf("%d events by %d names tell of %d turns: what was left out is not counted", len(e.events), len(names), told)
		}
		e.pass(time.Hour)
		if got := conditionOf(e.node, Link); got.Status != corev1.ConditionTrue {
			t.Errorf("in the end the Node says %+v", got)
		}
	})
}

func TestWordsChangeSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t)
		defer e.run()()
		e.facts.Store.Err = "error 0"
		e.pass(time.Minute)
		before := len(e.writes)
		for i := range 600 {
			e.facts.Store.Err = "error " + strings.Repeat("i", i%7)
			e.pass(6 * time.Second)
		}
		if got := len(e.writes) - before; got < 1 || got > 2 {
			t.Errorf("%d writes of words in an hour, want one every %s", got, wordsEvery)
		}
	})
}

func TestFailedWriteIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t)
		e.fail = errors.New("not now")
		defer e.run()()
		e.pass(2 * time.Minute)
		tried := slices.Clone(e.writes)
		e.fail = nil
		e.pass(2 * writeEvery) // failures share the budget
		if len(tried) < 2 || tried[1].Sub(tried[0]) < writeGap || len(e.node.Status.Conditions) != 6 {
			t.Errorf("tried at %v, then %d conditions", tried, len(e.node.Status.Conditions))
		}
	})
}

func TestOffTakesAwayWhatIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t)
		stop := e.run()
		e.pass(time.Minute)
		stop()
		e.off = true
		stop = e.run()
		e.pass(time.Hour)
		stop()
		if len(e.writes) != 2 || len(e.node.Status.Conditions) != 0 {
			t.Errorf("%d writes, conditions %+v; want 2 and none", len(e.writes), e.node.Status.Conditions)
		}
	})
}
