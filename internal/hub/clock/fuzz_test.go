package clock

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// FuzzFloor begins with whatever stands in the file of the time floor.
func FuzzFloor(f *testing.F) {
	f.Add([]byte(`{"floor":"2026-11-26T12:00:00Z"}`))
	f.Add([]byte(`{"floor":"9999-12-31T23:59:59Z"}`))
	f.Add([]byte(`{"floor":"0000-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"floor":"2026-11-26T12:00:00.5+14:00"`))
	path := filepath.Join(f.TempDir(), "clock.json")
	f.Fuzz(func(t *testing.T, data []byte) {
		must(t, os.WriteFile(path, data, 0o600))
		m := &board{wall: today, up: time.Hour}
		c := Open(Config{Path: path, Source: m.read, Built: built, Log: slog.New(slog.DiscardHandler)})
		if now := c.Now(); now.Before(today) || now.Before(c.Floor()) || c.Floor().Before(built) {
			t.Errorf("it is %s, the floor is %s", now, c.Floor())
		}
		// Once the cloud is heard, its word counts.
		c.Hear(today.Add(time.Minute), time.Second)
		if now := c.Now(); now.Sub(today).Abs() > 2*time.Minute {
			t.Errorf("it is %s, the cloud says %s", now, today)
		}
	})
}
