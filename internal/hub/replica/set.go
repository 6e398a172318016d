package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidwall/btree"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/clock"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// scopesBucket holds one record per scope: its stream's position.
const scopesBucket = "scopes"

// Kind is what the objects of a set are and how they are encoded.
type Kind struct {
	APIVersion string        `json:"apiVersion"`
	Kind       string        `json:"kind"`
	Encoding   wire.Encoding `json:"encoding"`
}

// position is the durable record of a scope's stream. Its resource version
// is committed in the same transaction as the objects it speaks of.
type position struct {
	Scope   Scope     `json:"scope"`
	Kind    Kind      `json:"kind"`
	Version uint64    `json:"version"`
	Contact time.Time `json:"contact"` // when the cloud last proved the set current
	// Objects is how many objects the store holds for the scope. Fewer mean
	// that one was damaged and set aside.
	Objects int `json:"objects"`
	// Borrowed is set when the stream ran on a caller's token, which is not
	// stored: it resumes once that caller, or another that may read the
	// scope, asks again.
	Borrowed bool `json:"borrowed,omitempty"`
	// AbsentTo is up to where changes are of an absence, if the set is not there
	// yet.
	AbsentTo uint64 `json:"absentTo,omitempty"`
}

// entry is one object of a set. It is immutable but for data: an overwrite
// puts a new entry into the index.
type entry struct {
	version uint64
	size    int
	// data holds the object's bytes while the store does not: until they
	// are committed, and again from the moment they are overwritten while
	// somebody still reads an older view. Nil: the store has them.
	data atomic.Pointer[[]byte]
	// through is set where a lens shows the object otherwise than the set does.
	// There is no data then.
	through *through
}

func newEntry(version uint64, data []byte) *entry {
	e := &entry{version: version, size: len(data)}
	e.data.Store(&data)
	return e
}

// OverlayFunc returns the object that local readers shall see in place of the
// cloud's, or false when they shall see the cloud's. It is called under a
// lock: it must not block or call the replica.
type OverlayFunc func(resource schema.GroupVersionResource, key string, kind Kind, base []byte) ([]byte, bool)

// set is one scope's objects and their recent history. The index and the
// window are on the heap; the objects are in the store.
type set struct {
	scope Scope
	id    string
	store *store.Store
	clock *clock.Clock

	flushing sync.Mutex // held over a flush; taken before mu

	mu      sync.Mutex // guards all below
	kind    Kind
	index   btree.Map[string, *entry]
	views   int    // open views; while there are any, overwritten bytes are kept
	version uint64 // resource version up to which the set is current
	synced  bool   // the set holds all of its scope
	retired bool   // the set was dropped: nothing is written any more
	window  window
	changed chan struct{} // closed and replaced whenever an event is added

	contact  time.Time        // when the cloud last proved the set current
	followed bool             // a watch of the upstream is open
	proof    func() time.Time // see Route.Contact
	live     func() bool      // see Route.Live
	used     time.Time        // when a caller last asked
	flushed  time.Time        // when the position was last written
	watchers int
	recalls  uint64 // grows when watchers shall come back with new credentials

	// bases holds the cloud's entry of every key whose index entry is an
	// overlay.
	bases map[string]*entry

	borrowed bool // see position

	dirty     map[string]struct{} // keys whose stored form is out of date
	persisted uint64              // version that the store holds; 0: it holds no whole set
	drop      bool                // the stored objects are of no use
	touched   bool                // contact or used moved since the last flush

	// opaque is set once an object turned out to hold fields that this
	// build does not know: JSON is then the cloud's to give.
	opaque bool

	hold     *Hold     // nil: nothing is held
	left     time.Time // when the last watch of the upstream ended
	absentTo uint64    // up to here the cloud changed while it was away
	// kept is what clients see in place of changes that are held, and dirtyKept
	// the keys whose stored form is out of date.
	kept      map[string]*kept
	dirtyKept map[string]struct{}

	onLost  func()      // called, not under mu, when an object is lost
	overlay OverlayFunc // nil when there is no journal
	lost    error       // an object that could not be read back; cleared by a relist

	filters func(name string) Filter // see Config.Filter
	lenses  map[string]*lens         // by the name of their readers
	marks   *marks                   // of the replica
}

func newSet(s *store.Store, scope Scope, overlay OverlayFunc, by *clock.Clock) *set {
	return &set{
		scope: scope, id: scope.ID(), store: s, overlay: overlay, clock: by,
		changed: make(chan struct{}), dirty: map[string]struct{}{}, dirtyKept: map[string]struct{}{}, bases: map[string]*entry{},
		used:   time.Now(),
		window: window{taken: map[*watcher]uint64{}},
		drop:   true, // the store may hold what an earlier life left behind
	}
}

// load fills the index from the store. The set is synced when the store held
// a position for it.
func (s *set) load(p position) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.borrowed = p.Borrowed
	if p.Version == 0 {
		return nil // its first list never ended
	}
	snap, err := s.store.Snapshot()
	if err != nil {
		return fmt.Errorf("load %s: %w", s.id, err)
	}
	defer snap.Close()
	err = snap.Scan(s.id, "", func(key string, h store.Header) error {
		s.index.Set(key, &entry{version: h.Version, size: h.Size})
		return nil
	})
	if errors.Is(err, store.ErrDamaged) {
		// Keys may be missing: nothing of it can be trusted as a whole.
		s.index.Clear()
		return nil
	}
	if err != nil {
		return fmt.Errorf("load %s: %w", s.id, err)
	}
	s.kind, s.contact, s.flushed = p.Kind, p.Contact, time.Now()
	s.synced, s.drop, s.persisted = true, false, p.Version
	s.moveLocked(p.Version)
	s.window.start = p.Version
	if missing := p.Objects - s.index.Len(); missing != 0 {
		s.lost = fmt.Errorf("%d objects of %s were damaged: %w", missing, s.id, store.ErrDamaged)
	}
	if s.hold != nil {
		if s.hold.After > 0 {
			s.absentTo = p.AbsentTo
		}
		s.loadKeptLocked(snap)
	}
	return nil
}

// currentGrace is how long a set counts as current after its last contact
// without an open watch: a list is followed by one, and a watch by the next.
const currentGrace = 5 * time.Second

// current reports whether the set follows the upstream, as far as it knows.
func (s *set) current() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.followed && (s.live == nil || s.live()) || s.clock.Since(s.contact) < currentGrace
}

func (s *set) unfollowed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.followed {
		s.followed, s.left = false, s.clock.Now()
	}
}

// read appends the bytes of an entry to dst.
func (s *set) read(dst []byte, key string, e *entry) ([]byte, error) {
	// The entry may be committed or overwritten between two looks; each
	// look that fails means that the other place has the bytes now.
	for range 4 {
		if p := e.data.Load(); p != nil {
			return append(dst, *p...), nil
		}
		snap, err := s.store.Snapshot()
		if err != nil {
			return dst, fmt.Errorf("read %s in %s: %w", key, s.id, err)
		}
		out, h, err := snap.AppendData(dst, s.id, key)
		snap.Close()
		if err == nil && h.Version == e.version {
			return out, nil
		}
		if err != nil && e.data.Load() == nil {
			s.lose(key, e, err)
			return dst, fmt.Errorf("read %s in %s: %w", key, s.id, err)
		}
	}
	err := fmt.Errorf("read %s in %s: the stored version is not the indexed one", key, s.id)
	s.lose(key, e, err)
	return dst, err
}

// lose takes note of an object that cannot be read back. The set then gives
// no lists until the object was fetched again: an answer with an object
// missing would be believed.
func (s *set) lose(key string, e *entry, err error) {
	s.mu.Lock()
	first := s.loseLocked(key, e, err)
	s.mu.Unlock()
	if first && s.onLost != nil {
		s.onLost()
	}
}

// loseLocked is lose, but for the call of onLost, which is due when it
// returns true.
func (s *set) loseLocked(key string, e *entry, err error) (first bool) {
	// Version zero makes the relist take the object again.
	if s.bases[key] == e {
		s.bases[key] = &entry{}
	} else if cur, ok := s.index.Get(key); ok && cur == e {
		s.index.Set(key, &entry{})
	}
	if s.lost != nil {
		return false
	}
	s.lost = fmt.Errorf("object %s of %s is damaged: %w", key, s.id, err)
	return true
}

// revoke empties the set: the node may not read it any more. Watchers are cut
// off.
func (s *set) revoke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.synced {
		s.clearLocked()
	}
}

// clearLocked empties the set, which is not synced then.
func (s *set) clearLocked() {
	s.index.Scan(func(key string, _ *entry) bool {
		s.dirty[key] = struct{}{}
		return true
	})
	// Open views share the nodes of the old tree.
	s.index = btree.Map[string, *entry]{}
	clear(s.bases)
	for key := range s.kept {
		s.dropKeptLocked(key)
	}
	s.dropLensesLocked(true)
	s.synced, s.lost, s.opaque, s.version, s.absentTo = false, nil, false, 0, 0
	s.window.reset()
	s.broadcast()
}

// recall ends all watches without loss: their clients come back with the
// credentials that they have by then.
func (s *set) recall() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recalls++
	s.broadcast()
}

// moveLocked makes version the set's own, unless it is there already.
func (s *set) moveLocked(version uint64) { s.version = max(s.version, version) }

func (s *set) broadcast() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// apply takes one change from the cloud. Changes that the set already holds
// are ignored, so a stream may resume from an older version.
func (s *set) apply(typ watch.EventType, object []byte) error {
	meta, err := wire.ReadMeta(s.encoding(), object, isPods(s.scope.Resource))
	if err != nil {
		return fmt.Errorf("read %s event of %s: %w", typ, s.id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.applyLocked(typ, &meta, object, meta.Version)
	s.provedLocked()
	return nil
}

func (s *set) encoding() wire.Encoding {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kind.Encoding
}

// applyLocked changes the index and, once the set is synced, tells watchers.
// version is the set's resource version after the change.
func (s *set) applyLocked(typ watch.EventType, meta *wire.Meta, object []byte, version uint64) {
	key := keyOf(meta.Namespace, meta.Name)
	base, held := s.baseLocked(key)
	if !held && typ == watch.Deleted {
		s.moveLocked(version)
		return
	}
	if held && meta.Version <= base.version {
		s.moveLocked(version)
		return
	}
	under, underOld := s.beneathLocked(key)
	if typ == watch.Deleted {
		prev, old, blind := s.keepLocked(key, base)
		s.forgetLocked(key)
		s.moveLocked(version)
		e := newEvent(typ, key, meta, prev, s.kind, object)
		e.blind = blind
		if under != nil {
			e.base = newEvent(typ, key, meta, under, s.kind, object)
		}
		s.publishLocked(e, old)
		return
	}
	var (
		prev  *wire.Meta
		old   []byte
		blind bool
	)
	if held {
		prev, old, blind = s.keepLocked(key, base)
		if prev != nil && prev.UID != meta.UID {
			// Deleted and made anew while nobody looked.
			s.moveLocked(version)
			s.publishGoneLocked(key, gone{prev, old, under, underOld}, meta.Version-1)
			held, prev, old, under, underOld = false, nil, nil, nil, nil
		}
	}
	s.dirty[key] = struct{}{}
	s.moveLocked(version)
	delete(s.bases, key)
	typ = watch.Modified
	if !held {
		typ = watch.Added
	}
	e := newEntry(meta.Version, object)
	s.index.Set(key, e)
	var cloud *event
	shown, shownMeta, overlaid := s.overlayLocked(key, e, object)
	if overlaid || under != nil {
		if under == nil {
			under, underOld = prev, old
		}
		cloud = newEvent(typ, key, meta, under, s.kind, object)
		cloud.blind = blind && under == nil
		cloud.left = s.leftLocked(key, under, meta, underOld)
	}
	if overlaid {
		object, meta = shown, shownMeta
	}
	ev := newEvent(typ, key, meta, prev, s.kind, object)
	ev.blind, ev.base = blind, cloud
	ev.left = s.leftLocked(key, prev, meta, old)
	s.publishLocked(ev, old)
}

// beneathLocked returns the cloud's last state of an object that an overlay
// stands before; nil: none does, or it cannot be read.
func (s *set) beneathLocked(key string) (*wire.Meta, []byte) {
	base, ok := s.bases[key]
	if !ok {
		return nil, nil
	}
	object, err := s.readLocked(key, base)
	if err != nil {
		return nil, nil
	}
	meta, err := wire.ReadMeta(s.kind.Encoding, object, isPods(s.scope.Resource))
	if err != nil {
		return nil, nil
	}
	return &meta, object
}

// leftLocked returns the event for watchers whose selection an object left by
// its change from prev to meta: nil when no selection tells them apart.
func (s *set) leftLocked(key string, prev, meta *wire.Meta, old []byte) *event {
	if prev == nil || maps.Equal(prev.Labels, meta.Labels) && prev.NodeName == meta.NodeName && prev.Phase == meta.Phase {
		return nil
	}
	return s.goneLocked(key, prev, old, meta.Version)
}

// baseLocked returns the cloud's entry of a key.
func (s *set) baseLocked(key string) (*entry, bool) {
	if e, ok := s.bases[key]; ok {
		return e, true
	}
	return s.index.Get(key)
}

// forgetLocked takes a key out of the set.
func (s *set) forgetLocked(key string) {
	delete(s.bases, key)
	s.index.Delete(key)
	s.dirty[key] = struct{}{}
}

// removeLocked deletes an object of which only the absence is known, at the
// set's version. The event carries the object's last state under another
// version, shown.
func (s *set) removeLocked(key string, version, shown uint64) {
	base, ok := s.baseLocked(key)
	if !ok {
		return
	}
	var last gone
	last.under, last.underOld = s.beneathLocked(key)
	last.prev, last.old, _ = s.keepLocked(key, base)
	s.forgetLocked(key)
	s.moveLocked(version)
	s.publishGoneLocked(key, last, shown)
}

// gone is the last state of an object that is no more: as local readers saw
// it, and as the cloud had it where that is something else.
type gone struct {
	prev     *wire.Meta
	old      []byte
	under    *wire.Meta
	underOld []byte
}

func (s *set) publishGoneLocked(key string, last gone, shown uint64) {
	e := s.goneLocked(key, last.prev, last.old, shown)
	if e == nil {
		for _, l := range s.lenses {
			l.putLocked(key, nil)
		}
		return
	}
	e.base = s.goneLocked(key, last.under, last.underOld, shown)
	s.publishLocked(e, last.old)
}

// goneLocked returns the DELETED event of what stood at key. Nil: it was
// damaged, and no list has shown it since.
func (s *set) goneLocked(key string, prev *wire.Meta, old []byte, shown uint64) *event {
	if prev == nil {
		return nil
	}
	object, err := wire.SetVersion(s.kind.Encoding, old, shown)
	if err != nil {
		object = old
	}
	e := newEvent(watch.Deleted, key, prev, prev, s.kind, object)
	e.version = shown
	return e
}

// overlayLocked puts what the journal has for the key over its base entry,
// and returns it.
func (s *set) overlayLocked(key string, base *entry, object []byte) ([]byte, *wire.Meta, bool) {
	if s.overlay == nil {
		return nil, nil, false
	}
	shown, ok := s.overlay(s.scope.Resource, key, s.kind, object)
	if !ok {
		return nil, nil, false
	}
	meta, err := wire.ReadMeta(s.kind.Encoding, shown, isPods(s.scope.Resource))
	if err != nil {
		return nil, nil, false // what cannot be read is not shown
	}
	s.bases[key] = base
	s.index.Set(key, newEntry(base.version, shown))
	return shown, &meta, true
}

// refresh shows the object as the journal now has it, or as the cloud has it
// when the journal has nothing any more.
func (s *set) refresh(key string) error {
	s.mu.Lock()
	lost, err := s.refreshLocked(key)
	s.mu.Unlock()
	if lost && s.onLost != nil {
		s.onLost()
	}
	return err
}

func (s *set) refreshLocked(key string) (lost bool, err error) {
	base, held := s.baseLocked(key)
	if !held {
		return false, nil
	}
	_, overlaid := s.bases[key]
	object, err := s.readLocked(key, base)
	if err != nil {
		return s.loseLocked(key, base, err), err
	}
	prev, old, blind := s.shownLocked(key)
	shown, meta, ok := s.overlayLocked(key, base, object)
	switch {
	case ok:
		object = shown
	case overlaid:
		delete(s.bases, key)
		s.index.Set(key, base)
		m, err := wire.ReadMeta(s.kind.Encoding, object, isPods(s.scope.Resource))
		if err != nil {
			return false, fmt.Errorf("read %s in %s: %w", key, s.id, err)
		}
		meta = &m
	default:
		return false, nil
	}
	e := newEvent(watch.Modified, key, meta, prev, s.kind, object)
	e.local, e.blind = true, blind
	e.left = s.leftLocked(key, prev, meta, old)
	s.publishLocked(e, old)
	return false, nil
}

// readLocked returns the bytes of an entry of the index or of bases.
func (s *set) readLocked(key string, e *entry) ([]byte, error) {
	if p := e.data.Load(); p != nil {
		return *p, nil
	}
	snap, err := s.store.Snapshot()
	if err != nil {
		return nil, fmt.Errorf("read %s in %s: %w", key, s.id, err)
	}
	defer snap.Close()
	out, h, err := snap.AppendData(nil, s.id, key)
	if err != nil {
		return nil, fmt.Errorf("read %s in %s: %w", key, s.id, err)
	}
	if h.Version != e.version {
		return nil, fmt.Errorf("read %s in %s: stored version %d, indexed %d", key, s.id, h.Version, e.version)
	}
	return out, nil
}

// keepLocked is called before the cloud's entry of a key is overwritten. It
// keeps the bytes for open views, and returns what [set.shownLocked] does.
func (s *set) keepLocked(key string, base *entry) (prev *wire.Meta, old []byte, blind bool) {
	if s.views > 0 {
		if data, err := s.readLocked(key, base); err == nil {
			base.data.Store(&data)
		}
	}
	return s.shownLocked(key)
}

// shownLocked returns what watchers saw last of an object that is held, and
// its metadata; or true when it cannot be read.
func (s *set) shownLocked(key string) (meta *wire.Meta, object []byte, blind bool) {
	e, ok := s.index.Get(key)
	if !ok {
		return nil, nil, true
	}
	object, err := s.readLocked(key, e)
	if err != nil {
		return nil, nil, true
	}
	m, err := wire.ReadMeta(s.kind.Encoding, object, isPods(s.scope.Resource))
	if err != nil {
		return nil, nil, true
	}
	return &m, object, false
}

// publishLocked tells watchers of an event; old is what they saw before.
func (s *set) publishLocked(e *event, old []byte) {
	if !s.synced {
		return
	}
	s.holdLocked(e, old)
	s.window.add(e, s.version)
	for _, l := range s.lenses {
		l.followLocked(s, e)
	}
	s.broadcast()
}

// advance moves the set's version without a change: a bookmark.
func (s *set) advance(version uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moveLocked(version)
	s.provedLocked()
	s.touched = true
}

// due reports whether the set has something to write: changes, or also mere
// progress.
func (s *set) due(progress bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired {
		return false
	}
	return len(s.dirty) > 0 || len(s.dirtyKept) > 0 || s.synced != (s.persisted != 0) || progress && s.movedLocked()
}

// stale reports whether the set's progress has been unwritten for too long.
func (s *set) stale() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.retired && s.movedLocked() && time.Since(s.flushed) > touchEvery
}

func (s *set) movedLocked() bool { return s.touched || s.version != s.persisted }

// flush writes what changed to the store and returns once it is durable.
// Objects and position go in one transaction.
func (s *set) flush(ctx context.Context) error {
	batch := store.NewBatch()
	written := s.collect(batch)
	return written(s.store.Commit(ctx, batch))
}

// collect adds what changed to a batch. The function that it returns must be
// called with the outcome of the batch, which it gives back.
func (s *set) collect(batch *store.Batch) (written func(error) error) {
	// Two flushes at a time could reach the store in the wrong order.
	s.flushing.Lock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired {
		s.flushing.Unlock()
		return func(err error) error { return err }
	}
	if s.drop {
		batch.Drop(s.id)
		if s.hold != nil {
			batch.Drop(heldBucket)
		}
	}
	takenKept, errKept := s.collectKeptLocked(batch)
	taken := s.dirty
	entries := make(map[string]*entry, len(taken))
	s.dirty = map[string]struct{}{}
	for key := range taken {
		e, ok := s.baseLocked(key)
		if !ok {
			batch.Delete(s.id, key)
			continue
		}
		data := e.data.Load()
		if data == nil {
			continue // the store has this very version already
		}
		batch.Put(s.id, key, store.Record{Version: e.version, Encoding: uint8(s.kind.Encoding), Data: *data})
		entries[key] = e
	}
	record := position{Scope: s.scope, Kind: s.kind, Contact: s.contact, Borrowed: s.borrowed, Objects: s.index.Len()}
	if s.synced {
		record.Version = s.version
		if s.absentTo > s.version {
			record.AbsentTo = s.absentTo
		}
	}
	s.touched = false
	text, err := json.Marshal(record)
	err = errors.Join(err, errKept)
	if err == nil {
		batch.Put(scopesBucket, s.id, store.Record{Version: record.Version, Encoding: uint8(wire.JSON), Data: text})
	}
	return func(outcome error) error {
		defer s.flushing.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		if outcome = errors.Join(err, outcome); outcome != nil {
			for key := range taken {
				s.dirty[key] = struct{}{}
			}
			for key := range takenKept {
				s.dirtyKept[key] = struct{}{}
			}
			s.touched = true
			return fmt.Errorf("commit %s: %w", s.id, outcome)
		}
		s.persisted, s.flushed, s.drop = record.Version, time.Now(), false
		for key, e := range entries {
			if cur, ok := s.baseLocked(key); ok && cur == e {
				e.data.Store(nil)
			}
		}
		return nil
	}
}

// retire empties the set and takes it out of the store. It stays empty.
func (s *set) retire(ctx context.Context) error {
	s.flushing.Lock()
	defer s.flushing.Unlock()
	s.mu.Lock()
	s.retired = true
	s.clearLocked()
	s.mu.Unlock()
	batch := store.NewBatch()
	batch.Drop(s.id)
	if s.hold != nil {
		batch.Drop(heldBucket)
	}
	batch.Delete(scopesBucket, s.id)
	if err := s.store.Commit(ctx, batch); err != nil {
		return fmt.Errorf("drop %s: %w", s.id, err)
	}
	return nil
}

// view is a set at one resource version. It stays what it is while the set
// moves on. Close it.
type view struct {
	set     *set
	index   *btree.Map[string, *entry]
	kind    Kind
	version uint64
	seq     uint64 // the first event that is not in the view
	recalls uint64 // of the set
	skips   uint64 // of the window
	contact time.Time
	bases   map[string]*entry // of the set: the cloud's entries beneath overlays
	cloud   bool              // shows those
	owed    []*kept           // what it shows as it was, see showKept
	lens    *lens             // nil: it shows the set as it is
}

// entry returns the entry that the view shows where the index has e.
func (v *view) entry(key string, e *entry) *entry {
	if base, ok := v.bases[key]; ok && v.cloud {
		return base
	}
	return e
}

var (
	errNotSynced = errors.New("not yet replicated")
	errOpaque    = errors.New("an object holds fields that this hub does not know")
)

func (s *set) view() (*view, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.synced {
		return nil, fmt.Errorf("%s: %w", s.id, errNotSynced)
	}
	if s.lost != nil {
		return nil, s.lost
	}
	s.views++
	return &view{
		set: s, index: s.index.Copy(), kind: s.kind,
		version: s.version, seq: s.window.next, recalls: s.recalls, skips: s.window.skips, contact: s.contact,
		bases: maps.Clone(s.bases),
	}, nil
}

func (v *view) Close() {
	v.set.mu.Lock()
	v.set.views--
	v.set.mu.Unlock()
}

// each calls fn for the objects that m matches, in the API server's order.
// The data is valid until fn returns.
func (v *view) each(m matcher, fn func(key string, e *entry, data []byte) error) error {
	var (
		buf buffers
		err error
	)
	prefix := ""
	if m.namespace != "" {
		prefix = m.namespace + "/"
	}
	visit := func(key string, e *entry) bool {
		if !strings.HasPrefix(key, prefix) {
			return false
		}
		if m.byKey() && !m.matchesKey(key) {
			return true
		}
		e = v.entry(key, e)
		data, readErr := v.set.readShown(&buf, v.kind, key, e)
		if err = readErr; err != nil {
			return false
		}
		if !m.all() && !m.byKey() {
			meta, metaErr := wire.ReadMeta(v.kind.Encoding, data, isPods(v.set.scope.Resource))
			if metaErr != nil {
				err = fmt.Errorf("read metadata of %s: %w", key, metaErr)
				return false
			}
			if !m.matches(&meta) {
				return true
			}
		}
		err = fn(key, e, data)
		return err == nil
	}
	v.index.Ascend(prefix, visit)
	return err
}
