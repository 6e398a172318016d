package playground

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"testing"
)

func TestServerCertificateHoldsItsNames(t *testing.T) {
	p, err := newPKI(t.TempDir(), []string{"10.90.0.1", "kubernetes.default"})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(p.file("apiserver.crt"), p.file("apiserver.key"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.ca.CertPEM)
	for name, good := range map[string]bool{"10.90.0.1": true, "kubernetes.default": true, "example.org": false} {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name})
		if (err == nil) != good {
			t.Errorf("verify for %s: want good=%t, got %v", name, good, err)
		}
	}
}

func TestClientCertificateNamesUserAndGroups(t *testing.T) {
	ca, err := NewAuthority(t.TempDir(), "ca")
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Client("system:node:a", "system:nodes")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	subject := pair.Leaf.Subject
	if subject.CommonName != "system:node:a" || len(subject.Organization) != 1 || subject.Organization[0] != "system:nodes" {
		t.Errorf("want user system:node:a of group system:nodes, got %v", subject)
	}
	// The front proxy must not be able to speak as a client of the cluster.
	other, err := NewAuthority(t.TempDir(), "other")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(other.CertPEM)
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: usage}); err == nil {
		t.Error("another authority accepts the certificate")
	}
}

func TestKeysAreForTheirOwnerOnly(t *testing.T) {
	p, err := newPKI(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.key", "apiserver.key", "sa.key", "etcd.key"} {
		info, err := os.Stat(p.file(name))
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("mode of %s: want 600, got %o", name, mode)
		}
	}
}
