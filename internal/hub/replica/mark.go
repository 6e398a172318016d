package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	lensesBucket = "lenses"
	markKey      = "mark"

	// toldAhead is how far above what readers were told the mark is written,
	// so that it need not be again with each version.
	toldAhead = 1 << 16
	// toldLast is for what they are told while the hub ends.
	toldLast = 1 << 6
	// maxLensed bounds the readers that a mark names.
	maxLensed = 256
	// markBudget is how long the first reader of a lens waits for the mark.
	markBudget = time.Second
)

// marks is what the next life of the hub has to know of this one's lenses.
type marks struct {
	store *store.Store
	log   *slog.Logger
	told  atomic.Uint64 // the highest version that readers may have been told

	writing sync.Mutex // held while it is written; taken before mu
	mu      sync.Mutex // guards the following
	readers []lensed
	stored  mark
}

// mark is how they are stored.
type mark struct {
	// Told is above all versions that readers were told.
	Told    uint64   `json:"told"`
	Readers []lensed `json:"readers"`
}

// lensed are readers who were shown a resource by a lens.
type lensed struct {
	Resource schema.GroupResource `json:"resource"`
	Name     string               `json:"name"`
}

// readMarks reads what an earlier life wrote. A mark that is damaged tells
// nothing.
func readMarks(s *store.Store, log *slog.Logger) (*marks, error) {
	m := &marks{store: s, log: log}
	snap, err := s.Snapshot()
	if err != nil {
		return nil, fmt.Errorf("read what readers of filters were told: %w", err)
	}
	defer snap.Close()
	record, err := snap.Get(lensesBucket, markKey)
	if err == nil {
		err = json.Unmarshal(record.Data, &m.stored)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		log.Warn("what readers of filters were told is lost", "err", err)
	}
	m.told.Store(m.stored.Told)
	m.readers = slices.Clone(m.stored.Readers)
	return m, nil
}

// tell takes note of a version that readers are told.
func (m *marks) tell(version uint64) {
	for {
		told := m.told.Load()
		if version <= told || m.told.CompareAndSwap(told, version) {
			return
		}
	}
}

// add takes note of readers. They are told nothing before that is durable, but
// need not wait for a disk that takes nothing: what changes while the hub is
// down may go by them then.
func (m *marks) add(resource schema.GroupResource, name string) {
	m.mu.Lock()
	who := lensed{resource, name}
	if !slices.Contains(m.readers, who) && len(m.readers) < maxLensed {
		m.readers = append(m.readers, who)
	}
	m.mu.Unlock()
	if !m.due() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), markBudget)
	defer cancel()
	m.write(ctx, toldAhead)
}

// has reports whether there were such readers, in this life or another.
func (m *marks) has(resource schema.GroupResource, name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.readers, lensed{resource, name})
}

// due reports whether readers are soon told more than is written.
func (m *marks) due() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.readers) > len(m.stored.Readers) || len(m.readers) > 0 && m.told.Load()+toldAhead/2 > m.stored.Told
}

// write makes the mark durable. Readers may be told so much more then.
func (m *marks) write(ctx context.Context, more uint64) {
	m.writing.Lock()
	defer m.writing.Unlock()
	m.mu.Lock()
	next := mark{m.told.Load() + more, slices.Clone(m.readers)}
	m.mu.Unlock()
	if len(next.Readers) == 0 {
		return
	}
	text, err := json.Marshal(next)
	if err == nil {
		batch := store.NewBatch()
		batch.Put(lensesBucket, markKey, store.Record{Version: next.Told, Encoding: uint8(wire.JSON), Data: text})
		err = m.store.Commit(ctx, batch)
	}
	if err != nil {
		m.log.Warn("what readers of filters are told is not on disk", "err", err)
		return
	}
	m.mu.Lock()
	m.stored = next
	m.mu.Unlock()
}

// toldLocked is the highest version that readers of the set were told, or may
// have been.
func (s *set) toldLocked() uint64 { return max(s.marks.told.Load(), s.version) }

// moveLocked makes version the lens's own.
func (l *lens) moveLocked(s *set, version uint64) {
	l.version = version
	s.marks.tell(version)
}
