package store_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

// bubble runs test with an open store, in fake time.
func bubble(t *testing.T, cfg store.Config, test func(t *testing.T, s *store.Store)) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store")
	synctest.Test(t, func(t *testing.T) {
		cfg := cfg
		cfg.Path = path
		s := openTemp(t, cfg)
		test(t, s)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

func one(i int) *store.Batch {
	b := store.NewBatch()
	b.Put("b", fmt.Sprint(i), store.Record{Version: uint64(i)})
	return b
}

func TestLoneCommitDoesNotWait(t *testing.T) {
	bubble(t, store.Config{MaxDelay: time.Hour}, func(t *testing.T, s *store.Store) {
		start := time.Now()
		for i := range 10 {
			if err := s.Commit(t.Context(), one(i)); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("waited %v", d)
		}
	})
}

func TestFirstSubmitDoesNotWaitAndLaterOnesShare(t *testing.T) {
	bubble(t, store.Config{}, func(t *testing.T, s *store.Store) {
		before := s.Stats().Commits
		start := time.Now()
		var worst time.Duration
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for i := range 500 {
			at := time.Now()
			err := s.Submit(t.Context(), one(i), func(err error) {
				if err != nil {
					t.Error(err)
				}
				lag := time.Since(at)
				if i == 0 && lag != 0 {
					t.Errorf("first batch waited %v", lag)
				}
				worst = max(worst, lag)
			})
			if err != nil {
				t.Fatal(err)
			}
			<-tick.C
		}
		if err := s.Commit(t.Context(), store.NewBatch()); err != nil {
			t.Fatal(err)
		}
		commits := s.Stats().Commits - before
		if worst > 2*time.Second || commits > 7 {
			t.Errorf("10 s of batches: %d commits, up to %v late", commits, worst)
		}
		// The last Commit may wait for its own MaxDelay.
		if d := time.Since(start); d < 10*time.Second || d > 10*time.Second+100*time.Millisecond {
			t.Errorf("took %v", d)
		}
	})
}

func TestConcurrentCommitsShare(t *testing.T) {
	bubble(t, store.Config{MaxDelay: 5 * time.Millisecond}, func(t *testing.T, s *store.Store) {
		const writers, each = 20, 10
		before := s.Stats().Commits
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					if err := s.Commit(t.Context(), one(w*each+i)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if commits := s.Stats().Commits - before; commits > writers*each/4 {
			t.Errorf("%d commits for %d batches", commits, writers*each)
		}
	})
}

func TestFullBatchDoesNotWait(t *testing.T) {
	bubble(t, store.Config{MaxBatchBytes: 100_000}, func(t *testing.T, s *store.Store) {
		start := time.Now()
		done := make(chan error, 2)
		for i := range 2 { // the second would wait its turn if it were small
			b := one(i)
			b.Put("b", "large", store.Record{Data: noise(150_000)})
			if err := s.Submit(t.Context(), b, func(err error) { done <- err }); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("waited %v", d)
		}
	})
}

func TestSubmitBlocksWhenFullAndHonoursContext(t *testing.T) {
	bubble(t, store.Config{}, func(t *testing.T, s *store.Store) {
		resume := make(chan struct{}) // holds the committer up, as a slow disk
		if err := s.Submit(t.Context(), one(0), func(error) { <-resume }); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		cause := errors.New("out of patience")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, cause)
		defer cancel()
		data := noise(1 << 20)
		n := 0
		for ; n < 100; n++ {
			b := one(n)
			b.Put("b", "large", store.Record{Data: data})
			if err := s.Submit(ctx, b, nil); err != nil {
				if !errors.Is(err, cause) {
					t.Errorf("full queue: %v", err)
				}
				break
			}
		}
		if n != 7 || s.Stats().QueuedBytes > 8<<20 {
			t.Errorf("%d MB queued, %d bytes", n, s.Stats().QueuedBytes)
		}
		close(resume)
		if err := s.Submit(t.Context(), one(n), nil); err != nil {
			t.Error(err)
		}
	})
}

func TestFailedBatchMayBeCommittedAgain(t *testing.T) {
	bubble(t, store.Config{}, func(t *testing.T, s *store.Store) {
		b := one(1)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Commit(ctx, b); !errors.Is(err, context.Canceled) {
			t.Errorf("canceled: %v", err)
		}
		b.Put("b", "2", store.Record{Version: 2})
		if err := s.Commit(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		sn, err := s.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		defer sn.Close()
		for _, key := range []string{"1", "2"} {
			if _, err := sn.Get("b", key); err != nil {
				t.Error(err)
			}
		}
	})
}
