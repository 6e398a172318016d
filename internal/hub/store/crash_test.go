package store_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

// The test binary is also the child processes of the crash tests.
const (
	childEnv  = "STORE_TEST_CHILD" // which child to be
	pathEnv   = "STORE_TEST_PATH"
	cyclesEnv = "STORE_KILL_CYCLES" // how often to kill; default 30
)

// child runs the process that the environment asks for, if any.
func child() (ran bool, err error) {
	path := os.Getenv(pathEnv)
	switch os.Getenv(childEnv) {
	case "load":
		return true, load(path)
	case "limits":
		return true, limits(path)
	case "turns":
		return true, recordTurns(path, recordedTurns)
	case "faults":
		return true, faults(path)
	}
	return false, nil
}

func childCommand(tb testing.TB, role, path string) *exec.Cmd {
	tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.CommandContext(tb.Context(), exe, "-test.run=^$")
	cmd.Env = append(os.Environ(), childEnv+"="+role, pathEnv+"="+path)
	cmd.Stderr = os.Stderr
	return cmd
}

const (
	writers = 6
	perPut  = 5 // keys in each batch of a writer
)

func loadKey(writer, i int) string { return fmt.Sprintf("writer-%d/key-%d", writer, i) }

// loadData is what a writer stores at a key in its n-th batch.
func loadData(writer, i int, n uint64) []byte {
	rng := rand.New(rand.NewPCG(uint64(writer*perPut+i), n))
	data := make([]byte, rng.IntN(6000))
	for at := range data {
		data[at] = byte(rng.Uint32() & 0x3f) // compresses somewhat
	}
	return data
}

// load writes without end and prints each batch that is acknowledged, as
// writer and number.
func load(path string) error {
	s, err := store.Open(context.Background(), store.Config{Path: path, Key: testKey()})
	if err != nil {
		return err
	}
	if s.Rebuilt() {
		return errors.New("store rebuilt")
	}
	var mu sync.Mutex // makes a line one write
	ack := func(writer int, n uint64) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf("%d %d\n", writer, n)
	}
	var wg sync.WaitGroup
	errs := make(chan error, writers)
	for w := range writers {
		first, err := lastBatch(s, w)
		if err != nil {
			return err
		}
		wg.Go(func() { errs <- loadOne(s, w, first+1, ack) })
	}
	wg.Wait()
	return <-errs
}

func loadOne(s *store.Store, writer int, first uint64, ack func(int, uint64)) error {
	ctx := context.Background()
	for n := first; ; n++ {
		b := store.NewBatch()
		for i := range perPut {
			b.Put("load", loadKey(writer, i), store.Record{Version: n, Data: loadData(writer, i, n)})
		}
		b.Delete("turns", fmt.Sprintf("%d-%d", writer, n-1))
		b.Put("turns", fmt.Sprintf("%d-%d", writer, n), store.Record{Version: n})
		var err error
		if writer%2 == 0 {
			if err = s.Commit(ctx, b); err == nil {
				ack(writer, n)
			}
		} else {
			err = s.Submit(ctx, b, func(err error) {
				if err == nil {
					ack(writer, n)
				}
			})
		}
		if err != nil {
			return err
		}
	}
}

// lastBatch returns the number of the last batch of a writer, after checking
// that all of it is there.
func lastBatch(s *store.Store, writer int) (uint64, error) {
	sn, err := s.Snapshot()
	if err != nil {
		return 0, err
	}
	defer sn.Close()
	var n uint64
	for i := range perPut {
		r, err := sn.Get("load", loadKey(writer, i))
		if errors.Is(err, store.ErrNotFound) {
			r, err = store.Record{}, nil
		}
		if err != nil {
			return 0, err
		}
		if i == 0 {
			n = r.Version
		}
		if r.Version != n {
			return 0, fmt.Errorf("writer %d: key %d is of batch %d, key 0 of %d", writer, i, r.Version, n)
		}
		if n > 0 && !bytes.Equal(r.Data, loadData(writer, i, n)) {
			return 0, fmt.Errorf("writer %d: data of key %d differs", writer, i)
		}
	}
	if n > 0 {
		if _, err := sn.Get("turns", fmt.Sprintf("%d-%d", writer, n)); err != nil {
			return 0, err
		}
	}
	if _, err := sn.Get("turns", fmt.Sprintf("%d-%d", writer, n-1)); !errors.Is(err, store.ErrNotFound) {
		return 0, fmt.Errorf("writer %d: turn %d still there: %w", writer, n-1, err)
	}
	return n, nil
}

func TestKillUnderLoadLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	cycles := 30
	if v := os.Getenv(cyclesEnv); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		cycles = n
	}
	path := filepath.Join(t.TempDir(), "store")
	rng := rand.New(rand.NewPCG(5, 5))
	var acked [writers]uint64
	total := 0
	for cycle := range cycles {
		total += killUnderLoad(t, path, 1+rng.IntN(150), &acked)
		s := openTemp(t, store.Config{Path: path})
		if s.Rebuilt() {
			t.Fatalf("cycle %d: rebuilt", cycle)
		}
		for w := range writers {
			n, err := lastBatch(s, w)
			if err != nil {
				t.Fatalf("cycle %d: %v", cycle, err)
			}
			if n < acked[w] {
				t.Fatalf("cycle %d: writer %d is at %d, acknowledged %d", cycle, w, n, acked[w])
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if (cycle+1)%500 == 0 {
			t.Logf("%d cycles, %d batches acknowledged", cycle+1, total)
		}
	}
	t.Logf("%d batches acknowledged in %d cycles", total, cycles)
}

// killUnderLoad kills the load after some acknowledgements and records all
// that it gave.
func killUnderLoad(t *testing.T, path string, after int, acked *[writers]uint64) (count int) {
	t.Helper()
	cmd := childCommand(t, "load", path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			break // what was in the pipe at the end counts as well
		}
		if err != nil {
			t.Fatal(err)
		}
		var w int
		var n uint64
		if _, err := fmt.Sscanf(line, "%d %d\n", &w, &n); err != nil {
			t.Fatalf("child says %q", line)
		}
		acked[w] = max(acked[w], n)
		if count++; count == after {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || count < after {
		t.Fatalf("child ended by itself after %d batches: %v", count, err)
	}
	return count
}

// The file grows into a limit at every page that a commit writes, one after
// the other: this is an I/O error at each write.
func TestErrorAtEachWrite(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store")
	cmd := childCommand(t, "limits", path)
	out, err := cmd.Output()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	s := openTemp(t, store.Config{Path: path})
	if s.Rebuilt() {
		t.Error("rebuilt")
	}
}

func limits(path string) error {
	signal.Ignore(syscall.SIGXFSZ)
	s, err := store.Open(context.Background(), store.Config{Path: path, Key: testKey()})
	if err != nil {
		return err
	}
	data := noise(1 << 20)
	put := func(n uint64) error {
		b := store.NewBatch()
		for i := range 20 {
			size := binary.LittleEndian.Uint16(data[n*40+uint64(i)*2:]) % 5000
			b.Put("b", fmt.Sprint(i), store.Record{Version: n, Data: data[n : n+uint64(size)]})
		}
		return s.Commit(context.Background(), b)
	}
	check := func(n uint64) error {
		sn, err := s.Snapshot()
		if err != nil {
			return err
		}
		defer sn.Close()
		for i := range 20 {
			r, err := sn.Get("b", fmt.Sprint(i))
			if err != nil {
				return err
			}
			if r.Version != n || !bytes.HasPrefix(data[n:], r.Data) {
				return fmt.Errorf("key %d is of commit %d, want %d", i, r.Version, n)
			}
		}
		return nil
	}
	n, failed := uint64(0), 0
	if err := put(n); err != nil {
		return err
	}
	for page := range uint64(80) {
		for _, part := range []uint64{0, 100} {
			if err := limitFiles(page*pageSize + part); err != nil {
				return err
			}
			err := put(n + 1)
			if limit := limitFiles(unix.RLIM_INFINITY); limit != nil {
				return limit
			}
			switch {
			case err == nil:
				n++
			case errors.Is(err, syscall.EFBIG) || errors.Is(err, io.ErrShortWrite):
				failed++
			default:
				return fmt.Errorf("limit at page %d: %w", page, err)
			}
			if err := check(n); err != nil {
				return fmt.Errorf("limit at page %d: %w", page, err)
			}
			if n++; put(n) != nil || check(n) != nil || s.Health() != nil {
				return fmt.Errorf("after limit at page %d: %w, %w", page, check(n), s.Health())
			}
		}
	}
	fmt.Printf("%d commits failed, %d succeeded\n", failed, n+1)
	if failed < 20 {
		return errors.New("too few failures to mean anything")
	}
	return s.Close()
}

// limitFiles makes writes beyond size fail in this process.
func limitFiles(size uint64) error {
	return unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: unix.RLIM_INFINITY})
}

func TestNoSpace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatalf("mount a small file system, as root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "store")
	s := openTemp(t, store.Config{Path: path})
	data := noise(100_000)
	put := func(i int) error {
		b := store.NewBatch()
		b.Put("b", fmt.Sprint(i), store.Record{Data: data})
		return s.Commit(t.Context(), b)
	}
	check := func(n int) {
		t.Helper()
		sn, err := s.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		defer sn.Close()
		for i := range n {
			if r, err := sn.Get("b", fmt.Sprint(i)); err != nil || !bytes.Equal(r.Data, data) {
				t.Fatalf("object %d: %v", i, err)
			}
		}
		if _, err := sn.Get("b", fmt.Sprint(n)); !errors.Is(err, store.ErrNotFound) {
			t.Fatalf("object %d was refused: %v", n, err)
		}
	}
	// The file system counts loosely: a commit may fit after one did not.
	n := 0
	for failed := 0; failed < 4; {
		err := put(n)
		switch {
		case err == nil:
			n++
		case errors.Is(err, syscall.ENOSPC):
			failed++
		default:
			t.Fatal(err)
		}
		if n == 100 {
			t.Fatal("the disk takes everything")
		}
		check(n)
	}
	if n < 5 {
		t.Fatalf("%d objects fit", n)
	}
	if err := put(n); err == nil {
		n++
	} else if !errors.Is(s.Health(), syscall.ENOSPC) {
		t.Errorf("health of a full store: %v", s.Health())
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=20m"); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := put(n); err != nil {
			t.Fatal(err)
		}
		n++
	}
	check(n)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openTemp(t, store.Config{Path: path})
	if s.Rebuilt() {
		t.Error("rebuilt")
	}
	check(n)
}
