package soak

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/test/bed"
)

// floodEnv holds the orders of a child process that floods the hub.
const floodEnv = "YURT_SOAK_FLOOD"

// orders are what a flood does.
type orders struct {
	Host, Token, Path string
	CA                []byte
	Connections       int
}

// flood asks without pause over many connections until its input ends. It is
// as nice as a pod whose cgroup has the least weight: that one process takes
// the processor from another is the kernel's business, not the hub's.
func flood(text string) {
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19)
	var o orders
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		panic(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	codes := map[int]int{}
	var mu sync.Mutex // guards codes
	var wg sync.WaitGroup
	for range o.Connections {
		wg.Go(func() {
			cfg := &rest.Config{Host: o.Host}
			cfg.CAData = o.CA
			c, err := newCaller(cfg, o.Token)
			if err != nil {
				panic(err)
			}
			for ctx.Err() == nil {
				code, _, err := c.get(ctx, o.Path)
				if err != nil {
					code = 0
				}
				mu.Lock()
				codes[code]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	_ = json.NewEncoder(os.Stdout).Encode(codes)
}

// startFlood starts a flood and returns what ends it and tells what it got.
func startFlood(t *testing.T, token, path string, connections int) (stop func() map[int]int) {
	t.Helper()
	cfg, err := shared.Hub.RESTConfig(&rest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(orders{Host: cfg.Host, Token: token, Path: path, CA: cfg.CAData, Connections: connections})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), floodEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() map[int]int {
		codes := map[int]int{}
		_ = in.Close()
		if err := json.NewDecoder(out).Decode(&codes); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait()
		return codes
	}
}

// latencies asks one after the other, and returns the median and the 99th
// percentile.
func latencies(ctx context.Context, n int, ask func(context.Context) error) (p50, p99 time.Duration, err error) {
	took := make([]time.Duration, n)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for i := range took {
		<-tick.C
		begin := time.Now()
		if err := ask(ctx); err != nil {
			return 0, 0, err
		}
		took[i] = time.Since(begin)
	}
	slices.Sort(took)
	return took[n/2], took[n*99/100], nil
}

// TestOnePodCannotStarveTheKubelet has a pod list ten thousand objects, get
// one, and call without a right credential, each from 200 connections without
// a pause, while the kubelet goes on with its own.
func TestOnePodCannotStarveTheKubelet(t *testing.T) {
	ctx := t.Context()
	token, err := shared.token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	kubelet, err := shared.caller("")
	if err != nil {
		t.Fatal(err)
	}
	defer kubelet.close()
	if err := shared.holds(ctx, kubelet); err != nil {
		t.Fatal(err)
	}
	asks := map[string]func(context.Context) error{
		"get": func(ctx context.Context) error { return kubelet.want(ctx, "/api/v1/nodes/edge-1?resourceVersion=0") },
		"list": func(ctx context.Context) error {
			return kubelet.want(ctx, "/api/v1/pods?fieldSelector=spec.nodeName%3Dedge-1&resourceVersion=0")
		},
	}
	const times = 400
	const most = 250 * time.Millisecond // a tenth of the kubelet's shortest time-out would be a second
	idle := map[string]time.Duration{}
	for name, ask := range asks {
		p50, p99, err := latencies(ctx, times, ask)
		if err != nil {
			t.Fatal(err)
		}
		idle[name] = p99
		t.Logf("%-34s kubelet's %-4s p50 %8s p99 %8s", "alone", name, p50.Round(10*time.Microsecond), p99.Round(10*time.Microsecond))
	}
	for _, load := range []struct{ name, token, path string }{
		{"200 × list of 10 000, protobuf", token, mapPath + "?resourceVersion=0"},
		{"200 × get", token, mapPath + "/object-00000?resourceVersion=0"},
		{"200 × wrong token", "wrong", mapPath},
	} {
		stop := startFlood(t, load.token, load.path, 200)
		if err := bed.Until(ctx, time.Minute, func(ctx context.Context) error { return shared.inFlight(ctx, token, 1) }); err != nil {
			t.Error(err)
		}
		for name, ask := range asks {
			p50, p99, err := latencies(ctx, times, ask)
			if err != nil {
				t.Fatalf("%s: the kubelet's %s: %v", load.name, name, err)
			}
			t.Logf("%-34s kubelet's %-4s p50 %8s p99 %8s, %.1f × alone", load.name, name,
				p50.Round(10*time.Microsecond), p99.Round(10*time.Microsecond), float64(p99)/float64(idle[name]))
			if p99 > most {
				t.Errorf("%s: the kubelet's %s takes %s at the 99th percentile, may take %s", load.name, name, p99, most)
			}
		}
		t.Logf("%-34s the pod got %v", load.name, stop())
	}
}

// inFlight fails unless the hub serves so many requests, or has served many.
func (w *world) inFlight(ctx context.Context, token string, least int) error {
	health, err := newHealth(w.Hub.Health, token)
	if err != nil {
		return err
	}
	text, err := health(ctx, "/metrics")
	if err != nil {
		return err
	}
	var n float64
	for _, name := range []string{"node_yurthub_requests_in_flight ", `node_yurthub_refused_total{reason="unauthenticated"} `} {
		if _, rest, ok := strings.Cut(text, "\n"+name); ok {
			var v float64
			_, _ = fmt.Sscan(rest, &v)
			n += v
		}
	}
	if n < float64(least) {
		return fmt.Errorf("%v requests are in flight", n)
	}
	return nil
}

// TestMemoryKeepsBelowTheCeiling has 200 watchers begin with ten thousand
// objects, and 100 clients who ask for all of them and do not read, in a hub
// whose ceiling is low.
func TestMemoryKeepsBelowTheCeiling(t *testing.T) {
	ctx := t.Context()
	const ceiling = 120 // MB
	shared.Hub.Stop()
	t.Setenv("GOMEMLIMIT", "110MiB")
	if err := shared.Hub.Start(ctx); err != nil {
		t.Fatal(err)
	}
	token, err := shared.token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c, err := shared.caller(token)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := shared.holds(ctx, c); err != nil {
		t.Fatal(err)
	}
	pid := shared.Hub.PID()
	var answers []*http.Response
	defer func() {
		for _, r := range answers {
			_ = r.Body.Close()
		}
	}()
	shed := 0
	ask := func(path string) error {
		resp, err := c.open(ctx, path)
		if err != nil {
			return err
		}
		if resp.StatusCode == http.StatusTooManyRequests {
			shed++
			return resp.Body.Close()
		}
		answers = append(answers, resp)
		return nil
	}
	for range 90 { // who never read
		if err := ask(mapPath + "?resourceVersion=0"); err != nil {
			t.Fatal(err)
		}
	}
	g, reading := errgroup.WithContext(ctx)
	for range 200 {
		g.Go(func() error {
			resp, err := c.open(reading, mapPath+"?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=5")
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			_, _ = io.Copy(io.Discard, resp.Body)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	used, err := anonymous(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%.0f MB anonymous after 200 watchers of %d objects and 90 lists that nobody reads; %d were shed", used, objects, shed)
	if used > ceiling {
		t.Errorf("%.0f MB, the ceiling is %d", used, ceiling)
	}
	if shared.Hub.PID() != pid {
		t.Error("the hub died")
	}
	kubelet, err := shared.caller("")
	if err != nil {
		t.Fatal(err)
	}
	defer kubelet.close()
	if err := kubelet.want(ctx, mapPath+"?resourceVersion=0"); err != nil {
		t.Errorf("the kubelet: %v", err)
	}
}
