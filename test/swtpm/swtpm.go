// Package swtpm gives tests a TPM 2.0: the software emulator of that name,
// which speaks to its users as a chip would.
package swtpm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// startBudget is how long the emulator may take to listen.
const startBudget = 20 * time.Second

// Chip is a TPM behind the Unix socket Socket. It is for one goroutine.
type Chip struct {
	Socket string

	dir string
	cmd *exec.Cmd
}

// New returns a new chip that is switched on. Close ends it.
func New(ctx context.Context) (*Chip, error) {
	// In a folder of its own: the name of a socket must be short.
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		return nil, err
	}
	c := &Chip{dir: dir, Socket: filepath.Join(dir, "sock")}
	if err := c.On(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// On switches the chip on and waits until it answers.
func (c *Chip) On(ctx context.Context) error {
	state := filepath.Join(c.dir, "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		return fmt.Errorf("start software TPM: %w", err)
	}
	said := &tail{}
	//nolint:noctx // it outlives the call; Off ends it
	c.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state,
		"--server", "type=unixio,path="+c.Socket, "--flags", "not-need-init,startup-clear", "--seccomp", "action=none")
	c.cmd.Stdout, c.cmd.Stderr = said, said
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		c.cmd = nil
		return fmt.Errorf("start software TPM (make packages installs it): %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startBudget)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, "unix", c.Socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			c.Off()
			return fmt.Errorf("start software TPM: %w: %w: %s", context.Cause(ctx), err, said.text)
		case <-tick.C:
		}
	}
}

// Off takes the power, and the device with it. What the chip knows stays.
func (c *Chip) Off() {
	if c.cmd != nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait() // it was killed
		c.cmd = nil
	}
	_ = os.Remove(c.Socket) // it may be gone
}

// Replace puts another chip in its place, with another seed.
func (c *Chip) Replace(ctx context.Context) error {
	c.Off()
	if err := os.RemoveAll(filepath.Join(c.dir, "state")); err != nil {
		return fmt.Errorf("replace software TPM: %w", err)
	}
	return c.On(ctx)
}

// Close ends the chip and forgets what it knows.
func (c *Chip) Close() error {
	c.Off()
	return os.RemoveAll(c.dir)
}

// tail keeps the first words of a process. They are read after its end.
type tail struct{ text []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.text = append(t.text, p[:min(len(p), 4<<10-min(len(t.text), 4<<10))]...)
	return len(p), nil
}
