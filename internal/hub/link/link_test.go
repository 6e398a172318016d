package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// eager are budgets within which no test waits for what it shows to come in
// another way than the one it is about. How soon things happen in seconds is
// measured in test/links, where nothing else runs.
func eager(c *Config) {
	c.Budgets = Budgets{Idle: time.Minute, Patience: time.Minute, Connect: 2 * time.Second, Answer: 2 * time.Second, Stall: 200 * time.Millisecond}
}

func hello(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }

func TestRefusedIsSeenAtOnceAndTheReturnToo(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, hello)
	w := newWire(t, u.addr())
	r := newRig(t, ca, func(c *Config) {
		c.Budgets = Budgets{Idle: time.Minute, Patience: time.Minute, Connect: time.Minute, Answer: time.Minute, Stall: time.Minute}
	}, w.addr)
	r.waitUp(t)
	if _, err := nodeGet(t, r, "/api"); err != nil {
		t.Fatal(err)
	}

	w.refuse()
	if _, err := nodeGet(t, r, "/api"); err == nil {
		t.Error("a request passed a cut wire")
	}
	r.waitDown(t)
	if s := r.State(); s.Up || !strings.Contains(s.Reason, "refused") {
		t.Errorf("state %+v", s)
	}
	if _, err := nodeGet(t, r, "/api"); !errors.Is(err, ErrDown) {
		t.Errorf("request while down: %v", err)
	}

	w.heal(t)
	r.waitUp(t)
	if body, err := nodeGet(t, r, "/api"); err != nil || body != "hello" {
		t.Errorf("got %q, %v", body, err)
	}
	want := `# HELP node_yurthub_link_changes_total How often the link went up or down.
# TYPE node_yurthub_link_changes_total counter
node_yurthub_link_changes_total 3
`
	if err := testutil.GatherAndCompare(r.registry, strings.NewReader(want), "node_yurthub_link_changes_total"); err != nil {
		t.Error(err)
	}
}

// TestManyNodesReturnApart cuts many hubs off at the same moment. They are all
// back within two seconds of the cloud's return, and not all at once. Other
// tests may hold up a return, though not each of some; what the handshakes cost
// on busy processors shows when all begin.
func TestManyNodesReturnApart(t *testing.T) {
	t.Parallel()
	const nodes, returns = 60, 4
	ca := newAuthority(t)
	w := newWire(t, newUpstream(t, ca, hello).addr())
	begun := time.Now()
	rigs := make([]*rig, nodes)
	for i := range rigs {
		rigs[i] = newRig(t, ca, nil, w.addr)
	}
	for _, r := range rigs {
		r.waitUp(t)
	}
	within := 2*time.Second + 2*time.Since(begun)
	var err error
	for range returns {
		if err = returnApart(t, w, rigs, within); err == nil {
			return
		}
		t.Log(err)
	}
	t.Error(err)
}

func returnApart(t *testing.T, w *wire, rigs []*rig, within time.Duration) error {
	t.Helper()
	const slot = 100 * time.Millisecond
	w.refuse()
	for _, r := range rigs {
		r.suspect(0)
	}
	for _, r := range rigs {
		r.waitDown(t)
	}
	w.heal(t)
	begun := time.Now()
	back := make([]time.Duration, len(rigs))
	var wg sync.WaitGroup
	for i, r := range rigs {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if err := r.WaitUp(ctx); err != nil {
				t.Error(err)
			}
			back[i] = time.Since(begun)
		})
	}
	wg.Wait()
	perSlot := map[time.Duration]int{}
	most := 0
	for _, d := range back {
		perSlot[d/slot]++
		most = max(most, perSlot[d/slot])
	}
	last := slices.Max(back)
	t.Logf("%d nodes were back within %s, at most %d of them in %s", len(rigs), last, most, slot)
	if last > within || most > len(rigs)/3 {
		return fmt.Errorf("the last was back after %s, not %s, %d of %d within the same %s", last, within, most, len(rigs), slot)
	}
	return nil
}

func TestBlackHoleIsSeenByAWaitingRequest(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, hello)
	w := newWire(t, u.addr())
	r := newRig(t, ca, eager, w.addr)
	r.waitUp(t)
	if _, err := nodeGet(t, r, "/api"); err != nil {
		t.Fatal(err)
	}

	w.blackhole()
	// The relay still accepts, as a middle box may: it is the probe's
	// handshake that fails.
	if _, err := nodeGet(t, r, "/api"); !errors.Is(err, ErrDown) {
		t.Errorf("request in a black hole: %v", err)
	}
	if r.Online() {
		t.Error("still up")
	}
	w.heal(t)
	r.waitUp(t)
}

func TestIdleBlackHoleIsSeenByPings(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	started := make(chan struct{}, 1)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		started <- struct{}{}
		<-r.Context().Done()
	})
	for name, path := range map[string]string{"with a watch": "/api/v1/pods?watch=true", "with nothing": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWire(t, u.addr())
			r := newRig(t, ca, func(c *Config) {
				c.Budgets = Budgets{
					Idle: 300 * time.Millisecond, Ping: 300 * time.Millisecond,
					Stall: 300 * time.Millisecond, Connect: 2 * time.Second, Answer: 2 * time.Second,
				}
			}, w.addr)
			r.waitUp(t)
			if path != "" {
				resp, err := r.Node().RoundTrip(newRequest(t, path))
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = resp.Body.Close() }()
				receive(t, started)
			}
			w.blackhole()
			r.waitDown(t)
		})
	}
}

func TestIdleLinkCostsLittle(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, hello)
	idle := 200 * time.Millisecond
	r := newRig(t, ca, func(c *Config) {
		c.Budgets.Idle, c.Budgets.Ping, c.Budgets.Stall = idle, idle, patience
	}, u.addr())
	r.waitUp(t)
	waitFor(t, func() bool { return u.asked.Load() >= 2 }) // a pooled connection is open now
	from, in, dials := r.traffic[node].Written(), r.traffic[node].Read(), u.dials.Load()
	begun := time.Now()
	const pings = 5
	for last, n := from, 0; n < pings; {
		waitFor(t, func() bool { return r.traffic[node].Written() > last })
		last = r.traffic[node].Written()
		n++
	}
	took := time.Since(begun)
	each := (r.traffic[node].Written() - from + r.traffic[node].Read() - in) / pings
	t.Logf("%d bytes per ping", each)
	if each > 200 {
		t.Errorf("%d bytes per ping", each)
	}
	if took < (pings-2)*idle {
		t.Errorf("%d pings in %s", pings, took)
	}
	if u.dials.Load() != dials {
		t.Errorf("%d connections made while idle", u.dials.Load()-dials)
	}
}

// TestNothingToSayIsNoSilence: a connection on which something was sent that
// needs no answer is not suspected, since the other end's kernel has it. Each
// suspicion would cost a handshake.
func TestNothingToSayIsNoSilence(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		_ = c.EnableFullDuplex()
		_ = c.Flush()
		_, _ = io.Copy(io.Discard, r.Body)
	})
	r := newRig(t, ca, func(c *Config) {
		c.Budgets.Idle, c.Budgets.Ping, c.Budgets.Stall = patience, patience, 50*time.Millisecond
	}, u.addr())
	r.waitUp(t)
	body, send := io.Pipe()
	req := newRequest(t, "/api?watch=1")
	req.Method, req.Body = http.MethodPost, body
	resp, err := r.Node().RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	defer send.Close()
	if _, err := io.WriteString(send, "nothing to say to that"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		return r.lanes.Load().those(func(c *closer) bool { return c.conn != nil && c.conn.waits(c.conn.link.cfg.Budgets.Stall) }) != nil
	})
	probed := func() (at time.Time, suspected bool) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.tracker.servers[0].probed, r.tracker.servers[0].suspected
	}
	waitFor(t, func() bool { _, suspected := probed(); return !suspected }) // its beginning may have been slow
	before, _ := probed()
	r.sweepOnce()
	if at, suspected := probed(); suspected || !at.Equal(before) {
		t.Error("the connection is suspected")
	}
}

func TestSlowAnswerIsNoCut(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	release := make(chan struct{})
	u := newUpstream(t, ca, func(w http.ResponseWriter, _ *http.Request) { <-release })
	r := newRig(t, ca, func(c *Config) { c.Budgets.Stall = 50 * time.Millisecond }, u.addr())
	r.waitUp(t)
	asked := u.asked.Load()
	errs := make(chan error, 1)
	go func() { _, err := nodeGet(t, r, "/api"); errs <- err }()
	t.Cleanup(func() { close(release) })
	waitFor(t, func() bool { return u.asked.Load() > asked })
	release <- struct{}{}
	if err := receive(t, errs); err != nil {
		t.Error(err)
	}
	if s := r.State(); !s.Up {
		t.Errorf("state %+v", s)
	}
}

func TestWhoIsNoAPIServerIsNotUp(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	quick := func(c *Config) { c.Budgets.Retry = 20 * time.Millisecond }
	portal := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>Welcome to the hotel</html>")
	})
	fail := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "etcd failed", http.StatusInternalServerError)
	})

	t.Run("page", func(t *testing.T) {
		t.Parallel()
		u := newUpstream(t, ca, hello)
		u.ready.Store(&portal)
		r := newRig(t, ca, quick, u.addr())
		waitFor(t, func() bool { return u.asked.Load() >= 3 })
		r.waitReason(t, "not like an API server")
		u.ready.Store(nil)
		r.waitUp(t)
	})
	t.Run("not ready", func(t *testing.T) {
		t.Parallel()
		u := newUpstream(t, ca, hello)
		u.ready.Store(&fail)
		r := newRig(t, ca, quick, u.addr())
		waitFor(t, func() bool { return u.asked.Load() >= 3 })
		r.waitReason(t, "500")
	})
	t.Run("too busy to be ready", func(t *testing.T) {
		t.Parallel()
		u := newUpstream(t, ca, hello)
		r := newRig(t, ca, quick, u.addr())
		r.waitUp(t)
		busy := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "[+]ping ok\n[-]etcd failed: reason withheld\nreadyz check failed", http.StatusInternalServerError)
		})
		u.ready.Store(&busy)
		r.suspect(0)
		waitFor(t, func() bool { return r.Weak() })
		asked := u.asked.Load()
		waitFor(t, func() bool { return u.asked.Load() >= asked+unwellMost+1 })
		if !r.Online() || !r.Weak() {
			t.Error("the server serves, and was left for saying that it has too much to do")
		}
		u.ready.Store(nil)
		waitFor(t, func() bool { return !r.Weak() })
	})
	t.Run("certificate", func(t *testing.T) {
		t.Parallel()
		u := newUpstream(t, newAuthority(t), hello)
		r := newRig(t, ca, quick, u.addr())
		waitFor(t, func() bool { return u.dials.Load() >= 3 })
		r.waitReason(t, "certificate")
	})
	t.Run("anonymous refused", func(t *testing.T) {
		t.Parallel()
		u := newUpstream(t, ca, hello)
		unauthorized := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1"}`)
		})
		u.ready.Store(&unauthorized)
		newRig(t, ca, quick, u.addr()).waitUp(t)
	})
}

func TestRequestsMoveToAnotherServer(t *testing.T) { //nolint:tparallel // the subtests cut and heal one wire
	t.Parallel()
	ca := newAuthority(t)
	name := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			_, _ = io.WriteString(w, s+string(body))
		}
	}
	a, b := newUpstream(t, ca, name("a")), newUpstream(t, ca, name("b"))
	wa := newWire(t, a.addr())
	for _, mode := range []Mode{RoundRobin, Priority} {
		t.Run(string(mode), func(t *testing.T) {
			wa.heal(t)
			r := newRig(t, ca, func(c *Config) { c.Mode = mode }, wa.addr, b.addr())
			waitFor(t, func() bool { return r.servers[0].healthy.Load() && r.servers[1].healthy.Load() })
			seen := map[string]int{}
			for range 6 {
				body, err := nodeGet(t, r, "/")
				if err != nil {
					t.Fatal(err)
				}
				seen[body]++
			}
			if mode == RoundRobin && (seen["a"] != 3 || seen["b"] != 3) || mode == Priority && seen["a"] != 6 {
				t.Errorf("requests went to %v", seen)
			}
			wa.refuse()
			// No connection is pooled now, so nothing can have been sent
			// to the first server: each request, and its body, moves on.
			r.ClientChanged()
			for range 4 {
				req, err := http.NewRequest(http.MethodPost, "https://any/", io.NopCloser(strings.NewReader("!")))
				if err != nil {
					t.Fatal(err)
				}
				resp, err := r.Node().RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil || string(body) != "b!" {
					t.Errorf("got %q, %v", body, err)
				}
			}
			if !r.Online() {
				t.Error("link is down with a healthy server")
			}
			waitFor(t, func() bool { return !r.servers[0].healthy.Load() })
		})
	}
}

func TestCredentialsOfConnections(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		who := r.Header.Get("Authorization")
		for _, c := range r.TLS.PeerCertificates {
			who += c.Subject.CommonName
		}
		_, _ = io.WriteString(w, who+" "+r.Proto)
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	for _, tc := range []struct {
		name string
		rt   http.RoundTripper
		path string
		want string
	}{
		{"node", r.Node(), "/api", "system:node:edge-1 HTTP/1.1"},
		{"node stream", r.Node(), "/api/v1/pods?watch=1", "system:node:edge-1 HTTP/2.0"},
		{"bearer", r.Bearer(), "/api", "Bearer t HTTP/1.1"},
		{"bearer stream", r.Bearer(), "/api/v1/watch/pods", "Bearer t HTTP/2.0"},
	} {
		req := newRequest(t, tc.path)
		if strings.HasPrefix(tc.name, "bearer") {
			req.Header.Set("Authorization", "Bearer t")
		}
		if got, err := read(tc.rt.RoundTrip(req)); err != nil || got != tc.want {
			t.Errorf("%s: got %q, %v, want %q", tc.name, got, err, tc.want)
		}
	}

	r.cert.Store(ca.client(t, "system:node:renewed"))
	r.ClientChanged()
	for path, want := range map[string]string{
		"/api":                    "system:node:renewed HTTP/1.1",
		"/api/v1/pods?watch=true": "system:node:renewed HTTP/2.0",
	} {
		if got, err := nodeGet(t, r, path); err != nil || got != want {
			t.Errorf("after the change: got %q, %v, want %q", got, err, want)
		}
	}
	if n, b := r.Traffic(); n.Read() == 0 || n.Written() == 0 || b.Read() == 0 || b.Written() == 0 {
		t.Error("traffic is not counted")
	}
}

func TestMissingCertificateIsNoCut(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, hello)
	r := newRig(t, ca, func(c *Config) {
		c.ClientCertificate = func() (*tls.Certificate, error) { return nil, errors.New("not bootstrapped") }
	}, u.addr())
	r.waitUp(t)
	if _, err := nodeGet(t, r, "/api"); err == nil || !strings.Contains(err.Error(), "not bootstrapped") {
		t.Errorf("got %v", err)
	}
	if got, err := read(r.Bearer().RoundTrip(newRequest(t, "/api"))); err != nil || got != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	if !r.Online() {
		t.Error("down")
	}
}

// TestDownEndsStreams cuts the link without a word: what was on the way ends
// with it, long before a ping would find out. That includes a stream from
// before the client certificate was renewed.
func TestDownEndsStreams(t *testing.T) {
	t.Parallel()
	for name, renewed := range map[string]bool{"same certificate": false, "renewed since": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca := newAuthority(t)
			u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.WriteString(w, "event")
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
			})
			w := newWire(t, u.addr())
			r := newRig(t, ca, eager, w.addr)
			r.waitUp(t)
			resp, err := r.Node().RoundTrip(newRequest(t, "/api/v1/pods?watch=true"))
			if err != nil {
				t.Fatal(err)
			}
			if renewed {
				r.ClientChanged()
			}
			w.blackhole()
			r.suspect(0)
			r.waitDown(t)
			const soon = userTimeout / 2
			slow := time.AfterFunc(soon, func() {
				t.Errorf("the stream goes on %s after the link went down", soon)
				_ = resp.Body.Close()
			})
			defer slow.Stop()
			body, err := io.ReadAll(resp.Body)
			if string(body) != "event" || err == nil {
				t.Errorf("stream ended with %q, %v", body, err)
			}
		})
	}
}

func TestNewRefusesBadConfig(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]Config{
		"no server": {},
		"http":      {Servers: urls("http://10.0.0.1:6443")},
		"no host":   {Servers: urls("https:///x")},
		"mode":      {Servers: urls("https://10.0.0.1:6443"), Mode: "random"},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	l, err := New(Config{Servers: urls("https://cloud")})
	if err != nil || l.servers[0].addr != "cloud:443" {
		t.Errorf("got %v, %v", l, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.WaitUp(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("WaitUp returned %v", err)
	}
}

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

func newRequest(t testing.TB, path string) *http.Request {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://any"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

func nodeGet(t testing.TB, r *rig, path string) (string, error) {
	t.Helper()
	return read(r.Node().RoundTrip(newRequest(t, path)))
}

func read(resp *http.Response, err error) (string, error) {
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// waitFor polls cond, which another goroutine makes true.
func waitFor(t testing.TB, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); {
		if time.Now().After(deadline) {
			t.Fatal("condition did not come true")
		}
		<-tick.C
	}
}

// receive is <-c, but not for ever.
func receive[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

func urls(s string) []*url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return []*url.URL{u}
}
