package pool

import (
	"crypto/x509"
	"testing"
	"testing/synctest"
	"time"
)

// TestProofsAreAsGoodAsVerification: a certificate that was verified is not
// verified again, and is refused as soon as verification would refuse it.
func TestProofsAreAsGoodAsVerification(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, other := newAuthority(t), newAuthority(t)
		roots, theirs := ca.pool(), other.pool()
		trusted := roots
		p := New(Config{Node: "a", ClusterCAs: func() *x509.CertPool { return trusted }})
		leaf := ca.node(t, "b").Leaf
		good := func(want bool) {
			t.Helper()
			node, err := p.verify([]*x509.Certificate{leaf})
			if (err == nil) != want || want && node != "b" {
				t.Errorf("it is of %q: %v, want it good: %v", node, err, want)
			}
		}
		good(true)
		if len(p.proofs.by) != 1 {
			t.Errorf("%d certificates are remembered, want 1", len(p.proofs.by))
		}
		signed := leaf.Signature
		leaf.Signature = nil // verification would fail now
		good(true)
		trusted = theirs
		good(false)
		trusted = roots
		good(true)
		leaf.Signature = signed
		time.Sleep(time.Until(leaf.NotAfter) + time.Second) // of the bubble
		good(false)
	})
}
