package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/yurt-edge/yurt/test/bed"
)

// hub is a hub under measurement, with a link to the cloud if it has one.
type hub struct {
	*bed.Hub
	bench *bench
	link  *bed.Link // nil: the hub reaches the API server without a relay
	user  target    // the ServiceAccount, through the hub
}

// startHub starts a hub on a node of its own. A relayed hub reaches the cloud
// over a link that can be cut, which costs processor time in this process.
func (b *bench) startHub(ctx context.Context, relayed bool, args ...string) (*hub, error) {
	b.node++
	node := "bench-" + strconv.Itoa(b.node)
	h := &hub{bench: b}
	server := b.cloud.URL
	if relayed {
		var err error
		if h.link, err = bed.NewLink(server); err != nil {
			return nil, err
		}
		server = h.link.URL()
	}
	var err error
	h.Hub, err = bed.NewHub(ctx, b.cloud, b.binary, node, filepath.Join(b.dir, node), server)
	if err != nil {
		return nil, err
	}
	h.Args = append([]string{"--log-level", "info"}, args...)
	if err := h.Start(ctx); err != nil {
		h.close()
		return nil, err
	}
	cfg := b.cloud.RESTConfig()
	cfg.BearerToken = b.token
	if cfg, err = h.RESTConfig(cfg); err == nil {
		cfg.CertFile, cfg.CertData = "", nil
		h.user, err = newTarget(cfg, b.http1)
	}
	if err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// kubelet is the node's own user, direct and through the hub.
func (h *hub) kubelet() (direct, through target, err error) {
	cfg, err := h.KubeletConfig()
	if err != nil {
		return target{}, target{}, err
	}
	if through, err = newTarget(cfg, h.bench.http1); err != nil {
		return target{}, target{}, err
	}
	direct = h.bench.direct()
	direct.token, direct.tls = "", direct.tls.Clone()
	direct.tls.Certificates = through.tls.Certificates
	return direct, through, nil
}

func (h *hub) close() {
	h.Kill()
	if h.link != nil {
		h.link.Close()
	}
	_ = os.RemoveAll(h.Dir) // it is temporary
}

// forget removes the hub's store: its next start is its first.
func (h *hub) forget() error { return os.RemoveAll(filepath.Join(h.Dir, "store")) }

// uplink returns the bytes that have passed over the link, both ways.
func (h *hub) uplink() float64 {
	up, down := h.link.Bytes()
	return float64(up + down)
}

// holds waits until the hub itself can list n objects at path.
func (h *hub) holds(ctx context.Context, path string, n int) error {
	c := h.user.connect()
	defer c.close()
	var got int
	err := until(ctx, 2*time.Minute, 20*time.Millisecond, func() (bool, error) {
		names, _, err := c.list(ctx, path+"?resourceVersion=0")
		got = len(names)
		return err == nil && got == n, nil
	})
	if err != nil {
		return fmt.Errorf("hub holds %d of %d objects of %s: %w", got, n, path, err)
	}
	return nil
}

// quiet waits until the hub has written nothing to disk for a while.
func (h *hub) quiet(ctx context.Context) error {
	last, since := -1.0, time.Now()
	return until(ctx, time.Minute, 50*time.Millisecond, func() (bool, error) {
		p, err := readProcess(h.PID())
		if err != nil {
			return false, err
		}
		if p.written != last {
			last, since = p.written, time.Now()
		}
		return time.Since(since) > time.Second, nil
	})
}

// profile takes a CPU profile while the load runs, and a heap profile then,
// if profiles are wanted.
func (h *hub) profile(ctx context.Context, name string, load func() error) error {
	if h.bench.profiles == "" {
		return load()
	}
	if err := os.MkdirAll(h.bench.profiles, 0o750); err != nil {
		return fmt.Errorf("take profile: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- h.fetch(ctx, "/debug/pprof/profile?seconds=4", name+".cpu") }()
	err := load()
	if perr := <-done; err == nil {
		err = perr
	}
	if err == nil {
		err = h.fetch(ctx, "/debug/pprof/heap", name+".heap")
	}
	return err
}

func (h *hub) fetch(ctx context.Context, path, name string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.Health+path, nil)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", path, err)
	}
	req.Header.Set("Authorization", "Bearer "+h.bench.token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("fetch %s: %d: %s", path, resp.StatusCode, text)
	}
	return os.WriteFile(filepath.Join(h.bench.profiles, name), text, 0o600)
}

// until asks again and again until a condition holds.
func until(ctx context.Context, budget, pause time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, budget, fmt.Errorf("waited %s", budget))
	defer cancel()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// pause waits for a time that is itself part of a measurement.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
