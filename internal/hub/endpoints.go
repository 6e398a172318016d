package hub

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
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
	// podsEvery is how often other hubs are asked for the pods of their nodes while
	// the cloud is away, podsPatience how long one may take, and podsLimit what it
	// may say.
	podsEvery    = 5 * time.Second
	podsPatience = 2 * time.Second
	podsLimit    = 2 << 20
	// podsMost bounds the hubs that are asked in a round, as vouching does,
	// podsDirect those that are by a hub which follows another, and podsAtOnce
	// those that are at a time. If that other one has not answered in more than
	// podsFailed rounds in a row, it is as if there was none.
	podsMost   = 96
	podsDirect = 4
	podsAtOnce = 16
	podsFailed = 3
	// podsAll asks a hub for what it knows of others, too.
	podsAll = "all"
)

// peersPods are what the hubs of the pool say of their nodes' pods.
type peersPods struct {
	mu    sync.Mutex // guards the following
	words map[string]endpoint.Word
	asked time.Time // when another hub last asked for them
}

// hear takes a word that is later than what was heard of the node before. One
// without pods says that nothing is known of them now.
func (p *peersPods) hear(node string, w endpoint.Word) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, ok := p.words[node]
	if ok && (!w.At.After(old.At) || w.Pods == nil && old.Pods != nil && time.Since(old.At) <= endpoint.Good) {
		return
	}
	if p.words == nil {
		p.words = map[string]endpoint.Word{}
	}
	p.words[node] = w
}

// fresh returns the words that are good, and forgets the others.
func (p *peersPods) fresh() map[string]endpoint.Word {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.words, func(_ string, w endpoint.Word) bool { return time.Since(w.At) > endpoint.Good })
	return maps.Clone(p.words)
}

// wanted reports whether another hub asked for them of late.
func (p *peersPods) wanted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.asked.IsZero() && time.Since(p.asked) <= endpoint.Good
}

// want notes that another hub asks for them.
func (p *peersPods) want() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = time.Now()
}

// toldPods is a word on its way.
type toldPods struct {
	Age  int64                   `json:"age"`  // in milliseconds
	Pods map[string]endpoint.Pod `json:"pods"` // null: nothing is known
}

// tellPods answers another hub of the pool, by node, what this node's kubelet
// says of the pods that endpoints mention, and if it asks for all what other hubs
// said of theirs. A kubelet that is dead says that it has none; of one that was
// not heard since the hub started nothing is known.
func (h *Hub) tellPods(w http.ResponseWriter, r *http.Request) {
	told := map[string]toldPods{}
	if r.URL.Query().Has(podsAll) {
		h.peersPods.want()
		for node, w := range h.peersPods.fresh() {
			told[node] = toldPods{time.Since(w.At).Milliseconds(), w.Pods}
		}
	}
	own := toldPods{}
	switch beat, err := h.ownHeartbeat(); {
	case err != nil || beat.Spoke.IsZero():
	case time.Since(beat.Spoke) <= beat.Life:
		own.Pods = h.endpoints.Own()
	default:
		own.Pods = map[string]endpoint.Pod{}
	}
	told[h.cfg.NodeName] = own
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(told) // the peer may be gone
}

// hearPods asks the hubs of the pool for their pods, from the beginning of a cut
// until the cloud shows them as they are. So a Service leads to them where they
// are, and nobody sees them not ready because the cloud has not heard them.
//
// Whom this hub follows is asked for all, and does the same for as long as it is
// asked: so in a pool the leader asks everybody, and everybody the leader. Who is
// not heard of in that way is asked directly.
func (h *Hub) hearPods(ctx context.Context) error {
	tick := time.NewTicker(podsEvery)
	defer tick.Stop()
	var since time.Time // it is wanted; zero: it is not
	failed := 0         // rounds in a row in which whom this hub follows did not answer
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		switch {
		case !h.endpoints.Active() && !h.peersPods.wanted():
			since, failed = time.Time{}, 0
			continue
		case since.IsZero():
			since = time.Now()
		}
		if failed++; h.askPods(ctx, since, failed > podsFailed) {
			failed = 0
		}
		h.endpoints.Hear(h.peersPods.fresh())
	}
}

// askPods is one round, of those since. It reports whether whom this hub follows
// has answered. If not, nobody else is asked either, since soon another one is
// followed; unless the hub is alone.
func (h *Hub) askPods(ctx context.Context, since time.Time, alone bool) (answered bool) {
	silence, most := time.Duration(0), podsMost // of a node before it is asked directly, and how many are
	if up, _ := h.pool.Following(); up != "" {
		if answered = h.podsOf(ctx, up, true); answered {
			silence, most = 2*podsEvery+podsPatience, podsDirect
		} else if !alone {
			return false
		}
	}
	words := h.peersPods.fresh()
	heard := func(node string) time.Time {
		if w, ok := words[node]; ok && w.At.After(since) {
			return w.At
		}
		return since
	}
	var nodes []string
	for _, p := range h.pool.Peers() {
		if time.Since(heard(p.Node)) >= silence {
			nodes = append(nodes, p.Node)
		}
	}
	slices.SortStableFunc(nodes, func(a, b string) int { return heard(a).Compare(heard(b)) })
	var asks errgroup.Group
	asks.SetLimit(podsAtOnce)
	for _, node := range nodes[:min(len(nodes), most)] {
		asks.Go(func() error {
			h.podsOf(ctx, node, false)
			return nil
		})
	}
	_ = asks.Wait() // it has no error
	return answered
}

// podsOf asks the hub of a node for its pods, or for all that it knows, and
// reports whether it answers.
func (h *Hub) podsOf(ctx context.Context, node string, all bool) bool {
	asked := time.Now()
	told, err := h.askForPods(ctx, node, all)
	if err != nil {
		h.log.Debug("peer does not tell of its pods", "peer", node, "err", err)
		return false
	}
	member := h.pool.Membership()
	for of, t := range told {
		if of != h.cfg.NodeName && member.Has(of) && (all || of == node) && t.Age >= 0 && t.Age <= endpoint.Good.Milliseconds() {
			h.peersPods.hear(of, endpoint.Word{Pods: t.Pods, At: asked.Add(-time.Duration(t.Age) * time.Millisecond)})
		}
	}
	return true
}

func (h *Hub) askForPods(ctx context.Context, node string, all bool) (map[string]toldPods, error) {
	ctx, cancel := context.WithTimeout(ctx, podsPatience)
	defer cancel()
	target := "https://peer" + pool.PodsPath
	if all {
		target += "?" + podsAll
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, http.NoBody)
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
	told := map[string]toldPods{}
	if err := json.NewDecoder(io.LimitReader(resp.Body, podsLimit)).Decode(&told); err != nil {
		return nil, fmt.Errorf("ask %s for its pods: %w", node, err)
	}
	for of, t := range told {
		for key, pod := range t.Pods {
			for _, address := range pod.Addresses {
				if _, err := netip.ParseAddr(address); err != nil {
					return nil, fmt.Errorf("ask %s for its pods: %s of %s: %w", node, key, of, err)
				}
			}
		}
	}
	return told, nil
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
