package replica

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// Hold delays what local watchers of a scope learn of an absence: of what
// changed in the cloud while it could not be heard.
//
// The set itself is current at once, in memory and on disk. It is each watcher
// that stands still before a change that is held, as a slow one would, and is
// told of it, and of all that came after, when it is let go. A list shows what
// is, but that objects with such a change are as they were before it; who
// watches from there is told of each when it is let go, and waits for nothing
// else.
type Hold struct {
	Scope Scope
	// After is how long the cloud must have been away; 0: nothing is held.
	After time.Duration
	// Ask is given each change of an absence, in their order. Watchers wait
	// until the channel that it returns is closed; nil: they do not. It is
	// called under a lock: it must not block or call the replica.
	Ask func(Change) <-chan struct{}
}

// Change is a change of one object, as local readers see it.
type Change struct {
	Type   watch.EventType
	Prev   *wire.Meta // nil: not known, or there was nothing
	Meta   *wire.Meta
	Kind   Kind
	Object []byte // for DELETED the last state
}

// absentLocked reports whether the cloud was away for long, or the set has
// not seen yet all that happened meanwhile.
func (s *set) absentLocked() bool {
	if s.hold == nil || !s.synced {
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

// holdLocked asks whether watchers shall wait before an event.
func (s *set) holdLocked(e *event) {
	if s.hold == nil || e.local || s.version > s.absentTo {
		return
	}
	e.held = s.hold.Ask(Change{Type: e.typ, Prev: e.prev, Meta: e.meta, Kind: s.kind, Object: e.object})
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
	entry    *entry
	meta     *wire.Meta
	object   []byte
	seq      uint64          // of the change
	position uint64          // of the change
	held     <-chan struct{} // closed when the change may be seen
	seen     uint64          // where the set was when that was noticed; 0: it was not yet
}

// keepBackLocked keeps what a change that is held changes.
func (s *set) keepBackLocked(e *event, old []byte) {
	if e.held == nil || e.prev == nil || old == nil {
		return
	}
	if k, ok := s.kept[e.key]; ok && k.seen == 0 {
		return // that is what clients have
	}
	if s.kept == nil {
		s.kept = map[string]*kept{}
	}
	s.kept[e.key] = &kept{
		key: e.key, entry: newEntry(e.prev.Version, old), meta: e.prev, object: old, seq: e.seq, position: e.position, held: e.held,
	}
}

// owedLocked returns what clients at a version may know only as it was before a
// change that is held, or was when they listed; in the order of the changes. A
// lens has versions of its own, which do not tell: all of them may.
func (s *set) owedLocked(version uint64, all bool) []*kept {
	var out []*kept
	for key, k := range s.kept {
		if k.seen == 0 {
			select {
			case <-k.held:
				k.seen = s.version
			default:
			}
		}
		switch {
		case k.seen > 0 && k.seen < s.window.start:
			delete(s.kept, key) // who could need it must list
		case all, k.position <= version && (k.seen == 0 || version <= k.seen):
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
			if e, _, err = s.pass(s.kind, l.filter, k.entry, k.object, v.version); err != nil {
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
		e.left = s.leftLocked(k.key, k.meta, now, k.object)
		return []*event{e}
	}
	out := []*event{s.goneLocked(k.key, k.meta, k.object, version)}
	if now != nil {
		out = append(out, newEvent(watch.Added, k.key, now, nil, s.kind, object))
	}
	return out
}
