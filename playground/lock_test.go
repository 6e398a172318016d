package playground

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// testLock is a lock that no playground uses.
func testLock(t *testing.T) string {
	return "@yurt-playground-" + strconv.Itoa(os.Getpid()) + "-" + t.Name()
}

func TestLockNamesItsHolder(t *testing.T) {
	address := testLock(t)
	release, err := acquire(t.Context(), address, "/somewhere else")
	if err != nil {
		t.Fatal(err)
	}
	_, err = acquire(t.Context(), address, "/here")
	if !errors.Is(err, ErrRunning) {
		t.Fatalf("second lock: want ErrRunning, got %v", err)
	}
	for _, want := range []string{"/somewhere else", strconv.Itoa(os.Getpid())} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("want %q in %q", want, err)
		}
	}
	if hint := Hint(err); !strings.Contains(hint, "down") {
		t.Errorf("want a hint about down, got %q", hint)
	}
	release()
	again, err := acquire(t.Context(), address, "/here")
	if err != nil {
		t.Fatalf("lock after its release: %v", err)
	}
	again()
	if h, err := lockHolder(t.Context(), address); err == nil {
		t.Errorf("a released lock has holder %+v", h)
	}
}

func TestLockIsWaitedFor(t *testing.T) {
	address := testLock(t)
	release, err := acquire(t.Context(), address, "/first")
	if err != nil {
		t.Fatal(err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := acquireWait(canceled, address, "/second"); !errors.Is(err, context.Canceled) {
		t.Errorf("wait with an ended context: want context.Canceled, got %v", err)
	}
	got := make(chan error, 1)
	go func() {
		release, err := acquireWait(t.Context(), address, "/second")
		if err == nil {
			release()
		}
		got <- err
	}()
	release()
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestRemoveDirSparesForeignFolders(t *testing.T) {
	dir := t.TempDir()
	precious := filepath.Join(dir, "thesis.tex")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := removeDir(dir); err == nil || Hint(err) == "" {
		t.Errorf("remove a foreign folder: want an error with a hint, got %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Fatal(err)
	}
	// The same folder with the mark of a playground.
	if err := os.WriteFile(filepath.Join(dir, topologyFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := removeDir(dir); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder is still there: %v", err)
	}
}
