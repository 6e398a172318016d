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
	// for a person are looked at ever more seldom.
	pollMin, pollMax = 100 * time.Millisecond, 2 * time.Minute
	// Failures mean that the cloud is away, or refuses.
	retryMin, retryMax = time.Second, time.Minute
	// deniedWait is how long a denial is respected before asking anew.
	deniedWait = time.Hour

	requestsPath = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
)

// errDenied says that the cluster will not sign a request.
var errDenied = errors.New("the certificate request is denied")

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
	c.keep(ctx, c.clientOrder(), c.client.Load, c.setClient)
}

// keepClusterServer does the same for the server certificate, as soon as there
// is a client certificate to ask with.
func (c *Certificates) keepClusterServer(ctx context.Context) {
	select {
	case <-c.ready:
	case <-ctx.Done():
		return
	}
	c.keep(ctx, c.serverOrder(), c.clusterServer.Load, func(pair *tls.Certificate) {
		c.clusterServer.Store(pair)
		c.cfg.Log.Info("server certificate of the cluster in use", "expires", pair.Leaf.NotAfter)
	})
}

// keep obtains the ordered certificate whenever the loaded one will not do.
func (c *Certificates) keep(ctx context.Context, o order, load func() *tls.Certificate, use func(*tls.Certificate)) {
	retry := backoff{min: retryMin, max: retryMax}
	for {
		if pair := load(); pair != nil && hasNames(pair.Leaf, o.names, o.ips) {
			if left := time.Until(renewal(pair.Leaf)); left > 0 {
				if !sleep(ctx, min(left, refreshInterval)) {
					return
				}
				continue
			}
		}
		pair, err := c.obtain(ctx, o)
		if ctx.Err() != nil {
			return
		}
		wait := retry.next()
		if err == nil {
			retry.reset()
			use(pair)
			// By a clock that runs ahead every certificate is old. That must
			// not flood the cluster with requests.
			wait = max(refreshInterval, pair.Leaf.NotAfter.Sub(pair.Leaf.NotBefore)/10)
		} else {
			if errors.Is(err, errDenied) {
				wait = deniedWait + mathrand.N(deniedWait/4)
			}
			c.cfg.Log.Warn("certificate is not obtained", "signer", o.signer, "err", err, "retry", wait)
		}
		if !sleep(ctx, wait) {
			return
		}
	}
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
	return b.now*3/4 + mathrand.N(b.now/2)
}

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
	issued, err := c.await(ctx, p.Name)
	if errors.Is(err, errDenied) || apierrors.IsNotFound(err) {
		// NotFound: the cluster forgets requests after a day, or an hour.
		return nil, errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return nil, err
	}
	pair, err := storePair(c.path(o.file), issued, p.key, c.cfg.Keys)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return pair, os.Remove(path)
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
func (c *Certificates) await(ctx context.Context, name string) ([]byte, error) {
	poll := backoff{min: pollMin, max: pollMax}
	for {
		csr := &certificatesv1.CertificateSigningRequest{}
		if err := c.do(ctx, http.MethodGet, requestsPath+"/"+name, nil, csr); err != nil {
			return nil, fmt.Errorf("get certificate request %s: %w", name, err)
		}
		for _, condition := range csr.Status.Conditions {
			switch condition.Type {
			case certificatesv1.CertificateDenied, certificatesv1.CertificateFailed:
				return nil, fmt.Errorf("%w: %s %s: %s", errDenied, name, condition.Reason, condition.Message)
			}
		}
		if len(csr.Status.Certificate) > 0 {
			return csr.Status.Certificate, nil
		}
		if !sleep(ctx, poll.next()) {
			return nil, context.Cause(ctx)
		}
	}
}

// credential is a way to prove oneself to the API server.
type credential struct {
	certificate *tls.Certificate
	token       string
}

// credentials returns what there is, the likeliest to work first. An expired
// certificate comes last but is tried, because the clock may be wrong.
func (c *Certificates) credentials() []credential {
	var out []credential
	if c.cfg.Mode == ModeToken && c.cfg.BootstrapKubeconfig != "" {
		if boot, err := loadBootstrap(c.cfg.BootstrapKubeconfig); err == nil && boot.token != "" {
			out = append(out, credential{token: boot.token})
		}
	}
	if pair := c.client.Load(); pair != nil {
		own := credential{certificate: pair}
		if time.Now().Before(pair.Leaf.NotAfter) {
			return append([]credential{own}, out...)
		}
		return append(out, own)
	}
	return out
}

// do sends a request to the first server that can be reached, with the first
// credential that it takes. An answer that is no success is an
// *apierrors.StatusError.
func (c *Certificates) do(ctx context.Context, method, path string, in, out any) error {
	credentials := c.credentials()
	if len(credentials) == 0 {
		return fmt.Errorf("neither a client certificate nor a bootstrap token in %q", c.cfg.BootstrapKubeconfig)
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
		err := c.doAs(ctx, as, method, path, body, out)
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

func (c *Certificates) doAs(ctx context.Context, as credential, method, path string, body []byte, out any) error {
	config := &tls.Config{RootCAs: c.ClusterCAs(), MinVersion: tls.VersionTLS12}
	if as.certificate != nil {
		config.Certificates = []tls.Certificate{*as.certificate}
	}
	transport := &http.Transport{TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true}
	client := &http.Client{Transport: transport, Timeout: requestTimeout}
	var errs []error
	for _, server := range c.Servers() {
		req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(server, "/")+path, bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Accept", "application/json")
		if body != nil {
			req.Header.Set("Content-Type", "application/json")
		}
		if as.token != "" {
			req.Header.Set("Authorization", "Bearer "+as.token)
		}
		resp, err := client.Do(req)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		return decode(resp, out)
	}
	return errors.Join(errs...)
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
