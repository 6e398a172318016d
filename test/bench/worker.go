package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"

	yurthub "github.com/yurt-edge/yurt/internal/hub"
	hubreport "github.com/yurt-edge/yurt/internal/report"
)

// A worker is this program once more, with many hubs in it: a process may have
// only so many open files. It is told its hubs on standard input, ends with
// that, and tells on standard output, a line each:
//
//	ready <hub>                  the hub has all, and a local watcher
//	seen <hub> <update> <time>   the watcher got an update
//	lost <hub> <reason>          the watcher's stream ended; there is another
//	shared <bytes>               the bytes that its hubs took from the cloud of what
//	                             their pools share, if it was asked
//
// After its hubs it is asked "shared", and told "profile <file>" to begin a
// profile of its processors' time and "profile" to end it.
const workerEnv = "YURT_BENCH_WORKER"

// What a hub may take to be ready, on a machine that starts many.
const (
	readyBudget = 3 * time.Minute
	readyPoll   = 100 * time.Millisecond
	readyAtOnce = 6 // hubs of one worker that start at the same time
)

// order is what a worker is told.
type order struct {
	Slices int  // that each hub must hold before it is ready
	Debug  bool // log all
	// Spread is the time within which all hubs start, in any order. Without it
	// they start in their order, a few at a time.
	Spread time.Duration
	Hubs   []member
}

// member is a hub of a fleet.
type member struct {
	Index          int
	Node, Pool, IP string
	Server, Dir    string
	Cert, Key      []byte // PEM; of the node's own user
}

// beWorker works if the process was started as a worker, and reports whether
// it was.
func beWorker() (worker bool, err error) {
	if os.Getenv(workerEnv) == "" {
		return false, nil
	}
	return true, work(os.Stdin, os.Stdout)
}

type worker struct {
	order
	log *slog.Logger

	mu         sync.Mutex // guards the following
	out        io.Writer
	registries []*prometheus.Registry // of the hubs
}

func (w *worker) tell(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fmt.Fprintf(w.out, format+"\n", args...)
}

func work(in io.Reader, out io.Writer) error {
	w := &worker{out: out}
	orders := json.NewDecoder(in)
	if err := orders.Decode(&w.order); err != nil {
		return fmt.Errorf("read order: %w", err)
	}
	level := slog.LevelWarn
	if w.Debug {
		level = slog.LevelDebug
	}
	w.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // ends with the input
		for lines := bufio.NewScanner(io.MultiReader(orders.Buffered(), in)); lines.Scan(); {
			switch word, file, _ := strings.Cut(lines.Text(), " "); word {
			case "shared":
				w.tell("shared %.0f", w.shared())
			case "profile":
				if err := w.profile(file); err != nil {
					w.log.Warn("no profile", "err", err)
				}
			}
		}
		cancel()
	}()
	all, ctx := errgroup.WithContext(ctx)
	slots := make(chan struct{}, readyAtOnce)
	for i := range w.Hubs {
		if w.Spread > 0 {
			all.Go(func() error {
				if err := pause(ctx, rand.N(w.Spread)); err != nil {
					return nil //nolint:nilerr // it was told to end
				}
				return w.runHub(ctx, &w.Hubs[i], func() {})
			})
			continue
		}
		select {
		case slots <- struct{}{}:
			all.Go(func() error { return w.runHub(ctx, &w.Hubs[i], func() { <-slots }) })
		case <-ctx.Done():
		}
	}
	return all.Wait()
}

// profile begins a profile in a file, or ends it if there is none.
func (w *worker) profile(file string) error {
	pprof.StopCPUProfile()
	if file == "" {
		return nil
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return pprof.StartCPUProfile(f) // the file ends with the process
}

// runHub runs a hub and its watcher until ctx ends. It calls started once.
func (w *worker) runHub(ctx context.Context, m *member, started func()) error {
	var flags yurthub.Flags
	fs := pflag.NewFlagSet("hub", pflag.ContinueOnError)
	flags.Add(fs)
	err := fs.Parse([]string{
		"--node-name", m.Node, "--nodepool-name", m.Pool, "--node-ip", m.IP, "--bind-address", m.IP,
		"--server-addr", m.Server, "--root-dir", m.Dir, "--run-dir", m.Dir, "--store-key-source", "file", "--enable-dummy-if=false",
	})
	if err != nil {
		return fmt.Errorf("hub of %s: %w", m.Node, err)
	}
	cfg, err := flags.Config()
	if err != nil {
		return fmt.Errorf("hub of %s: %w", m.Node, err)
	}
	registry := prometheus.NewRegistry()
	w.mu.Lock()
	w.registries = append(w.registries, registry)
	w.mu.Unlock()
	cfg.Log, cfg.Registerer, cfg.Gatherer = w.log.With("node", m.Node), registry, registry
	g, running := errgroup.WithContext(ctx)
	g.Go(func() error { return yurthub.Run(running, cfg) })
	g.Go(func() error {
		err := w.await(running, m)
		started()
		if err != nil {
			return err
		}
		return w.follow(running, m, net.JoinHostPort(m.IP, strconv.Itoa(cfg.ProxyPort)))
	})
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("hub of %s: %w", m.Node, err)
	}
	return nil
}

// shared is what the hubs took from the cloud of what their pools share.
func (w *worker) shared() (bytes float64) {
	w.mu.Lock()
	registries := slices.Clone(w.registries)
	w.mu.Unlock()
	for _, r := range registries {
		families, _ := r.Gather() // what cannot be gathered is none of these
		for _, f := range families {
			if f.GetName() != "node_yurthub_shared_bytes_total" {
				continue
			}
			for _, m := range f.GetMetric() {
				if m.GetLabel()[0].GetValue() == "cloud" {
					bytes += m.GetCounter().GetValue()
				}
			}
		}
	}
	return bytes
}

// await returns once the hub holds all EndpointSlices, by its own word. To ask
// for them would make it fetch them.
func (w *worker) await(ctx context.Context, m *member) error {
	return until(ctx, readyBudget, readyPoll, func() (bool, error) {
		state, err := hubreport.Ask(ctx, m.Dir)
		if err != nil {
			return false, nil //nolint:nilerr // it does not listen yet
		}
		for _, s := range state.Scopes {
			if s.Scope == "discovery.k8s.io/v1/endpointslices" {
				return s.Synced && s.Objects >= w.Slices, nil
			}
		}
		return false, nil
	})
}

// follow watches EndpointSlices through the hub, as a kube-proxy does.
func (w *worker) follow(ctx context.Context, m *member, address string) error {
	bundle, err := os.ReadFile(filepath.Join(m.Dir, "pki", "ca-bundle.crt"))
	if err != nil {
		return fmt.Errorf("read the hub's CA bundle: %w", err)
	}
	user, err := newTarget(&rest.Config{
		Host: "https://" + address, TLSClientConfig: rest.TLSClientConfig{CAData: bundle, CertData: m.Cert, KeyData: m.Key},
	}, false)
	if err != nil {
		return err
	}
	seen := func(update int) { w.tell("seen %d %d %d", m.Index, update, time.Now().UnixNano()) }
	for first := true; ; first = false {
		stream, err := user.watch(ctx, "/apis/discovery.k8s.io/v1/endpointslices", "0", seen)
		if err != nil && first && ctx.Err() == nil {
			return fmt.Errorf("watch through the hub: %w", err)
		}
		if first {
			w.tell("ready %d", m.Index)
		}
		if err == nil {
			<-stream.done
			err = stream.end
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was told to end
		}
		w.tell("lost %d %v", m.Index, err)
		if err := pause(ctx, time.Second); err != nil {
			return nil //nolint:nilerr // it was told to end
		}
	}
}
