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
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/atomicfile"
)

const (
	requestTimeout = 15 * time.Second
	maxAnswer      = 1 << 20

	// Requests of the kubelet-client signer are approved and signed within a
	// fraction of a second, so the first looks come quickly. Those that wait
	// for a person are looked at ever more seldom: when they have waited half
	// as long again, whether the hub was restarted meanwhile or not.
	pollMin, pollMax = 100 * time.Millisecond, 10 * time.Minute
	// Failures mean that the cloud is away, or refuses.
	retryMin, retryMax = time.Second, time.Minute
	// deniedWait is how long a denial is respected before asking anew.
	deniedWait = time.Hour
	// approvalWait is after how long a request is said to wait for a person.
	approvalWait = time.Minute
	// soundPoll is how often a clock that is a guess is looked at again.
	soundPoll = 5 * time.Second
	// successorWait is how often a certificate of the cluster's newest
	// authority is asked for while another one still signs.
	successorWait = 12 * time.Hour
	// futureLeeway is how far ahead of its time a certificate may be.
	futureLeeway = 10 * time.Minute

	requestsPath = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
)

// errNoCredential says that there is nothing to ask the cluster with.
var errNoCredential = errors.New("neither a client certificate nor a bootstrap token")

// deniedError says that the cluster will not sign a request.
type deniedError struct{ name, reason string }

func (e *deniedError) Error() string {
	return "the certificate request " + e.name + " is denied: " + e.reason
}

// order says which certificate to ask of the cluster.
type order struct {
	file   string // in Dir; the pending request is kept beside it
	signer string
	usage  certificatesv1.KeyUsage
	names  []string
	ips    []net.IP
}

func (c *Certificates) clientOrder() order {
	return order{file: clientFile, signer: certificatesv1.KubeAPIServerClientKubeletSignerName, usage: certificatesv1.UsageClientAuth}
}

func (c *Certificates) serverOrder() order {
	o := order{
		file: clusterServerFile, signer: certificatesv1.KubeletServingSignerName, usage: certificatesv1.UsageServerAuth,
		names: append(serviceNames(), c.cfg.ServerNames...),
		ips:   slices.Concat(c.cfg.NodeIPs, c.cfg.ServerIPs),
	}
	if c.cfg.DummyIP != nil {
		o.ips = append(o.ips, c.cfg.DummyIP)
	}
	return o
}

// keepClient requests the client certificate when there is none, and again
// before it ends.
func (c *Certificates) keepClient(ctx context.Context) {
	c.keep(ctx, c.clientOrder, c.client.Load, c.setClient)
}

// keepClusterServer does the same for the server certificate, as soon as there
// is a client certificate to ask with.
func (c *Certificates) keepClusterServer(ctx context.Context) {
	select {
	case <-c.ready:
	case <-ctx.Done():
		return
	}
	c.keep(ctx, c.serverOrder, c.clusterServer.Load, func(pair *tls.Certificate) {
		c.clusterServer.Store(pair)
		c.cfg.Log.Info("server certificate of the cluster in use", "expires", pair.Leaf.NotAfter)
	})
}

// keep obtains the ordered certificate whenever the loaded one will not do. The
// loaded one stays in use until the new one has proved itself.
func (c *Certificates) keep(ctx context.Context, ordered func() order, load func() *tls.Certificate, use func(*tls.Certificate)) {
	retry := backoff{min: retryMin, max: retryMax}
	var last time.Time // when one was obtained
	for {
		o, changed := ordered(), c.ClientChanged()
		if left := c.left(o, load(), last); left > 0 {
			select {
			case <-ctx.Done():
				return
			case <-changed: // the authority, perhaps
			case <-time.After(min(left, refreshInterval)):
			}
			continue
		}
		pair, err := c.obtain(ctx, o)
		if ctx.Err() != nil {
			return
		}
		c.note(o.file, err)
		wait := retry.next()
		switch _, denied := errors.AsType[*deniedError](err); {
		case err == nil:
			retry.reset()
			use(pair)
			c.look()
			last, wait = time.Now(), 0
			if c.left(o, pair, last) <= 0 {
				// The cluster's own clock is wrong, perhaps. That must not
				// flood it with requests.
				wait = deniedWait + jitter(deniedWait)
			}
		case denied:
			wait = deniedWait + jitter(deniedWait/4)
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// left returns for how long a certificate will do. Last is when one was
// obtained by this process.
func (c *Certificates) left(o order, pair *tls.Certificate, last time.Time) time.Duration {
	if pair == nil || !hasNames(pair.Leaf, o.names, o.ips) {
		return 0
	}
	if a := c.cluster.Load(); a != nil {
		known, newest := a.signed(pair.Leaf)
		// Where intermediates sign, dates alone count.
		direct := len(pair.Certificate) == 1
		if direct && (!known || !newest) && (last.IsZero() || time.Since(last) > successorWait) {
			return 0
		}
	}
	if !c.cfg.Clock.Sound() {
		// By a clock that runs ahead every certificate is old. Who can sign a
		// new one can tell the time first.
		return soundPoll
	}
	if c.cfg.Clock.Until(pair.Leaf.NotBefore) > futureLeeway {
		return 0 // made while some clock was ahead; it is refused until then
	}
	return c.cfg.Clock.Until(renewal(pair.Leaf))
}

// renewal returns when a certificate is to be replaced: after 70 to 90 % of its
// life, by a fraction that is different for each certificate and always the
// same for one, so that nodes made together do not ask together.
func renewal(leaf *x509.Certificate) time.Time {
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	fraction := leaf.Signature[len(leaf.Signature)-1]
	return leaf.NotBefore.Add(life/10*7 + life/5/256*time.Duration(fraction))
}

// backoff grows by half each time, and is jittered.
type backoff struct{ min, max, now time.Duration }

func (b *backoff) next() time.Duration {
	b.now = min(max(b.now*3/2, b.min), b.max)
	return b.now*3/4 + jitter(b.now/2)
}

func jitter(most time.Duration) time.Duration { return mathrand.N(most) }

func (b *backoff) reset() { b.now = 0 }

// pending is a request that the cluster may still answer. It is stored, because
// an answer can take days and the hub may restart meanwhile.
type pending struct {
	Name  string   `json:"name"`
	Names []string `json:"names,omitempty"`
	IPs   []net.IP `json:"ips,omitempty"`
	Key   []byte   `json:"key,omitempty"`    // DER, in memory and where it is not sealed
	Seal  []byte   `json:"sealed,omitempty"` // DER, sealed

	key *ecdsa.PrivateKey
}

// obtain requests a certificate, or goes on waiting for one that was requested
// before, until it is issued, is denied, or cannot be asked for now.
func (c *Certificates) obtain(ctx context.Context, o order) (*tls.Certificate, error) {
	if c.cluster.Load() == nil {
		if err := c.discover(ctx); err != nil {
			return nil, err
		}
		if err := c.writeBundle(); err != nil {
			return nil, err
		}
	}
	path := c.path(o.file) + ".pending"
	p := loadPending(path, o, c.cfg.Keys)
	if p == nil {
		var err error
		if p, err = c.request(ctx, o); err != nil {
			return nil, err
		}
		if err := p.store(path, c.cfg.Keys); err != nil {
			return nil, err
		}
	}
	issued, err := c.await(ctx, o.file, p.Name)
	if _, denied := errors.AsType[*deniedError](err); denied || apierrors.IsNotFound(err) {
		// NotFound: the cluster forgets requests after a day, or an hour.
		return nil, errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return nil, err
	}
	if err := c.try(ctx, o, p, issued); err != nil {
		return nil, err
	}
	pair, err := storePair(c.path(o.file), issued, p.key, c.cfg.Keys)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return pair, os.Remove(path)
}

// try uses a new client certificate once, so that one that does not work never
// takes the place of one that does. The request stays pending until then.
func (c *Certificates) try(ctx context.Context, o order, p *pending, issued []byte) error {
	if o.usage != certificatesv1.UsageClientAuth {
		return nil
	}
	keyPEM, err := encodeKey(p.key)
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(issued, keyPEM)
	if err != nil {
		return nil //nolint:nilerr // storing it fails likewise, and says so
	}
	csr := &certificatesv1.CertificateSigningRequest{}
	err = c.doAs(ctx, c.ClusterCAs(), credential{certificate: &pair}, http.MethodGet, requestsPath+"/"+p.Name, nil, csr)
	var status *apierrors.StatusError
	if errors.As(err, &status) && status.ErrStatus.Code != http.StatusUnauthorized {
		return nil // it knows who we are, whatever we may do
	}
	if err != nil {
		return fmt.Errorf("use the new certificate: %w", err)
	}
	return nil
}

// loadPending returns nil when there is none for the same order.
func loadPending(path string, o order, keys Sealer) *pending {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	p := &pending{}
	if json.Unmarshal(data, p) != nil {
		return nil
	}
	if keys != nil && p.Seal != nil {
		if p.Key, err = keys.Unseal(filepath.Base(path), p.Seal); err != nil {
			return nil
		}
	}
	if p.key, err = x509.ParseECPrivateKey(p.Key); err != nil {
		return nil
	}
	if !slices.Equal(p.Names, o.names) || !slices.EqualFunc(p.IPs, o.ips, net.IP.Equal) {
		return nil
	}
	return p
}

func (p *pending) store(path string, keys Sealer) error {
	out := *p
	if keys != nil {
		out.Key, out.Seal = nil, keys.Seal(filepath.Base(path), p.Key)
	}
	data, err := json.Marshal(out)
	if err != nil {
		return fmt.Errorf("encode pending request: %w", err)
	}
	if err := atomicfile.WriteFile(path, data, 0o600); err != nil {
		return fmt.Errorf("store pending request: %w", err)
	}
	return nil
}

// request creates a CertificateSigningRequest with a new key.
func (c *Certificates) request(ctx context.Context, o order) (*pending, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:     pkix.Name{CommonName: c.userName(), Organization: []string{"system:nodes"}},
		DNSNames:    o.names,
		IPAddresses: o.ips,
	}, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	in := &certificatesv1.CertificateSigningRequest{
		TypeMeta:   metav1.TypeMeta{APIVersion: "certificates.k8s.io/v1", Kind: "CertificateSigningRequest"},
		ObjectMeta: metav1.ObjectMeta{GenerateName: "yurthub-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}),
			SignerName: o.signer,
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, o.usage},
		},
	}
	out := &certificatesv1.CertificateSigningRequest{}
	if err := c.do(ctx, http.MethodPost, requestsPath, in, out); err != nil {
		return nil, fmt.Errorf("request certificate: %w", err)
	}
	return &pending{Name: out.Name, Names: o.names, IPs: o.ips, Key: der, key: key}, nil
}

// await returns the certificate that the cluster issues for a request. It
// returns an error when it is not to come, or when the cloud cannot be asked.
func (c *Certificates) await(ctx context.Context, file, name string) ([]byte, error) {
	begun := time.Now()
	for {
		csr := &certificatesv1.CertificateSigningRequest{}
		if err := c.do(ctx, http.MethodGet, requestsPath+"/"+name, nil, csr); err != nil {
			return nil, fmt.Errorf("get certificate request %s: %w", name, err)
		}
		for _, condition := range csr.Status.Conditions {
			switch condition.Type {
			case certificatesv1.CertificateDenied, certificatesv1.CertificateFailed:
				return nil, &deniedError{name, condition.Reason + ": " + condition.Message}
			}
		}
		if len(csr.Status.Certificate) > 0 {
			return csr.Status.Certificate, nil
		}
		waited := time.Since(begun)
		if made := csr.CreationTimestamp.Time; !made.IsZero() && c.cfg.Clock.Sound() {
			waited = max(waited, c.cfg.Clock.Since(made)-time.Second) // its grain
		}
		if waited > approvalWait {
			c.waits(file, name)
		}
		if !sleep(ctx, pollAfter(waited)) {
			return nil, context.Cause(ctx)
		}
	}
}

// pollAfter returns when to look again at a request that has waited so long.
func pollAfter(waited time.Duration) time.Duration {
	wait := min(max(waited/2, pollMin), pollMax)
	return wait*3/4 + jitter(wait/2)
}

// credential is a way to prove oneself to the API server.
type credential struct {
	certificate *tls.Certificate
	token       string
}

// credentials returns what there is, the likeliest to work first: the hub's own
// certificate, the bootstrap token, whose file is read anew, and the
// certificate of the kubelet, who is the same user. An expired certificate comes
// last but is tried, because the clock may be wrong.
func (c *Certificates) credentials() []credential {
	var out, lapsed []credential
	add := func(pair *tls.Certificate) {
		if c.cfg.Clock.Now().Before(pair.Leaf.NotAfter) {
			out = append(out, credential{certificate: pair})
		} else {
			lapsed = append(lapsed, credential{certificate: pair})
		}
	}
	own := c.client.Load()
	if own != nil {
		add(own)
	}
	if c.cfg.Mode == ModeToken {
		if c.cfg.BootstrapKubeconfig != "" {
			if boot, err := loadBootstrap(c.cfg.BootstrapKubeconfig); err == nil && boot.token != "" {
				out = append(out, credential{token: boot.token})
			}
		}
		pair, err := loadPair(c.cfg.KubeletCert, nil)
		if err == nil && pair.Leaf.Subject.CommonName == c.userName() {
			add(pair)
		}
	}
	return append(out, lapsed...)
}

// do sends a request to the first server that can be reached, with the first
// credential that it takes. An answer that is no success is an
// *apierrors.StatusError.
func (c *Certificates) do(ctx context.Context, method, path string, in, out any) error {
	credentials := c.credentials()
	if len(credentials) == 0 {
		return fmt.Errorf("%w in %q", errNoCredential, c.cfg.BootstrapKubeconfig)
	}
	if len(c.Servers()) == 0 {
		return errors.New("no API server is known")
	}
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	var errs []error
	for _, as := range credentials {
		err := c.doAs(ctx, c.ClusterCAs(), as, method, path, body, out)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		// Any other answer would be the same for the next credential.
		var status *apierrors.StatusError
		if errors.As(err, &status) && status.ErrStatus.Code != http.StatusUnauthorized && status.ErrStatus.Code != http.StatusForbidden {
			return err
		}
	}
	return errors.Join(errs...)
}

func newRequest(ctx context.Context, method, url string, as credential, body []byte) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "yurthub")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if as.token != "" {
		req.Header.Set("Authorization", "Bearer "+as.token)
	}
	return req, nil
}

// doAs sends a request to the first server that can be reached and that roots
// vouch for: over the hub's link where that shows the same credential to the
// same authorities, else on a connection of its own.
func (c *Certificates) doAs(ctx context.Context, roots *x509.CertPool, as credential, method, path string, body []byte, out any) error {
	over := c.over.Load()
	if over != nil && as.certificate != nil && as.certificate == c.client.Load() && roots == c.ClusterCAs() && (*over).Online() {
		return c.doOver(ctx, *over, method, path, body, out)
	}
	var errs []error
	for _, server := range c.Servers() {
		client, err := c.httpClient(server, roots, as)
		if err != nil {
			return err
		}
		req, err := newRequest(ctx, method, strings.TrimSuffix(server, "/")+path, as, body)
		if err != nil {
			return err
		}
		asked := time.Now()
		resp, err := client.Do(req)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			c.cfg.Clock.Hear(date, time.Since(asked))
		}
		return decode(resp, out)
	}
	return errors.Join(errs...)
}

func (c *Certificates) doOver(ctx context.Context, over Link, method, path string, body []byte, out any) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req, err := newRequest(ctx, method, "https://upstream"+path, credential{}, body)
	if err != nil {
		return err
	}
	resp, err := over.Questions().RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return decode(resp, out)
}

// httpClient returns a client for one request to a server, which may fail by
// the clock's word only.
func (c *Certificates) httpClient(server string, roots *x509.CertPool, as credential) (*http.Client, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("server %q: %w", server, err)
	}
	config := &tls.Config{RootCAs: roots, ServerName: u.Hostname(), MinVersion: tls.VersionTLS12}
	if config.RootCAs == nil {
		return nil, errNoAuthority // nil would mean the system's
	}
	c.cfg.Clock.Server(config)
	if as.certificate != nil {
		// Not Certificates: it is shown whatever authorities the server hints
		// at.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return as.certificate, nil }
	}
	transport := &http.Transport{TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true}
	return &http.Client{Transport: transport, Timeout: requestTimeout}, nil
}

func decode(resp *http.Response, out any) error {
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 == 2 {
		return json.Unmarshal(data, out)
	}
	status := metav1.Status{}
	if json.Unmarshal(data, &status) != nil || status.Kind != "Status" {
		status = metav1.Status{Message: resp.Status}
	}
	status.Code = int32(resp.StatusCode) //nolint:gosec // three digits
	return &apierrors.StatusError{ErrStatus: status}
}
