package keyring

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"
)

// Source says where a node key comes from.
type Source string

// The sources. Auto is for Config only: what the ring has, or for a new ring
// the TPM where there is one, else a passphrase where one is given, else a
// file.
const (
	Auto       Source = "auto"
	TPM        Source = "tpm"
	File       Source = "file"
	Passphrase Source = "passphrase"
)

// ParseSource returns the source of that name.
func ParseSource(name string) (Source, error) {
	switch s := Source(name); s {
	case Auto, TPM, File, Passphrase:
		return s, nil
	}
	return "", fmt.Errorf("key source %q is not known: use auto, tpm, file or passphrase", name)
}

const (
	// DefaultTPM is the kernel's device that lets several programs share the
	// TPM.
	DefaultTPM = "/dev/tpmrm0"
	// Credential is the name of the systemd credential that holds the
	// passphrase.
	Credential = "yurthub-passphrase"

	defaultWait = 10 * time.Second

	keySize   = 32
	nonceSize = 12
)

// Config says where a ring is and where its node key comes from.
type Config struct {
	// Dir holds the ring. It is made if need be. In it, all that ends in
	// .pem or .pending is taken to be sealed under the ring.
	Dir string
	// Sealed are further files that are sealed under the ring.
	Sealed []string
	// Adopt is a file with the data key of a hub from before there were
	// rings. A new ring takes it over, and erases it.
	Adopt string
	// Source is Auto if empty. Any other one is a person's word: a ring that
	// has another one moves to it.
	Source Source
	// TPMDevice is a character device, or the Unix socket of an emulator;
	// DefaultTPM if empty.
	TPMDevice string
	// PassphraseFile is read at once and whole; a descriptor has a name in
	// /dev/fd. If empty it is systemd's credential by the name of Credential.
	PassphraseFile string
	// Wait is how long a TPM that was used before may take to appear, as it
	// may when a machine boots; 10 seconds if zero.
	Wait time.Duration
	Log  *slog.Logger // slog.Default() if nil

	// step, in tests, is called between any two changes of the disk. Its
	// error ends what goes on, as a crash would.
	step func() error
	// memory, in tests, makes a passphrase cheaper.
	memory uint32
}

func (cfg *Config) complete() {
	if cfg.Source == "" {
		cfg.Source = Auto
	}
	if cfg.TPMDevice == "" {
		cfg.TPMDevice = DefaultTPM
	}
	if cfg.PassphraseFile == "" {
		if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
			cfg.PassphraseFile = dir + "/" + Credential
		}
	}
	if cfg.Wait == 0 {
		cfg.Wait = defaultWait
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.memory == 0 {
		cfg.memory = argonMemory
	}
	if cfg.step == nil {
		cfg.step = func() error { return nil }
	}
}

// Ring is an open ring. It is safe for concurrent use and holds nothing open.
type Ring struct {
	data    []byte
	aead    cipher.AEAD
	source  Source
	problem error
	lost    bool
}

// Open opens the ring in cfg.Dir, or makes one.
//
// When the node key is lost for good, as with a damaged key file or a TPM
// that was cleared, all that was sealed is renamed to <name>.lost, replacing
// older ones of that name, and a new ring begins.
//
// When it cannot be had now, as with a TPM that does not answer or a wrong
// passphrase, all that was sealed is renamed to <name>.locked and the ring is
// left alone. The key of this run is then in memory only, and Problem says
// why. The first Open that has the node key again puts the locked files back.
//
// An error means that a ring could not be made where there was none, that the
// disk refused, or that ctx ended during a wait.
func Open(ctx context.Context, cfg Config) (*Ring, error) {
	cfg.complete()
	r, err := open(ctx, &cfg)
	if err != nil {
		return nil, fmt.Errorf("open keyring in %s: %w", cfg.Dir, err)
	}
	return r, nil
}

func open(ctx context.Context, cfg *Config) (*Ring, error) {
	unlock, err := lock(ctx, cfg.Dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	records, err := load(cfg.Dir)
	if err == nil && len(records) == 0 {
		return begin(ctx, cfg, cfg.Source)
	}
	had := Auto // unknown
	if err == nil {
		var rec *record
		var data []byte
		if rec, data, err = cfg.unwrap(ctx, records); err == nil {
			return cfg.resume(ctx, rec, data)
		}
		if ctx.Err() != nil {
			return nil, err // that says nothing of the key
		}
		had = rec.Source
	}
	want := cfg.Source
	if want == Auto {
		want = had
	}
	if errors.Is(err, errLost) || want != had {
		cfg.Log.Error("node key is lost, what it sealed is set aside and a new one is made", "source", had, "err", err)
		data := newKey()
		rec, wrapErr := cfg.wrapBest(ctx, want, data)
		if wrapErr == nil {
			if err := cfg.loseAll(rec); err != nil {
				return nil, err
			}
			r, err := cfg.begun(rec, data)
			if err == nil {
				r.lost = true
			}
			return r, err
		}
		err = errors.Join(err, wrapErr)
	}
	cfg.Log.Error("node key cannot be had, what it sealed is locked and this run's key is in memory only", "source", had, "err", err)
	if err := cfg.lockAll(); err != nil {
		return nil, err
	}
	data := newKey()
	r, cryptErr := newRing(data, had)
	if cryptErr != nil {
		return nil, cryptErr
	}
	r.problem = fmt.Errorf("node key from %s: %w", had, err)
	return r, nil
}

// begin makes the first ring.
func begin(ctx context.Context, cfg *Config, want Source) (*Ring, error) {
	data, err := os.ReadFile(cfg.Adopt)
	adopt := err == nil && len(data) == keySize
	if !adopt {
		data = newKey()
	}
	rec, err := cfg.wrapBest(ctx, want, data)
	if err != nil {
		return nil, err
	}
	r, err := cfg.begun(rec, data)
	if err == nil && adopt {
		err = erase(cfg.Adopt)
	}
	return r, err
}

func (cfg *Config) begun(rec *record, data []byte) (*Ring, error) {
	if err := cfg.save(rec); err != nil {
		return nil, err
	}
	cfg.Log.Info("keyring made", "source", rec.Source)
	return newRing(data, rec.Source)
}

// resume goes on with the ring that was found, after mending what a crash may
// have left, and moves it to the source that is asked for.
func (cfg *Config) resume(ctx context.Context, rec *record, data []byte) (*Ring, error) {
	if err := cfg.unlockAll(); err != nil {
		return nil, err
	}
	if cfg.Source != Auto && cfg.Source != rec.Source {
		next, err := cfg.wrap(ctx, cfg.Source, data)
		if err == nil {
			cfg.Log.Info("keyring moves to another source", "from", rec.Source, "to", next.Source)
			rec = next
		} else {
			cfg.Log.Error("keyring stays with its source", "source", rec.Source, "err", err)
		}
	}
	if err := cfg.save(rec); err != nil {
		// It is good as it is: a disk that is full must not stop a hub.
		cfg.Log.Error("keyring is not brought up to date", "err", err)
	}
	cfg.Log.Info("keyring opened", "source", rec.Source)
	return newRing(data, rec.Source)
}

func newRing(data []byte, source Source) (*Ring, error) {
	aead, err := cipherOf(data, "yurt hub keys v1")
	if err != nil {
		return nil, err
	}
	return &Ring{data: data, aead: aead, source: source}, nil
}

func cipherOf(key []byte, purpose string) (cipher.AEAD, error) {
	derived, err := hkdf.Key(sha256.New, key, nil, purpose, keySize)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	defer clear(derived)
	block, err := aes.NewCipher(derived)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return cipher.NewGCM(block)
}

func newKey() []byte {
	key := make([]byte, keySize)
	_, _ = rand.Read(key) // never fails, it stops the program
	return key
}

// DataKey returns the 32 bytes from which a user derives a key of its own.
// They must not be changed.
func (r *Ring) DataKey() []byte { return r.data }

// Source returns where the node key comes from.
func (r *Ring) Source() Source { return r.source }

// Problem returns nil, or why the key of this run is in memory only.
func (r *Ring) Problem() error { return r.problem }

// Lost reports whether the ring began anew just now because the node key of
// the one before is lost, and with it all that was sealed.
func (r *Ring) Lost() bool { return r.lost }

// Seal returns the sealed form of plain, which opens under the same name only.
func (r *Ring) Seal(name string, plain []byte) []byte { return seal(r.aead, name, plain) }

// Unseal returns what was sealed under the name, or an error that says nothing
// of the content.
func (r *Ring) Unseal(name string, sealed []byte) ([]byte, error) {
	plain, err := unseal(r.aead, name, sealed)
	if err != nil {
		return nil, fmt.Errorf("unseal %s: %w", name, err)
	}
	return plain, nil
}

// sealedV1 is the first byte of sealed data. A nonce, the cipher text and the
// tag follow. The tag covers the name and this byte.
const sealedV1 = 1

var errSeal = errors.New("sealed under another key, or damaged")

func seal(aead cipher.AEAD, name string, plain []byte) []byte {
	out := make([]byte, 1+nonceSize, 1+nonceSize+len(plain)+aead.Overhead())
	out[0] = sealedV1
	_, _ = rand.Read(out[1:]) // never fails, it stops the program
	return aead.Seal(out, out[1:], plain, append([]byte{sealedV1}, name...))
}

func unseal(aead cipher.AEAD, name string, sealed []byte) ([]byte, error) {
	if len(sealed) < 1+nonceSize || sealed[0] != sealedV1 {
		return nil, errSeal
	}
	plain, err := aead.Open(nil, sealed[1:1+nonceSize], sealed[1+nonceSize:], append([]byte{sealedV1}, name...))
	if err != nil {
		return nil, errSeal
	}
	return bytes.Clone(plain), nil
}

// Status is what a ring's files tell without any key.
type Status struct {
	Source Source
	Made   time.Time // the node key
}

// ReadStatus reads the ring in dir and opens nothing.
func ReadStatus(dir string) (Status, error) {
	records, err := load(dir)
	if err == nil && len(records) == 0 {
		err = os.ErrNotExist
	}
	if err != nil {
		return Status{}, fmt.Errorf("read keyring in %s: %w", dir, err)
	}
	return Status{Source: records[0].Source, Made: records[0].Made}, nil
}

// Rotate wraps the data key of the ring in cfg.Dir by a new node key from the
// source to; Auto is the one that the ring has. cfg opens the present ring,
// next is the passphrase file of the new one, cfg's if empty. A hub that runs
// meanwhile is not disturbed: it holds the data key.
//
// After an error or a crash either the old node key or the new one opens the
// ring, and the same data key comes out.
func Rotate(ctx context.Context, cfg Config, to Source, next string) error {
	cfg.complete()
	if err := rotate(ctx, &cfg, to, next); err != nil {
		return fmt.Errorf("rotate node key in %s: %w", cfg.Dir, err)
	}
	return nil
}

func rotate(ctx context.Context, cfg *Config, to Source, next string) error {
	unlock, err := lock(ctx, cfg.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	records, err := load(cfg.Dir)
	if err == nil && len(records) == 0 {
		err = errors.New("there is no ring: the hub makes one when it first starts")
	}
	if err != nil {
		return err
	}
	rec, data, err := cfg.unwrap(ctx, records)
	if err != nil {
		return err
	}
	defer clear(data)
	if to == Auto || to == "" {
		to = rec.Source
	}
	if next != "" {
		cfg.PassphraseFile = next
	}
	if rec, err = cfg.wrap(ctx, to, data); err != nil {
		return err
	}
	return cfg.save(rec)
}
