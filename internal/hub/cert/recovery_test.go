package cert

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const day = 24 * time.Hour

// board is the machine's clocks, off by what a test says.
type board struct {
	begun time.Time
	mu    sync.Mutex // guards off
	off   time.Duration
}

func (b *board) read() (time.Time, time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Now().Add(b.off), time.Since(b.begun)
}

func (b *board) set(off time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.off = off
}

// clock opens the clock of a machine that is off, with a floor a year ago.
func (b *board) clock(cfg Config) *clock.Clock {
	return clock.Open(clock.Config{
		Path: filepath.Join(filepath.Dir(cfg.Dir), "clock"), Built: time.Now().Add(-365 * day), Source: b.read, Log: cfg.Log,
	})
}

// clients counts the requests for client certificates so far.
func (c *cluster) clients() (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.requests {
		if r.Spec.SignerName == (&Certificates{}).clientOrder().signer {
			n++
		}
	}
	return n
}

// accepts fails the test unless the cluster takes the certificate now.
func (c *cluster) accepts(t testing.TB, pair *tls.Certificate) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	pool := x509.NewCertPool()
	for _, s := range c.trusted {
		pool.AddCert(s.cert)
	}
	_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: c.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	must(t, err)
}

var offsets = map[string]time.Duration{
	"1970": -time.Since(time.Unix(0, 0)), "two years behind": -2 * 365 * day, "two years ahead": 2 * 365 * day,
}

// TestWrongClockBricksNothing starts with a wrong clock and sets it right while
// the hub runs.
func TestWrongClockBricksNothing(t *testing.T) {
	for name, off := range offsets {
		t.Run(name, func(t *testing.T) {
			cluster := newCluster(t)
			cfg := cluster.config(t)
			b := &board{begun: time.Now(), off: off}
			cfg.Clock = b.clock(cfg)
			c := open(t, cfg)
			run(t, c)
			<-c.Ready()
			until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
			cluster.accepts(t, c.ClientCertificate())
			b.set(0)
			must(t, localChain(c, "localhost"))
			if d := cfg.Clock.Since(time.Now()).Abs(); d > 5*time.Second {
				t.Errorf("%s from the truth", d)
			}
			if c.left(c.clientOrder(), c.ClientCertificate(), time.Now()) <= 0 || cluster.clients() != 1 {
				t.Errorf("%d requests, and one more is due", cluster.clients())
			}
			// The floor is not poisoned: the next boot, alone, is right again.
			if d := time.Until(b.clock(cfg).Floor()); d > 5*time.Second {
				t.Errorf("the floor is %s ahead", d)
			}
		})
	}
}

// TestGoodCertificateSurvivesAWrongClock has nothing to renew but by the
// machine's clock.
func TestGoodCertificateSurvivesAWrongClock(t *testing.T) {
	for name, off := range offsets {
		t.Run(name, func(t *testing.T) {
			cluster := newCluster(t)
			cluster.set(func() { cluster.refuse = true }) // the token is long gone
			cfg := cluster.config(t)
			must(t, os.MkdirAll(cfg.Dir, 0o700))
			cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, 365*day)
			b := &board{begun: time.Now(), off: off}
			cfg.Clock = b.clock(cfg)
			c := open(t, cfg)
			first := c.ClientCertificate()
			run(t, c)
			until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
			b.set(0)
			if c.ClientCertificate() != first || cluster.clients() != 0 {
				t.Error("a good certificate was replaced")
			}
		})
	}
}

// TestFutureDatedCertificateIsReplaced begins with one that was made while the
// cloud's clock was ahead.
func TestFutureDatedCertificateIsReplaced(t *testing.T) {
	cluster := newCluster(t)
	cluster.set(func() { cluster.ahead = 2 * 365 * day })
	cfg := cluster.config(t)
	b := &board{begun: time.Now()}
	cfg.Clock = b.clock(cfg)
	c := open(t, cfg)
	// The cluster does not take what it issues, so it never comes into use.
	if _, err := c.obtain(t.Context(), c.clientOrder()); err == nil {
		t.Fatal("took a certificate that the cluster refuses")
	}
	must(t, os.Remove(c.path(clientFile+".pending")))
	from := time.Now().Add(2 * 365 * day)
	key, pair := newKeyPair(t, cluster.signer, from, from.Add(365*day))
	_, err := storePair(c.path(clientFile), pair, key, cfg.Keys)
	must(t, err)

	cluster.set(func() { cluster.ahead = 0 })
	c = open(t, cfg)
	changed := c.ClientChanged()
	run(t, c)
	<-changed
	cluster.accepts(t, c.ClientCertificate())
	if d := time.Until(cfg.Clock.Floor()); d > 5*time.Second {
		t.Errorf("the floor is %s ahead", d)
	}
}

// TestReturnAfterAnOutage lets time pass, in the cloud and on the node.
func TestReturnAfterAnOutage(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name            string
		away            time.Duration
		token, kubelet  bool // what is still good
		renewed, helped bool
	}{
		{name: "an hour", away: time.Hour},
		{name: "25 hours", away: 25 * time.Hour},
		{name: "400 days, token", away: 400 * day, token: true, renewed: true},
		{name: "400 days, kubelet", away: 400 * day, kubelet: true, renewed: true},
		{name: "400 days, nothing", away: 400 * day, helped: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cluster := newCluster(t)
			cfg := cluster.config(t)
			var log lines
			cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
			must(t, os.MkdirAll(cfg.Dir, 0o700))
			cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, 365*day)
			cluster.set(func() {
				cluster.refuse = !tc.token
				cluster.now = func() time.Time { return time.Now().Add(tc.away) }
			})
			if tc.kubelet {
				cluster.pair(t, cfg.KubeletCert, testUser, 500*day)
			}
			cfg.Clock = (&board{begun: time.Now(), off: tc.away}).clock(cfg)
			c := open(t, cfg)
			first := c.ClientCertificate()
			run(t, c)
			switch {
			case tc.renewed:
				until(t, "new certificate", func() bool { return c.ClientCertificate() != first })
			case tc.helped:
				until(t, "hint", func() bool { return c.Status()[0].Hint != "" })
				s := c.Status()[0]
				if !strings.Contains(s.Problem, "expired on "+first.Leaf.NotAfter.UTC().Format(time.DateOnly)) ||
					!strings.Contains(s.Hint, "kubeadm token create --ttl 1h") || !strings.Contains(s.Hint, cfg.BootstrapKubeconfig) {
					t.Errorf("status %+v", s)
				}
				until(t, "more tries", func() bool { return cluster.refusals() > 6 })
				if n := log.count("file=" + clientFile); n != 1 {
					t.Errorf("said %d times: %s", n, &log)
				}
				// The operator does as told, with another token.
				cluster.set(func() { cluster.refuse = false })
				until(t, "new certificate", func() bool { return c.ClientCertificate() != first })
				until(t, "peace", func() bool { return c.Status()[0].Problem == "" })
			default:
				until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
				if c.ClientCertificate() != first {
					t.Error("a good certificate was replaced")
				}
			}
			cluster.accepts(t, c.ClientCertificate())
			if got := c.Own(first.Leaf.Raw); !got {
				t.Error("the certificate is not the node's own any more, before its clients can know")
			}
		})
	}
}

// lines is a log that may be read while it is written.
type lines struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *lines) count(text string) int { return strings.Count(l.String(), text) }

// TestRolloverWhileConnected goes through the stages that Kubernetes describes.
func TestRolloverWhileConnected(t *testing.T) {
	for _, source := range []string{"kube-root-ca.crt", "cluster-info"} {
		t.Run(source, func(t *testing.T) {
			cluster := newCluster(t)
			publish := func(bundle []byte) {
				if source == "cluster-info" {
					cluster.info = bundle
				} else {
					cluster.roots = bundle
				}
			}
			cluster.set(func() { publish(cluster.pem) })
			cfg := cluster.config(t)
			c := open(t, cfg)
			learn := func() { t.Helper(); must(t, c.learnAuthority(t.Context())) }
			pair, err := c.obtain(t.Context(), c.clientOrder())
			must(t, err)
			c.setClient(pair)
			learn()

			next := newSignerFrom(t, time.Now().Add(-time.Minute))
			both := append(bytes.Clone(cluster.pem), next.pem...)
			pool, changed := c.ClusterCAs(), c.ClientChanged()
			cluster.set(func() { publish(both); cluster.trusted = append(cluster.trusted, next) })
			learn()
			<-changed // new connections trust both
			bundle, err := os.ReadFile(c.BundlePath())
			must(t, err)
			if c.ClusterCAs() == pool || !bytes.HasPrefix(bundle, both) {
				t.Errorf("bundle is\n%s", bundle)
			}
			// The file that the node was joined with must not undo it.
			must(t, c.loadCluster())
			if a := c.cluster.Load(); len(a.certs) != 2 {
				t.Error("the bootstrap file won")
			}
			// Our certificate is of the old one still; the new one is asked for.
			if c.left(c.clientOrder(), pair, time.Time{}) > 0 {
				t.Error("the old authority's certificate is kept for ever")
			}
			if c.left(c.clientOrder(), pair, time.Now()) <= 0 {
				t.Error("asked again at once though the old one still signs")
			}
			cluster.set(func() { cluster.signing, cluster.serving = next, next })
			pair, err = c.obtain(t.Context(), c.clientOrder())
			must(t, err)
			c.setClient(pair)
			if c.left(c.clientOrder(), pair, time.Time{}) <= 0 {
				t.Error("the new authority's certificate is not good enough")
			}
			cluster.set(func() { publish(next.pem); cluster.trusted = []*signer{next} })
			learn()
			if a := c.cluster.Load(); len(a.certs) != 1 || !a.certs[0].Equal(next.cert) {
				t.Error("the old authority is still trusted")
			}
			cluster.accepts(t, c.ClientCertificate())
			again := open(t, cfg) // the restart finds the same
			if !bytes.Equal(again.cluster.Load().pem, next.pem) {
				t.Error("a restart brings the old authority back")
			}
		})
	}
}

// TestNewCertificateBringsNews is signed by an authority that the cluster
// publishes and the node has not looked for yet: it does so at once.
func TestNewCertificateBringsNews(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, time.Minute) // about to end
	next := newSignerFrom(t, time.Now().Add(-time.Minute))
	both := append(bytes.Clone(cluster.pem), next.pem...)
	cluster.set(func() {
		cluster.roots, cluster.trusted, cluster.signing = both, append(cluster.trusted, next), next
	})
	c := open(t, cfg)
	old := c.ClientCertificate()
	client, err := c.httpClient(c.Servers()[0], c.ClusterCAs(), credential{certificate: old})
	must(t, err)
	c.Over(&shared{Client: client, base: c.Servers()[0]}) // the link is up: there is no hurry
	run(t, c)
	// Whichever certificate comes first is the reason to look.
	until(t, "new authority", func() bool { return len(c.cluster.Load().certs) == 2 })
}

// TestRolloverWhileAway finds a cluster that none of the node's authorities
// vouches for.
func TestRolloverWhileAway(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, 365*day)
	open(t, cfg)
	next := newSigner(t)
	cluster.set(func() {
		cluster.serving, cluster.signing, cluster.trusted = next, next, []*signer{next}
		cluster.info, cluster.roots = next.pem, next.pem
	})

	// By a pin alone, which covers what comes over an unproven connection.
	pinned := cfg
	pinned.Dir = filepath.Join(t.TempDir(), "pki")
	must(t, os.CopyFS(pinned.Dir, os.DirFS(cfg.Dir)))
	pinned.CAHashes = []string{cluster.hash(), next.hash()}
	c := open(t, pinned)
	first := c.ClientCertificate()
	run(t, c)
	until(t, "new certificate", func() bool { return c.ClientCertificate() != first })
	cluster.accepts(t, c.ClientCertificate())

	// Without one the node asks for help, and takes it.
	c = open(t, cfg)
	old := c.ClientCertificate()
	run(t, c)
	until(t, "hint", func() bool {
		return slices.ContainsFunc(c.Status(), func(s Status) bool {
			return strings.Contains(s.Hint, "kubectl get configmap kube-root-ca.crt") && strings.Contains(s.Hint, c.path(clusterCAFile))
		})
	})
	if len(c.cluster.Load().certs) != 1 || bytes.Equal(c.cluster.Load().pem, next.pem) {
		t.Fatal("a stranger's authority is believed")
	}
	must(t, os.WriteFile(c.path(clusterCAFile), next.pem, 0o600))
	must(t, c.loadCluster()) // as every minute
	until(t, "new certificate", func() bool { return c.ClientCertificate() != old })
	cluster.accepts(t, c.ClientCertificate())
}

// TestBundleThatCutsUsOffIsRefused publishes an authority that did not sign the
// server's certificate.
func TestBundleThatCutsUsOffIsRefused(t *testing.T) {
	cluster := newCluster(t)
	c := open(t, cluster.config(t))
	pair, err := c.obtain(t.Context(), c.clientOrder())
	must(t, err)
	c.setClient(pair)
	pool := c.ClusterCAs()
	for name, bundle := range map[string][]byte{"stranger": newSigner(t).pem, "junk": []byte("junk"), "empty": {}} {
		cluster.set(func() { cluster.roots = bundle })
		if err := c.learnAuthority(t.Context()); err == nil || c.ClusterCAs() != pool {
			t.Errorf("%s: believed", name)
		}
	}
	cluster.set(func() { cluster.roots = nil }) // may not be read: nothing is wrong
	must(t, c.learnAuthority(t.Context()))
}

// TestNewCertificateMustWork issues one that the cluster then refuses.
func TestNewCertificateMustWork(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, time.Minute)
	c := open(t, cfg)
	old := c.ClientCertificate()
	next := newSigner(t)
	cluster.set(func() { cluster.signing = next })
	run(t, c)
	until(t, "tries", func() bool { return cluster.refusals() > 1 })
	if c.ClientCertificate() != old || cluster.clients() != 1 {
		t.Errorf("%d requests", cluster.clients())
	}
	stored, err := loadPair(c.path(clientFile), cfg.Keys)
	must(t, err)
	if !stored.Leaf.Equal(old.Leaf) {
		t.Error("what does not work is on disk")
	}
	cluster.set(func() { cluster.trusted = append(cluster.trusted, next) })
	until(t, "new certificate", func() bool { return c.ClientCertificate() != old })
	if cluster.clients() != 1 {
		t.Errorf("%d requests for one certificate", cluster.clients())
	}
}

// TestChangedAddresses asks for a server certificate with the new ones, and
// serves the old one until it comes.
func TestChangedAddresses(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	c := open(t, cfg)
	stop := run(t, c)
	until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
	stop()
	cluster.set(func() { cluster.hold = true })
	cfg.NodeIPs = []net.IP{net.IPv4(10, 0, 0, 9)}
	c = open(t, cfg)
	old := c.clusterServer.Load()
	run(t, c)
	until(t, "request", func() bool { return len(cluster.created()) == 3 })
	if c.clusterServer.Load() != old {
		t.Error("the old certificate is gone")
	}
	cluster.set(func() { cluster.hold = false })
	until(t, "new certificate", func() bool { return c.clusterServer.Load() != old })
	must(t, c.clusterServer.Load().Leaf.VerifyHostname("10.0.0.9"))
	if c.clusterServer.Load().Leaf.VerifyHostname("10.0.0.5") == nil {
		t.Error("the old address is still named")
	}
}

func TestOwn(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	for i, name := range []string{testUser, testUser, "system:node:edge-2"} {
		cluster.pair(t, cfg.KubeletCert, name, -time.Hour)
		c := open(t, cfg)
		pair, err := loadPair(cfg.KubeletCert, nil)
		must(t, err)
		if got, want := c.Own(pair.Leaf.Raw), i < 2; got != want {
			t.Errorf("kubelet's of %s: %t", name, got)
		}
		if c.Own(nil) {
			t.Error("nothing is the node's own")
		}
	}
}

// TestWaitingRequestNamesTheCommand tells how to approve a request.
func TestWaitingRequestNamesTheCommand(t *testing.T) {
	cluster := newCluster(t)
	c := open(t, cluster.config(t))
	c.waits(clusterServerFile, "yurthub-7")
	if s := c.Status()[1]; !strings.Contains(s.Hint, "kubectl certificate approve yurthub-7") {
		t.Errorf("status %+v", s)
	}
	run(t, c)
	until(t, "peace", func() bool { return c.Status()[1].Problem == "" && c.clusterServer.Load() != nil })
}

func newKeyPair(t testing.TB, by *signer, from, to time.Time) (*ecdsa.PrivateKey, []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key, by.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: testUser, Organization: []string{"system:nodes"}}, NotBefore: from, NotAfter: to,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key.Public())
}

// shared is the hub's link of a test: one connection, as the client.
type shared struct {
	*http.Client
	base  string
	asked atomic.Int64
}

func (s *shared) Online() bool                 { return true }
func (s *shared) WaitUp(context.Context) error { return nil }
func (s *shared) Questions() http.RoundTripper { return s }

func (s *shared) RoundTrip(r *http.Request) (*http.Response, error) {
	s.asked.Add(1)
	out := r.Clone(r.Context())
	base, err := url.Parse(s.base)
	if err != nil {
		return nil, err
	}
	out.URL.Scheme, out.URL.Host = base.Scheme, base.Host
	return s.Transport.RoundTrip(out)
}

// TestRequestsGoOverTheLink has a server certificate wait for approval.
func TestRequestsGoOverTheLink(t *testing.T) {
	cluster := newCluster(t)
	cluster.set(func() { cluster.hold = true })
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, 1000*time.Hour)
	c := open(t, cfg)
	client, err := c.httpClient(c.Servers()[0], c.ClusterCAs(), credential{certificate: c.client.Load()})
	must(t, err)
	link := &shared{Client: client, base: c.Servers()[0]}
	c.Over(link)
	stop := run(t, c)
	until(t, "request", func() bool { return len(cluster.created()) == 1 })
	until(t, "looks", func() bool { return link.asked.Load() >= 3 })
	cluster.set(func() { cluster.hold = false })
	until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
	stop()
	// Whether an authority vouches for the server is tried without it.
	before, roots := link.asked.Load(), x509.NewCertPool()
	roots.AddCert(cluster.cert)
	_, _, err = c.askAuthority(t.Context(), roots)
	must(t, err)
	if link.asked.Load() != before {
		t.Error("the link was asked on behalf of an authority that it does not know")
	}
}

// TestPolls looks ever more seldom at a request that waits.
func TestPolls(t *testing.T) {
	for waited, most := range map[time.Duration]time.Duration{
		0: 200 * time.Millisecond, time.Minute: time.Minute, 10 * time.Minute: 8 * time.Minute, 1000 * time.Hour: 15 * time.Minute,
	} {
		if got := pollAfter(waited); got < pollMin/2 || got > most || got < min(waited/4, pollMax/2) {
			t.Errorf("after %s: in %s", waited, got)
		}
	}
}
