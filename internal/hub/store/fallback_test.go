package store_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

func TestFallbackReadsWhatCannotBeWritten(t *testing.T) {
	t.Parallel()
	dir := ramDisk(t)
	path := filepath.Join(dir, "store")
	s := openTemp(t, store.Config{Path: path})
	b := store.NewBatch()
	b.Put("b", "k", store.Record{Version: 3, Data: []byte("kept")})
	if err := s.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Durable(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), store.Config{Path: path, Key: testKey()}); !errors.Is(err, syscall.EROFS) {
		t.Errorf("without fallback: %v", err)
	}
	s = openTemp(t, store.Config{Path: path, Fallback: true})
	if err := s.Durable(); !errors.Is(err, syscall.EROFS) || s.Health() == nil || s.Rebuilt() {
		t.Errorf("durable: %v, health: %v, rebuilt: %v", err, s.Health(), s.Rebuilt())
	}
	b = store.NewBatch()
	b.Put("b", "more", store.Record{Data: []byte(strings.Repeat("x", 9000))})
	if err := s.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	sn, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	for key, version := range map[string]uint64{"k": 3, "more": 0} {
		if r, err := sn.Get("b", key); err != nil || r.Version != version {
			t.Errorf("%s: %+v, %v", key, r, err)
		}
	}
}

func TestFallbackBeginsEmptyWhereNothingCanBeRead(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := openTemp(t, store.Config{Path: filepath.Join(file, "store"), Fallback: true})
	if err := s.Durable(); !errors.Is(err, syscall.ENOTDIR) || !s.Rebuilt() {
		t.Errorf("durable: %v, rebuilt: %v", err, s.Rebuilt())
	}
	names, err := s.Buckets()
	if err != nil || len(names) > 0 {
		t.Errorf("holds %q, %v", names, err)
	}
}

func TestWhatIsNotAFileIsSetAside(t *testing.T) {
	t.Parallel()
	for name, build := range map[string]func(string) error{
		"folder": func(p string) error { return os.MkdirAll(filepath.Join(p, "x"), 0o700) },
		"link":   func(p string) error { return os.Symlink("/dev/null", p) },
		"pipe":   func(p string) error { return syscall.Mkfifo(p, 0o600) },
	} {
		path := filepath.Join(t.TempDir(), "store")
		if err := errors.Join(build(path), os.MkdirAll(path+".damaged/x", 0o700)); err != nil {
			t.Fatal(err)
		}
		s := openTemp(t, store.Config{Path: path})
		if _, err := os.Lstat(path + ".damaged"); err != nil || !s.Rebuilt() || s.Durable() != nil {
			t.Errorf("%s: rebuilt %v, durable %v, aside %v", name, s.Rebuilt(), s.Durable(), err)
		}
	}
}
