package link

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is a certificate authority of a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{pool: x509.NewCertPool()}
	a.cert, a.key = issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "test-ca"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}, nil)
	a.pool.AddCert(a.cert)
	return a
}

func (a *authority) server(t testing.TB) *tls.Certificate {
	t.Helper()
	cert, key := issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "kube-apiserver"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a)
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (a *authority) client(t testing.TB, name string) *tls.Certificate {
	t.Helper()
	cert, key := issue(t, &x509.Certificate{
		Subject:     pkix.Name{CommonName: name, Organization: []string{"system:nodes"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, a)
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func issue(t testing.TB, template *x509.Certificate, by *authority) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(time.Hour)
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// upstream is an API server of a test. It answers /readyz by itself.
type upstream struct {
	*httptest.Server
	ready atomic.Pointer[http.HandlerFunc] // replaces the answer of /readyz
	asked atomic.Int64                     // probes and pings
	dials atomic.Int64
}

func newUpstream(t testing.TB, ca *authority, handler http.HandlerFunc) *upstream {
	t.Helper()
	u := &upstream{}
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/readyz" {
			handler(w, r)
			return
		}
		u.asked.Add(1)
		if f := u.ready.Load(); f != nil {
			(*f)(w, r)
			return
		}
		_, _ = io.WriteString(w, "ok")
	}))
	u.Config.ErrorLog = log.New(io.Discard, "", 0)
	u.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			u.dials.Add(1)
		}
	}
	u.EnableHTTP2 = true
	u.TLS = &tls.Config{
		Certificates: []tls.Certificate{*ca.server(t)},
		ClientAuth:   tls.VerifyClientCertIfGiven,
		ClientCAs:    ca.pool,
	}
	u.StartTLS()
	t.Cleanup(func() {
		u.CloseClientConnections()
		u.Close()
	})
	return u
}

func (u *upstream) addr() string { return u.Listener.Addr().String() }

// wire is a TCP relay in front of a server that can be cut in two ways.
type wire struct {
	addr, to string
	mu       sync.Mutex
	listener net.Listener // nil while refusing
	frozen   chan struct{}
	conns    map[net.Conn]struct{}
	wg       sync.WaitGroup
}

func newWire(t testing.TB, to string) *wire {
	t.Helper()
	w := &wire{to: to, conns: make(map[net.Conn]struct{}), frozen: make(chan struct{})}
	close(w.frozen)
	w.listen(t, "127.0.0.1:0")
	t.Cleanup(func() {
		w.heal(t)
		w.refuse()
		w.wg.Wait()
	})
	return w
}

func (w *wire) listen(t testing.TB, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.listener, w.addr = l, l.Addr().String()
	w.mu.Unlock()
	w.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() { w.relay(c) })
		}
	})
}

func (w *wire) relay(client net.Conn) {
	defer func() { _ = client.Close() }()
	if !w.track(client) {
		return
	}
	w.pass() // a black hole accepts (in the backlog) and is silent
	server, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	if !w.track(server) {
		return
	}
	var wg sync.WaitGroup
	pump := func(dst, src net.Conn) {
		buf := make([]byte, 16<<10)
		for {
			n, err := src.Read(buf)
			w.pass()
			if n > 0 {
				if _, err := dst.Write(buf[:n]); err != nil {
					break
				}
			}
			if err != nil {
				break
			}
		}
		_ = dst.Close()
		_ = src.Close()
	}
	wg.Go(func() { pump(server, client) })
	pump(client, server)
	wg.Wait()
}

func (w *wire) track(c net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listener == nil {
		return false
	}
	w.conns[c] = struct{}{}
	return true
}

// pass blocks while the wire is a black hole.
func (w *wire) pass() {
	w.mu.Lock()
	frozen := w.frozen
	w.mu.Unlock()
	<-frozen
}

// blackhole stops all bytes and closes nothing.
func (w *wire) blackhole() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frozen = make(chan struct{})
}

// refuse resets all connections and refuses new ones.
func (w *wire) refuse() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listener != nil {
		_ = w.listener.Close()
		w.listener = nil
	}
	for c := range w.conns {
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0)
		}
		_ = c.Close()
	}
	clear(w.conns)
}

// heal ends either cut.
func (w *wire) heal(t testing.TB) {
	t.Helper()
	w.mu.Lock()
	select {
	case <-w.frozen:
	default:
		close(w.frozen)
	}
	gone := w.listener == nil
	w.mu.Unlock()
	if gone {
		w.listen(t, w.addr)
	}
}

// rig is a running link.
type rig struct {
	*Link
	ca       *authority
	registry *prometheus.Registry
	cert     atomic.Pointer[tls.Certificate]
}

func newRig(t testing.TB, ca *authority, change func(*Config), addrs ...string) *rig {
	t.Helper()
	r := &rig{ca: ca, registry: prometheus.NewRegistry()}
	r.cert.Store(ca.client(t, "system:node:edge-1"))
	cfg := Config{
		ClusterCAs:        func() *x509.CertPool { return ca.pool },
		ClientCertificate: func() (*tls.Certificate, error) { return r.cert.Load(), nil },
		Registerer:        r.registry,
		// Busy processors are no cut.
		Budgets: Budgets{Connect: patience, Answer: patience, Patience: patience},
	}
	for _, a := range addrs {
		cfg.Servers = append(cfg.Servers, &url.URL{Scheme: "https", Host: a})
	}
	if change != nil {
		change(&cfg)
	}
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Link = l
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	return r
}

func (r *rig) waitUp(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.WaitUp(ctx); err != nil {
		t.Fatalf("link did not come up: %v, state %+v", err, r.State())
	}
}

// waitReason waits until the link is known to be down for a reason, and fails
// if it is up.
func (r *rig) waitReason(t testing.TB, reason string) {
	t.Helper()
	waitFor(t, func() bool {
		s := r.State()
		return s.Up || strings.Contains(s.Reason, reason)
	})
	if s := r.State(); s.Up {
		t.Errorf("state %+v", s)
	}
}

func (r *rig) waitDown(t testing.TB) {
	t.Helper()
	timeout := time.After(patience)
	for {
		changed := r.Changed()
		if !r.Online() {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("link did not go down, state %+v", r.State())
		}
	}
}

// hub is a front that forwards all to the link.
func (r *rig) hub(t testing.TB, as Credential, keep Keep) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.Forward(w, req, as, keep)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

func get(t testing.TB, c *http.Client, url string) (int, http.Header, []byte, error) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, body, err
}
