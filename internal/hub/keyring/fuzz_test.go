package keyring

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// FuzzRing opens rings as they may be found on a disk, in two copies that need
// not be the same: it gives a ring, which stays as it is from then on, or the
// key of one run, and then leaves alone what is there.
func FuzzRing(f *testing.F) {
	dir := f.TempDir()
	_, err := Open(f.Context(), Config{Dir: dir, Source: File, Log: slog.New(slog.DiscardHandler)})
	must(f, err)
	ring, err := os.ReadFile(filepath.Join(dir, ringFile))
	must(f, err)
	keys, err := filepath.Glob(filepath.Join(dir, keyPrefix+"*"+keySuffix))
	must(f, err)
	if len(keys) != 1 {
		f.Fatalf("key files %q", keys)
	}
	key, err := os.ReadFile(keys[0])
	must(f, err)
	name := filepath.Base(keys[0])
	f.Add(ring, ring, key)
	f.Add(ring[:len(ring)/2], ring, key)
	f.Add(ring, []byte{}, key[:10])
	for _, other := range []string{"tpm", "passphrase", "auto", "none"} {
		f.Add(bytes.Replace(ring, []byte(`"file"`), []byte(`"`+other+`"`), 1), []byte("{}"), key)
	}
	f.Add([]byte(`{"format":1,"source":"file","file":{"name":"node-/../../x.key"},"data":""}`), []byte(`{"format":2}`), []byte("-"))
	f.Add([]byte(`{"format":1,"source":"passphrase","passphrase":{"salt":"AA==","time":4294967295,"memory":4294967295,"threads":255}}`), []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, first, second, key []byte) {
		dir := t.TempDir()
		cfg := Config{
			Dir: dir, TPMDevice: filepath.Join(dir, "tpm"), PassphraseFile: filepath.Join(dir, "passphrase"),
			Wait: time.Nanosecond, Log: slog.New(slog.DiscardHandler),
		}
		for file, data := range map[string][]byte{ringFile: first, ringFile + copySuffix: second, name: key} {
			must(t, os.WriteFile(filepath.Join(dir, file), data, 0o600))
		}
		r, err := Open(t.Context(), cfg)
		must(t, err)
		if r.Problem() != nil {
			for file, data := range map[string][]byte{ringFile: first, ringFile + copySuffix: second, name: key} {
				if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %v; it was touched though %v", file, err, r.Problem())
				}
			}
			return
		}
		again, err := Open(t.Context(), cfg)
		must(t, err)
		if again.Problem() != nil || again.Lost() || !bytes.Equal(again.DataKey(), r.DataKey()) {
			t.Errorf("opened again: %v, lost %t", again.Problem(), again.Lost())
		}
	})
}
