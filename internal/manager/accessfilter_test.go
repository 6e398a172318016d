package manager

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/api/network"
	networkv1alpha1 "github.com/yurt-edge/yurt/api/network/v1alpha1"
)

const gauges = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gauges.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: gauges, singular: gauge, kind: Gauge, listKind: GaugeList}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties: {spec: {type: object, properties: {%s: {type: integer}}}}
`

const (
	services  = "{version: v1, resource: services}"
	ofGauges  = "{group: example.com, version: v1, resource: gauges}"
	ofWidgets = "{group: example.com, version: v1, resource: widgets}"
)

func accessFilter(name, resource, rest string) string {
	return fmt.Sprintf("{apiVersion: network.openyurt.io/v1alpha1, kind: AccessFilter, metadata: {name: %s}, spec: {components: [kube-proxy], resources: [%s], %s}}",
		name, resource, rest)
}

// TestAccessFiltersAreChecked writes good ones and bad ones by the real API
// server, which asks the real webhook.
func TestAccessFiltersAreChecked(t *testing.T) {
	c := theCluster(t)
	if err := c.cp.Apply(t.Context(), fmt.Sprintf(gauges, "size")); err != nil {
		t.Fatal(err)
	}
	// Until the manager has its certificate trusted, none is let in.
	await(t, "a filter is let in", func() error {
		return c.cp.Apply(t.Context(), accessFilter("af-good", services, `drop: "object.spec.type == 'LoadBalancer' && has(object.spec.loadBalancerClass)"`))
	})
	for _, tc := range []struct{ name, resource, rest, want string }{
		{"syntax", services, `drop: "object.spec.type = 'x'"`, "spec.drop: Invalid value: \"object.spec.type = 'x'\": 1:18: Syntax error"},
		{
			"field", services, `drop: "object.spce.type == 'x'"`,
			"spec.drop: Invalid value: \"object.spce.type == 'x'\": 1:7: undefined field 'spce' (for services v1)\nobject.spce.type == 'x'\n      ^",
		},
		{"lines", services, `keep: "object.spec.type == 'x' ||\n  object.spec.clusterIp == ''"`, "2:14: undefined field 'clusterIp' (for services v1)\n  object.spec.clusterIp == ''\n             ^"},
		{"type", services, `drop: "object.spec.type == 1"`, "1:18: found no matching overload for '_==_'"},
		{"no-bool", services, `drop: "object.spec.type"`, "of type string, and bool is wanted"},
		{"set", services, `set: [{path: /metadata/labels/a, value: "'b'"}, {path: /spec/type, value: "1 + 1"}]`, "spec.set[1].value"},
		{"path", services, `remove: [{path: /spec/externalIps}]`, `spec.remove[0].path`},
		{"nothing", services, `priority: 1`, "the filter does nothing"},
		{"variable", services, `drop: "objekt.spec == null"`, "1:1: undeclared reference to 'objekt'"},
		{"custom", ofGauges, `drop: "object.spec.weight > 1"`, "1:12: undefined field 'weight' (for gauges.example.com v1)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := c.cp.Apply(t.Context(), accessFilter("af-"+tc.name, tc.resource, tc.rest))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v\nwant %q", err, tc.want)
			}
		})
	}
	// Client-go knows it for what it is.
	bad := &networkv1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: "af-typed"}, Spec: networkv1alpha1.AccessFilterSpec{
		Components: []string{"kube-proxy"}, Resources: []networkv1alpha1.AccessFilterResource{{Version: "v1", Resource: "services"}}, Drop: "1",
	}}
	if err := c.Create(t.Context(), bad); !apierrors.IsInvalid(err) {
		t.Errorf("got %v, want it to be invalid", err)
	}

	// A definition changes, and with it what may be asked of its objects.
	weighed := accessFilter("af-gauges", ofGauges, `drop: "object.spec.weight > 1"`)
	if err := c.cp.Apply(t.Context(), accessFilter("af-gauges", ofGauges, `drop: "object.spec.size > 1"`)); err != nil {
		t.Error(err)
	}
	if err := c.cp.Apply(t.Context(), fmt.Sprintf(gauges, "weight")); err != nil {
		t.Fatal(err)
	}
	await(t, "the new field may be asked for", func() error { return c.cp.Apply(t.Context(), weighed) })
	if err := c.cp.Apply(t.Context(), accessFilter("af-gauges", ofGauges, `drop: "object.spec.size > 1"`)); err == nil || !strings.Contains(err.Error(), "'size'") {
		t.Errorf("the old field: got %v", err)
	}
	// What was written before stays, and can be labelled and deleted.
	if err := c.cp.Apply(t.Context(), fmt.Sprintf(gauges, "size")); err != nil {
		t.Fatal(err)
	}
	await(t, "the definition is back", func() error {
		return c.cp.Apply(t.Context(), accessFilter("af-sized", ofGauges, `drop: "object.spec.size > 1"`))
	})
	old := &networkv1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: "af-gauges"}}
	c.patch(t, old, `{"metadata":{"labels":{"a":"b"}}}`)
	if err := c.Delete(t.Context(), old); err != nil {
		t.Error(err)
	}

	// A resource may come after its filter.
	var warned warnings
	cfg := c.cp.RESTConfig()
	cfg.WarningHandler = &warned
	other, err := client.New(cfg, client.Options{Scheme: newScheme()})
	if err != nil {
		t.Fatal(err)
	}
	early := bad.DeepCopy()
	early.Name, early.Spec.Drop = "af-widgets", "object.spec.size > 1"
	early.Spec.Resources = []networkv1alpha1.AccessFilterResource{{Group: "example.com", Version: "v1", Resource: "widgets"}}
	if err := other.Create(t.Context(), early); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(warned, "\n"); !strings.Contains(got, "no widgets in example.com/v1") {
		t.Errorf("warnings %q", got)
	}
	for _, name := range []string{"af-good", "af-sized", "af-widgets"} {
		if err := c.Delete(t.Context(), &networkv1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
			t.Error(err)
		}
	}
}

// TestAccessFilterStatus has nodes report as hubs do.
func TestAccessFilterStatus(t *testing.T) {
	c := theCluster(t)
	c.pool(t, "af-north", v1beta2.NodePoolSpec{})
	c.node(t, "af-1", "af-north", "10.7.0.1")
	c.node(t, "af-2", "af-north", "10.7.0.2")
	c.node(t, "af-3", "", "10.7.0.3")
	c.node(t, "af-cloud", "", "10.7.0.4")
	says := func(node, report string) {
		t.Helper()
		c.patch(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, network.AccessFiltersAnnotation, report))
	}
	c.label(t, "af-1", "openyurt.io/is-edge-worker", "true")
	c.label(t, "af-2", "openyurt.io/is-edge-worker", "true")
	says("af-3", `{}`)
	await(t, "the filter is let in", func() error {
		return c.cp.Apply(t.Context(), accessFilter("af-status", services, `drop: "object.spec.type == 'LoadBalancer'", nodeSelector: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [af-1, af-2, af-3, af-cloud]}]}`))
	})
	defer func() {
		if err := c.Delete(t.Context(), &networkv1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: "af-status"}}); err != nil {
			t.Error(err)
		}
	}()
	shows := func(row, pools, message string) {
		t.Helper()
		await(t, "status "+row, func() error {
			out, err := c.cp.Kubectl(t.Context(), "get", "accessfilters", "af-status", "--no-headers")
			if err != nil {
				return err
			}
			if got := strings.Join(strings.Fields(out), " "); !strings.Contains(got, row) {
				return fmt.Errorf("row %q, want %q", got, row)
			}
			var f networkv1alpha1.AccessFilter
			if err := c.Get(t.Context(), client.ObjectKey{Name: "af-status"}, &f); err != nil {
				return err
			}
			var got []string
			for _, p := range f.Status.Pools {
				got = append(got, fmt.Sprintf("%s:%d/%d/%d", p.Name, p.Nodes, p.Active, p.Failed))
			}
			ready := meta.FindStatusCondition(f.Status.Conditions, networkv1alpha1.AccessFilterReady)
			if strings.Join(got, " ") != pools || ready == nil || !strings.Contains(ready.Message, message) {
				return fmt.Errorf("pools %v, condition %+v, want %s and %q", got, ready, pools, message)
			}
			return nil
		})
	}
	shows(`services 3 0 0 Unknown`, ":1/0/0 af-north:2/0/0", "3 of 3 nodes have not said yet")
	says("af-1", `{"af-status":{"generation":1,"applied":1}}`)
	says("af-2", `{"af-status":{"generation":1,"error":"compile: no memory"}}`)
	says("af-3", `{"af-status":{"generation":1,"applied":1}}`)
	shows(`services 3 2 1 False`, ":1/1/0 af-north:2/1/1", "af-2: not applied: compile: no memory")
	describes := func(want ...string) {
		t.Helper()
		await(t, "description", func() error {
			out, err := c.cp.Kubectl(t.Context(), "describe", "accessfilters", "af-status")
			for _, text := range want {
				if !strings.Contains(strings.Join(strings.Fields(out), " "), text) {
					return fmt.Errorf("%q is missing in %s: %w", text, out, err)
				}
			}
			return err
		})
	}
	describes("Failures: Count: 1 Message: not applied: compile: no memory Nodes: af-2", "Warning NodesFailed",
		"yurt-manager 1 of 3 nodes do not apply it in full; af-2: not applied: compile: no memory")
	says("af-2", `{"af-status":{"generation":1,"applied":1}}`)
	shows(`services 3 3 0 True`, ":1/1/0 af-north:2/2/0", "all 3 nodes apply generation 1")
	describes("Normal Active", "all 3 nodes apply generation 1")
	// A node leaves, and another turns out to have a hub.
	c.label(t, "af-3", "kubernetes.io/hostname", "elsewhere")
	says("af-cloud", `{}`)
	shows(`services 3 2 0 Unknown`, ":1/0/0 af-north:2/2/0", "1 of 3 nodes")
}

type warnings []string

// HandleWarningHeader is of rest.WarningHandler.
func (w *warnings) HandleWarningHeader(_ int, _, text string) { *w = append(*w, text) }
