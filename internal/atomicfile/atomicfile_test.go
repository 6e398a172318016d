package atomicfile_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/yurt-edge/yurt/internal/atomicfile"
)

func TestWriteFileCreatesAndReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, c := range []struct {
		data string
		perm os.FileMode
	}{{"first", 0o600}, {"", 0o644}, {"third, longer", 0o666}} {
		if err := atomicfile.WriteFile(path, []byte(c.data), c.perm); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != c.data || st.Mode() != c.perm {
			t.Errorf("got %q %v, want %q %v", got, st.Mode(), c.data, c.perm)
		}
	}
	wantEntries(t, filepath.Dir(path), "f")
}

func TestWriteFileInWorkingDirectory(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := atomicfile.WriteFile("f", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantEntries(t, ".", "f")
}

func TestWriteFileFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "taken", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	// The rename fails: the target is a directory.
	if err := atomicfile.WriteFile(filepath.Join(dir, "taken"), []byte("x"), 0o600); err == nil {
		t.Error("replaced a directory")
	}
	err := atomicfile.WriteFile(filepath.Join(dir, "none", "f"), []byte("x"), 0o600)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	wantEntries(t, dir, "taken")
}

func TestWriteFileOnFullDiskKeepsOldContent(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount a small file system, as root: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "f")
	if err := atomicfile.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := atomicfile.WriteFile(path, make([]byte, 1<<20), 0o600)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("full disk: %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
		t.Errorf("got %q, %v", got, err)
	}
	wantEntries(t, dir, "f")
}

func TestReadersNeverSeeAMix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	contents := [][]byte{bytes.Repeat([]byte("a"), 50_000), bytes.Repeat([]byte("b"), 70_000)}
	if err := atomicfile.WriteFile(path, contents[0], 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, data := range contents {
		wg.Go(func() {
			for range 20 {
				if err := atomicfile.WriteFile(path, data, 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 200 {
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) {
			t.Fatalf("%d bytes, neither content", len(got))
		}
	}
	wg.Wait()
	wantEntries(t, filepath.Dir(path), "f")
}

func wantEntries(t *testing.T, dir string, names ...string) {
	t.Helper()
	got, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(names) {
		t.Fatalf("%s holds %v, want %v", dir, got, names)
	}
	for i, e := range got {
		if e.Name() != names[i] {
			t.Errorf("%s holds %s, want %s", dir, e.Name(), names[i])
		}
	}
}
