package manager

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/manager/webhookcert"
)

// TestPoolsStoredByOpenYurt finds a pool that is stored as v1beta1, as OpenYurt
// up to 1.6 does. It cannot be read before the manager converts it, and the
// manager itself reads it.
func TestPoolsStoredByOpenYurt(t *testing.T) {
	c, err := startCluster(t.Context(), t)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.stop)
	d := &unstructured.Unstructured{}
	d.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"})
	read := func() {
		t.Helper()
		if err := c.Get(t.Context(), client.ObjectKey{Name: webhookcert.Definition}, d); err != nil {
			t.Fatal(err)
		}
	}
	// define writes the definition as change makes it of what is there.
	define := func(change func(spec map[string]any)) {
		t.Helper()
		await(t, "the definition is written", func() error {
			read()
			change(d.Object["spec"].(map[string]any))
			return c.Update(t.Context(), d)
		})
	}
	read()
	ours := d.DeepCopy().Object["spec"].(map[string]any)
	define(func(spec map[string]any) {
		delete(spec, "conversion")
		for _, v := range spec["versions"].([]any) {
			v := v.(map[string]any)
			v["storage"] = v["name"] == "v1beta1"
		}
	})
	await(t, "a pool is stored as v1beta1", func() error {
		read()
		if stored, _, _ := unstructured.NestedStringSlice(d.Object, "status", "storedVersions"); !slices.Contains(stored, "v1beta1") {
			return fmt.Errorf("stored versions %v", stored)
		}
		return c.Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "apps.openyurt.io/v1beta1", "kind": "NodePool", "metadata": map[string]any{"name": "old"},
			"spec": map[string]any{"type": "Edge", "hostNetwork": true, "labels": map[string]any{"site": "old"}},
		}})
	})
	define(func(spec map[string]any) { spec["conversion"], spec["versions"] = ours["conversion"], ours["versions"] })
	var pool v1beta2.NodePool
	await(t, "nobody converts it", func() error {
		if err := c.Get(t.Context(), client.ObjectKey{Name: "old"}, &pool); err == nil {
			return errors.New("it can be read")
		}
		return nil
	})
	if err := c.startManagers(1); err != nil {
		t.Fatal(err)
	}
	c.node(t, "old-1", "old", "10.9.0.1")
	await(t, "the manager keeps it", func() error {
		if err := c.Get(t.Context(), client.ObjectKey{Name: "old"}, &pool); err != nil {
			return err
		}
		if pool.Status.ReadyNodeNum != 1 || pool.Labels[apps.NodePoolTypeLabel] != "edge" {
			return fmt.Errorf("labels %v, status %+v", pool.Labels, pool.Status)
		}
		if s := pool.Spec; !s.HostNetwork || s.LeaderElectionStrategy != v1beta2.ElectRandom || s.LeaderReplicas != 1 || c.get(t, "old-1").Labels["site"] != "old" {
			return fmt.Errorf("spec %+v", s)
		}
		return nil
	})
}
