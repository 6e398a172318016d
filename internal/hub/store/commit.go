package store

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// queueBytes bounds what Submit may queue before it blocks.
const queueBytes = 8 << 20

// A request is a batch on its way to the disk.
type request struct {
	ops    []op
	size   int64
	urgent bool // a caller waits for it
	at     time.Time
	done   func(error)
}

// Commit makes the batch durable and returns. Batches of concurrent callers
// share a transaction. The order of batches from one goroutine is kept,
// also between Commit and Submit, so that a Commit of an empty batch waits
// for all that this goroutine submitted before.
//
// An error means that the batch is not known to be durable: it may still
// turn out to be there if ctx ended or if the disk failed in the last step.
// The batch may be committed again.
func (s *Store) Commit(ctx context.Context, b *Batch) error {
	done := make(chan error, 1)
	if err := s.enqueue(ctx, b, true, func(err error) { done <- err }); err != nil {
		return err
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Submit queues the batch and returns, blocking while the queue is full.
// Unless Submit returns an error, done is called once, when the batch is
// durable or has failed as Commit fails. It runs on the committer's
// goroutine: it must be quick and must not call Commit, Submit or Close.
// A nil done is allowed. Under sustained load a submitted batch waits up to
// Config.MaxLag, so that many of them share a transaction; a Commit takes
// along everything queued before it.
func (s *Store) Submit(ctx context.Context, b *Batch, done func(error)) error {
	if done == nil {
		done = func(error) {}
	}
	return s.enqueue(ctx, b, false, done)
}

func (s *Store) enqueue(ctx context.Context, b *Batch, urgent bool, done func(error)) error {
	if b.err != nil {
		return b.err
	}
	b.seal(s.codec)
	r := &request{ops: slices.Clone(b.ops), urgent: urgent, done: done}
	for i := range r.ops {
		o := &r.ops[i]
		o.rec = Record{} // the sealed form is enough: free the plain one
		r.size += int64(len(o.bucket) + len(o.key) + len(o.value) + opCost)
	}
	// One batch may be larger than the queue. It then has it alone.
	r.size = min(r.size+opCost, queueBytes)
	if err := s.space.Acquire(ctx, r.size); err != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		s.space.Release(r.size)
		return ErrClosed
	}
	r.at = time.Now()
	s.queue = append(s.queue, r)
	s.queued += r.size
	if urgent {
		s.urgent++
	}
	s.mu.Unlock()
	s.poke()
	return nil
}

// poke tells the committer to look at the queue again.
func (s *Store) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run is the committer. It ends when the store is closing and the queue is
// empty.
func (s *Store) run() {
	defer close(s.stopped)
	// A page that cannot be read must not end the process.
	debug.SetPanicOnFault(true)

	timer := time.NewTimer(0)
	defer timer.Stop()
	var p pace
	for {
		s.quarantine()
		group, wait, end := s.next(&p)
		switch {
		case len(group) > 0:
			s.write(group)
		case end:
			return
		case wait > 0:
			timer.Reset(wait)
			select {
			case <-s.wake:
			case <-timer.C:
			}
		default:
			<-s.wake
		}
	}
}

// pace is what the committer remembers to choose the moment of the next
// transaction.
type pace struct {
	start time.Time // of the last transaction
	group int       // batches in it
}

// next takes the batches of the next transaction from the queue. If it is
// not yet time for one, it returns how long to wait; 0 means until poked.
func (s *Store) next(p *pace) (group []*request, wait time.Duration, end bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return nil, 0, s.closing
	}
	now := time.Now()
	if !s.closing && s.queued < int64(s.cfg.MaxBatchBytes) {
		if at := s.startAt(p); now.Before(at) {
			return nil, at.Sub(now), false
		}
	}
	n, bytes := 0, int64(0)
	for n < len(s.queue) && (n == 0 || bytes+s.queue[n].size <= int64(s.cfg.MaxBatchBytes)) {
		bytes += s.queue[n].size
		if s.queue[n].urgent {
			s.urgent--
		}
		n++
	}
	group = slices.Clone(s.queue[:n])
	s.queue = slices.Delete(s.queue, 0, n)
	s.queued -= bytes
	p.start, p.group = now, n
	return group, 0, false
}

// startAt returns when the next transaction should start if no more bytes
// arrive.
//
// With somebody waiting: at once, unless the last transaction was shared.
// Then others are likely to come, and waiting MaxDelay for them saves
// syncs. A lone writer never waits.
//
// With nobody waiting: MaxLag after the last start. The first batch after a
// pause is written at once, a stream of small ones is written in groups.
// Each transaction costs five pages or more whatever is in it.
func (s *Store) startAt(p *pace) time.Time {
	switch {
	case s.urgent == 0:
		return p.start.Add(s.cfg.MaxLag)
	case p.group > 1:
		return s.queue[0].at.Add(s.cfg.MaxDelay)
	default:
		return time.Time{}
	}
}

// write makes one transaction of the group and reports to its owners.
func (s *Store) write(group []*request) {
	err := s.update(func(t *txn) error {
		for _, r := range group {
			for i := range r.ops {
				if err := t.apply(&r.ops[i]); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("commit to %s: %w", s.cfg.Path, err)
	}
	for _, r := range group {
		s.space.Release(r.size)
		r.done(err)
	}
}

// A txn is a write transaction and the state of the buckets it touched.
type txn struct {
	*bolt.Tx
	buckets map[string]*openBucket
	names   uint64 // change of the digest over the names of all buckets
	dropped []string
}

type openBucket struct {
	*bolt.Bucket
	digest uint64
}

// update runs fn in a write transaction. A panic, which bbolt raises on a
// page that makes no sense, ends writing for good: what bbolt holds in
// memory cannot be trusted after it.
func (s *Store) update(fn func(*txn) error) (err error) {
	if err := s.fault(); err != nil {
		return err
	}
	var tx *bolt.Tx
	defer func() {
		if r := recover(); r != nil {
			err = s.setFault("write", r)
			s.stuck = tx == nil || !rolledBack(tx)
		}
		s.mu.Lock()
		s.commitErr = err
		s.mu.Unlock()
	}()
	if err := s.resync(); err != nil {
		return err
	}
	if tx, err = s.db.Begin(true); err != nil {
		return err
	}
	id := uint64(tx.ID())
	t := &txn{Tx: tx, buckets: make(map[string]*openBucket)}
	if err = fn(t); err == nil {
		err = t.finish()
	}
	if err != nil {
		return errors.Join(err, tx.Rollback())
	}
	if err = tx.Commit(); err != nil {
		s.unsynced = id
		// bbolt has ended the transaction, but not where it found no page
		// for its list of free ones.
		if end := tx.Rollback(); !errors.Is(end, berrors.ErrTxClosed) {
			err = errors.Join(err, end)
		}
		return err
	}
	stats := tx.Stats()
	s.commits.Add(1)
	s.written.Add(stats.GetPageAlloc() + int64(s.db.Info().PageSize))
	s.mu.Lock()
	for _, name := range t.dropped {
		delete(s.suspect, name)
	}
	s.mu.Unlock()
	return nil
}

// resync makes the newest commit durable if its last sync failed. The kernel
// then takes its meta page for written, though the disk may not have it. bbolt
// would build on that commit, overwrite the meta page before, which the disk
// has, and use the pages of that state anew: a power cut in that moment would
// cost everything. So the page is written and synced again before anything
// else is. Data pages of a commit that failed are never looked at.
func (s *Store) resync() error {
	if s.unsynced == 0 {
		return nil
	}
	m, err := newestMeta(s.file)
	if err != nil {
		return err
	}
	if m.txid == s.unsynced || s.unsynced == anyCommit {
		if err := rewrite(s.file, m.at, pageHeader+metaSize); err != nil {
			return fmt.Errorf("sync the commit before: %w", err)
		}
	}
	s.unsynced = 0
	return nil
}

// rolledBack ends a transaction that panicked and reports whether bbolt's
// locks are free again.
func rolledBack(tx *bolt.Tx) (ok bool) {
	defer func() { ok = recover() == nil }()
	_ = tx.Rollback()
	return true
}

func (t *txn) apply(o *op) error {
	if o.kind == opDrop {
		return t.drop(o.bucket)
	}
	b, err := t.open(o.bucket, o.kind == opPut)
	if b == nil || err != nil {
		return err
	}
	key := []byte(o.key)
	if old := b.Get(key); old != nil {
		b.digest ^= storedCheck(old)
	} else if o.kind == opDelete {
		return nil
	}
	if o.kind == opDelete {
		return b.Delete(key)
	}
	b.digest ^= storedCheck(o.value)
	return b.Put(key, o.value)
}

// open returns a logical bucket, or nil if there is none and create is
// false.
func (t *txn) open(name string, create bool) (*openBucket, error) {
	if b := t.buckets[name]; b != nil {
		return b, nil
	}
	full := bucketName(name)
	b := t.Bucket(full)
	if b == nil && !create {
		return nil, nil
	}
	if b == nil {
		var err error
		if b, err = t.CreateBucket(full); err != nil {
			return nil, fmt.Errorf("create bucket %q: %w", name, err)
		}
		t.names ^= xxhash.Sum64(full)
	}
	b.FillPercent = fillPercent
	o := &openBucket{Bucket: b, digest: b.Sequence()}
	t.buckets[name] = o
	return o, nil
}

func (t *txn) drop(name string) error {
	full := bucketName(name)
	if t.Bucket(full) == nil {
		return nil
	}
	delete(t.buckets, name)
	t.names ^= xxhash.Sum64(full)
	t.dropped = append(t.dropped, name)
	return t.DeleteBucket(full)
}

// finish writes the digests.
func (t *txn) finish() error {
	for name, b := range t.buckets {
		if b.digest == b.Sequence() {
			continue
		}
		if err := b.SetSequence(b.digest); err != nil {
			return fmt.Errorf("write digest of %q: %w", name, err)
		}
	}
	if t.names == 0 {
		return nil
	}
	m := t.Bucket([]byte(metaBucket))
	if err := m.SetSequence(m.Sequence() ^ t.names); err != nil {
		return fmt.Errorf("write digest of names: %w", err)
	}
	return nil
}
