package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/table"
	"github.com/yurt-edge/yurt/internal/hub/turn"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

var (
	// ErrNotHeld means that the replica cannot tell: the object or list is
	// in no scope that it holds.
	ErrNotHeld = errors.New("not replicated on this node")
	// ErrExpired means that the replica's history does not reach back to
	// the resource version asked for.
	ErrExpired = errors.New("resource version too old")
	// ErrAhead means that the replica has not seen the resource version
	// asked for yet.
	ErrAhead = errors.New("resource version too large")
	// ErrFormat means that the replica cannot give the object in any form
	// that the client accepts.
	ErrFormat = errors.New("not available in an accepted form")
)

const (
	metaAPIVersion = "meta.k8s.io/v1"
	metadataKind   = "PartialObjectMetadata"

	// chunk is how much of an answer is collected before it is written.
	chunk = 32 << 10
	// maxPretty bounds the answers that are indented for people, which must
	// be whole for that.
	maxPretty = 1 << 20

	// awaitBudget is how long a watch that begins with all objects waits for
	// the replica to reach the resource version it asks for.
	awaitBudget = time.Second

	bookmarkEvery   = time.Minute
	minWatchTimeout = 30 * time.Minute
)

// form is how one answer is encoded.
type form struct {
	request.Format
	kind    Kind // of the stored objects
	include metav1.IncludeObjectPolicy
	pretty  bool
}

// chooseForm picks the first accepted format that can be made of the kind,
// and refuses if that view is not one of this answer: other is the metadata
// view that it does not have.
func chooseForm(r *http.Request, k Kind, formats []request.Format, other request.View) (form, error) {
	for _, f := range formats {
		if f.View == request.Whole && f.Encoding == wire.Protobuf && k.Encoding == wire.JSON {
			continue // custom resources have no protobuf form
		}
		if f.View == other {
			break
		}
		include, ok := includeObject(r)
		if f.View == request.Table && !ok {
			break
		}
		return form{Format: f, kind: k, include: include, pretty: wantsPretty(r)}, nil
	}
	return form{}, fmt.Errorf("%s %s: %w", k.APIVersion, k.Kind, ErrFormat)
}

// includeObject returns what the rows of a table shall hold of their objects,
// and whether there is such a thing.
func includeObject(r *http.Request) (metav1.IncludeObjectPolicy, bool) {
	switch p := metav1.IncludeObjectPolicy(r.URL.Query().Get("includeObject")); p {
	case "":
		return metav1.IncludeMetadata, true
	case metav1.IncludeNone, metav1.IncludeMetadata, metav1.IncludeObject:
		return p, true
	}
	return "", false
}

// wantsPretty is the API server's rule: asked for, or a tool that shows its
// output to a person.
func wantsPretty(r *http.Request) bool {
	if v := r.URL.Query().Get("pretty"); v != "" {
		on, err := strconv.ParseBool(v)
		return err == nil && on
	}
	agent := r.UserAgent()
	for _, tool := range []string{"curl", "Wget", "Mozilla/5.0"} {
		if len(agent) >= len(tool) && agent[:len(tool)] == tool {
			return true
		}
	}
	return false
}

// object converts object data to the form. The result is object data of the
// form's encoding: with its type where JSON wants it.
func (f form) object(dst, data []byte, withType bool) ([]byte, error) {
	apiVersion, kind := f.kind.APIVersion, f.kind.Kind
	if f.meta() {
		partial, err := wire.PartialMetadataOf(f.kind.Encoding, f.kind.APIVersion, f.kind.Kind, data)
		if err != nil {
			return dst, err
		}
		data, apiVersion, kind, withType = partial, metaAPIVersion, metadataKind, true
	}
	switch f.Encoding {
	case f.kind.Encoding:
		return append(dst, data...), nil
	case wire.JSON:
		return wire.ToJSON(dst, apiVersion, kind, data, withType)
	}
	out, err := wire.FromJSON(apiVersion, kind, data)
	return append(dst, out...), err
}

func (f form) meta() bool { return f.View == request.Metadata || f.View == request.MetadataList }

// typed returns the type that objects of the form have.
func (f form) typed() (apiVersion, kind string) {
	if f.meta() {
		return metaAPIVersion, metadataKind
	}
	return f.kind.APIVersion, f.kind.Kind
}

func (f form) contentType(watching bool) string {
	if f.Encoding == wire.Protobuf {
		if watching {
			return "application/vnd.kubernetes.protobuf;stream=watch"
		}
		return "application/vnd.kubernetes.protobuf"
	}
	return "application/json"
}

// writer collects an answer in chunks. How long a client may take for one is
// for the ResponseWriter to bound.
type writer struct {
	http.ResponseWriter
	control *http.ResponseController
	buf     []byte
	form    form
	started bool
	streams bool // each chunk is wanted at once

	// ticket is given up while the client is waited for; nil: there is no
	// turn to give up.
	ticket *turn.Ticket
	ctx    context.Context //nolint:containedctx // of the request, for the ticket
}

// spares are buffers for answers, so that each need not grow its own.
var spares = sync.Pool{New: func() any { return new(buffer) }}

// buffer is one of spares.
type buffer struct{ b []byte }

func spare() *buffer {
	b, _ := spares.Get().(*buffer)
	return b
}

// end gives the buffer back: nobody uses its bytes any more.
func (b *buffer) end() {
	if cap(b.b) > 2*chunk {
		return
	}
	b.b = b.b[:0]
	spares.Put(b)
}

// begin takes a turn for the work that fills the writer. The caller ends it.
func (w *writer) begin(ctx context.Context) error {
	w.ticket, w.ctx = turn.From(ctx), ctx
	return w.ticket.Begin(ctx)
}

func newWriter(w http.ResponseWriter, f form) *writer {
	return &writer{ResponseWriter: w, control: http.NewResponseController(w), form: f}
}

func (w *writer) start(watching bool) {
	w.started, w.streams = true, watching
	h := w.Header()
	h.Set("Content-Type", w.form.contentType(watching))
	h.Set("Cache-Control", "no-cache, private")
	w.WriteHeader(http.StatusOK)
	if watching {
		_ = w.control.Flush() // a client that is gone shows at the next write
	}
}

// flush writes what was collected.
func (w *writer) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	working := w.ticket.End()
	_, err := w.Write(w.buf)
	if err == nil && w.streams {
		err = w.control.Flush()
	}
	if err == nil && working {
		err = w.ticket.Begin(w.ctx)
	}
	if cap(w.buf) > 1<<20 {
		w.buf = nil
	}
	w.buf = w.buf[:0]
	return err
}

// Object is one object that the replica holds.
type Object struct {
	Kind    Kind
	Data    []byte
	Version uint64    // of the slice it was read from
	Contact time.Time // when the cloud last proved that slice current

	set *set
	key string
}

// Persist returns once the slice that the object was read from is on disk. It
// costs nothing when that is so already. What is said of an object must not
// outlive the object.
func (o *Object) Persist(ctx context.Context) error {
	// A flush that is on the way may be the one.
	o.set.flushing.Lock()
	due := o.set.due(false)
	o.set.flushing.Unlock()
	if !due {
		return nil
	}
	return o.set.flush(ctx)
}

// Get returns the object that a get asks for. The error is ErrNotHeld, a
// NotFound status when the replica knows that there is none, or ErrAhead
// when what it holds is older than min.
func (r *Replica) Get(info request.Info, least uint64) (*Object, error) {
	key := keyOf(info.Namespace, info.Name)
	scope := Scope{Resource: info.Resource, Namespace: info.Namespace, Fields: "metadata.name=" + info.Name}
	var found, absent *Object
	ahead := false
	for _, st := range r.all() {
		s := st.set
		if s.scope.Resource != info.Resource {
			continue
		}
		obj, held, err := s.get(key, least)
		switch {
		case errors.Is(err, errNotSynced):
			continue
		case errors.Is(err, ErrAhead):
			ahead = true
			continue
		case err != nil:
			return nil, err
		case held:
			if found == nil || obj.better(found) {
				found = obj
			}
		case s.scope.covers(scope) && (absent == nil || absent.Borrowed()):
			absent = &Object{set: s}
		}
	}
	switch {
	case found != nil:
		return found, nil
	case ahead:
		return nil, ErrAhead
	case absent != nil:
		return absent, apierrors.NewNotFound(info.Resource.GroupResource(), info.Name)
	}
	return nil, fmt.Errorf("%s: %w", info, ErrNotHeld)
}

// better compares two scopes that hold the object. The node's own counts: what
// came by the right of a pod must not stand between the kubelet and its pods,
// also in the moment of a cut, which one stream notices before the other. Of
// others the one that follows the cloud knows the object best.
func (o *Object) better(than *Object) bool {
	if a, b := o.Borrowed(), than.Borrowed(); a != b {
		return b
	}
	if a, b := o.Current(), than.Current(); a != b {
		return a
	}
	return o.Version > than.Version
}

func (s *set) get(key string, least uint64) (*Object, bool, error) {
	s.mu.Lock()
	if !s.synced {
		s.mu.Unlock()
		return nil, false, errNotSynced
	}
	e, ok := s.index.Get(key)
	obj := &Object{Kind: s.kind, Version: s.version, Contact: s.contact, set: s, key: key}
	s.used = time.Now()
	if s.version < least && (!ok || e.version < least) {
		s.mu.Unlock()
		return nil, false, ErrAhead
	}
	if ok {
		// The view's promise for one object: its bytes are kept if it is
		// overwritten before they are read.
		s.views++
	}
	s.mu.Unlock()
	if !ok {
		return nil, false, nil
	}
	defer func() {
		s.mu.Lock()
		s.views--
		s.mu.Unlock()
	}()
	var err error
	obj.Data, err = s.read(nil, key, e)
	return obj, true, err
}

// Custom reports whether the object is a custom resource, whose printer
// columns only the cloud knows.
func (o *Object) Custom() bool { return o.Kind.Encoding == wire.JSON }

// Custom is [Object.Custom] for the slice.
func (sl *Slice) Custom() bool { return sl.stream.set.encoding() == wire.JSON }

// Current reports whether the scope that holds the object follows the cloud.
func (o *Object) Current() bool { return o.set.current() }

// Borrowed reports whether the object came by a caller's right and not by the
// node's own.
func (o *Object) Borrowed() bool { return o.set.isBorrowed() }

// Write sends the object in the best accepted form. On error nothing was
// written.
func (o *Object) Write(w http.ResponseWriter, r *http.Request, formats []request.Format) error {
	f, err := chooseForm(r, o.Kind, formats, request.MetadataList)
	if err != nil {
		return err
	}
	out := newWriter(w, f)
	if f.View == request.Table {
		text, err := table.Object(o.Kind.APIVersion, o.Kind.Kind, o.Kind.Encoding, o.Data, f.include, true)
		if err != nil {
			return o.set.note(err)
		}
		out.buf = append(append(out.buf, text...), '\n')
		return out.whole()
	}
	data := o.Data
	if f.View != request.Whole || f.Encoding != f.kind.Encoding {
		scratch := spare()
		defer scratch.end()
		if scratch.b, err = f.object(scratch.b, data, true); err != nil {
			return o.set.note(err)
		}
		data = scratch.b
	}
	buf := spare()
	defer func() { buf.b = out.buf; buf.end() }()
	out.buf = buf.b
	apiVersion, kind := f.typed()
	out.buf = wire.AppendObject(out.buf, f.Encoding, apiVersion, kind, data)
	return out.whole()
}

// whole sends what was collected as the whole answer.
func (w *writer) whole() error {
	if w.form.pretty && w.form.Encoding == wire.JSON {
		w.buf = indent(bytes.TrimSuffix(w.buf, []byte("\n"))) // as the API server ends them
	}
	w.start(false)
	return abort(w.flush())
}

// note remembers that the set's objects hold fields this build cannot name.
func (s *set) note(err error) error {
	if errors.Is(err, wire.ErrUnknownField) || errors.Is(err, wire.ErrUnknownKind) {
		s.mu.Lock()
		s.opaque = true
		s.mu.Unlock()
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return err
}

// errAborted is an answer that broke off after its first byte.
type errAborted struct{ error }

func (e errAborted) Unwrap() error { return e.error }

func abort(err error) error {
	if err == nil {
		return nil
	}
	return errAborted{err}
}

// Aborted reports whether err came after the answer had begun, so that
// nothing else can be answered.
func Aborted(err error) bool {
	var a errAborted
	return errors.As(err, &a)
}

func indent(text []byte) []byte {
	var out bytes.Buffer
	if json.Indent(&out, text, "", "  ") != nil {
		return text
	}
	return out.Bytes()
}

// Await waits until the slice has seen version, or ctx ends: then ErrAhead.
func (sl *Slice) Await(ctx context.Context, version uint64) error {
	s := sl.stream.set
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if sl.at() >= version {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is at %d, not %d: %w", s.id, sl.at(), version, ErrAhead)
		case <-tick.C:
		}
	}
}

// List answers a list with all that the slice holds. When it fails before
// the first byte the error says why and something else can be answered;
// see Aborted.
func (sl *Slice) List(w http.ResponseWriter, r *http.Request, formats []request.Format) error {
	v, err := sl.view()
	if err != nil {
		return err
	}
	defer v.Close()
	sl.adapt(v)
	f, err := chooseForm(r, v.kind, formats, request.Metadata)
	if err != nil {
		return err
	}
	if err := v.set.opaqueTo(f); err != nil {
		return err
	}
	out := newWriter(w, f)
	if err := out.begin(r.Context()); err != nil {
		return err
	}
	defer out.ticket.End()
	if f.View == request.Table {
		return sl.listTable(v, out)
	}
	apiVersion, kind := f.typed()
	header := wire.ListHeader{APIVersion: apiVersion, Kind: kind + "List", Version: v.version}
	match, size, err := sl.measure(v, f)
	if err != nil {
		return err
	}
	out.buf = wire.AppendListStart(out.buf, f.Encoding, header, size)
	var (
		scratch []byte
		first   = true
	)
	err = v.each(match, func(_ string, _ *entry, data []byte) error {
		var err error
		if f.View == request.Whole && f.Encoding == f.kind.Encoding {
			scratch = data
		} else if scratch, err = f.object(scratch[:0], data, false); err != nil {
			return v.set.note(err)
		}
		out.buf = wire.AppendItem(out.buf, f.Encoding, first, scratch)
		first = false
		return out.piece()
	})
	if err != nil {
		if out.started {
			return abort(err)
		}
		return err
	}
	out.buf = wire.AppendListEnd(out.buf, f.Encoding, header)
	return out.last()
}

// adapt makes a view that of the slice's readers.
func (sl *Slice) adapt(v *view) {
	if v.cloud = sl.base; !sl.base {
		v.showKept()
	}
}

// piece sends what was collected of a longer answer, if it is enough.
func (w *writer) piece() error {
	if len(w.buf) < chunk || (w.form.pretty && !w.started && len(w.buf) < maxPretty) {
		return nil
	}
	if !w.started {
		w.start(false)
	}
	return abort(w.flush())
}

// last sends the end of an answer.
func (w *writer) last() error {
	w.ticket.End()
	if !w.started {
		return w.whole()
	}
	return abort(w.flush())
}

// measure returns the bytes that the items will take, which Protobuf wants
// in front of them, and a matcher that need not look into objects again.
func (sl *Slice) measure(v *view, f form) (matcher, int, error) {
	if f.Encoding != wire.Protobuf {
		return sl.match, 0, nil
	}
	size := 0
	if f.View == request.Whole && sl.match.byKey() {
		v.index.Scan(func(key string, e *entry) bool {
			if sl.match.matchesKey(key) {
				size += wire.ItemSize(f.Encoding, v.entry(key, e).size)
			}
			return true
		})
		return sl.match, size, nil
	}
	var scratch []byte
	err := v.each(sl.match, func(_ string, _ *entry, data []byte) error {
		var err error
		if scratch, err = f.object(scratch[:0], data, false); err != nil {
			return err
		}
		size += wire.ItemSize(f.Encoding, len(scratch))
		return nil
	})
	return sl.match, size, err
}

func (s *set) opaqueTo(f form) error {
	if f.kind.Encoding != wire.Protobuf || f.Encoding != wire.JSON {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opaque {
		return fmt.Errorf("%s: %w: %w", s.id, ErrFormat, errOpaque)
	}
	return nil
}

func (sl *Slice) listTable(v *view, out *writer) error {
	b := table.New(v.kind.APIVersion, v.kind.Kind, wire.ListHeader{Version: v.version})
	err := v.each(sl.match, func(_ string, _ *entry, data []byte) error {
		err := b.Add(v.kind.Encoding, data, out.form.include)
		if err != nil || b.Size() < chunk {
			return err
		}
		if out.buf, err = b.AppendRows(out.buf); err != nil {
			return err
		}
		return out.piece()
	})
	if err == nil {
		out.buf, err = b.AppendJSON(out.buf)
	}
	if err != nil {
		err = v.set.note(fmt.Errorf("print %s: %w", v.set.id, err))
		if out.started {
			return abort(err)
		}
		return err
	}
	out.buf = append(out.buf, '\n')
	return out.last()
}

// watchStart is where a watch begins.
type watchStart struct {
	calls uint64 // set.recalls at the start
	skips uint64 // window.skips at the start
	view  *view  // what is sent as ADDED first; nil when nothing is
	mark  bool   // a bookmark ends the initial events
	seq   uint64
	after uint64 // events at or below this version are not sent
	// due is set for a client that comes back: the overlays, which have no
	// version of their own, are to be shown to it.
	due  bool
	at   uint64  // the version of what it begins with
	owed []*kept // what is shown as it was before a change that is held
	// ahead is set for a client that has seen more than the set holds: it was
	// served by a hub that died before that was on disk. What the set overlays
	// may be gone by then, and is shown once the set is where the client is.
	ahead bool
}

// Watch answers a watch until the client goes, its time is over or it falls
// too far behind. When it fails before the first byte the error says why;
// see Aborted.
func (sl *Slice) Watch(w http.ResponseWriter, r *http.Request, info request.Info, formats []request.Format) error {
	s := sl.stream.set
	s.mu.Lock()
	k := s.kind
	s.mu.Unlock()
	f, err := chooseForm(r, k, formats, request.MetadataList)
	if err != nil {
		return err
	}
	if err := s.opaqueTo(f); err != nil {
		return err
	}
	start, err := sl.startOf(r.Context(), info)
	if err != nil {
		return err
	}
	sl.count(1)
	defer sl.count(-1)
	timer := time.NewTimer(watchTimeout(info))
	defer timer.Stop()
	out := newWriter(w, f)
	out.start(true)
	watcher := &watcher{slice: sl, out: out, bookmarks: info.Options.AllowWatchBookmarks, owed: start.owed, mute: map[string]uint64{}}
	for _, k := range start.owed {
		watcher.mute[k.key] = math.MaxUint64
	}
	// What happens while it is sent what there is waits for it too.
	s.mu.Lock()
	history := sl.windowLocked()
	history.taken[watcher] = start.seq
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(history.taken, watcher)
		s.mu.Unlock()
	}()
	err = watcher.initial(r.Context(), start)
	if start.view != nil {
		start.view.Close()
	}
	if err != nil {
		return abort(err)
	}
	return abort(watcher.follow(r.Context(), start, timer.C))
}

func (sl *Slice) count(n int) {
	s := sl.stream.set
	s.mu.Lock()
	s.watchers += n
	s.used = time.Now()
	s.mu.Unlock()
	sl.stream.metrics.watchers.Add(float64(n))
}

func watchTimeout(info request.Info) time.Duration {
	if t := info.Options.TimeoutSeconds; t != nil && *t > 0 {
		return time.Duration(*t) * time.Second
	}
	return minWatchTimeout + rand.N(minWatchTimeout)
}

// startOf decides where the watch begins, by the API's rules.
func (sl *Slice) startOf(ctx context.Context, info request.Info) (watchStart, error) {
	s, opts := sl.stream.set, info.Options
	var version uint64
	if opts.ResourceVersion != "" {
		var err error
		if version, err = strconv.ParseUint(opts.ResourceVersion, 10, 64); err != nil {
			return watchStart{}, apierrors.NewBadRequest(fmt.Sprintf("resourceVersion %q is not a number", opts.ResourceVersion))
		}
	}
	list := opts.SendInitialEvents != nil && *opts.SendInitialEvents
	if list || (version == 0 && opts.SendInitialEvents == nil) {
		if version > 0 {
			wait, cancel := context.WithTimeout(ctx, awaitBudget)
			defer cancel()
			if err := sl.Await(wait, version); err != nil {
				return watchStart{}, err
			}
		}
		v, err := sl.view()
		if err != nil {
			return watchStart{}, err
		}
		sl.adapt(v)
		return watchStart{view: v, owed: v.owed, at: v.version, mark: list && opts.AllowWatchBookmarks, seq: v.seq, calls: v.recalls, skips: v.skips}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.synced {
		return watchStart{}, errNotSynced
	}
	return sl.resumeLocked(version)
}

// resumeLocked is startOf for a client that has seen everything up to a
// version; 0: that begins with what comes.
func (sl *Slice) resumeLocked(version uint64) (watchStart, error) {
	s, history, current := sl.stream.set, sl.windowLocked(), sl.versionLocked()
	if version == 0 {
		return watchStart{seq: history.next, calls: s.recalls, skips: history.skips}, nil
	}
	seq, ok := history.since(version, current)
	if l := sl.lens; l != nil {
		ok = ok && l.gaveLocked(sl.reader, version)
	}
	if !ok || sl.base && !history.unbroken(version) {
		return watchStart{}, fmt.Errorf("%s: %w: %d (%d)", s.id, ErrExpired, version, history.start)
	}
	start := watchStart{seq: seq, after: version, at: version, calls: s.recalls, skips: history.skips, ahead: version > current}
	if !sl.base {
		start.owed = s.owedLocked(version, sl.lens != nil)
	}
	start.due = !start.ahead && !sl.base && sl.lens == nil
	return start, nil
}

// overlaidLocked are events that show what stands in place of the cloud's
// objects.
func (s *set) overlaidLocked() []*event {
	var out []*event
	for key := range s.bases {
		e, ok := s.index.Get(key)
		if !ok {
			continue
		}
		data := *e.data.Load()
		meta, err := wire.ReadMeta(s.kind.Encoding, data, isPods(s.scope.Resource))
		if err != nil {
			continue
		}
		out = append(out, newEvent(watch.Modified, key, &meta, &meta, s.kind, data))
	}
	return out
}

// watcher sends a slice's events to one client.
type watcher struct {
	slice     *Slice
	out       *writer
	bookmarks bool
	ahead     bool    // see watchStart
	due       bool    // see watchStart
	owed      []*kept // see watchStart
	// mute is before which events those of a key are not shown: what is owed of
	// it tells the same.
	mute    map[string]uint64
	scratch []byte
	tables  int // tables sent: only the first names its columns
}

func (w *watcher) initial(ctx context.Context, start watchStart) error {
	if start.view != nil {
		if err := w.out.begin(ctx); err != nil {
			return err
		}
		defer w.out.ticket.End()
		err := start.view.each(w.slice.match, func(_ string, _ *entry, data []byte) error {
			return w.send(watch.Added, data, nil)
		})
		if err != nil {
			return err
		}
		if start.mark {
			if err := w.bookmark(start.view.version, true); err != nil {
				return err
			}
		}
	}
	return w.out.flush()
}

// overlay sends what stands in place of the cloud's objects.
func (w *watcher) overlay(shown []*event) error {
	for _, e := range shown {
		// The client may have seen the object as the cloud has it, or under
		// another overlay.
		typ := watch.Modified
		switch m := w.slice.match; {
		case m.matches(e.meta):
		case m.without(fieldPhase).matches(e.meta):
			typ = watch.Deleted
		default:
			continue
		}
		if err := w.send(typ, e.object, e); err != nil {
			return err
		}
	}
	return nil
}

// send encodes one event. e carries the JSON form that other watchers may
// have computed already; it is nil for initial events.
func (w *watcher) send(typ watch.EventType, data []byte, e *event) error {
	f := w.out.form
	var err error
	switch {
	case f.View == request.Table:
		w.scratch, err = w.tableEvent(data)
	case f.View == request.Whole && f.Encoding == f.kind.Encoding:
		w.scratch = append(w.scratch[:0], data...)
	case f.View == request.Whole && e != nil && f.Encoding == wire.JSON:
		var text []byte
		text, err = e.json()
		w.scratch = append(w.scratch[:0], text...)
	default:
		w.scratch, err = f.object(w.scratch[:0], data, true)
	}
	if err != nil {
		return w.slice.stream.set.note(err)
	}
	apiVersion, kind := f.typed()
	w.out.buf = wire.AppendEvent(w.out.buf, f.Encoding, string(typ), apiVersion, kind, w.scratch)
	if len(w.out.buf) >= chunk {
		return w.out.flush()
	}
	return nil
}

func (w *watcher) tableEvent(data []byte) ([]byte, error) {
	k := w.out.form.kind
	w.tables++
	return table.Object(k.APIVersion, k.Kind, k.Encoding, data, w.out.form.include, w.tables == 1)
}

func (w *watcher) bookmark(version uint64, initialEventsEnd bool) error {
	f := w.out.form
	if f.View == request.Table {
		// A row for an object with nothing in it but its version.
		k := f.kind
		return w.send(watch.Bookmark, wire.Bookmark(k.Encoding, k.APIVersion, k.Kind, version, initialEventsEnd), nil)
	}
	apiVersion, kind := f.typed()
	w.out.buf = wire.AppendBookmark(w.out.buf, f.Encoding, apiVersion, kind, version, initialEventsEnd)
	return nil
}

// insideGap reports whether the client, coming back with this version, would be
// told to list again because of a relist, which a bookmark spares it.
func (w *watcher) insideGap(version uint64) bool {
	if !w.bookmarks {
		return false
	}
	s := w.slice.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	return !w.slice.windowLocked().tells(version, 0)
}

// changes sends what is new to a client that has seen everything up to a
// version; while it is ahead of the set, no overlays. It returns the position
// of the last event that was sent, and whether the client, coming back with
// the version that it showed, would be told of it again.
func (w *watcher) changes(events []*event, after uint64) (told uint64, again bool, err error) {
	for _, e := range events {
		if e.position <= after && (!e.local || w.ahead) || e.local && w.slice.base || e.seq < w.mute[e.key] {
			continue
		}
		sent, err := w.show(e)
		if err != nil {
			return told, again, err
		}
		if sent {
			told, again = e.position, w.slice.lens != nil && e.version < e.position
		}
	}
	return told, again, nil
}

func (w *watcher) follow(ctx context.Context, start watchStart, end <-chan time.Time) error {
	seq, told := start.seq, start.after
	w.ahead, w.due = start.ahead, start.due
	bookmarks := time.NewTicker(bookmarkEvery - rand.N(bookmarkEvery/4))
	defer bookmarks.Stop()
	for {
		events, shown, version, changed, held, ok := w.next(seq, start)
		if !ok {
			// Too far behind, or wanted with a new credential: the client
			// comes back.
			return nil
		}
		if len(events) > 0 {
			seq = events[len(events)-1].seq + 1
		}
		var (
			owing <-chan struct{}
			err   error
		)
		if told, owing, err = w.tell(events, shown, start, told, version, held == nil); err != nil {
			return err
		}
		end := end
		if held != nil {
			// Who came back from the midst of a relist would have to list, and
			// would see all at once that is held.
			end = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-end:
			return nil
		case <-changed:
		case <-held:
		case <-owing:
		case <-bookmarks.C:
			if version, ok := w.slice.reached(seq); ok && !w.ahead && w.bookmarks {
				if err := w.bookmark(version, false); err != nil {
					return err
				}
				told = version
			}
		}
	}
}

// tell sends what is new to a client that is told everything up to a version;
// whole: nothing of it is held. It returns up to which version it is told then,
// and a channel that is closed when more is owed to it.
func (w *watcher) tell(events, shown []*event, start watchStart, told, version uint64, whole bool) (uint64, <-chan struct{}, error) {
	last, again, err := w.changes(events, start.after)
	w.ahead = w.ahead && version < start.after
	if err = errors.Join(err, w.overlay(shown)); err != nil {
		return told, nil, err
	}
	told = max(told, last)
	if whole && (again && w.bookmarks || w.insideGap(told)) {
		// It has all that the relist found. Without this it would come
		// back with a version from the midst of it and have to list.
		if err := w.bookmark(version, false); err != nil {
			return told, nil, err
		}
		told = version
	}
	owing, err := w.pay(max(told, start.at))
	return told, owing, errors.Join(err, w.out.flush())
}

// pay shows the client, which is at a version, what it was owed. The channel is
// closed when there is more; nil: it is owed nothing.
func (w *watcher) pay(version uint64) (more <-chan struct{}, err error) {
	s := w.slice.stream.set
	s.mu.Lock()
	events, more := w.payLocked(version)
	s.mu.Unlock()
	for _, e := range events {
		if _, err := w.show(e); err != nil {
			return nil, err
		}
	}
	if len(events) > 0 && w.bookmarks {
		// What it was shown may have an older version.
		return more, w.bookmark(version, false)
	}
	return more, nil
}

// next returns the events from seq on, the overlays that the client is to be
// shown after them, the version that this leads to, and channels that are
// closed when there are more, or when the next may be seen. It reports false
// when the watcher cannot go on.
func (w *watcher) next(seq uint64, start watchStart) (
	events, shown []*event, version uint64, changed, held <-chan struct{}, ok bool,
) {
	s := w.slice.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	history := w.slice.windowLocked()
	events, ok = history.from(seq)
	version = w.slice.versionLocked()
	events, held = untilHeld(events)
	if held != nil {
		version = 0 // it is not there yet
	}
	history.taken[w] = seq + uint64(len(events))
	ok = ok && s.synced && s.recalls == start.calls && history.tells(start.after, start.seq)
	if l := w.slice.lens; l != nil {
		l.used = time.Now()
		ok = ok && s.lenses[l.name] == l
	}
	if w.slice.base && history.skips != start.skips {
		// The peer's own readers must not see what the set was in the midst
		// of a relist. It lists, or finds the history elsewhere.
		ok = false
	}
	events = slices.Clone(events)
	history.trim()
	switch {
	case w.due:
		// After the events before them: an overlay has the version of the
		// object beneath, and who comes back with that has missed nothing.
		shown, w.due = s.unheldLocked(w.unmuted(s.overlaidLocked()), seq), false
	case w.ahead && held == nil && version >= start.after && !w.slice.base:
		shown = w.unmuted(s.overlaidLocked())
	}
	return events, shown, version, s.changed, held, ok
}

// reached returns the slice's version if there is no event from seq on.
func (sl *Slice) reached(seq uint64) (version uint64, ok bool) {
	s := sl.stream.set
	s.mu.Lock()
	defer s.mu.Unlock()
	return sl.versionLocked(), sl.windowLocked().next == seq
}

// show sends an event if the watcher's selection is concerned.
func (w *watcher) show(e *event) (sent bool, err error) {
	if w.slice.base && e.base != nil {
		e = e.base
	}
	typ, shown := e.as(w.slice.match)
	if typ == "" {
		return false, nil
	}
	return true, w.send(typ, shown.object, shown)
}
