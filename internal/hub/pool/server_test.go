package pool

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/request"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	a.cert, a.key = a.make(t, template)
	return a
}

func (a *authority) make(t *testing.T, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (a *authority) sign(t *testing.T, name, group string, usage x509.ExtKeyUsage, from time.Time) *tls.Certificate {
	t.Helper()
	cert, key := a.make(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name, Organization: []string{group}},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		NotBefore: from, NotAfter: from.Add(time.Hour),
	})
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (a *authority) node(t *testing.T, name string) *tls.Certificate {
	t.Helper()
	return a.sign(t, "system:node:"+name, "system:nodes", x509.ExtKeyUsageClientAuth, time.Now().Add(-time.Minute))
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// hubs are the hubs of a test: all at one port, each at an address of its own.
type hubs struct {
	ca   *authority
	port int
}

func newHubs(t *testing.T) *hubs {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return &hubs{ca: newAuthority(t), port: l.Addr().(*net.TCPAddr).Port}
}

// start runs a hub that serves nothing but its own name. The change, if any,
// is made to its configuration first.
func (h *hubs) start(t *testing.T, node string, cert *tls.Certificate, change func(*Config)) *Pool {
	t.Helper()
	cfg := Config{
		Node: node, Port: h.port, Certificate: func() *tls.Certificate { return cert }, ClusterCAs: h.ca.pool,
		Serve: func(w http.ResponseWriter, r *http.Request, info request.Info, peer string) error {
			if info.Verb == "watch" {
				w.WriteHeader(http.StatusOK)
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
				return nil
			}
			_, err := io.WriteString(w, node+" to "+peer+": "+info.String())
			return err
		},
		Protect: func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				g := httpx.Protect(w, r, 10*time.Second)
				defer g.End()
				next.ServeHTTP(g, r)
			})
		},
		Refused: func(string) {},
		Link:    func() (bool, <-chan struct{}) { return true, nil },
		Ages:    func() map[string]time.Duration { return nil },
	}
	if change != nil {
		change(&cfg)
	}
	p := New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := p.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return p
}

var services = schema.GroupVersionResource{Version: "v1", Resource: "services"}

func shared(nodes ...string) Membership {
	return Membership{Pool: "hangzhou", Nodes: nodes, Shared: []schema.GroupVersionResource{services}}
}

// ask sends a request over a connection of its own, and returns the status, 0
// when there is no answer at all.
func (h *hubs) ask(t *testing.T, cert *tls.Certificate, address, method, path, body string, header ...string) (int, string) {
	t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
	if cert != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	client := http.Client{Transport: &http.Transport{
		TLSClientConfig: cfg, DisableKeepAlives: true, ExpectContinueTimeout: 20 * time.Second,
	}, Timeout: 20 * time.Second}
	req, err := http.NewRequestWithContext(t.Context(), method, h.url(address)+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if len(header) > 0 {
		req.Header.Set(header[0], header[1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func (h *hubs) url(address string) string {
	return "https://" + (&net.TCPAddr{IP: net.ParseIP(address), Port: h.port}).String()
}

// listens waits until somebody takes connections at the address.
func (h *hubs) listens(t *testing.T, address string) {
	t.Helper()
	await(t, "listener at "+address, func() bool {
		c, err := net.Dial("tcp", strings.TrimPrefix(h.url(address), "https://"))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(30 * time.Second); !ok(); {
		select {
		case <-end:
			t.Fatalf("%s: waited in vain", what)
		case <-tick.C:
		}
	}
}

// TestOnlyPeersAreServed shows each credential, and asks each question.
func TestOnlyPeersAreServed(t *testing.T) {
	t.Parallel()
	h := newHubs(t)
	leader := h.start(t, "a", h.ca.node(t, "a"), func(c *Config) {
		c.Heartbeats = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				httpx.WriteStatus(w, r, err)
				return
			}
			_, _ = io.WriteString(w, PeerFrom(r.Context())+" says "+string(body))
		})
		c.Pods = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") })
	})
	const address, list = "127.0.0.11", "/api/v1/services"
	if c, err := net.Dial("tcp", strings.TrimPrefix(h.url(address), "https://")); err == nil {
		c.Close()
		t.Fatal("a hub without a pool listens for peers")
	}
	leader.Set(shared("a", "b"), net.ParseIP(address), true)
	h.listens(t, address)

	now, b := time.Now().Add(-time.Minute), h.ca.node(t, "b")
	other := newAuthority(t)
	for what, tc := range map[string]struct {
		cert *tls.Certificate
		want int
	}{
		"no certificate":            {nil, 0},
		"of another cluster":        {other.node(t, "b"), 0},
		"expired":                   {h.ca.sign(t, "system:node:b", "system:nodes", x509.ExtKeyUsageClientAuth, now.Add(-2*time.Hour)), 0},
		"a server's":                {h.ca.sign(t, "system:node:b", "system:nodes", x509.ExtKeyUsageServerAuth, now), 0},
		"a user's":                  {h.ca.sign(t, "bob", "dev", x509.ExtKeyUsageClientAuth, now), 0},
		"an administrator's":        {h.ca.sign(t, "admin", "system:masters", x509.ExtKeyUsageClientAuth, now), 0},
		"a node's name, no node's":  {h.ca.sign(t, "system:node:b", "dev", x509.ExtKeyUsageClientAuth, now), 0},
		"a node of another pool":    {h.ca.node(t, "c"), http.StatusForbidden},
		"this very node's":          {h.ca.node(t, "a"), http.StatusForbidden},
		"a node of the pool":        {b, http.StatusOK},
		"a node with an empty name": {h.ca.sign(t, "system:node:", "system:nodes", x509.ExtKeyUsageClientAuth, now), 0},
	} {
		if got, text := h.ask(t, tc.cert, address, http.MethodGet, list, ""); got != tc.want {
			t.Errorf("a certificate, %s: %d %s, want %d", what, got, text, tc.want)
		}
	}

	for _, tc := range []struct {
		method, path, body string
		header             []string
		want               int
	}{
		{http.MethodGet, list, "", nil, 200},
		{http.MethodGet, "/api/v1/namespaces/x/services?labelSelector=a%3Db", "", nil, 200},
		{http.MethodHead, list, "", nil, 405},
		{http.MethodGet, list + "?limit=x", "", nil, 400},
		{http.MethodGet, "/api/v1/namespaces/x/services/y", "", nil, 403},
		{http.MethodGet, "/api/v1/namespaces/x/services/y/status", "", nil, 403},
		{http.MethodGet, "/api/v1/namespaces/x/services/y/proxy/", "", nil, 403},
		{http.MethodPost, list, "{}", nil, 405},
		{http.MethodPut, "/api/v1/namespaces/x/services/y", "{}", nil, 405},
		{http.MethodDelete, list, "", nil, 405},
		{http.MethodConnect, list, "", nil, 405},
		{http.MethodGet, "/api/v1/secrets", "", nil, 403},
		{http.MethodGet, "/api/v1/pods", "", nil, 403},
		{http.MethodGet, "/version", "", nil, 403},
		{http.MethodGet, "/metrics", "", nil, 403},
		{http.MethodGet, "/", "", nil, 403},
		{http.MethodGet, list, "", []string{"Authorization", "Bearer x"}, 403},
		{http.MethodGet, list, "", []string{"Impersonate-User", "admin"}, 403},
		{http.MethodGet, list, "", []string{"X-Remote-User", "admin"}, 403},
		{http.MethodGet, list, "body", nil, 413},
		{http.MethodPost, HeartbeatsPath, "I live", nil, 200},
		{http.MethodPost, HeartbeatsPath, strings.Repeat("x", maxBody+1), []string{"Expect", "100-continue"}, 413},
		{http.MethodGet, HeartbeatsPath, "", nil, 405},
		{http.MethodGet, PodsPath, "", nil, 200},
		{http.MethodPost, PodsPath, "{}", nil, 405},
		{http.MethodGet, PodsPath + "/x", "", nil, 403},
		{http.MethodPost, HeartbeatsPath + "/x", "", nil, 405},
	} {
		if got, text := h.ask(t, b, address, tc.method, tc.path, tc.body, tc.header...); got != tc.want {
			t.Errorf("%s %s %v: %d %.200s, want %d", tc.method, tc.path, tc.header, got, text, tc.want)
		}
	}
	if _, text := h.ask(t, b, address, http.MethodPost, HeartbeatsPath, "I live"); text != "b says I live" {
		t.Errorf("the handler of heartbeats was told %q", text)
	}
	if peers := leader.Peers(); len(peers) != 1 || peers[0].Node != "b" || peers[0].Address != "127.0.0.1" || peers[0].Seen.IsZero() {
		t.Errorf("peers: %+v", peers)
	}
}

// TestPeersCheckWhoAnswers lets a follower ask by name.
func TestPeersCheckWhoAnswers(t *testing.T) {
	t.Parallel()
	h := newHubs(t)
	m := shared("a", "b", "c")
	m.Leaders = []Leader{{"a", "127.0.0.21"}, {"c", "127.0.0.22"}}
	h.start(t, "a", h.ca.node(t, "a"), nil).Set(m, net.ParseIP("127.0.0.21"), true)
	// At the address of c is one with a certificate of another node.
	h.start(t, "c", h.ca.node(t, "d"), nil).Set(m, net.ParseIP("127.0.0.22"), true)
	h.listens(t, "127.0.0.21")
	h.listens(t, "127.0.0.22")
	b := h.start(t, "b", h.ca.node(t, "b"), nil)
	b.Set(m, net.ParseIP("127.0.0.23"), true)
	ask := func(node string) (string, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://upstream/api/v1/services", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := b.Transport(node).RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return string(text), err
	}
	if text, err := ask("a"); err != nil || text != "a to b: list services" {
		t.Errorf("asked a: %q, %v", text, err)
	}
	if text, err := ask("c"); err == nil || !strings.Contains(err.Error(), "node d answers there") {
		t.Errorf("asked c, where d answers: %q, %v", text, err)
	}
	if text, err := ask("x"); err == nil {
		t.Errorf("asked somebody who is not of the pool: %q", text)
	}
}

// TestWhoLeavesThePoolIsCutOff watches, and is taken off the pool.
func TestWhoLeavesThePoolIsCutOff(t *testing.T) {
	t.Parallel()
	h := newHubs(t)
	a := h.start(t, "a", h.ca.node(t, "a"), nil)
	m := shared("a", "b")
	m.Leaders = []Leader{{"a", "127.0.0.31"}}
	a.Set(m, net.ParseIP("127.0.0.31"), true)
	h.listens(t, "127.0.0.31")
	b := h.start(t, "b", h.ca.node(t, "b"), nil)
	b.Set(m, net.ParseIP("127.0.0.32"), true)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://upstream/api/v1/services?watch=true", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := b.Transport("a").RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if peers := a.Peers(); len(peers) != 1 || peers[0].Address != "127.0.0.32" {
		t.Errorf("the follower came from %+v", peers)
	}
	a.Set(shared("a", "c"), net.ParseIP("127.0.0.31"), true)
	if _, err := io.ReadAll(resp.Body); err != nil {
		t.Errorf("the watch of a hub that left: %v", err)
	}
	if peers := a.Peers(); len(peers) != 0 {
		t.Errorf("still known: %+v", peers)
	}
	a.Set(Membership{}, nil, true)
	await(t, "end of the listener", func() bool {
		c, err := net.Dial("tcp", strings.TrimPrefix(h.url("127.0.0.31"), "https://"))
		if err == nil {
			c.Close()
		}
		return err != nil
	})
}

func TestOnePeerHasLimits(t *testing.T) {
	t.Parallel()
	p := New(Config{Node: "a"})
	p.Set(shared("a", "b", "c"), nil, true)
	admit := func(peer string, watch bool) (*inFlight, error) {
		f := &inFlight{peer: peer, watch: watch, end: func() {}}
		return f, p.admit(f, nil)
	}
	var last *inFlight
	for range maxWatches {
		f, err := admit("b", true)
		if err != nil {
			t.Fatal(err)
		}
		last = f
	}
	if _, err := admit("b", true); err == nil {
		t.Error("a peer may have any number of watches")
	}
	if _, err := admit("b", false); err != nil {
		t.Errorf("watches count as requests: %v", err)
	}
	if _, err := admit("c", true); err != nil {
		t.Errorf("one peer takes the room of another: %v", err)
	}
	p.leave(last)
	p.leave(last) // once is enough
	if _, err := admit("b", true); err != nil {
		t.Errorf("room is not given back: %v", err)
	}
	if _, err := admit("b", true); err == nil {
		t.Error("room is given back twice")
	}
}

// TestHelped tells when somebody may help who could not before, and not when
// nothing has changed.
func TestHelped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Config{Node: "a", Registerer: prometheus.NewRegistry()})
		p.Set(Membership{Pool: "p", Nodes: []string{"a", "b", "c"}, Contacts: []Leader{{"b", "192.0.2.2"}}}, nil, true)
		p.machine.setPool(time.Now(), "p", nil, "", []string{"b"})
		for _, tc := range []struct {
			what string
			do   func()
			want bool
		}{
			{"b has no link", func() { p.hear("b", time.Now(), State{}, nil) }, false},
			{"b has one", func() { p.hear("b", time.Now(), State{Link: true}, nil) }, true},
			{"and still has", func() { p.hear("b", time.Now(), State{Link: true}, nil) }, false},
			{"b falls silent", func() { p.hear("b", time.Now(), State{}, errRefused); time.Sleep(silentFor) }, false},
			{"b is back", func() { p.hear("b", time.Now(), State{Link: true}, nil) }, true},
			{"b knows c", func() {
				p.hear("b", time.Now(), State{Link: true, Peers: map[string]string{"c": "192.0.2.3"}}, nil)
			}, true},
			{"c calls", func() { p.leave(call(t, p, "c")) }, true},
			{"c calls again", func() { p.leave(call(t, p, "c")) }, false},
			{"nothing new of the pool", func() { p.Set(p.member, nil, true) }, false},
			{"another leader", func() {
				m := p.member
				m.Leaders = []Leader{{"b", "192.0.2.2"}}
				p.Set(m, nil, true)
			}, true},
		} {
			helped := p.Helped()
			time.Sleep(time.Second)
			tc.do()
			got := false
			select {
			case <-helped:
				got = true
			default:
			}
			if got != tc.want {
				t.Errorf("%s: got %v", tc.what, got)
			}
		}
	})
}

func call(t *testing.T, p *Pool, peer string) *inFlight {
	t.Helper()
	f := &inFlight{peer: peer}
	if err := p.admit(f, nil); err != nil {
		t.Fatal(err)
	}
	return f
}
