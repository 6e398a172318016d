package pools

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/yurt-edge/yurt/test/bed"
)

// seen is what an informer's handlers were told of one EndpointSlice.
type seen struct {
	mu      sync.Mutex // guards the following
	version uint64
	nodes   []string // of its endpoints, in order; nil: there is no such slice
	backs   []string // what went back or stood still
}

func (s *seen) take(object any, there bool) {
	slice, ok := object.(*discoveryv1.EndpointSlice)
	if !ok {
		return
	}
	version, _ := strconv.ParseUint(slice.ResourceVersion, 10, 64)
	s.mu.Lock()
	defer s.mu.Unlock()
	if version <= s.version {
		s.backs = append(s.backs, fmt.Sprintf("%d after %d", version, s.version))
	}
	s.version, s.nodes = version, nil
	if there {
		s.nodes = []string{}
		for _, e := range slice.Endpoints {
			s.nodes = append(s.nodes, *e.NodeName)
		}
	}
}

// TestFiltersFollowThePool checks by an informer that a component sees what
// changes of its node's pool, of a Service and of the node make of its
// EndpointSlices: as handler calls, at versions that only rise while the hub
// runs, with the link and without, and across a restart of the hub.
func TestFiltersFollowThePool(t *testing.T) {
	s := newSite(t, "near", 1)
	near, mate, far := s.node(0), "near-2", "far-1"
	s.status(t, []string{near, mate}, nil)
	other := newSite(t, "far", 0)
	other.status(t, []string{far}, nil)
	services, endpoints := shared.admin.CoreV1().Services("pools"), shared.admin.DiscoveryV1().EndpointSlices("pools")
	_, err := services.Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "shop", Annotations: map[string]string{"openyurt.io/topologyKeys": "openyurt.io/nodepool"}},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "shop-1", Labels: map[string]string{discoveryv1.LabelServiceName: "shop", discoveryv1.LabelManagedBy: "test"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for i, node := range []string{near, mate, far} {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.1.1.%d", i+1)}, NodeName: &node})
	}
	if _, err := endpoints.Create(t.Context(), slice, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	h := s.start(t, 0)
	cfg, err := h.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	plain, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.UserAgent = "kube-proxy/v1.36.0 (linux/amd64)"
	proxy, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	// What the filter goes by is known before anybody asks, as on a node that
	// has run before.
	lists := func(nodes ...string) func() error {
		return func() error {
			all, err := proxy.DiscoveryV1().EndpointSlices("pools").List(t.Context(), metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=shop"})
			if err != nil || len(all.Items) != 1 {
				return fmt.Errorf("%d slices: %w", len(all.Items), err)
			}
			var got []string
			for _, e := range all.Items[0].Endpoints {
				got = append(got, *e.NodeName)
			}
			if !slices.Equal(got, nodes) {
				return fmt.Errorf("a list shows %v, not %v", got, nodes)
			}
			return nil
		}
	}
	await(t, "the filter", lists(near, mate))

	var told seen
	factory := informers.NewSharedInformerFactoryWithOptions(proxy, 0, informers.WithNamespace("pools"),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = discoveryv1.LabelServiceName + "=shop" }))
	informer := factory.Discovery().V1().EndpointSlices().Informer()
	_, err = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { told.take(o, true) },
		UpdateFunc: func(_, o any) { told.take(o, true) },
		DeleteFunc: func(o any) { told.take(o, false) },
	})
	if err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(t.Context())
	defer factory.Shutdown()
	defer stop()
	factory.Start(running.Done())
	sees := func(what string, nodes ...string) {
		t.Helper()
		await(t, what, func() error {
			told.mu.Lock()
			defer told.mu.Unlock()
			if !slices.Equal(told.nodes, nodes) {
				return fmt.Errorf("the handlers were told of %v, not of %v", told.nodes, nodes)
			}
			return nil
		})
		await(t, what, lists(nodes...))
	}
	annotate := func(value string) {
		t.Helper()
		patch := fmt.Sprintf(`{"metadata":{"annotations":{"openyurt.io/topologyKeys":%s}}}`, value)
		if _, err := services.Patch(t.Context(), "shop", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}

	sees("the pool", near, mate)
	if got, err := plain.DiscoveryV1().EndpointSlices("pools").Get(t.Context(), "shop-1", metav1.GetOptions{}); err != nil || len(got.Endpoints) != 3 {
		t.Fatalf("others see %+v, %v", got, err)
	}
	s.status(t, []string{near}, nil)
	sees("a node left the pool", near)
	s.status(t, []string{near, mate, far}, nil)
	sees("two nodes joined", near, mate, far)
	annotate(`"kubernetes.io/hostname"`)
	sees("the Service keeps to the node", near)
	annotate(`null`)
	sees("the Service goes everywhere", near, mate, far)
	s.status(t, []string{near, mate}, nil)
	annotate(`"openyurt.io/nodepool"`)
	sees("the Service keeps to the pool", near, mate)

	// The API server goes by the cluster's own order: what the cloud changes
	// next is told too.
	slice.Endpoints = slice.Endpoints[1:]
	if _, err := endpoints.Update(t.Context(), slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	sees("an endpoint went", mate)

	told.mu.Lock()
	if len(told.backs) > 0 {
		t.Errorf("versions did not rise: %s", strings.Join(told.backs, ", "))
	}
	told.mu.Unlock()

	cut(t, s.hubs[0], bed.Down)
	h.offline(t)
	h.Stop() // in good order: what came within the last second is written too
	if err := h.Launch(); err != nil {
		t.Fatal(err)
	}
	await(t, "the filter without a link", lists(mate))
	heal(t, s.hubs[0])
	move := []byte(`{"metadata":{"labels":{"apps.openyurt.io/nodepool":"far"}}}`)
	if _, err := shared.admin.CoreV1().Nodes().Patch(t.Context(), near, types.MergePatchType, move, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	sees("the node moved to another pool", far)
}
