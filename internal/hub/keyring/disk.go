package keyring

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/yurt-edge/yurt/internal/atomicfile"
	"github.com/yurt-edge/yurt/internal/filelock"
)

// Names in Config.Dir. The ring and the key file are each there twice, one
// beside the other: a bad sector must not cost a node its certificates.
const (
	ringFile = "keyring.json"
	lockFile = "keyring.lock"

	copySuffix   = ".copy"
	lostSuffix   = ".lost"   // sealed under a key that will not come back
	lockedSuffix = ".locked" // sealed under a key that may come back

	lockWait = 10 * time.Second
)

// formatV1 is the only format of a record so far.
const formatV1 = 1

// record is the ring as it is on disk.
type record struct {
	Format     int               `json:"format"`
	Source     Source            `json:"source"`
	Made       time.Time         `json:"made"`
	File       *fileRecord       `json:"file,omitempty"`
	TPM        *tpmRecord        `json:"tpm,omitempty"`
	Passphrase *passphraseRecord `json:"passphrase,omitempty"`
	Data       []byte            `json:"data"` // the data key, wrapped by the node key
}

// load returns the sound copies of the ring in dir, none if there is no ring.
// The error is errLost if there is one, and no copy of it is sound.
func load(dir string) ([]*record, error) {
	var (
		out  []*record
		last []byte
		errs []error
	)
	for _, name := range twins(filepath.Join(dir, ringFile)) {
		text, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) || last != nil && bytes.Equal(text, last) {
			continue
		}
		last = text
		rec := &record{}
		if err == nil {
			err = json.Unmarshal(text, rec)
		}
		if err == nil && rec.Format != formatV1 {
			err = fmt.Errorf("format %d is not known", rec.Format)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		out = append(out, rec)
	}
	if len(out) == 0 && len(errs) > 0 {
		return nil, fmt.Errorf("%w: %w", errLost, errors.Join(errs...))
	}
	return out, nil
}

// save makes rec the ring, and then removes the key files of older ones.
func (cfg *Config) save(rec *record) error {
	text, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return fmt.Errorf("encode keyring: %w", err)
	}
	text = append(text, '\n')
	for _, name := range twins(filepath.Join(cfg.Dir, ringFile)) {
		if err := cfg.step(); err != nil {
			return err
		}
		if old, err := os.ReadFile(name); err == nil && string(old) == string(text) {
			continue
		}
		if err := atomicfile.WriteFile(name, text, 0o600); err != nil {
			return err
		}
	}
	if err := cfg.step(); err != nil {
		return err
	}
	return cfg.removeKeys(rec)
}

// removeKeys removes the key files that rec does not name.
func (cfg *Config) removeKeys(rec *record) error {
	keys, err := cfg.otherKeys(rec)
	if err != nil {
		return err
	}
	for _, path := range keys {
		if err := erase(path); err != nil {
			return err
		}
		if err := cfg.step(); err != nil {
			return err
		}
	}
	return syncDirs(keys)
}

// otherKeys lists the key files that rec does not name.
func (cfg *Config) otherKeys(rec *record) ([]string, error) {
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), copySuffix)
		if isKeyFile(name) && (rec.File == nil || name != rec.File.Name) {
			out = append(out, filepath.Join(cfg.Dir, e.Name()))
		}
	}
	return out, nil
}

// erase overwrites a file before it is removed. That is the best that can be
// done from here: flash keeps old blocks for a while.
func erase(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		_, err = f.Write(make([]byte, info.Size()))
	}
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(path))
}

func twins(path string) []string { return []string{path, path + copySuffix} }

func writeTwice(path string, data []byte) error {
	for _, name := range twins(path) {
		if err := atomicfile.WriteFile(name, data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// sealed lists the files that the ring's key sealed.
func (cfg *Config) sealed() ([]string, error) {
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(cfg.Sealed)
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".pem") || strings.HasSuffix(e.Name(), ".pending") {
			out = append(out, filepath.Join(cfg.Dir, e.Name()))
		}
	}
	return out, nil
}

// lockAll renames what is sealed under the key that cannot be had. What has
// such a name already stays: it is from before the trouble, and what is then
// in its old place is of a run whose key is gone with it.
func (cfg *Config) lockAll() error {
	sealed, err := cfg.sealed()
	if err != nil {
		return err
	}
	for _, path := range sealed {
		if _, err := os.Lstat(path + lockedSuffix); err == nil {
			err = os.Remove(path)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			continue
		}
		if err := rename(path, path+lockedSuffix); err != nil {
			return err
		}
	}
	return syncDirs(sealed)
}

// unlockAll undoes lockAll.
func (cfg *Config) unlockAll() error {
	locked, err := cfg.withSuffix(lockedSuffix)
	if err != nil {
		return err
	}
	for _, path := range locked {
		cfg.Log.Info("locked file is back", "path", path)
		if err := rename(path+lockedSuffix, path); err != nil {
			return err
		}
	}
	return syncDirs(locked)
}

// loseAll renames what is sealed under the key that is lost, and the ring with
// its key files last of all. It leaves the key file of next alone.
func (cfg *Config) loseAll(next *record) error {
	sealed, err := cfg.sealed()
	if err != nil {
		return err
	}
	locked, err := cfg.withSuffix(lockedSuffix)
	if err != nil {
		return err
	}
	old, err := cfg.withSuffix(lostSuffix)
	if err != nil {
		return err
	}
	for _, path := range old { // of the ring before
		if isKeyFile(strings.TrimSuffix(filepath.Base(path), copySuffix)) {
			if err := os.Remove(path + lostSuffix); err != nil {
				return err
			}
		}
	}
	for _, path := range sealed {
		// What is locked is from before, and worth more.
		if slices.Contains(locked, path) {
			err = os.Remove(path)
			if errors.Is(err, os.ErrNotExist) {
				err = nil
			}
		} else {
			err = rename(path, path+lostSuffix)
		}
		if err != nil {
			return err
		}
	}
	for _, path := range locked {
		if err := rename(path+lockedSuffix, path+lostSuffix); err != nil {
			return err
		}
	}
	keys, err := cfg.otherKeys(next)
	if err != nil {
		return err
	}
	ring := append(twins(filepath.Join(cfg.Dir, ringFile)), keys...)
	for _, path := range ring {
		if err := rename(path, path+lostSuffix); err != nil {
			return err
		}
	}
	return syncDirs(append(sealed, ring...))
}

// withSuffix lists the files, without the suffix, that have it.
func (cfg *Config) withSuffix(suffix string) ([]string, error) {
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok {
			out = append(out, filepath.Join(cfg.Dir, name))
		}
	}
	for _, path := range cfg.Sealed {
		if _, err := os.Lstat(path + suffix); err == nil && !slices.Contains(out, path) {
			out = append(out, path)
		}
	}
	return out, nil
}

// rename is os.Rename for a file that may be absent.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// syncDirs makes renames in the files' directories durable.
func syncDirs(paths []string) error {
	var dirs []string
	for _, path := range paths {
		dirs = append(dirs, filepath.Dir(path))
	}
	slices.Sort(dirs)
	var errs []error
	for _, dir := range slices.Compact(dirs) {
		d, err := os.Open(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = errors.Join(d.Sync(), d.Close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// lock keeps others from changing the ring in dir, which is made if need be.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := filelock.Lock(ctx, filepath.Join(dir, lockFile), lockWait)
	if err != nil {
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}
