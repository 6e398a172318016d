package journal

import (
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// TestStatusIsBounded fills the journal: what it holds stays and may still
// change, what it has no place for is refused and not acknowledged.
func TestStatusIsBounded(t *testing.T) {
	for name, limits := range map[string]Config{"count": {MaxStatus: 3}, "bytes": {MaxStatusBytes: 1200}} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, limits, func(t *testing.T, b *bed) {
				const pods = 20
				for i := range pods {
					b.cloud.add(fmt.Sprint("p", i), fmt.Sprint("u", i))
				}
				synctest.Wait()
				b.cloud.cut()
				kept := 0
				for i := range pods {
					err := b.patch(fmt.Sprint("p", i), `{"phase":"Running","message":"`+strings.Repeat("x", 150)+`"}`)
					switch {
					case err == nil && kept < i:
						t.Fatalf("status %d found a place after %d", i, kept)
					case err == nil:
						kept++
					case !apierrors.IsServiceUnavailable(err):
						t.Fatal(err)
					}
				}
				if kept < 2 || kept > 5 {
					t.Errorf("%d were kept", kept)
				}
				b.mustPatch("p0", `{"phase":"Failed"}`)
				if err := b.patch("p0", `{"message":"`+strings.Repeat("y", 2000)+`"}`); (err == nil) != (limits.MaxStatusBytes == 0) {
					t.Errorf("one that grows: %v", err)
				}
				b.depth(kept, 0)
				b.crash()
				b.depth(kept, 0)
				b.cloud.heal()
				pass(time.Minute)
				b.depth(0, 0)
				if b.cloud.pod("p0").Status.Phase != corev1.PodFailed {
					t.Error("a kept status was lost")
				}
				if s := b.journal.Stats(); s.Delivered != kept || s.Dropped != 0 {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// TestOldWritesAreDropped bounds the age of what is delivered. While the cloud
// is away nothing is dropped for its age, since a clock may be wrong.
func TestOldWritesAreDropped(t *testing.T) {
	for _, c := range []struct {
		away    time.Duration
		dropped string
	}{{50 * time.Minute, ""}, {70 * time.Minute, "event"}, {130 * time.Minute, "event status"}} {
		t.Run(c.away.String(), func(t *testing.T) {
			inBubble(t, Config{StatusAge: 2 * time.Hour, EventAge: time.Hour}, func(t *testing.T, b *bed) {
				b.cloud.add("a", "u1")
				synctest.Wait()
				b.cloud.cut()
				b.mustPatch("a", `{"phase":"Running"}`)
				b.event("e")
				pass(c.away)
				b.mustPatch("a", `{"reason":"Again"}`) // as old as the first that was not sent
				b.depth(1, 1)
				if s := b.journal.Stats(); time.Since(s.Oldest) != c.away || s.StatusBytes == 0 || s.EventBytes == 0 {
					t.Errorf("%+v", s)
				}
				b.cloud.heal()
				pass(time.Minute)
				b.depth(0, 0)
				for _, kind := range []string{"event", "status"} {
					want := 0.
					if strings.Contains(c.dropped, kind) {
						want = 1
					}
					if got := testutil.ToFloat64(b.journal.metrics.dropped.WithLabelValues(kind, "age")); got != want {
						t.Errorf("%s: %v dropped for their age, want %v", kind, got, want)
					}
				}
				if taken := b.cloud.pod("a").Status.Phase == corev1.PodRunning; taken == strings.Contains(c.dropped, "status") {
					t.Errorf("status taken: %v", taken)
				}
			})
		})
	}
}

// TestWritesAreDatedByTheCloudsTime makes writes on a machine whose clock is
// behind, and sets that right: they are as old as they are.
func TestWritesAreDatedByTheCloudsTime(t *testing.T) {
	var off time.Duration
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		by := clock.Open(clock.Config{
			Path: filepath.Join(t.TempDir(), "clock"), Log: slog.New(slog.DiscardHandler), Built: begun.Add(-time.Hour),
			Source: func() (time.Time, time.Duration) { return time.Now().Add(off), time.Since(begun) },
		})
		off = -2 * 365 * 24 * time.Hour
		by.Hear(begun, 0)
		j := &Journal{cfg: Config{Clock: by}}
		made := by.Now()
		off = 2 * 365 * 24 * time.Hour
		pass(time.Hour)
		if age := j.age(made); age < 59*time.Minute || age > 61*time.Minute {
			t.Errorf("a write made an hour ago is %s old", age)
		}
		if j.older(made, 2*time.Hour) || !j.older(made, 30*time.Minute) {
			t.Error("its age is not the one that counts")
		}
	})
}

// TestOnlyTheAPIServersRefusalCounts puts something that is no API server onto
// the way: what it says, yes or no, is about nothing of the journal's.
func TestOnlyTheAPIServersRefusalCounts(t *testing.T) {
	for _, code := range []int{http.StatusOK, http.StatusCreated, http.StatusForbidden, http.StatusNotFound, http.StatusUnprocessableEntity} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			inBubble(t, Config{}, func(t *testing.T, b *bed) {
				b.cloud.add("a", "u1")
				synctest.Wait()
				b.cloud.cut()
				b.mustPatch("a", `{"phase":"Running"}`)
				b.event("e")
				b.cloud.mu.Lock()
				b.cloud.portal = code
				b.cloud.mu.Unlock()
				b.cloud.heal()
				pass(10 * time.Minute)
				b.depth(1, 1)
				b.cloud.mu.Lock()
				b.cloud.portal = 0
				b.cloud.mu.Unlock()
				pass(10 * time.Second)
				b.depth(0, 0)
				if b.cloud.pod("a").Status.Phase != corev1.PodRunning {
					t.Error("the status was lost")
				}
			})
		})
	}
}
