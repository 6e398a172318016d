// Package replica keeps the slice of the cluster that a node is entitled to,
// and answers lists, watches and gets from it with the API's own semantics.
//
// One upstream stream per scope keeps the slice current; when the link is
// down the streams stand still and nothing else changes. Objects live in the
// store as the bytes that came; the heap holds keys, versions and bounded
// watch windows. Resource versions are the cluster's own.
//
// The package does not decide who may read: its caller authorises first.
package replica

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/clock"
	"github.com/yurt-edge/yurt/internal/hub/store"
)

const (
	// flushEvery groups the changes of all sets into one transaction. A
	// power cut loses no more than this much of the replica, and the
	// streams then replay it.
	flushEvery = time.Second
	// maxFlush is the size at which a flush goes on in another transaction.
	maxFlush = 1 << 20
	// touchEvery is how long progress without changes may stay unwritten:
	// an idle node should not wear its flash.
	touchEvery = 10 * time.Minute

	// A stream that nobody used for pauseAfter stops; its data is dropped
	// after dropAfter. Both count only while the link is up: an outage
	// never makes data go away.
	pauseAfter = 10 * time.Minute
	dropAfter  = 24 * time.Hour
	idleEvery  = time.Minute

	// keptUnused is how many scopes that others than the node opened stay for
	// dropAfter; those unused for longest go first.
	keptUnused = 64

	defaultMaxScopes = 1024
	// ownScopes bounds the scopes that one caller has opened, and half of
	// all that others than the node have.
	ownScopes = 64
	// unusedAfter is how long a scope must be out of use to make place.
	unusedAfter = time.Minute
)

// Config is what a replica needs.
type Config struct {
	Store      *store.Store
	Upstream   Upstream
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// MaxScopes bounds the scopes held at a time; 0 means 1024. Requests
	// beyond it are the cloud's to answer.
	MaxScopes int
	// Clock tells when the cloud was last in contact; the machine's if nil.
	Clock *clock.Clock
	// Router chooses where scopes come from; nil: all from Upstream.
	Router Router
	// Online reports the link's state.
	Online func() bool
	// Overlay tells what local readers see in place of the cloud's objects.
	// It may be nil.
	Overlay OverlayFunc
	// Filter tells how readers of a name see the replica; nil for a name that
	// nothing is known of. It must not block or call the replica.
	Filter func(name string) Filter
	// Hold delays the changes of an absence.
	Hold Hold
}

// Replica is a set of scopes. Use New, then Run.
type Replica struct {
	cfg     Config
	metrics *metrics
	start   chan *stream // streams to be run, taken by Run
	lists   *rate.Limiter

	mu      sync.Mutex // guards the following
	streams map[Scope]*stream

	windows atomic.Int64 // bytes of all watch windows
	marks   *marks
}

// New loads the scopes that the store holds. They can be read at once; Run
// brings them up to date.
func New(cfg Config) (*Replica, error) {
	if cfg.MaxScopes == 0 {
		cfg.MaxScopes = defaultMaxScopes
	}
	r := &Replica{
		cfg: cfg, metrics: newMetrics(cfg.Registerer),
		start: make(chan *stream, cfg.MaxScopes), streams: map[Scope]*stream{},
		lists: rate.NewLimiter(listsPerSecond, listBurst),
	}
	var err error
	if r.marks, err = readMarks(cfg.Store, cfg.Log); err != nil {
		return nil, err
	}
	positions, err := r.positions()
	if err != nil {
		return nil, err
	}
	for _, p := range positions {
		s := r.newSet(p.Scope)
		if err := s.load(p); err != nil {
			return nil, err
		}
		st := newStream(s, &r.cfg, r.lists, r.metrics)
		if !p.Borrowed {
			st.offer(Credential{})
		}
		r.streams[p.Scope] = st
		if len(r.start) < cap(r.start) {
			r.start <- st
		}
	}
	r.metrics.scopes.Set(float64(len(r.streams)))
	return r, nil
}

// positions reads the scopes that the store holds. The objects of one whose
// position is damaged are of no use; a caller that asks again has it fetched
// anew.
func (r *Replica) positions() ([]position, error) {
	snap, err := r.cfg.Store.Snapshot()
	if err != nil {
		return nil, fmt.Errorf("read scopes: %w", err)
	}
	defer snap.Close()
	var ids []string
	err = snap.Scan(scopesBucket, "", func(key string, _ store.Header) error {
		ids = append(ids, key)
		return nil
	})
	damaged := errors.Is(err, store.ErrDamaged)
	if err != nil && !damaged {
		return nil, fmt.Errorf("read scopes: %w", err)
	}
	whole := store.NewBatch()
	whole.Drop(scopesBucket)
	var out []position
	for _, id := range ids {
		record, err := snap.Get(scopesBucket, id)
		var p position
		if err == nil {
			err = json.Unmarshal(record.Data, &p)
		}
		if err == nil && p.Scope.ID() != id {
			err = fmt.Errorf("the record is of %s", p.Scope.ID())
		}
		if err != nil {
			r.cfg.Log.Warn("scope dropped", "scope", id, "err", err)
			continue
		}
		out = append(out, p)
		whole.Put(scopesBucket, id, record)
	}
	if damaged {
		r.cfg.Log.Warn("scopes may be lost", "left", len(out))
		if err := r.cfg.Store.Submit(context.Background(), whole, nil); err != nil {
			return nil, fmt.Errorf("write scopes: %w", err)
		}
	}
	return out, nil
}

// Run follows the upstream for every scope until ctx ends, writes what is
// left to the store and returns nil.
func (r *Replica) Run(ctx context.Context) error {
	var running sync.WaitGroup
	flush := time.NewTicker(flushEvery)
	defer flush.Stop()
	idle := time.NewTicker(idleEvery)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			running.Wait()
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			r.flush(last, true)
			r.marks.write(last, toldLast)
			return nil
		case st := <-r.start:
			running.Go(func() { st.supervise(ctx) })
		case <-flush.C:
			r.flush(ctx, false)
			if r.marks.due() {
				r.marks.write(ctx, toldAhead)
			}
		case <-idle.C:
			r.retire(ctx)
		}
	}
}

func (r *Replica) all() []*stream {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]*stream, 0, len(r.streams))
	for _, st := range r.streams {
		out = append(out, st)
	}
	return out
}

// flush writes every set that changed, in one transaction: it costs some pages
// whatever is in it. When the mere progress of one set is due, that of all is
// written with it.
func (r *Replica) flush(ctx context.Context, everything bool) {
	all := r.all()
	everything = everything || slices.ContainsFunc(all, func(st *stream) bool { return st.set.stale() })
	var (
		batch   = store.NewBatch()
		pending []func(error) error
	)
	commit := func() {
		if len(pending) == 0 {
			return
		}
		err := r.cfg.Store.Commit(ctx, batch)
		for _, written := range pending {
			_ = written(err) // it is the same for all
		}
		if err != nil {
			r.metrics.storeErrors.Inc()
			r.cfg.Log.Error("store write failed", "err", err)
		}
		batch, pending = store.NewBatch(), nil
	}
	for _, st := range all {
		if !st.set.due(everything) {
			continue
		}
		pending = append(pending, st.set.collect(batch))
		if batch.Size() > maxFlush {
			commit()
		}
	}
	commit()
}

// retire pauses streams that nobody uses and drops what was not used for
// long.
func (r *Replica) retire(ctx context.Context) {
	if !r.cfg.Online() {
		r.postpone()
		return
	}
	r.mu.Lock()
	// With little room left, what nobody uses makes place for what somebody
	// will ask for.
	dropAfter := dropAfter
	if len(r.streams) > r.cfg.MaxScopes*3/4 {
		dropAfter = pauseAfter
	}
	var drop []*stream
	var unused []*stream // opened by others than the node
	for scope, st := range r.streams {
		idle := st.set.idle()
		st.set.dropUnusedLenses()
		if st.pinned || idle < pauseAfter {
			continue
		}
		st.pause()
		switch {
		case idle >= dropAfter || !st.set.isSynced():
			delete(r.streams, scope)
			drop = append(drop, st)
		case st.owner != "":
			unused = append(unused, st)
		}
	}
	// Callers come with ever new selectors, and pods with new names.
	slices.SortFunc(unused, func(a, b *stream) int { return cmp.Compare(a.set.idle(), b.set.idle()) })
	for _, st := range unused[min(keptUnused, len(unused)):] {
		delete(r.streams, st.set.scope)
		drop = append(drop, st)
	}
	r.metrics.scopes.Set(float64(len(r.streams)))
	r.mu.Unlock()
	for _, st := range drop {
		r.drop(ctx, st)
	}
}

// drop ends a stream that is off the list, and takes its data out of the
// store.
func (r *Replica) drop(ctx context.Context, st *stream) {
	st.stop()
	if err := st.set.retire(ctx); err != nil {
		r.metrics.storeErrors.Inc()
		r.cfg.Log.Error("store write failed", "scope", st.set.id, "err", err)
	}
}

// postpone keeps an outage from counting as idleness.
func (r *Replica) postpone() {
	for _, st := range r.all() {
		st.set.mu.Lock()
		st.set.used = st.set.used.Add(idleEvery)
		st.set.mu.Unlock()
	}
}

// idle is the time since a caller last used the set.
func (s *set) idle() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watchers > 0 {
		return 0
	}
	return time.Since(s.used)
}

// Pin holds a scope for good, by the hub's own credential.
func (r *Replica) Pin(scope Scope) error {
	st, err := r.stream(scope, "")
	if err != nil {
		return err
	}
	r.mu.Lock()
	st.pinned = true
	r.mu.Unlock()
	st.touch()
	st.offer(Credential{})
	return nil
}

// ErrFull means that the replica holds as many scopes as it may.
var ErrFull = errors.New("the replica holds as many scopes as it may")

func (r *Replica) newSet(scope Scope) *set {
	s := newSet(r.cfg.Store, scope, r.cfg.Overlay, r.cfg.Clock)
	s.window.total, s.filters, s.marks = &r.windows, r.cfg.Filter, r.marks
	if r.cfg.Hold.Ask != nil && scope == r.cfg.Hold.Scope {
		s.hold = &r.cfg.Hold
	}
	return s
}

// stream returns the scope's stream, a new one if need be. A caller's scope
// may take the place of one that nobody uses: of its own when it has as many
// as it may, else of any caller's.
func (r *Replica) stream(scope Scope, owner string) (*stream, error) {
	r.mu.Lock()
	if st, ok := r.streams[scope]; ok {
		r.mu.Unlock()
		return st, nil
	}
	victim, err := r.makePlaceLocked(owner)
	if err == nil && len(r.start) == cap(r.start) {
		err = ErrFull
	}
	if err != nil {
		r.mu.Unlock()
		return nil, err
	}
	if victim != nil {
		delete(r.streams, victim.set.scope)
	}
	st := newStream(r.newSet(scope), &r.cfg, r.lists, r.metrics)
	st.owner = owner
	r.streams[scope] = st
	r.start <- st
	r.metrics.scopes.Set(float64(len(r.streams)))
	r.mu.Unlock()
	if victim != nil {
		ctx, cancel := context.WithTimeout(context.Background(), retireBudget)
		defer cancel()
		r.drop(ctx, victim)
	}
	return st, nil
}

// retireBudget bounds the wait for the disk when a scope makes place.
const retireBudget = 5 * time.Second

// makePlaceLocked returns the stream that makes place for one more of the
// owner; nil: there is place.
func (r *Replica) makePlaceLocked(owner string) (*stream, error) {
	var own, owned int
	for _, st := range r.streams {
		if st.owner != "" {
			owned++
			if st.owner == owner {
				own++
			}
		}
	}
	var may func(*stream) bool
	switch {
	case owner != "" && own >= min(ownScopes, r.cfg.MaxScopes/2):
		may = func(st *stream) bool { return st.owner == owner }
	case owner != "" && owned >= r.cfg.MaxScopes/2:
		may = func(st *stream) bool { return st.owner != "" }
	case len(r.streams) >= r.cfg.MaxScopes:
		may = func(st *stream) bool { return st.owner != "" || owner == "" }
	default:
		return nil, nil
	}
	var (
		victim *stream
		most   = unusedAfter
	)
	for _, st := range r.streams {
		if idle := st.set.idle(); !st.pinned && may(st) && idle > most {
			victim, most = st, idle
		}
	}
	if victim == nil {
		return nil, ErrFull
	}
	return victim, nil
}

// Open returns the scope for a caller that may read it, and starts to follow
// it with the credential if nobody did. It waits until the scope is synced
// or ctx ends. The owner answers for the scope's place; "" is the node, whose
// scopes nobody else's can crowd out.
func (r *Replica) Open(ctx context.Context, scope Scope, c Credential, owner string) (*Slice, error) {
	if held, ok := r.Held(scope); ok {
		held.Touch()
		return held, nil
	}
	st, err := r.streamFor(scope, owner) //nolint:contextcheck // what makes place goes even when ctx ends
	if err != nil {
		return nil, err
	}
	if st.set.scope == scope {
		st.offer(c)
	}
	st.touch()
	for again := true; again; {
		// Who joins an attempt on its way to fail may have brought what
		// the next one needs.
		var try *attempt
		try, again = st.hurry()
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("sync %s: %w", scope.ID(), context.Cause(ctx))
		case <-try.done:
		}
		if err = try.err; err == nil {
			m, _ := newMatcher(st.set.scope, scope)
			return &Slice{stream: st, scope: scope, match: m}, nil
		}
	}
	return nil, fmt.Errorf("sync %s: %w", scope.ID(), err)
}

// streamFor returns the stream of the scope; while a wider one that is there
// for good still syncs, that one, so that nothing is fetched twice.
func (r *Replica) streamFor(scope Scope, owner string) (*stream, error) {
	r.mu.Lock()
	for wide, st := range r.streams {
		if st.pinned && wide.covers(scope) {
			r.mu.Unlock()
			return st, nil
		}
	}
	r.mu.Unlock()
	return r.stream(scope, owner)
}

// Slice is what a held scope holds for one, possibly narrower, scope.
type Slice struct {
	stream *stream
	scope  Scope
	match  matcher
	base   bool   // see Base
	lens   *lens  // nil: the set as it is
	reader string // who sees the lens
}

// Base returns the slice for hubs of other nodes: nothing but what the cloud
// said, without overlays, and each state on the way one that the cloud had.
func (sl *Slice) Base() *Slice {
	out := *sl
	out.base = true
	return &out
}

// Held returns the slice if a synced scope covers it: the very scope, else the
// node's own before a borrowed one, else the freshest.
func (r *Replica) Held(scope Scope) (*Slice, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if st, ok := r.streams[scope]; ok && st.set.isSynced() {
		m, _ := newMatcher(scope, scope)
		return &Slice{stream: st, scope: scope, match: m}, true
	}
	var best *Slice
	for wide, st := range r.streams {
		if !wide.covers(scope) || !st.set.isSynced() {
			continue
		}
		if best == nil || st.set.better(best.stream.set) {
			m, _ := newMatcher(wide, scope)
			best = &Slice{stream: st, scope: scope, match: m}
		}
	}
	return best, best != nil
}

// better compares two sets that cover the same; see Object.better.
func (s *set) better(than *set) bool {
	if a, b := s.isBorrowed(), than.isBorrowed(); a != b {
		return b
	}
	return s.at() > than.at()
}

func (s *set) isSynced() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.synced
}

func (s *set) at() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.version
}

// Refresh must be called after the answer of Config.Overlay for an object
// changed. Watchers see the change as an ordinary event.
func (r *Replica) Refresh(resource schema.GroupVersionResource, namespace, name string) error {
	var errs []error
	for _, st := range r.all() {
		if st.set.scope.Resource == resource {
			errs = append(errs, st.set.refresh(keyOf(namespace, name)))
		}
	}
	return errors.Join(errs...)
}

// Version is the resource version up to which the slice is current.
func (sl *Slice) Version() uint64 { return sl.at() }

// Contact is when the cloud last proved the slice current.
func (sl *Slice) Contact() time.Time {
	s := sl.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.contact
}

// Len is how many objects there are, at most, in the slice.
func (sl *Slice) Len() int {
	s := sl.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index.Len()
}

// Current reports whether the slice follows the cloud. While the link is up a
// slice that does not is older than the cloud's own answer would be.
func (sl *Slice) Current() bool { return sl.stream.set.current() }

// Borrowed reports whether the slice came by a caller's right and not by the
// node's own.
func (sl *Slice) Borrowed() bool { return sl.stream.set.isBorrowed() }

func (s *set) isBorrowed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.borrowed
}

// Touch takes note that somebody wants the slice: its stream is resumed if it
// was paused.
func (sl *Slice) Touch() { sl.stream.touch() }

// Offer gives the slice's stream a credential that may read its scope.
func (sl *Slice) Offer(c Credential) { sl.stream.offer(c) }

// Contacts returns when the cloud last proved the synced scopes of a resource
// that the node reads by its own right, by id.
func (r *Replica) Contacts(resource schema.GroupVersionResource) map[string]time.Time {
	out := map[string]time.Time{}
	for _, st := range r.all() {
		s := st.set
		s.mu.Lock()
		if s.scope.Resource == resource && s.synced && !s.borrowed {
			out[s.id] = s.contact
		}
		s.mu.Unlock()
	}
	return out
}

// Status is one scope's state, for people.
type Status struct {
	Scope    string    `json:"scope"`
	Objects  int       `json:"objects"`
	Version  uint64    `json:"version"`
	Synced   bool      `json:"synced"`
	Stored   bool      `json:"stored"` // all of it would survive a power cut now
	Watchers int       `json:"watchers"`
	Contact  time.Time `json:"contact"`
	Damage   string    `json:"damage,omitempty"`
}

// Status lists the scopes, in the order of their names.
func (r *Replica) Status() []Status {
	var out []Status
	for _, st := range r.all() {
		s := st.set
		s.mu.Lock()
		status := Status{
			Scope: s.id, Objects: s.index.Len(), Version: s.version, Synced: s.synced,
			Stored: s.persisted != 0 && len(s.dirty) == 0, Watchers: s.watchers, Contact: s.contact,
		}
		if s.lost != nil {
			status.Damage = s.lost.Error()
		}
		s.mu.Unlock()
		out = append(out, status)
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.Scope, b.Scope) })
	return out
}
