package hub

import (
	"context"
	"errors"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

// commitBudget bounds the wait for the disk on behalf of one request.
const commitBudget = 5 * time.Second

// memory keeps small records in the store, sealed as everything there. It is
// the identity package's Memory.
type memory struct {
	store  *store.Store
	bucket string
}

func (m memory) Load(key string) ([]byte, error) {
	snap, err := m.store.Snapshot()
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	record, err := snap.Get(m.bucket, key)
	switch {
	case errors.Is(err, store.ErrNotFound), errors.Is(err, store.ErrDamaged):
		// What cannot be read was never said: that denies, it allows
		// nothing.
		return nil, nil
	case err != nil:
		return nil, err
	}
	return record.Data, nil
}

func (m memory) Save(key string, value []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), commitBudget)
	defer cancel()
	batch := store.NewBatch()
	batch.Put(m.bucket, key, store.Record{Data: value})
	return m.store.Commit(ctx, batch)
}

func (m memory) Delete(key string) error {
	ctx, cancel := context.WithTimeout(context.Background(), commitBudget)
	defer cancel()
	batch := store.NewBatch()
	batch.Delete(m.bucket, key)
	return m.store.Commit(ctx, batch)
}
