package playground

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// keeperStopBudget is how long a keeper may take to end in good order.
const keeperStopBudget = time.Minute

// reply is the keeper's answer to an order.
type reply struct {
	Error string `json:"error,omitempty"`
	Hint  string `json:"hint,omitempty"`
}

func replyOf(err error) reply {
	if err == nil {
		return reply{}
	}
	return reply{Error: err.Error(), Hint: Hint(err)}
}

func (r reply) err() error {
	if r.Error == "" {
		return nil
	}
	err := errors.New(r.Error)
	if r.Hint != "" {
		return WithHint(err, r.Hint)
	}
	return err
}

// reportFD is where the keeper's starter reads how far it is.
const reportFD = 3

// RunKeeper brings a playground up, serves orders from other processes until
// ctx ends, and takes the playground down. The process must have been started
// by [Spawn], which reads from its file descriptor 3: lines of progress, then
// one line that begins with a NUL byte and holds the outcome as JSON, then the
// end.
func RunKeeper(ctx context.Context, cfg Config) error {
	// The children must not hold it open: its end tells the starter that the
	// playground is up.
	syscall.CloseOnExec(reportFD)
	report := os.NewFile(reportFD, "report")
	if report == nil {
		return errors.New("a keeper must be started by Spawn")
	}
	cfg.Progress = NewProgress(report)
	p, err := Up(ctx, cfg)
	var l net.Listener
	if err == nil {
		l, err = listenUnix(ctx, keeperSocket(p.dir))
		if err != nil {
			err = errors.Join(err, p.Stop(context.WithoutCancel(ctx)))
		}
	}
	outcome, jsonErr := json.Marshal(replyOf(err))
	if jsonErr != nil {
		return jsonErr
	}
	fmt.Fprintf(report, "\x00%s\n", outcome)
	_ = report.Close()
	if err != nil {
		return err
	}
	server := &http.Server{Handler: p.orders(), ReadHeaderTimeout: 5 * time.Second}
	stopped := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stopped()
	serveErr := server.Serve(l)
	if errors.Is(serveErr, http.ErrServerClosed) {
		serveErr = nil
	}
	return errors.Join(serveErr, p.Stop(context.WithoutCancel(ctx)))
}

func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	// The folder is root's alone, and so is the socket.
	return (&net.ListenConfig{}).Listen(ctx, "unix", path)
}

// orders serves what other processes want of the owner.
func (p *Playground) orders() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /order", func(w http.ResponseWriter, r *http.Request) {
		var c Command
		err := json.NewDecoder(r.Body).Decode(&c)
		if err == nil {
			p.log.Info("order", "op", c.Op, "target", c.Target)
			err = p.do(r.Context(), c)
		}
		_ = json.NewEncoder(w).Encode(replyOf(err))
	})
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		s, err := p.status(r.Context())
		_ = json.NewEncoder(w).Encode(struct {
			Status
			reply
		}{s, replyOf(err)})
	})
	return mux
}

func keeperClient(dir string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", keeperSocket(dir))
		},
	}}
}

// askKeeper sends body, or GETs when there is none, and decodes the answer.
func askKeeper(ctx context.Context, dir, path string, body, answer any) error {
	method, content := http.MethodGet, []byte(nil)
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		method, content = http.MethodPost, encoded
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://keeper"+path, bytes.NewReader(content))
	if err != nil {
		return err
	}
	resp, err := keeperClient(dir).Do(req)
	if err != nil {
		return WithHint(fmt.Errorf("ask the keeper of %s: %w", dir, err),
			"see "+filepath.Join(dir, "keeper.log")+", or start again with `yurtadm playground up`")
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
		return fmt.Errorf("read answer of the keeper: %w", err)
	}
	return nil
}

func orderKeeper(ctx context.Context, dir string, c Command) error {
	var r reply
	if err := askKeeper(ctx, dir, "/order", c, &r); err != nil {
		return err
	}
	return r.err()
}

// Spawn starts cmd, whose program must call [RunKeeper], apart from this
// process and its terminal. It copies progress to out and returns when the
// playground is up or has failed. When ctx ends first the keeper is told to
// stop.
func Spawn(ctx context.Context, cmd *exec.Cmd, out io.Writer) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close() //nolint:errcheck // read only
	cmd.ExtraFiles = []*os.File{write}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	if err := errors.Join(err, write.Close()); err != nil {
		return fmt.Errorf("start keeper: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()

	var outcome *reply
	lines := lineWriter(func(line string) {
		if line == "" || line[0] != 0 {
			fmt.Fprintln(out, line)
			return
		}
		outcome = &reply{}
		if err := json.Unmarshal([]byte(line[1:]), outcome); err != nil {
			outcome.Error = err.Error()
		}
	})
	// Ends when the keeper closes the pipe, or dies.
	if _, err := io.Copy(lines, read); err != nil {
		return err
	}
	if outcome == nil {
		return fmt.Errorf("keeper died before the playground was up: %w", orExit0(cmd.Wait()))
	}
	if err := outcome.err(); err != nil {
		_ = cmd.Wait()
		return err
	}
	return cmd.Process.Release()
}

// Attach returns the playground that a keeper runs in dir, or in the default
// folder if dir is empty.
func Attach(dir string) (*Playground, error) {
	dir = orDefault(dir, DefaultDir)
	if _, err := os.Stat(keeperSocket(dir)); err != nil {
		return nil, WithHint(fmt.Errorf("no playground runs in %s", dir), "start one with `yurtadm playground up`")
	}
	t, err := savedTopology(dir)
	if err != nil {
		return nil, fmt.Errorf("read topology of %s: %w", dir, err)
	}
	root, err := checkout()
	if err != nil {
		return nil, err
	}
	return &Playground{
		dir: dir, topology: t,
		bin: Binaries{Root: root, Dir: filepath.Join(root, "bin")},
	}, nil
}

// Down ends the playground of dir, or of the default folder if dir is empty,
// whoever owns it and however far it came, and removes every trace of it. It
// is no error when there is nothing to remove.
func Down(ctx context.Context, dir string) error {
	t, err := DefaultTopology()
	if err != nil {
		return err
	}
	return down(ctx, dir, lockAddress, t.Name)
}

// down is Down for the playground that holds lock. When its folder does not
// tell its name any more, the name is prefix.
func down(ctx context.Context, dir, lock, prefix string) error {
	dir, err := filepath.Abs(orDefault(dir, DefaultDir))
	if err != nil {
		return err
	}
	if err := checkRoot(os.Geteuid()); err != nil {
		return err
	}
	h, err := lockHolder(ctx, lock)
	if err == nil && h.dir != dir {
		return WithHint(fmt.Errorf("a playground runs in %s, not in %s (process %d)", h.dir, dir, h.pid),
			"add --dir "+h.dir)
	}
	if err == nil {
		if err := endOwner(ctx, lock, h.pid); err != nil {
			return err
		}
	}
	release, err := acquire(ctx, lock, dir)
	if err != nil {
		return err
	}
	defer release()
	return sweep(ctx, dir, prefix)
}

// endOwner ends the process that owns the playground: kindly, so that it takes
// the playground down in good order, or else at once.
func endOwner(ctx context.Context, lock string, pid int) error {
	gone := func() (bool, error) {
		h, err := lockHolder(ctx, lock)
		return err != nil || h.pid != pid, nil //nolint:nilerr // nobody holds it
	}
	for _, try := range []struct {
		signal syscall.Signal
		budget time.Duration
	}{{syscall.SIGTERM, keeperStopBudget}, {syscall.SIGKILL, 10 * time.Second}} {
		if err := syscall.Kill(pid, try.signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end process %d: %w", pid, err)
		}
		wait, cancel := context.WithTimeout(ctx, try.budget)
		err := poll(wait, lockPoll, gone)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return fmt.Errorf("process %d, which owns the playground, does not end", pid)
}
