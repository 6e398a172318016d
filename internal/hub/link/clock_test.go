package link

import (
	"log/slog"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// TestWrongClockIsPutRight connects by a clock that makes every certificate of
// the cluster expired or not yet valid.
func TestWrongClockIsPutRight(t *testing.T) {
	t.Parallel()
	const years = 2 * 365 * 24 * time.Hour
	for name, ahead := range map[string]time.Duration{"behind": -years, "ahead": years} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			c := clock.Open(clock.Config{
				Path: filepath.Join(t.TempDir(), "clock"), Built: begun.Add(-30 * time.Minute), Log: slog.New(slog.DiscardHandler),
				Source: func() (time.Time, time.Duration) { return time.Now().Add(ahead), time.Since(begun) },
			})
			ca := newAuthority(t)
			u := newUpstream(t, ca, hello)
			r := newRig(t, ca, func(cfg *Config) { cfg.Clock = c }, u.addr())
			r.waitUp(t)
			if d := c.Since(time.Now()); d < -5*time.Second || d > 5*time.Second {
				t.Errorf("%s from the truth", d)
			}
			if got, known := c.Skew(); !known || (got-ahead).Abs() > 5*time.Second {
				t.Errorf("skew %s, %t", got, known)
			}
			if body, err := nodeGet(t, r, "/api"); err != nil || body != "hello" {
				t.Errorf("got %q, %v", body, err)
			}
		})
	}
}

// TestAnswersTellTheTime lets the cloud's time change while requests flow.
func TestAnswersTellTheTime(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	later := time.Now().Add(time.Hour).Truncate(time.Second)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", later.UTC().Format(http.TimeFormat))
		hello(w, r)
	})
	c := clock.Open(clock.Config{Path: filepath.Join(t.TempDir(), "clock"), Log: slog.New(slog.DiscardHandler)})
	r := newRig(t, ca, func(cfg *Config) { cfg.Clock = c }, u.addr())
	r.waitUp(t)
	r.told.Store(int64(-2 * tellEvery)) // as after a while
	if _, err := nodeGet(t, r, "/api"); err != nil {
		t.Fatal(err)
	}
	if d := c.Since(later); d < -5*time.Second || d > 10*time.Second {
		t.Errorf("%s from the cloud's time", d)
	}
}
