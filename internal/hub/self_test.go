package hub

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/hub/link"
)

func TestSocketIsForRoot(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "hub.sock")
	l, err := listenRoot(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	for file, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", file, info.Mode().Perm(), want)
		}
	}
	if _, err := listenRoot(t.Context(), path); err == nil {
		t.Error("a second hub took the socket of one that listens")
	}

	// Even where the file's mode does not keep a stranger out.
	for _, file := range []string{filepath.Dir(dir), dir, filepath.Dir(path), path} {
		if err := os.Chmod(file, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan error, 1)
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				served <- err
				return
			}
			_, _ = c.Write([]byte("hello"))
			_ = c.Close()
		}
	}()
	if got := tellSocket(t, path, 0); got != "hello" {
		t.Errorf("root got %q", got)
	}
	if got := tellSocket(t, path, 65534); got != "" {
		t.Errorf("nobody got %q", got)
	}
	_ = l.Close()
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}

	// What a killed hub leaves does not keep the next one from listening.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := listenRoot(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}

// tellSocket connects as the user and returns what it is told.
func tellSocket(t *testing.T, path string, uid int) string {
	t.Helper()
	type result struct {
		text []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		// The user is the thread's, which ends with this goroutine.
		runtime.LockOSThread()
		var r result
		defer func() { done <- r }()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			r.err = errno
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			r.err = err
			return
		}
		file := os.NewFile(uintptr(fd), path)
		defer file.Close()
		if r.err = unix.Connect(fd, &unix.SockaddrUnix{Name: path}); r.err == nil {
			r.text, r.err = io.ReadAll(file)
		}
	}()
	r := <-done
	if r.err != nil && !errors.Is(r.err, unix.ECONNRESET) {
		t.Fatalf("connect as user %d: %v", uid, r.err)
	}
	return string(r.text)
}

// TestLastCut: what a hub saw of its link is a cut only if the link was whole
// before.
func TestLastCut(t *testing.T) {
	born := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	at := func(minutes int) time.Time { return born.Add(time.Duration(minutes) * time.Minute) }
	s := self{link: link.State{Since: born, Reason: "not probed yet"}, born: born}
	for _, step := range []struct {
		state link.State
		want  time.Duration // of the last cut; zero: none
	}{
		{link.State{Since: born, Reason: "i/o timeout"}, 0},
		{link.State{Up: true, Since: at(5)}, 0},
		{link.State{Since: at(10), Reason: "connection refused"}, 0},
		{link.State{Since: at(10), Reason: "i/o timeout"}, 0},
		{link.State{Up: true, Since: at(13)}, 3 * time.Minute},
		{link.State{Up: true, Since: at(13)}, 3 * time.Minute},
		{link.State{Since: at(20), Reason: "connection refused"}, 3 * time.Minute},
		{link.State{Up: true, Since: at(21)}, time.Minute},
	} {
		got := s.see(step.state)
		if (got == nil) != (step.want == 0) || got != nil && got.To.Sub(got.From) != step.want {
			t.Errorf("after %+v the last cut is %+v, want one of %s", step.state, got, step.want)
		}
	}
}
