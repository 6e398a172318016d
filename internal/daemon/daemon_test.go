package daemon

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/goleak"
	"k8s.io/klog/v2"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestGroupWaitsForAllAndJoinsErrors(t *testing.T) {
	first, second := errors.New("first"), errors.New("second")
	err := Group(t.Context(),
		func(context.Context) error { return first },
		func(ctx context.Context) error {
			<-ctx.Done()
			if !errors.Is(context.Cause(ctx), first) {
				t.Errorf("cause %v, want %v", context.Cause(ctx), first)
			}
			return second
		},
		func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	)
	if !errors.Is(err, first) || !errors.Is(err, second) {
		t.Errorf("got %v, want both errors", err)
	}
	if errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want no mention of the cancellation", err)
	}
}

func TestGroupReturnsNilAfterAnOrderlyStop(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	err := Group(ctx,
		func(context.Context) error { return nil }, // ends early and stops nobody
		func(ctx context.Context) error { cancel(); <-ctx.Done(); return ctx.Err() },
	)
	if err != nil {
		t.Errorf("got %v, want nil", err)
	}
}

func TestGroupWithoutRuns(t *testing.T) {
	if err := Group(t.Context()); err != nil {
		t.Error(err)
	}
}

func hang(release chan struct{}) func(context.Context) error {
	return func(context.Context) error { <-release; return nil }
}

func TestGroupNamesTheRunThatDoesNotStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		release := make(chan struct{})
		start := time.Now()
		go cancel()
		err := Group(ctx, hang(release))
		if took := time.Since(start); took != StopTimeout {
			t.Errorf("returned after %s, want %s", took, StopTimeout)
		}
		if err == nil || !strings.Contains(err.Error(), "hang") {
			t.Errorf("got %v, want the name of the run", err)
		}
		close(release)
	})
}

func TestSignalEndsContext(t *testing.T) {
	ctx, stop := SignalContext(t.Context())
	defer stop()
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	if cause := context.Cause(ctx); !strings.Contains(cause.Error(), "terminated") {
		t.Errorf("cause %v, want the signal's name", cause)
	}
}

func TestLogConfig(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  LogConfig
		want string // in the output of one Info and one Debug line
		err  string
	}{
		{name: "zero value", want: "msg=seen"},
		{name: "json", cfg: LogConfig{Format: "json", Level: "info"}, want: `"msg":"seen"`},
		{name: "debug", cfg: LogConfig{Level: "debug"}, want: "msg=hidden"},
		{name: "warn", cfg: LogConfig{Level: "warn"}, want: ""},
		{name: "bad level", cfg: LogConfig{Level: "loud"}, err: "log level"},
		{name: "bad format", cfg: LogConfig{Format: "xml"}, err: "log format"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			log, err := NewLogger(&out, tc.cfg)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("got error %v, want one on the %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			log.Info("seen")
			log.Debug("hidden")
			if !strings.Contains(out.String(), tc.want) || (tc.want == "") != (out.Len() == 0) {
				t.Errorf("got %q, want %q in it", out.String(), tc.want)
			}
		})
	}
}

func TestLogFlagsFitBothFlagPackages(t *testing.T) {
	var c LogConfig
	std := flag.NewFlagSet("std", flag.ContinueOnError)
	c.AddFlags(std)
	if err := std.Parse([]string{"--log-level=debug"}); err != nil || c.Level != "debug" || c.Format != "text" {
		t.Errorf("flag: got %+v, %v", c, err)
	}
	p := pflag.NewFlagSet("p", pflag.ContinueOnError)
	c.AddFlags(p)
	if err := p.Parse([]string{"--log-format=json"}); err != nil || c.Level != "info" || c.Format != "json" {
		t.Errorf("pflag: got %+v, %v", c, err)
	}
}

func TestKlogAndLogrWriteToTheSameLogger(t *testing.T) {
	old := slog.Default()
	t.Cleanup(func() {
		slog.SetDefault(old)
		klog.ClearLogger()
	})
	var out bytes.Buffer
	log, err := NewLogger(&out, LogConfig{Format: "json"})
	if err != nil {
		t.Fatal(err)
	}
	if err := SetDefaultLogger(t.Context(), log); err != nil {
		t.Fatal(err)
	}
	slog.Info("from slog")
	klog.InfoS("from klog", "node", "edge-1")
	klog.V(2).InfoS("hidden klog")
	Logr(log).Info("from logr")
	Logr(log).V(4).Info("hidden logr")
	for _, want := range []string{"from slog", "from klog", `"node":"edge-1"`, "from logr"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in %s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "hidden") {
		t.Errorf("debug lines at level info: %s", out.String())
	}

	verbose, err := NewLogger(&out, LogConfig{Level: "debug"})
	if err != nil {
		t.Fatal(err)
	}
	if err := SetDefaultLogger(t.Context(), verbose); err != nil {
		t.Fatal(err)
	}
	klog.V(4).InfoS("verbose klog")
	if !strings.Contains(out.String(), "verbose klog") {
		t.Error("debug did not raise klog's verbosity")
	}
}

// systemd stands in for the service manager: it returns the socket on which
// the process's messages arrive.
func systemd(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return conn
}

func receive(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 256)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestNotify(t *testing.T) {
	conn := systemd(t)
	for _, step := range []struct {
		send func() error
		want string
	}{
		{Ready, "READY=1"},
		{func() error { return Status("cloud: up") }, "STATUS=cloud: up"},
		{Stopping, "STOPPING=1"},
	} {
		if err := step.send(); err != nil {
			t.Fatal(err)
		}
		if got := receive(t, conn); got != step.want {
			t.Errorf("got %q, want %q", got, step.want)
		}
	}
}

func TestNotifyWithoutSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Ready(); err != nil {
		t.Error(err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "gone"))
	if err := Ready(); err == nil {
		t.Error("no error for a socket that is gone")
	}
}

func TestWatchdogStopsWhenUnhealthy(t *testing.T) {
	conn := systemd(t)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", "")

	var out bytes.Buffer
	log, err := NewLogger(&out, LogConfig{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	checks := 0
	run := Watchdog(log, func(context.Context) error {
		checks++
		switch checks {
		case 1, 2:
			return nil
		default:
			cancel()
			return errors.New("store is stuck")
		}
	})
	if err := run(ctx); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := receive(t, conn); got != "WATCHDOG=1" {
			t.Errorf("got %q, want WATCHDOG=1", got)
		}
	}
	if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 256)); err == nil {
		t.Errorf("a third message of %d bytes, want none while unhealthy", n)
	}
	if !strings.Contains(out.String(), "store is stuck") {
		t.Errorf("log %q does not give the reason", out.String())
	}
}

func TestWatchdogIsOffOutsideSystemd(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	run := Watchdog(slog.New(slog.DiscardHandler), func(context.Context) error {
		t.Error("health asked for nothing")
		return nil
	})
	if err := run(t.Context()); err != nil {
		t.Error(err)
	}
	t.Setenv("WATCHDOG_USEC", "soon")
	if err := run(t.Context()); err == nil {
		t.Error("no error for settings that cannot be read")
	}
}

func TestVersionIsNeverEmpty(t *testing.T) {
	v := ReadVersion()
	for name, s := range map[string]string{
		"version": v.Version, "commit": v.Commit, "go": v.GoVersion, "platform": v.Platform,
	} {
		if s == "" {
			t.Errorf("%s is empty", name)
		}
	}
	if !strings.HasPrefix(v.String(), v.Version) {
		t.Errorf("line %q does not start with the version", v)
	}
}

func TestGroupStopsInGoodOrderAfterAPanic(t *testing.T) {
	t.Parallel()
	stopped := false
	err := Group(t.Context(),
		func(context.Context) error { panic("a secret") },
		func(ctx context.Context) error { <-ctx.Done(); stopped = true; return nil },
	)
	if err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "daemon_test.go") {
		t.Errorf("the error does not say what panicked where: %v", err)
	}
	if !stopped {
		t.Error("the other run was not waited for")
	}
}
