package cert

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const (
	localCALife     = 10 * 365 * 24 * time.Hour
	localServerLife = 365 * 24 * time.Hour
)

// serviceNames are those by which pods know the API server.
func serviceNames() []string {
	return []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
}

// localAuthority is this node's own certificate authority, with the server
// certificate that it signs. Its constraints let it vouch for nothing but this
// node, so trusting it costs little even if its key is stolen.
type localAuthority struct {
	dir   string
	clock *clock.Clock
	names []string
	ips   []net.IP // those that the certificate must have
	extra []net.IP // those that it has if the authority permits them
	keys  Sealer
	log   *slog.Logger

	mu     sync.Mutex // guards the following
	ca     *tls.Certificate
	server *tls.Certificate
}

// open loads the authority, or makes a new one if there is none that can vouch
// for this node.
func (l *localAuthority) open(cfg Config) error {
	l.dir, l.keys, l.log = cfg.Dir, cfg.Keys, cfg.Log
	l.clock = cfg.Clock
	l.names = append([]string{"localhost", cfg.NodeName}, serviceNames()...)
	l.ips = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	if cfg.DummyIP != nil {
		l.ips = append(l.ips, cfg.DummyIP)
	}
	l.extra = cfg.NodeIPs

	ca, err := loadPair(l.path(localCAFile), l.keys)
	switch {
	case err == nil && l.suits(ca.Leaf):
		l.ca = ca
	case err == nil:
		l.log.Info("making a new local certificate authority for changed addresses or age")
	case !errors.Is(err, os.ErrNotExist):
		l.log.Warn("local certificate authority is unusable, making a new one", "err", err)
	}
	if l.ca == nil {
		if err := l.makeCA(); err != nil {
			return fmt.Errorf("make local certificate authority: %w", err)
		}
	}
	if server, err := loadPair(l.path(localServerFile), l.keys); err == nil {
		l.server = server
	}
	_, err = l.certificate()
	return err
}

func (l *localAuthority) path(name string) string { return filepath.Join(l.dir, name) }

func (l *localAuthority) authorityPEM() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: l.ca.Leaf.Raw})
}

// validity returns a span around now. It starts long ago and ends no earlier
// than if this were 2026, because a node without a working clock must neither
// make a certificate that is useless once the time is known, nor refuse one
// that it made before a power cut.
func validity(now time.Time, life time.Duration) (from, to time.Time) {
	if floor := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC); now.Before(floor) {
		now = floor
	}
	return time.Unix(0, 0), now.Add(life)
}

func serial() (*big.Int, error) { return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)) }

// suits tells whether the authority lasts and may vouch for what is required.
func (l *localAuthority) suits(ca *x509.Certificate) bool {
	return ca.IsCA && l.clock.Until(ca.NotAfter) > localServerLife &&
		!slices.ContainsFunc(l.names, func(n string) bool { return !slices.Contains(ca.PermittedDNSDomains, n) }) &&
		!slices.ContainsFunc(l.ips, func(ip net.IP) bool { return !permits(ca, ip) })
}

func permits(ca *x509.Certificate, ip net.IP) bool {
	return slices.ContainsFunc(ca.PermittedIPRanges, func(n *net.IPNet) bool { return n.Contains(ip) })
}

func (l *localAuthority) makeCA() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	number, err := serial()
	if err != nil {
		return err
	}
	from, to := validity(l.clock.Now(), localCALife)
	template := &x509.Certificate{
		SerialNumber:                number,
		Subject:                     pkix.Name{CommonName: "yurthub-local-ca-" + l.names[1]},
		NotBefore:                   from,
		NotAfter:                    to,
		IsCA:                        true,
		BasicConstraintsValid:       true,
		MaxPathLenZero:              true,
		KeyUsage:                    x509.KeyUsageCertSign,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         l.names,
	}
	for _, ip := range slices.Concat(l.ips, l.extra) {
		if short := ip.To4(); short != nil {
			ip = short
		}
		bits := 8 * len(ip)
		template.PermittedIPRanges = append(template.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)})
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	l.ca, err = storePair(l.path(localCAFile), pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: der}), key, l.keys)
	l.server = nil
	return err
}

// certificate returns the server certificate, renewed first when it is old or
// does not name what it should. If that fails, the old one is still returned.
func (l *localAuthority) certificate() (*tls.Certificate, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current() {
		return l.server, nil
	}
	server, err := l.sign()
	if err == nil {
		l.server = server
	}
	if l.server == nil {
		return nil, fmt.Errorf("make local server certificate: %w", err)
	}
	return l.server, nil
}

// current tells whether the server certificate is of this authority, names what
// it must and has a third of its life left.
func (l *localAuthority) current() bool {
	if l.server == nil || l.clock.Until(l.server.Leaf.NotAfter) < localServerLife/3 {
		return false
	}
	leaf := l.server.Leaf
	return bytes.Equal(leaf.AuthorityKeyId, l.ca.Leaf.SubjectKeyId) && leaf.CheckSignatureFrom(l.ca.Leaf) == nil &&
		hasNames(leaf, l.names, l.addresses())
}

// addresses are those that the certificate is to have.
func (l *localAuthority) addresses() []net.IP {
	out := slices.Clone(l.ips)
	for _, ip := range l.extra {
		if permits(l.ca.Leaf, ip) {
			out = append(out, ip)
		}
	}
	return out
}

func (l *localAuthority) sign() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	number, err := serial()
	if err != nil {
		return nil, err
	}
	from, to := validity(l.clock.Now(), localServerLife)
	template := &x509.Certificate{
		SerialNumber: number,
		Subject:      pkix.Name{CommonName: "yurthub-" + l.names[1]},
		NotBefore:    from,
		NotAfter:     to,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:     l.names,
		IPAddresses:  l.addresses(),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, l.ca.Leaf, key.Public(), l.ca.PrivateKey)
	if err != nil {
		return nil, err
	}
	return storePair(l.path(localServerFile), pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: der}), key, l.keys)
}

// hasNames tells whether a certificate names all of these.
func hasNames(leaf *x509.Certificate, names []string, ips []net.IP) bool {
	return !slices.ContainsFunc(names, func(n string) bool { return !slices.Contains(leaf.DNSNames, n) }) &&
		!slices.ContainsFunc(ips, func(ip net.IP) bool { return !slices.ContainsFunc(leaf.IPAddresses, ip.Equal) })
}
