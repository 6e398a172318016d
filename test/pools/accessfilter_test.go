package pools

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/report"
	"github.com/yurt-edge/yurt/test/bed"
)

// TestAccessFilters checks by an informer that a component sees what an
// AccessFilter makes of its EndpointSlices as it comes, changes, breaks and
// goes, as handler calls at versions that only rise; that one that does not
// compile leaves its last good state in place, also through a restart of the
// hub without a link; and that the node tells of it.
func TestAccessFilters(t *testing.T) {
	s := newSite(t, "programs", 1)
	near, mate, far := s.node(0), "programs-2", "programs-far"
	s.status(t, []string{near, mate}, nil)
	newService(t, "till", "", near, mate, far)
	h := s.start(t, 0)
	proxy, plain := h.view(t, "kube-proxy/v1.36.0", "till"), h.view(t, "kubelet/v1.36.0", "till")
	await(t, "all, as there is no filter", proxy.lists(t, near, mate, far))
	proxy.inform(t)
	proxy.sees(t, "all, as there is no filter", near, mate, far)

	apply := func(spec string) {
		t.Helper()
		err := shared.cloud.Apply(t.Context(), `
apiVersion: network.openyurt.io/v1alpha1
kind: AccessFilter
metadata: {name: near-only}
spec:
  components: [kube-proxy]
  resources: [{group: discovery.k8s.io, version: v1, resource: endpointslices}]
  pools: [programs]
  `+strings.ReplaceAll(spec, "\n", "\n  "))
		if err != nil {
			t.Fatal(err)
		}
	}
	reports := func(generation, applied int64, failure string) func() error {
		return func() error {
			node, err := shared.admin.CoreV1().Nodes().Get(t.Context(), near, metav1.GetOptions{})
			if err != nil {
				return err
			}
			var all map[string]v1alpha1.AccessFilterReport
			if err := json.Unmarshal([]byte(node.Annotations[api.AccessFiltersAnnotation]), &all); err != nil {
				return fmt.Errorf("the node's report %q: %w", node.Annotations[api.AccessFiltersAnnotation], err)
			}
			if r := all["near-only"]; r.Generation != generation || r.Applied != applied || !strings.HasPrefix(r.Error, failure) || (failure == "") != (r.Error == "") {
				return fmt.Errorf("the node reports %+v", r)
			}
			return nil
		}
	}

	apply(`set: [{path: /endpoints, value: "object.endpoints.filter(e, e.nodeName in pool.nodes)"}]`)
	proxy.sees(t, "the filter came", near, mate)
	if err := plain.lists(t, near, mate, far)(); err != nil {
		t.Errorf("others: %v", err)
	}
	await(t, "the node's report", reports(1, 1, ""))
	s.status(t, []string{near}, nil)
	proxy.sees(t, "a node left the pool", near)
	apply(`set: [{path: /endpoints, value: "object.endpoints.filter(e, !(e.nodeName in pool.nodes))"}]`)
	proxy.sees(t, "the filter changed", mate, far)

	// Nobody checks it on the way here.
	apply(`set: [{path: /endpoints, value: "object.endpoints.filter(e, e.nodeName in pols.nodes)"}]`)
	await(t, "the report of what does not compile", reports(3, 2, "spec.set[0].value:1:42: undeclared reference to 'pols'"))
	s.status(t, []string{near, mate}, nil)
	proxy.sees(t, "the last good state", far)

	cut(t, s.hubs[0], bed.Down)
	h.offline(t)
	h.Stop()
	if err := h.Launch(); err != nil {
		t.Fatal(err)
	}
	await(t, "the last good state without a link", proxy.lists(t, far))
	heal(t, s.hubs[0])

	// One that fails on an object leaves that as it is.
	apply(`drop: object.nothing.at == 'all'`)
	proxy.sees(t, "an expression fails", near, mate, far)
	await(t, "the report of what fails", reports(4, 4, "spec.drop: no such key"))
	err := shared.admin.RESTClient().Delete().AbsPath("/apis/network.openyurt.io/v1alpha1/accessfilters/near-only").Do(t.Context()).Error()
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the report of no filter", func() error {
		node, err := shared.admin.CoreV1().Nodes().Get(t.Context(), near, metav1.GetOptions{})
		if report := node.Annotations[api.AccessFiltersAnnotation]; report != "" || err != nil {
			return fmt.Errorf("the node reports %q: %w", report, err)
		}
		return nil
	})
	proxy.told.mu.Lock()
	defer proxy.told.mu.Unlock()
	if len(proxy.told.backs) > 0 {
		t.Errorf("versions did not rise: %s", strings.Join(proxy.told.backs, ", "))
	}
}

// TestAccessFiltersAreShared: a follower hears of AccessFilters through its
// leader, with its own link cut too. One that is about more than what all pools
// share counts when the cloud itself has said it.
func TestAccessFiltersAreShared(t *testing.T) {
	s := newSite(t, "lent", 2)
	near, far := s.node(0), "lent-far"
	newService(t, "rent", "", near, far)
	classes := shared.admin.NodeV1().RuntimeClasses()
	for _, name := range []string{"lent-a", "lent-b"} {
		if _, err := classes.Create(t.Context(), &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: "x"}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		defer classes.Delete(context.WithoutCancel(t.Context()), name, metav1.DeleteOptions{})
	}
	apply := func(name, resource, spec string) {
		t.Helper()
		err := shared.cloud.Apply(t.Context(), fmt.Sprintf(`
apiVersion: network.openyurt.io/v1alpha1
kind: AccessFilter
metadata: {name: %s}
spec: {components: [kube-proxy], resources: [%s], pools: [lent], %s}`, name, resource, spec))
		if err != nil {
			t.Fatal(err)
		}
	}
	const filters = "/apis/network.openyurt.io/v1alpha1/accessfilters/"
	defer func() {
		for _, name := range []string{"lent-near", "lent-beyond"} {
			if err := shared.admin.RESTClient().Delete().AbsPath(filters + name).Do(context.WithoutCancel(t.Context())).Error(); err != nil {
				t.Error(err)
			}
		}
	}()
	s.elect(t, 1)
	for i := range s.hubs {
		s.start(t, i)
	}
	h := s.hubs[1]
	h.follows(t, near, true)
	proxy := h.view(t, "kube-proxy/v1.36.0", "rent")
	has := func(want ...string) func() error {
		return func() error {
			all, err := proxy.client.NodeV1().RuntimeClasses().List(t.Context(), metav1.ListOptions{ResourceVersion: "0"})
			if err != nil {
				return err
			}
			var got []string
			for i := range all.Items {
				if strings.HasPrefix(all.Items[i].Name, "lent-") {
					got = append(got, all.Items[i].Name)
				}
			}
			if !slices.Equal(got, want) {
				return fmt.Errorf("it sees %v, not %v", got, want)
			}
			return nil
		}
	}
	await(t, "both classes", has("lent-a", "lent-b"))
	await(t, "both endpoints", proxy.lists(t, near, far))

	cut(t, h, bed.Blackhole)
	h.offline(t)
	apply("lent-beyond", "{group: node.k8s.io, version: v1, resource: runtimeclasses}", `drop: "object.metadata.name == 'lent-a'"`)
	apply("lent-near", "{group: discovery.k8s.io, version: v1, resource: endpointslices}", `set: [{path: /endpoints, value: "object.endpoints.filter(e, e.nodeName in pool.nodes)"}]`)
	await(t, "the filter by way of the leader", proxy.lists(t, near))
	if err := has("lent-a", "lent-b")(); err != nil {
		t.Errorf("by the leader's word alone: %v", err)
	}
	if r, err := report.Ask(t.Context(), h.Dir); err != nil || r.Online {
		t.Fatalf("the link was to be cut: %+v, %v", r, err)
	}
	heal(t, h)
	await(t, "the filter by the cloud's word", has("lent-b"))

	// What the cloud said holds without it.
	h.follows(t, near, true)
	cut(t, h, bed.Down)
	h.offline(t)
	h.Stop()
	if err := h.Launch(); err != nil {
		t.Fatal(err)
	}
	await(t, "the filter after a restart", has("lent-b"))
	await(t, "the other one", proxy.lists(t, near))
	heal(t, h)
}
