package cert

import (
	"bytes"
	"crypto/ecdsa"
	"encoding/pem"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// FuzzBootstrap reads kubeconfigs, those of a node's bootstrap file and those
// that a cluster publishes to anybody.
func FuzzBootstrap(f *testing.F) {
	f.Add([]byte(`{apiVersion: v1, clusters: [{name: c, cluster: {server: "https://a", certificate-authority-data: YQ==}}], users: [{name: u, user: {token: s3cret}}]}`))
	f.Add([]byte("users: [{name: u, user: {tokenFile: /etc/shadow}}]\nclusters: [{cluster: {certificate-authority: /etc/passwd}}]\n"))
	f.Add([]byte("current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nusers:\n- token: s3cret: x\n"))
	// An error says where, and never what: that may be a token.
	says := regexp.MustCompile(`^(it is not a kubeconfig( line \d+)?|files are not allowed here)$`)
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 16<<10 {
			return // a bootstrap file is short; what is fetched is bounded
		}
		b, err := parseBootstrap(data, "")
		if (b == nil) == (err == nil) {
			t.Errorf("got %v and %v", b, err)
		}
		if err != nil && !says.MatchString(err.Error()) {
			t.Errorf("error %q", err)
		}
	})
}

// FuzzAuthority reads bundles as a server whom nobody knows yet gives them:
// nothing is taken that the pin does not name.
func FuzzAuthority(f *testing.F) {
	ca := newSigner(f)
	f.Add(ca.pem)
	f.Add(slices.Concat([]byte("words before\n"), ca.pem, newSigner(f).pem))
	f.Add(bytes.ReplaceAll(ca.pem, []byte("CERTIFICATE"), []byte("PRIVATE KEY")))
	f.Fuzz(func(t *testing.T, bundle []byte) {
		if a, err := parseAuthority(bundle); err == nil && (len(a.certs) == 0 || len(a.certs) > maxAuthorities) {
			t.Errorf("%d authorities", len(a.certs))
		}
		out, err := pinned(bundle, []string{"sha256:00", ca.hash()})
		if err != nil {
			return
		}
		a, err := parseAuthority(out)
		if err != nil {
			return // more than there may be
		}
		for _, c := range a.certs {
			if !bytes.Equal(c.RawSubjectPublicKeyInfo, ca.cert.RawSubjectPublicKeyInfo) {
				t.Errorf("%s has another key", c.Subject)
			}
		}
	})
}

// FuzzFiles reads the files of a certificate as they may be found on a disk.
func FuzzFiles(f *testing.F) {
	keys := newSealer(f)
	o := order{file: "x.pem", names: []string{"a"}}
	ca, dir := newSigner(f), f.TempDir()
	path := filepath.Join(dir, o.file)
	key := mustKey(f)
	must(f, (&pending{Name: "csr-1", Names: o.names, Key: key}).store(path+".pending", keys))
	waiting, err := os.ReadFile(path + ".pending")
	must(f, err)
	plain, err := encodeKey(ca.key)
	must(f, err)
	block, _ := pem.Decode(plain)
	sealed := pem.EncodeToMemory(&pem.Block{Type: blockSealed, Bytes: keys.Seal(o.file, block.Bytes)})
	f.Add(slices.Concat(ca.pem, plain), waiting)
	f.Add(slices.Concat(ca.pem, sealed), waiting[:len(waiting)/2])
	f.Add(slices.Concat(sealed, plain, ca.pem), []byte(`{"name":"x","key":""}`))
	f.Fuzz(func(t *testing.T, pair, request []byte) {
		must(t, os.WriteFile(path, pair, 0o600))
		must(t, os.WriteFile(path+".pending", request, 0o600))
		if c, err := loadPair(path, keys); err == nil {
			if c.Leaf == nil || c.PrivateKey == nil {
				t.Errorf("got %+v", c)
			}
			// What can be sealed is from now on.
			if _, ok := c.PrivateKey.(*ecdsa.PrivateKey); ok {
				mustNotHold(t, dir, c.PrivateKey)
			}
			if again, err := loadPair(path, keys); err != nil || !bytes.Equal(again.Leaf.Raw, c.Leaf.Raw) {
				t.Errorf("read again: %v", err)
			}
		}
		if p := loadPending(path+".pending", o, keys); p != nil && p.key == nil {
			t.Errorf("got %+v", p)
		}
	})
}
