// Package store keeps the hub's objects on disk through crashes, power cuts
// and bit rot. It is one bbolt file with one bucket per logical bucket.
//
// # Guarantees
//
// A batch is durable when Commit returns or the done function of Submit is
// called without an error; it is then there after any crash, whole. Every
// value is sealed with AES-256-GCM to its bucket, key, version and encoding,
// so damaged or exchanged data is never returned: it is ErrDamaged, set
// aside, and the rest stays in use. Each bucket carries a digest of what it
// holds, checked by Open, so that lost keys and lost writes are noticed
// too. A file whose structure is damaged is set aside as a whole and an
// empty one begun; see Store.Rebuilt.
//
// # Limits
//
// Names of buckets and keys, versions and sizes are in the clear. Somebody
// who can write the file can bring back an older state of it: the seal
// stands against reading and forging, not against replay. If the page that
// names the last commit rots, the store opens at the commit before.
//
// The package keeps no cache. Objects stay in the mapped file.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sync/semaphore"

	"github.com/yurt-edge/yurt/internal/filelock"
)

// Errors that callers branch on.
var (
	ErrNotFound = errors.New("not found")
	ErrDamaged  = errors.New("damaged")
	ErrLocked   = filelock.ErrHeld
	ErrClosed   = errors.New("store is closed")
	ErrInvalid  = errors.New("invalid batch")

	// errLost is the damage of a bucket that may lack keys.
	errLost = errors.New("the bucket may have lost keys")
)

// Top-level names in the file.
const (
	dataPrefix       = "d" // of a logical bucket
	metaBucket       = "m" // its sequence is the digest of all bucket names
	quarantineBucket = "q"

	keyCheck = "key" // in metaBucket: a value that only the right key opens
)

// anyCommit is an unsynced transaction of a process that is gone.
const anyCommit = math.MaxUint64

const (
	defaultMaxDelay      = 5 * time.Millisecond
	defaultMaxLag        = 2 * time.Second
	defaultMaxBatchBytes = 1 << 20

	// maxFileSize bounds the file. It is also how much of it is mapped:
	// 1 GiB, or 256 MiB of a small address space.
	maxFileSize = 1 << (26 + strconv.IntSize/16)
	// growStep is how much the file grows at a time. It is a hole until
	// written. bbolt syncs at each step.
	growStep = 1 << 20
	// fillPercent is how full bbolt leaves the pages that it splits. Most
	// keys arrive in order, in a first list, and then only change. At 0.85
	// pods of 2 KB took half as much again.
	fillPercent = 1.0
)

// Config says where a store is and how it behaves.
type Config struct {
	Path string       // of the file; its directory is made if need be
	Key  []byte       // 32 bytes
	Log  *slog.Logger // nil discards

	// MaxDelay is how long a Commit waits for others when others are
	// likely. Default 5 ms.
	MaxDelay time.Duration
	// MaxLag is how long a submitted batch waits at most while batches keep
	// coming. It bounds what a crash can take, and trades that for bytes
	// written: see BenchmarkStatusUpdates. Default 2 s; negative means none.
	MaxLag time.Duration
	// MaxBatchBytes ends both waits early. It is about the size of the
	// largest transaction. Default 1 MiB, at most 4 MiB.
	MaxBatchBytes int

	// Fallback opens a store in memory where the disk gives none: it cannot
	// be written, or not read. Memory begins with what is in the file, if
	// that can be read. See Store.Durable.
	Fallback bool

	// OnDamage, if set, is told of a damaged value after it was set aside,
	// once, on the committer's goroutine: it must be quick and must not call
	// Commit, Submit or Close.
	OnDamage func(bucket, key string)
}

// Store is an open store. It is safe for concurrent use.
type Store struct {
	cfg     Config
	log     *slog.Logger
	codec   *codec
	file    *os.File // owned by db
	db      *bolt.DB
	rebuilt bool
	memory  error // why the store is not on disk; nil when it is

	space   *semaphore.Weighted // bytes free in the queue
	wake    chan struct{}       // holds one token
	stopped chan struct{}       // closed when the committer has ended
	stuck   bool                // bbolt's locks are lost; read after stopped

	// unsynced is the transaction that failed last, until its meta page is
	// known to be on the disk. It belongs to the committer.
	unsynced uint64

	commits, written, damaged atomic.Int64

	mu        sync.Mutex // guards all below
	queue     []*request
	queued    int64 // bytes in queue
	urgent    int   // requests in queue that somebody waits for
	closing   bool
	faultErr  error // the structure is damaged; set once
	commitErr error // of the last transaction
	suspect   map[string]bool
	damage    map[location]bool // to be set aside
}

// Stats are counters since Open and the present size.
type Stats struct {
	DiskBytes    int64 // blocks that the file takes
	Commits      int64 // transactions
	BytesWritten int64 // pages written by them
	Damaged      int64 // values set aside
	QueuedBytes  int64 // waiting for a transaction
}

// Open opens or makes the store at cfg.Path. A file that is not a sound
// store under this key is renamed to <path>.damaged, replacing an older one,
// and an empty store is begun: Rebuilt then tells so, and the log says why.
// Open waits a second, or until ctx ends, for another process to let go of
// the file, then returns ErrLocked.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxDelay <= 0 {
		cfg.MaxDelay = defaultMaxDelay
	}
	if cfg.MaxLag == 0 {
		cfg.MaxLag = defaultMaxLag
	}
	if cfg.MaxBatchBytes <= 0 {
		cfg.MaxBatchBytes = defaultMaxBatchBytes
	}
	// A full queue must be a reason to write.
	cfg.MaxBatchBytes = min(cfg.MaxBatchBytes, queueBytes/2)
	c, err := newCodec(cfg.Key)
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg:     cfg,
		log:     cfg.Log,
		codec:   c,
		space:   semaphore.NewWeighted(queueBytes),
		wake:    make(chan struct{}, 1),
		stopped: make(chan struct{}),
		suspect: make(map[string]bool),
		damage:  make(map[location]bool),
	}
	err = s.open(ctx)
	if err != nil && cfg.Fallback && !errors.Is(err, ErrLocked) && ctx.Err() == nil {
		err = s.openMemory(err)
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", cfg.Path, err)
	}
	go s.run()
	return s, nil
}

// open opens the file, or sets it aside and begins a new one.
func (s *Store) open(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(s.cfg.Path), 0o700); err != nil {
		return err
	}
	f, err := lockFile(ctx, s.cfg.Path)
	if err == nil {
		err = s.load(f)
	}
	if !errors.Is(err, ErrDamaged) {
		return err
	}
	s.log.Error("store damaged, beginning an empty one", "path", s.cfg.Path, "err", err)
	if err := setAside(s.cfg.Path); err != nil {
		return err
	}
	if f, err = lockFile(ctx, s.cfg.Path); err != nil {
		return err
	}
	s.rebuilt, s.faultErr = true, nil
	clear(s.suspect)
	return s.load(f)
}

// load checks the file and hands it to bbolt. It owns f: on error f is
// closed, and the error is ErrDamaged if the file is to blame.
func (s *Store) load(f *os.File) (err error) {
	s.file, s.unsynced = f, anyCommit
	defer func() {
		if err == nil {
			return
		}
		if s.db != nil {
			_ = s.db.Close()
			s.db = nil
		}
		_ = f.Close() // may be closed already
	}()
	found, err := verify(f)
	if err != nil {
		return err
	}
	err = s.guard("open", func() (err error) {
		s.db, err = bolt.Open(f.Name(), 0, &bolt.Options{
			// Lets bbolt use the file that is locked already.
			OpenFile:     func(string, int, os.FileMode) (*os.File, error) { return f, nil },
			FreelistType: bolt.FreelistMapType,
			NoStatistics: true,
			// Never map again: bbolt would wait for all readers to end, and
			// a reader that commits or opens a second snapshot would wait
			// for bbolt. Only address space is taken.
			InitialMmapSize: s.maxSize(),
			MaxSize:         s.maxSize(),
			// NoFreelistSync stays off though it saves a page per commit:
			// without a stored list bbolt walks the mapped file on a
			// goroutine of its own, at open and after each failed commit,
			// and a page that cannot be read there ends the process.
		})
		if err == nil {
			s.db.AllocSize = growStep
		}
		return err
	})
	if errors.Is(err, berrors.ErrInvalid) || errors.Is(err, berrors.ErrChecksum) || errors.Is(err, berrors.ErrVersionMismatch) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return err
	}
	for _, name := range found.suspect {
		s.suspect[name] = true
		s.log.Warn("bucket may have lost keys", "bucket", name)
	}
	if found.empty {
		return s.begin()
	}
	return s.guard("open", s.checkKey)
}

// begin writes what every store has and makes its name durable.
func (s *Store) begin() error {
	err := s.update(func(t *txn) error {
		m, err := t.CreateBucketIfNotExists([]byte(metaBucket))
		if err != nil {
			return err
		}
		return m.Put([]byte(keyCheck), s.codec.seal(nil, "", keyCheck, Record{}))
	})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	if s.memory != nil {
		return nil //nolint:nilerr // it is why there is no name to keep
	}
	return syncDir(filepath.Dir(s.cfg.Path))
}

func (s *Store) checkKey() error {
	return s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(metaBucket))
		if b == nil {
			return fmt.Errorf("%w: no key check", ErrDamaged)
		}
		if _, _, err := s.codec.open(nil, "", keyCheck, b.Get([]byte(keyCheck))); err != nil {
			return fmt.Errorf("%w: key check: %w", ErrDamaged, err)
		}
		return nil
	})
}

// Close writes what is queued, waits for open snapshots and closes the
// file. Later calls return ErrClosed.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return ErrClosed
	}
	s.closing = true
	s.mu.Unlock()
	s.poke()
	<-s.stopped
	if s.stuck {
		// bbolt would wait for a lock that nobody lets go. Closing the file
		// gives the store free for others; the mapping is lost.
		return s.file.Close()
	}
	return s.db.Close()
}

// Rebuilt reports whether Open found damage and began an empty store.
func (s *Store) Rebuilt() bool { return s.rebuilt }

// Health returns nil, or why the store cannot be written or read: damage of
// its structure, which stays until it is opened anew, or the error of the
// last transaction, which the next one may clear; or why it is not Durable.
func (s *Store) Health() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.Durable(), s.faultErr, s.commitErr)
}

// Durable returns nil, or why the store lives in memory only: Commit then
// keeps nothing through a restart.
func (s *Store) Durable() error { return s.memory }

// Stats returns the counters.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	queued := s.queued
	s.mu.Unlock()
	return Stats{
		DiskBytes:    diskBytes(s.cfg.Path),
		Commits:      s.commits.Load(),
		BytesWritten: s.written.Load(),
		Damaged:      s.damaged.Load(),
		QueuedBytes:  queued,
	}
}

func (s *Store) fault() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faultErr
}

// setFault records that the structure of the file made no sense to bbolt.
func (s *Store) setFault(what string, reason any) error {
	err := fmt.Errorf("%s: %w: %v", what, ErrDamaged, reason)
	s.mu.Lock()
	first := s.faultErr == nil
	if first {
		s.faultErr = err
	}
	s.mu.Unlock()
	if first {
		s.log.Error("store structure damaged", "path", s.cfg.Path, "err", err)
	}
	return err
}

func (s *Store) isSuspect(bucket string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.suspect[bucket]
}

func bucketName(name string) []byte {
	return append([]byte(dataPrefix), name...)
}
