package replica

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// Upstream is the way to the cloud, or to another hub: an upstream is just a
// URL. The round trippers fill in scheme and host.
type Upstream interface {
	Node() http.RoundTripper   // with the hub's own certificate
	Bearer() http.RoundTripper // with the request's Authorization header only
	WaitUp(ctx context.Context) error
}

// Credential is what a stream presents to the upstream. The zero value is the
// hub's own certificate; else it is the bearer token of a caller that asked
// for the scope.
type Credential struct{ Token string }

const (
	pageSize = 500
	maxPage  = 256 << 20 // bytes of one page of a list
	maxFrame = 16 << 20  // bytes of one watch event; etcd's limit is far below

	accept = "application/vnd.kubernetes.protobuf, application/json"
)

// stream keeps one set current from the upstream.
type stream struct {
	set      *set
	upstream Upstream
	log      *slog.Logger
	metrics  *metrics

	mu         sync.Mutex // guards the following
	credential Credential
	usable     bool          // credential was offered and not refused since
	renewed    chan struct{} // closed when a credential is offered
	relist     bool          // the upstream cannot resume from the set's version
	interrupt  func()        // ends the current follow; nil between two
	paused     bool          // nobody uses the set
	resumed    chan struct{} // closed when a paused stream is used again

	ready     chan struct{} // closed once the set is synced
	readyOnce sync.Once
	failures  chan error // the newest failure, for who waits for ready

	pinned bool // guarded by the replica's mu: never paused
}

func newStream(s *set, up Upstream, log *slog.Logger, m *metrics) *stream {
	st := &stream{
		set: s, upstream: up, metrics: m, log: log.With("scope", s.id),
		renewed: make(chan struct{}), ready: make(chan struct{}), failures: make(chan error, 1),
	}
	if s.synced {
		st.readyOnce.Do(func() { close(st.ready) })
	}
	s.onLost = st.refetch
	return st
}

// offer gives the stream a credential that may read the scope. The node's
// own is kept in preference to a caller's.
func (st *stream) offer(c Credential) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.usable && (st.credential == Credential{} || st.credential == c) {
		return
	}
	st.credential, st.usable = c, true
	st.set.mu.Lock()
	st.set.borrowed = c != Credential{}
	st.set.mu.Unlock()
	close(st.renewed)
	st.renewed = make(chan struct{})
}

func (st *stream) refuse(c Credential) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.credential == c {
		st.usable = false
	}
}

// waitCredential returns a credential once there is one that was not refused.
func (st *stream) waitCredential(ctx context.Context) (Credential, error) {
	for {
		st.mu.Lock()
		c, usable, renewed := st.credential, st.usable, st.renewed
		st.mu.Unlock()
		if usable {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return c, context.Cause(ctx)
		case <-renewed:
		}
	}
}

// errGone means that the upstream cannot resume from the set's version.
var errGone = errors.New("resource version too old")

// errRefused means that the upstream does not let this credential read.
var errRefused = errors.New("refused")

// errForbidden means that the upstream knows the credential and denies it.
var errForbidden = fmt.Errorf("%w: forbidden", errRefused)

// errAbsent means that the upstream does not serve this resource (now).
var errAbsent = errors.New("resource not served")

// touch takes note of a caller that wants the set.
func (st *stream) touch() {
	st.set.mu.Lock()
	st.set.used = time.Now()
	st.set.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.paused {
		st.paused = false
		close(st.resumed)
	}
}

// pause stops following until the set is used again. Its data stays.
func (st *stream) pause() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.paused {
		return
	}
	st.paused, st.resumed = true, make(chan struct{})
	if st.interrupt != nil {
		st.interrupt()
	}
}

// waitUse returns once the stream is not paused, or ctx ends.
func (st *stream) waitUse(ctx context.Context) {
	st.mu.Lock()
	paused, resumed := st.paused, st.resumed
	st.mu.Unlock()
	if !paused {
		return
	}
	select {
	case <-ctx.Done():
	case <-resumed:
	}
}

// supervise follows the upstream until ctx ends. It returns only then.
func (st *stream) supervise(ctx context.Context) {
	wait := backoff{}
	for ctx.Err() == nil {
		st.waitUse(ctx)
		if st.upstream.WaitUp(ctx) != nil {
			return
		}
		credential, err := st.waitCredential(ctx)
		if err != nil {
			return
		}
		started := time.Now()
		err = st.follow(ctx, credential)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			st.fail(err)
		}
		switch {
		case err == nil:
			wait.reset()
			continue // the server ended the watch in good order
		case errors.Is(err, errRefused):
			st.refuse(credential)
			st.log.Warn("stream refused", "err", err)
			if credential == (Credential{}) {
				if errors.Is(err, errForbidden) {
					st.set.revoke()
				}
				// The node's own rights may come back without anybody
				// offering them.
				wait.sleep(ctx)
				st.offer(Credential{})
			}
			continue
		case errors.Is(err, errGone):
			st.forget()
			continue
		}
		if time.Since(started) > time.Minute {
			wait.reset()
		}
		st.log.Debug("stream ended", "err", err)
		wait.sleep(ctx)
	}
}

// fail tells who waits for the set that it will not come yet.
func (st *stream) fail(err error) {
	select {
	case <-st.failures:
	default:
	}
	st.failures <- err // has room: nobody else sends
}

// backoff is a bounded, jittered, growing wait.
type backoff struct{ n int }

func (b *backoff) reset() { b.n = 0 }

func (b *backoff) sleep(ctx context.Context) {
	const first, last = 100 * time.Millisecond, 15 * time.Second
	d := min(last, first<<min(b.n, 10))
	b.n++
	timer := time.NewTimer(d/2 + rand.N(d))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// forget makes the next follow list anew. What the set holds stays readable
// until the differences are known.
func (st *stream) forget() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.relist = true
}

// refetch breaks off the watch, so that a lost object is listed anew.
func (st *stream) refetch() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.interrupt != nil {
		st.interrupt()
	}
}

func (st *stream) mustList() bool {
	st.set.mu.Lock()
	fresh := st.set.synced && st.set.lost == nil
	st.set.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.relist || !fresh
}

// follow lists if it must and then watches until the upstream ends it.
func (st *stream) follow(ctx context.Context, c Credential) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st.mu.Lock()
	st.interrupt = cancel
	st.mu.Unlock()
	if st.mustList() {
		if err := st.list(ctx, c); err != nil {
			return err
		}
	}
	return st.watch(ctx, c)
}

func (st *stream) do(ctx context.Context, c Credential, query url.Values) (*http.Response, error) {
	target := url.URL{Scheme: "https", Host: "upstream", Path: st.set.scope.path(), RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", st.set.id, err)
	}
	req.Header.Set("Accept", accept)
	req.Header.Set("User-Agent", "yurthub")
	if query.Get("watch") == "" {
		// Lists are packed by the API server, watches never are.
		req.Header.Set("Accept-Encoding", "gzip")
	}
	rt := st.upstream.Node()
	if c.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.Token)
		rt = st.upstream.Bearer()
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", st.set.id, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close() //nolint:errcheck // nothing to lose
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	cause := errors.New("unexpected answer")
	switch resp.StatusCode {
	case http.StatusGone:
		cause = errGone
	case http.StatusUnauthorized:
		cause = errRefused
	case http.StatusForbidden:
		cause = errForbidden
	case http.StatusNotFound:
		cause = errAbsent
	}
	return nil, fmt.Errorf("ask for %s: %w: %s: %.200s", st.set.id, cause, resp.Status, text)
}

func encodingOf(h http.Header) (wire.Encoding, error) {
	media, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		return 0, fmt.Errorf("read content type %q: %w", h.Get("Content-Type"), err)
	}
	switch media {
	case "application/json":
		return wire.JSON, nil
	case "application/vnd.kubernetes.protobuf":
		return wire.Protobuf, nil
	}
	// A captive portal answers with HTML.
	return 0, fmt.Errorf("content type %q is not a Kubernetes answer", media)
}

// change is one difference that a relist found.
type change struct {
	typ    watch.EventType
	meta   wire.Meta
	object []byte
}

// list fetches the whole scope page by page. For a set that is not synced
// yet the objects go straight in; for a synced one the differences are
// collected first and then given to watchers in the order of their versions.
func (st *stream) list(ctx context.Context, c Credential) error {
	s := st.set
	s.mu.Lock()
	first := !s.synced
	s.mu.Unlock()
	var (
		seen    = map[string]struct{}{}
		changes []change
		token   string
		version uint64
	)
	st.metrics.relists.Inc()
	for {
		query := s.scope.query()
		query.Set("limit", strconv.Itoa(pageSize))
		if token != "" {
			query.Set("continue", token)
		}
		page, enc, err := st.page(ctx, c, query)
		if err != nil {
			return err
		}
		version = page.Version
		s.mu.Lock()
		if kindOf := itemKind(page); len(page.Items) > 0 || s.kind.Kind == "" {
			if s.kind.Encoding != 0 && s.kind.Encoding != enc && s.index.Len() > 0 {
				s.clearLocked()
				first = true
			}
			s.kind = Kind{APIVersion: page.APIVersion, Kind: kindOf, Encoding: enc}
		}
		for _, item := range page.Items {
			meta, err := wire.ReadMeta(enc, item, isPods(s.scope.Resource))
			if err != nil {
				s.mu.Unlock()
				return fmt.Errorf("read item of %s: %w", s.id, err)
			}
			key := keyOf(meta.Namespace, meta.Name)
			seen[key] = struct{}{}
			if s.heldVersionLocked(key) >= meta.Version {
				continue
			}
			object := slices.Clone(item)
			if first {
				s.applyLocked(watch.Added, &meta, object, meta.Version)
			} else {
				changes = append(changes, change{watch.Modified, meta, object})
			}
		}
		s.mu.Unlock()
		if first {
			// Bytes that are safe in the store need not stay on the heap.
			if err := s.flush(ctx); err != nil {
				st.metrics.storeErrors.Inc()
				st.log.Error("store write failed", "err", err)
			}
		}
		if token = page.Continue; token == "" {
			break
		}
	}
	st.finish(seen, changes, version)
	return nil
}

// finish applies a relist's differences and makes the set current.
func (st *stream) finish(seen map[string]struct{}, changes []change, version uint64) {
	s := st.set
	slices.SortFunc(changes, func(a, b change) int {
		switch {
		case a.meta.Version < b.meta.Version:
			return -1
		case a.meta.Version > b.meta.Version:
			return 1
		}
		return 0
	})
	s.mu.Lock()
	for _, ch := range changes {
		s.applyLocked(ch.typ, &ch.meta, ch.object, ch.meta.Version)
	}
	var gone []string
	s.index.Scan(func(key string, _ *entry) bool {
		if _, ok := seen[key]; !ok {
			gone = append(gone, key)
		}
		return true
	})
	for _, key := range gone {
		s.removeLocked(key, version)
	}
	s.version = max(s.version, version)
	s.contact, s.touched, s.lost = time.Now(), true, nil
	wasSynced := s.synced
	s.synced = true
	if !wasSynced {
		s.window.start = s.version
	}
	objects := s.index.Len()
	s.mu.Unlock()
	st.mu.Lock()
	st.relist = false
	st.mu.Unlock()
	if wasSynced {
		st.log.Info("stream relisted", "objects", objects, "changed", len(changes), "gone", len(gone))
	} else {
		st.log.Info("stream synced", "objects", objects)
	}
	st.readyOnce.Do(func() { close(st.ready) })
}

func (s *set) heldVersionLocked(key string) uint64 {
	if e, ok := s.bases[key]; ok {
		return e.version
	}
	if e, ok := s.index.Get(key); ok {
		return e.version
	}
	return 0
}

// clearLocked empties a set whose encoding changed under it.
func (s *set) clearLocked() {
	s.index.Scan(func(key string, _ *entry) bool {
		s.dirty[key] = struct{}{}
		return true
	})
	s.index.Clear()
	clear(s.bases)
	s.synced = false
	s.window = window{next: s.window.next}
	s.broadcast()
}

// removeLocked deletes an object of which only the absence is known.
func (s *set) removeLocked(key string, version uint64) {
	e, ok := s.bases[key]
	if !ok {
		e, ok = s.index.Get(key)
	}
	if !ok {
		return
	}
	object, err := s.readLocked(key, e)
	prev := s.keepLocked(key, e)
	delete(s.bases, key)
	s.index.Delete(key)
	s.dirty[key] = struct{}{}
	s.version = max(s.version, version)
	if err != nil {
		return // it was damaged, and no list has shown it since
	}
	if marked, err := wire.SetVersion(s.kind.Encoding, object, version); err == nil {
		object = marked
	}
	s.publishLocked(newEvent(watch.Deleted, key, prev, prev, s.kind, object))
}

func itemKind(l wire.List) string {
	const suffix = "List"
	if n := len(l.Kind) - len(suffix); n > 0 && l.Kind[n:] == suffix {
		return l.Kind[:n]
	}
	return l.Kind
}

// readBody reads an answer to its end, unpacking it where it was packed.
func readBody(resp *http.Response, limit int64) ([]byte, error) {
	var body io.Reader = resp.Body
	if resp.Header.Get("Content-Encoding") == "gzip" {
		unpacked, err := gzip.NewReader(resp.Body)
		if err != nil {
			return nil, fmt.Errorf("unpack: %w", err)
		}
		body = unpacked
	}
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("answer exceeds %d bytes", limit)
	}
	return data, err
}

func (st *stream) page(ctx context.Context, c Credential, query url.Values) (wire.List, wire.Encoding, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	resp, err := st.do(ctx, c, query)
	if err != nil {
		return wire.List{}, 0, err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end below
	body, err := readBody(resp, maxPage)
	if err != nil {
		return wire.List{}, 0, fmt.Errorf("read list of %s: %w", st.set.id, err)
	}
	enc, err := encodingOf(resp.Header)
	if err != nil {
		return wire.List{}, 0, fmt.Errorf("read list of %s: %w", st.set.id, err)
	}
	page, err := wire.ReadList(enc, body)
	if err != nil {
		return wire.List{}, 0, fmt.Errorf("read list of %s: %w", st.set.id, err)
	}
	return page, enc, nil
}

// watch follows the changes after the set's version.
func (st *stream) watch(ctx context.Context, c Credential) error {
	s := st.set
	s.mu.Lock()
	version := s.version
	s.mu.Unlock()
	query := s.scope.query()
	query.Set("watch", "true")
	query.Set("allowWatchBookmarks", "true")
	query.Set("resourceVersion", strconv.FormatUint(version, 10))
	query.Set("timeoutSeconds", strconv.Itoa(1800+rand.IntN(1800)))
	resp, err := st.do(ctx, c, query)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // a stream has no end to check
	enc, err := encodingOf(resp.Header)
	if err != nil {
		return err
	}
	s.mu.Lock()
	known := s.kind.Encoding
	if known == 0 {
		s.kind.Encoding, known = enc, enc
	}
	s.contact = time.Now()
	s.mu.Unlock()
	if enc != known {
		return fmt.Errorf("watch %s: encoding changed: %w", s.id, errGone)
	}
	events := wire.NewEventReader(resp.Body, enc, maxFrame)
	for {
		ev, err := events.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch %s: %w", s.id, err)
		}
		st.metrics.events.Inc()
		switch watch.EventType(ev.Type) {
		case watch.Added, watch.Modified, watch.Deleted:
			st.learnKind(ev)
			if err := s.apply(watch.EventType(ev.Type), ev.Object); err != nil {
				return err
			}
		case watch.Bookmark:
			version, _, err := wire.ReadBookmark(enc, ev.Object)
			if err != nil {
				return fmt.Errorf("watch %s: %w", s.id, err)
			}
			s.advance(version)
		case watch.Error:
			status, err := wire.ReadStatus(enc, ev.Object)
			if err != nil {
				return fmt.Errorf("watch %s: %w", s.id, err)
			}
			if status.Code == http.StatusGone {
				return fmt.Errorf("watch %s: %s: %w", s.id, status.Message, errGone)
			}
			return fmt.Errorf("watch %s: %s", s.id, status.Message)
		}
	}
}

func (st *stream) learnKind(ev wire.Event) {
	s := st.set
	s.mu.Lock()
	defer s.mu.Unlock()
	if ev.Kind != "" && s.kind.Kind != ev.Kind {
		s.kind.APIVersion, s.kind.Kind = ev.APIVersion, ev.Kind
	}
}
