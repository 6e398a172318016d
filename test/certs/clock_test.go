package certs

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	yurthub "github.com/yurt-edge/yurt/internal/hub"
	"github.com/yurt-edge/yurt/internal/report"
	"github.com/yurt-edge/yurt/test/bed"
)

const year = 365 * 24 * time.Hour

// board is a machine's clocks: that of the day is off by what a test says.
type board struct {
	begun time.Time

	mu  sync.Mutex // guards off
	off time.Duration
}

func (b *board) read() (wall time.Time, up time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Now().Add(b.off), time.Since(b.begun)
}

func (b *board) set(off time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.off = off
}

// boot runs the whole hub in this process, by the clocks of the board, until
// halt or the end of the test.
func (s *site) boot(t *testing.T, b *board) (halt func()) {
	t.Helper()
	var flags yurthub.Flags
	set := pflag.NewFlagSet("hub", pflag.ContinueOnError)
	flags.Add(set)
	must(t, set.Parse([]string{
		"--node-name", s.Node, "--server-addr", s.link.URL(), "--root-dir", s.Dir, "--run-dir", s.Dir,
		"--bootstrap-file", filepath.Join(s.Dir, "bootstrap.conf"), "--enable-dummy-if=false", "--store-key-source", "file",
		"--proxy-secure-port", s.URL[strings.LastIndex(s.URL, ":")+1:], "--serve-port", s.Health[strings.LastIndex(s.Health, ":")+1:],
		"--node-conditions=false",
	}))
	cfg, err := flags.Config()
	must(t, err)
	log, err := os.OpenFile(filepath.Join(s.Dir, "hub.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	registry := prometheus.NewRegistry()
	cfg.Registerer, cfg.Gatherer, cfg.Time = registry, registry, b.read
	cfg.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() {
		if err := yurthub.Run(ctx, cfg); err != nil {
			t.Errorf("hub of %s: %v", s.Node, err)
		}
	})
	halt = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		_ = log.Close()
	})
	t.Cleanup(halt)
	return halt
}

// told waits until the hub says that the machine's clock is off by so much, or
// that the cloud was not heard yet.
func (s *site) told(t *testing.T, known bool, off time.Duration) {
	t.Helper()
	await(t, "word on the clock", func(ctx context.Context) error {
		r, err := report.Ask(ctx, s.Dir)
		if err != nil {
			return err
		}
		ahead := time.Duration(r.Clock.AheadSeconds * float64(time.Second))
		if r.Clock.Known != known || known && (ahead-off).Abs() > time.Minute {
			return fmt.Errorf("the hub says of the clock: %+v", r.Clock)
		}
		return nil
	})
}

// TestWrongClocks runs a node whose clock is wrong: it joins, serves, is set
// right and wrong again, and boots without the cloud.
func TestWrongClocks(t *testing.T) {
	t.Parallel()
	for name, off := range map[string]time.Duration{
		"1970": -time.Since(time.Unix(0, 0)), "behind": -2 * year, "ahead": 2 * year,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := shared.newSite(t, "clock-"+name)
			s.signer.Life(s.Node, year)
			machine := &board{begun: time.Now(), off: off}
			halt := s.boot(t, machine)
			await(t, "start", s.WaitReady)
			s.connect(t)
			await(t, "first word with the cloud", s.whoami)
			s.told(t, true, off)
			watchers := s.watch(t)
			await(t, "reads", s.reads)

			machine.set(0) // by hand, or NTP, while it runs
			s.told(t, true, 0)
			s.write(t)
			s.sees(t, watchers...)
			machine.set(off)
			s.told(t, true, off)
			s.write(t)
			s.sees(t, watchers...)
			for _, w := range watchers {
				w.end()
			}

			// The next boot, alone.
			halt()
			must(t, s.link.Cut(bed.Down))
			s.boot(t, machine)
			await(t, "start without the cloud", s.WaitReady)
			s.told(t, false, 0)
			await(t, "the kubelet's read", func(ctx context.Context) error {
				_, err := s.kubelet.CoreV1().Services("certs").Get(ctx, s.Node, metav1.GetOptions{ResourceVersion: "0"})
				return err
			})
			_, err := s.pod.CoreV1().ConfigMaps("certs").Get(t.Context(), s.Node, metav1.GetOptions{ResourceVersion: "0"})
			if off > 0 {
				// By all that the node knows the token has expired.
				if !apierrors.IsUnauthorized(err) {
					t.Errorf("the pod, by a clock that is ahead: %v", err)
				}
				machine.set(0)
				await(t, "the pod's read, by a clock set right", s.reads)
				machine.set(off)
			} else if err != nil {
				t.Errorf("the pod: %v", err)
			}

			must(t, s.link.Heal())
			await(t, "return", s.whoami)
			s.told(t, true, off)
			watchers = s.watch(t)
			s.write(t)
			s.sees(t, watchers...)
			await(t, "reads", s.reads)
			if n := s.signer.Signed(s.Node); n != 1 {
				t.Errorf("%d client certificates were asked for, one is good for a year", n)
			}
		})
	}
}
