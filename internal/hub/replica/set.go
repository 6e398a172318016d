package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidwall/btree"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

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
	Used    time.Time `json:"used"`    // when a caller last asked for the set
	// Borrowed is set when the stream ran on a caller's token, which is not
	// stored: it resumes once that caller, or another that may read the
	// scope, asks again.
	Borrowed bool `json:"borrowed,omitempty"`
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

	mu      sync.Mutex // guards all below
	kind    Kind
	index   btree.Map[string, *entry]
	views   int    // open views; while there are any, overwritten bytes are kept
	version uint64 // resource version up to which the set is current
	synced  bool   // the set holds all of its scope
	window  window
	changed chan struct{} // closed and replaced whenever an event is added

	contact  time.Time // when the cloud last proved the set current
	used     time.Time // when a caller last asked
	flushed  time.Time // when the position was last written
	watchers int

	// bases holds the cloud's entry of every key whose index entry is an
	// overlay.
	bases map[string]*entry

	borrowed bool // see position

	dirty     map[string]struct{} // keys whose stored form is out of date
	persisted uint64              // version that the store holds
	drop      bool                // the stored objects are of no use
	touched   bool                // contact or used moved since the last flush

	// opaque is set once an object turned out to hold fields that this
	// build does not know: JSON is then the cloud's to give.
	opaque bool

	onLost  func()      // called, not under mu, when an object is lost
	overlay OverlayFunc // nil when there is no journal
	lost    error       // an object that could not be read back; cleared by a relist
}

func newSet(s *store.Store, scope Scope, overlay OverlayFunc) *set {
	return &set{
		scope: scope, id: scope.ID(), store: s, overlay: overlay,
		changed: make(chan struct{}), dirty: map[string]struct{}{}, bases: map[string]*entry{},
		used: time.Now(),
	}
}

// load fills the index from the store. The set is synced when the store held
// a position for it.
func (s *set) load(p position) error {
	snap, err := s.store.Snapshot()
	if err != nil {
		return fmt.Errorf("load %s: %w", s.id, err)
	}
	defer snap.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kind, s.version, s.persisted = p.Kind, p.Version, p.Version
	s.contact, s.used, s.borrowed = p.Contact, p.Used, p.Borrowed
	s.window.start = p.Version
	err = snap.Scan(s.id, "", func(key string, h store.Header) error {
		s.index.Set(key, &entry{version: h.Version, size: h.Size})
		return nil
	})
	if errors.Is(err, store.ErrDamaged) {
		// Keys may be missing: nothing of it can be trusted as a whole.
		s.index.Clear()
		s.drop, s.version, s.persisted, s.kind = true, 0, 0, Kind{}
		return nil
	}
	if err != nil {
		return fmt.Errorf("load %s: %w", s.id, err)
	}
	s.synced = p.Version != 0
	return nil
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
	if cur, ok := s.index.Get(key); ok && cur == e {
		// Version zero makes the relist take the object again.
		s.index.Set(key, &entry{})
	}
	first := s.lost == nil
	if first {
		s.lost = fmt.Errorf("object %s of %s is damaged: %w", key, s.id, err)
	}
	s.mu.Unlock()
	if first && s.onLost != nil {
		s.onLost()
	}
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
	s.contact = time.Now()
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
	base, held := s.bases[key]
	overlaid := held
	if !held {
		base, held = s.index.Get(key)
	}
	if held && meta.Version <= base.version {
		s.version = max(s.version, version)
		return
	}
	if !held && typ == watch.Deleted {
		s.version = max(s.version, version)
		s.dirty[key] = struct{}{}
		return
	}
	var prev *wire.Meta
	if held {
		prev = s.keepLocked(key, base)
	}
	s.dirty[key] = struct{}{}
	s.version = max(s.version, version)
	if overlaid {
		delete(s.bases, key)
	}
	if typ == watch.Deleted {
		s.index.Delete(key)
		s.publishLocked(newEvent(typ, key, meta, prev, s.kind, object))
		return
	}
	typ = watch.Modified
	if !held {
		typ = watch.Added
	}
	e := newEntry(meta.Version, object)
	s.index.Set(key, e)
	if shown, ok := s.overlayLocked(key, e, object); ok {
		object = shown
	}
	s.publishLocked(newEvent(typ, key, meta, prev, s.kind, object))
}

// overlayLocked puts what the journal has for the key over its base entry.
func (s *set) overlayLocked(key string, base *entry, object []byte) ([]byte, bool) {
	if s.overlay == nil {
		return nil, false
	}
	shown, ok := s.overlay(s.scope.Resource, key, s.kind, object)
	if !ok {
		return nil, false
	}
	s.bases[key] = base
	s.index.Set(key, newEntry(base.version, shown))
	return shown, true
}

// refresh shows the object as the journal now has it, or as the cloud has it
// when the journal has nothing any more.
func (s *set) refresh(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	base, overlaid := s.bases[key]
	if !overlaid {
		var ok bool
		if base, ok = s.index.Get(key); !ok {
			return nil
		}
	}
	object, err := s.readLocked(key, base)
	if err != nil {
		return err
	}
	shown, ok := s.overlayLocked(key, base, object)
	switch {
	case ok:
		object = shown
	case overlaid:
		delete(s.bases, key)
		s.index.Set(key, base)
	default:
		return nil
	}
	meta, err := wire.ReadMeta(s.kind.Encoding, object, isPods(s.scope.Resource))
	if err != nil {
		return fmt.Errorf("read overlay of %s in %s: %w", key, s.id, err)
	}
	e := newEvent(watch.Modified, key, &meta, &meta, s.kind, object)
	e.local = true
	s.publishLocked(e)
	return nil
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

// keepLocked is called before the entry is overwritten. It returns the
// metadata of what stood there and keeps the bytes for open views.
func (s *set) keepLocked(key string, e *entry) *wire.Meta {
	old, err := s.readLocked(key, e)
	if err != nil {
		// A damaged object that is being replaced: what stood there is
		// not known, so narrow watchers may miss that it left them. The
		// relist that follows any damage tells them.
		return &wire.Meta{}
	}
	if s.views > 0 {
		e.data.Store(&old)
	}
	meta, err := wire.ReadMeta(s.kind.Encoding, old, isPods(s.scope.Resource))
	if err != nil {
		return &wire.Meta{}
	}
	return &meta
}

func (s *set) publishLocked(e *event) {
	if !s.synced {
		return
	}
	s.window.add(e, s.version)
	s.broadcast()
}

// advance moves the set's version without a change: a bookmark.
func (s *set) advance(version uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version = max(s.version, version)
	s.contact = time.Now()
	s.touched = true
}

// flush writes what changed to the store and returns once it is durable.
// Objects and position go in one transaction.
func (s *set) flush(ctx context.Context) error {
	s.mu.Lock()
	if len(s.dirty) == 0 && !s.touched && s.version == s.persisted {
		s.mu.Unlock()
		return nil
	}
	batch := store.NewBatch()
	if s.drop {
		batch.Drop(s.id)
	}
	taken, version := s.dirty, s.version
	written := make(map[string]*entry, len(taken))
	s.dirty, s.touched = map[string]struct{}{}, false
	for key := range taken {
		e, ok := s.bases[key]
		if !ok {
			e, ok = s.index.Get(key)
		}
		if !ok {
			batch.Delete(s.id, key)
			continue
		}
		data := e.data.Load()
		if data == nil {
			continue // the store has this very version already
		}
		batch.Put(s.id, key, store.Record{Version: e.version, Encoding: uint8(s.kind.Encoding), Data: *data})
		written[key] = e
	}
	record := position{Scope: s.scope, Kind: s.kind, Contact: s.contact, Used: s.used, Borrowed: s.borrowed}
	if s.synced {
		record.Version = version
	}
	s.mu.Unlock()

	text, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("encode position of %s: %w", s.id, err)
	}
	batch.Put(scopesBucket, s.id, store.Record{Version: record.Version, Encoding: uint8(wire.JSON), Data: text})
	err = s.store.Commit(ctx, batch)

	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		for key := range taken {
			s.dirty[key] = struct{}{}
		}
		return fmt.Errorf("commit %s: %w", s.id, err)
	}
	s.persisted, s.flushed, s.drop = version, time.Now(), false
	for key, e := range written {
		cur, ok := s.bases[key]
		if !ok {
			cur, ok = s.index.Get(key)
		}
		if ok && cur == e {
			e.data.Store(nil)
		}
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
	contact time.Time
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
		version: s.version, seq: s.window.next, contact: s.contact,
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
		buf []byte
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
		if buf, err = v.set.read(buf[:0], key, e); err != nil {
			return false
		}
		if !m.all() && !m.byKey() {
			meta, metaErr := wire.ReadMeta(v.kind.Encoding, buf, isPods(v.set.scope.Resource))
			if metaErr != nil {
				err = fmt.Errorf("read metadata of %s: %w", key, metaErr)
				return false
			}
			if !m.matches(&meta) {
				return true
			}
		}
		err = fn(key, e, buf)
		return err == nil
	}
	v.index.Ascend(prefix, visit)
	return err
}

// matchesKey is matches for a matcher that is decided by the key alone.
func (m matcher) matchesKey(key string) bool {
	if len(m.fields) == 0 && m.namespace == "" {
		return true
	}
	namespace, name := SplitKey(key)
	return m.matches(&wire.Meta{Namespace: namespace, Name: name})
}

// get returns one object's data, or nil when the set does not hold it.
func (v *view) get(key string) ([]byte, error) {
	e, ok := v.index.Get(key)
	if !ok {
		return nil, nil
	}
	return v.set.read(nil, key, e)
}
