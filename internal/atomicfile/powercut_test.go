package atomicfile_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/yurt-edge/yurt/internal/atomicfile"
	"github.com/yurt-edge/yurt/internal/disktest"
)

// version is what the n-th write puts into the file.
func version(n int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "version %d of it; ", n), 40*n)
}

// After a power cut the file is one that was written whole, and not older
// than the last that was acknowledged, whatever failed before.
func TestEveryPowerCutLeavesAWholeFile(t *testing.T) {
	disk := disktest.Mount(t)
	path := filepath.Join(disk.Dir, "f")
	put := func(n int) error {
		err := atomicfile.WriteFile(path, version(n), 0o600)
		if err == nil {
			disk.Mark(strconv.Itoa(n))
		}
		return err
	}
	n := 0
	for range 3 {
		if n++; put(n) != nil {
			t.Fatal("a healthy disk takes nothing")
		}
	}
	failed := 0
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
		for pass, hit := 0, true; hit; pass++ {
			n++
			disk.Fail(disktest.Any, pass, 1, errno)
			err := put(n)
			if hit = disk.Heal() > 0; hit != (err != nil) || hit && !errors.Is(err, errno) {
				t.Fatalf("operation %d fails with %v: %v", pass, errno, err)
			}
			if hit {
				failed++
			}
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, version(n)) && (!hit || !bytes.HasPrefix(got, []byte("version "))) {
				t.Fatalf("after %v at operation %d: %.20q, %v", errno, pass, got, err)
			}
		}
	}
	if failed < 10 {
		t.Errorf("only %d writes failed", failed)
	}
	whole := map[string]int{}
	for i := range n + 1 {
		whole[string(version(i))] = i
	}
	count := disk.Log().PowerCuts(rand.New(rand.NewPCG(3, 3)), func(i disktest.Image) {
		acked := 0
		if len(i.Marks) > 0 {
			acked, _ = strconv.Atoi(i.Marks[len(i.Marks)-1])
		}
		data, there := i.Files["f"]
		got, ok := whole[string(data)]
		if (there || acked > 0) && (!ok || got < acked || got == 0) {
			t.Errorf("acknowledged %d, kept %s: %d bytes, version %d, there %v", acked, i.How, len(data), got, there)
		}
	})
	t.Logf("%d writes failed, %d states", failed, count)
}
