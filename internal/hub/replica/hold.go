package replica

import (
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
// The set itself is current at once, in memory and on disk, and so are lists.
// It is each watcher that stands still before a change that is held, as a slow
// one would, and is told of it, and of all that came after, when it is let go.
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
