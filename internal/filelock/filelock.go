// Package filelock keeps two processes from using the same files. The kernel
// lets go of a lock when its holder ends, however that comes about.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHeld means that another process had the lock for as long as we waited.
var ErrHeld = errors.New("held by another process")

// retry is how often a lock that is held is tried again: the kernel's own way
// to wait for it cannot be broken off.
const retry = 20 * time.Millisecond

// Lock opens the file at path, making it if need be, and locks it against other
// processes. It waits until ctx ends, and no longer than patience. To close the
// file is to unlock it.
func Lock(ctx context.Context, path string, patience time.Duration) (*os.File, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, ErrHeld)
	defer cancel()
	for {
		f, err := try(path)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock %s: %w", path, context.Cause(ctx))
		case <-time.After(retry):
		}
	}
}

// try locks the file if it is free; the error is EWOULDBLOCK if it is not.
func try(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil && !names(path, f) {
		err = unix.EWOULDBLOCK // there is another file by now
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// names reports whether f is still what path names: who held the lock may have
// put another file in its place.
func names(path string, f *os.File) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}
