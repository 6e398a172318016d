package replica

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"time"

	"github.com/tidwall/btree"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// Filter decides how readers of one kind see the objects of the replica. It is
// immutable: an object is shown in one way by it. When something that it goes
// by changes, another takes its place; see [Replica.Refilter].
type Filter interface {
	// Version is the newest resource version of what the filter goes by.
	Version() uint64
	// Same reports whether both show every object of a resource alike.
	Same(resource schema.GroupVersionResource, other Filter) bool
	// Show returns the object as it is to be seen, or false if it is not. What
	// is not changed is returned as it came. It is called under a lock: it must
	// not block or call the replica.
	Show(resource schema.GroupVersionResource, k Kind, object []byte) ([]byte, bool)
}

// lens is a set as one kind of reader sees it. Its index and window are like
// those of a set, and its objects are made of the set's when they are read.
//
// An object that only a new filter changed must have a higher version, for
// clients take one with the version that they know for the one that they know.
// So a lens has a version of its own: the newest of what it is made of, or one
// more than the last that a reader was told where that is not newer.
//
// What readers were shown before there was the lens, by the cloud or by a lens
// of another life of the hub, may have looked otherwise under the same version.
// So a lens begins with a version above all that they may have been told, which
// the scope's record on disk bounds, and shows all objects under it. Who comes
// back with an older one has to list, and learns of each.
//
// All is guarded by the set's mu.
type lens struct {
	name    string
	filter  Filter
	index   btree.Map[string, *entry]
	kept    int // bytes of splices
	window  window
	version uint64 // the highest that readers were told
	// known are the readers that have listed, and the version that they were
	// given first.
	known map[string]uint64
	used  time.Time
}

// keptMost bounds the splices that a lens keeps. What is beyond is made anew by
// the filter for each reader.
const keptMost = 4 << 20

// putLocked puts an entry into the index; nil takes the key out of it.
func (l *lens) putLocked(key string, e *entry) {
	var old *entry
	if e == nil {
		old, _ = l.index.Delete(key)
	} else {
		if e.through != nil {
			if l.kept += len(e.through.how); l.kept > keptMost {
				l.kept -= len(e.through.how)
				e.through.how = nil // nobody has it yet
			}
		}
		old, _ = l.index.Set(key, e)
	}
	if old != nil && old.through != nil {
		l.kept -= len(old.through.how)
	}
}

// maxKnown bounds the readers that a lens remembers.
const maxKnown = 256

// knowLocked takes note of a reader that is given all that the lens shows.
func (l *lens) knowLocked(reader string, version uint64) {
	if _, ok := l.known[reader]; ok {
		return
	}
	if len(l.known) >= maxKnown {
		clear(l.known) // they list again
	}
	l.known[reader] = version
}

// gaveLocked reports whether the reader can have the version from this lens.
func (l *lens) gaveLocked(reader string, version uint64) bool {
	first, ok := l.known[reader]
	return ok && first <= version && version <= l.version
}

// through is how an entry of a lens is made.
type through struct {
	under  *entry // of the set
	filter Filter
	sum    uint64 // of what the filter makes of it
	how    splice // of the object beneath to the one that is shown; nil: the filter makes it
}

var sumSeed = maphash.MakeSeed()

// same reports whether a filter has left an object as it was.
func same(a, b []byte) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// pass returns the entry by which readers see the object of e under a
// version; nil: they do not. The set's own entry does where it is the same.
func (s *set) pass(k Kind, f Filter, e *entry, object []byte, version uint64) (*entry, []byte, error) {
	shown, ok := f.Show(s.scope.Resource, k, object)
	switch {
	case !ok:
		return nil, nil, nil
	case version == e.version && same(shown, object):
		return e, object, nil
	}
	sum := maphash.Bytes(sumSeed, shown)
	if version != e.version {
		var err error
		if shown, err = wire.SetVersion(k.Encoding, shown, version); err != nil {
			return nil, nil, err
		}
	}
	to := &entry{version: version, size: len(shown), through: &through{e, f, sum, spliceOf(object, shown)}}
	return to, shown, nil
}

// shown appends what an entry of a lens shows of the set's object.
func (s *set) shown(dst []byte, k Kind, key string, e *entry, object []byte) ([]byte, error) {
	if e.through.how != nil {
		return e.through.how.apply(dst, object), nil
	}
	shown, ok := e.through.filter.Show(s.scope.Resource, k, object)
	if !ok {
		return dst, fmt.Errorf("read %s in %s: it is not shown", key, s.id)
	}
	if e.version == e.through.under.version {
		return append(dst, shown...), nil
	}
	shown, err := wire.SetVersion(k.Encoding, shown, e.version)
	if err != nil {
		return dst, fmt.Errorf("read %s in %s: %w", key, s.id, err)
	}
	return append(dst, shown...), nil
}

// buffers are what is used again from one object to the next.
type buffers struct{ object, shown []byte }

// readShown returns what an entry shows. It is valid until the next is read.
func (s *set) readShown(b *buffers, k Kind, key string, e *entry) ([]byte, error) {
	under := e
	if e.through != nil {
		under = e.through.under
	}
	object, err := s.read(b.object[:0], key, under)
	if b.object = object; err != nil || under == e {
		return object, err
	}
	b.shown, err = s.shown(b.shown[:0], k, key, e, object)
	return b.shown, err
}

// lens returns the set as readers of that name see it.
func (s *set) lens(name string) (*lens, error) {
	for {
		s.mu.Lock()
		if l, ok := s.lenses[name]; ok {
			l.used = time.Now()
			s.mu.Unlock()
			return l, nil
		}
		version := s.toldLocked() + 1
		s.mu.Unlock()
		s.marks.add(s.scope.Resource.GroupResource(), name)
		f := s.filters(name)
		if f == nil {
			return nil, fmt.Errorf("nothing is known of how %s sees %s", name, s.id)
		}
		made, err := s.look(f, max(version, f.Version()))
		if err != nil {
			return nil, err
		}
		if err := s.addLens(name, f, made); err != nil {
			return nil, err
		}
	}
}

// addLens adds a lens, unless there is one or the filter is another by now.
func (s *set) addLens(name string, f Filter, made *glances) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Whoever changes the filter does so before it asks for the set's lenses.
	if s.lenses[name] != nil || !s.synced || s.filters(name) != f {
		return nil
	}
	version := max(made.version, s.toldLocked()+1)
	l := &lens{name: name, filter: f, used: time.Now(), version: version, known: map[string]uint64{}}
	l.window = window{start: version, taken: map[*watcher]uint64{}, total: s.window.total}
	s.index.Scan(func(key string, e *entry) bool {
		var to *entry
		if to, err = s.lookedLocked(made, f, key, e, version); to != nil {
			l.putLocked(key, to)
		}
		return err == nil
	})
	if err != nil {
		return err
	}
	if s.lenses == nil {
		s.lenses = map[string]*lens{}
	}
	s.lenses[name] = l
	s.marks.tell(version)
	return nil
}

// glance is what a filter makes of one entry of a set.
type glance struct {
	of, to *entry // to is nil if it is not shown
}

// glances are what a filter makes of all that a set holds.
type glances struct {
	version uint64 // under which they are shown; 0: each under its own
	of      map[string]glance
}

// look shows all that the set holds to a filter. What changes meanwhile has to
// be shown to it again.
func (s *set) look(f Filter, version uint64) (*glances, error) {
	v, err := s.view()
	if err != nil {
		return nil, err
	}
	defer v.Close()
	made := &glances{version, make(map[string]glance, v.index.Len())}
	kept := 0
	err = v.each(matcher{}, func(key string, e *entry, data []byte) error {
		to, _, err := s.pass(v.kind, f, e, data, cmp.Or(version, e.version))
		if to != nil && to != e {
			if kept += len(to.through.how); kept > keptMost {
				to.through.how = nil
			}
		}
		made.of[key] = glance{e, to}
		return err
	})
	return made, err
}

// lookedLocked returns what a filter makes of an entry that the set has now;
// under a version, or its own, if it has changed since.
func (s *set) lookedLocked(made *glances, f Filter, key string, e *entry, version uint64) (*entry, error) {
	if g, ok := made.of[key]; ok && g.of == e {
		return g.to, nil
	}
	object, err := s.readLocked(key, e)
	if err != nil {
		return nil, err
	}
	to, _, err := s.pass(s.kind, f, e, object, cmp.Or(version, e.version))
	return to, err
}

// followLocked passes on an event of the set.
func (l *lens) followLocked(s *set, e *event) {
	_, had := l.index.Get(e.key)
	var to *entry
	shown := e.object
	version := e.version
	if e.local || version <= l.version {
		version = l.version + 1
	}
	if base, ok := s.index.Get(e.key); ok && e.typ != watch.Deleted {
		var err error
		if to, shown, err = s.pass(s.kind, l.filter, base, e.object, version); err != nil {
			to = nil // what cannot be read is not shown
		}
	}
	if to == nil {
		l.putLocked(e.key, nil)
		if !had {
			return
		}
		shown = l.lastLocked(s, e.object, version)
	} else {
		l.putLocked(e.key, to)
	}
	l.moveLocked(s, version)
	ev := newEvent(kindOfChange(had, to != nil), e.key, e.meta, nil, s.kind, shown)
	ev.version, ev.held = version, e.held
	if had {
		ev.prev, ev.blind = e.prev, e.blind
		if e.left != nil {
			ev.left = newEvent(watch.Deleted, e.key, e.left.meta, e.left.prev, s.kind, l.lastLocked(s, e.left.object, version))
		}
	}
	l.window.add(ev, version)
}

func kindOfChange(had, has bool) watch.EventType {
	switch {
	case !has:
		return watch.Deleted
	case had:
		return watch.Modified
	}
	return watch.Added
}

// lastLocked is what readers are shown of an object that is no more, or not
// for them.
func (l *lens) lastLocked(s *set, object []byte, version uint64) []byte {
	if shown, ok := l.filter.Show(s.scope.Resource, s.kind, object); ok {
		object = shown
	}
	if out, err := wire.SetVersion(s.kind.Encoding, object, version); err == nil {
		return out
	}
	return object
}

// seenLocked returns an event of the set that is not in its history as readers
// of the lens see it.
func (l *lens) seenLocked(s *set, e *event) *event {
	version := e.version
	if to, ok := l.index.Get(e.key); ok && e.typ != watch.Deleted {
		version = to.version
	}
	typ := e.typ
	if _, ok := l.filter.Show(s.scope.Resource, s.kind, e.object); !ok {
		typ = watch.Deleted
	}
	out := newEvent(typ, e.key, e.meta, e.prev, s.kind, l.lastLocked(s, e.object, version))
	out.left = e.left
	return out
}

// toldLocked returns the version of what the lens shows now, for somebody who
// is told it.
func (l *lens) toldLocked(s *set) uint64 {
	if s.version > l.version {
		l.moveLocked(s, s.version)
	}
	return l.version
}

// refilter makes a filter the lens's own and tells watchers what looks
// otherwise by it.
func (s *set) refilter(name string, f Filter) error {
	s.mu.Lock()
	l := s.lenses[name]
	if l == nil || l.filter == f {
		s.mu.Unlock()
		return nil
	}
	if l.filter.Same(s.scope.Resource, f) {
		l.filter = f
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	made, err := s.look(f, 0)
	if errors.Is(err, errNotSynced) {
		return nil // nor has it a lens any more
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lenses[name] != l {
		return nil
	}
	return l.refilterLocked(s, f, made)
}

func (l *lens) refilterLocked(s *set, f Filter, made *glances) error {
	// All that changes now has one version, and comes before the next. A
	// client that was told of some of it and comes back is told of all.
	version := max(l.toldLocked(s)+1, f.Version())
	news := 0
	var failed error
	s.index.Scan(func(key string, e *entry) bool {
		to, err := s.lookedLocked(made, f, key, e, 0)
		if err == nil {
			var changed bool
			if changed, err = l.reviseLocked(s, f, key, e, to, version); changed {
				news++
			}
		}
		failed = err
		return err == nil
	})
	if news > 0 {
		l.moveLocked(s, version+1)
		s.broadcast()
	}
	if failed != nil {
		return fmt.Errorf("filter %s for %s: %w", s.id, l.name, failed)
	}
	l.filter = f
	return nil
}

// reviseLocked puts to in the place of what the lens had of e, and tells
// watchers if it looks otherwise.
func (l *lens) reviseLocked(s *set, f Filter, key string, e, to *entry, version uint64) (changed bool, err error) {
	old, had := l.index.Get(key)
	if !had && to == nil || old == e && to == e {
		return false, nil
	}
	if had && to != nil {
		alike, err := l.alikeLocked(s, f, key, e, old, to)
		if err != nil || alike {
			return false, err
		}
	}
	object, err := s.readLocked(key, e)
	if err != nil {
		return false, err
	}
	meta, err := wire.ReadMeta(s.kind.Encoding, object, isPods(s.scope.Resource))
	if err != nil {
		return false, err
	}
	if to == nil {
		object = l.lastLocked(s, object, version)
		l.putLocked(key, nil)
	} else {
		if to, object, err = s.pass(s.kind, f, e, object, version); err != nil {
			return false, err
		}
		l.putLocked(key, to)
	}
	var prev *wire.Meta
	if had {
		prev = &meta
	}
	ev := newEvent(kindOfChange(had, to != nil), key, &meta, prev, s.kind, object)
	ev.version = version
	l.window.add(ev, version+1)
	return true, nil
}

// alikeLocked reports whether what a filter makes of e, which is to, looks as
// what the lens had of it. It stays then, with its version.
func (l *lens) alikeLocked(s *set, f Filter, key string, e, old, to *entry) (bool, error) {
	before, after := old.through, to.through
	if before == nil || after == nil {
		object, err := s.readLocked(key, e)
		if err != nil {
			return false, err
		}
		plain := &through{under: e, filter: f, sum: maphash.Bytes(sumSeed, object)}
		if before == nil {
			before = plain
		}
		if after == nil {
			after = plain
		}
	}
	if before.sum != after.sum {
		return false, nil
	}
	switch {
	case old.through == nil:
	case before.under == e:
		// By the new filter, so that the old one can go.
		l.putLocked(key, &entry{version: old.version, size: old.size, through: &through{e, f, after.sum, before.how}})
	default:
		object, err := s.readLocked(key, e)
		if err != nil {
			return false, err
		}
		again, _, err := s.pass(s.kind, f, e, object, old.version)
		if err != nil {
			return false, err
		}
		l.putLocked(key, again)
	}
	return true, nil
}

// dropLensesLocked forgets lenses: all, or those that nobody uses.
func (s *set) dropLensesLocked(all bool) {
	for name, l := range s.lenses {
		if all || len(l.window.taken) == 0 && time.Since(l.used) >= pauseAfter {
			l.window.grow(-l.window.bytes)
			delete(s.lenses, name)
		}
	}
}

func (s *set) dropUnusedLenses() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLensesLocked(false)
}

// Refilter must be called after the answer of Config.Filter for a name
// changed. Watchers see what looks otherwise now as ordinary events.
func (r *Replica) Refilter(name string) error {
	var errs []error
	for _, st := range r.all() {
		// Asked for each: the newest that anybody set is the one that stays.
		if f := r.cfg.Filter(name); f != nil {
			errs = append(errs, st.set.refilter(name, f))
		}
	}
	return errors.Join(errs...)
}

// Lensed reports whether readers of that name were shown a resource by a
// filter, in this life of the hub or another. If they are shown it as it is,
// they do not learn what looks otherwise by that.
func (r *Replica) Lensed(resource schema.GroupVersionResource, name string) bool {
	return r.marks.has(resource.GroupResource(), name)
}

// Recall ends the watches of a resource without loss: who comes back is shown
// it by a filter, if there is one by now.
func (r *Replica) Recall(resource schema.GroupResource) {
	for _, st := range r.all() {
		if st.set.scope.Resource.GroupResource() == resource {
			st.set.recall()
		}
	}
}

// Through returns the slice as readers of that name see it, for one of them.
func (sl *Slice) Through(name, reader string) (*Slice, error) {
	l, err := sl.stream.set.lens(name)
	if err != nil {
		return nil, err
	}
	out := *sl
	out.lens, out.reader = l, reader
	return &out, nil
}

// Through returns the object as readers of that name see it, or false if they
// do not.
func (r *Replica) Through(o *Object, name string) (*Object, bool, error) {
	s := o.set
	l, err := s.lens(name)
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	e, ok := l.index.Get(o.key)
	out := &Object{Kind: s.kind, Version: l.toldLocked(s), Contact: s.contact, set: s, key: o.key}
	s.views++ // its bytes are kept if it is overwritten before they are read
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.views--
		s.mu.Unlock()
	}()
	if !ok {
		return nil, false, nil
	}
	out.Data, err = s.readShown(&buffers{}, out.Kind, o.key, e)
	return out, true, err
}

// windowLocked is the history that the slice's watchers see.
func (sl *Slice) windowLocked() *window {
	if sl.lens != nil {
		return &sl.lens.window
	}
	return &sl.stream.set.window
}

// versionLocked is the version of what the slice shows now.
func (sl *Slice) versionLocked() uint64 {
	if sl.lens != nil {
		return sl.lens.toldLocked(sl.stream.set)
	}
	return sl.stream.set.version
}

// at is versionLocked, locked.
func (sl *Slice) at() uint64 {
	s := sl.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	return sl.versionLocked()
}

// view returns what the slice shows now.
func (sl *Slice) view() (*view, error) {
	s := sl.stream.set
	v, err := s.view()
	if err != nil || sl.lens == nil {
		return v, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lenses[sl.lens.name] != sl.lens {
		s.views--
		return nil, fmt.Errorf("%s: %w", s.id, errNotSynced)
	}
	l := sl.lens
	l.used = time.Now()
	v.index, v.bases, v.kind, v.recalls, v.contact = l.index.Copy(), nil, s.kind, s.recalls, s.contact
	v.version, v.seq, v.lens = l.toldLocked(s), l.window.next, l
	l.knowLocked(sl.reader, v.version)
	return v, nil
}
