package keyring

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/crypto/argon2"
)

// errLost says that a node key will not come back by itself.
var errLost = errors.New("the node key is lost")

// source makes and finds node keys.
type source interface {
	// renew makes a new node key and notes in rec how to have it again.
	renew(ctx context.Context, rec *record) ([]byte, error)
	// open returns the node key of rec. The error is errLost if it will not
	// come back.
	open(ctx context.Context, rec *record) ([]byte, error)
}

func (cfg *Config) source(s Source) (source, error) {
	switch s {
	case TPM:
		return tpm{device: cfg.TPMDevice, wait: cfg.Wait}, nil
	case File:
		return keyFile{dir: cfg.Dir}, nil
	case Passphrase:
		return passphrase{file: cfg.PassphraseFile, memory: cfg.memory}, nil
	}
	return nil, fmt.Errorf("key source %q is not known", s)
}

// choose lists what to try for a new ring, the best first.
func (cfg *Config) choose(want Source) []Source {
	if want != Auto {
		return []Source{want}
	}
	var out []Source
	if _, err := os.Stat(cfg.TPMDevice); err == nil {
		out = append(out, TPM)
	}
	if cfg.PassphraseFile != "" {
		if _, err := os.Stat(cfg.PassphraseFile); err == nil {
			return append(out, Passphrase)
		}
	}
	return append(out, File)
}

// wrapBest wraps the data key by a new node key from the best source that is
// to be had.
func (cfg *Config) wrapBest(ctx context.Context, want Source, data []byte) (*record, error) {
	var errs []error
	for _, s := range cfg.choose(want) {
		rec, err := cfg.wrap(ctx, s, data)
		if err == nil {
			if len(errs) > 0 {
				cfg.Log.Warn("node key is not from the best source", "source", s, "err", errors.Join(errs...))
			}
			return rec, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

const wrapPurpose = "yurt hub keyring v1"

// wrap wraps the data key by a new node key of the source.
func (cfg *Config) wrap(ctx context.Context, s Source, data []byte) (*record, error) {
	src, err := cfg.source(s)
	if err != nil {
		return nil, err
	}
	rec := &record{Format: formatV1, Source: s, Made: time.Now().UTC().Truncate(time.Second)}
	node, err := src.renew(ctx, rec)
	if err != nil {
		return nil, fmt.Errorf("make node key from %s: %w", s, err)
	}
	defer clear(node)
	aead, err := cipherOf(node, wrapPurpose)
	if err != nil {
		return nil, err
	}
	rec.Data = seal(aead, string(s), data)
	return rec, nil
}

// unwrap returns the first record that opens, with the data key. When none
// does it returns the first one and why; the error is errLost if that is true
// of all.
func (cfg *Config) unwrap(ctx context.Context, records []*record) (*record, []byte, error) {
	var errs []error
	lost := true
	for _, rec := range records {
		data, err := cfg.unwrapOne(ctx, rec)
		if err == nil {
			return rec, data, nil
		}
		errs = append(errs, err)
		lost = lost && errors.Is(err, errLost)
	}
	err := errors.Join(errs...)
	if !lost {
		err = fmt.Errorf("cannot be had now: %s", err) //nolint:errorlint // it must not count as lost
	}
	return records[0], nil, err
}

func (cfg *Config) unwrapOne(ctx context.Context, rec *record) ([]byte, error) {
	src, err := cfg.source(rec.Source)
	if err != nil {
		return nil, err
	}
	node, err := src.open(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer clear(node)
	aead, err := cipherOf(node, wrapPurpose)
	if err != nil {
		return nil, err
	}
	data, err := unseal(aead, string(rec.Source), rec.Data)
	switch {
	case err == nil && len(data) == keySize:
		return data, nil
	case rec.Source == Passphrase:
		return nil, errors.New("the passphrase does not open the ring; give the right one, or begin anew with another --store-key-source")
	}
	return nil, fmt.Errorf("%w: it does not open the ring", errLost)
}

// keyFile keeps the node key in a file of its own, readable by its owner only.
// A new key is a new file: a ring names its file, so it never sees half a
// change.
type keyFile struct{ dir string }

type fileRecord struct {
	Name string `json:"name"`
}

const (
	keyPrefix = "node-"
	keySuffix = ".key"
)

func (k keyFile) renew(_ context.Context, rec *record) ([]byte, error) {
	key := newKey()
	sum := sha256.Sum256(key)
	rec.File = &fileRecord{Name: keyPrefix + hex.EncodeToString(sum[:4]) + keySuffix}
	if err := writeTwice(filepath.Join(k.dir, rec.File.Name), encodeKey(key)); err != nil {
		return nil, err
	}
	return key, nil
}

func (k keyFile) open(_ context.Context, rec *record) ([]byte, error) {
	if rec.File == nil || !isKeyFile(rec.File.Name) {
		return nil, fmt.Errorf("%w: the ring names no key file", errLost)
	}
	path := filepath.Join(k.dir, rec.File.Name)
	var (
		key  []byte
		errs []error
	)
	for _, name := range twins(path) {
		text, err := os.ReadFile(name)
		if err == nil {
			var sound []byte
			if sound, err = decodeKey(text); err == nil {
				key = sound
				continue
			}
		}
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	if key == nil {
		return nil, fmt.Errorf("%w: %w", errLost, errors.Join(errs...))
	}
	if len(errs) > 0 {
		// One copy will do; on a full disk it has to.
		_ = writeTwice(path, encodeKey(key))
	}
	return key, nil
}

func isKeyFile(name string) bool {
	return strings.HasPrefix(name, keyPrefix) && strings.HasSuffix(name, keySuffix) && filepath.Base(name) == name
}

// encodeKey adds a check, so that of two copies the whole one is known.
func encodeKey(key []byte) []byte {
	sum := sha256.Sum256(key)
	return []byte(hex.EncodeToString(key) + " " + hex.EncodeToString(sum[:8]) + "\n")
}

func decodeKey(text []byte) ([]byte, error) {
	digits, _, _ := strings.Cut(string(text), " ")
	key, err := hex.DecodeString(digits)
	if err != nil || len(key) != keySize || subtle.ConstantTimeCompare(encodeKey(key), text) == 0 {
		return nil, errors.New("the key file is damaged")
	}
	return key, nil
}

// passphrase derives the node key from what a person or systemd gives.
type passphrase struct {
	file   string
	memory uint32 // KiB, for new rings
}

// passphraseRecord are the parameters of Argon2id.
type passphraseRecord struct {
	Salt    []byte `json:"salt"`
	Time    uint32 `json:"time"`
	Memory  uint32 `json:"memory"` // KiB
	Threads uint8  `json:"threads"`
}

// Parameters of new rings, the second choice of RFC 9106: 64 MiB is what a
// small node has. Those of a ring may be up to the limits.
const (
	argonTime, argonTimeMax     = 3, 64
	argonMemory, argonMemoryMax = 64 << 10, 256 << 10
	argonThreads                = 4

	minPassphrase, maxPassphrase = 12, 4 << 10
)

func (p passphrase) renew(ctx context.Context, rec *record) ([]byte, error) {
	rec.Passphrase = &passphraseRecord{Salt: newKey()[:16], Time: argonTime, Memory: p.memory, Threads: argonThreads}
	return p.open(ctx, rec)
}

func (p passphrase) open(_ context.Context, rec *record) ([]byte, error) {
	w := rec.Passphrase
	if w == nil || w.Time == 0 || w.Time > argonTimeMax || w.Memory > argonMemoryMax || w.Threads == 0 {
		return nil, fmt.Errorf("%w: the ring has no sound parameters for a passphrase", errLost)
	}
	text, err := p.read()
	if err != nil {
		return nil, err
	}
	defer clear(text)
	key := argon2.IDKey(text, w.Salt, w.Time, w.Memory, w.Threads, keySize)
	debug.FreeOSMemory() // once; the hub itself needs much less
	return key, nil
}

// read returns the passphrase without the end of its line.
func (p passphrase) read() ([]byte, error) {
	if p.file == "" {
		return nil, errors.New("no passphrase is given: set --store-key-passphrase-file, or LoadCredential=" + Credential + ": in the unit")
	}
	f, err := os.Open(p.file)
	if err != nil {
		return nil, fmt.Errorf("read passphrase: %w", err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	text, err := io.ReadAll(io.LimitReader(f, maxPassphrase+1))
	if err != nil {
		return nil, fmt.Errorf("read passphrase: %w", err)
	}
	text = bytes.TrimRight(text, "\r\n")
	if len(text) < minPassphrase || len(text) > maxPassphrase {
		return nil, fmt.Errorf("the passphrase in %s has %d bytes, it must have %d to %d", p.file, len(text), minPassphrase, maxPassphrase)
	}
	return text, nil
}
