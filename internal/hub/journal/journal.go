// Package journal keeps the writes that a node makes while the cloud is
// away: pod and node status, and events. A write is acknowledged once it is
// durable on disk, shown to local readers as an overlay on the replica, and
// delivered when the link is back. What may be dropped, and when, is written
// in docs/guarantees.md.
//
// It accepts writes; whether a caller may make them is for its user to check.
package journal

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/clock"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	statusBucket = "journal/status"
	eventBucket  = "journal/events"

	// deliverBudget is how long one delivery may take.
	deliverBudget = 10 * time.Second
	// displaced is the reason for which an event was dropped that made place
	// for a newer one.
	displaced = "limit"

	// retryEvery is the pause after a delivery that failed for now.
	retryEvery = 2 * time.Second
	// returned is how long the link was waited for at least if what came after it
	// is a return, and no doubt that a probe has settled.
	returned = 5 * time.Second
	// deniedAfter is how long the cloud must say that the node may not write
	// this before it is believed: an API server that has just started denies
	// everybody for a moment.
	deniedAfter = 30 * time.Second
	// keepTaken is how long an overlay waits for the replica to catch up
	// with what the cloud took, or let go. The object may have left the
	// replica.
	keepTaken = 10 * time.Minute
)

// Config is what a journal needs.
type Config struct {
	Store *store.Store
	// Cloud sends requests as the node.
	Cloud http.RoundTripper
	// WaitUp returns once the link is up, or ctx ends.
	WaitUp func(ctx context.Context) error
	// Refresh is called after the overlay of an object changed.
	Refresh func(resource schema.GroupVersionResource, namespace, name string) error
	// Clock dates writes; the machine's if nil.
	Clock      *clock.Clock
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// MaxEvents and MaxEventBytes bound the events kept; the oldest go
	// first. Zero means 1000 and 1 MiB.
	MaxEvents, MaxEventBytes int
	// MaxStatus and MaxStatusBytes bound the statuses kept. None makes place
	// for another: a write beyond is refused. Zero means 1000 and 16 MiB.
	MaxStatus, MaxStatusBytes int
	// StatusAge and EventAge are how old a write may be when it is delivered,
	// counted from its first form that the cloud has not got. Zero means 90
	// days and 7 days.
	StatusAge, EventAge time.Duration
	// Spread is how long events wait at most after the link's return, each journal
	// for a time of its own: the links of many nodes return together. Zero means
	// not at all.
	Spread time.Duration
}

// Journal is the writes that wait for the cloud.
type Journal struct {
	cfg     Config
	metrics metrics
	wake    chan struct{} // something was added

	write     sync.Mutex          // one writer at a time, held over the commit
	lingering map[stored]struct{} // settled and still on the disk; guarded by write

	mu         sync.Mutex // guards the following
	status     map[target]*statusEntry
	events     map[string]*eventEntry
	eventBytes int
	sequence   uint64
	delivered  int // since Open
	dropped    int
	displaced  int

	denied map[string]time.Time // since when, by what was sent; only deliver uses it
}

type metrics struct {
	depth   *prometheus.GaugeVec
	dropped *prometheus.CounterVec
	sent    *prometheus.CounterVec
}

// target names an object.
type target struct {
	resource  schema.GroupVersionResource
	namespace string
	name      string
}

func (t target) String() string {
	return t.resource.Resource + "/" + t.namespace + "/" + t.name
}

func (t target) path() string {
	if t.namespace == "" {
		return "/api/v1/" + t.resource.Resource + "/" + url.PathEscape(t.name)
	}
	return "/api/v1/namespaces/" + url.PathEscape(t.namespace) + "/" + t.resource.Resource + "/" + url.PathEscape(t.name)
}

// Open loads what the store holds.
func Open(cfg Config) (*Journal, error) {
	if cfg.MaxEvents == 0 {
		cfg.MaxEvents = 1000
	}
	if cfg.MaxEventBytes == 0 {
		cfg.MaxEventBytes = 1 << 20
	}
	if cfg.StatusAge == 0 {
		cfg.StatusAge = 90 * 24 * time.Hour
	}
	if cfg.EventAge == 0 {
		cfg.EventAge = 7 * 24 * time.Hour
	}
	if cfg.MaxStatus == 0 {
		cfg.MaxStatus = 1000
	}
	if cfg.MaxStatusBytes == 0 {
		cfg.MaxStatusBytes = 16 << 20
	}
	j := &Journal{
		cfg: cfg, wake: make(chan struct{}, 1),
		status: map[target]*statusEntry{}, events: map[string]*eventEntry{},
		denied: map[string]time.Time{}, lingering: map[stored]struct{}{},
	}
	j.metrics = metrics{
		depth: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "node_yurthub_journal_entries", Help: "Writes that wait for the cloud.",
		}, []string{"kind"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_journal_dropped_total", Help: "Acknowledged writes that were dropped by the rules.",
		}, []string{"kind", "reason"}),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_journal_delivered_total", Help: "Writes that the cloud took from the journal.",
		}, []string{"kind"}),
	}
	cfg.Registerer.MustRegister(j.metrics.depth, j.metrics.dropped, j.metrics.sent)
	cfg.Registerer.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "node_yurthub_journal_bytes", Help: "Size of the writes that wait for the cloud.",
		}, func() float64 {
			s := j.Stats()
			return float64(s.StatusBytes + s.EventBytes)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "node_yurthub_journal_oldest_seconds", Help: "Age of the oldest write that waits for the cloud.",
		}, func() float64 { return j.age(j.Stats().Oldest).Seconds() }),
	)
	err := load(cfg, statusBucket, func(e *statusEntry) {
		if e.At.IsZero() {
			e.At = cfg.Clock.Now() // an older hub did not say
		}
		j.status[e.target()] = e
		j.sequence = max(j.sequence, e.Sequence)
	})
	if err != nil {
		return nil, err
	}
	err = load(cfg, eventBucket, func(e *eventEntry) {
		if e.At.IsZero() {
			e.At = cfg.Clock.Now()
		}
		j.events[e.key()] = e
		j.eventBytes += len(e.Object)
		j.sequence = max(j.sequence, e.Sequence)
	})
	if err != nil {
		return nil, err
	}
	j.measure()
	return j, nil
}

// load reads a bucket. An entry that is damaged is lost, and said so: it is
// the one write that this journal cannot keep its promise for.
func load[E any](cfg Config, bucket string, add func(*E)) error {
	snap, err := cfg.Store.Snapshot()
	if err != nil {
		return fmt.Errorf("load journal: %w", err)
	}
	defer snap.Close()
	var keys []string
	err = snap.Scan(bucket, "", func(key string, _ store.Header) error {
		keys = append(keys, key)
		return nil
	})
	damaged := errors.Is(err, store.ErrDamaged)
	if err != nil && !damaged {
		return fmt.Errorf("load journal: %w", err)
	}
	whole := store.NewBatch()
	whole.Drop(bucket)
	for _, key := range keys {
		record, err := snap.Get(bucket, key)
		e := new(E)
		if err == nil {
			err = json.Unmarshal(record.Data, e)
		}
		if err != nil {
			cfg.Log.Error("journal entry lost", "object", key, "err", err)
			continue
		}
		add(e)
		whole.Put(bucket, key, record)
	}
	if damaged {
		cfg.Log.Error("journal entries may be lost", "bucket", bucket, "left", len(keys))
		if err := cfg.Store.Submit(context.Background(), whole, nil); err != nil {
			return fmt.Errorf("write journal: %w", err)
		}
	}
	return nil
}

func (j *Journal) measure() {
	s := j.Stats()
	j.metrics.depth.WithLabelValues("status").Set(float64(s.Status))
	j.metrics.depth.WithLabelValues("event").Set(float64(s.Events))
}

// Stats are the writes that wait for the cloud, and what became of others.
type Stats struct {
	Status, StatusBytes int
	Events, EventBytes  int
	Oldest              time.Time // when the first of them was made
	// Displaced are the events that made place for newer ones since last no
	// event waited.
	Displaced          int
	Delivered, Dropped int // since Open
}

// age returns how long ago a write was made.
func (j *Journal) age(made time.Time) time.Duration {
	if made.IsZero() {
		return 0
	}
	return max(0, j.cfg.Clock.Since(made))
}

func (s *Stats) made(at time.Time) {
	if s.Oldest.IsZero() || at.Before(s.Oldest) {
		s.Oldest = at
	}
}

// Stats tells how much waits for the cloud.
func (j *Journal) Stats() Stats {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := Stats{Events: len(j.events), EventBytes: j.eventBytes, Delivered: j.delivered, Dropped: j.dropped, Displaced: j.displaced}
	for _, e := range j.status {
		if !e.delivered() {
			s.Status++
			s.StatusBytes += e.size()
			s.made(e.At)
		}
	}
	for _, e := range j.events {
		s.made(e.At)
	}
	return s
}

// drop counts a write that is given up, and sent one that the cloud took.
func (j *Journal) drop(kind, reason string) {
	j.metrics.dropped.WithLabelValues(kind, reason).Inc()
	j.mu.Lock()
	j.dropped++
	if reason == displaced {
		j.displaced++
	}
	j.mu.Unlock()
}

func (j *Journal) sent(kind string) {
	j.metrics.sent.WithLabelValues(kind).Inc()
	j.mu.Lock()
	j.delivered++
	j.mu.Unlock()
}

func (j *Journal) notify() {
	j.measure()
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// put makes an entry durable.
func (j *Journal) put(ctx context.Context, bucket, key string, e any) error {
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode journal entry %s: %w", key, err)
	}
	batch := store.NewBatch()
	batch.Put(bucket, key, store.Record{Encoding: uint8(wire.JSON), Data: text})
	if err := j.commit(ctx, batch); err != nil {
		return fmt.Errorf("write journal entry %s: %w", key, err)
	}
	delete(j.lingering, stored{bucket, key})
	return nil
}

// commit makes entries durable. A store in memory would take them and keep
// them through nothing.
func (j *Journal) commit(ctx context.Context, batch *store.Batch) error {
	if err := j.cfg.Store.Durable(); err != nil {
		return err
	}
	return j.cfg.Store.Commit(ctx, batch)
}

func (j *Journal) remove(ctx context.Context, bucket string, keys ...string) error {
	batch := store.NewBatch()
	for _, key := range keys {
		batch.Delete(bucket, key)
	}
	if err := j.cfg.Store.Commit(ctx, batch); err != nil {
		return fmt.Errorf("remove journal entries: %w", err)
	}
	return nil
}

// Show lets local readers see what was kept before a restart.
func (j *Journal) Show() {
	j.mu.Lock()
	var shown []target
	for t := range j.status {
		shown = append(shown, t)
	}
	j.mu.Unlock()
	for _, t := range shown {
		j.refresh(t)
	}
}

func (j *Journal) refresh(t target) {
	if err := j.cfg.Refresh(t.resource, t.namespace, t.name); err != nil {
		j.cfg.Log.Warn("overlay not refreshed", "object", t.String(), "err", err)
	}
}

// Run delivers whenever the link is up, until ctx ends.
func (j *Journal) Run(ctx context.Context) error {
	var events time.Time // when they may go; zero: now
	for {
		begun := time.Now()
		if j.cfg.WaitUp(ctx) != nil {
			return nil //nolint:nilerr // ctx has ended
		}
		if events.IsZero() && j.cfg.Spread > 0 && time.Since(begun) > returned {
			events = time.Now().Add(rand.N(j.cfg.Spread))
		}
		if !time.Now().Before(events) {
			events = time.Time{} // so a link that comes and goes puts them off once
		}
		var again, due <-chan time.Time // nil: there is nothing left
		switch err := j.deliver(ctx, events.IsZero()); {
		case err == nil && !events.IsZero():
			due = time.After(time.Until(events))
		case err != nil && ctx.Err() == nil:
			j.cfg.Log.Info("journal waits", "err", err)
			again = time.After(retryEvery)
		}
		tidy := j.forgetLate()
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return nil
			case <-tidy:
				tidy = j.forgetLate()
			case <-again:
				waiting = false
			case <-due:
				waiting = false
			case <-j.wake:
				// After a failure it waits with the rest.
				waiting = again != nil
			}
		}
	}
}

// deliver sends everything, status first, each kind in the order in which it
// was acknowledged, or without the events. One that the cloud cannot take just
// now does not hold up the others; a cloud that takes nothing does.
func (j *Journal) deliver(ctx context.Context, withEvents bool) error {
	defer j.measure()
	j.mu.Lock()
	var status []*statusEntry
	for _, e := range j.status {
		if !e.delivered() {
			status = append(status, e)
		}
	}
	var events []*eventEntry
	if withEvents {
		events = slices.Collect(maps.Values(j.events))
	}
	j.mu.Unlock()
	slices.SortFunc(status, func(a, b *statusEntry) int { return cmp.Compare(a.Sequence, b.Sequence) })
	slices.SortFunc(events, func(a, b *eventEntry) int { return cmp.Compare(a.Sequence, b.Sequence) })
	var failed []error
	goOn := func(err error) bool {
		if err != nil {
			failed = append(failed[:min(len(failed), 4)], err) // enough to say
		}
		_, answered := errors.AsType[notYetError](err)
		return err == nil || answered
	}
	for _, e := range status {
		if !goOn(j.deliverStatus(ctx, e)) {
			return errors.Join(failed...)
		}
	}
	for _, e := range events {
		if !goOn(j.deliverEvent(ctx, e)) {
			break
		}
	}
	return errors.Join(append(failed, j.strikeLingering(ctx))...)
}

// notYetError is the cloud's refusal of one write that it may take later.
type notYetError struct{ error }

// refusal is the error of a write that was not taken and is not dropped. The
// next one is only tried when it is the API server that refused this one.
func refusal(what string, code int, body []byte) error {
	// Only the reason: the message may quote what was sent, and errors are
	// logged.
	var status metav1.Status
	_ = json.Unmarshal(body, &status) // else there is no reason to tell
	err := fmt.Errorf("deliver %s: the cloud answered %d %s", what, code, status.Reason)
	if !isKind(body, "Status") || code == http.StatusTooManyRequests || code == http.StatusServiceUnavailable || code == http.StatusUnauthorized {
		return err
	}
	return notYetError{err}
}

// send makes one request and returns the answer's code and body.
func (j *Journal) send(ctx context.Context, method, path, contentType string, body []byte) (int, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, deliverBudget)
	defer cancel()
	target := url.URL{Scheme: "https", Host: "upstream", Path: path}
	req, err := http.NewRequestWithContext(ctx, method, target.String(), bytes.NewReader(body))
	if err != nil {
		return 0, nil, fmt.Errorf("deliver %s %s: %w", method, path, err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "yurthub")
	resp, err := j.cfg.Cloud.RoundTrip(req)
	if err != nil {
		return 0, nil, fmt.Errorf("deliver %s %s: %w", method, path, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return 0, nil, fmt.Errorf("deliver %s %s: %w", method, path, err)
	}
	return resp.StatusCode, text, nil
}

// final reports whether the cloud's refusal of what was sent will not change
// by asking again.
func (j *Journal) final(what string, code int, body []byte) bool {
	if code < 400 || code >= 500 || !isKind(body, "Status") {
		return false // something on the way may answer anything
	}
	switch code {
	case http.StatusUnauthorized, http.StatusTooManyRequests, http.StatusRequestTimeout, http.StatusConflict:
		return false
	case http.StatusForbidden:
		since, ok := j.denied[what]
		if !ok {
			since = time.Now()
			j.denied[what] = since
		}
		return time.Since(since) >= deniedAfter
	}
	return true
}

// older reports whether a write was made longer than limit ago, as far as that
// is known: an older hub went by a clock that may have begun at 1970.
func (j *Journal) older(at time.Time, limit time.Duration) bool {
	return at.Year() >= 2000 && j.cfg.Clock.Since(at) > limit
}

// isKind tells an API server's answer from that of something on the way.
func isKind(body []byte, want string) bool {
	_, kind, _, err := wire.ReadObject(wire.JSON, body)
	return err == nil && kind == want
}
