package webhookcert

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	serverLife    = 90 * 24 * time.Hour
	// backdate is for clocks that lag.
	backdate = time.Hour
	// settle is how long a new authority waits before it signs, so that all
	// API servers trust it by then.
	settle = time.Minute

	// keys of the Secret. The bundle has the authority that signs first, and
	// those before it that are still good.
	bundleKey       = "ca.crt"
	authorityKeyKey = "ca.key"
	serverKey       = "tls.crt"
	serverKeyKey    = "tls.key"
)

// next returns what the Secret must become, nil if it is right, and when to
// look again. Trusted is the bundle that API servers have now: a certificate
// that they do not trust yet is not made while there is one that they do.
//
// An authority is renewed long before it ends, and its successor trusted
// before it signs, so that at no time a good server is refused.
func next(have map[string][]byte, trusted []byte, names []string, now time.Time) (map[string][]byte, time.Duration, error) {
	out := map[string][]byte{}
	maps.Copy(out, have)
	authorities := parse(have[bundleKey])
	key := parseKey(have[authorityKeyKey])
	if len(authorities) == 0 || !good(authorities[0], now) || !owns(key, authorities[0]) {
		certPEM, keyPEM, err := newAuthority(now)
		if err != nil {
			return nil, 0, err
		}
		for i, old := range authorities {
			if i < 2 && now.Before(old.NotAfter) {
				certPEM = append(certPEM, encode("CERTIFICATE", old.Raw)...)
			}
		}
		out[bundleKey], out[authorityKeyKey] = certPEM, keyPEM
		return out, 0, nil
	}
	signer := authorities[0]
	server := parse(have[serverKey])
	ours := len(server) > 0 && owns(parseKey(have[serverKeyKey]), server[0]) &&
		!slices.ContainsFunc(names, func(n string) bool { return !slices.Contains(server[0].DNSNames, n) })
	if ours && good(server[0], now) && server[0].CheckSignatureFrom(signer) == nil {
		return nil, earlier(renewal(server[0]), renewal(signer)).Sub(now), nil
	}
	usable := ours && now.Before(server[0].NotAfter) &&
		slices.ContainsFunc(authorities, func(a *x509.Certificate) bool { return server[0].CheckSignatureFrom(a) == nil })
	if usable {
		if wait := signer.NotBefore.Add(backdate + settle).Sub(now); wait > 0 {
			return nil, wait, nil
		}
		if !bytes.Equal(trusted, have[bundleKey]) {
			return nil, settle, nil
		}
	}
	certPEM, keyPEM, err := newServer(names, signer, key, now)
	if err != nil {
		return nil, 0, err
	}
	out[serverKey], out[serverKeyKey] = certPEM, keyPEM
	return out, 0, nil
}

// renewal is when a third of a certificate's life is left.
func renewal(c *x509.Certificate) time.Time {
	return c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func good(c *x509.Certificate, now time.Time) bool {
	return now.After(c.NotBefore) && now.Before(renewal(c))
}

func owns(key crypto.Signer, c *x509.Certificate) bool {
	public, ok := c.PublicKey.(*ecdsa.PublicKey)
	return ok && key != nil && public.Equal(key.Public())
}

// parse returns the certificates of a PEM text; what cannot be read is left
// out, and made anew.
func parse(text []byte) []*x509.Certificate {
	var out []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, c)
		}
	}
	return out
}

func parseKey(text []byte) crypto.Signer {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil
	}
	signer, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil
	}
	return signer
}

func newAuthority(now time.Time) (certPEM, keyPEM []byte, err error) {
	return issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "yurt-manager-webhook-ca"}, NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}, nil, nil, now)
}

func newServer(names []string, signer *x509.Certificate, key crypto.Signer, now time.Time) (certPEM, keyPEM []byte, err error) {
	if len(names) == 0 {
		return nil, nil, errors.New("make webhook certificate: no names")
	}
	return issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, DNSNames: names, NotAfter: now.Add(serverLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, signer, key, now)
}

// issue makes a certificate and its key; it signs itself where there is no
// signer.
func issue(template, signer *x509.Certificate, signerKey crypto.Signer, now time.Time) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return nil, nil, fmt.Errorf("make serial number: %w", err)
	}
	template.NotBefore = now.Add(-backdate)
	if signer == nil {
		signer, signerKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, key.Public(), signerKey)
	if err != nil {
		return nil, nil, fmt.Errorf("sign certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", keyDER), nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
