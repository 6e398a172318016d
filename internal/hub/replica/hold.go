package replica

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// heldBucket keeps, by the keys of their objects, changes that are held, so
// that another life of the hub holds them too.
const heldBucket = "held"

// Hold delays what local watchers of a scope learn of an absence: of what
// changed in the cloud while it could not be heard.
//
// The set itself is current at once, in memory and on disk. It is each watcher
// that stands still before a change that is held, as a slow one would, and is
// told of it, and of all that came after, when it is let go. A list shows what
// is, but that objects with such a change are as they were before it; who
// watches from there is told of each when it is let go, and of nothing else
// about it until then.
type Hold struct {
	Scope Scope
	// After is how long the cloud must have been away; 0: nothing is held.
	After time.Duration
	// Ask is given each change of an absence, in their order. Clients wait until
	// the channel that it returns is closed; nil: they do not. It is called
	// under a lock: it must not block or call the replica.
	Ask func(Change) (note []byte, held <-chan struct{})
	// Again is Ask for a change that an earlier life of the hub held, with the
	// note that it made.
	Again func(note []byte, pass func(context.Context) error) (held <-chan struct{})
}

// Change is a change of one object, as local readers see it.
type Change struct {
	Type   watch.EventType
	Prev   *wire.Meta // nil: not known, or there was nothing
	Meta   *wire.Meta
	Kind   Kind
	Object []byte // for DELETED the last state
	// Pass is called before the channel of Ask is closed, and under no lock. It
	// returns once the disk knows: what a client was told of must not come back
	// by a restart.
	Pass func(context.Context) error
}

// absentLocked reports whether the cloud was away for long, or the set has
// not seen yet all that happened meanwhile.
func (s *set) absentLocked() bool {
	if s.hold == nil || s.hold.After == 0 || !s.synced {
		return false
	}
	heard := s.contact
	if s.left.After(heard) {
		heard = s.left
	}
	return s.version < s.absentTo || s.clock.Since(heard) >= s.hold.After
}

// returnedLocked makes all changes up to version those of an absence.
func (s *set) returnedLocked(version uint64) { s.absentTo = max(s.absentTo, version) }

// holdLocked asks whether clients shall wait before an event, which is about to
// be published, and keeps what they saw before it.
func (s *set) holdLocked(e *event, old []byte) {
	if s.hold == nil || e.local || s.version > s.absentTo {
		return
	}
	k := &kept{key: e.key, meta: e.prev, seq: s.window.next, position: s.version}
	k.note, k.held = s.hold.Ask(Change{
		Type: e.typ, Prev: e.prev, Meta: e.meta, Kind: s.kind, Object: e.object, Pass: s.passOf(k),
	})
	e.held = k.held
	if k.held == nil || e.prev == nil || old == nil {
		return
	}
	if before, ok := s.kept[e.key]; ok && before.seen == 0 {
		return // that is what clients have
	}
	k.entry = newEntry(e.prev.Version, old)
	if s.kept == nil {
		s.kept = map[string]*kept{}
	}
	s.kept[k.key] = k
	s.dirtyKept[k.key] = struct{}{}
}

// untilHeld cuts events before the first that is held.
func untilHeld(events []*event) ([]*event, <-chan struct{}) {
	for i, e := range events {
		if e.held == nil {
			continue
		}
		select {
		case <-e.held:
		default:
			return events[:i], e.held
		}
	}
	return events, nil
}

// unheldLocked leaves out what events from seq on, which are held, are to show.
func (s *set) unheldLocked(shown []*event, seq uint64) []*event {
	events, _ := s.window.from(seq)
	before, held := untilHeld(events)
	if held == nil {
		return shown
	}
	later := map[string]bool{}
	for _, e := range events[len(before):] {
		later[e.key] = true
	}
	return slices.DeleteFunc(shown, func(e *event) bool { return later[e.key] })
}

// returned finds out which changes a watch is about to bring that came about
// while the cloud was away. What happens from now on is none of them.
func (st *stream) returned(ctx context.Context, c Credential) error {
	s := st.set
	s.mu.Lock()
	absent := s.absentLocked()
	s.mu.Unlock()
	if !absent {
		return nil
	}
	query := s.scope.query()
	query.Set("limit", "1")
	page, _, err := st.page(ctx, c, query)
	if err != nil {
		return fmt.Errorf("ask where the cloud is: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.returnedLocked(page.Version)
	return nil
}

// kept is an object as it was before a change that is held.
type kept struct {
	key      string
	entry    *entry // with its data
	meta     *wire.Meta
	seq      uint64          // of the change
	position uint64          // of the change
	note     []byte          // of Ask
	held     <-chan struct{} // closed when the change may be seen
	seen     uint64          // where the set was when it could; 0: it may not yet
}

func (k *kept) object() []byte { return *k.entry.data.Load() }

// keptRecord is kept on disk. The object has the encoding of the set.
type keptRecord struct {
	Seq    uint64 `json:"seq"`
	Seen   uint64 `json:"seen,omitempty"`
	Note   []byte `json:"note"`
	Object []byte `json:"object"`
}

// dropKeptLocked forgets what was kept of a key.
func (s *set) dropKeptLocked(key string) {
	delete(s.kept, key)
	s.dirtyKept[key] = struct{}{}
}

// passOf returns [Change.Pass].
func (s *set) passOf(k *kept) func(context.Context) error {
	return func(ctx context.Context) error {
		s.mu.Lock()
		mine := s.kept[k.key] == k
		if mine {
			k.seen = max(1, s.version)
			s.dirtyKept[k.key] = struct{}{}
		}
		s.mu.Unlock()
		if !mine {
			return nil
		}
		return s.flush(ctx)
	}
}

// collectKeptLocked adds what is kept to a batch, where that changed, and returns
// what it took.
func (s *set) collectKeptLocked(batch *store.Batch) (taken map[string]struct{}, err error) {
	for key, k := range s.kept {
		if k.seen > 0 && k.seen < s.window.start {
			s.dropKeptLocked(key) // who could need it must list
		}
	}
	taken, s.dirtyKept = s.dirtyKept, map[string]struct{}{}
	for key := range taken {
		k, ok := s.kept[key]
		if !ok {
			batch.Delete(heldBucket, key)
			continue
		}
		text, marshalErr := json.Marshal(keptRecord{k.seq, k.seen, k.note, k.object()})
		err = errors.Join(err, marshalErr)
		batch.Put(heldBucket, key, store.Record{Version: k.entry.version, Encoding: uint8(wire.JSON), Data: text})
	}
	return taken, err
}

// loadKeptLocked goes on with what an earlier life kept. What cannot be read
// back has happened.
func (s *set) loadKeptLocked(snap *store.Snapshot) {
	var keys []string
	_ = snap.Scan(heldBucket, "", func(key string, _ store.Header) error {
		keys = append(keys, key)
		return nil
	})
	var all []*kept
	for _, key := range keys {
		k, err := s.readKept(snap, key)
		if err != nil || s.hold.After == 0 || k.seen > 0 && k.seen < s.version {
			s.dropKeptLocked(key)
			continue
		}
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b *kept) int { return cmp.Compare(a.seq, b.seq) })
	s.kept = make(map[string]*kept, len(all))
	for _, k := range all {
		s.kept[k.key], s.window.next = k, k.seq+1 // no event of this life has it
		if k.seen == 0 {
			k.held = s.hold.Again(k.note, s.passOf(k))
		}
		if k.held != nil {
			continue
		}
		if k.held = closed; k.seen == 0 {
			k.seen = max(1, s.version)
			s.dirtyKept[k.key] = struct{}{}
		}
	}
}

var closed = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func (s *set) readKept(snap *store.Snapshot, key string) (*kept, error) {
	record, err := snap.Get(heldBucket, key)
	if err != nil {
		return nil, fmt.Errorf("read what is held of %s: %w", key, err)
	}
	var r keptRecord
	if err := json.Unmarshal(record.Data, &r); err != nil {
		return nil, fmt.Errorf("read what is held of %s: %w", key, err)
	}
	meta, err := wire.ReadMeta(s.kind.Encoding, r.Object, isPods(s.scope.Resource))
	if err != nil {
		return nil, fmt.Errorf("read what is held of %s: %w", key, err)
	}
	return &kept{key: key, entry: newEntry(meta.Version, r.Object), meta: &meta, seq: r.Seq, note: r.Note, seen: r.Seen}, nil
}

// Holds reports whether the cloud would tell readers of the slice what the
// replica holds back from them, or may have to.
func (sl *Slice) Holds() bool {
	s := sl.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hold == nil || sl.base {
		return false
	}
	for _, k := range s.kept {
		if k.seen == 0 {
			return true
		}
	}
	return !s.followed && s.absentLocked()
}

// owedLocked returns what clients at a version may know only as it was before a
// change that is held, or was when they listed; in the order of the changes. A
// lens has versions of its own, which do not tell: all of them may.
func (s *set) owedLocked(version uint64, all bool) []*kept {
	var out []*kept
	for _, k := range s.kept {
		if all || k.position <= version && (k.seen == 0 || version <= k.seen) {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b *kept) int { return cmp.Compare(a.seq, b.seq) })
	return out
}

// showKept makes the view that of a local reader: what is held has not happened.
func (v *view) showKept() {
	s := v.set
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.owedLocked(v.version, v.lens != nil) {
		if k.seen > 0 {
			continue
		}
		e := k.entry
		if l := v.lens; l != nil {
			// Nobody was told of it under this version.
			l.moveLocked(s, l.toldLocked(s)+1)
			v.version = l.version
			var err error
			if e, _, err = s.pass(s.kind, l.filter, k.entry, k.object(), v.version); err != nil {
				e = nil
			}
		}
		if v.index.Delete(k.key); e != nil {
			v.index.Set(k.key, e)
		}
		v.owed = append(v.owed, k)
	}
}

// payLocked returns events that show what has become of objects of which the
// client, which is at a version, was owed the change, and a channel that is
// closed when there are more; nil: it is owed nothing.
func (w *watcher) payLocked(version uint64) (out []*event, more <-chan struct{}) {
	for len(w.owed) > 0 {
		k := w.owed[0]
		select {
		case <-k.held:
		default:
			return out, k.held
		}
		w.owed = w.owed[1:]
		w.mute[k.key] = w.slice.windowLocked().next
		s, l := w.slice.stream.set, w.slice.lens
		for _, e := range s.becameLocked(k, version) {
			if l != nil {
				e = l.seenLocked(s, e)
			}
			out = append(out, e)
		}
	}
	return out, nil
}

// unmuted leaves out what the client is owed.
func (w *watcher) unmuted(shown []*event) []*event {
	return slices.DeleteFunc(shown, func(e *event) bool { return w.mute[e.key] == math.MaxUint64 })
}

// becameLocked returns events that lead from what was kept to what is.
func (s *set) becameLocked(k *kept, version uint64) []*event {
	var (
		now    *wire.Meta
		object []byte
	)
	if _, ok := s.index.Get(k.key); ok {
		now, object, _ = s.shownLocked(k.key)
	}
	if now != nil && now.UID == k.meta.UID {
		e := newEvent(watch.Modified, k.key, now, k.meta, s.kind, object)
		e.left = s.leftLocked(k.key, k.meta, now, k.object())
		return []*event{e}
	}
	out := []*event{s.goneLocked(k.key, k.meta, k.object(), version)}
	if now != nil {
		out = append(out, newEvent(watch.Added, k.key, now, nil, s.kind, object))
	}
	return out
}
