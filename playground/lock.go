package playground

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// lockAddress is an abstract socket: binding it is atomic, it ends with the
// process that holds it, and it leaves no file behind. Playgrounds share names
// of machines, namespaces and cgroups, so one host runs one of them.
const lockAddress = "@yurt-playground"

// ErrRunning is returned when this host runs a playground already.
var ErrRunning = errors.New("a playground runs already")

// holder is who holds the lock.
type holder struct {
	pid int
	dir string
}

// acquire takes the host's lock for the playground in dir.
func acquire(ctx context.Context, address, dir string) (release func(), err error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		h, err := lockHolder(ctx, address)
		if err != nil {
			return nil, ErrRunning
		}
		return nil, WithHint(fmt.Errorf("%w: process %d, folder %s", ErrRunning, h.pid, h.dir),
			"run `yurtadm playground down` first")
	}
	if err != nil {
		return nil, fmt.Errorf("take the lock %s: %w", address, err)
	}
	go func() { // ends when the listener is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(time.Second))
			fmt.Fprintf(conn, "%d %s\n", os.Getpid(), dir)
			_ = conn.Close()
		}
	}()
	return func() { _ = l.Close() }, nil
}

// acquireWait is acquire that waits for the playground of somebody else to end.
func acquireWait(ctx context.Context, address, dir string) (release func(), err error) {
	err = poll(ctx, lockPoll, func() (bool, error) {
		release, err = acquire(ctx, address, dir)
		if errors.Is(err, ErrRunning) {
			return false, nil
		}
		return err == nil, err
	})
	return release, err
}

// lockHolder asks the holder of the lock who it is. It returns an error when
// nobody holds the lock.
func lockHolder(ctx context.Context, address string) (holder, error) {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", address)
	if err != nil {
		return holder{}, err
	}
	defer conn.Close() //nolint:errcheck // read only
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	text, err := io.ReadAll(conn)
	if err != nil {
		return holder{}, err
	}
	var h holder
	if _, err := fmt.Sscanf(string(text), "%d", &h.pid); err != nil {
		return holder{}, fmt.Errorf("read lock holder %q: %w", text, err)
	}
	_, h.dir, _ = strings.Cut(strings.TrimSpace(string(text)), " ")
	return h, nil
}
