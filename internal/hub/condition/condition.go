// Package condition tells the cluster how a hub does: it keeps the hub's
// conditions on its Node current, and makes an event of each turn for the
// worse or the better. plan.go decides what is said; this file when.
//
// A write costs flash and, later or now, the link. So a turn must last for
// settleFor to be told, turns share a budget, and words alone change seldom.
// What is left out for that reason is told when the budget allows, as it then
// is. Who looks at the node itself sees each turn at once: Now.
package condition

import (
	"context"
	"encoding/json"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/report"
)

const (
	// lookEvery is how often the facts are read.
	lookEvery = 5 * time.Second
	// settleFor is how long a turn must last to be told.
	settleFor = 10 * time.Second
	// writeGap is the least time between two writes, and before a write that
	// failed is tried again. The replica then shows the one before.
	writeGap = 15 * time.Second
	// writeBurst writes may follow each other, then one per writeEvery.
	writeBurst = 6
	writeEvery = 5 * time.Minute
	// wordsEvery is how often the words of a bad condition may change.
	wordsEvery = 30 * time.Minute
	// eventEvery is how often the same event is made; those between are
	// counted in the next.
	eventEvery = 10 * time.Minute
	// writeBudget bounds one write.
	writeBudget = 10 * time.Second

	eventNamespace = metav1.NamespaceDefault
	component      = "yurthub"
)

// Config is what a Writer needs.
type Config struct {
	NodeName string
	// Off takes away what an earlier run has written, and writes nothing.
	Off bool
	// Facts is asked every few seconds.
	Facts func() Facts
	// Node returns the Node as local readers see it, nil if it is not known.
	Node func() (*corev1.Node, error)
	// PatchStatus makes a strategic merge patch of the Node's status durable,
	// in the cloud or for it. AddEvent does that for an event, as JSON.
	PatchStatus func(ctx context.Context, patch []byte) error
	AddEvent    func(ctx context.Context, namespace string, event []byte) error
	Log         *slog.Logger
	Registerer  prometheus.Registerer
}

// Writer keeps conditions. Use New, then Run.
type Writer struct {
	cfg    Config
	writes *prometheus.CounterVec

	// The rest is Run's.
	turns  map[string]turn // by type
	words  map[string]time.Time
	told   map[string]told // by reason of an event
	budget *rate.Limiter
	next   time.Time // of a write
}

// turn is what a condition last became, and when.
type turn struct {
	status, reason string
	at             time.Time
}

// told is an event that was made, and how often it came again since.
type told struct {
	at    time.Time
	again int32
}

// New makes a Writer.
func New(cfg Config) *Writer {
	w := &Writer{
		cfg: cfg, turns: map[string]turn{}, words: map[string]time.Time{}, told: map[string]told{},
		budget: rate.NewLimiter(rate.Every(writeEvery), writeBurst),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_condition_writes_total", Help: "Writes of the node's conditions and events by the hub, by kind and result.",
		}, []string{"kind", "result"}),
	}
	cfg.Registerer.MustRegister(w.writes, gauges{w})
	return w
}

// Now returns the conditions as they are at this moment, with nothing held
// back.
func (w *Writer) Now() []report.Condition { return Plan(w.cfg.Facts(), time.Now()) }

// Run writes until ctx ends, and returns nil.
func (w *Writer) Run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		w.step(ctx, time.Now())
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (w *Writer) step(ctx context.Context, now time.Time) {
	var want []report.Condition
	if !w.cfg.Off {
		want = Plan(w.cfg.Facts(), now)
	}
	for _, c := range want {
		if t := w.turns[c.Type]; t.status != c.Status || t.reason != c.Reason {
			w.turns[c.Type] = turn{c.Status, c.Reason, now}
		}
	}
	if now.Before(w.next) {
		return
	}
	node, err := w.cfg.Node()
	if err != nil || node == nil {
		return // not known yet; the replica tells of its own trouble
	}
	changes, gone := differ(want, node.Status.Conditions)
	changes = w.due(changes, now)
	if len(changes)+len(gone) == 0 || !w.budget.AllowN(now, 1) {
		return
	}
	w.next = now.Add(writeGap)
	if w.write(ctx, changes, gone, now) {
		w.tell(ctx, changes, now)
	}
}

// due returns the changes that have lasted. While others turn, as at a start
// or with the link, it waits a little to write them all at once.
func (w *Writer) due(changes []change, now time.Time) []change {
	var out []change
	var oldest time.Duration
	turning := false
	for _, c := range changes {
		age := now.Sub(w.turns[c.want.Type].at)
		if age < settleFor {
			turning = true
			continue
		}
		if !c.turned() && now.Sub(w.words[c.want.Type]) < wordsEvery {
			continue
		}
		oldest = max(oldest, age)
		out = append(out, c)
	}
	if turning && oldest < 2*settleFor {
		return nil
	}
	return out
}

func (w *Writer) write(ctx context.Context, changes []change, gone []corev1.NodeConditionType, now time.Time) bool {
	text, err := patch(changes, gone, now)
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, writeBudget)
		defer cancel()
		err = w.cfg.PatchStatus(ctx, text)
	}
	if !w.count("status", err) {
		return false
	}
	for _, c := range changes {
		w.words[c.want.Type] = now
		w.cfg.Log.Debug("condition written", "condition", c.want.Type, "status", c.want.Status, "reason", c.want.Reason)
	}
	return true
}

// tell makes an event of each turn. An event that fails is lost: the
// condition has said it.
func (w *Writer) tell(ctx context.Context, changes []change, now time.Time) {
	for _, c := range changes {
		kind, reason := c.said()
		if reason == "" {
			continue
		}
		last, before := w.told[reason]
		if before && now.Sub(last.at) < eventEvery {
			last.again++
			w.told[reason] = last
			continue
		}
		w.told[reason] = told{at: now}
		first := now
		if last.again > 0 {
			first = last.at
		}
		text, err := json.Marshal(w.event(kind, reason, c.message(), first, now, 1+last.again))
		if err == nil {
			ctx, cancel := context.WithTimeout(ctx, writeBudget)
			err = w.cfg.AddEvent(ctx, eventNamespace, text)
			cancel()
		}
		w.count("event", err)
	}
}

// event is about the Node as the kubelet's are: the UID is the name.
func (w *Writer) event(kind, reason, message string, first, last time.Time, count int32) *corev1.Event {
	return &corev1.Event{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: eventNamespace,
			Name:      w.cfg.NodeName + "." + strings.ToLower(reason) + "." + strconv.FormatInt(last.UnixNano(), 16),
		},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: w.cfg.NodeName, UID: types.UID(w.cfg.NodeName)},
		Type:           kind, Reason: reason, Message: message, Count: count,
		FirstTimestamp: metav1.NewTime(first), LastTimestamp: metav1.NewTime(last),
		Source:              corev1.EventSource{Component: component, Host: w.cfg.NodeName},
		ReportingController: component, ReportingInstance: w.cfg.NodeName,
	}
}

func (w *Writer) count(kind string, err error) bool {
	result := "kept"
	if err != nil {
		result = "failed"
		w.cfg.Log.Warn("condition of the node not written", "kind", kind, "err", err)
	}
	w.writes.WithLabelValues(kind, result).Inc()
	return err == nil
}

// gauges shows the conditions as they are, also when they are not written.
type gauges struct{ w *Writer }

var conditionDesc = prometheus.NewDesc("node_yurthub_condition",
	"The hub's conditions: 1 true and good, 0 false, -1 unknown.", []string{"type"}, nil)

// Describe is of prometheus.Collector.
func (gauges) Describe(out chan<- *prometheus.Desc) { out <- conditionDesc }

// Collect is of prometheus.Collector.
func (g gauges) Collect(out chan<- prometheus.Metric) {
	for _, c := range g.w.Now() {
		value := map[string]float64{report.True: 1, report.False: 0, report.Unknown: -1}[c.Status]
		out <- prometheus.MustNewConstMetric(conditionDesc, prometheus.GaugeValue, value, c.Type)
	}
}
