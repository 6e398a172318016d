package keyring

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// chip is a software TPM behind a Unix socket.
type chip struct {
	t      testing.TB
	dir    string
	Socket string

	cmd *exec.Cmd
	out *output
}

// output collects what a process says.
type output struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func newChip(t testing.TB) *chip {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") //nolint:usetesting // the name of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	c := &chip{t: t, dir: dir, Socket: filepath.Join(dir, "sock")}
	t.Cleanup(func() {
		c.stop()
		_ = os.RemoveAll(dir)
	})
	c.start()
	return c
}

// start powers the TPM on and waits until it answers.
func (c *chip) start() {
	c.t.Helper()
	state := filepath.Join(c.dir, "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		c.t.Fatal(err)
	}
	c.out = &output{}
	c.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state,
		"--server", "type=unixio,path="+c.Socket, "--flags", "not-need-init,startup-clear", "--seccomp", "action=none")
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		c.t.Fatalf("start software TPM: %v (make packages installs it)", err)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		if conn, err := net.Dial("unix", c.Socket); err == nil {
			_ = conn.Close()
			return
		}
		<-tick.C
	}
	c.t.Fatalf("software TPM does not listen: %s", c.out)
}

// stop takes the power, and the device with it.
func (c *chip) stop() {
	if c.cmd == nil {
		return
	}
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
	c.cmd = nil
	_ = os.Remove(c.Socket)
}

// reset makes it another TPM: one with another seed.
func (c *chip) reset() {
	c.t.Helper()
	c.stop()
	if err := os.RemoveAll(filepath.Join(c.dir, "state")); err != nil {
		c.t.Fatal(err)
	}
	c.start()
}
