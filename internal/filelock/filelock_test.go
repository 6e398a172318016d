package filelock

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := Lock(t.Context(), path, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(t.Context(), path, 3*retry); !errors.Is(err, ErrHeld) {
		t.Errorf("a lock that is held: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Lock(ctx, path, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that is broken off: %v", err)
	}
	next := make(chan error, 1)
	go func() {
		f, err := Lock(t.Context(), path, time.Minute)
		if err == nil {
			err = f.Close()
		}
		next <- err
	}()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-next; err != nil {
		t.Errorf("after the holder let go: %v", err)
	}
}

// TestLockIsOfWhatThePathNames has the holder put another file in its place:
// who waited gets that one.
func TestLockIsOfWhatThePathNames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := Lock(t.Context(), path, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Rename(path, path+".aside"); err != nil {
		t.Fatal(err)
	}
	got, err := Lock(t.Context(), path, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !names(path, got) {
		t.Error("the lock is of the file that was set aside")
	}
	if _, err := Lock(t.Context(), filepath.Join(path, "x"), time.Minute); err == nil {
		t.Error("locked what cannot be opened")
	}
}
