package store

import (
	"bytes"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// Snapshot is the state of the store at one commit. It is for one goroutine
// and must be closed soon: while it is open, no page that was replaced
// since can be used again, so the file grows with every commit, and
// Store.Close waits for it. Its owner may commit and open other snapshots.
type Snapshot struct {
	s  *Store
	tx *bolt.Tx

	// The bucket of the last Get, since most callers read many keys of one.
	bucket string
	cursor *bolt.Cursor
	key    []byte
}

// Snapshot returns the state at the last commit.
func (s *Store) Snapshot() (sn *Snapshot, err error) {
	s.mu.Lock()
	closing := s.closing
	s.mu.Unlock()
	if closing {
		return nil, ErrClosed
	}
	err = s.guard("read", func() error {
		tx, err := s.db.Begin(false)
		if errors.Is(err, berrors.ErrDatabaseNotOpen) {
			return ErrClosed
		}
		sn = &Snapshot{s: s, tx: tx}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open snapshot: %w", err)
	}
	return sn, nil
}

// Close ends the snapshot. It may be called twice.
func (sn *Snapshot) Close() {
	if sn.tx != nil {
		_ = sn.tx.Rollback() // a read transaction has nothing to fail
		sn.tx, sn.cursor = nil, nil
	}
}

// Get returns the record at key, ErrNotFound, or ErrDamaged if it cannot be
// read back as it was written. A damaged value is set aside; later
// snapshots do not hold it. In a bucket that has lost keys to damage a
// missing key is ErrDamaged too, until the bucket is dropped.
func (sn *Snapshot) Get(bucket, key string) (Record, error) {
	data, h, err := sn.AppendData(nil, bucket, key)
	if err != nil {
		return Record{}, err
	}
	return Record{Version: h.Version, Encoding: h.Encoding, Data: data}, nil
}

// AppendData is Get without a new buffer: it appends the data to dst and
// returns the extended slice. On error it returns dst as it was.
func (sn *Snapshot) AppendData(dst []byte, bucket, key string) ([]byte, Header, error) {
	if sn.tx == nil {
		return dst, Header{}, ErrClosed
	}
	out, h, err := sn.read(dst, bucket, key)
	switch {
	case err == nil:
		return out, h, nil
	case errors.Is(err, ErrNotFound) && !sn.s.isSuspect(bucket):
		return dst, Header{}, fmt.Errorf("%q in %q: %w", key, bucket, ErrNotFound)
	case errors.Is(err, ErrNotFound):
		err = errLost
	case errors.Is(err, errHeader), errors.Is(err, errPayload):
		sn.s.reportDamage(bucket, key, errors.Is(err, errHeader))
	}
	return dst, Header{}, fmt.Errorf("%q in %q: %w: %w", key, bucket, ErrDamaged, err)
}

func (sn *Snapshot) read(dst []byte, bucket, key string) (out []byte, h Header, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			out, h, err = dst, Header{}, sn.s.setFault("read", r)
		}
	}()
	if sn.cursor == nil || sn.bucket != bucket {
		b := sn.tx.Bucket(bucketName(bucket))
		if b == nil {
			return dst, Header{}, ErrNotFound
		}
		sn.bucket, sn.cursor = bucket, b.Cursor()
	}
	sn.key = append(sn.key[:0], key...)
	k, v := sn.cursor.Seek(sn.key)
	if !bytes.Equal(k, sn.key) || k == nil {
		return dst, Header{}, ErrNotFound
	}
	return sn.s.codec.open(dst, bucket, key, v)
}

// Scan calls fn for every key of the bucket from the key from on, in
// ascending byte order, until fn returns an error, which Scan returns. The
// payload is not touched. fn may use the snapshot.
//
// An entry with a damaged header is left out. Scan then goes on and returns
// ErrDamaged in the end, as it does when the bucket is known to have lost
// keys or writes: what fn has seen was written so, but may lack keys or hold
// older versions of some. Resuming a watch from such a bucket would be
// wrong. Replacing it by a Drop and Puts in one batch makes it whole again.
func (sn *Snapshot) Scan(bucket, from string, fn func(key string, h Header) error) error {
	if sn.tx == nil {
		return ErrClosed
	}
	var c *bolt.Cursor
	err := sn.s.guard("scan", func() error {
		if b := sn.tx.Bucket(bucketName(bucket)); b != nil {
			c = b.Cursor()
		}
		return nil
	})
	damaged := sn.s.isSuspect(bucket)
	for first := true; c != nil && err == nil; first = false {
		var key string
		var h Header
		var end bool
		if key, h, end, err = sn.step(c, first, bucket, from); end {
			break
		}
		if errors.Is(err, errHeader) {
			sn.s.reportDamage(bucket, key, true)
			damaged, err = true, nil
			continue
		}
		if err == nil {
			if err := fn(key, h); err != nil {
				return err
			}
		}
	}
	if err == nil && damaged {
		err = errLost
	}
	if err != nil {
		return fmt.Errorf("scan %q: %w: %w", bucket, ErrDamaged, err)
	}
	return nil
}

// step moves the cursor of a scan and reads what it points at.
func (sn *Snapshot) step(c *bolt.Cursor, first bool, bucket, from string) (key string, h Header, end bool, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = sn.s.setFault("scan", r)
		}
	}()
	var k, v []byte
	if first {
		k, v = c.Seek([]byte(from))
	} else {
		k, v = c.Next()
	}
	if k == nil {
		return "", Header{}, true, nil
	}
	key = string(k)
	h, err = parseHeader(bucket, key, v)
	return key, h, false, err
}

// Buckets returns the names of all buckets in ascending order.
func (s *Store) Buckets() ([]string, error) {
	sn, err := s.Snapshot()
	if err != nil {
		return nil, err
	}
	defer sn.Close()
	var names []string
	err = s.guard("list buckets", func() error {
		c := sn.tx.Cursor()
		for k, _ := c.Seek([]byte(dataPrefix)); bytes.HasPrefix(k, []byte(dataPrefix)); k, _ = c.Next() {
			names = append(names, string(k[len(dataPrefix):]))
		}
		return nil
	})
	return slices.Clip(names), err
}

// guard runs fn and turns a panic or a fault of the mapped file into an
// error.
func (s *Store) guard(what string, fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = s.setFault(what, r)
		}
	}()
	return fn()
}
