package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// TestPeersShareOneTruth has hubs follow the cloud and each other, and change
// their minds at any moment, while the cloud changes, is cut off and forgets
// its history, and hubs die. Whatever a hub shows at a version is what the
// cloud had at that version.
func TestPeersShareOneTruth(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newPeers(t, seed).run() })
		})
	}
}

// peers are hubs with one cloud.
type peers struct {
	t     *testing.T
	rng   *rand.Rand
	cloud *cloud
	hubs  []*sharing
}

// sharing is a hub whose upstream the test chooses.
type sharing struct {
	*history

	peers *peers
	name  string

	mu      sync.Mutex // guards the following
	on      string     // whom it follows; empty: the cloud
	moved   chan struct{}
	deaf    bool // nobody gets an answer from it
	refuses bool // it serves nothing
	refused int
	lies    bool // it lists what it has, whatever it is asked for
	syncing bool // it says that it does not hold anything yet
	// garbage is what it answers instead, of what type.
	garbage func(info request.Info) (media string, body []byte)
	onWire  func(n int) // is told of bytes that it serves
	calls   map[*call]struct{}
	listed  int // lists that it has served to others
	expired int // watches that it had no history for
}

type call struct{ cancel func() }

func newPeers(t *testing.T, seed uint64) *peers {
	p := &peers{t: t, rng: rand.New(rand.NewPCG(seed, 3)), cloud: newCloud(t)}
	for i := range 3 {
		h := &sharing{peers: p, name: fmt.Sprintf("hub-%d", i), moved: make(chan struct{}), calls: map[*call]struct{}{}}
		p.hubs = append(p.hubs, h)
		b := newBed(t, func(cfg *Config) {
			cfg.Upstream, cfg.Online, cfg.Router = p.cloud, p.cloud.online, h.route
		})
		b.cloud = p.cloud
		h.history = &history{bed: b, rng: p.rng, scopes: []Scope{configMaps, widgets, {Resource: configMaps.Resource, Labels: "color=red"}}}
	}
	return p
}

func (p *peers) hub(name string) *sharing {
	for _, h := range p.hubs {
		if h.name == name {
			return h
		}
	}
	return nil
}

// route is the hub's router: where the test says, past those to be avoided.
func (h *sharing) route(_ Scope, avoid func(string) bool) (Route, bool, <-chan struct{}) {
	h.mu.Lock()
	on, moved := h.on, h.moved
	h.mu.Unlock()
	cloud := Route{Upstream: h.peers.cloud, Kind: "cloud"}
	other := true
	if on != "" && avoid(on) {
		if h.peers.cloud.online() {
			return cloud, true, moved
		}
		other = false
	}
	if on == "" {
		return cloud, true, moved
	}
	return Route{
		Upstream: peerOf{h.peers.hub(on)}, Peer: on, Kind: "peer",
		Contact: time.Now, Live: func() bool { return true },
	}, other, moved
}

// follow makes the hub follow another, or the cloud.
func (h *sharing) moveTo(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if name == h.name {
		name = ""
	}
	h.on = name
	close(h.moved)
	h.moved = make(chan struct{})
}

// hangUp ends all that the hub serves to others, and lets it be deaf or not.
func (h *sharing) hangUp(deaf bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deaf = deaf
	for c := range h.calls {
		c.cancel()
	}
}

// peerOf is a hub as the stream of another sees it, over a wire in memory.
type peerOf struct{ *sharing }

func (p peerOf) Node() http.RoundTripper      { return p }
func (p peerOf) Bearer() http.RoundTripper    { return p }
func (p peerOf) WaitUp(context.Context) error { return nil }

func (p peerOf) RoundTrip(r *http.Request) (*http.Response, error) {
	h := p.sharing
	if r.Header.Get("Authorization") != "" {
		h.t.Error("a token was shown to a peer")
	}
	ctx, cancel := context.WithCancel(r.Context())
	c := &call{cancel}
	h.mu.Lock()
	deaf, lies := h.deaf, h.lies
	var replica *Replica
	if !deaf { // else it may be about to start anew
		replica = h.Replica
	}
	h.calls[c] = struct{}{}
	h.mu.Unlock()
	end := func() {
		cancel()
		h.mu.Lock()
		delete(h.calls, c)
		h.mu.Unlock()
	}
	if deaf {
		end()
		return nil, errors.New("connection refused")
	}
	r = r.WithContext(ctx)
	info, err := request.Resolve(r)
	if err != nil {
		h.t.Fatal(err)
	}
	answer := func(code int, header http.Header, body io.Reader) (*http.Response, error) {
		end()
		return &http.Response{StatusCode: code, Status: http.StatusText(code), Header: header, Body: io.NopCloser(body)}, nil
	}
	h.mu.Lock()
	refuses, syncing, garbage, onWire := h.refuses, h.syncing, h.garbage, h.onWire
	if refuses || syncing || garbage != nil {
		h.refused++
	}
	h.mu.Unlock()
	switch {
	case refuses:
		return answer(http.StatusTooManyRequests, http.Header{}, http.NoBody)
	case syncing:
		return answer(http.StatusServiceUnavailable, http.Header{"Retry-After": {"1"}}, http.NoBody)
	case garbage != nil:
		media, body := garbage(info)
		return answer(http.StatusOK, http.Header{"Content-Type": {media}}, bytes.NewReader(body))
	}
	held, ok := replica.Held(ScopeOf(info))
	if !ok || held.Borrowed() {
		return answer(http.StatusServiceUnavailable, http.Header{}, http.NoBody)
	}
	held = held.Base()
	enc := held.stream.set.encoding()
	if info.Verb != "watch" {
		h.t.Errorf("a peer was asked for %s", r.URL)
	}
	if info.Options.SendInitialEvents != nil {
		if lies {
			info.Options.ResourceVersion = ""
		}
		h.mu.Lock()
		h.listed++
		h.mu.Unlock()
	}
	pr, pw := io.Pipe()
	began := make(chan error, 2)
	w := &announced{&pipeWriter{header: http.Header{}, PipeWriter: pw}, began, onWire}
	go func() {
		defer end()
		err := held.Watch(w, r, info, []request.Format{formatOf(enc)})
		began <- err
		if errors.Is(err, ErrExpired) {
			h.mu.Lock()
			h.expired++
			h.mu.Unlock()
			gone := apierrors.NewResourceExpired(err.Error())
			_, _ = pw.Write(wire.AppendStatusEvent(nil, enc, &gone.ErrStatus))
		}
		_ = pw.CloseWithError(ctx.Err()) // nil: in good order
	}()
	context.AfterFunc(ctx, func() { _ = pr.CloseWithError(context.Canceled) })
	switch err := <-began; {
	case errors.Is(err, ErrAhead):
		return answer(http.StatusGatewayTimeout, http.Header{}, http.NoBody)
	case err != nil && !errors.Is(err, ErrExpired):
		return answer(http.StatusServiceUnavailable, http.Header{}, http.NoBody)
	}
	header := http.Header{"Content-Type": {form{Format: request.Format{Encoding: enc}}.contentType(true)}}
	return &http.Response{StatusCode: http.StatusOK, Header: header, Body: pr}, nil
}

// announced tells when an answer begins, and how large it is.
type announced struct {
	*pipeWriter
	began  chan<- error
	onWire func(n int)
}

func (w *announced) WriteHeader(int) { w.began <- nil }

func (w *announced) Write(b []byte) (int, error) {
	if w.onWire != nil {
		w.onWire(len(b))
	}
	return w.pipeWriter.Write(b)
}

func (p *peers) run() {
	defer func() {
		for _, h := range p.hubs {
			for _, c := range h.clients {
				c.end()
			}
			h.hangUp(true)
		}
		for _, h := range p.hubs {
			h.stop()
		}
	}()
	for range p.rng.IntN(40) {
		p.hubs[0].change([]string{"configmaps", "widgets"}[p.rng.IntN(2)])
	}
	for i, h := range p.hubs {
		if i > 0 && p.rng.IntN(2) == 0 {
			h.moveTo(p.hubs[0].name) // its first list is the peer's
		}
		for _, scope := range []Scope{configMaps, widgets} {
			pin(h.bed, scope)
		}
		for _, scope := range h.scopes {
			h.clients = append(h.clients, h.inform(h.held(scope)))
		}
	}
	for range 150 {
		p.step()
		for _, h := range p.hubs {
			h.comeBack()
			h.truth()
		}
	}
	p.cloud.heal()
	for _, h := range p.hubs {
		h.hangUp(false)
		h.moveTo("")
	}
	pass(2 * time.Minute)
	for i, h := range p.hubs[1:] {
		h.moveTo(p.hubs[i].name) // a chain
	}
	p.hubs[0].change("configmaps")
	p.hubs[0].change("widgets")
	pass(2 * time.Minute)
	for _, h := range p.hubs {
		for range 3 {
			h.comeBack()
		}
		synctest.Wait()
		for i, scope := range h.scopes {
			h.current(h.held(scope))
			h.equals(fmt.Sprintf("%s, client of %s", h.name, scope.ID()), h.clients[i].has(), p.cloud.state(scope, p.cloud.at()))
		}
	}
}

func (p *peers) step() {
	h := p.hubs[p.rng.IntN(len(p.hubs))]
	switch n := p.rng.IntN(100); {
	case n < 50:
		h.change([]string{"configmaps", "widgets"}[p.rng.IntN(2)])
	case n < 65:
		h.moveTo(append([]string{""}, p.hubs[0].name, p.hubs[1].name, p.hubs[2].name)[p.rng.IntN(4)])
	case n < 70:
		p.cloud.cut()
	case n < 79:
		p.cloud.heal()
	case n < 82:
		p.cloud.compact()
	case n < 86:
		h.hangUp(p.rng.IntN(3) == 0)
	case n < 88:
		h.hangUp(true)
		if p.rng.IntN(2) == 0 {
			h.crash()
			h.checkStore()
			h.open()
		} else {
			h.restart()
		}
		h.hangUp(false)
	case n < 97:
		pass(time.Duration(p.rng.Int64N(int64(3 * time.Second))))
	default:
		pass(time.Duration(p.rng.Int64N(int64(2 * time.Minute))))
	}
	if p.rng.IntN(2) == 0 {
		synctest.Wait()
	}
}

// truth compares what the hub holds at its version, whatever that is, with
// what the cloud had then.
func (h *sharing) truth() {
	h.t.Helper()
	for _, scope := range h.scopes {
		sl, ok := h.Held(scope)
		if !ok {
			continue
		}
		got, version, err := list(h.t, sl)
		if errors.Is(err, errNotSynced) {
			continue
		}
		if err != nil {
			h.t.Fatal(err)
		}
		if at := h.peers.cloud.at(); version > at {
			h.t.Fatalf("%s is at %d, the cloud at %d", h.name, version, at)
		}
		h.equals(fmt.Sprintf("%s, %s at %d", h.name, scope.ID(), version), got, h.peers.cloud.state(scope, version))
	}
}

// shareTwo returns a leader and its follower, both synced.
func shareTwo(t *testing.T, overlay OverlayFunc) (*peers, *sharing, *sharing) {
	t.Helper()
	p := newPeers(t, 1)
	p.hubs[2].stop()
	p.hubs = p.hubs[:2]
	leader, follower := p.hubs[0], p.hubs[1]
	if overlay != nil {
		with := leader.conf
		leader.conf = func(cfg *Config) { with(cfg); cfg.Overlay = overlay }
		leader.restart()
	}
	p.cloud.put("configmaps", "ns", "a", "1", nil)
	follower.moveTo(leader.name)
	for _, h := range p.hubs {
		pin(h.bed, configMaps)
	}
	return p, leader, follower
}

func (p *peers) stop() {
	for _, h := range p.hubs {
		h.hangUp(true)
	}
	for _, h := range p.hubs {
		h.stop()
	}
}

// TestFollowerMovesUnnoticed moves a follower while its watcher watches: to the
// cloud, back, and to a leader that has started anew and has no history.
func TestFollowerMovesUnnoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, leader, follower := shareTwo(t, nil)
		defer p.stop()
		lists := func() int {
			p.cloud.mu.Lock()
			defer p.cloud.mu.Unlock()
			return p.cloud.lists
		}
		before, served := lists(), leader.listed
		if before != 1 || served != 1 {
			t.Fatalf("for two hubs the cloud was listed %d times, the leader %d times", before, served)
		}
		c := follower.watch(follower.held(configMaps), follower.held(configMaps).Version())
		defer c.end()
		change := func(value string) {
			t.Helper()
			th := p.cloud.put("configmaps", "ns", "a", value, nil)
			pass(3 * time.Second)
			wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/a@%d", th))
		}
		change("by the leader")
		follower.moveTo("")
		change("by the cloud")
		follower.moveTo(leader.name)
		change("by the leader again")
		leader.hangUp(true)
		follower.moveTo("")
		change("the leader is dead")
		leader.restart() // its window is empty
		leader.hangUp(false)
		follower.moveTo(leader.name)
		change("the leader is back")
		if lists() != before || leader.listed != served || c.isClosed() {
			t.Errorf("%d lists of the cloud, %d of the leader, watch ended: %v", lists()-before, leader.listed-served, c.isClosed())
		}
	})
}

// TestPeersSeeNoOverlay: what a node shows to its own clients in place of the
// cloud's objects is not for others.
func TestPeersSeeNoOverlay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var on bool
		p, leader, follower := shareTwo(t, func(_ schema.GroupVersionResource, _ string, _ Kind, base []byte) ([]byte, bool) {
			return []byte(strings.ReplaceAll(string(base), "value", "eulav")), on
		})
		defer p.stop()
		refresh := func(show bool) {
			t.Helper()
			on = show
			if err := leader.Refresh(configMaps.Resource, "ns", "a"); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		local := leader.watch(leader.held(configMaps), leader.held(configMaps).Version())
		defer local.end()
		local.local = true
		distant := follower.watch(follower.held(configMaps), follower.held(configMaps).Version())
		defer distant.end()
		synctest.Wait() // who begins in the midst of it may be told twice
		refresh(true)
		if got := local.settled(); len(got) != 1 {
			t.Fatalf("the node's own client was told %v", got)
		}
		second := p.cloud.put("configmaps", "ns", "a", "2", nil)
		synctest.Wait()
		follower.truth()
		wantLog(t, distant.settled(), fmt.Sprintf("MODIFIED ns/a@%d", second))
		held := leader.held(configMaps)
		base, _, err := list(t, held.Base())
		if err != nil {
			t.Fatal(err)
		}
		leader.equals("what peers list", base, p.cloud.state(configMaps, p.cloud.at()))
		own, _, err := list(t, held)
		if err != nil || own["ns/a"] == base["ns/a"] {
			t.Fatalf("the node's own clients see no overlay: %v", err)
		}
		refresh(false)
		p.cloud.remove("configmaps", "ns", "a")
		synctest.Wait()
		if got := distant.settled(); len(got) != 1 || !strings.HasPrefix(got[0], "DELETED ns/a") {
			t.Errorf("the follower's client was told %v", got)
		}
		follower.truth()
	})
}

// TestABehindPeerTakesNothingBack has a follower that knows more than the
// leader it comes to.
func TestABehindPeerTakesNothingBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, leader, follower := shareTwo(t, nil)
		defer p.stop()
		follower.moveTo("")
		pass(time.Second)
		// The leader follows the follower, which follows it: both hear nothing.
		leader.moveTo(follower.name)
		follower.hangUp(true)
		pass(time.Second)
		p.cloud.put("configmaps", "ns", "b", "new", nil)
		pass(time.Second)
		at := follower.held(configMaps).Version()
		if leader.held(configMaps).Version() >= at {
			t.Fatal("the leader is not behind")
		}
		p.cloud.cut()
		follower.moveTo(leader.name)
		for _, lies := range []bool{false, true} {
			leader.mu.Lock()
			leader.lies = lies
			leader.mu.Unlock()
			follower.held(configMaps).stream.forget() // even a list
			leader.hangUp(false)
			pass(time.Minute)
		}
		if now := follower.held(configMaps).Version(); now < at {
			t.Fatalf("the follower went back from %d to %d", at, now)
		}
		follower.truth()
		follower.hangUp(false)
		pass(time.Minute)
		if now := leader.held(configMaps).Version(); now != at {
			t.Errorf("the leader did not learn from its follower: it is at %d of %d", now, at)
		}
		leader.truth()
	})
}

// TestFollowerOfARestoredCloud: a leader that started anew after the cloud was
// restored from a backup knows nothing of the lost history, and has nothing to
// say to a follower that is still there.
func TestFollowerOfARestoredCloud(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, leader, follower := shareTwo(t, nil)
		defer p.stop()
		backup := p.cloud.at()
		for range 20 {
			p.cloud.put("configmaps", "ns", "a", "2", nil)
		}
		p.cloud.put("configmaps", "ns", "b", "1", nil)
		pass(time.Second)
		leader.hangUp(true)
		p.cloud.rewind(backup)
		p.cloud.put("configmaps", "ns", "c", "1", nil)
		pass(silentAfter + time.Minute)
		leader.current(leader.held(configMaps))
		leader.restart()
		leader.hangUp(false)
		pass(silentAfter + 2*time.Minute)
		follower.current(follower.held(configMaps))
		p.cloud.put("configmaps", "ns", "d", "1", nil)
		pass(2 * time.Minute)
		follower.current(follower.held(configMaps))
	})
}

// TestLeaderThatListedLater: a hub that listed from the cloud a moment before
// its leader did has no place in the leader's history. The next change brings it
// there, and it follows the leader within seconds, without a list.
func TestLeaderThatListedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPeers(t, 1)
		p.hubs[2].stop()
		p.hubs = p.hubs[:2]
		defer p.stop()
		leader, follower := p.hubs[0], p.hubs[1]
		p.cloud.put("configmaps", "ns", "a", "1", nil)
		pin(follower.bed, configMaps)
		p.cloud.put("widgets", "ns", "w", "1", nil) // the cloud moves on, and the follower hears nothing of it
		pin(leader.bed, configMaps)
		follower.moveTo(leader.name)
		pass(time.Second)
		if leader.expired == 0 || leader.serves() != 0 {
			t.Fatalf("the leader had the history of %d watches, and serves %d", leader.expired, leader.serves())
		}
		p.cloud.put("configmaps", "ns", "b", "1", nil)
		pass(2 * avoidFor)
		if leader.serves() == 0 {
			t.Error("the follower is still with the cloud")
		}
		follower.current(follower.held(configMaps))
		if lists := testutil.ToFloat64(follower.metrics.relists); leader.listed != 0 || lists != 1 {
			t.Errorf("the leader was listed %d times, and the follower has listed %.0f times", leader.listed, lists)
		}
	})
}

// serves is how many requests of others are in flight at the hub.
func (h *sharing) serves() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.calls)
}

// TestLeaderThatServesNothing: a follower does not ask the cloud every few
// seconds for what its leader lacks.
func TestLeaderThatServesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, leader, follower := shareTwo(t, nil)
		defer p.stop()
		leader.mu.Lock()
		leader.refuses = true
		leader.mu.Unlock()
		leader.hangUp(false)
		pass(time.Hour)
		leader.mu.Lock()
		defer leader.mu.Unlock()
		if leader.refused == 0 || leader.refused > 25 {
			t.Errorf("the leader was asked %d times in an hour", leader.refused)
		}
		follower.current(follower.held(configMaps))
	})
}

// TestLeaderThatServesGarbage: what cannot be read counts as not served, be it
// the first list or a watch, and nothing of it stays.
func TestLeaderThatServesGarbage(t *testing.T) {
	const protobuf = "application/vnd.kubernetes.protobuf;stream=watch"
	good := (&thing{resource: "configmaps", namespace: "ns", name: "never", uid: "x", version: 1 << 40}).data(t)
	nameless := (&thing{resource: "configmaps", version: 1 << 40}).data(t)
	event := func(typ, apiVersion, kind string, object []byte) []byte {
		return wire.AppendEvent(nil, wire.Protobuf, typ, apiVersion, kind, object)
	}
	added := event("ADDED", "v1", "ConfigMap", good)
	failure := apierrors.NewInternalError(errors.New("broken"))
	end := wire.AppendBookmark(nil, wire.Protobuf, "v1", "ConfigMap", 1<<41, true)
	for name, answer := range map[string]struct {
		media string
		body  []byte
	}{
		"a page for people":              {"text/html", []byte("<html>")},
		"no type":                        {"", added},
		"nothing":                        {protobuf, nil},
		"noise":                          {protobuf, bytes.Repeat([]byte("noise"), 1000)},
		"a frame beyond all bounds":      {protobuf, []byte{0xff, 0xff, 0xff, 0xff}},
		"half a frame":                   {protobuf, added[:len(added)/2]},
		"a good one and half a frame":    {protobuf, append(bytes.Clone(added), added[:9]...)},
		"another kind":                   {protobuf, append(event("ADDED", "v1", "Secret", good), end...)},
		"another group":                  {protobuf, append(event("ADDED", "apps/v1", "ConfigMap", good), end...)},
		"an object that cannot be read":  {protobuf, append(event("ADDED", "v1", "ConfigMap", []byte("noise")), end...)},
		"an object without a name":       {protobuf, append(event("ADDED", "v1", "ConfigMap", nameless), end...)},
		"an event of no known type":      {protobuf, append(event("CHANGED", "v1", "ConfigMap", good), end...)},
		"a bookmark that cannot be read": {protobuf, event("BOOKMARK", "v1", "ConfigMap", []byte("noise"))},
		"an error":                       {protobuf, wire.AppendStatusEvent(nil, wire.Protobuf, &failure.ErrStatus)},
		"an error that cannot be read":   {protobuf, event("ERROR", "v1", "Status", []byte("noise"))},
		"text where there was none":      {"application/json;stream=watch", []byte("{}")},
	} {
		for _, first := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, first list %v", name, first), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := newPeers(t, 1)
					p.hubs[2].stop()
					p.hubs = p.hubs[:2]
					defer p.stop()
					leader, follower := p.hubs[0], p.hubs[1]
					p.cloud.put("configmaps", "ns", "a", "1", nil)
					pin(leader.bed, configMaps)
					follower.moveTo(leader.name)
					if !first {
						pin(follower.bed, configMaps)
					}
					serve := func(garbage func(request.Info) (string, []byte)) {
						leader.mu.Lock()
						leader.garbage = garbage
						leader.mu.Unlock()
						leader.hangUp(false)
					}
					serve(func(info request.Info) (string, []byte) {
						if info.Options.SendInitialEvents == nil {
							return answer.media, bytes.TrimPrefix(answer.body, added) // would be a lie
						}
						return answer.media, answer.body
					})
					if first {
						pin(follower.bed, configMaps)
					}
					p.cloud.put("configmaps", "ns", "b", "1", nil)
					pass(time.Minute)
					follower.current(follower.held(configMaps))
					pass(time.Hour)
					leader.mu.Lock()
					if leader.refused == 0 || leader.refused > 25 {
						t.Errorf("the leader was asked %d times in an hour", leader.refused)
					}
					leader.mu.Unlock()
					serve(nil)
					pass(avoidMost * 3 / 2)
					leader.mu.Lock()
					if len(leader.calls) != 1 {
						t.Errorf("the leader is well again, and serves %d streams", len(leader.calls))
					}
					leader.mu.Unlock()
					p.cloud.put("configmaps", "ns", "c", "1", nil)
					pass(time.Second)
					follower.current(follower.held(configMaps))
				})
			})
		}
	}
}

// TestFollowerWaitsForALeaderThatSyncs: what a leader is about to hold is not
// fetched from the cloud a second time, unless it never comes.
func TestFollowerWaitsForALeaderThatSyncs(t *testing.T) {
	for _, forever := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p := newPeers(t, 1)
			p.hubs[2].stop()
			p.hubs = p.hubs[:2]
			defer p.stop()
			leader, follower := p.hubs[0], p.hubs[1]
			p.cloud.put("configmaps", "ns", "a", "1", nil)
			pin(leader.bed, configMaps)
			leader.syncing = true
			follower.moveTo(leader.name)
			if err := follower.Pin(configMaps); err != nil {
				t.Fatal(err)
			}
			pass(syncPatience - time.Second)
			if _, ok := follower.Held(configMaps); ok {
				t.Fatal("the follower did not wait for its leader")
			}
			if !forever {
				leader.mu.Lock()
				leader.syncing = false
				leader.mu.Unlock()
			}
			pass(syncPatience + 30*time.Second)
			follower.current(follower.held(configMaps))
			if lists, _ := p.cloud.counts(); (lists > 1) != forever {
				t.Errorf("a leader that syncs for ever: %v; the cloud was listed %d times", forever, lists)
			}
		})
	}
}

// TestFirstSyncFromAPeerTakesLittleMemory: neither end holds more of what a
// peer sends than a few pieces.
func TestFirstSyncFromAPeerTakesLittleMemory(t *testing.T) {
	const objects, size, most = 4000, 12 << 10, 5 * saveEvery
	p := newPeers(t, 1)
	p.hubs[2].stop()
	p.hubs = p.hubs[:2]
	defer p.stop()
	leader, follower := p.hubs[0], p.hubs[1]
	value := strings.Repeat("value ", size/6)
	for i := range objects {
		p.cloud.put("configmaps", "ns", fmt.Sprintf("object-%05d", i), value, nil)
	}
	if err := leader.Pin(configMaps); err != nil {
		t.Fatal(err)
	}
	leader.sync(configMaps)
	live := func() int {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	sent, seen, before, peak := 0, 0, live(), 0
	leader.onWire = func(n int) { // called by one at a time: there is one scope
		if sent += n; sent-seen > saveEvery/4 {
			seen, peak = sent, max(peak, live()-before)
		}
	}
	follower.moveTo(leader.name)
	if err := follower.Pin(configMaps); err != nil {
		t.Fatal(err)
	}
	if got := follower.sync(configMaps).Len(); got != objects || sent < objects*size {
		t.Fatalf("%d objects came, %d bytes", got, sent)
	}
	t.Logf("%d MB came, %d KB were held at most", sent>>20, peak>>10)
	if peak > most {
		t.Errorf("of %d MB %d KB were held at a time, more than %d KB", sent>>20, peak>>10, most>>10)
	}
}

// TestPeersAreNotShownARelist: in the midst of what a relist found a set is
// nothing that the cloud ever had, and a peer could go away with that.
func TestPeersAreNotShownARelist(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, leader, _ := shareTwo(t, nil)
		defer p.stop()
		for _, name := range []string{"b", "c", "d"} {
			p.cloud.put("configmaps", "ns", name, "1", nil)
		}
		synctest.Wait()
		held := leader.held(configMaps)
		before := held.Version()
		peer, own := leader.watch(held.Base(), before), leader.watch(held, before)
		defer peer.end()
		defer own.end()
		p.cloud.cut()
		p.cloud.remove("configmaps", "ns", "b")
		p.cloud.put("configmaps", "ns", "c", "2", nil)
		p.cloud.remove("configmaps", "ns", "d")
		p.cloud.compact()
		p.cloud.heal()
		pass(time.Minute)
		if got := own.settled(); len(got) != 3 {
			t.Fatalf("the node's own client was told %v", got)
		}
		if got := peer.settled(); len(got) != 0 || !peer.isClosed() {
			t.Errorf("a peer was told %v, its watch ended: %v", got, peer.isClosed())
		}
		for version := before; version < held.Version(); version++ {
			c := leader.watch(held.Base(), version)
			if !c.isClosed() || !errors.Is(c.err, ErrExpired) {
				t.Errorf("a peer at %d is told what happened until %d: %v", version, held.Version(), c.err)
			}
			c.end()
		}
		c := leader.watch(held.Base(), held.Version())
		defer c.end()
		last := p.cloud.put("configmaps", "ns", "c", "3", nil)
		wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/c@%d", last))
	})
}
