package cert

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	certificatesv1 "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testNode  = "edge-1"
	testToken = "abcdef.0123456789abcdef"
	testUser  = "system:node:" + testNode
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// signer is the cluster's certificate authority.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newSigner(t testing.TB) *signer { return newSignerFrom(t, time.Now().Add(-time.Hour)) }

func newSignerFrom(t testing.TB, from time.Time) *signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"}, NotBefore: from,
		NotAfter: time.Now().Add(100000 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &signer{cert, key, pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: der})}
}

func (s *signer) hash() string {
	sum := sha256.Sum256(s.cert.RawSubjectPublicKeyInfo)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// sign issues a certificate for a template and a public key.
func (s *signer) sign(t testing.TB, template *x509.Certificate, public any) []byte {
	number, err := serial()
	must(t, err)
	template.SerialNumber = number
	der, err := x509.CreateCertificate(rand.Reader, template, s.cert, public, s.key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: der})
}

// pair writes a certificate with its key to a file.
func (s *signer) pair(t testing.TB, path, name string, life time.Duration) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	cert := s.sign(t, &x509.Certificate{
		Subject:   pkix.Name{CommonName: name, Organization: []string{"system:nodes"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key.Public())
	_, err = storePair(path, cert, key, nil)
	must(t, err)
}

// cluster is an API server with a signing controller.
type cluster struct {
	*signer
	*httptest.Server
	t testing.TB

	mu       sync.Mutex
	requests map[string]*certificatesv1.CertificateSigningRequest
	by       []string // who created requests
	hold     bool     // approve nothing
	deny     bool
	life     time.Duration
	refuse   bool // the bootstrap token has expired
	refused  int  // requests of nobody whom it knows

	serving, signing *signer   // of its own certificate, and of those that it issues
	trusted          []*signer // for clients
	roots            []byte    // what kube-root-ca.crt holds; nil: the node may not read it
	info             []byte    // what cluster-info holds; nil: there is none
	now              func() time.Time
	ahead            time.Duration // of what it issues
}

func newCluster(t testing.TB) *cluster {
	c := &cluster{
		signer: newSigner(t), t: t, requests: make(map[string]*certificatesv1.CertificateSigningRequest),
		life: 365 * 24 * time.Hour, now: time.Now,
	}
	c.serving, c.signing, c.trusted = c.signer, c.signer, []*signer{c.signer}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+requestsPath, c.create)
	mux.HandleFunc("GET "+requestsPath+"/{name}", c.get)
	mux.HandleFunc("GET "+rootsPath, func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		switch user := c.user(w, r); {
		case user == "":
		case user != testUser || c.roots == nil:
			status(w, http.StatusForbidden, metav1.StatusReasonForbidden)
		default:
			_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]string{"ca.crt": string(c.roots)}})
		}
	})
	mux.HandleFunc("GET "+infoPath, func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.info == nil {
			status(w, http.StatusForbidden, metav1.StatusReasonForbidden)
			return
		}
		k := fmt.Sprintf("clusters:\n- cluster:\n    certificate-authority-data: %s\n", base64.StdEncoding.EncodeToString(c.info))
		_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]string{"kubeconfig": k}})
	})
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		date := c.now()
		c.mu.Unlock()
		w.Header().Set("Date", date.UTC().Format(http.TimeFormat))
		mux.ServeHTTP(w, r)
	}))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		leaf := c.serving.sign(t, &x509.Certificate{
			Subject: pkix.Name{CommonName: "kube-apiserver"}, NotBefore: c.now().Add(-time.Hour), NotAfter: c.now().Add(1000 * time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}, key.Public())
		keyPEM, err := encodeKey(key)
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(leaf, keyPEM)
		return &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12}, err
	}}
	c.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	c.StartTLS()
	t.Cleanup(c.Close)
	return c
}

func status(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Reason: reason, Code: int32(code), Message: string(reason)})
}

func (c *cluster) user(w http.ResponseWriter, r *http.Request) string {
	if len(r.TLS.PeerCertificates) > 0 {
		pool := x509.NewCertPool()
		for _, s := range c.trusted {
			pool.AddCert(s.cert)
		}
		leaf := r.TLS.PeerCertificates[0]
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: c.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
			return leaf.Subject.CommonName
		}
	}
	if r.Header.Get("Authorization") == "Bearer "+testToken && !c.refuse {
		return "system:bootstrap:abcdef"
	}
	c.refused++
	status(w, http.StatusUnauthorized, metav1.StatusReasonUnauthorized)
	return ""
}

func (c *cluster) create(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	user := c.user(w, r)
	if user == "" {
		return
	}
	csr := &certificatesv1.CertificateSigningRequest{}
	data, _ := io.ReadAll(r.Body)
	if err := json.Unmarshal(data, csr); err != nil {
		status(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
		return
	}
	csr.Name = fmt.Sprintf("%s%d", csr.GenerateName, len(c.by))
	c.requests[csr.Name] = csr
	c.by = append(c.by, user)
	_ = json.NewEncoder(w).Encode(csr)
}

func (c *cluster) get(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.user(w, r) == "" {
		return
	}
	csr := c.requests[r.PathValue("name")]
	switch {
	case csr == nil:
		status(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	case c.deny:
		csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied, Reason: "No"}}
	case !c.hold && csr.Status.Certificate == nil:
		c.issue(csr)
	}
	_ = json.NewEncoder(w).Encode(csr)
}

// issue checks what kube-controller-manager checks.
func (c *cluster) issue(csr *certificatesv1.CertificateSigningRequest) {
	block, _ := pem.Decode(csr.Spec.Request)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	must(c.t, err)
	if request.Subject.CommonName != testUser || strings.Join(request.Subject.Organization, ",") != "system:nodes" {
		c.t.Errorf("request of %v", request.Subject)
	}
	usage := x509.ExtKeyUsageClientAuth
	switch csr.Spec.SignerName {
	case certificatesv1.KubeAPIServerClientKubeletSignerName:
		if len(request.DNSNames)+len(request.IPAddresses) > 0 || fmt.Sprint(csr.Spec.Usages) != "[digital signature client auth]" {
			c.t.Errorf("client request with %v %v %v", request.DNSNames, request.IPAddresses, csr.Spec.Usages)
		}
	case certificatesv1.KubeletServingSignerName:
		usage = x509.ExtKeyUsageServerAuth
		if fmt.Sprint(csr.Spec.Usages) != "[digital signature server auth]" {
			c.t.Errorf("server request with %v", csr.Spec.Usages)
		}
	default:
		c.t.Errorf("signer %s", csr.Spec.SignerName)
	}
	now := c.now().Add(c.ahead)
	csr.Status.Certificate = c.signing.sign(c.t, &x509.Certificate{
		Subject: request.Subject, NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(c.life),
		DNSNames: request.DNSNames, IPAddresses: request.IPAddresses, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, request.PublicKey)
}

func (c *cluster) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

func (c *cluster) created() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.by...)
}

func (c *cluster) refusals() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused
}

// kubeconfig writes a bootstrap file.
func (c *cluster) kubeconfig(dir string, ca []byte) string {
	path := filepath.Join(dir, "bootstrap.conf")
	must(c.t, os.WriteFile(path, fmt.Appendf(nil, `
current-context: b
contexts: [{name: b, context: {cluster: k, user: u}}]
clusters: [{name: other, cluster: {server: "https://wrong"}}, {name: k, cluster: {server: %q, certificate-authority-data: %q}}]
users: [{name: other, user: {token: wrong}}, {name: u, user: {token: %s}}]
`, c.URL, base64.StdEncoding.EncodeToString(ca), testToken), 0o600))
	return path
}

func (c *cluster) config(t testing.TB) Config {
	dir := t.TempDir()
	return Config{
		Dir: filepath.Join(dir, "pki"), NodeName: testNode, BootstrapKubeconfig: c.kubeconfig(dir, c.pem),
		KubeletCert: filepath.Join(dir, "kubelet.pem"), DummyIP: net.IPv4(169, 254, 2, 1), NodeIPs: []net.IP{net.IPv4(10, 0, 0, 5)}, ServerIPs: []net.IP{net.IPv4(10, 96, 0, 1)}, Keys: newSealer(t),
		Log: slog.New(slog.DiscardHandler),
	}
}

func open(t testing.TB, cfg Config) *Certificates {
	t.Helper()
	c, err := New(cfg)
	must(t, err)
	return c
}

// run runs c until the returned function is called, or the test ends.
func run(t testing.TB, c *Certificates) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { must(t, c.Run(ctx)) })
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

// until waits for a condition that other goroutines bring about.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("no %s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestBootstrap(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	c := open(t, cfg)
	if c.ClientCertificate() != nil {
		t.Fatal("a certificate out of nowhere")
	}
	changed := c.ClientChanged()
	stop := run(t, c)
	<-c.Ready()
	<-changed
	if got := c.ClientCertificate().Leaf.Subject.String(); got != "CN="+testUser+",O=system:nodes" {
		t.Errorf("got %s", got)
	}
	until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
	stop()
	if by := strings.Join(cluster.created(), " "); by != "system:bootstrap:abcdef "+testUser {
		t.Errorf("requests by %s", by)
	}
	for file, want := range map[string]os.FileMode{clientFile: 0o600, clusterServerFile: 0o600, localCAFile: 0o600, localServerFile: 0o600, BundleFile: 0o644, clusterCAFile: 0o644} {
		info, err := os.Stat(filepath.Join(cfg.Dir, file))
		must(t, err)
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %s", file, info.Mode())
		}
	}
	if left, _ := filepath.Glob(filepath.Join(cfg.Dir, "*.pending")); len(left) > 0 {
		t.Errorf("left over: %s", left)
	}

	// Without the cloud and without the bootstrap file, all is as it was.
	cluster.Close()
	must(t, os.Remove(cfg.BootstrapKubeconfig))
	again := open(t, cfg)
	<-again.Ready()
	if again.ClusterCAs() == nil || again.clusterServer.Load() == nil || !again.ClientCertificate().Leaf.Equal(c.ClientCertificate().Leaf) {
		t.Error("certificates are lost at restart")
	}
}

func TestBootstrapByHash(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	cluster.kubeconfig(filepath.Dir(cfg.BootstrapKubeconfig), nil)
	other := newSigner(t) // that the node must not trust
	cluster.set(func() { cluster.info = append(bytes.Clone(other.pem), cluster.pem...) })
	cfg.CAHashes = []string{"sha256:" + strings.Repeat("0", 64)}
	c := open(t, cfg)
	if err := c.discover(t.Context()); err == nil || !strings.Contains(err.Error(), "pinned") || c.ClusterCAs() != nil {
		t.Errorf("believed an authority of another hash: %v", err)
	}
	cfg.CAHashes = append(cfg.CAHashes, cluster.hash())
	c = open(t, cfg)
	_, err := c.obtain(t.Context(), c.clientOrder())
	must(t, err)
	bundle, err := os.ReadFile(c.BundlePath())
	must(t, err)
	if string(bundle) != string(cluster.pem)+string(c.local.authorityPEM()) {
		t.Errorf("bundle is\n%s", bundle)
	}

	cfg.Dir, cfg.CAHashes = t.TempDir(), nil
	if err := open(t, cfg).discover(t.Context()); err == nil {
		t.Error("believed an authority without a pin")
	}
}

func TestAnotherServerIsNotTrusted(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	cluster.kubeconfig(filepath.Dir(cfg.BootstrapKubeconfig), newSigner(t).pem)
	if _, err := open(t, cfg).obtain(t.Context(), order{signer: "s"}); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("got %v", err)
	}
}

func TestSecondServerIsTried(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	cfg.Servers = []string{"https://127.0.0.1:1", cluster.URL}
	c := open(t, cfg)
	run(t, c)
	<-c.Ready()
}

func TestRotation(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	cluster.set(func() { cluster.refuse = true }) // the token is long gone
	cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, time.Minute)
	c := open(t, cfg)
	old := c.ClientCertificate()
	<-c.Ready()
	changed := c.ClientChanged()
	stop := run(t, c)
	<-changed
	stop()
	if c.ClientCertificate().Leaf.Equal(old.Leaf) || cluster.created()[0] != testUser {
		t.Errorf("requests by %s", cluster.created())
	}
}

func TestExpiredCertificateIsKeptAndReplacedByToken(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, -time.Minute)
	c := open(t, cfg)
	<-c.Ready()
	old := c.ClientCertificate()
	cluster.set(func() { cluster.refuse = true })
	if _, err := c.obtain(t.Context(), c.clientOrder()); err == nil {
		t.Error("the cluster takes expired certificates")
	}
	if c.ClientCertificate() != old {
		t.Error("the expired certificate is lost")
	}
	cluster.set(func() { cluster.refuse = false })
	changed := c.ClientChanged()
	stop := run(t, c)
	<-changed
	stop()
	if cluster.created()[0] != "system:bootstrap:abcdef" {
		t.Errorf("requests by %s", cluster.created())
	}
}

func TestUnusableCertificatesAreRequestedAnew(t *testing.T) {
	for name, spoil := range map[string]func(*cluster, string){
		"of another node": func(c *cluster, path string) { c.pair(t, path, "system:node:edge-2", time.Hour) },
		"torn":            func(_ *cluster, path string) { must(t, os.WriteFile(path, []byte("-----BEGIN"), 0o600)) },
		"empty":           func(_ *cluster, path string) { must(t, os.WriteFile(path, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			cluster := newCluster(t)
			cfg := cluster.config(t)
			must(t, os.MkdirAll(cfg.Dir, 0o700))
			spoil(cluster, filepath.Join(cfg.Dir, clientFile))
			spoil(cluster, filepath.Join(cfg.Dir, localCAFile))
			must(t, os.WriteFile(filepath.Join(cfg.Dir, clientFile+".pending"), []byte("{"), 0o600))
			c := open(t, cfg)
			if c.ClientCertificate() != nil {
				t.Fatal("took it")
			}
			run(t, c)
			<-c.Ready()
		})
	}
}

func TestPendingRequestSurvivesRestart(t *testing.T) {
	cluster := newCluster(t)
	cluster.set(func() { cluster.hold = true })
	cfg := cluster.config(t)
	c := open(t, cfg)
	stop := run(t, c)
	until(t, "request", func() bool { return len(cluster.created()) == 1 })
	until(t, "note of it", func() bool {
		_, err := os.Stat(filepath.Join(cfg.Dir, clientFile+".pending"))
		return err == nil
	})
	stop()
	cluster.set(func() { cluster.hold = false })
	c = open(t, cfg)
	stop = run(t, c)
	<-c.Ready()
	stop()
	if n := strings.Count(strings.Join(cluster.created(), " "), "bootstrap"); n != 1 {
		t.Errorf("%d requests with the token", n)
	}
	// One that the cluster forgot is made anew.
	must(t, (&pending{Name: "gone", Key: mustKey(t)}).store(filepath.Join(cfg.Dir, clientFile+".pending"), nil))
	if _, err := c.obtain(t.Context(), c.clientOrder()); err == nil {
		t.Error("got a certificate for a request that is gone")
	}
	if _, err := c.obtain(t.Context(), c.clientOrder()); err != nil {
		t.Error(err)
	}
}

func mustKey(t testing.TB) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.MarshalECPrivateKey(key)
	must(t, err)
	return der
}

func TestDenial(t *testing.T) {
	cluster := newCluster(t)
	cluster.set(func() { cluster.deny = true })
	c := open(t, cluster.config(t))
	_, err := c.obtain(t.Context(), c.clientOrder())
	if err == nil || !strings.Contains(err.Error(), "denied") || !strings.Contains(err.Error(), "No") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(c.path(clientFile + ".pending")); err == nil {
		t.Error("the denied request is kept")
	}
}

func TestPendingServerCertificateBlocksNothing(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	cluster.set(func() { cluster.hold = true })
	cluster.pair(t, filepath.Join(cfg.Dir, clientFile), testUser, 1000*time.Hour)
	c := open(t, cfg)
	run(t, c)
	<-c.Ready()
	until(t, "request", func() bool { return len(cluster.created()) == 1 })
	if pair, err := c.GetCertificate(hello("kubernetes", "169.254.2.1")); err != nil || pair.Leaf.Issuer.CommonName == "kubernetes" {
		t.Errorf("got %v, %v", pair, err)
	}
	cluster.set(func() { cluster.hold = false })
	until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
}

// conn is a connection that arrived at an address.
type conn struct {
	net.Conn
	at string
}

func (c conn) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(c.at), Port: 10268} }

func hello(name, at string) *tls.ClientHelloInfo {
	return &tls.ClientHelloInfo{ServerName: name, Conn: conn{at: at}}
}

func TestGetCertificate(t *testing.T) {
	cluster := newCluster(t)
	c := open(t, cluster.config(t))
	stop := run(t, c)
	until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
	stop()
	for _, tt := range []struct {
		name, at string
		cluster  bool
	}{
		{"", "169.254.2.1", true},
		{"kubernetes.default.svc", "127.0.0.1", true},
		{"kubernetes", "127.0.0.1", true},
		{"kubernetesque", "127.0.0.1", false},
		{"localhost", "127.0.0.1", false},
		{"", "127.0.0.1", false},
		{"", "::1", false},
	} {
		pair, err := c.GetCertificate(hello(tt.name, tt.at))
		must(t, err)
		if got := pair.Leaf.Issuer.CommonName == "kubernetes"; got != tt.cluster {
			t.Errorf("%+v: signed by the cluster is %t", tt, got)
		}
	}
	if _, err := c.GetCertificate(&tls.ClientHelloInfo{}); err != nil {
		t.Error(err)
	}
	leaf := c.clusterServer.Load().Leaf
	for _, name := range []string{"169.254.2.1", "10.0.0.5", "10.96.0.1", "kubernetes.default.svc"} {
		must(t, leaf.VerifyHostname(name))
	}
	// One that lapsed while the cloud was away is worse than the local one.
	stale := *c.clusterServer.Load()
	lapsed := *leaf
	lapsed.NotAfter = time.Now().Add(-time.Second)
	stale.Leaf = &lapsed
	c.clusterServer.Store(&stale)
	if pair, _ := c.GetCertificate(hello("", "169.254.2.1")); pair == &stale {
		t.Error("an expired certificate is served")
	}
}

// localChain verifies the local server certificate by the bundle, as a client
// on the node does.
func localChain(c *Certificates, name string) error {
	bundle, err := os.ReadFile(c.BundlePath())
	if err != nil {
		return err
	}
	a, err := parseAuthority(bundle)
	if err != nil {
		return err
	}
	pair, err := c.local.certificate()
	if err != nil {
		return err
	}
	_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: a.pool, DNSName: name})
	return err
}

func TestLocalAuthority(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), NodeName: testNode, DummyIP: net.ParseIP("169.254.2.1"), NodeIPs: []net.IP{net.ParseIP("10.0.0.5")}, Log: slog.New(slog.DiscardHandler)}
	c := open(t, cfg)
	for _, name := range []string{"127.0.0.1", "::1", "localhost", testNode, "169.254.2.1", "10.0.0.5", "kubernetes.default.svc"} {
		if err := localChain(c, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// It cannot vouch for others.
	for _, template := range []*x509.Certificate{
		{DNSNames: []string{"example.org"}}, {DNSNames: []string{"api.cluster.local"}}, {IPAddresses: []net.IP{net.IPv4(10, 0, 0, 6)}},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		template.SerialNumber, template.NotAfter = big.NewInt(7), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, c.local.ca.Leaf, key.Public(), c.local.ca.PrivateKey)
		must(t, err)
		leaf, err := x509.ParseCertificate(der)
		must(t, err)
		roots := x509.NewCertPool()
		roots.AddCert(c.local.ca.Leaf)
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots}); err == nil {
			t.Errorf("the local authority vouches for %v %v", template.DNSNames, template.IPAddresses)
		}
	}

	again := open(t, cfg)
	if !again.local.ca.Leaf.Equal(c.local.ca.Leaf) || !again.local.server.Leaf.Equal(c.local.server.Leaf) {
		t.Error("a restart makes new certificates")
	}
	// A new node address is not worth a new authority.
	cfg.NodeIPs = []net.IP{net.ParseIP("10.0.0.9")}
	again = open(t, cfg)
	if !again.local.ca.Leaf.Equal(c.local.ca.Leaf) || localChain(again, "127.0.0.1") != nil {
		t.Error("a changed node address spoils the authority")
	}
	// A new dummy address is.
	cfg.DummyIP = net.ParseIP("169.254.2.9")
	again = open(t, cfg)
	for _, name := range []string{"169.254.2.9", "10.0.0.9", "127.0.0.1"} {
		if err := localChain(again, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLocalCertificateAndTime(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), NodeName: testNode, Log: slog.New(slog.DiscardHandler)}
	synctest.Test(t, func(t *testing.T) { // in the year 2000: the clock is wrong
		c := open(t, cfg)
		must(t, localChain(c, "localhost"))
	})
	c := open(t, cfg) // today
	must(t, localChain(c, "localhost"))
	first := c.local.server.Leaf
	if first.NotBefore.Year() > 1970 {
		t.Errorf("valid from %s", first.NotBefore)
	}
	synctest.Test(t, func(t *testing.T) { // and back, as after a power cut
		c := open(t, cfg)
		must(t, localChain(c, "localhost"))
		for range 40 { // years
			<-time.After(365 * 24 * time.Hour)
			c = open(t, cfg)
			must(t, localChain(c, "localhost"))
		}
		if c.local.server.Leaf.Equal(first) {
			t.Error("never renewed")
		}
	})
}

func TestKubeletCertificate(t *testing.T) {
	cluster := newCluster(t)
	dir := t.TempDir()
	cfg := Config{
		Dir: filepath.Join(dir, "pki"), NodeName: testNode, Mode: ModeKubelet, Servers: []string{cluster.URL},
		KubeletCert: filepath.Join(dir, "kubelet.pem"), ClusterCAFile: filepath.Join(dir, "ca.crt"), Log: slog.New(slog.DiscardHandler),
	}
	must(t, os.WriteFile(cfg.ClusterCAFile, cluster.pem, 0o600))
	c := open(t, cfg)
	stop := run(t, c)
	cluster.pair(t, cfg.KubeletCert, testUser, 1000*time.Hour)
	<-c.Ready()
	until(t, "server certificate", func() bool { return c.clusterServer.Load() != nil })
	stop()
	if by := cluster.created(); len(by) != 1 || by[0] != testUser {
		t.Errorf("requests by %s", by)
	}

	first, changed := c.ClientCertificate(), c.ClientChanged()
	must(t, c.loadKubelet())
	if c.ClientCertificate() != first {
		t.Error("an unchanged certificate is news")
	}
	cluster.pair(t, cfg.KubeletCert, testUser, 2000*time.Hour)
	must(t, c.loadKubelet())
	<-changed
	cluster.pair(t, cfg.KubeletCert, "system:node:edge-2", time.Hour)
	if c.loadKubelet() == nil || c.ClientCertificate().Leaf.Subject.CommonName != testUser {
		t.Error("took the certificate of another node")
	}
}

func TestClusterAuthorityIsReloaded(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	cfg.ClusterCAFile = filepath.Join(t.TempDir(), "ca.crt")
	must(t, os.WriteFile(cfg.ClusterCAFile, cluster.pem, 0o600))
	c := open(t, cfg)
	pool := c.ClusterCAs()
	must(t, c.loadCluster())
	if c.ClusterCAs() != pool {
		t.Error("another pool though nothing changed")
	}
	next := newSigner(t)
	must(t, os.WriteFile(cfg.ClusterCAFile, append(next.pem, cluster.pem...), 0o600))
	must(t, c.loadCluster())
	must(t, c.writeBundle())
	bundle, err := os.ReadFile(c.BundlePath())
	must(t, err)
	if c.ClusterCAs() == pool || strings.Count(string(bundle), "BEGIN") != 3 {
		t.Errorf("bundle is\n%s", bundle)
	}
	must(t, os.WriteFile(cfg.ClusterCAFile, []byte("junk"), 0o600))
	if c.loadCluster() == nil || c.ClusterCAs() == nil {
		t.Error("junk taken for an authority")
	}
}

func TestRenewal(t *testing.T) {
	day := 24 * time.Hour
	for _, life := range []time.Duration{time.Hour, 365 * day, 100 * 365 * day} {
		from := time.Now()
		for last := range 256 {
			leaf := &x509.Certificate{NotBefore: from, NotAfter: from.Add(life), Signature: []byte{0, byte(last)}}
			if at := renewal(leaf).Sub(from).Seconds() / life.Seconds(); at < 0.699 || at > 0.901 {
				t.Fatalf("life %s, byte %d: renewed at %.3f", life, last, at)
			}
		}
	}
}

func TestConfigErrors(t *testing.T) {
	for want, cfg := range map[string]Config{
		"no node name": {},
		"unknown":      {NodeName: "n", Mode: "magic"},
	} {
		cfg.Dir = t.TempDir()
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	c := open(t, Config{Dir: t.TempDir(), NodeName: "n", BootstrapKubeconfig: "/nonexistent", Log: slog.New(slog.DiscardHandler)})
	wants := func(want string) {
		t.Helper()
		if _, err := c.obtain(t.Context(), c.clientOrder()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	wants("authority is not known")
	must(t, c.setCluster(newSigner(t).pem))
	wants("neither a client certificate nor a bootstrap token")
}
