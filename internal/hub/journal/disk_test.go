package journal

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

// A store in memory takes everything, and keeps it through nothing.
func TestNothingIsAcknowledgedWithoutADisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{Path: filepath.Join(file, "store"), Key: testKey, Fallback: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	j, err := Open(Config{Store: s, Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	event := []byte(`{"metadata":{"name":"e"}}`)
	if _, err := j.AddEvent(t.Context(), "/api/v1/namespaces/a/events", "a", event); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("event: %v", err)
	}
	if kept := j.Stats(); kept.Status+kept.Events != 0 {
		t.Errorf("kept: %+v", kept)
	}
}
