package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/api/crds"
)

const (
	filtered   = "filtered" // the namespace, its one Service, and the pool
	proxyAgent = "kube-proxy/bench"

	filteredRate     = 100 // updates per second
	filteredWatchers = 10
)

// filters measures what a filter costs a component, beside one that sees the
// same EndpointSlices as they are: a list, and a watch of the same updates.
func (b *bench) filters(ctx context.Context) error {
	for _, text := range crds.YAML() {
		if err := b.cloud.Apply(ctx, string(text)); err != nil {
			return err
		}
	}
	err := until(ctx, time.Minute, 100*time.Millisecond, func() (bool, error) {
		return b.cloud.Apply(ctx, "apiVersion: apps.openyurt.io/v1beta2\nkind: NodePool\nmetadata: {name: "+filtered+"}\nspec: {type: Edge}\n") == nil, nil
	})
	if err != nil {
		return fmt.Errorf("make a pool: %w", err)
	}
	const slices = 1000
	if err := b.slices(ctx, filtered, slices); err != nil {
		return err
	}
	_, err = b.admin.CoreV1().Services(filtered).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: filtered, Annotations: map[string]string{"openyurt.io/topologyKeys": "openyurt.io/nodepool"}},
		Spec:       corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("make a service: %w", err)
	}
	h, err := b.startHub(ctx, false, "--nodepool-name="+filtered)
	if err != nil {
		return err
	}
	defer h.close()
	list := fmt.Sprintf(slicePath, filtered)
	if err := h.holds(ctx, list, slices); err != nil {
		return err
	}
	proxy := h.user
	proxy.agent = proxyAgent
	for _, near := range []int{endpoints, 2, 0} {
		if err := b.shows(ctx, proxy, near); err != nil {
			return err
		}
		for _, form := range []string{protobuf, jsonType} {
			if err := b.filteredList(ctx, h, proxy, load{path: list + "?resourceVersion=0", accept: form}, near); err != nil {
				return err
			}
		}
	}
	if err := b.memory(h, "after filtered LISTs", bar{}); err != nil {
		return err
	}
	if err := b.shows(ctx, proxy, 2); err != nil {
		return err
	}
	if err := b.filteredWatch(ctx, h, proxy); err != nil {
		return err
	}
	return b.accessFilters(ctx, h)
}

// shows makes the nodes of so many of a slice's first endpoints near, and returns once a list
// shows no others.
func (b *bench) shows(ctx context.Context, proxy target, near int) error {
	nodes := map[string]bool{}
	all := newSlice(filtered, "any", endpoints).Endpoints
	for i, names := 0, []string{}; ; i++ {
		if i == near {
			patch, err := json.Marshal(map[string]any{"status": map[string]any{"nodes": names}})
			if err != nil {
				return fmt.Errorf("encode: %w", err)
			}
			err = b.admin.RESTClient().Patch(types.MergePatchType).AbsPath("/apis/apps.openyurt.io/v1beta2/nodepools/" + filtered + "/status").
				Body(patch).Do(ctx).Error()
			if err != nil {
				return fmt.Errorf("change the pool: %w", err)
			}
			break
		}
		if node := *all[i].NodeName; !nodes[node] {
			nodes[node] = true
			names = append(names, node)
		}
	}
	want := 0
	for i := range all {
		if nodes[*all[i].NodeName] {
			want++
		}
	}
	c := proxy.connect()
	defer c.close()
	last := -1
	err := until(ctx, time.Minute, 50*time.Millisecond, func() (bool, error) {
		text, err := c.read(ctx, fmt.Sprintf(slicePath, filtered)+"/object-00999?resourceVersion=0", jsonType)
		if err != nil {
			return false, err
		}
		var slice discoveryv1.EndpointSlice
		if err := json.Unmarshal(text, &slice); err != nil {
			return false, fmt.Errorf("read slice: %w", err)
		}
		last = len(slice.Endpoints)
		return last == want, nil
	})
	if err != nil {
		return fmt.Errorf("the filter shows %d endpoints, not %d: %w", last, want, err)
	}
	return nil
}

// filteredList compares lists with the filter and without.
func (b *bench) filteredList(ctx context.Context, h *hub, proxy target, l load, near int) error {
	s := connect(h.user, proxy, 2)
	defer s.close()
	c, err := s.measure(ctx, []int{h.PID()}, l, pick(b, 5, 3), pick(b, 2*time.Second, time.Second))
	if err != nil {
		return err
	}
	what := map[int]string{endpoints: "all", 2: "a tenth", 0: "none"}[near] + " of the endpoints near, " + l.accept
	plain, seen, ratio := c.cost.medians()
	b.hub("LIST of 1 000 slices, "+what+": processor time, of an unfiltered one's", "×", ratio, atMost(1.3),
		fmt.Sprintf("%.0f and %.0f µs; answers per second %.2f ×; %d and %d KB", seen, plain, ratioOf(c.pace), c.size[1]/1000, c.size[0]/1000))
	return nil
}

func ratioOf(r rounds) float64 { _, _, ratio := r.medians(); return ratio }

// filteredWatch compares when watchers get the same updates: at the API server,
// and at the hub with the filter and without.
func (b *bench) filteredWatch(ctx context.Context, h *hub, proxy target) error {
	updates := filteredRate * pick(b, 20, 5)
	rounds := pick(b, 3, 1)
	w, err := b.newWriter(filtered, endpoints, 200, rounds*updates)
	if err != nil {
		return err
	}
	var p50, p99 [3][]float64
	for range rounds {
		var got [3]*audience // direct, as it is, filtered
		for i, t := range []target{b.direct(), h.user, proxy} {
			if got[i], err = w.audience(ctx, t, filteredWatchers, w.next, updates); err != nil {
				return err
			}
			defer got[i].close()
		}
		first, _, err := w.write(ctx, updates, filteredRate)
		if err != nil {
			return err
		}
		var g errgroup.Group
		for _, a := range got {
			g.Go(func() error { return a.wait(ctx, 30*time.Second) })
		}
		if err := g.Wait(); err != nil {
			return err
		}
		for i, a := range got {
			var latency []float64
			for _, watcher := range a.got {
				for k := range watcher {
					latency = append(latency, ms(watcher[k].Load()-w.sent[first+k].Load()))
				}
			}
			p50[i], p99[i] = append(p50[i], quantile(latency, 0.5)), append(p99[i], quantile(latency, 0.99))
			a.close()
		}
	}
	for _, f := range []struct {
		what string
		of   [3][]float64
		bar  bar
	}{{"p50", p50, bar{}}, {"p99", p99, atMost(1)}} {
		direct, plain, seen := median(f.of[0]), median(f.of[1]), median(f.of[2])
		b.hub("watch: latency added by the filter, "+f.what, "ms", seen-plain, f.bar, fmt.Sprintf(
			"from the write to %d watchers each, same updates: filtered %.1f, as it is %.1f, at the API server %.1f ms", filteredWatchers, seen, plain, direct))
	}
	return nil
}
