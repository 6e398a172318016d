package playground

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// stopGrace is how long a process may take to end after SIGTERM.
const stopGrace = 5 * time.Second

// component is a process as data.
type component struct {
	name string
	path string
	args []string
	env  []string
}

// process is a running component.
type process struct {
	name string
	log  string
	pid  int
	done chan struct{} // closed after the process ended and err is set
	err  error
}

// start runs c with its output appended to dir/NAME.log. The process gets
// SIGKILL when this process ends, however it ends.
func (c component) start(dir string) (*process, error) {
	p := &process{name: c.name, log: filepath.Join(dir, c.name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(c.path, c.args...) //nolint:noctx // stop and kill end it
	cmd.Env = append(os.Environ(), c.env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	go func() {
		// The death signal is tied to the thread that forks, not to the
		// process: this thread must live until the child has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer log.Close() //nolint:errcheck // the child has its own descriptor
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
		}
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	return p, nil
}

// stop ends the process, kindly first, and waits for its end.
func (p *process) stop() {
	_ = syscall.Kill(p.pid, syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(stopGrace):
		p.kill()
	}
}

// kill ends the process at once and waits for its end.
func (p *process) kill() {
	_ = syscall.Kill(p.pid, syscall.SIGKILL)
	<-p.done
}

// ended returns an error that quotes the log when the process has ended.
func (p *process) ended() error {
	select {
	case <-p.done:
		content, _ := os.ReadFile(p.log)
		return fmt.Errorf("%s ended: %w; its last lines in %s:\n%s", p.name, orExit0(p.err), p.log, tail(string(content), 12))
	default:
		return nil
	}
}

func orExit0(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// await polls ready until it returns nil, the process ends or ctx ends.
func (p *process) await(ctx context.Context, ready func(context.Context) error) error {
	var last error
	err := poll(ctx, 50*time.Millisecond, func() (bool, error) {
		if err := p.ended(); err != nil {
			return false, err
		}
		last = ready(ctx)
		return last == nil, nil
	})
	if err != nil && last != nil && ctx.Err() != nil {
		return fmt.Errorf("wait for %s: %w (%w)", p.name, err, last)
	}
	return err
}
