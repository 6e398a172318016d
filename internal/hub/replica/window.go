package replica

import (
	"sort"
	"sync"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// windowBytes bounds the object bytes that one set's window keeps. A watcher
// that falls further behind is cut off, as the API server does.
const windowBytes = 2 << 20

// event is one change of a set, as watchers see it.
type event struct {
	seq uint64
	// position is the set's resource version once the event is applied. It
	// never falls. It differs from the object's own version for overlays.
	position uint64
	typ      watch.EventType
	key      string
	meta     *wire.Meta // of object
	prev     *wire.Meta // of the state before; nil when there was none
	object   []byte     // object data; for DELETED the last state
	local    bool       // an overlay came or went: no version tells of it

	json func() ([]byte, error) // object as JSON, computed once
}

func newEvent(typ watch.EventType, key string, meta, prev *wire.Meta, kind Kind, object []byte) *event {
	e := &event{typ: typ, key: key, meta: meta, prev: prev, object: object}
	e.json = sync.OnceValues(func() ([]byte, error) {
		if kind.Encoding == wire.JSON {
			return object, nil
		}
		return wire.ToJSON(nil, kind.APIVersion, kind.Kind, object, true)
	})
	return e
}

// as returns the type of the event for a watcher that sees only what m
// matches. It is empty when the event does not concern that watcher.
func (e *event) as(m matcher) watch.EventType {
	if m.all() {
		return e.typ
	}
	now := e.typ != watch.Deleted && m.matches(e.meta)
	before := e.prev != nil && m.matches(e.prev)
	switch {
	case now && before:
		return watch.Modified
	case now:
		return watch.Added
	case before:
		return watch.Deleted
	}
	return ""
}

// window keeps the newest events of a set, within a bound of bytes.
type window struct {
	events []*event
	bytes  int
	next   uint64 // sequence number of the next event
	// start is the resource version after which the window is complete.
	start uint64
}

func (w *window) add(e *event, position uint64) {
	e.seq, e.position = w.next, position
	w.next++
	w.events = append(w.events, e)
	w.bytes += len(e.object)
	drop := 0
	for w.bytes > windowBytes && drop < len(w.events)-1 {
		w.bytes -= len(w.events[drop].object)
		w.start = w.events[drop].position
		drop++
	}
	if drop > 0 {
		// Copied down, so that dropped events can be collected.
		n := copy(w.events, w.events[drop:])
		clear(w.events[n:])
		w.events = w.events[:n]
	}
}

// since returns the sequence number of the first event after version. It
// reports false when the window no longer reaches back that far.
func (w *window) since(version uint64) (uint64, bool) {
	if version < w.start {
		return 0, false
	}
	i := sort.Search(len(w.events), func(i int) bool { return w.events[i].position > version })
	return w.next - uint64(len(w.events)-i), true
}

// from returns the events from seq on. It reports false when some of them
// are gone.
func (w *window) from(seq uint64) ([]*event, bool) {
	first := w.next - uint64(len(w.events))
	if seq < first {
		return nil, false
	}
	return w.events[seq-first:], true
}
