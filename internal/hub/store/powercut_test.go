package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/disktest"
	"github.com/yurt-edge/yurt/internal/hub/store"
)

// turn returns the n-th batch of a history and applies it to c. Values grow,
// shrink, come and go, so that pages split, merge and are used again.
func turn(n int, c content) *store.Batch {
	rng := rand.New(rand.NewPCG(11, uint64(n)))
	b := store.NewBatch()
	put := func(bucket, key string, data []byte) {
		b.Put(bucket, key, store.Record{Version: uint64(n), Data: data})
		if c[bucket] == nil {
			c[bucket] = map[string][]byte{}
		}
		c[bucket][key] = data
	}
	if n%13 == 0 {
		b.Drop("bucket-1")
		delete(c, "bucket-1")
	}
	for range 1 + rng.IntN(12) {
		bucket, key := fmt.Sprint("bucket-", rng.IntN(2)), fmt.Sprintf("key-%02d", rng.IntN(40))
		if rng.IntN(4) == 0 {
			b.Delete(bucket, key)
			delete(c[bucket], key)
			continue
		}
		data := make([]byte, rng.IntN(1<<(4+rng.IntN(10))))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		put(bucket, key, data)
	}
	put("turn", "n", []byte(strconv.Itoa(n)))
	return b
}

// turns returns the contents after 0 to n turns.
func turns(n int) []content {
	all := []content{{}}
	for i := range n {
		c := all[i].clone()
		turn(i+1, c)
		all = append(all, c)
	}
	return all
}

// turnOf returns which of the contents the store holds, after comparing all
// of it.
func turnOf(s *store.Store, all []content) (int, error) {
	sn, err := s.Snapshot()
	if err != nil {
		return 0, err
	}
	defer sn.Close()
	n := 0
	r, err := sn.Get("turn", "n")
	if err == nil {
		n, err = strconv.Atoi(string(r.Data))
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return 0, err
	}
	if n >= len(all) {
		return 0, fmt.Errorf("turn %d was never written", n)
	}
	for _, bucket := range []string{"bucket-0", "bucket-1", "turn"} {
		left := len(all[n][bucket])
		err := sn.Scan(bucket, "", func(key string, _ store.Header) error {
			left--
			r, err := sn.Get(bucket, key)
			if err == nil && !bytes.Equal(r.Data, all[n][bucket][key]) {
				err = fmt.Errorf("turn %d: %s in %s has other data", n, key, bucket)
			}
			return err
		})
		if err != nil {
			return 0, err
		}
		if left != 0 {
			return 0, fmt.Errorf("turn %d: %d keys missing from %s", n, left, bucket)
		}
	}
	return n, nil
}

// Children that write to a failing disk.

// recordTurns writes turns and marks each that is acknowledged. It begins on
// a damaged file, and opens the store anew at times.
func recordTurns(path string, count int) error {
	if err := os.WriteFile(path, []byte("not a store"), 0o600); err != nil {
		return err
	}
	var (
		s   *store.Store
		err error
	)
	disk := disktest.At(filepath.Dir(path))
	for n := range count {
		if n%8 == 0 {
			if n > 0 {
				err = s.Close()
			}
			if err == nil {
				s, err = store.Open(context.Background(), store.Config{Path: path, Key: testKey()})
			}
			if err != nil {
				return err
			}
		}
		if err := s.Commit(context.Background(), turn(n+1, content{})); err != nil {
			return err
		}
		if err := disk.Mark(strconv.Itoa(n + 1)); err != nil {
			return err
		}
	}
	return s.Close()
}

// faults makes each operation of a commit fail, one after the other, in every
// way. What fails must leave the state before, or the new one if only its last
// sync failed, and hold up nothing that follows.
func faults(path string) error {
	s, err := store.Open(context.Background(), store.Config{Path: path, Key: testKey()})
	if err != nil {
		return err
	}
	h := &faultRun{s: s, path: path, disk: disktest.At(filepath.Dir(path)), all: turns(faultTurns)}
	for range 3 {
		if err := h.commit(); err != nil {
			return err
		}
	}
	for _, f := range []struct {
		kind    disktest.Kind
		errno   syscall.Errno
		restart bool // the hub, after the failure
	}{
		{disktest.Write, syscall.EIO, false},
		{disktest.Write, syscall.ENOSPC, false},
		{disktest.Write, 0, false}, // short
		{disktest.Write, syscall.EIO, true},
		{disktest.Sync, syscall.EIO, false},
		{disktest.Sync, syscall.ENOSPC, false},
		{disktest.Sync, syscall.EIO, true},
		{disktest.Truncate, syscall.ENOSPC, false},
		{disktest.Any, syscall.EROFS, false},
	} {
		for pass, hit := 0, true; hit; pass++ {
			if hit, err = h.fail(f.kind, pass, f.errno, f.restart); err != nil {
				return fmt.Errorf("%s %d fails with error %d: %w", f.kind, pass, int(f.errno), err)
			}
		}
	}
	if h.failed < 30 {
		return fmt.Errorf("only %d commits failed", h.failed)
	}
	fmt.Printf("%d commits failed, %d succeeded\n", h.failed, h.turn)
	return h.s.Close()
}

// faultTurns is how many turns faults may need.
const faultTurns = 400

type faultRun struct {
	s            *store.Store
	path         string
	disk         disktest.Control
	all          []content
	turn, failed int
}

// commit writes the next turn.
func (r *faultRun) commit() error {
	err := r.s.Commit(context.Background(), turn(r.turn+1, content{}))
	if err != nil {
		return err
	}
	r.turn++
	return r.disk.Mark(strconv.Itoa(r.turn))
}

func (r *faultRun) at() (int, error) { return turnOf(r.s, r.all) }

// fail writes a turn while an operation of it fails, and then the next one.
func (r *faultRun) fail(kind disktest.Kind, pass int, errno syscall.Errno, restart bool) (hit bool, err error) {
	if err := r.disk.Fail(kind, pass, 1, errno); err != nil {
		return false, err
	}
	failure := r.commit()
	n, err := r.disk.Heal()
	if err != nil {
		return false, err
	}
	if hit = n > 0; !hit || failure == nil {
		// A truncation or a sync of it may fail without harm.
		return hit, failure
	}
	if errno == 0 {
		errno = syscall.ENOSPC
	}
	if !errors.Is(failure, errno) && !strings.Contains(failure.Error(), errno.Error()) {
		return false, fmt.Errorf("commit says %w", failure)
	}
	if r.s.Health() == nil {
		return false, errors.New("the store calls itself healthy")
	}
	r.failed++
	switch at, err := r.at(); {
	case err != nil:
		return false, err
	case at != r.turn && at != r.turn+1:
		return false, fmt.Errorf("holds turn %d after turn %d failed", at, r.turn+1)
	}
	if restart {
		// What the kernel holds of the file stays, what the store knew not.
		if err := r.s.Close(); err != nil {
			return false, err
		}
		if r.s, err = store.Open(context.Background(), store.Config{Path: r.path, Key: testKey()}); err != nil {
			return false, err
		}
	}
	// The failed one again, and two more: they use both meta pages.
	for range 3 {
		if err := r.commit(); err != nil {
			return false, fmt.Errorf("after it: %w", err)
		}
	}
	if at, err := r.at(); err != nil || at != r.turn {
		return false, fmt.Errorf("holds turn %d, wrote %d: %w", at, r.turn, err)
	}
	return true, r.s.Health()
}

// replayDisk checks that a store opens on everything that a power cut may have left
// of the disk, and holds all of a turn, one that was acknowledged or later.
func replayDisk(t *testing.T, log disktest.Log, last int, seed uint64) {
	t.Helper()
	dir := ramDisk(t)
	path := filepath.Join(dir, "store")
	all := turns(last)
	rebuilt, states := 0, 0
	count := log.PowerCuts(rand.New(rand.NewPCG(seed, seed)), func(i disktest.Image) {
		if t.Failed() {
			return
		}
		for _, name := range []string{path, path + ".damaged"} {
			if err := os.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
		}
		for name, data := range i.Files {
			used := len(data)
			for zero := [pageSize]byte{}; used >= pageSize && bytes.Equal(data[used-pageSize:used], zero[:]); {
				used -= pageSize // it is a hole
			}
			write(t, filepath.Join(dir, name), data[:used])
			if err := os.Truncate(filepath.Join(dir, name), int64(len(data))); err != nil {
				t.Fatal(err)
			}
		}
		acked := 0
		if len(i.Marks) > 0 {
			var err error
			if acked, err = strconv.Atoi(i.Marks[len(i.Marks)-1]); err != nil {
				t.Fatal(err)
			}
		}
		s, err := store.Open(t.Context(), store.Config{Path: path, Key: testKey()})
		if err != nil {
			t.Errorf("acknowledged %d, kept %s: %v", acked, i.How, err)
			return
		}
		defer s.Close()
		if s.Rebuilt() {
			rebuilt++
		}
		if s.Rebuilt() && acked > 0 {
			t.Errorf("acknowledged %d, kept %s: begun anew", acked, i.How)
		}
		if n, err := turnOf(s, all); err != nil || n < acked {
			t.Errorf("acknowledged %d, kept %s: holds %d, rebuilt %v, %v", acked, i.How, n, s.Rebuilt(), err)
			return
		}
		if states++; states%8 != 0 {
			return
		}
		b := store.NewBatch()
		b.Put("after", "k", store.Record{Data: []byte("v")})
		if err := s.Commit(t.Context(), b); err != nil {
			t.Errorf("acknowledged %d, kept %s: does not go on: %v", acked, i.How, err)
		}
	})
	t.Logf("%d operations, %d states, %d begun anew", len(log), count, rebuilt)
	if count < len(log) {
		t.Error("too few states to mean anything")
	}
}

// ramDisk returns a folder where a sync costs nothing.
func ramDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatalf("mount a file system, as root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// record runs a child on a disk and returns what it did there.
func record(t *testing.T, role string) disktest.Log {
	t.Helper()
	disk := disktest.Mount(t)
	cmd := childCommand(t, role, filepath.Join(disk.Dir, "store"))
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	return disk.Log()
}

const recordedTurns = 30

func TestEveryPowerCutLeavesAWholeTurn(t *testing.T) {
	t.Parallel()
	replayDisk(t, record(t, "turns"), recordedTurns, 1)
}

func TestEveryFailedOperationThenAnyPowerCut(t *testing.T) {
	t.Parallel()
	replayDisk(t, record(t, "faults"), faultTurns, 2)
}
