package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/filelock"
)

const lockWait = time.Second

// lockFile opens the file at path, making it if need be, and locks it
// against other processes. Anything else that has the name is ErrDamaged.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: it is not a file: %s", ErrDamaged, st.Mode())
	}
	return filelock.Lock(ctx, path, lockWait)
}

// rewrite writes bytes of a file anew as they are, and syncs them.
func rewrite(f *os.File, at int64, size int) error {
	b := make([]byte, size)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	if _, err := f.WriteAt(b, at); err != nil {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

func setAside(path string) error {
	aside := path + ".damaged"
	// A folder there would be in the way.
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if err := os.Rename(path, aside); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// diskBytes returns what a file takes on disk, holes not counted.
func diskBytes(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}
