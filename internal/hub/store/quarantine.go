package store

import (
	"encoding/binary"
	"slices"

	bolt "go.etcd.io/bbolt"
)

const (
	// quarantineMax is how many damaged values are kept for a person to
	// look at, newest first to stay.
	quarantineMax = 32
	// quarantineData is how much of each is kept.
	quarantineData = 64 << 10
	// damageMax bounds the reports that wait for the committer. What is
	// beyond it is reported again by the next reader.
	damageMax = 1024
)

type location struct{ bucket, key string }

// reportDamage asks the committer to set a value aside. If its header is
// damaged, the key may be another one's whose key is lost.
func (s *Store) reportDamage(bucket, key string, header bool) {
	s.mu.Lock()
	if header {
		s.suspect[bucket] = true
	}
	if len(s.damage) < damageMax && key != "" {
		s.damage[location{bucket, key}] = true
	}
	s.mu.Unlock()
	s.poke()
}

// quarantine moves reported values out of the way and tells OnDamage.
func (s *Store) quarantine() {
	s.mu.Lock()
	if len(s.damage) == 0 {
		s.mu.Unlock()
		return
	}
	var reported []location
	for l := range s.damage {
		reported = append(reported, l)
	}
	s.mu.Unlock()

	var moved []location
	err := s.update(func(t *txn) (err error) {
		moved, err = s.moveDamaged(t, reported)
		return err
	})
	s.mu.Lock()
	for _, l := range reported {
		delete(s.damage, l)
	}
	s.mu.Unlock()
	if err != nil {
		s.log.Warn("damaged values not set aside", "count", len(reported), "err", err)
		return
	}
	for _, l := range moved {
		s.damaged.Add(1)
		s.log.Warn("value damaged", "bucket", l.bucket, "key", l.key)
		if s.cfg.OnDamage != nil {
			s.cfg.OnDamage(l.bucket, l.key)
		}
	}
}

func (s *Store) moveDamaged(t *txn, reported []location) (moved []location, err error) {
	q, err := t.CreateBucketIfNotExists([]byte(quarantineBucket))
	if err != nil {
		return nil, err
	}
	for _, l := range reported {
		b, err := t.open(l.bucket, false)
		if err != nil {
			return nil, err
		}
		if b == nil {
			continue
		}
		v := b.Get([]byte(l.key))
		if v == nil {
			continue
		}
		if _, _, err := s.codec.open(nil, l.bucket, l.key, v); err == nil {
			continue // replaced since
		}
		if err := quarantineValue(q, l, v); err != nil {
			return nil, err
		}
		// With a sound header this very key is accounted for. Otherwise
		// the digest stays wrong on purpose: a key is lost, and Open must
		// notice until the bucket is replaced.
		if _, err := parseHeader(l.bucket, l.key, v); err == nil {
			b.digest ^= storedCheck(v)
		}
		if err := b.Delete([]byte(l.key)); err != nil {
			return nil, err
		}
		moved = append(moved, l)
	}
	return moved, trim(q)
}

// quarantineValue stores where v was and how it begins.
func quarantineValue(q *bolt.Bucket, l location, v []byte) error {
	seq, err := q.NextSequence()
	if err != nil {
		return err
	}
	var rec []byte
	for _, name := range []string{l.bucket, l.key} {
		rec = binary.AppendUvarint(rec, uint64(len(name)))
		rec = append(rec, name...)
	}
	rec = append(rec, v[:min(len(v), quarantineData)]...)
	return q.Put(binary.BigEndian.AppendUint64(nil, seq), rec)
}

func trim(q *bolt.Bucket) error {
	var keys [][]byte
	c := q.Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		keys = append(keys, slices.Clone(k))
	}
	for len(keys) > quarantineMax {
		if err := q.Delete(keys[0]); err != nil {
			return err
		}
		keys = keys[1:]
	}
	return nil
}
