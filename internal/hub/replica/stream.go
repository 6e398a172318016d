package replica

import (
	"cmp"
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
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/daemon"
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
	// A page of a list that breaks off has half as many objects when it is
	// asked for again, so that it comes through a link that does not hold for
	// long. Small pages pack badly, and the API server packs none below
	// 128 KiB.
	pageSize    = 500
	pageLeast   = 50
	pageSeconds = 5         // a page that takes no longer may be followed by a larger one
	maxPage     = 256 << 20 // bytes of one page of a list
	// pageStall is how long a page may stand still. On a narrow link it may
	// take long, but it moves.
	pageStall = time.Minute

	// listBurst and listsPerSecond bound how often all streams of a replica
	// begin a list, which costs the cloud much more than to resume a watch:
	// other nodes lost the cloud at the same moment, and have it back.
	listBurst      = 64
	listsPerSecond = 10
	maxFrame       = 16 << 20 // bytes of one watch event; etcd's limit is far below

	// shortFollow is a watch that ended too soon to call it in good order.
	shortFollow = time.Second
	// silentAfter is how long a watch may say nothing before the stream
	// looks whether the upstream still knows of its version. The API server
	// sends a bookmark every minute.
	silentAfter = 5 * time.Minute
	// revokeAfter is how long the node's own credential must be denied
	// before its data is dropped: an API server that has just started
	// denies everybody for a moment.
	revokeAfter = 30 * time.Second
	// maxRetryAfter bounds what an upstream may ask a stream to wait.
	maxRetryAfter = time.Minute

	accept = "application/vnd.kubernetes.protobuf, application/json"
)

// stream keeps one set current from the upstream.
type stream struct {
	set     *set
	cloud   Route
	router  Router        // nil: everything comes from the cloud
	lists   *rate.Limiter // of all streams of the replica
	log     *slog.Logger
	metrics *metrics

	mu         sync.Mutex // guards the following
	credential Credential
	usable     bool          // credential was offered and not refused since
	renewed    chan struct{} // closed when a credential is offered
	relist     bool          // the upstream cannot resume from the set's version
	interrupt  func()        // ends the current follow; nil before the first
	paused     bool          // nobody uses the set
	resumed    chan struct{} // closed when a paused stream is used again
	hurried    chan struct{} // holds a token when somebody waits for the next try
	attempt    *attempt      // the one under way
	anew       bool          // a list that broke off must not be gone on with
	ended      bool          // the stream was dropped
	end        func()        // ends supervise; nil before it runs

	// Supervise's own: a list that broke off between two pages, the way of the
	// attempt under way, the peers to pass by, until when, and whether one of
	// them had too short a history.
	begun   *relist
	route   Route
	avoided map[string]time.Time
	tooOld  bool
	// doubted says that a peer's word makes it doubtful whether the cloud still
	// is where the set is.
	doubted  bool
	failures map[string]int // of a peer, one after the other at once
	waits    time.Time      // until when a peer that syncs is waited for; zero: none was yet

	pinned bool   // guarded by the replica's mu: never paused
	owner  string // who opened it; "": the node, or a former life of the hub
}

// attempt is one try to make the set current.
type attempt struct {
	begun bool          // it asks already
	done  chan struct{} // closed when it has ended
	err   error         // nil when the set is synced; read after done
}

func newStream(s *set, cfg *Config, lists *rate.Limiter, m *metrics) *stream {
	cloud := Route{Upstream: cfg.Upstream, Kind: "cloud"}
	st := &stream{
		set: s, cloud: cloud, route: cloud, router: cfg.Router, lists: lists, metrics: m, log: cfg.Log.With("scope", s.id),
		renewed: make(chan struct{}), hurried: make(chan struct{}, 1), attempt: &attempt{done: make(chan struct{})},
	}
	s.onLost = st.refetch
	return st
}

// hurry returns the next attempt to end, which is made soon, and whether it
// has begun before.
func (st *stream) hurry() (a *attempt, begun bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.hurryLocked()
	return st.attempt, st.attempt.begun
}

func (st *stream) hurryLocked() {
	select {
	case st.hurried <- struct{}{}:
	default:
	}
}

// settle tells all who wait for the set how the attempt ended.
func (st *stream) settle(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.attempt.err = err
	close(st.attempt.done)
	st.attempt = &attempt{done: make(chan struct{})}
}

// offer gives the stream a credential that may read the scope. The node's
// own is kept in preference to a caller's.
func (st *stream) offer(c Credential) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.usable && (st.credential == Credential{} || st.credential == c) {
		return
	}
	st.offerLocked(c)
}

// reclaim offers the node's own credential if nobody has lent another. The
// node's rights may come back without anybody saying so.
func (st *stream) reclaim() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.usable {
		st.offerLocked(Credential{})
	}
}

func (st *stream) offerLocked(c Credential) {
	st.credential, st.usable = c, true
	st.set.mu.Lock()
	st.set.borrowed = c != Credential{}
	st.set.mu.Unlock()
	close(st.renewed)
	st.renewed = make(chan struct{})
	st.hurryLocked()
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

var (
	// errGone means that the upstream cannot resume from the set's version.
	errGone = errors.New("resource version too old")
	// errRefused means that the upstream does not let this credential read.
	errRefused = errors.New("refused")
	// errForbidden means that the upstream knows the credential and denies
	// it.
	errForbidden = fmt.Errorf("%w: forbidden", errRefused)
	// errAbsent means that the upstream does not serve this resource (now).
	errAbsent = errors.New("resource not served")
)

// laterError is an answer that names the time of the next try.
type laterError struct {
	error
	after time.Duration
}

func (e laterError) Unwrap() error { return e.error }

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

// stop ends the stream for good.
func (st *stream) stop() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.ended = true
	if st.end != nil {
		st.end()
	}
}

// supervise follows the upstream until ctx ends or the stream is stopped. It
// returns only then.
func (st *stream) supervise(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer st.settle(errors.New("the stream has ended"))
	st.mu.Lock()
	st.end = cancel
	if st.ended {
		cancel()
	}
	st.mu.Unlock()
	var (
		wait   backoff
		denied time.Time // since when the node's own credential is forbidden
	)
	for ctx.Err() == nil {
		st.waitUse(ctx)
		changed, ok := st.waitRoute(ctx)
		if ctx.Err() != nil {
			return
		}
		if !ok {
			continue
		}
		credential, err := st.waitCredential(ctx)
		if err != nil {
			return
		}
		if st.route.Peer != "" && credential != (Credential{}) {
			continue
		}
		started := time.Now()
		err = st.attempted(ctx, credential, changed)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errMoved) {
			continue
		}
		lasted := time.Since(started)
		if err == nil && lasted < shortFollow {
			err = errAtOnce
		}
		if !errors.Is(err, errForbidden) {
			denied = time.Time{}
		}
		if lasted > time.Minute || err == nil {
			wait.reset()
		}
		if err == nil {
			continue // the server ended the watch in good order
		}
		if st.route.Peer != "" {
			st.failed(ctx, err, lasted, &wait)
			continue // who waits for the set waits for another upstream
		}
		st.settle(err)
		st.judge(ctx, err, credential, &wait, &denied)
	}
}

// judge does what the cloud's refusal of an attempt asks for, and waits until
// the next. Denied is since when the node's own credential is forbidden.
func (st *stream) judge(ctx context.Context, err error, credential Credential, wait *backoff, denied *time.Time) {
	switch {
	case errors.Is(err, errRefused):
		st.log.Warn("stream refused", "err", err)
		st.refuse(credential)
		if credential != (Credential{}) {
			// Its owner's clients have a newer one by the time they
			// come back.
			st.set.recall()
			return
		}
		if errors.Is(err, errForbidden) {
			if denied.IsZero() {
				*denied = time.Now()
			}
			if time.Since(*denied) >= revokeAfter {
				st.set.revoke()
			}
		}
		wait.sleep(ctx, 0, st.hurried)
		st.reclaim()
		return
	case errors.Is(err, errGone):
		st.log.Debug("stream cannot resume", "err", err)
		st.forget()
		clear(st.avoided) // a peer's list will do as well
		st.tooOld, st.doubted = false, false
		if wait.first() {
			return
		}
	default:
		st.log.Debug("stream ended", "err", err)
	}
	if later, ok := errors.AsType[laterError](err); ok {
		wait.sleep(ctx, later.after, nil)
	} else {
		wait.sleep(ctx, 0, st.hurried)
	}
}

// attempted is follow, but that a panic is an error of this attempt only: an
// object that this hub has a bug with must not cost the node all the others.
// The set is listed anew then.
func (st *stream) attempted(ctx context.Context, c Credential, changed <-chan struct{}) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			st.log.Error("stream panicked", "cause", daemon.PanicCause(cause), "stack", string(debug.Stack()))
			st.forget()
			err = st.unread(fmt.Errorf("follow %s: panic: %s", st.set.id, daemon.PanicCause(cause)))
		}
	}()
	return st.follow(ctx, c, changed)
}

// backoff is a bounded, jittered, growing wait.
type backoff struct{ n int }

func (b *backoff) reset() { b.n = 0 }

// first counts a failure that needs no wait unless others went before.
func (b *backoff) first() bool {
	b.n++
	return b.n == 1
}

// sleep waits, at least for least, until ctx ends or early is closed.
func (b *backoff) sleep(ctx context.Context, least time.Duration, early <-chan struct{}) {
	const first, last = 100 * time.Millisecond, 15 * time.Second
	d := min(last, first<<min(b.n, 10))
	b.n++
	timer := time.NewTimer(max(least, d/2) + rand.N(d))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-early:
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
	st.anew = true
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
// It ends with errMoved when its route does; a list from the cloud is finished
// first.
func (st *stream) follow(ctx context.Context, c Credential, changed <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	select {
	case <-st.hurried: // this is the try
	default:
	}
	st.mu.Lock()
	st.interrupt, st.attempt.begun = cancel, true
	paused := st.paused
	st.mu.Unlock()
	if paused {
		return errPaused
	}
	if st.mustList() {
		if err := st.lists.Wait(ctx); err != nil {
			return fmt.Errorf("wait for the turn to list: %w", err)
		}
		if st.route.Peer != "" {
			return st.onRoute(ctx, changed, func(ctx context.Context) error { return st.watchList(ctx, c) })
		}
		if err := st.list(ctx, c); err != nil {
			return err
		}
	}
	if st.doubted && st.route.Peer == "" {
		if err := st.compare(ctx, c); err != nil {
			return err
		}
		st.doubted = false
	}
	st.settle(nil)
	return st.onRoute(ctx, changed, func(ctx context.Context) error { return st.watch(ctx, c) })
}

var errPaused = errors.New("paused")

func (st *stream) do(ctx context.Context, c Credential, query url.Values) (*http.Response, error) {
	target := url.URL{Scheme: "https", Host: "upstream", Path: st.set.scope.path(), RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", st.set.id, err)
	}
	req.Header.Set("Accept", accept)
	req.Header.Set("User-Agent", "yurthub")
	if query.Get("watch") == "" && st.route.Peer == "" {
		// Lists are packed by the API server, watches never are.
		req.Header.Set("Accept-Encoding", "gzip")
	}
	rt := st.route.Node()
	if c.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.Token)
		rt = st.route.Bearer()
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", st.set.id, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // what came of it serves
	cause := errors.New("unexpected answer")
	if st.route.Peer != "" {
		cause = errAnswered // a peer's word on rights is not the cloud's
		switch {
		case resp.StatusCode == http.StatusGone:
			cause = errGone
		case resp.StatusCode == http.StatusGatewayTimeout:
			cause = errBehind
		case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") != "":
			cause = errSyncing
		}
		return nil, fmt.Errorf("ask for %s: %w: %s: %.200q", st.set.id, cause, resp.Status, text)
	}
	switch resp.StatusCode {
	case http.StatusGone:
		cause = errGone
	case http.StatusUnauthorized:
		cause = errRefused
	case http.StatusForbidden:
		cause = errRefused
		if isStatus(resp.Header, text) {
			cause = errForbidden
		}
	case http.StatusNotFound:
		cause = errAbsent
	}
	err = fmt.Errorf("ask for %s: %w: %s: %.200q", st.set.id, cause, resp.Status, text)
	if seconds, parseErr := strconv.Atoi(resp.Header.Get("Retry-After")); parseErr == nil && seconds > 0 {
		err = laterError{err, min(time.Duration(seconds)*time.Second, maxRetryAfter)}
	}
	return nil, err
}

// isStatus tells an API server's refusal from that of something on the way.
func isStatus(h http.Header, body []byte) bool {
	enc, err := encodingOf(h)
	if err != nil {
		return false
	}
	_, kind, _, err := wire.ReadObject(enc, body)
	return err == nil && kind == "Status"
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

// relist is a list on its way into a set.
type relist struct {
	// direct is set when nobody reads the set yet: objects go straight in.
	// Else the differences are collected first, and given to watchers in
	// the order of their versions.
	direct bool
	// credential is that of the first page; another may not go on with it.
	credential Credential
	next       string // the continue token of the next page
	limit      int    // objects of the next page
	// replace is set when what the set holds cannot be compared with the
	// list: its encoding is another, or the cloud's history was taken back.
	replace bool
	pages   int
	kind    Kind
	version uint64
	seen    map[string]struct{}
	changes []change
}

// list fetches the whole scope from the cloud, page by page. What broke off goes
// on after the last page that came, as long as the cloud knows its token.
func (st *stream) list(ctx context.Context, c Credential) error {
	s := st.set
	st.mu.Lock()
	r, anew := st.begun, st.anew
	st.anew = false
	st.mu.Unlock()
	if r == nil || anew || r.credential != c {
		r = &relist{credential: c, limit: pageSize, seen: map[string]struct{}{}}
		st.metrics.relists.Inc()
	}
	var saving sync.WaitGroup // of the page before, while the next one comes
	defer saving.Wait()
	for r.pages == 0 || r.next != "" {
		st.begun = r
		query := s.scope.query()
		query.Set("limit", strconv.Itoa(r.limit))
		if r.next != "" {
			query.Set("continue", r.next)
		}
		started := time.Now()
		page, enc, err := st.page(ctx, c, query)
		if err != nil {
			r.limit = max(r.limit/2, pageLeast)
			if errors.Is(err, errGone) || errors.Is(err, errRefused) {
				st.begun = nil
			}
			return err
		}
		if time.Since(started) <= pageSeconds*time.Second {
			r.limit = min(2*r.limit, pageSize)
		}
		st.begun = nil // what cannot be taken is not asked for again
		if page.Version == 0 {
			// Aggregated APIs and componentstatuses are computed, not
			// stored: nothing would tell when they change.
			return fmt.Errorf("list %s: it has no resource version: %w", s.id, errAbsent)
		}
		r.next = page.Continue
		saving.Wait()
		if err := s.take(r, page, enc); err != nil {
			return fmt.Errorf("list %s: %w", s.id, err)
		}
		if r.direct && r.next != "" {
			saving.Go(func() { st.save(ctx) }) // bytes in the store need not stay on the heap
		}
	}
	st.begun = nil
	saving.Wait()
	st.listed(ctx, r)
	return nil
}

// listed makes the set what a list that has come to its end says.
func (st *stream) listed(ctx context.Context, r *relist) {
	objects, gone := st.set.finish(r)
	// Whoever waits for the scope may count on it from then on, also when
	// the power goes. Lists are rare enough to pay for that; changes are not.
	st.save(ctx)
	st.mu.Lock()
	st.relist = false
	st.mu.Unlock()
	if r.direct {
		st.log.Info("stream synced", "objects", objects)
	} else {
		st.log.Info("stream relisted", "objects", objects, "changed", len(r.changes), "gone", gone)
	}
}

// save writes what the set has to write, now. What cannot be written stays on
// the heap and is tried again.
func (st *stream) save(ctx context.Context) {
	if err := st.set.flush(ctx); err != nil && ctx.Err() == nil {
		st.metrics.storeErrors.Inc()
		st.log.Error("store write failed", "err", err)
	}
}

// take takes one page of a list.
func (s *set) take(r *relist, page wire.List, enc wire.Encoding) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.pages++
	if r.pages == 1 {
		s.beginLocked(r, Kind{APIVersion: page.APIVersion, Kind: itemKind(page), Encoding: enc}, page.Version)
	}
	if enc != r.kind.Encoding {
		return fmt.Errorf("page %d is %s, the first was %s", r.pages, enc, r.kind.Encoding)
	}
	r.version = page.Version
	if enc == wire.JSON && r.pages == 1 && len(page.Items) > 0 {
		// The list kind of a custom resource may have any name.
		if apiVersion, kind, _, err := wire.ReadObject(enc, page.Items[0]); err == nil {
			r.kind.APIVersion, r.kind.Kind = apiVersion, kind
		}
	}
	if r.direct && r.pages == 1 {
		if r.replace {
			s.clearLocked()
		}
		s.kind = r.kind
	}
	for _, item := range page.Items {
		meta, err := wire.ReadMeta(enc, item, isPods(s.scope.Resource))
		if err != nil {
			return err
		}
		if s.wantsLocked(r, &meta) {
			s.takeLocked(r, &meta, slices.Clone(item)) // the page is large and goes
		}
	}
	return nil
}

// wantsLocked takes note of an object of a list, and reports whether the set
// lacks it.
func (s *set) wantsLocked(r *relist, meta *wire.Meta) bool {
	key := keyOf(meta.Namespace, meta.Name)
	r.seen[key] = struct{}{}
	base, ok := s.baseLocked(key)
	return !ok || base.version < meta.Version || (r.replace && !r.direct)
}

// takeLocked takes an object of a list that the set lacks.
func (s *set) takeLocked(r *relist, meta *wire.Meta, object []byte) {
	if r.direct {
		s.applyLocked(watch.Added, meta, object, meta.Version)
	} else {
		r.changes = append(r.changes, change{watch.Modified, *meta, object})
	}
}

// beginLocked compares what a list begins with, and the version that it will
// have, with what the set holds.
func (s *set) beginLocked(r *relist, kind Kind, version uint64) {
	rewound := version < s.version
	reencoded := s.index.Len() > 0 && s.kind.Encoding != kind.Encoding
	r.direct, r.replace, r.kind = !s.synced, rewound || reencoded, kind
}

// finish applies what a list found and makes the set current. It returns how
// many objects there are and how many are gone.
func (s *set) finish(r *relist) (objects, gone int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !r.direct && r.replace {
		before := s.version
		s.clearLocked()
		if r.version < before {
			s.window.lost = before
		}
		s.kind = r.kind
		r.direct = true // nobody reads it just now
	}
	if len(r.seen) > 0 || s.kind.Kind == "" || s.kind.Encoding != r.kind.Encoding {
		s.kind = r.kind
	}
	if !r.direct && s.absentLocked() {
		s.returnedLocked(r.version)
	}
	from := s.version
	slices.SortFunc(r.changes, func(a, b change) int { return cmp.Compare(a.meta.Version, b.meta.Version) })
	newest := r.changes
	for len(newest) > 0 && newest[0].meta.Version < r.version {
		// A copy: the window keeps its metadata, and must not keep by that all
		// objects that the list brought.
		ch := newest[0]
		s.applyLocked(ch.typ, &ch.meta, ch.object, ch.meta.Version)
		newest = newest[1:]
	}
	// What is gone shares one version, since when exactly is not known. A
	// client that was told of some of it and comes back must be told of the
	// rest: only the last event carries the version itself.
	lost := s.missingLocked(r.seen)
	for i, key := range lost {
		shown := r.version - 1
		if i == len(lost)-1 && len(newest) == 0 {
			shown = r.version
		}
		s.removeLocked(key, r.version, shown)
	}
	for _, ch := range newest {
		s.applyLocked(ch.typ, &ch.meta, ch.object, ch.meta.Version)
	}
	s.moveLocked(r.version)
	s.provedLocked()
	s.touched, s.lost = true, nil
	if s.synced {
		s.window.skip(from, s.version)
		s.broadcast()
	} else {
		s.window.start = s.version
	}
	s.synced = true
	return s.index.Len(), len(lost)
}

// missingLocked returns the keys that a list has not shown.
func (s *set) missingLocked(seen map[string]struct{}) []string {
	var out []string
	s.index.Scan(func(key string, _ *entry) bool {
		if _, ok := seen[key]; !ok {
			out = append(out, key)
		}
		return true
	})
	return out
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

// moving is a body that tells of each piece that comes, and how it ended.
type moving struct {
	io.ReadCloser
	moved func()
	count prometheus.Counter // of its bytes; nil: nobody counts
	err   error
}

func (m *moving) Read(p []byte) (n int, err error) {
	n, m.err = m.ReadCloser.Read(p)
	if n > 0 {
		m.moved()
		if m.count != nil {
			m.count.Add(float64(n))
		}
	}
	return n, m.err
}

// counter counts what comes by the stream's route, nil if nobody does.
func (st *stream) counter() prometheus.Counter {
	if !st.route.Shared {
		return nil
	}
	return st.metrics.shared.WithLabelValues(st.route.Kind)
}

func (st *stream) page(ctx context.Context, c Credential, query url.Values) (wire.List, wire.Encoding, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(pageStall, func() { cancel(fmt.Errorf("nothing came for %s", pageStall)) })
	defer stalled.Stop()
	resp, err := st.do(ctx, c, query)
	if err != nil {
		return wire.List{}, 0, err
	}
	defer resp.Body.Close()
	resp.Body = &moving{ReadCloser: resp.Body, moved: func() { stalled.Reset(pageStall) }, count: st.counter()}
	body, err := readBody(resp, maxPage)
	if err != nil {
		return wire.List{}, 0, fmt.Errorf("read list of %s: %w", st.set.id, err)
	}
	enc, err := encodingOf(resp.Header)
	if err != nil {
		return wire.List{}, 0, fmt.Errorf("read list of %s: %w", st.set.id, st.unread(err))
	}
	page, err := wire.ReadList(enc, body)
	if err == nil && page.Version == 0 {
		err = errors.New("a list without a resource version cannot be followed")
	}
	if err != nil {
		return wire.List{}, 0, fmt.Errorf("read list of %s: %w", st.set.id, st.unread(err))
	}
	return page, enc, nil
}

// watch follows the changes after the set's version.
func (st *stream) watch(ctx context.Context, c Credential) error {
	s := st.set
	if err := st.returned(ctx, c); err != nil {
		return err
	}
	s.mu.Lock()
	version := s.version
	s.mu.Unlock()
	query := s.scope.query()
	query.Set("resourceVersion", strconv.FormatUint(version, 10))
	f, err := st.feed(ctx, c, query)
	if err != nil {
		return err
	}
	defer f.close()
	return st.changes(ctx, c, f, version)
}

// changes follows a watch that goes on after a version.
func (st *stream) changes(ctx context.Context, c Credential, f *feed, version uint64) error {
	s := st.set
	defer s.unfollowed()
	s.mu.Lock()
	s.followed = true
	known := s.kind.Encoding
	s.provedLocked()
	s.mu.Unlock()
	st.log.Debug("stream follows", "version", version)
	streams := st.metrics.streams.WithLabelValues(st.route.Kind)
	streams.Inc()
	defer streams.Dec()
	if f.enc != known {
		cause := errGone
		if st.route.Peer != "" {
			cause = errAnswered
		}
		return fmt.Errorf("watch %s: it is %s, the replica is %s: %w", s.id, f.enc, known, cause)
	}
	f.patience = silentAfter
	for {
		ev, err := f.next()
		switch {
		case errors.Is(err, errSilent) && st.route.Peer == "":
			return st.compare(ctx, c)
		case errors.Is(err, io.EOF):
			return nil
		case err == nil:
			st.metrics.events.Inc()
			err = st.event(f.enc, ev, version)
		}
		if err != nil {
			return fmt.Errorf("watch %s: %w", s.id, err)
		}
	}
}

// event takes one event of a watch that began after a version.
func (st *stream) event(enc wire.Encoding, ev wire.Event, began uint64) error {
	switch typ := watch.EventType(ev.Type); typ {
	case watch.Added, watch.Modified, watch.Deleted:
		if err := st.fits(enc, ev); err != nil {
			return err
		}
		st.learnKind(ev)
		return st.set.apply(typ, ev.Object)
	case watch.Bookmark:
		version, _, err := wire.ReadBookmark(enc, ev.Object)
		if err != nil {
			return st.unread(err)
		}
		if version < began {
			return fmt.Errorf("bookmark at %d after %d: %w", version, began, errGone)
		}
		st.set.advance(version)
	case watch.Error:
		return st.refusal(enc, ev)
	default:
		if st.route.Peer != "" {
			return fmt.Errorf("event of type %q: %w", ev.Type, errAnswered)
		}
	}
	return nil
}

// refusal is what an ERROR event says.
func (st *stream) refusal(enc wire.Encoding, ev wire.Event) error {
	status, err := wire.ReadStatus(enc, ev.Object)
	if err != nil {
		return st.unread(err)
	}
	if status.Code == http.StatusGone {
		return fmt.Errorf("%s: %w", status.Message, errGone)
	}
	return st.unread(errors.New(status.Message))
}

// compare looks whether the upstream still is where the set is. A cloud that
// was restored from a backup is not: it says nothing on a watch that begins
// in its future.
func (st *stream) compare(ctx context.Context, c Credential) error {
	query := st.set.scope.query()
	query.Set("limit", "1")
	page, _, err := st.page(ctx, c, query)
	if err != nil {
		return err
	}
	if at := st.set.at(); page.Version < at {
		return fmt.Errorf("the cloud is at %d, the replica at %d: %w", page.Version, at, errGone)
	}
	return nil
}

func (st *stream) learnKind(ev wire.Event) {
	s := st.set
	s.mu.Lock()
	defer s.mu.Unlock()
	if ev.Kind != "" && s.kind.Kind != ev.Kind {
		s.kind.APIVersion, s.kind.Kind = ev.APIVersion, ev.Kind
	}
}
