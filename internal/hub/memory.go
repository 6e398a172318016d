package hub

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/clock"
	"github.com/yurt-edge/yurt/internal/hub/store"
)

// commitBudget bounds the wait for the disk on behalf of one request.
const commitBudget = 5 * time.Second

// memory keeps small records in the store, sealed as everything there. It is
// the identity package's Memory.
type memory struct {
	store  *store.Store
	clock  *clock.Clock // the machine's if nil
	bucket string
	// limit bounds the records; the oldest go first. Zero is for a user that
	// bounds its keys itself.
	limit int
	// maxAge is how long a record counts after it was saved; 0: for ever.
	maxAge time.Duration
}

func (m memory) Load(key string) ([]byte, error) {
	data, _, err := m.LoadAt(key)
	return data, err
}

// LoadAt is Load that tells when the record was saved, to the second.
func (m memory) LoadAt(key string) ([]byte, time.Time, error) {
	snap, err := m.store.Snapshot()
	if err != nil {
		return nil, time.Time{}, err
	}
	defer snap.Close()
	record, err := snap.Get(m.bucket, key)
	switch {
	case errors.Is(err, store.ErrNotFound), errors.Is(err, store.ErrDamaged):
		// What cannot be read was never said: that denies, it allows
		// nothing.
		return nil, time.Time{}, nil
	case err != nil:
		return nil, time.Time{}, err
	}
	at := time.Unix(int64(record.Version), 0) //nolint:gosec // as Save made it
	if m.maxAge > 0 && m.clock.Aged(at, m.maxAge) {
		return nil, time.Time{}, nil
	}
	return record.Data, at, nil
}

func (m memory) Save(key string, value []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), commitBudget)
	defer cancel()
	batch := store.NewBatch()
	if m.limit > 0 {
		if err := m.makeRoom(batch); err != nil {
			return err
		}
	}
	batch.Put(m.bucket, key, store.Record{Version: uint64(m.clock.Now().Unix()), Data: value})
	return m.store.Commit(ctx, batch)
}

// makeRoom drops the older half of the records when there are limit of them,
// so that it has work to do once in many saves.
func (m memory) makeRoom(batch *store.Batch) error {
	snap, err := m.store.Snapshot()
	if err != nil {
		return err
	}
	defer snap.Close()
	type record struct {
		key string
		at  uint64
	}
	var all []record
	err = snap.Scan(m.bucket, "", func(key string, h store.Header) error {
		all = append(all, record{key, h.Version})
		return nil
	})
	if err != nil && !errors.Is(err, store.ErrDamaged) {
		return err
	}
	if len(all) < m.limit {
		return nil
	}
	slices.SortFunc(all, func(a, b record) int { return cmp.Compare(a.at, b.at) })
	for _, r := range all[:len(all)-m.limit/2] {
		batch.Delete(m.bucket, r.key)
	}
	return nil
}

func (m memory) Delete(key string) error {
	ctx, cancel := context.WithTimeout(context.Background(), commitBudget)
	defer cancel()
	batch := store.NewBatch()
	batch.Delete(m.bucket, key)
	return m.store.Commit(ctx, batch)
}
