package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/network"
	"github.com/yurt-edge/yurt/test/bed"
)

func main() {
	log.SetFlags(0)
	if worker, err := beWorker(); worker {
		if err != nil {
			log.Fatal("worker: ", err)
		}
		return
	}
	opts := options{scale: defaultScale}
	flag.BoolVar(&opts.short, "short", false, "fewer and shorter rounds: under 3 minutes instead of 15")
	flag.BoolVar(&opts.http1, "http1", false, "ask over HTTP/1.1 instead of HTTP/2, which client-go uses")
	flag.DurationVar(&opts.cut, "cut", 10*time.Second, "how long the link is cut before a reconnect is timed")
	flag.StringVar(&opts.only, "only", "", "regular expression of the sections to run (default all)")
	flag.StringVar(&opts.json, "json", "", "file to write the figures to, as JSON")
	flag.StringVar(&opts.merge, "merge", "", "JSON file of more figures to show, such as the demo's")
	flag.StringVar(&opts.profiles, "profiles", "", "directory for CPU and heap profiles: of the hub, or with -scale of a worker and the API server")
	flag.StringVar(&opts.logs, "logs", "", "with -scale: directory for the hubs' logs, at debug")
	flag.BoolVar(&opts.scaled, "scale", false, "measure pools of many hubs instead of one hub")
	opts.scale.flags(flag.CommandLine)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, opts, os.Stdout, os.Stderr)
	stop()
	if err != nil {
		log.Fatal("bench: ", err)
	}
}

type options struct {
	short, http1                      bool
	cut                               time.Duration
	only, json, merge, profiles, logs string
	scaled                            bool
	scale                             scale
}

// sections are measured in this order: those that want few objects in the
// cluster come first.
func sections() []section {
	return []section{
		{"binary", 0, (*bench).binarySize},
		{"forward", 0, (*bench).forward},
		{"start", 0, (*bench).start},
		{"informer", 0, (*bench).informers},
		{"disk", 0, (*bench).disk},
		{"kill", 0, (*bench).kills},
		{"replica", 0, (*bench).replica},
		{"fan-out", 0, (*bench).fanOut},
		{"filters", 0, (*bench).filters},
		{"uplink", 0, (*bench).uplink},
		{"reconnect", 0, (*bench).reconnect},
		{"links", 0, (*bench).links},
		{"large", 0, (*bench).large},
	}
}

type section struct {
	name   string
	budget time.Duration // what is not measured by then is not; 0: no end
	run    func(*bench, context.Context) error
}

func (s section) within(ctx context.Context, b *bench) error {
	if s.budget > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.budget, fmt.Errorf("not done after %s", s.budget))
		defer cancel()
	}
	return s.run(b, ctx)
}

// bench is a control plane and what is measured against it.
type bench struct {
	options
	report
	dir    string
	binary string
	cloud  *playground.ControlPlane
	admin  *kubernetes.Clientset
	token  string // of a ServiceAccount that may do anything
	node   int    // of hubs so far

	manager *manager // of the pools, if scaled
	fleets  int      // so far
}

// run writes the table to out and tells on log how far it is.
func run(ctx context.Context, opts options, out, log io.Writer) error {
	only, err := regexp.Compile(opts.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	debug.SetGCPercent(400) // the client should cost little
	dir, err := os.MkdirTemp("", "yurt-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // it is temporary
	b := &bench{options: opts, dir: dir, report: report{log: log, columns: [2]string{"direct", "hub"}}}
	cloud := playground.ControlPlaneConfig{
		Dir: filepath.Join(dir, "cloud"), Progress: playground.NewProgress(log), SANs: network.LoopAddresses(),
	}
	if opts.scaled {
		// No kubelet renews a lease here, and nobody shall wonder.
		b.columns = [2]string{"sharing off", "sharing on"}
	} else {
		cloud.ControllerManager = true
		if b.binary, err = bed.Build(ctx); err != nil {
			return err
		}
	}
	b.cloud, err = playground.StartControlPlane(ctx, cloud)
	if err != nil {
		return err
	}
	defer b.cloud.Stop()
	defer func() {
		if b.manager != nil {
			b.manager.stop()
		}
	}()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	failed := b.measure(ctx, only)
	if opts.merge != "" {
		if err := b.report.merge(opts.merge); err != nil {
			return err
		}
	}
	if err := b.print(out); err != nil {
		return err
	}
	if opts.json != "" {
		if err := b.writeJSON(opts.json); err != nil {
			return err
		}
	}
	return failed
}

// measure runs the sections. One that fails does not keep the others from
// being measured.
func (b *bench) measure(ctx context.Context, only *regexp.Regexp) error {
	var failed []string
	all := sections()
	if b.scaled {
		all = scaleSections()
	}
	for _, s := range all {
		if !only.MatchString(s.name) {
			continue
		}
		b.section = s.name
		start := time.Now()
		if err := s.within(ctx, b); err != nil {
			fmt.Fprintf(b.log, "%s: %v\n", s.name, err)
			why := strings.ReplaceAll(err.Error(), "\n", " ")
			b.add(Row{What: "not measured", Note: why[:min(len(why), 300)]}, bar{})
			failed = append(failed, s.name)
		}
		fmt.Fprintf(b.log, "%s took %s\n", s.name, time.Since(start).Round(time.Second))
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if failed != nil {
		return fmt.Errorf("not measured: %s", strings.Join(failed, ", "))
	}
	return nil
}

// pick returns the first value in a full run and the second in a short one.
func pick[T any](b *bench, full, short T) T {
	if b.short {
		return short
	}
	return full
}
