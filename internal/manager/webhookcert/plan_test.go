package webhookcert

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"
)

var (
	noon  = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	named = []string{"webhook.kube-system.svc", "localhost"}
)

func verify(t *testing.T, data map[string][]byte, bundle []byte, now time.Time) error {
	t.Helper()
	pair, err := tls.X509KeyPair(data[serverKey], data[serverKeyKey])
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return err
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: named[0], CurrentTime: now})
	return err
}

// TestFortyYears goes from one look to the next. API servers take a bundle
// when it is patched; at no look may they refuse what is served.
func TestFortyYears(t *testing.T) {
	var data map[string][]byte
	var trusted []byte
	var since time.Time // when trusted changed
	servers, authorities := 0, 0
	for now := noon; now.Before(noon.AddDate(40, 0, 0)); {
		next, wait, err := next(data, trusted, named, now)
		if err != nil {
			t.Fatal(err)
		}
		if next != nil {
			if !bytes.Equal(next[serverKey], data[serverKey]) {
				servers++
				if len(data[serverKey]) > 0 && now.Sub(since) < settle {
					t.Fatalf("%s: an authority signs that API servers have known for %s", now, now.Sub(since))
				}
			}
			if !bytes.Equal(next[bundleKey], data[bundleKey]) {
				authorities++
			}
			data = next
			if len(data[serverKey]) > 0 && len(trusted) > 0 {
				if err := verify(t, data, trusted, now); err != nil {
					t.Fatalf("%s: what is served is refused: %v", now, err)
				}
			}
			continue // the write is an event
		}
		if wait <= 0 {
			t.Fatalf("%s: nothing to do, and no time to look again", now)
		}
		if !bytes.Equal(trusted, data[bundleKey]) {
			trusted, since = data[bundleKey], now
			continue // the patch is an event
		}
		if err := verify(t, data, trusted, now); err != nil {
			t.Fatalf("%s: %v", now, err)
		}
		if wait > 100*24*time.Hour {
			t.Fatalf("%s: looks again after %s", now, wait)
		}
		now = now.Add(wait)
	}
	if authorities < 5 || authorities > 7 || servers < 200 {
		t.Errorf("got %d authorities and %d certificates in 40 years", authorities, servers)
	}
	if n := len(parse(data[bundleKey])); n > 3 {
		t.Errorf("the bundle has %d authorities", n)
	}
}

func made(t *testing.T) map[string][]byte {
	t.Helper()
	var data map[string][]byte
	for range 3 {
		next, _, err := next(data, data[bundleKey], named, noon)
		if err != nil {
			t.Fatal(err)
		}
		if next == nil {
			return data
		}
		data = next
	}
	t.Fatal("never done")
	return nil
}

func TestDamageIsMended(t *testing.T) {
	for key := range made(t) {
		for _, bad := range []string{"", "nonsense"} {
			data := made(t)
			data[key] = []byte(bad)
			for i := 0; ; i++ {
				next, _, err := next(data, data[bundleKey], named, noon.Add(time.Hour))
				if err != nil || i > 4 {
					t.Fatalf("%s=%q: %v after %d steps", key, bad, err, i)
				}
				if next == nil {
					break
				}
				data = next
			}
			if err := verify(t, data, data[bundleKey], noon.Add(time.Hour)); err != nil {
				t.Errorf("%s=%q: %v", key, bad, err)
			}
		}
	}
}

func TestNewNamesAreTaken(t *testing.T) {
	data := made(t)
	next, _, err := next(data, data[bundleKey], append(named, "other"), noon)
	if err != nil || next == nil {
		t.Fatalf("got %v, %v", next, err)
	}
	if c := parse(next[serverKey]); len(c) != 1 || c[0].VerifyHostname("other") != nil {
		t.Errorf("got %v", c)
	}
}

func TestHolderWithoutCertificate(t *testing.T) {
	h := &Holder{}
	cfg := &tls.Config{}
	h.Configure(cfg)
	if _, err := cfg.GetCertificate(nil); err == nil || h.Check(nil) == nil {
		t.Error("an empty holder is ready")
	}
}
