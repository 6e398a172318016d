package hub

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

func TestMemoryKeepsWithinItsLimit(t *testing.T) {
	s, err := store.Open(t.Context(), store.Config{Path: filepath.Join(t.TempDir(), "hub.db"), Key: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	const limit = 10
	m := memory{store: s, bucket: "kept", limit: limit}
	for i := range 5 * limit {
		key := fmt.Sprintf("key-%02d", i)
		if err := m.Save(key, []byte(key)); err != nil {
			t.Fatal(err)
		}
		if got, err := m.Load(key); err != nil || string(got) != key {
			t.Fatalf("load %s right after its save: %q, %v", key, got, err)
		}
	}
	for age, want := range map[time.Duration]string{time.Hour: "key-49", time.Nanosecond: ""} {
		m := memory{store: s, bucket: "kept", maxAge: age}
		if got, err := m.Load("key-49"); err != nil || string(got) != want {
			t.Errorf("load what may be %s old: %q, %v", age, got, err)
		}
	}
	snap, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	count := 0
	err = snap.Scan("kept", "", func(string, store.Header) error { count++; return nil })
	if err != nil || count == 0 || count > limit {
		t.Errorf("%d records are kept, %v; want 1 to %d", count, err, limit)
	}
}
