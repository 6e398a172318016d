package cert

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// gcm is a Sealer with a key of its own.
type gcm struct{ cipher.AEAD }

func newSealer(t testing.TB) gcm {
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	block, err := aes.NewCipher(key)
	must(t, err)
	aead, err := cipher.NewGCMWithRandomNonce(block)
	must(t, err)
	return gcm{aead}
}

func (g gcm) Seal(name string, plain []byte) []byte {
	return g.AEAD.Seal(nil, nil, plain, []byte(name))
}

func (g gcm) Unseal(name string, sealed []byte) ([]byte, error) {
	return g.Open(nil, nil, sealed, []byte(name))
}

// holders names the files in dir that hold the key in a form that can be read.
// The private number is what all forms share.
func holders(t *testing.T, dir string, key any) (names []string) {
	t.Helper()
	number, err := key.(*ecdsa.PrivateKey).Bytes()
	must(t, err)
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		must(t, err)
		forms := [][]byte{number}
		for shift := range 3 { // base64 depends on what stands before
			text := base64.StdEncoding.EncodeToString(append(make([]byte, shift), number...))
			forms = append(forms, []byte(text[4:36]))
		}
		for _, plain := range [][]byte{data, bytes.ReplaceAll(data, []byte("\n"), nil)} {
			for _, form := range forms {
				if bytes.Contains(plain, form) {
					names = append(names, e.Name())
				}
			}
		}
	}
	return names
}

func mustNotHold(t *testing.T, dir string, key any) {
	t.Helper()
	if names := holders(t, dir, key); len(names) > 0 {
		t.Errorf("a private key can be read in %q", names)
	}
}

func TestKeysAreSealed(t *testing.T) {
	cluster := newCluster(t)
	cluster.set(func() { cluster.hold = true })
	cfg := cluster.config(t)
	c := open(t, cfg)
	stop := run(t, c)
	until(t, "request", func() bool {
		return loadPending(filepath.Join(cfg.Dir, clientFile+".pending"), c.clientOrder(), cfg.Keys) != nil
	})
	pending := loadPending(filepath.Join(cfg.Dir, clientFile+".pending"), c.clientOrder(), cfg.Keys)
	mustNotHold(t, cfg.Dir, pending.key)
	cluster.set(func() { cluster.hold = false })
	until(t, "certificates", func() bool { return c.ClientCertificate() != nil && c.clusterServer.Load() != nil })
	stop()
	for _, key := range []any{
		c.ClientCertificate().PrivateKey, c.clusterServer.Load().PrivateKey, c.local.ca.PrivateKey, c.local.server.PrivateKey,
	} {
		mustNotHold(t, cfg.Dir, key)
	}
	// Under another key they are as good as none, and never a reason not to
	// start.
	other := cfg
	other.Keys = newSealer(t)
	again := open(t, other)
	if again.ClientCertificate() != nil || again.local.ca.Leaf.Equal(c.local.ca.Leaf) {
		t.Error("a key was unsealed under another key")
	}
}

// TestKeyOfFirstVersionIsSealed: what lies in the clear is used, and sealed.
func TestKeyOfFirstVersionIsSealed(t *testing.T) {
	cluster := newCluster(t)
	cfg := cluster.config(t)
	must(t, os.MkdirAll(cfg.Dir, 0o700))
	path := filepath.Join(cfg.Dir, clientFile)
	cluster.pair(t, path, testUser, 1000*time.Hour)
	plain, err := loadPair(path, nil)
	must(t, err)
	if len(holders(t, cfg.Dir, plain.PrivateKey)) == 0 {
		t.Error("this test does not see a key in the clear")
	}
	for range 2 {
		c := open(t, cfg)
		if got := c.ClientCertificate(); got == nil || !got.Leaf.Equal(plain.Leaf) {
			t.Fatal("the certificate is not used")
		}
		mustNotHold(t, cfg.Dir, plain.PrivateKey)
	}
	// A certificate can still be read by anybody's tools.
	data, err := os.ReadFile(path)
	must(t, err)
	if a, err := parseAuthority(data); err != nil || a.pool.Equal(x509.NewCertPool()) {
		t.Errorf("no certificate in %s: %v", data, err)
	}
	if _, err := loadPair(path, nil); err == nil {
		t.Error("a sealed key was read without a sealer")
	}
}

// TestBadBootstrapFileIsNotQuoted: errors are logged, and the file holds a
// token.
func TestBadBootstrapFileIsNotQuoted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bootstrap.conf")
	for _, text := range []string{
		"users: [{name: u, user: {token: *TOKEN}}]", "users: {TOKEN: [}", "TOKEN", "- TOKEN", "users: TOKEN", "a: TOKEN\n\tb: c",
		"users: [{name: u, user: {token: {TOKEN: 1}}}]", "clusters: [{cluster: {certificate-authority-data: TOKEN}}]",
		"\x00TOKEN", "%TOKEN", "users: !!int TOKEN", "contexts: [TOKEN]", "{\"TOKEN",
	} {
		must(t, os.WriteFile(path, []byte(strings.ReplaceAll(text, "TOKEN", testToken)), 0o600))
		_, err := loadBootstrap(path)
		if err == nil {
			t.Errorf("%q was taken for a kubeconfig", text)
		} else if said := err.Error(); strings.Contains(said, testToken[:8]) || strings.Contains(said, testToken[8:]) {
			t.Errorf("%q: %s", text, said)
		}
	}
}
