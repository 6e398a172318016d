package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testKey = bytes.Repeat([]byte{7}, 32)

func formatOf(enc wire.Encoding) request.Format { return request.Format{Encoding: enc} }

// bed is a replica under test, its store and its cloud. It lives in a
// synctest bubble.
type bed struct {
	*Replica
	t     *testing.T
	cloud *cloud
	path  string
	store *store.Store
	stop  func() // ends Run, which writes what is left
	crash func() // ends Run without a last write
	conf  func(*Config)

	local   bool     // clients are shown what the node puts over the cloud's state
	watches []func() // end the watches of the clients, as a stopping server does
}

func newBed(t *testing.T, conf func(*Config)) *bed {
	t.Helper()
	b := &bed{t: t, cloud: newCloud(t), path: t.TempDir() + "/store", conf: conf}
	b.open()
	return b
}

func (b *bed) open() {
	b.t.Helper()
	s, err := store.Open(b.t.Context(), store.Config{Path: b.path, Key: testKey})
	if err != nil {
		b.t.Fatal(err)
	}
	cfg := Config{
		Store: s, Upstream: b.cloud, Online: b.cloud.online,
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	if b.conf != nil {
		b.conf(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx); err != nil {
			b.t.Error(err)
		}
	}()
	b.Replica, b.store = r, s
	end := sync.OnceFunc(func() {
		cancel()
		<-done
		for _, end := range b.watches {
			end()
		}
		b.watches = nil
		if err := s.Close(); err != nil {
			b.t.Error(err)
		}
	})
	b.stop = end
	b.crash = func() {
		// What is on disk now is what a power cut leaves.
		b.t.Helper()
		text, err := os.ReadFile(b.path)
		if err != nil {
			b.t.Fatal(err)
		}
		end()
		if err := os.WriteFile(b.path, text, 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *bed) restart() {
	b.t.Helper()
	b.stop()
	b.open()
}

// sync opens a scope and waits until it is held.
func (b *bed) sync(scope Scope) *Slice {
	b.t.Helper()
	sl, err := b.Open(b.t.Context(), scope, Credential{}, "")
	if err != nil {
		b.t.Fatal(err)
	}
	return sl
}

func (b *bed) held(scope Scope) *Slice {
	b.t.Helper()
	sl, ok := b.Held(scope)
	if !ok {
		b.t.Fatalf("%s is not held", scope.ID())
	}
	return sl
}

func ask(t testing.TB, target string) (*http.Request, request.Info) {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, target, nil)
	info, err := request.Resolve(r)
	if err != nil {
		t.Fatal(err)
	}
	return r, info
}

// list reads the slice in its own encoding, by key: the value of each object
// is its data.
func list(t testing.TB, sl *Slice) (map[string]string, uint64, error) {
	t.Helper()
	r, _ := ask(t, sl.scope.path())
	w := httptest.NewRecorder()
	enc := sl.stream.set.encoding()
	if err := sl.List(w, r, []request.Format{formatOf(enc)}); err != nil {
		return nil, 0, err
	}
	l, err := wire.ReadList(enc, w.Body.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, item := range l.Items {
		m, err := wire.ReadMeta(enc, item, false)
		if err != nil {
			t.Fatal(err)
		}
		out[keyOf(m.Namespace, m.Name)] = string(item)
	}
	return out, l.Version, nil
}

// equals compares what a client has with what the cloud had.
func (b *bed) equals(what string, got map[string]string, want map[string]*thing) {
	b.t.Helper()
	for key, th := range want {
		if got[key] != string(th.data(b.t)) {
			b.t.Fatalf("%s: %s is not at %d: %.60q", what, key, th.version, got[key])
		}
	}
	for key := range got {
		if want[key] == nil {
			b.t.Fatalf("%s: %s should not be there", what, key)
		}
	}
}

// current fails unless the slice equals the cloud as it is now.
func (b *bed) current(sl *Slice) {
	b.t.Helper()
	got, version, err := list(b.t, sl)
	if err != nil {
		b.t.Fatal(err)
	}
	if version > b.cloud.at() {
		b.t.Fatalf("list is at %d, the cloud at %d", version, b.cloud.at())
	}
	b.equals("list of "+sl.scope.ID(), got, b.cloud.state(sl.scope, b.cloud.at()))
}

// client is a local watcher that keeps what it is told.
type client struct {
	bed   *bed
	scope Scope
	end   func()

	mu      sync.Mutex // guards all below
	local   bool       // there are overlays
	blank   bool       // it does not know what there was when it began
	state   map[string]string
	handled map[string]string // as the handlers of an informer were told
	uids    map[string]string
	log     []string // "TYPE key@version"
	version uint64
	closed  bool
	err     error
}

// watch starts a watch after a version; 0 begins with what there is.
func (b *bed) watch(sl *Slice, version uint64) *client {
	c := &client{
		bed: b, scope: sl.scope, state: map[string]string{}, handled: map[string]string{}, uids: map[string]string{},
		version: version, blank: version > 0, local: b.local,
	}
	c.follow(sl, version)
	return c
}

// inform lists and then watches, as informers do.
func (b *bed) inform(sl *Slice) *client {
	b.t.Helper()
	c := &client{bed: b, scope: sl.scope, handled: map[string]string{}, local: b.local}
	c.relist(sl)
	return c
}

func (c *client) relist(sl *Slice) {
	c.bed.t.Helper()
	state, version, err := list(c.bed.t, sl)
	if err != nil {
		c.bed.t.Fatal(err)
	}
	c.mu.Lock()
	enc := sl.stream.set.encoding()
	for key, data := range state {
		c.handle(enc, key, data)
	}
	c.state, c.uids, c.version = state, map[string]string{}, version
	for key, data := range state {
		m, err := wire.ReadMeta(enc, []byte(data), false)
		if err != nil {
			c.bed.t.Fatal(err)
		}
		c.uids[key] = m.UID
	}
	maps.DeleteFunc(c.handled, func(key, _ string) bool { return state[key] == "" })
	c.mu.Unlock()
	c.follow(sl, version)
}

// handle tells the handlers of an object, as an informer does: not where it has
// the version that the informer knows already.
func (c *client) handle(enc wire.Encoding, key, data string) {
	if old, ok := c.state[key]; ok {
		was, err := wire.ReadMeta(enc, []byte(old), false)
		is, err2 := wire.ReadMeta(enc, []byte(data), false)
		if err := errors.Join(err, err2); err != nil {
			c.bed.t.Errorf("object: %v", err)
		}
		if was.Version == is.Version {
			return
		}
	}
	c.handled[key] = data
}

func (c *client) follow(sl *Slice, version uint64) {
	target := c.scope.path() + "?watch=true&allowWatchBookmarks=true"
	if version > 0 {
		target += fmt.Sprintf("&resourceVersion=%d", version)
	}
	r, info := ask(c.bed.t, target)
	ctx, cancel := context.WithCancel(c.bed.t.Context())
	pr, pw := io.Pipe()
	c.end = func() { cancel(); _ = pr.Close() }
	c.bed.watches = append(c.bed.watches, c.end)
	c.closed = false
	enc := sl.stream.set.encoding()
	w := &pipeWriter{header: http.Header{}, PipeWriter: pw}
	go func() {
		err := sl.Watch(w, r.WithContext(ctx), info, []request.Format{formatOf(enc)})
		cancel()
		_ = pw.CloseWithError(errors.Join(io.EOF, err))
		c.mu.Lock()
		c.closed, c.err = true, err
		c.mu.Unlock()
	}()
	go func() {
		events := wire.NewEventReader(pr, enc, 1<<24)
		for {
			ev, err := events.Read()
			if err != nil {
				return
			}
			c.take(enc, ev)
		}
	}()
}

// take checks an event against what the client has.
func (c *client) take(enc wire.Encoding, ev wire.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.bed.t
	m, err := wire.ReadMeta(enc, ev.Object, false)
	if err != nil {
		t.Errorf("event: %v", err)
		return
	}
	if ev.Type == "BOOKMARK" {
		c.version = max(c.version, m.Version)
		return
	}
	key := keyOf(m.Namespace, m.Name)
	c.log = append(c.log, fmt.Sprintf("%s %s@%d", ev.Type, key, m.Version))
	_, has := c.state[key]
	if has == (ev.Type == "ADDED") && !c.blank {
		t.Errorf("%s: %s of %s, which it has: %v", c.scope.ID(), ev.Type, key, has)
	}
	if ev.Type == "DELETED" {
		delete(c.state, key)
		delete(c.handled, key)
	} else {
		c.handle(enc, key, string(ev.Object))
		if has && c.uids[key] != m.UID {
			t.Errorf("%s became another object by %s", key, ev.Type)
		}
		c.state[key], c.uids[key] = string(ev.Object), m.UID
	}
	if c.version == 0 {
		return // it began with what there is, in the order of names
	}
	if c.local && m.Version <= c.version {
		return // an overlay has its object's version
	}
	if m.Version < c.version {
		t.Errorf("%s: %s %s@%d after %d", c.scope.ID(), ev.Type, key, m.Version, c.version)
	}
	c.version = m.Version
}

// settled waits for the bubble to come to rest and returns the events since
// the last call.
func (c *client) settled() []string {
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.log
	c.log = nil
	return out
}

func (c *client) has() map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.state)
}

func (c *client) isClosed() bool {
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *client) wasTold() map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.handled)
}

type pipeWriter struct {
	*io.PipeWriter
	header http.Header
}

func (w *pipeWriter) Header() http.Header { return w.header }
func (w *pipeWriter) WriteHeader(int)     {}
func (w *pipeWriter) Flush()              {}

func wantLog(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("events:\n  %s\nwant:\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// pass moves the bubble's clock and lets everything come to rest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}
