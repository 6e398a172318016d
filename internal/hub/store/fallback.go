package store

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxMemory bounds a store in memory, which the node's pods then lack.
const maxMemory = 128 << 20

func (s *Store) maxSize() int {
	if s.memory != nil {
		return maxMemory
	}
	return maxFileSize
}

// openMemory opens the store in memory, because of cause.
func (s *Store) openMemory(cause error) error {
	s.memory = fmt.Errorf("not on disk: %w", cause)
	s.log.Error("store kept in memory", "path", s.cfg.Path, "err", cause)
	clear(s.suspect)
	f, err := memoryFile()
	if err != nil {
		return errors.Join(cause, err)
	}
	if err := copyInto(f, s.cfg.Path); err == nil {
		if err = s.load(f); err == nil {
			s.rebuilt, s.faultErr = false, nil
			return nil
		}
		s.log.Warn("store on disk not read", "path", s.cfg.Path, "err", err)
	}
	_ = f.Close() // may be closed already
	if f, err = memoryFile(); err != nil {
		return errors.Join(cause, err)
	}
	s.rebuilt, s.faultErr = true, nil
	clear(s.suspect)
	if err := s.load(f); err != nil {
		return errors.Join(cause, err)
	}
	return nil
}

func memoryFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("store", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), "store in memory"), nil
}

// copyInto copies a regular file that fits.
func copyInto(f *os.File, path string) error {
	src, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer src.Close() //nolint:errcheck // it was only read
	n, err := io.Copy(f, io.LimitReader(src, maxMemory/2+1))
	if err == nil && n > maxMemory/2 {
		err = fmt.Errorf("%s is too large for memory", path)
	}
	return err
}
