package pools

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
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
