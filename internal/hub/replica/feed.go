package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// saveEvery is how many bytes of a first list from a peer are taken before they
// go to the store: while they do, as many again may come.
const saveEvery = 4 << 20

// feed is a watch of the upstream under way. It is used by one goroutine.
type feed struct {
	st     *stream
	enc    wire.Encoding
	events *wire.EventReader
	body   *moving
	end    context.CancelFunc

	// patience is how long it may say nothing at all.
	patience time.Duration
	silence  *time.Timer
	silent   atomic.Bool
}

// feed begins a watch of the stream's scope. The caller closes it.
func (st *stream) feed(ctx context.Context, c Credential, query url.Values) (*feed, error) {
	query.Set("watch", "true")
	query.Set("allowWatchBookmarks", "true")
	query.Set("timeoutSeconds", strconv.Itoa(1800+rand.IntN(1800)))
	ctx, cancel := context.WithCancel(ctx)
	resp, err := st.do(ctx, c, query) //nolint:bodyclose // the feed closes it
	if err != nil {
		cancel()
		return nil, err
	}
	f := &feed{st: st, end: cancel, patience: silentAfter}
	f.body = &moving{ReadCloser: resp.Body, moved: func() { f.silence.Reset(f.patience) }, count: st.counter()}
	f.silence = time.AfterFunc(f.patience, func() {
		f.silent.Store(true)
		cancel()
	})
	if f.enc, err = encodingOf(resp.Header); err != nil {
		f.close()
		return nil, st.unread(err)
	}
	f.events = wire.NewEventReader(f.body, f.enc, maxFrame)
	return f, nil
}

func (f *feed) close() {
	f.silence.Stop()
	f.end()
	_ = f.body.Close() // nothing more is wanted of it
}

// next returns the next event; io.EOF at a clean end; errSilent when nothing
// came for too long; errAnswered when a peer sends what cannot be read.
func (f *feed) next() (wire.Event, error) {
	f.silence.Reset(f.patience)
	ev, err := f.events.Read()
	f.silence.Stop()
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return ev, err
	case f.silent.Load():
		return ev, errSilent
	case f.body.err != nil && !errors.Is(f.body.err, io.EOF):
		return ev, err // the connection broke
	}
	return ev, f.st.unread(err)
}

// unread marks an answer that cannot be understood, or that says that there is
// none, as one of a peer that does not serve the scope.
func (st *stream) unread(err error) error {
	if st.route.Peer == "" {
		return err
	}
	return fmt.Errorf("%w: %w", errAnswered, err)
}

// watchList takes the whole scope from a peer, object by object, and goes on
// with what changes: the peer sends both in one answer, and neither end holds
// more of it than a piece. Bytes within a pool are cheap, so what breaks off
// begins anew.
func (st *stream) watchList(ctx context.Context, c Credential) error {
	query := st.set.scope.query()
	query.Set("sendInitialEvents", "true")
	query.Set("resourceVersionMatch", "NotOlderThan")
	if at := st.set.at(); at > 0 {
		query.Set("resourceVersion", strconv.FormatUint(at, 10))
	}
	f, err := st.feed(ctx, c, query)
	if err != nil {
		return err
	}
	defer f.close()
	version, err := st.initial(ctx, f)
	if err != nil {
		if errors.Is(err, errAnswered) {
			st.set.discard()
		}
		return fmt.Errorf("list %s: %w", st.set.id, err)
	}
	st.settle(nil)
	return st.changes(ctx, c, f, version)
}

// initial takes the objects that a watch begins with, and returns the version
// at which they are all.
func (st *stream) initial(ctx context.Context, f *feed) (version uint64, err error) {
	s, r := st.set, &relist{seen: map[string]struct{}{}}
	st.metrics.relists.Inc()
	var saving sync.WaitGroup
	defer saving.Wait()
	f.patience = pageStall
	for unsaved := 0; ; {
		ev, err := f.next()
		if errors.Is(err, io.EOF) {
			err = st.unread(errors.New("it ended before all objects had come"))
		}
		if err != nil {
			return 0, err
		}
		switch watch.EventType(ev.Type) {
		case watch.Added:
			if err := st.fits(f.enc, ev); err != nil {
				return 0, err
			}
			if err := s.takeEvent(r, f.enc, ev); err != nil {
				return 0, st.unread(err)
			}
			if unsaved += len(ev.Object); r.direct && unsaved >= saveEvery {
				unsaved = 0
				saving.Wait()
				saving.Go(func() { st.save(ctx) }) // bytes in the store need not stay on the heap
			}
			continue
		case watch.Bookmark:
		case watch.Error:
			return 0, st.refusal(f.enc, ev)
		default:
			return 0, st.unread(fmt.Errorf("event of type %q among the first objects", ev.Type))
		}
		version, all, err := wire.ReadBookmark(f.enc, ev.Object)
		switch {
		case err != nil:
			return 0, st.unread(err)
		case !all:
			continue
		case version < s.at():
			return 0, fmt.Errorf("the peer is at %d, the replica at %d: %w", version, s.at(), errBehind)
		}
		saving.Wait()
		s.begin(r, f.enc, ev)
		r.version = version
		st.listed(ctx, r)
		st.waits = time.Time{}
		return version, nil
	}
}

// takeEvent takes one of the objects that a watch begins with.
func (s *set) takeEvent(r *relist, enc wire.Encoding, ev wire.Event) error {
	meta, err := wire.ReadMeta(enc, ev.Object, isPods(s.scope.Resource))
	if err != nil {
		return err
	}
	s.begin(r, enc, ev)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wantsLocked(r, &meta) {
		s.takeLocked(r, &meta, ev.Object)
	}
	return nil
}

// begin begins a list, unless it has begun, with the first event of a watch.
func (s *set) begin(r *relist, enc wire.Encoding, ev wire.Event) {
	if r.pages > 0 {
		return
	}
	r.pages = 1
	s.mu.Lock()
	defer s.mu.Unlock()
	s.beginLocked(r, Kind{APIVersion: ev.APIVersion, Kind: ev.Kind, Encoding: enc}, s.version)
	if r.direct {
		if r.replace {
			s.clearLocked()
		}
		s.kind = r.kind
	}
}

// discard drops what came of a first list that cannot be trusted to its end.
func (s *set) discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.synced {
		s.clearLocked()
	}
}

// fits reports what is wrong with an object that a peer sends: it must be one of
// the scope's resource. What the cloud sends is so by definition.
func (st *stream) fits(enc wire.Encoding, ev wire.Event) error {
	if st.route.Peer == "" {
		return nil
	}
	s := st.set
	m, err := wire.ReadMeta(enc, ev.Object, isPods(s.scope.Resource))
	if err != nil {
		return st.unread(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case m.Name == "" || m.Version == 0:
		err = errors.New("an object without a name or a version")
	case ev.APIVersion != s.scope.Resource.GroupVersion().String(),
		s.index.Len() > 0 && ev.Kind != s.kind.Kind,
		enc == wire.Protobuf && s.scope.Resource != resourceOf(ev), // custom resources may have any name
		s.scope.Namespace != "" && m.Namespace != s.scope.Namespace:
		err = fmt.Errorf("%s %s %s is none of these", ev.APIVersion, ev.Kind, keyOf(m.Namespace, m.Name))
	default:
		return nil
	}
	return st.unread(err)
}

func resourceOf(ev wire.Event) schema.GroupVersionResource {
	plural, _ := meta.UnsafeGuessKindToResource(schema.FromAPIVersionAndKind(ev.APIVersion, ev.Kind))
	return plural
}
