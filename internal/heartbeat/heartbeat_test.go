package heartbeat

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{key: newKey(t), pool: x509.NewCertPool()}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pool.AddCert(a.cert)
	return a
}

func (a *authority) issue(t testing.TB, key crypto.Signer, name string, edit func(*x509.Certificate)) []byte {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name, Organization: []string{"openyurt:yurthub", "system:nodes"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if edit != nil {
		edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func beat(node string) Beat {
	now := metav1.NewMicroTime(time.Now().UTC().Truncate(time.Microsecond))
	return Beat{Node: node, UID: "u-1", Time: now, Renewed: now, Ready: "True"}
}

func TestSignedByEveryKindOfKey(t *testing.T) {
	ca := newAuthority(t)
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	old, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{newKey(t), edwards, old} {
		want := beat("a")
		signed, err := Sign(want, [][]byte{ca.issue(t, key, "system:node:a", nil)}, key)
		if err != nil {
			t.Fatal(err)
		}
		text, err := Join([]Signed{signed})
		if err != nil || len(text) > MaxSize {
			t.Fatalf("%T: %d bytes, %v", key, len(text), err)
		}
		t.Logf("%T: %d bytes", key, len(text))
		back, err := Split(text)
		if err != nil || len(back) != 1 {
			t.Fatalf("%T: got %v, %v", key, back, err)
		}
		got, err := back[0].Open(ca.pool, time.Now())
		if err != nil {
			t.Fatalf("%T: %v", key, err)
		}
		if !got.Time.Equal(&want.Time) || !got.Renewed.Equal(&want.Renewed) || got.Node != "a" || got.UID != "u-1" || got.Ready != "True" {
			t.Errorf("%T: got %+v, want %+v", key, got, want)
		}
	}
}

func TestForged(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	key, stranger := newKey(t), newKey(t)
	sign := func(node string, cert []byte, key crypto.Signer) Signed {
		s, err := Sign(beat(node), [][]byte{cert}, key)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	own := ca.issue(t, key, "system:node:a", nil)
	good := sign("a", own, key)
	edited, swapped := good, good
	edited.Beat = []byte(strings.Replace(string(good.Beat), "u-1", "u-2", 1))
	swapped.Certificate = ca.issue(t, stranger, "system:node:a", nil)
	bare, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]Signed{
		"for another node":       sign("b", own, key),
		"by another key":         sign("a", own, stranger),
		"of another authority":   sign("a", other.issue(t, key, "system:node:a", nil), key),
		"edited":                 edited,
		"another certificate":    swapped,
		"something else signed":  {Beat: good.Beat, Signature: bare, Certificate: own},
		"no certificate":         {Beat: good.Beat, Signature: good.Signature},
		"no node's name":         sign("a", ca.issue(t, key, "a", nil), key),
		"no name":                sign("", ca.issue(t, key, "system:node:", nil), key),
		"no group":               sign("a", ca.issue(t, key, "system:node:a", func(c *x509.Certificate) { c.Subject.Organization = nil }), key),
		"a server's certificate": sign("a", ca.issue(t, key, "system:node:a", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), key),
		"expired":                sign("a", ca.issue(t, key, "system:node:a", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), key),
	} {
		if b, err := s.Open(ca.pool, time.Now()); !errors.Is(err, ErrForged) {
			t.Errorf("%s: got %+v, %v", name, b, err)
		}
	}
	if _, err := good.Open(ca.pool, time.Now()); err != nil {
		t.Errorf("the good one: %v", err)
	}
	if _, err := good.Open(nil, time.Now()); !errors.Is(err, ErrForged) {
		t.Errorf("without an authority: %v", err)
	}
}

// TestChain has authorities between the node's certificate and the root.
func TestChain(t *testing.T) {
	root := newAuthority(t)
	key := newKey(t)
	under := func(parent *authority, edit func(*x509.Certificate)) *authority {
		a := &authority{key: newKey(t)}
		der := parent.issue(t, a.key, "ca", func(c *x509.Certificate) {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
			if edit != nil {
				edit(c)
			}
		})
		var err error
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		return a
	}
	first := under(root, nil)
	second := under(first, nil)
	third := under(second, nil)
	fourth := under(third, nil)
	servers := under(root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	stranger := under(newAuthority(t), nil)
	for name, tc := range map[string]struct {
		chain []*authority // from the node's on
		ok    bool
	}{
		"one":             {[]*authority{first}, true},
		"three":           {[]*authority{third, second, first}, true},
		"in any order":    {[]*authority{second, first, stranger}, true},
		"the root too":    {[]*authority{first, root}, true},
		"four":            {[]*authority{fourth, third, second, first}, false},
		"one is left out": {[]*authority{third, first}, false},
		"for servers":     {[]*authority{servers}, false},
		"of another root": {[]*authority{stranger}, false},
		"a node is no authority": {[]*authority{{key: key, cert: func() *x509.Certificate {
			c, err := x509.ParseCertificate(root.issue(t, key, "system:node:a", nil))
			if err != nil {
				t.Fatal(err)
			}
			return c
		}()}}, false},
	} {
		certificates := [][]byte{tc.chain[0].issue(t, key, "system:node:a", nil)}
		for _, a := range tc.chain {
			certificates = append(certificates, a.cert.Raw)
		}
		s, err := Sign(beat("a"), certificates, key)
		if err != nil {
			t.Fatal(err)
		}
		text, err := Join([]Signed{s})
		if err != nil {
			t.Fatal(err)
		}
		back, err := Split(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := back[0].Open(root.pool, time.Now()); (err == nil) != tc.ok || err != nil && !errors.Is(err, ErrForged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := Signed{Certificate: first.issue(t, key, "system:node:a", nil), Chain: [][]byte{[]byte("no certificate")}}
	if _, err := broken.Open(root.pool, time.Now()); !errors.Is(err, ErrForged) {
		t.Errorf("broken: %v", err)
	}
}

// TestLargestFits joins heartbeats as large as one may be.
func TestLargestFits(t *testing.T) {
	s := Signed{Beat: []byte("{}")}
	for {
		text, err := Join([]Signed{s})
		if err != nil {
			t.Fatal(err)
		}
		room := MaxSize - (len(text) - len("[]"))
		if room < 4 {
			break
		}
		s.Certificate = append(s.Certificate, make([]byte, max(3, room/2))...)
	}
	text, err := Join(slices.Repeat([]Signed{s}, MaxCarried))
	if err != nil {
		t.Fatal(err)
	}
	if all, err := Split(text); err != nil || len(all) != MaxCarried {
		t.Errorf("%d bytes: got %d, %v", len(text), len(all), err)
	}
	if most := 256 << 10; MaxText > most*9/10 {
		t.Errorf("%d bytes: the API server takes %d of all annotations", MaxText, most)
	}
}

func TestFor(t *testing.T) {
	b := beat("a")
	if err := b.For("b"); err != nil {
		t.Errorf("for anybody: %v", err)
	}
	b.To = "b"
	if err := b.For("b"); err != nil {
		t.Errorf("for b: %v", err)
	}
	if b.For("c") == nil {
		t.Error("c may carry what is for b")
	}
}

func TestFresh(t *testing.T) {
	b := beat("a")
	for d, want := range map[time.Duration]bool{
		0: true, Good: true, -Good: true, Good + time.Second: false, -Good - time.Second: false,
	} {
		if err := b.Fresh(b.Time.Add(d)); (err == nil) != want || err != nil && !errors.Is(err, ErrStale) {
			t.Errorf("after %s: %v", d, err)
		}
	}
}

func TestBounded(t *testing.T) {
	text, err := Join(slices.Repeat([]Signed{{Beat: []byte("{}")}}, MaxCarried+1))
	if err != nil {
		t.Fatal(err)
	}
	if all, err := Split(text); err != nil || len(all) != MaxCarried {
		t.Errorf("joined: got %d, %v", len(all), err)
	}
	for name, text := range map[string]string{
		"many":  "[" + strings.TrimSuffix(strings.Repeat("{},", MaxCarried+1), ",") + "]",
		"long":  `[{"beat":"` + strings.Repeat("A", MaxSize) + `"}]`,
		"huge":  "[" + strings.Repeat(" ", MaxText) + "]",
		"other": `{"a":1}`,
	} {
		if all, err := Split(text); err == nil {
			t.Errorf("%s: got %d heartbeats", name, len(all))
		}
	}
	if all, err := Split(""); err != nil || all != nil {
		t.Errorf("none: got %v, %v", all, err)
	}
}

// FuzzOpen feeds what a stranger may write into the annotation.
func FuzzOpen(f *testing.F) {
	ca := newAuthority(f)
	key := newKey(f)
	good, err := Sign(beat("a"), [][]byte{ca.issue(f, key, "system:node:a", nil)}, key)
	if err != nil {
		f.Fatal(err)
	}
	text, err := Join([]Signed{good})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text string) {
		all, err := Split(text)
		if err != nil {
			return
		}
		for _, s := range all {
			if b, err := s.Open(ca.pool, time.Now()); err == nil && string(s.Beat) != string(good.Beat) {
				t.Errorf("opened %+v", b)
			}
		}
	})
}
