package pool

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"time"
)

// maxProofs bounds the certificates that are remembered as verified: more than
// there are nodes in a pool.
const maxProofs = 1024

// proofs remembers whose certificates were verified. Peers ask each other every
// two seconds, and to verify a chain costs more than all the rest of it.
type proofs struct {
	mu sync.Mutex
	by map[[sha256.Size]byte]proof // by the certificate
}

// proof holds for the authorities that it was made with, until the first
// certificate of its chain ends.
type proof struct {
	node  string
	roots *x509.CertPool
	until time.Time
}

// verify returns the node that a chain of certificates is of. The name alone
// does not make a node: the cluster gives the group to nodes only.
func (p *Pool) verify(chain []*x509.Certificate) (node string, err error) {
	if len(chain) == 0 {
		return "", errors.New("no certificate shown")
	}
	roots := p.cfg.ClusterCAs()
	if roots == nil { // would mean the system's
		return "", errors.New("the cluster's certificate authority is not known yet")
	}
	key := sha256.Sum256(chain[0].Raw)
	p.proofs.mu.Lock()
	has, ok := p.proofs.by[key]
	p.proofs.mu.Unlock()
	if ok && has.roots == roots && p.cfg.Clock.Now().Before(has.until) {
		return has.node, nil
	}
	options := x509.VerifyOptions{
		Roots: roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
	}
	verified, err := p.cfg.Clock.Verify(chain[0], options)
	if err != nil {
		return "", err //nolint:wrapcheck // the caller says whose it is
	}
	subject := chain[0].Subject
	node, ok = cutPrefix(subject.CommonName)
	if !ok || !slices.Contains(subject.Organization, "system:nodes") {
		return "", errors.New("the certificate is not a node's")
	}
	until := chain[0].NotAfter
	for _, c := range verified[0] {
		if c.NotAfter.Before(until) {
			until = c.NotAfter
		}
	}
	p.proofs.mu.Lock()
	defer p.proofs.mu.Unlock()
	if p.proofs.by == nil || len(p.proofs.by) >= maxProofs {
		p.proofs.by = map[[sha256.Size]byte]proof{}
	}
	p.proofs.by[key] = proof{node, roots, until}
	return node, nil
}
