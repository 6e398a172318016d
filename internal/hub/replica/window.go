package replica

import (
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	// windowBytes bounds what one set's window keeps. A watcher that falls
	// further behind is cut off, as the API server does.
	windowBytes = 2 << 20
	// windowMost bounds it while a watcher has yet to take what it holds: a
	// relist, or what the cloud sends after a cut, comes faster than clients
	// read.
	windowMost = 16 << 20
	// windowsTotal bounds all windows. Beyond it each keeps windowLeast, and
	// no more than windowBytes for watchers that are slow.
	windowsTotal = 64 << 20
	windowLeast  = 128 << 10
	// eventBytes is what an event takes beside its objects.
	eventBytes = 1 << 10
	// maxGaps bounds the relists that a window remembers.
	maxGaps = 8
)

// event is one change of a set, as watchers see it.
type event struct {
	seq     uint64
	version uint64 // of the object that is shown
	// position is the set's resource version once the event is applied. It
	// never falls. It differs from the object's own version for overlays.
	position uint64
	typ      watch.EventType
	key      string
	meta     *wire.Meta // of object
	prev     *wire.Meta // of the state before; nil when there was none
	blind    bool       // the state before could not be read
	object   []byte     // object data; for DELETED the last state
	local    bool       // an overlay came or went: no version tells of it

	// base is the event as it is without overlays, for peers; nil: the same.
	base *event

	// left is what a watcher gets whose selection the object left: DELETED
	// with the state before, under the new version. Nil when no selection
	// can tell the two states apart.
	left *event

	held <-chan struct{} // closed when local watchers may see it; nil: at once

	json func() ([]byte, error) // object as JSON, computed once
}

func newEvent(typ watch.EventType, key string, meta, prev *wire.Meta, kind Kind, object []byte) *event {
	e := &event{typ: typ, key: key, meta: meta, prev: prev, object: object}
	if meta != nil {
		e.version = meta.Version
	}
	e.json = sync.OnceValues(func() ([]byte, error) {
		if kind.Encoding == wire.JSON {
			return object, nil
		}
		return wire.ToJSON(nil, kind.APIVersion, kind.Kind, object, true)
	})
	return e
}

// size is about what the event takes on the heap.
func (e *event) size() int {
	n := eventBytes + len(e.object)
	if e.left != nil {
		n += len(e.left.object)
	}
	if e.base != nil {
		n += e.base.size()
	}
	return n
}

// as returns the type of the event for a watcher that sees only what m
// matches, and the event whose object it is shown. The type is empty when
// the event does not concern that watcher.
func (e *event) as(m matcher) (watch.EventType, *event) {
	if m.all() {
		return e.typ, e
	}
	now := e.typ != watch.Deleted && m.matches(e.meta)
	before := e.prev != nil && m.matches(e.prev)
	if e.blind {
		// A watcher may be told twice of what it has, or lacks, but not
		// left with what is gone.
		before = m.mayMatch(e.key)
	}
	switch {
	case now && before:
		return watch.Modified, e
	case now:
		return watch.Added, e
	case before && e.left != nil:
		return watch.Deleted, e.left
	case before:
		return watch.Deleted, e
	}
	return "", nil
}

// gap is a stretch of history of which only the outcome is known: a relist.
// A watcher that comes with a version inside it may hold objects that were
// made and deleted within it, and nothing in the window tells of those.
type gap struct {
	from, to uint64
	seq      uint64 // of the first event after it
}

// window keeps the newest events of a set, within a bound of bytes.
type window struct {
	events []*event
	bytes  int
	next   uint64 // sequence number of the next event
	// start is the resource version after which the window is complete.
	start uint64
	gaps  []gap
	skips uint64 // gaps there have been
	// lost is the newest version of a history that the cloud took back (it
	// was restored from a backup). What is above the set's own version and
	// not above lost is of that history.
	lost  uint64
	total *atomic.Int64 // bytes of all windows of the replica; nil: not counted
	// taken are the sequence numbers that watchers want next.
	taken map[*watcher]uint64
}

// slowest returns the sequence number before which every watcher has taken
// all events.
func (w *window) slowest() uint64 {
	least := w.next
	for _, seq := range w.taken {
		least = min(least, seq)
	}
	return least
}

func (w *window) add(e *event, position uint64) {
	e.seq, e.position = w.next, position
	w.next++
	w.events = append(w.events, e)
	w.grow(e.size())
	w.trim()
}

func (w *window) grow(n int) {
	w.bytes += n
	if w.total != nil {
		w.total.Add(int64(n))
	}
}

// bounds returns what the window may keep, and what while a watcher has yet to
// take it.
func (w *window) bounds() (keep, most int) {
	if w.total != nil && w.total.Load() > windowsTotal {
		return windowLeast, windowBytes
	}
	return windowBytes, windowMost
}

// trim drops the oldest events beyond the window's bounds.
func (w *window) trim() {
	keep, most := w.bounds()
	if w.bytes <= keep {
		return
	}
	wanted := w.slowest()
	drop := 0
	for w.bytes > keep && drop < len(w.events)-1 && (w.bytes > most || w.events[drop].seq < wanted) {
		w.grow(-w.events[drop].size())
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

// skip takes note of a relist from one version to another.
func (w *window) skip(from, to uint64) {
	if to <= from+1 {
		return // no room for anything unseen
	}
	w.skips++
	w.gaps = append(w.gaps, gap{from, to, w.next})
	if len(w.gaps) > maxGaps {
		w.start = max(w.start, w.gaps[0].to)
		w.gaps = w.gaps[1:]
	}
}

// reset forgets all history, because the set begins anew. Every watcher is
// too far behind then.
func (w *window) reset() {
	w.grow(-w.bytes)
	*w = window{next: w.next + 1, skips: w.skips, lost: w.lost, taken: w.taken, total: w.total}
}

// since returns the sequence number of the first event after version. It
// reports false when the window cannot tell all that happened since.
func (w *window) since(version, current uint64) (uint64, bool) {
	if version < w.start || !w.tells(version, 0) || (version > current && version <= w.lost) {
		return 0, false
	}
	i := sort.Search(len(w.events), func(i int) bool { return w.events[i].position > version })
	return w.next - uint64(len(w.events)-i), true
}

// unbroken reports whether each state since version was one that the cloud had.
// Within a relist there are none: what it found comes in an order of its own.
func (w *window) unbroken(version uint64) bool {
	return !slices.ContainsFunc(w.gaps, func(g gap) bool { return g.to > version })
}

// tells reports whether the window holds all that a watcher at version must
// learn of the relists that came after the event seq.
func (w *window) tells(version, seq uint64) bool {
	for _, g := range w.gaps {
		if g.seq >= seq && g.from < version && version < g.to {
			return false
		}
	}
	return true
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
