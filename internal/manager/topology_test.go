package manager

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// TestSlicesAreTouchedForForeignHubs follows a slice. It is touched once when a
// hub of OpenYurt is there and the Service's annotation changes, or a node
// joins the pool of an endpoint, and at no other time.
func TestSlicesAreTouchedForForeignHubs(t *testing.T) {
	c := theCluster(t)
	c.pool(t, "touched", v1beta2.NodePoolSpec{})
	c.node(t, "touched-a", "touched", "10.9.0.1")
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "touched", Annotations: map[string]string{apps.TopologyKeys: apps.TopologyPool}},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "touched-1", Labels: map[string]string{discoveryv1.LabelServiceName: "touched"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"192.0.2.1"}, NodeName: new("touched-a")}},
	}
	for _, o := range []client.Object{slice, service} {
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := c.Delete(context.Background(), o); client.IgnoreNotFound(err) != nil {
				t.Error(err)
			}
		})
	}
	watcher, err := client.NewWithWatch(c.cp.RESTConfig(), client.Options{Scheme: newScheme()})
	if err != nil {
		t.Fatal(err)
	}
	changes, err := watcher.Watch(t.Context(), &discoveryv1.EndpointSliceList{}, client.InNamespace("default"),
		client.MatchingLabels{discoveryv1.LabelServiceName: "touched"}, &client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: slice.ResourceVersion}})
	if err != nil {
		t.Fatal(err)
	}
	defer changes.Stop()
	var seen []string
	next := func(when string) string {
		t.Helper()
		select {
		case e := <-changes.ResultChan():
			is, ok := e.Object.(*discoveryv1.EndpointSlice)
			if !ok {
				t.Fatalf("%s: got %v", when, e)
			}
			value := is.Annotations[apps.UpdateTrigger]
			seen = append(seen, value)
			return value
		case <-time.After(45 * time.Second):
			t.Fatalf("%s: the slice was not touched", when)
		}
		return ""
	}
	annotate := func(value string) {
		t.Helper()
		c.patch(t, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "touched"}},
			fmt.Sprintf(`{"metadata":{"annotations":{%q:%s}}}`, apps.TopologyKeys, value))
	}

	// Hubs of ours need none of it: what the slice shows first is the mark of
	// the annotation's second value.
	c.condition(t, "touched-a", "YurtHubLinkReady", corev1.ConditionTrue)
	c.condition(t, "touched-a", "Autonomy", corev1.ConditionTrue)
	annotate(`"` + apps.TopologyNode + `"`)
	c.node(t, "touched-b", "", "10.9.0.2")
	c.condition(t, "touched-b", "Autonomy", corev1.ConditionTrue)
	node := next("a hub of OpenYurt is there")
	annotate(`"` + apps.TopologyPool + `"`)
	pool := next("the annotation changes")
	c.label(t, "touched-b", apps.NodePoolLabel, "touched")
	joined := next("a node joins the pool")
	annotate("null")
	if gone := next("the annotation goes"); gone != "" {
		t.Errorf("the trigger is %q without an annotation", gone)
	}
	if all := []string{node, pool, joined}; slices.Contains(all, "") || node == pool || pool == joined {
		t.Errorf("triggers were %q", seen)
	}
}
