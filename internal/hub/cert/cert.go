package cert

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// Mode says where the client certificate comes from.
type Mode string

// The modes, by the names that OpenYurt gave them.
const (
	// ModeToken requests a certificate with a bootstrap token.
	ModeToken Mode = "token"
	// ModeKubelet uses the certificate of the node's kubelet.
	ModeKubelet Mode = "kubeletcertificate"
)

// Defaults of Config.
const (
	DefaultKubeletCert = "/var/lib/kubelet/pki/kubelet-client-current.pem"
	DefaultKubeletCA   = "/etc/kubernetes/pki/ca.crt"
)

// Names of files in Config.Dir. The .pem files hold a key beside its
// certificate, sealed if Config.Keys is set.
const (
	BundleFile = "ca-bundle.crt" // the cluster's authority and the local one

	clusterCAFile     = "ca.crt"
	clientFile        = "hub-client.pem"
	clusterServerFile = "hub-server-cluster.pem"
	localServerFile   = "hub-server-local.pem"
	localCAFile       = "hub-local-ca.pem"
)

// refreshInterval is how often files that others own are read again, and
// certificates are checked for their age. It also bounds how long a step of the
// clock goes unnoticed.
const refreshInterval = time.Minute

// Config says which certificates to keep, and where.
type Config struct {
	Dir      string // created if absent
	NodeName string
	Mode     Mode // ModeToken if empty
	// Servers are the URLs of the API servers, tried in order; those of
	// BootstrapKubeconfig if empty.
	Servers []string

	// BootstrapKubeconfig holds the bootstrap token and mostly the cluster's
	// authority. It may be gone once there is a certificate.
	BootstrapKubeconfig string
	// CAHashes pin the cluster's authority, as "sha256:<hex>" of its public
	// key, when no file holds it. It is then asked from the cluster.
	CAHashes []string
	// ClusterCAFile holds the cluster's authority and is read again when it
	// changes. With ModeKubelet it is DefaultKubeletCA if empty.
	ClusterCAFile string
	// KubeletCert is for ModeKubelet; DefaultKubeletCert if empty.
	KubeletCert string

	// DummyIP is the address at which pods reach the hub; nil if there is none.
	DummyIP net.IP
	// NodeIPs are the node's own addresses, to be named by both server
	// certificates.
	NodeIPs []net.IP
	// ServerIPs and ServerNames are further names for the server certificate
	// that the cluster signs, such as the first service address.
	ServerIPs   []net.IP
	ServerNames []string

	// Keys seals the private keys in Dir. Nil leaves them readable by the
	// files' owner.
	Keys Sealer

	// Clock is what validity is judged by; the machine's if nil.
	Clock *clock.Clock

	Log *slog.Logger // slog.Default() if nil
}

// Certificates holds the current certificates. It is safe for concurrent use.
type Certificates struct {
	cfg     Config
	servers atomic.Pointer[[]string]

	client        atomic.Pointer[tls.Certificate]
	clusterServer atomic.Pointer[tls.Certificate]
	cluster       atomic.Pointer[authority]
	over          atomic.Pointer[Link]
	ready         chan struct{} // closed when there is a client certificate
	news          chan struct{} // holds a token when the authorities shall be looked at

	files sync.Mutex // guards writing of the authority and the bundle

	mu            sync.Mutex    // guards the following
	clientChanged chan struct{} // closed and replaced when client or authority changes
	replaced      []byte        // the client certificate before, in DER
	replacedAt    time.Time
	trouble       map[string]trouble // by file of the order

	local localAuthority
}

// authority is the cluster's certificate authority.
type authority struct {
	pem   []byte
	certs []*x509.Certificate
	pool  *x509.CertPool
}

// New loads what is on disk and makes the local authority and its server
// certificate if need be. It asks nothing of the cloud.
func New(cfg Config) (*Certificates, error) {
	if cfg.NodeName == "" {
		return nil, errors.New("keep certificates: no node name given")
	}
	switch cfg.Mode {
	case "":
		cfg.Mode = ModeToken
	case ModeToken, ModeKubelet:
	default:
		return nil, fmt.Errorf("keep certificates: unknown bootstrap mode %q, want %s or %s", cfg.Mode, ModeToken, ModeKubelet)
	}
	if cfg.Mode == ModeKubelet && cfg.ClusterCAFile == "" {
		cfg.ClusterCAFile = DefaultKubeletCA
	}
	if cfg.KubeletCert == "" {
		cfg.KubeletCert = DefaultKubeletCert
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("keep certificates: %w", err)
	}
	c := &Certificates{cfg: cfg, ready: make(chan struct{}), news: make(chan struct{}, 1), clientChanged: make(chan struct{}), trouble: map[string]trouble{}}
	c.servers.Store(&cfg.Servers)
	if err := c.loadCluster(); err != nil {
		return nil, err
	}
	if err := c.local.open(cfg); err != nil {
		return nil, err
	}
	if cfg.Mode == ModeToken {
		if pair, ok := c.loadOwn(clientFile); ok {
			c.setClient(pair)
		}
	} else if err := c.loadKubelet(); err != nil {
		cfg.Log.Info("kubelet has no certificate yet", "err", err)
	}
	if pair, ok := c.loadOwn(clusterServerFile); ok {
		c.clusterServer.Store(pair)
	}
	return c, c.writeBundle()
}

// Link is the hub's connection to the cloud, which shows the client certificate
// and trusts the cluster's authority.
type Link interface {
	Online() bool
	WaitUp(ctx context.Context) error
	Questions() http.RoundTripper
}

// Over makes requests go over a link while it is up, so that they need no
// connections of their own. Call it before Run.
func (c *Certificates) Over(l Link) { c.over.Store(&l) }

// Run keeps the certificates current until ctx ends, and returns nil.
func (c *Certificates) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	if c.cfg.Mode == ModeToken {
		g.Go(func() error { c.keepClient(ctx); return nil })
	}
	g.Go(func() error { c.keepClusterServer(ctx); return nil })
	g.Go(func() error { c.keepFiles(ctx); return nil })
	g.Go(func() error { c.keepAuthority(ctx); return nil })
	return g.Wait()
}

// Ready returns a channel that is closed once there is a client certificate.
func (c *Certificates) Ready() <-chan struct{} { return c.ready }

// ClientCertificate returns the client certificate, nil before Ready. It may
// have expired.
func (c *Certificates) ClientCertificate() *tls.Certificate { return c.client.Load() }

// ClientChanged returns a channel that is closed when the client certificate or
// the cluster's authority is next replaced. Connections that were made with the
// old one should then end.
func (c *Certificates) ClientChanged() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clientChanged
}

// ClusterCAs returns the cluster's certificate authority: the same pool until
// it changes, nil before it is known.
func (c *Certificates) ClusterCAs() *x509.CertPool {
	if a := c.cluster.Load(); a != nil {
		return a.pool
	}
	return nil
}

// BundlePath returns the file with the cluster's and the node's authorities,
// which clients on this node should trust.
func (c *Certificates) BundlePath() string { return c.path(BundleFile) }

// Servers returns the URLs of the API servers, from the configuration or the
// bootstrap file.
func (c *Certificates) Servers() []string { return *c.servers.Load() }

// GetCertificate is for tls.Config. Callers at the dummy address, or that ask
// for a name of the Kubernetes service, are pods: they get the certificate that
// the cluster signed, when there is one. All others get the local one.
func (c *Certificates) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if pair := c.clusterServer.Load(); pair != nil && c.fromPod(hello) && c.cfg.Clock.Now().Before(pair.Leaf.NotAfter) {
		return pair, nil
	}
	return c.local.certificate()
}

// ServesPods reports whether pods that come to the dummy address are shown a
// certificate that they trust.
func (c *Certificates) ServesPods() bool {
	return c.cfg.DummyIP != nil && c.Names(c.cfg.DummyIP.String())
}

// Names reports whether the certificate that pods are shown names a host.
func (c *Certificates) Names(host string) bool {
	pair := c.clusterServer.Load()
	return pair != nil && pair.Leaf.VerifyHostname(host) == nil
}

func (c *Certificates) fromPod(hello *tls.ClientHelloInfo) bool {
	if name := hello.ServerName; name == "kubernetes" || strings.HasPrefix(name, "kubernetes.") {
		return true
	}
	if hello.Conn == nil || c.cfg.DummyIP == nil {
		return false
	}
	addr, ok := hello.Conn.LocalAddr().(*net.TCPAddr)
	return ok && addr.IP.Equal(c.cfg.DummyIP)
}

func (c *Certificates) path(name string) string { return filepath.Join(c.cfg.Dir, name) }

func (c *Certificates) userName() string { return "system:node:" + c.cfg.NodeName }

// setClient makes pair the client certificate and tells those who care.
func (c *Certificates) setClient(pair *tls.Certificate) {
	old := c.client.Swap(pair)
	c.cfg.Clock.Saw(pair.Leaf.NotBefore)
	c.cfg.Log.Info("client certificate in use", "name", pair.Leaf.Subject.CommonName, "expires", pair.Leaf.NotAfter)
	c.mu.Lock()
	defer c.mu.Unlock()
	if old == nil {
		close(c.ready)
	} else {
		c.replaced, c.replacedAt = old.Leaf.Raw, time.Now()
	}
	c.changedLocked()
}

func (c *Certificates) changedLocked() {
	close(c.clientChanged)
	c.clientChanged = make(chan struct{})
}

// overlap is how long a replaced certificate still counts as the node's own:
// clients look for a new one every few minutes.
const overlap = 10 * time.Minute

// Own tells whether a certificate, in DER, is the one by which this node is
// known now: the hub's, the kubelet's, or the one that was replaced just now.
func (c *Certificates) Own(der []byte) bool {
	if pair := c.client.Load(); pair != nil && bytes.Equal(pair.Leaf.Raw, der) {
		return true
	}
	c.mu.Lock()
	replaced := bytes.Equal(c.replaced, der) && time.Since(c.replacedAt) < overlap
	c.mu.Unlock()
	if replaced {
		return true
	}
	pair, err := loadPair(c.cfg.KubeletCert, nil)
	return err == nil && bytes.Equal(pair.Leaf.Raw, der) && pair.Leaf.Subject.CommonName == c.userName()
}

// loadOwn loads a certificate of this node from Dir. One that cannot be used is
// as good as none: it will be requested again.
func (c *Certificates) loadOwn(name string) (*tls.Certificate, bool) {
	pair, err := loadPair(c.path(name), c.cfg.Keys)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, false
	case err != nil:
		c.cfg.Log.Warn("stored certificate is unusable", "err", err)
		return nil, false
	case pair.Leaf.Subject.CommonName != c.userName():
		c.cfg.Log.Warn("stored certificate is of another node", "name", pair.Leaf.Subject.CommonName)
		return nil, false
	}
	return pair, true
}

// loadKubelet takes over the kubelet's certificate if it changed.
func (c *Certificates) loadKubelet() error {
	pair, err := loadPair(c.cfg.KubeletCert, nil)
	if err != nil {
		return err
	}
	if name := pair.Leaf.Subject.CommonName; name != c.userName() {
		return fmt.Errorf("load %s: it is for %s, not for %s", c.cfg.KubeletCert, name, c.userName())
	}
	if old := c.client.Load(); old == nil || !bytes.Equal(old.Leaf.Raw, pair.Leaf.Raw) {
		c.setClient(pair)
	}
	return nil
}

// keepFiles follows the files that others write, and the local authority.
func (c *Certificates) keepFiles(ctx context.Context) {
	for {
		wait := refreshInterval
		if c.cfg.Mode == ModeKubelet {
			err := c.loadKubelet()
			if c.client.Load() == nil {
				wait = time.Second // the kubelet may be starting right now
			} else if err != nil {
				c.cfg.Log.Warn("kubelet's certificate is unusable, keeping the last one", "err", err)
			}
		}
		if err := c.loadCluster(); err != nil {
			c.cfg.Log.Warn("cluster's authority is unusable, keeping the last one", "err", err)
		}
		if _, err := c.local.certificate(); err != nil {
			c.cfg.Log.Warn("local server certificate is not renewed", "err", err)
		}
		if err := c.writeBundle(); err != nil {
			c.cfg.Log.Warn("certificate bundle is not written", "err", err)
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// sleep tells whether ctx is still alive after the wait.
func sleep(ctx context.Context, wait time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(wait):
		return true
	}
}
