package daemon

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestHideMemory(t *testing.T) {
	was, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || was != 1 {
		t.Fatalf("before: %d, %v", was, err)
	}
	if err := HideMemory(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) })
	if now, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || now != 0 {
		t.Errorf("after: %d, %v", now, err)
	}
}
