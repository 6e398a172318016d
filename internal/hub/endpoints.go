package hub

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/endpoint"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/pool"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// trackEndpoints makes the tracker by which endpoints follow the node's pods.
func (h *Hub) trackEndpoints() {
	h.endpoints = endpoint.New(endpoint.Config{
		Node: h.cfg.NodeName, Online: h.link.Online, Changed: h.link.Changed, Log: h.log, Registerer: h.cfg.Registerer,
		Pending: func() bool { return h.journal.Stats().Status > 0 },
		Each: func(r schema.GroupVersionResource, namespace string, fn func(string, replica.Kind, []byte) error) error {
			return h.replica.Each(r, namespace, fn)
		},
		Refresh: func(r schema.GroupVersionResource, namespace, name string) error {
			return h.replica.Refresh(r, namespace, name)
		},
	})
}

// overlay is what local readers see in place of the cloud's objects.
func (h *Hub) overlay(r schema.GroupVersionResource, key string, k replica.Kind, base []byte) ([]byte, bool) {
	if endpoint.Holds(r) {
		return h.endpoints.Overlay(r, key, k, base)
	}
	return h.journal.Overlay(r, key, k, base)
}

// show lets local readers see what was kept before a restart, before the
// first of them comes.
func (h *Hub) show() {
	h.journal.Show()
	if h.journal.Stats().Status > 0 {
		h.endpoints.Hold()
	}
}

// runEndpoints begins once it is known whether the cloud is there: if it is,
// there is nothing to do.
func (h *Hub) runEndpoints(ctx context.Context) error {
	h.settle(ctx)
	return h.endpoints.Run(ctx)
}

const (
	// podsEvery is how often the hubs of the pool are asked for the pods of
	// their nodes while the cloud is away, podsPatience how long one may take,
	// and podsLimit what it may say.
	podsEvery    = 5 * time.Second
	podsPatience = 2 * time.Second
	podsLimit    = 128 << 10
	// podsMost bounds the hubs that are asked, as vouching does, and
	// podsAtOnce those that are at a time.
	podsMost   = 96
	podsAtOnce = 16
)

// tellPods answers another hub of the pool what this node's kubelet says of the
// pods that endpoints mention. A kubelet that is dead says nothing.
func (h *Hub) tellPods(w http.ResponseWriter, _ *http.Request) {
	pods := map[string]endpoint.Pod{}
	if own, err := h.ownHeartbeat(); err == nil && time.Since(own.Spoke) <= own.Life {
		pods = h.endpoints.Own()
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(pods) // the peer may be gone
}

// hearPods asks the hubs of the pool for their pods, from the beginning of a cut
// until the cloud shows them as they are. So a Service leads to them where they
// are, and nobody sees them not ready because the cloud has not heard them.
func (h *Hub) hearPods(ctx context.Context) error {
	tick := time.NewTicker(podsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if !h.endpoints.Active() {
			continue
		}
		peers := h.pool.Peers()
		said := make([]map[string]endpoint.Pod, min(len(peers), podsMost))
		var asks errgroup.Group
		asks.SetLimit(podsAtOnce)
		for i := range said {
			asks.Go(func() error {
				pods, err := h.podsOf(ctx, peers[i].Node)
				if err != nil {
					h.log.Debug("peer does not tell of its pods", "peer", peers[i].Node, "err", err)
				}
				said[i] = pods
				return nil
			})
		}
		_ = asks.Wait() // it has no error
		heard := map[string]map[string]endpoint.Pod{}
		for i, pods := range said {
			if pods != nil {
				heard[peers[i].Node] = pods
			}
		}
		h.endpoints.Hear(heard)
	}
}

// podsOf asks the hub of a node for its pods.
func (h *Hub) podsOf(ctx context.Context, node string) (map[string]endpoint.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, podsPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://peer"+pool.PodsPath, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("ask %s for its pods: %w", node, err)
	}
	resp, err := h.pool.Transport(node).RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask %s for its pods: %w", node, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask %s for its pods: it answers %s", node, resp.Status)
	}
	pods := map[string]endpoint.Pod{}
	if err := json.NewDecoder(io.LimitReader(resp.Body, podsLimit)).Decode(&pods); err != nil {
		return nil, fmt.Errorf("ask %s for its pods: %w", node, err)
	}
	for key, pod := range pods {
		for _, address := range pod.Addresses {
			if _, err := netip.ParseAddr(address); err != nil {
				return nil, fmt.Errorf("ask %s for its pods: %s: %w", node, key, err)
			}
		}
	}
	return pods, nil
}

// wrotePod tells the tracker what the kubelet wrote of a pod in the cloud.
func (h *Hub) wrotePod(info request.Info) link.Keep {
	if info.Resource != podsResource || !h.endpoints.Active() {
		return nil
	}
	return func(resp *http.Response) func([]byte) {
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Encoding") != "" {
			return nil
		}
		enc := encodingOf(resp.Header.Get("Content-Type"))
		return func(body []byte) {
			if _, kind, object, err := wire.ReadObject(enc, body); err == nil && kind == "Pod" {
				h.endpoints.Wrote(enc, object)
			}
		}
	}
}
