package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const (
	looked = "looked" // the namespace, and its one Service

	lookedEndpoints = 10
)

// accessFilters measures what an AccessFilter costs beside a filter of the hub
// that does the same: the first list of a component, for which each object is
// looked at, and the next, for which that is done. Two nodes of the pool are
// near.
func (b *bench) accessFilters(ctx context.Context, h *hub) error {
	const n = 10_000
	rounds := pick(b, 5, 3)
	err := b.create(ctx, slicePath, looked, n, func(name string) runtime.Object { return newSlice(looked, name, lookedEndpoints) })
	if err != nil {
		return err
	}
	_, err = b.admin.CoreV1().Services(looked).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: looked, Annotations: map[string]string{"openyurt.io/topologyKeys": "openyurt.io/nodepool"}},
		Spec:       corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("make a service: %w", err)
	}
	// Of each kind a component for each round, and one that is asked whether
	// the filters are there.
	kinds := []string{"plain", "builtin", "access"}
	component := func(kind string, round int) target {
		t := h.user
		t.agent = fmt.Sprintf("%s-%d/bench", kind, round)
		return t
	}
	var names [3][]string
	for k, kind := range kinds {
		for round := range rounds + 1 {
			names[k] = append(names[k], fmt.Sprintf("%s-%d", kind, round))
		}
	}
	err = b.cloud.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: yurt-hub-cfg, namespace: kube-system, labels: {openyurt.io/configmap-name: yurt-hub-cfg}}
data: {servicetopology: "%s"}
---
apiVersion: network.openyurt.io/v1alpha1
kind: AccessFilter
metadata: {name: near}
spec:
  components: [%s]
  resources: [{group: discovery.k8s.io, version: v1, resource: endpointslices}]
  set: [{path: /endpoints, value: "object.endpoints.filter(e, e.nodeName in pool.nodes)"}]
`, strings.Join(names[1], ","), strings.Join(names[2], ", ")))
	if err != nil {
		return err
	}
	list := fmt.Sprintf(slicePath, looked)
	if err := h.holds(ctx, list, n); err != nil {
		return err
	}
	for k, want := range []int{lookedEndpoints, 2, 2} {
		if err := seesEndpoints(ctx, component(kinds[k], rounds), list+"/object-00000?resourceVersion=0", want); err != nil {
			return err
		}
	}
	var first, next rounds3
	for round := range rounds {
		for i := range kinds {
			k := (i + round) % len(kinds) // none is always first
			c := component(kinds[k], round).connect()
			for _, a := range []struct {
				took  *rounds3
				lists int // the processor's time comes in hundredths of a second
			}{{&first, 1}, {&next, 10}} {
				before, err := busy(h.PID())
				if err != nil {
					return err
				}
				for range a.lists {
					if _, err := c.get(ctx, list+"?resourceVersion=0", protobuf); err != nil {
						return err
					}
				}
				after, err := busy(h.PID())
				if err != nil {
					return err
				}
				a.took[k] = append(a.took[k], ms((after-before).Nanoseconds())/float64(a.lists))
			}
			c.close()
		}
	}
	for _, r := range []struct {
		what string
		took rounds3
	}{{"first", first}, {"next", next}} {
		plain, builtin, access := median(r.took[0]), median(r.took[1]), median(r.took[2])
		b.hub(fmt.Sprintf("%s LIST of %d slices through an AccessFilter: processor time, of that through a filter of the hub", r.what, n), "×", access/builtin, atMost(2),
			fmt.Sprintf("%.0f and %.0f ms; as they are %.0f ms", access, builtin, plain))
	}
	return nil
}

// rounds3 are milliseconds of each kind.
type rounds3 [3][]float64

// seesEndpoints waits until a component sees so many endpoints of a slice.
func seesEndpoints(ctx context.Context, t target, path string, want int) error {
	c := t.connect()
	defer c.close()
	last := -1
	err := until(ctx, time.Minute, 50*time.Millisecond, func() (bool, error) {
		text, err := c.read(ctx, path, jsonType)
		if err != nil {
			return false, nil //nolint:nilerr // the first filter of a resource ends what is open
		}
		var slice discoveryv1.EndpointSlice
		if err := json.Unmarshal(text, &slice); err != nil {
			return false, fmt.Errorf("read slice: %w", err)
		}
		last = len(slice.Endpoints)
		return last == want, nil
	})
	if err != nil {
		return fmt.Errorf("%s sees %d endpoints, not %d: %w", t.agent, last, want, err)
	}
	return nil
}
