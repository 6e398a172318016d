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

// view is what a program on a node sees of the EndpointSlices of one Service:
// by lists, and by the handlers of an informer.
type view struct {
	client  *kubernetes.Clientset
	service string
	told    seen
}

// view returns that of a program that calls itself so.
func (h *hub) view(t *testing.T, agent, service string) *view {
	t.Helper()
	cfg, err := h.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	cfg.UserAgent = agent
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &view{client: client, service: service}
}

func (v *view) selector() string { return discoveryv1.LabelServiceName + "=" + v.service }

// lists returns an error unless a list shows one slice with endpoints on nodes.
func (v *view) lists(t *testing.T, nodes ...string) func() error {
	return func() error {
		all, err := v.client.DiscoveryV1().EndpointSlices("pools").List(t.Context(), metav1.ListOptions{LabelSelector: v.selector()})
		if err != nil || len(all.Items) != 1 {
			return fmt.Errorf("%d slices: %w", len(all.Items), err)
		}
		if got := nodesOf(&all.Items[0]); !slices.Equal(got, nodes) {
			return fmt.Errorf("a list shows %v, not %v", got, nodes)
		}
		return nil
	}
}

func nodesOf(slice *discoveryv1.EndpointSlice) []string {
	out := []string{}
	for _, e := range slice.Endpoints {
		out = append(out, *e.NodeName)
	}
	return out
}

// inform runs the informer until the test ends.
func (v *view) inform(t *testing.T) {
	t.Helper()
	factory := informers.NewSharedInformerFactoryWithOptions(v.client, 0, informers.WithNamespace("pools"),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = v.selector() }))
	informer := factory.Discovery().V1().EndpointSlices().Informer()
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { v.told.take(o, true) },
		UpdateFunc: func(_, o any) { v.told.take(o, true) },
		DeleteFunc: func(o any) { v.told.take(o, false) },
	})
	if err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(context.Background())
	factory.Start(running.Done())
	t.Cleanup(func() {
		stop()
		factory.Shutdown()
	})
}

// sees waits until handlers and lists agree that the endpoints are on nodes.
func (v *view) sees(t *testing.T, what string, nodes ...string) {
	t.Helper()
	await(t, what, func() error {
		v.told.mu.Lock()
		defer v.told.mu.Unlock()
		if !slices.Equal(v.told.nodes, nodes) {
			return fmt.Errorf("the handlers were told of %v, not of %v", v.told.nodes, nodes)
		}
		return nil
	})
	await(t, what, v.lists(t, nodes...))
}

// newService makes a Service and an EndpointSlice with endpoints on nodes.
func newService(t *testing.T, name, topology string, nodes ...string) *discoveryv1.EndpointSlice {
	t.Helper()
	_, err := shared.admin.CoreV1().Services("pools").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{"openyurt.io/topologyKeys": topology}},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: name, discoveryv1.LabelManagedBy: "test"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for i, node := range nodes {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.1.1.%d", i+1)}, NodeName: &node})
	}
	if slice, err = shared.admin.DiscoveryV1().EndpointSlices("pools").Create(t.Context(), slice, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return slice
}

// TestFiltersFollowThePool checks by an informer that a component sees what
// changes of its node's pool, of a Service and of the node make of its
// EndpointSlices: as handler calls, at versions that only rise, with the link
// and without, and across restarts of the hub during which these changed.
func TestFiltersFollowThePool(t *testing.T) {
	s := newSite(t, "near", 1)
	near, mate, far := s.node(0), "near-2", "far-1"
	s.status(t, []string{near, mate}, nil)
	other := newSite(t, "far", 0)
	other.status(t, []string{far}, nil)
	slice := newService(t, "shop", "openyurt.io/nodepool", near, mate, far)
	endpoints := shared.admin.DiscoveryV1().EndpointSlices("pools")
	h := s.start(t, 0)
	plain, proxy := h.view(t, "kubelet/v1.36.0", "shop"), h.view(t, "kube-proxy/v1.36.0 (linux/amd64)", "shop")
	// What the filter goes by is known before anybody asks, as on a node that
	// has run before.
	await(t, "the filter", proxy.lists(t, near, mate))
	proxy.inform(t)
	sees := func(what string, nodes ...string) {
		t.Helper()
		proxy.sees(t, what, nodes...)
	}
	annotate := func(value string) {
		t.Helper()
		patch := fmt.Sprintf(`{"metadata":{"annotations":{"openyurt.io/topologyKeys":%s}}}`, value)
		if _, err := shared.admin.CoreV1().Services("pools").Patch(t.Context(), "shop", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}

	sees("the pool", near, mate)
	if err := plain.lists(t, near, mate, far)(); err != nil {
		t.Fatalf("others: %v", err)
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
	slice, err := endpoints.Update(t.Context(), slice, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	sees("an endpoint went", mate)

	// A get without a version is the cloud's to answer, at its own version, and
	// is filtered too.
	for who, want := range map[*view][]string{proxy: {mate}, plain: {mate, far}} {
		got, err := who.client.DiscoveryV1().EndpointSlices("pools").Get(t.Context(), slice.Name, metav1.GetOptions{})
		if err != nil || got.ResourceVersion != slice.ResourceVersion || !slices.Equal(nodesOf(got), want) {
			t.Errorf("a get shows %v, %v; want endpoints on %v at version %s", got, err, want, slice.ResourceVersion)
		}
	}

	// The hub is not there when the pool changes, and when it changes back.
	h.Stop()
	s.status(t, []string{near, mate, far}, nil)
	if err := h.Launch(); err != nil {
		t.Fatal(err)
	}
	sees("a node joined while the hub was down", mate, far)
	h.Kill()
	s.status(t, []string{near, mate}, nil)
	if err := h.Launch(); err != nil {
		t.Fatal(err)
	}
	sees("a node left after the hub was killed", mate)

	proxy.told.mu.Lock()
	if len(proxy.told.backs) > 0 {
		t.Errorf("versions did not rise: %s", strings.Join(proxy.told.backs, ", "))
	}
	proxy.told.mu.Unlock()

	cut(t, s.hubs[0], bed.Down)
	h.offline(t)
	h.Stop() // in good order: what came within the last second is written too
	if err := h.Launch(); err != nil {
		t.Fatal(err)
	}
	await(t, "the filter without a link", proxy.lists(t, mate))
	heal(t, s.hubs[0])
	move := []byte(`{"metadata":{"labels":{"apps.openyurt.io/nodepool":"far"}}}`)
	if _, err := shared.admin.CoreV1().Nodes().Patch(t.Context(), near, types.MergePatchType, move, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	sees("the node moved to another pool", far)
}

// TestFiltersFollowTheirSettings: a component that ConfigMap yurt-hub-cfg names
// sees from then on, by the watch that it has, what a filter makes of its
// EndpointSlices, and all of them when it is named no more. The nodes of the
// pool come from its NodeBuckets, which change as well.
func TestFiltersFollowTheirSettings(t *testing.T) {
	s := newSite(t, "buckets", 1)
	s.args = []string{"--enable-pool-service-topology"}
	near, mate, far := s.node(0), "buckets-2", "elsewhere-1"
	s.status(t, []string{near, mate, far}, nil) // which does not count
	newService(t, "stock", "openyurt.io/nodepool", near, mate, far)
	bucket := func(name, pool string, nodes ...string) {
		t.Helper()
		var list strings.Builder
		for _, node := range nodes {
			list.WriteString("- {name: " + node + "}\n")
		}
		err := shared.cloud.Apply(t.Context(), fmt.Sprintf(`
apiVersion: apps.openyurt.io/v1alpha1
kind: NodeBucket
metadata: {name: %s, labels: {openyurt.io/pool-name: %s}}
numNodes: %d
nodes:
%s`, name, pool, len(nodes), list.String()))
		if err != nil {
			t.Fatal(err)
		}
	}
	bucket("buckets-a", "buckets", near)
	bucket("buckets-b", "buckets", mate)
	bucket("others-a", "others", far)
	h := s.start(t, 0)
	proxy, traefik := h.view(t, "kube-proxy/v1.36.0", "stock"), h.view(t, "Traefik/3.4 (linux/amd64)", "stock")
	await(t, "the filter", proxy.lists(t, near, mate))
	proxy.inform(t)
	traefik.inform(t)
	proxy.sees(t, "the pool by its buckets", near, mate)
	traefik.sees(t, "all, as it is not filtered", near, mate, far)

	configure := func(components string) {
		t.Helper()
		err := shared.cloud.Apply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: yurt-hub-cfg, namespace: kube-system}
data: {servicetopology: %q}
`, components))
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { // it is the cluster's: other tests' hubs would follow it
		configs := shared.admin.CoreV1().ConfigMaps("kube-system")
		if err := configs.Delete(context.WithoutCancel(t.Context()), "yurt-hub-cfg", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	configure("envoy, traefik")
	traefik.sees(t, "it was named", near, mate)
	bucket("buckets-b", "buckets", mate, far)
	proxy.sees(t, "a bucket has one more", near, mate, far)
	traefik.sees(t, "a bucket has one more", near, mate, far)
	err := shared.admin.RESTClient().Delete().AbsPath("/apis/apps.openyurt.io/v1alpha1/nodebuckets/buckets-b").Do(t.Context()).Error()
	if err != nil {
		t.Fatal(err)
	}
	proxy.sees(t, "a bucket went", near)
	traefik.sees(t, "a bucket went", near)
	configure("envoy")
	traefik.sees(t, "it is named no more", near, mate, far)
	proxy.sees(t, "which has it by its name", near)

	// What it was shown by a filter has versions of the hub's own. So it stays
	// behind what is no filter any more.
	h.Stop()
	bucket("buckets-b", "buckets", far)
	if err := h.Launch(); err != nil {
		t.Fatal(err)
	}
	proxy.sees(t, "a bucket came while the hub was down", near, far)
	traefik.sees(t, "as it is", near, mate, far)
	if _, err := shared.admin.DiscoveryV1().EndpointSlices("pools").Patch(t.Context(), "stock-1", types.JSONPatchType,
		[]byte(`[{"op":"remove","path":"/endpoints/1"}]`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	proxy.sees(t, "an endpoint went", near, far)
	traefik.sees(t, "an endpoint went", near, far)
}
