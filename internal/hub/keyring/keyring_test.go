package keyring

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/yurt-edge/yurt/test/swtpm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// node is a node with everything that a node key can come from.
type node struct {
	Config
	chip *swtpm.Chip
	log  *bytes.Buffer
}

func newNode(t testing.TB, source Source) *node {
	t.Helper()
	dir := t.TempDir()
	chip, err := swtpm.New(t.Context())
	must(t, err)
	t.Cleanup(func() { must(t, chip.Close()) })
	n := &node{log: &bytes.Buffer{}, chip: chip}
	n.Config = Config{
		Dir: filepath.Join(dir, "pki"), Sealed: []string{filepath.Join(dir, "store", "hub.db")}, Source: source,
		TPMDevice: n.chip.Socket, PassphraseFile: filepath.Join(dir, "passphrase"), Wait: 1, memory: 64,
		Log: slog.New(slog.NewTextHandler(n.log, nil)),
	}
	n.write(t, n.PassphraseFile, "correct horse battery\n")
	return n
}

func (n *node) write(t testing.TB, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o700))
	must(t, os.WriteFile(path, []byte(text), 0o600))
}

// open opens the ring as a hub does after its first start: with no word on
// the source.
func (n *node) open(t testing.TB) *Ring {
	t.Helper()
	cfg := n.Config
	cfg.Source = Auto
	r, err := Open(t.Context(), cfg)
	must(t, err)
	return r
}

func (n *node) begin(t testing.TB) *Ring {
	t.Helper()
	r, err := Open(t.Context(), n.Config)
	must(t, err)
	if r.Problem() != nil {
		t.Fatal(r.Problem())
	}
	return r
}

// files returns the content of all files in Dir and of those in Sealed.
func (n *node) files(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range []string{n.Dir, filepath.Dir(n.Sealed[0])} {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		must(t, err)
		for _, e := range entries {
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			must(t, err)
			out[e.Name()] = string(text)
		}
	}
	return out
}

var sources = []Source{TPM, File, Passphrase}

func TestRingOpensAgain(t *testing.T) {
	for _, source := range sources {
		t.Run(string(source), func(t *testing.T) {
			n := newNode(t, source)
			r := n.begin(t)
			sealed := r.Seal("a.pem", []byte("the key"))
			n.chip.Off()
			must(t, n.chip.On(t.Context())) // as a reboot does
			again := n.open(t)
			if again.Source() != source || again.Problem() != nil {
				t.Fatalf("source %s, problem %v", again.Source(), again.Problem())
			}
			if !bytes.Equal(again.DataKey(), r.DataKey()) {
				t.Error("another data key came out")
			}
			if plain, err := again.Unseal("a.pem", sealed); err != nil || string(plain) != "the key" {
				t.Errorf("unsealed %q, %v", plain, err)
			}
			if _, err := again.Unseal("b.pem", sealed); err == nil {
				t.Error("what was sealed as a.pem opened as b.pem")
			}
			sealed[len(sealed)-1] ^= 1
			if _, err := again.Unseal("a.pem", sealed); err == nil {
				t.Error("damaged data opened")
			}
			for name, text := range n.files(t) {
				for _, form := range []string{
					string(r.DataKey()), hex.EncodeToString(r.DataKey()), base64.StdEncoding.EncodeToString(r.DataKey()),
				} {
					if strings.Contains(text, form) {
						t.Errorf("%s holds the data key", name)
					}
				}
				if isKeyFile(strings.TrimSuffix(name, copySuffix)) != (source == File) && strings.HasPrefix(name, keyPrefix) {
					t.Errorf("%s is there with source %s", name, source)
				}
			}
		})
	}
}

// TestRotationSurvivesCrashes ends rotations after each of their steps, from
// every source to every source.
func TestRotationSurvivesCrashes(t *testing.T) {
	t.Parallel()
	crash := errors.New("crash")
	for _, from := range sources {
		for _, to := range sources {
			t.Run(string(from)+" to "+string(to), func(t *testing.T) {
				t.Parallel()
				n := newNode(t, from)
				r := n.begin(t)
				next := n.PassphraseFile + ".new"
				n.write(t, next, "another horse, another battery")
				for at, done := 0, false; !done; at++ {
					cfg, left := n.Config, at
					cfg.step = func() error {
						if left--; left < 0 {
							return crash
						}
						return nil
					}
					err := Rotate(t.Context(), cfg, to, next)
					if done = err == nil; !done && !errors.Is(err, crash) {
						t.Fatal(err)
					}
					// A person who sees the old passphrase fail has the new one.
					again := n.open(t)
					if again.Problem() != nil {
						must(t, os.Rename(next, n.PassphraseFile))
						n.write(t, next, "another horse, another battery")
						again = n.open(t)
					}
					if again.Problem() != nil || !bytes.Equal(again.DataKey(), r.DataKey()) {
						t.Fatalf("after a crash at step %d: %v", at, again.Problem())
					}
					if done && again.Source() != to {
						t.Errorf("source is %s, want %s", again.Source(), to)
					}
				}
				keys := 0
				for name := range n.files(t) {
					if strings.HasPrefix(name, keyPrefix) {
						keys++
					}
					if strings.HasSuffix(name, lostSuffix) || strings.HasSuffix(name, lockedSuffix) {
						t.Errorf("%s is left", name)
					}
				}
				if want := map[Source]int{File: 2}[to]; keys != want {
					t.Errorf("%d key files are left, want %d", keys, want)
				}
			})
		}
	}
}

func TestRotationChangesTheNodeKey(t *testing.T) {
	n := newNode(t, File)
	r := n.begin(t)
	before := n.files(t)
	must(t, Rotate(t.Context(), n.Config, Auto, ""))
	after := n.files(t)
	for name, text := range before {
		if name != lockFile && after[name] == text {
			t.Errorf("%s is as it was", name)
		}
	}
	// The old key file no longer opens the ring.
	for name := range after {
		if strings.HasPrefix(name, keyPrefix) {
			must(t, os.Remove(filepath.Join(n.Dir, name)))
		}
	}
	for name, text := range before {
		if strings.HasPrefix(name, keyPrefix) {
			n.write(t, filepath.Join(n.Dir, name), text)
		}
	}
	if again := n.open(t); bytes.Equal(again.DataKey(), r.DataKey()) {
		t.Error("the old node key opens the new ring")
	}
}

// seal puts something to lose beside the ring and returns it.
func (n *node) seal(t testing.TB, r *Ring, text string) map[string]string {
	t.Helper()
	n.write(t, filepath.Join(n.Dir, "hub.pem"), string(r.Seal("hub.pem", []byte(text))))
	n.write(t, filepath.Join(n.Dir, "ca.crt"), "public")
	n.write(t, n.Sealed[0], string(r.Seal("hub.db", []byte(text))))
	files := n.files(t)
	return map[string]string{"hub.pem": files["hub.pem"], "hub.db": files["hub.db"]}
}

// TestKeyThatIsAway: a TPM that is not there, or a wrong passphrase, locks
// everything and destroys nothing.
func TestKeyThatIsAway(t *testing.T) {
	for _, source := range []Source{TPM, Passphrase} {
		t.Run(string(source), func(t *testing.T) {
			n := newNode(t, source)
			r := n.begin(t)
			sealed := n.seal(t, r, "precious")
			if source == TPM {
				n.chip.Off()
			} else {
				n.write(t, n.PassphraseFile, "it is not this one")
			}
			for range 2 { // it is not there at two boots
				volatile := n.open(t)
				if volatile.Problem() == nil || volatile.Source() != source {
					t.Fatalf("source %s, problem %v", volatile.Source(), volatile.Problem())
				}
				if bytes.Equal(volatile.DataKey(), r.DataKey()) {
					t.Fatal("the data key came from nowhere")
				}
				files := n.files(t)
				for name, want := range sealed {
					if files[name] != "" || files[name+lockedSuffix] != want {
						t.Errorf("%s is not locked", name)
					}
				}
				for name := range files {
					if strings.HasPrefix(name, keyPrefix) {
						t.Errorf("a key file: %s", name)
					}
				}
				n.seal(t, volatile, "of a run without key")
			}
			if !strings.Contains(n.log.String(), "level=ERROR") {
				t.Errorf("the log says nothing of it: %s", n.log)
			}
			if source == TPM {
				must(t, n.chip.On(t.Context()))
			} else {
				n.write(t, n.PassphraseFile, "correct horse battery")
			}
			again := n.open(t)
			if again.Problem() != nil || !bytes.Equal(again.DataKey(), r.DataKey()) {
				t.Fatalf("problem %v", again.Problem())
			}
			files := n.files(t)
			for name, want := range sealed {
				if files[name] != want || files[name+lockedSuffix] != "" {
					t.Errorf("%s did not come back", name)
				}
			}
		})
	}
}

// TestKeyThatIsLost: what will not come back is set aside, and a ring of the
// same source begins.
func TestKeyThatIsLost(t *testing.T) {
	for name, tc := range map[string]struct {
		source, asked Source
		lose          func(t *testing.T, n *node)
	}{
		"another TPM":     {TPM, Auto, func(t *testing.T, n *node) { must(t, n.chip.Replace(t.Context())) }},
		"no TPM, by word": {TPM, File, func(_ *testing.T, n *node) { n.chip.Off() }},
		"no passphrase, by word": {Passphrase, TPM, func(t *testing.T, n *node) {
			must(t, os.Remove(n.PassphraseFile))
		}},
		"key file removed": {File, Auto, func(t *testing.T, n *node) {
			n.eachKeyFile(t, func(path string) { must(t, os.Remove(path)) })
		}},
		"key file damaged": {File, Auto, func(t *testing.T, n *node) {
			n.eachKeyFile(t, func(path string) { n.write(t, path, "not a key") })
		}},
		"ring damaged": {TPM, Auto, func(t *testing.T, n *node) {
			for _, path := range twins(filepath.Join(n.Dir, ringFile)) {
				n.write(t, path, "{")
			}
		}},
		"ring's data for the TPM damaged": {TPM, Auto, func(t *testing.T, n *node) {
			records, err := load(n.Dir)
			must(t, err)
			records[0].TPM.Private[40] ^= 1
			cfg := n.Config
			cfg.complete()
			must(t, cfg.save(records[0]))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tc.source)
			r := n.begin(t)
			sealed := n.seal(t, r, "precious")
			before := n.files(t)
			tc.lose(t, n)
			cfg := n.Config
			cfg.Source = tc.asked
			next, err := Open(t.Context(), cfg)
			must(t, err)
			want := tc.asked
			if want == Auto {
				want = tc.source
			}
			if !next.Lost() || next.Problem() != nil || next.Source() != want || bytes.Equal(next.DataKey(), r.DataKey()) {
				t.Fatalf("source %s, problem %v", next.Source(), next.Problem())
			}
			files := n.files(t)
			for name, want := range sealed {
				if files[name] != "" || files[name+lostSuffix] != want {
					t.Errorf("%s is not set aside", name)
				}
			}
			if files["ca.crt"] != before["ca.crt"] {
				t.Error("ca.crt is not what it was")
			}
			if name != "ring damaged" && name != "ring's data for the TPM damaged" && files[ringFile+lostSuffix] != before[ringFile] {
				t.Error("the old ring is not set aside")
			}
			if !strings.Contains(n.log.String(), "level=ERROR") {
				t.Errorf("the log says nothing of it: %s", n.log)
			}
			if again := n.open(t); again.Problem() != nil || !bytes.Equal(again.DataKey(), next.DataKey()) {
				t.Errorf("the new ring does not open again: %v", again.Problem())
			}
		})
	}
}

func (n *node) eachKeyFile(t testing.TB, do func(path string)) {
	t.Helper()
	for name := range n.files(t) {
		if isKeyFile(strings.TrimSuffix(name, copySuffix)) {
			do(filepath.Join(n.Dir, name))
		}
	}
}

// TestOneCopyIsEnough: damage to either copy of the ring or of the key costs
// nothing, and is mended.
func TestOneCopyIsEnough(t *testing.T) {
	n := newNode(t, File)
	r := n.begin(t)
	var names []string
	for name := range n.files(t) {
		if name != lockFile {
			names = append(names, name)
		}
	}
	if len(names) != 4 {
		t.Fatalf("files are %q", names)
	}
	for _, name := range names {
		path := filepath.Join(n.Dir, name)
		was, err := os.ReadFile(path)
		must(t, err)
		for _, damage := range []string{"", "x" + string(was[1:]), string(was[:len(was)/2]), strings.Repeat("\x00", len(was))} {
			n.write(t, path, damage)
			if again := n.open(t); again.Problem() != nil || !bytes.Equal(again.DataKey(), r.DataKey()) {
				t.Fatalf("with %s damaged: %v", name, again.Problem())
			}
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, was) {
				t.Errorf("%s is not mended: %v", name, err)
			}
		}
	}
}

// TestOpensFromAnyRing flips each bit of a sort in both copies of a ring.
func TestOpensFromAnyRing(t *testing.T) {
	n := newNode(t, File)
	r := n.begin(t)
	before := n.files(t)
	for at := range len(before[ringFile]) {
		text := []byte(before[ringFile])
		text[at] ^= 1 << (at % 8)
		must(t, os.RemoveAll(n.Dir))
		for name, was := range before {
			n.write(t, filepath.Join(n.Dir, name), was)
		}
		for _, path := range twins(filepath.Join(n.Dir, ringFile)) {
			n.write(t, path, string(text))
		}
		first := n.open(t)
		if first.Problem() != nil && !bytes.Equal(first.DataKey(), r.DataKey()) {
			continue // volatile, and loud
		}
		if again := n.open(t); !bytes.Equal(first.DataKey(), again.DataKey()) {
			t.Errorf("with byte %d flipped: the next start has another key", at)
		}
	}
}

// TestAutoTakesTheBest: a TPM before a passphrase before a file, and what is
// chosen once stays.
func TestAutoTakesTheBest(t *testing.T) {
	n := newNode(t, Auto)
	n.chip.Off()
	passphraseFile := n.PassphraseFile
	n.PassphraseFile = ""
	if s := n.begin(t).Source(); s != File {
		t.Errorf("with nothing else the source is %s", s)
	}
	n.PassphraseFile = passphraseFile
	must(t, n.chip.On(t.Context()))
	if s := n.open(t).Source(); s != File {
		t.Errorf("the source moved to %s without anybody's word", s)
	}
	must(t, os.RemoveAll(n.Dir))
	if s := n.begin(t).Source(); s != TPM {
		t.Errorf("with a TPM the source is %s", s)
	}
	must(t, os.RemoveAll(n.Dir))
	n.chip.Off()
	if s := n.begin(t).Source(); s != Passphrase {
		t.Errorf("with a passphrase the source is %s", s)
	}
	must(t, os.RemoveAll(n.Dir))
	n.Source = TPM
	if _, err := Open(t.Context(), n.Config); err == nil {
		t.Error("a ring was made without the TPM that was asked for")
	}
}

// TestWordMovesTheRing: a source that is asked for is moved to, with the same
// data key.
func TestWordMovesTheRing(t *testing.T) {
	n := newNode(t, File)
	r := n.begin(t)
	for _, to := range []Source{TPM, Passphrase, File} {
		n.Source = to
		moved := n.begin(t)
		if moved.Source() != to {
			// It reports what it opened with; the next start shows the move.
			t.Errorf("source %s, want %s", moved.Source(), to)
		}
		if again := n.open(t); again.Source() != to || !bytes.Equal(again.DataKey(), r.DataKey()) {
			t.Errorf("source %s, want %s", again.Source(), to)
		}
	}
}

func TestPassphraseFromCredential(t *testing.T) {
	n := newNode(t, Passphrase)
	dir := t.TempDir()
	n.write(t, filepath.Join(dir, Credential), "given by systemd, whole")
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	n.PassphraseFile, n.memory = "", 0 // as in earnest
	r := n.begin(t)
	if again := n.open(t); !bytes.Equal(again.DataKey(), r.DataKey()) {
		t.Error("another data key came out")
	}
	n.write(t, filepath.Join(dir, Credential), "short")
	if again := n.open(t); again.Problem() == nil || strings.Contains(again.Problem().Error(), "short") {
		t.Errorf("with a passphrase that is too short: %v", again.Problem())
	}
}
