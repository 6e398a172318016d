package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// Memory keeps what the cloud said across restarts. The caller seals it: values
// hold user names, key material and hashes of tokens. Methods may be called
// concurrently. The package saves only when an answer changed or aged by much,
// so that Memory may live on flash.
type Memory interface {
	// Load returns the value of key, or nil and no error when there is none.
	Load(key string) ([]byte, error)
	// Save stores value under key before it returns.
	Save(key string, value []byte) error
	// Delete removes key; an absent key is no error.
	Delete(key string) error
}

// MapMemory is a Memory that forgets everything with the process. Its zero
// value is empty and ready.
type MapMemory struct {
	mu     sync.Mutex
	values map[string][]byte
	saves  int
}

// Load implements Memory.
func (m *MapMemory) Load(key string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.values[key]), nil
}

// Save implements Memory.
func (m *MapMemory) Save(key string, value []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.values == nil {
		m.values = make(map[string][]byte)
	}
	m.values[key] = bytes.Clone(value)
	m.saves++
	return nil
}

// Delete implements Memory.
func (m *MapMemory) Delete(key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.values, key)
	return nil
}

// Saves returns how often Save was called.
func (m *MapMemory) Saves() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.saves
}

// Keys returns the keys that have a value, sorted.
func (m *MapMemory) Keys() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.values))
}

// digest identifies a token or a question without holding it.
type digest [sha256.Size]byte

// table is a bounded map from digests to values in a Memory. Like a processor's
// cache it is made of sets: each set is one small record, so that a change
// writes a few hundred bytes, and neither an index nor a sweep is needed. A
// full set gives up its oldest entry.
type table[V any] struct {
	memory Memory
	prefix string
	ways   int           // entries per set
	maxAge time.Duration // older entries do not count; 0: age does not matter
	clock  *clock.Clock

	mu sync.Mutex // guards read-modify-write of a record
}

type tableEntry[V any] struct {
	Hash  []byte `json:"h"`
	At    int64  `json:"t"` // Unix seconds
	Value V      `json:"v"`
}

func (t *table[V]) key(set string) string { return t.prefix + "/" + set }

// load returns the entries of a set that still count. A record that cannot be
// decoded counts as empty: forgetting denies, it never allows.
func (t *table[V]) load(set string) ([]tableEntry[V], error) {
	data, err := t.memory.Load(t.key(set))
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", t.key(set), err)
	}
	if len(data) == 0 {
		return nil, nil
	}
	var entries []tableEntry[V]
	if err := json.Unmarshal(data, &entries); err != nil {
		return nil, nil //nolint:nilerr // see above
	}
	if t.maxAge == 0 {
		return entries, nil
	}
	return slices.DeleteFunc(entries, func(e tableEntry[V]) bool { return t.clock.Aged(time.Unix(e.At, 0), t.maxAge) }), nil
}

func (t *table[V]) get(set string, d digest) (value V, at time.Time, ok bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	entries, err := t.load(set)
	for _, e := range entries {
		if bytes.Equal(e.Hash, d[:]) {
			return e.Value, time.Unix(e.At, 0), true, nil
		}
	}
	return value, at, false, err
}

// put replaces the entry of d, or removes it when value is nil.
func (t *table[V]) put(set string, d digest, value *V) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	entries, err := t.load(set)
	if err != nil {
		return err
	}
	entries = slices.DeleteFunc(entries, func(e tableEntry[V]) bool { return bytes.Equal(e.Hash, d[:]) })
	if value != nil {
		entries = append(entries, tableEntry[V]{Hash: d[:], At: t.clock.Now().Unix(), Value: *value})
	}
	if extra := len(entries) - t.ways; extra > 0 {
		slices.SortStableFunc(entries, func(a, b tableEntry[V]) int { return int(a.At - b.At) })
		entries = entries[extra:]
	}
	if len(entries) == 0 {
		return t.memory.Delete(t.key(set))
	}
	data, err := json.Marshal(entries)
	if err != nil {
		return err
	}
	return t.memory.Save(t.key(set), data)
}
