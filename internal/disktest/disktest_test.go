package disktest_test

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/yurt-edge/yurt/internal/disktest"
)

// after returns what the file f may hold after a power cut that comes once
// mark was set; "-" is no file.
func after(d *disktest.Disk, mark string) []string {
	var all []string
	d.Log().PowerCuts(rand.New(rand.NewPCG(1, 1)), func(i disktest.Image) {
		if !slices.Contains(i.Marks, mark) {
			return
		}
		data, ok := i.Files["f"]
		if !ok {
			data = []byte("-")
		}
		all = append(all, string(data))
	})
	slices.Sort(all)
	return slices.Compact(all)
}

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func text(t *testing.T, f io.Writer, s string) {
	t.Helper()
	_, err := io.WriteString(f, s)
	do(t, err)
}

func want(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("%s: %.99q, lacks %.20q", what, got, w)
		}
	}
}

// What careless programs do must be found out, and careful ones be left in
// peace.
func TestPowerCutsShowWhatWasNotSynced(t *testing.T) {
	disk := disktest.Mount(t)
	path := filepath.Join(disk.Dir, "f")
	dir, err := os.Open(disk.Dir)
	do(t, err)
	defer dir.Close()

	f, err := os.Create(path)
	do(t, err)
	defer f.Close()
	text(t, f, "one")
	disk.Mark("no sync of the folder")
	do(t, f.Sync())
	want(t, "new file", after(disk, "no sync of the folder"), "-", "", "one")
	do(t, dir.Sync())
	disk.Mark("synced")
	if got := after(disk, "synced"); !slices.Equal(got, []string{"one"}) {
		t.Errorf("synced: %q", got)
	}

	g, err := os.Create(path + ".new")
	do(t, err)
	defer g.Close()
	text(t, g, "two")
	do(t, os.Rename(path+".new", path))
	disk.Mark("renamed before the sync")
	want(t, "early rename", after(disk, "renamed before the sync"), "one", "", "two")
	do(t, g.Sync())
	do(t, dir.Sync())

	// Two sectors, of which any may be there.
	disk.Mark("torn")
	a, b := strings.Repeat("a", 512), strings.Repeat("b", 512)
	_, err = g.WriteAt([]byte(a+a), 0)
	do(t, err)
	do(t, g.Sync())
	_, err = g.WriteAt([]byte(b+b), 0)
	do(t, err)
	got := after(disk, "torn")
	want(t, "torn", got, a+a, b+a, a+b, b+b)
	noisy := func(s string) bool { return strings.Trim(s, "ab") != "" && len(s) == 1024 }
	if !slices.ContainsFunc(got, noisy) {
		t.Error("no noise in a torn sector")
	}
	do(t, g.Sync())
}

func TestFailedSyncLeavesBytesInDoubt(t *testing.T) {
	disk := disktest.Mount(t)
	f, err := os.Create(filepath.Join(disk.Dir, "f"))
	do(t, err)
	defer f.Close()
	dir, err := os.Open(disk.Dir)
	do(t, err)
	defer dir.Close()
	text(t, f, "old")
	do(t, f.Sync())
	do(t, dir.Sync())

	_, err = f.WriteAt([]byte("new"), 0)
	do(t, err)
	disk.Fail(disktest.Sync, 0, 1, syscall.EIO)
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("sync: %v", err)
	}
	if n := disk.Heal(); n != 1 {
		t.Errorf("%d operations failed", n)
	}
	do(t, f.Sync())
	disk.Mark("synced again")
	want(t, "synced again", after(disk, "synced again"), "old", "new")

	_, err = f.WriteAt([]byte("new"), 0)
	do(t, err)
	do(t, f.Sync())
	disk.Mark("written again")
	if got := after(disk, "written again"); !slices.Equal(got, []string{"new"}) {
		t.Errorf("written again: %q", got)
	}
}

func TestFaults(t *testing.T) {
	disk := disktest.Mount(t)
	control := disktest.At(disk.Dir)
	f, err := os.Create(filepath.Join(disk.Dir, "f"))
	do(t, err)
	defer f.Close()
	do(t, control.Fail(disktest.Write, 1, 1, 0))
	text(t, f, "1234")
	if n, err := f.WriteString("5678"); n != 2 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("short write: %d, %v", n, err)
	}
	if n, err := control.Heal(); n != 2 || err != nil {
		t.Errorf("%d operations failed, %v", n, err)
	}
	if got, err := os.ReadFile(f.Name()); string(got) != "123456" || err != nil {
		t.Errorf("holds %q, %v", got, err)
	}
	disk.Fail(disktest.Any, 0, -1, syscall.EROFS)
	for range 2 {
		if err := f.Truncate(1); !errors.Is(err, syscall.EROFS) {
			t.Errorf("truncate: %v", err)
		}
	}
	if err := os.Remove(f.Name()); !errors.Is(err, syscall.EROFS) {
		t.Errorf("remove: %v", err)
	}
	if n := disk.Heal(); n != 3 {
		t.Errorf("%d operations failed", n)
	}
}
