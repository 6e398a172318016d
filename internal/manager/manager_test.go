package manager

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
	"github.com/yurt-edge/yurt/api/apps/v1beta1"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/manager/vouch"
	"github.com/yurt-edge/yurt/internal/manager/webhookcert"
)

func TestColumns(t *testing.T) {
	c := theCluster(t)
	c.pool(t, "columns", v1beta2.NodePoolSpec{})
	c.node(t, "columns-1", "columns", "10.9.0.1")
	await(t, "the node is counted", func() error {
		out, err := c.cp.Kubectl(t.Context(), "get", "np", "columns", "-o", "wide")
		if err != nil {
			return err
		}
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if got, want := strings.Fields(lines[0]), []string{
			"NAME", "TYPE", "READYNODES", "NOTREADYNODES", "VOUCHED", "LEADERNODES", "LEADER", "LEADERELECTIONAGE", "AGE",
		}; !slices.Equal(got, want) {
			t.Fatalf("columns: got %v, want %v", got, want)
		}
		if got := strings.Join(strings.Fields(lines[1]), " "); !strings.HasPrefix(got, "columns Edge 1 0 ") {
			return fmt.Errorf("row %q", got)
		}
		return nil
	})
	out, err := c.cp.Kubectl(t.Context(), "get", "yurt", "-o", "name")
	if err != nil || !strings.Contains(out, "nodepool.apps.openyurt.io/columns") || !strings.Contains(out, "nodebucket.apps.openyurt.io/columns-") {
		t.Errorf("category yurt: got %q, %v", out, err)
	}
}

// TestRules violates each rule of the types once.
func TestRules(t *testing.T) {
	c := theCluster(t)
	for _, tc := range []struct{ name, spec, then, want string }{
		{name: "type", spec: `{type: Moon}`, want: `spec.type: Unsupported value: "Moon"`},
		{name: "type-change", spec: `{type: Edge}`, then: `{"spec":{"type":"Cloud"}}`, want: "type cannot change"},
		{name: "cloud-host", spec: `{type: Cloud, hostNetwork: true}`, want: "a Cloud pool cannot set hostNetwork"},
		{name: "host-change", spec: `{}`, then: `{"spec":{"hostNetwork":true}}`, want: "hostNetwork cannot change"},
		{name: "inter-change", spec: `{}`, then: `{"spec":{"interConnectivity":true}}`, want: "interConnectivity cannot change"},
		{name: "strategy", spec: `{leaderElectionStrategy: best}`, want: "spec.leaderElectionStrategy: Unsupported value"},
		{name: "mark", spec: `{leaderElectionStrategy: mark}`, want: "strategy mark needs leaderNodeLabelSelector"},
		{name: "replicas", spec: `{leaderReplicas: 0}`, want: "spec.leaderReplicas"},
		{name: "replicas-many", spec: `{leaderReplicas: 17}`, want: "spec.leaderReplicas"},
		{name: "label-value", spec: `{labels: {a: "b c"}}`, want: "spec.labels: keys are"},
		{name: "label-long", spec: `{labels: {a: "` + strings.Repeat("v", 64) + `"}}`, want: "at most 63 characters"},
		{name: "label-key", spec: `{labels: {"a b": c}}`, want: "spec.labels: keys are"},
		{name: "annotation-key", spec: `{annotations: {"a b": c}}`, want: "spec.annotations: keys are"},
		{name: "taint-value", spec: `{taints: [{key: a, value: "b c", effect: NoSchedule}]}`, want: "spec.taints: keys are"},
		{name: "label-ours", spec: `{labels: {apps.openyurt.io/nodepool: x}}`, want: "belong to Yurt"},
		{name: "effect", spec: `{taints: [{key: a, effect: Never}]}`, want: "effect is one of"},
		{name: "taint-twice", spec: `{taints: [{key: a, effect: NoSchedule}, {key: a, effect: NoSchedule, value: x}]}`, want: "duplicate entries"},
		{name: "secrets", spec: `{poolScopeMetadata: [{group: "", version: v1, resource: secrets}]}`, want: "are not shared in a pool"},
		{name: "wildcard", spec: `{poolScopeMetadata: [{group: "", version: v1, resource: "*"}]}`, want: "no wildcards"},
		{name: "wild-group", spec: `{poolScopeMetadata: [{group: "*", version: v1, resource: secrets}]}`, want: "no wildcards"},
		{name: "subresource", spec: `{poolScopeMetadata: [{group: "", version: v1, resource: pods/log}]}`, want: "no subresources"},
		{name: "no-version", spec: `{poolScopeMetadata: [{group: a, version: "", resource: b}]}`, want: "version and resource must not be empty"},
		{name: strings.Repeat("n", 64), spec: `{}`, want: "at most 63 characters"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := c.cp.Apply(t.Context(), fmt.Sprintf("{apiVersion: apps.openyurt.io/v1beta2, kind: NodePool, metadata: {name: %s}, spec: %s}", tc.name, tc.spec))
			if tc.then != "" {
				if err != nil {
					t.Fatal(err)
				}
				p := &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: tc.name}}
				err = c.Patch(t.Context(), p, client.RawPatch("application/merge-patch+json", []byte(tc.then)))
				if err := c.Delete(t.Context(), p); err != nil {
					t.Fatal(err)
				}
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	c := theCluster(t)
	p := &unstructured.Unstructured{Object: map[string]any{"metadata": map[string]any{"name": "bare"}}}
	p.SetGroupVersionKind(v1beta2.GroupVersion.WithKind("NodePool"))
	if err := c.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	defer c.Delete(t.Context(), p)
	var got v1beta2.NodePool
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(p), &got); err != nil {
		t.Fatal(err)
	}
	want := v1beta2.NodePoolSpec{
		Type: v1beta2.Edge, LeaderElectionStrategy: v1beta2.ElectRandom, LeaderReplicas: 1,
		PoolScopeMetadata: []metav1.GroupVersionResource{
			{Version: "v1", Resource: "services"}, {Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
		},
	}
	if !reflect.DeepEqual(got.Spec, want) {
		t.Errorf("got %+v, want %+v", got.Spec, want)
	}
	await(t, "pools can be selected by type", func() error {
		var edge v1beta2.NodePoolList
		err := c.List(t.Context(), &edge, client.MatchingLabels{"nodepool.openyurt.io/type": "edge"})
		if err == nil && !slices.ContainsFunc(edge.Items, func(p v1beta2.NodePool) bool { return p.Name == "bare" }) {
			err = fmt.Errorf("%d pools have the label", len(edge.Items))
		}
		return err
	})
}

// TestOpenYurtsClientsWrite makes and changes a pool as OpenYurt's Go clients do,
// who write null for a time that is not set.
func TestOpenYurtsClientsWrite(t *testing.T) {
	c := theCluster(t)
	p := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apps.openyurt.io/v1beta2", "kind": "NodePool",
		"metadata": map[string]any{"name": "theirs", "creationTimestamp": nil},
		"spec": map[string]any{"type": "Edge", "interConnectivity": true, "enableLeaderElection": true, "poolScopeMetadata": []any{
			map[string]any{"group": "", "version": "v1", "resource": "services"},
			map[string]any{"group": "discovery.k8s.io", "version": "v1", "resource": "endpoints"},
		}},
		"status": map[string]any{"readyNodeNum": int64(0), "unreadyNodeNum": int64(0), "leaderLastElectedTime": nil},
	}}
	if err := c.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		await(t, "delete pool", func() error { return client.IgnoreNotFound(c.Delete(context.Background(), p)) })
	})
	change := func(what string, write func(client.Object) error, to func()) {
		t.Helper()
		await(t, what, func() error {
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(p), p); err != nil {
				return err
			}
			to()
			return write(p) // or a conflict with a controller
		})
	}
	status := map[string]any{"readyNodeNum": int64(0), "unreadyNodeNum": int64(0), "leaderLastElectedTime": nil}
	change("another spec", func(o client.Object) error { return c.Update(t.Context(), o) }, func() {
		p.Object["spec"] = map[string]any{
			"type": "Edge", "interConnectivity": true, "leaderElectionStrategy": "mark", "leaderReplicas": int64(2),
			"leaderNodeLabelSelector": map[string]any{"kubernetes.io/hostname": "theirs-1"}, "enableLeaderElection": true,
			"poolScopeMetadata": p.Object["spec"].(map[string]any)["poolScopeMetadata"],
		}
		p.Object["status"] = status
	})
	change("another status", func(o client.Object) error { return c.Status().Update(t.Context(), o) }, func() { p.Object["status"] = status })
	await(t, "the ConfigMap tells of it", func() error {
		var told corev1.ConfigMap
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "leader-hub-theirs"}, &told); err != nil {
			return err
		}
		if got, want := told.Data, map[string]string{
			"leaders": "", "pool-scoped-metadata": "/v1/services,discovery.k8s.io/v1/endpoints,discovery.k8s.io/v1/endpointslices",
			"interconnectivity": "true", "enable-leader-election": "true",
		}; !maps.Equal(got, want) {
			return fmt.Errorf("got %v", got)
		}
		return nil
	})
}

// TestOldVersions has the real API server convert by the real webhook.
func TestOldVersions(t *testing.T) {
	c := theCluster(t)
	c.pool(t, "versions", v1beta2.NodePoolSpec{
		Type: v1beta2.Edge, HostNetwork: true, InterConnectivity: true, EnableLeaderElection: true, LeaderReplicas: 3,
		Labels: map[string]string{"a": "b"},
	})
	var old v1beta1.NodePool
	await(t, "v1beta1 is served", func() error { return c.Get(t.Context(), client.ObjectKey{Name: "versions"}, &old) })
	if old.Spec.Type != "Edge" || !old.Spec.HostNetwork || old.Spec.Labels["a"] != "b" {
		t.Errorf("v1beta1: got %+v", old.Spec)
	}
	var oldest v1alpha1.NodePool
	// The managers write the status meanwhile.
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := c.Get(t.Context(), client.ObjectKey{Name: "versions"}, &oldest); err != nil {
			return err
		}
		oldest.Spec.Labels["a"] = "c"
		oldest.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"x": "y"}}
		return c.Update(t.Context(), &oldest)
	})
	if err != nil {
		t.Fatal(err)
	}
	var now v1beta2.NodePool
	if err := c.Get(t.Context(), client.ObjectKey{Name: "versions"}, &now); err != nil {
		t.Fatal(err)
	}
	if s := now.Spec; s.Labels["a"] != "c" || !s.HostNetwork || !s.InterConnectivity || !s.EnableLeaderElection || s.LeaderReplicas != 3 {
		t.Errorf("a write by v1alpha1 lost something: %+v", s)
	}
	if err := c.Get(t.Context(), client.ObjectKey{Name: "versions"}, &oldest); err != nil || oldest.Spec.Selector == nil {
		t.Errorf("selector: got %v, %v", oldest.Spec.Selector, err)
	}
	created := &v1alpha1.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "versions-old"}, Spec: v1alpha1.NodePoolSpec{Type: "Cloud"}}
	if err := c.Create(t.Context(), created); err != nil {
		t.Fatal(err)
	}
	defer c.Delete(t.Context(), created)
	if err := c.Get(t.Context(), client.ObjectKey{Name: "versions-old"}, &now); err != nil || now.Spec.Type != v1beta2.Cloud {
		t.Errorf("created by v1alpha1: got %+v, %v", now.Spec, err)
	}
	// The rules hold in every version.
	for text, want := range map[string]string{
		`{"spec":{"type":"Edge"}}`: "spec.type and spec.hostNetwork cannot change",
		`{"spec":{"type":"Moon"}}`: "want Edge or Cloud",
		`{"metadata":{"annotations":{"nodepool.openyurt.io/hostnetwork":"true"}}}`: "spec.hostNetwork",
		`{"spec":{"labels":{"a":"b c"}}}`:                                          "spec.labels: keys are",
		`{"metadata":{"annotations":{"nodepool.openyurt.io/v1beta2":"{\"spec\":{\"poolScopeMetadata\":[{\"version\":\"v1\",\"resource\":\"secrets\"}]}}"}}}`: "spec.poolScopeMetadata",
	} {
		err := c.Patch(t.Context(), created, client.RawPatch("application/merge-patch+json", []byte(text)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s by v1alpha1: got %v, want %q", text, err, want)
		}
	}
}

func TestNodeJoinsMovesAndLeaves(t *testing.T) {
	c := theCluster(t)
	first := c.pool(t, "first", v1beta2.NodePoolSpec{
		Labels: map[string]string{"site": "one"}, Annotations: map[string]string{"note": "one"},
		Taints: []corev1.Taint{{Key: "site", Value: "one", Effect: corev1.TaintEffectNoSchedule}},
	})
	second := c.pool(t, "second", v1beta2.NodePoolSpec{HostNetwork: true, Labels: map[string]string{"tier": "two"}})
	c.node(t, "mover", "first", "10.9.1.1")
	wears := func(what string, want map[string]string, note string, taints ...string) {
		t.Helper()
		await(t, what, func() error {
			n := c.get(t, "mover")
			got := map[string]string{}
			for _, k := range []string{"site", "tier", "mine", apps.HostNetworkLabel} {
				if v, ok := n.Labels[k]; ok {
					got[k] = v
				}
			}
			var have []string
			for _, taint := range n.Spec.Taints {
				have = append(have, taint.ToString())
			}
			if !maps.Equal(got, want) || n.Annotations["note"] != note || !slices.Equal(have, taints) {
				return fmt.Errorf("labels %v, note %q, taints %v", got, n.Annotations["note"], have)
			}
			return nil
		})
	}
	counts := func(pool *v1beta2.NodePool, ready, unready int32, nodes ...string) {
		t.Helper()
		await(t, "status of "+pool.Name, func() error {
			var p v1beta2.NodePool
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(pool), &p); err != nil {
				return err
			}
			if s := p.Status; s.ReadyNodeNum != ready || s.UnreadyNodeNum != unready || !slices.Equal(s.Nodes, nodes) {
				return fmt.Errorf("got %+v", s)
			}
			return nil
		})
	}
	wears("joins", map[string]string{"site": "one"}, "one", "site=one:NoSchedule")
	counts(first, 1, 0, "mover")

	c.label(t, "mover", "mine", "yes")
	c.patch(t, first, `{"spec":{"labels":{"site":"uno"},"taints":null}}`)
	wears("follows the pool", map[string]string{"site": "uno", "mine": "yes"}, "one")

	if err := c.Delete(t.Context(), first); err == nil || !strings.Contains(err.Error(), "node mover is in pool first") {
		t.Errorf("deletion of a pool with a node: got %v", err)
	}
	c.patch(t, first, `{"metadata":{"labels":{"only":"first"}}}`)
	if err := c.DeleteAllOf(t.Context(), &v1beta2.NodePool{}, client.MatchingLabels{"only": "first"}); err == nil {
		t.Error("a pool with a node was deleted with its like")
	}

	c.label(t, "mover", apps.NodePoolLabel, "second")
	wears("moves", map[string]string{"tier": "two", apps.HostNetworkLabel: "true", "mine": "yes"}, "")
	counts(first, 0, 0)
	counts(second, 1, 0, "mover")

	c.condition(t, "mover", corev1.NodeReady, corev1.ConditionFalse)
	counts(second, 0, 1, "mover")
	c.condition(t, "mover", corev1.NodeReady, corev1.ConditionTrue)

	c.label(t, "mover", apps.NodePoolLabel, "")
	wears("leaves", map[string]string{"mine": "yes"}, "")
	if _, ok := c.get(t, "mover").Annotations[apps.PreviousAttributes]; ok {
		t.Error("a node in no pool remembers one")
	}
	counts(second, 0, 0)
}

// TestStatusIsWrittenOnceForManyNodes counts the writes of a pool's status while
// its nodes fail one after the other, which two controllers see.
func TestStatusIsWrittenOnceForManyNodes(t *testing.T) {
	c := theCluster(t)
	const name, nodes = "gathered", 16
	pool := c.pool(t, name, v1beta2.NodePoolSpec{InterConnectivity: true, EnableLeaderElection: true})
	for i := range nodes {
		c.node(t, fmt.Sprintf("gathered-%d", i), name, fmt.Sprintf("10.9.8.%d", i))
	}
	unready := func(want int32) func() error {
		return func() error {
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(pool), pool); err != nil {
				return err
			}
			if s := pool.Status; len(s.Nodes) != nodes || s.UnreadyNodeNum != want || len(s.Contacts) == 0 {
				return fmt.Errorf("status %+v", s)
			}
			return nil
		}
	}
	await(t, "all are ready", unready(0))
	all, err := client.NewWithWatch(c.cp.RESTConfig(), client.Options{Scheme: newScheme()})
	if err != nil {
		t.Fatal(err)
	}
	w, err := all.Watch(t.Context(), &v1beta2.NodePoolList{}, client.MatchingFields{"metadata.name": name},
		&client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: pool.ResourceVersion}})
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for i := range nodes {
		c.condition(t, fmt.Sprintf("gathered-%d", i), corev1.NodeReady, corev1.ConditionFalse)
	}
	await(t, "none is ready", unready(nodes))
	// One controller writes each second, the other each half.
	most := 2 + int(3*time.Since(begin).Seconds())
	writes := 0
	for last := ""; last != pool.ResourceVersion; writes++ {
		select {
		case e := <-w.ResultChan():
			p, ok := e.Object.(*v1beta2.NodePool)
			if !ok {
				t.Fatalf("got %v", e)
			}
			last = p.ResourceVersion
		case <-time.After(time.Minute):
			t.Fatalf("the watch does not come to version %s", pool.ResourceVersion)
		}
	}
	w.Stop()
	if writes > most {
		t.Errorf("%d writes for %d nodes, want at most %d", writes, nodes, most)
	}
}

func TestLeaders(t *testing.T) {
	c := theCluster(t)
	const name = "led"
	pool := c.pool(t, name, v1beta2.NodePoolSpec{InterConnectivity: true})
	c.node(t, "led-1", name, "10.9.2.1")
	c.node(t, "led-2", name, "10.9.2.2")
	c.node(t, "led-3", name, "10.9.2.3")
	c.label(t, "led-3", apps.EdgeWorkerLabel, "false")
	led := func(what, leaders, elect string, ready corev1.ConditionStatus) {
		t.Helper()
		await(t, what, func() error {
			var p v1beta2.NodePool
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(pool), &p); err != nil {
				return err
			}
			var got []string
			for _, l := range p.Status.LeaderEndpoints {
				got = append(got, l.NodeName+"/"+l.Address)
			}
			slices.Sort(got)
			status := corev1.ConditionStatus("")
			for _, condition := range p.Status.Conditions {
				status = condition.Status
			}
			var told corev1.ConfigMap
			if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "leader-hub-" + name}, &told); err != nil {
				return err
			}
			want := map[string]string{
				"leaders": leaders, "pool-scoped-metadata": "/v1/services,discovery.k8s.io/v1/endpointslices",
				"interconnectivity": "true", "enable-leader-election": elect,
			}
			if strings.Join(got, ",") != leaders || int(p.Status.LeaderNum) != len(got) || status != ready || !maps.Equal(told.Data, want) {
				return fmt.Errorf("status %+v, ConfigMap %v", p.Status, told.Data)
			}
			if told.Labels[apps.ConfigMapNameLabel] != told.Name || !metav1.IsControlledBy(&told, &p) {
				return fmt.Errorf("ConfigMap's labels %v, owners %v", told.Labels, told.OwnerReferences)
			}
			return nil
		})
	}
	led("no election", "", "false", "")
	c.patch(t, pool, `{"spec":{"enableLeaderElection":true,"leaderReplicas":2}}`)
	led("random", "led-1/10.9.2.1,led-2/10.9.2.2", "true", corev1.ConditionTrue)
	c.condition(t, "led-2", "YurtHubLinkReady", corev1.ConditionFalse)
	led("a hub without a link", "led-1/10.9.2.1", "true", corev1.ConditionTrue)
	c.condition(t, "led-2", "YurtHubLinkReady", corev1.ConditionTrue)
	led("it has one again", "led-1/10.9.2.1,led-2/10.9.2.2", "true", corev1.ConditionTrue)
	c.patch(t, pool, `{"spec":{"leaderElectionStrategy":"mark","leaderNodeLabelSelector":{"kubernetes.io/hostname":"led-2"}}}`)
	led("mark", "led-2/10.9.2.2", "true", corev1.ConditionTrue)
	c.patch(t, pool, `{"spec":{"leaderNodeLabelSelector":{"kubernetes.io/hostname":"none"}}}`)
	led("nobody is marked", "", "true", corev1.ConditionFalse)
	c.patch(t, pool, `{"spec":{"enableLeaderElection":false}}`)
	led("switched off", "", "false", "")

	// The ConfigMap comes back as it was, label and all.
	told := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "leader-hub-" + name}}
	c.patch(t, told, `{"metadata":{"labels":null},"data":{"leaders":"evil/1.2.3.4"}}`)
	led("tampered with", "", "false", "")

	for _, n := range []string{"led-1", "led-2", "led-3"} {
		c.label(t, n, apps.NodePoolLabel, "")
	}
	await(t, "delete pool", func() error { return c.Delete(t.Context(), pool) })
	await(t, "the ConfigMap goes", func() error {
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(told), told); !apierrors.IsNotFound(err) {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
}

// TestForeignHubsAreToldOfTheirOwn replaces the hubs of a pool one after the
// other. The ConfigMap, by which OpenYurt's go, names no leader that they cannot
// use; the status, by which ours go, names those who lead.
func TestForeignHubsAreToldOfTheirOwn(t *testing.T) {
	c := theCluster(t)
	pool := c.pool(t, "mixed", v1beta2.NodePoolSpec{InterConnectivity: true, EnableLeaderElection: true})
	c.node(t, "mixed-1", "mixed", "10.9.8.1")
	told := func(what, lead, leaders string) {
		t.Helper()
		await(t, what, func() error {
			var p v1beta2.NodePool
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(pool), &p); err != nil {
				return err
			}
			var names []string
			for _, l := range p.Status.LeaderEndpoints {
				names = append(names, l.NodeName)
			}
			var config corev1.ConfigMap
			if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "leader-hub-mixed"}, &config); err != nil {
				return err
			}
			if strings.Join(names, " ") != lead || config.Data["leaders"] != leaders || config.Data["enable-leader-election"] != "true" {
				return fmt.Errorf("%v lead, the ConfigMap has %v", names, config.Data)
			}
			return nil
		})
	}
	c.label(t, "mixed-1", apps.EdgeWorkerLabel, "true")
	told("it leads", "mixed-1", "mixed-1/10.9.8.1")
	c.node(t, "mixed-2", "mixed", "10.9.8.2")
	c.label(t, "mixed-2", apps.EdgeWorkerLabel, "true")
	told("hubs of OpenYurt only", "mixed-1", "mixed-1/10.9.8.1")
	c.condition(t, "mixed-1", "YurtHubLinkReady", corev1.ConditionTrue)
	told("the leader gets one of ours", "mixed-1", "")
	c.condition(t, "mixed-2", "YurtHubLinkReady", corev1.ConditionTrue)
	told("all are ours", "mixed-1", "mixed-1/10.9.8.1")
}

// TestForeignHubsMayAsk asks what hubs of OpenYurt ask, as their nodes: those of
// 1.4 to 1.6 always, those of 1.7 where the chart is told that there are some.
func TestForeignHubsMayAsk(t *testing.T) {
	c := theCluster(t)
	c.pool(t, "asked", v1beta2.NodePoolSpec{})
	c.node(t, "asked-1", "asked", "10.9.9.1")
	hub := c.as(t, "system:node:asked-1", "system:nodes", "openyurt:yurthub", "system:authenticated")
	named := func(name string) client.MatchingFields { return client.MatchingFields{"metadata.name": name} }
	await(t, "the pool's nodes, as versions of old have them", func() error {
		var pools v1beta1.NodePoolList
		err := hub.List(t.Context(), &pools, named("asked"))
		if err == nil && (len(pools.Items) != 1 || !slices.Equal(pools.Items[0].Status.Nodes, []string{"asked-1"})) {
			err = fmt.Errorf("pools %+v", pools.Items)
		}
		return err
	})
	inSystem := client.InNamespace(metav1.NamespaceSystem)
	byLabel := client.MatchingLabels{apps.ConfigMapNameLabel: "yurt-hub-cfg"}
	for what, ask := range map[string]func() error{
		"the buckets of the pool": func() error {
			return hub.List(t.Context(), &v1alpha1.NodeBucketList{}, client.MatchingLabels{apps.PoolNameLabel: "asked"})
		},
		"the Services": func() error { return hub.List(t.Context(), &corev1.ServiceList{}) },
		"the settings": func() error { return hub.List(t.Context(), &corev1.ConfigMapList{}, inSystem, named("yurt-hub-cfg")) },
		"the Node":     func() error { return hub.Get(t.Context(), client.ObjectKey{Name: "asked-1"}, &corev1.Node{}) },
		"the node's own": func() error {
			return hub.Get(t.Context(), client.ObjectKey{Namespace: corev1.NamespaceNodeLease, Name: "asked-1"}, &coordinationv1.Lease{})
		},
	} {
		if err := ask(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := hub.List(t.Context(), &corev1.ConfigMapList{}, inSystem, byLabel); !apierrors.IsForbidden(err) {
		t.Errorf("ConfigMaps by a label: got %v, want it refused", err)
	}
	for _, o := range render(t, namespace, map[string]any{"openyurtHubs": true}) {
		if o.GetName() != "yurt-hub-openyurt" {
			continue
		}
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := c.Delete(context.Background(), o); err != nil {
				t.Error(err)
			}
		})
	}
	await(t, "ConfigMaps by a label", func() error { return hub.List(t.Context(), &corev1.ConfigMapList{}, inSystem, byLabel) })
}

func TestMultiplexerRole(t *testing.T) {
	c := theCluster(t)
	rules := func(what string, want ...string) {
		t.Helper()
		await(t, what, func() error {
			var role rbacv1.ClusterRole
			if err := c.Get(t.Context(), client.ObjectKey{Name: "yurt-hub-multiplexer"}, &role); err != nil {
				return err
			}
			var got []string
			for _, r := range role.Rules {
				got = append(got, fmt.Sprint(r.APIGroups, r.Resources, r.Verbs))
			}
			if !slices.Equal(got, want) {
				return fmt.Errorf("got %q, want %q", got, want)
			}
			return nil
		})
	}
	const services, slicesRule = "[] [services] [list watch]", "[discovery.k8s.io] [endpointslices] [list watch]"
	c.pool(t, "shares-1", v1beta2.NodePoolSpec{})
	rules("one pool", services, slicesRule)
	more := c.pool(t, "shares-2", v1beta2.NodePoolSpec{PoolScopeMetadata: []metav1.GroupVersionResource{
		{Version: "v1", Resource: "services"}, {Group: "discovery.k8s.io", Version: "v1", Resource: "endpoints"},
	}})
	rules("two pools", services, "[discovery.k8s.io] [endpoints endpointslices] [list watch]")
	if err := c.Delete(t.Context(), more); err != nil {
		t.Fatal(err)
	}
	rules("one went", services, slicesRule)
	c.patch(t, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "yurt-hub-multiplexer"}},
		`{"rules":[{"apiGroups":[""],"resources":["secrets"],"verbs":["list"]}]}`)
	rules("tampered with", services, slicesRule)
}

func TestBuckets(t *testing.T) {
	c := theCluster(t)
	pool := c.pool(t, "bucketed", v1beta2.NodePoolSpec{})
	for i := range 3 {
		c.node(t, fmt.Sprintf("bucketed-%d", i), "bucketed", "10.9.3.1")
	}
	hold := func(what string, want ...string) {
		t.Helper()
		await(t, what, func() error {
			var list v1alpha1.NodeBucketList
			if err := c.List(t.Context(), &list, client.MatchingLabels{apps.PoolNameLabel: "bucketed"}); err != nil {
				return err
			}
			var got []string
			for _, b := range list.Items {
				if !metav1.IsControlledBy(&b, pool) || int(b.NumNodes) != len(b.Nodes) || len(b.Nodes) > 2 {
					return fmt.Errorf("bucket %+v", b)
				}
				for _, n := range b.Nodes {
					got = append(got, n.Name)
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				return fmt.Errorf("got %v, want %v", got, want)
			}
			return nil
		})
	}
	hold("three nodes, two a bucket", "bucketed-0", "bucketed-1", "bucketed-2")
	c.label(t, "bucketed-1", apps.NodePoolLabel, "")
	hold("one leaves", "bucketed-0", "bucketed-2")
	c.label(t, "bucketed-0", apps.NodePoolLabel, "")
	c.label(t, "bucketed-2", apps.NodePoolLabel, "")
	hold("all leave")
}

func TestPodsAreBound(t *testing.T) {
	c := theCluster(t)
	c.node(t, "binder", "", "10.9.4.1")
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "bound"},
		Spec:       corev1.PodSpec{NodeName: "binder", Containers: []corev1.Container{{Name: "a", Image: "b"}}},
	}
	await(t, "pod is made", func() error { return c.Create(t.Context(), pod) })
	defer c.Delete(t.Context(), pod, client.GracePeriodSeconds(0))
	tolerates := func(what string, want string) {
		t.Helper()
		await(t, what, func() error {
			var p corev1.Pod
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(pod), &p); err != nil {
				return err
			}
			if len(p.Spec.Containers) != 1 || p.Spec.Containers[0].Image != "b" {
				t.Fatalf("the pod lost something: %+v", p.Spec)
			}
			var got []string
			for _, tol := range p.Spec.Tolerations {
				seconds := "for ever"
				if tol.TolerationSeconds != nil {
					seconds = fmt.Sprint(*tol.TolerationSeconds)
				}
				got = append(got, seconds)
			}
			if strings.Join(got, ",") != want {
				return fmt.Errorf("got %v, want %s", got, want)
			}
			return nil
		})
	}
	annotate := func(text string) {
		c.patch(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "binder"}}, `{"metadata":{"annotations":`+text+`}}`)
	}
	tolerates("as Kubernetes makes it", "300,300")
	annotate(`{"node.openyurt.io/autonomy-duration":"2h"}`)
	tolerates("for two hours", "7200,7200")
	annotate(`{"node.openyurt.io/autonomy-duration":"0s"}`)
	tolerates("for ever", "for ever,for ever")
	annotate(`{"node.openyurt.io/autonomy-duration":"soon"}`)
	await(t, "an event names the bad annotation", func() error {
		out, err := c.cp.Kubectl(t.Context(), "get", "events", "-n", "default", "--field-selector=reason=BadAutonomy")
		if err == nil && !strings.Contains(out, `="soon" is no duration`) {
			err = errors.New(out)
		}
		return err
	})
	annotate(`{"node.openyurt.io/autonomy-duration":null,"node.beta.openyurt.io/autonomy":"true"}`)
	tolerates("the older annotation", "for ever,for ever")
	annotate(`{"node.beta.openyurt.io/autonomy":null}`)
	tolerates("as it was", "300,300")
}

// TestPodsStayOffHostNetwork makes pods that ask for it, each with another
// affinity of its own, which they keep.
func TestPodsStayOffHostNetwork(t *testing.T) {
	c := theCluster(t)
	off := corev1.NodeSelectorRequirement{Key: apps.HostNetworkLabel, Operator: corev1.NodeSelectorOpNotIn, Values: []string{"true"}}
	own := corev1.NodeSelectorRequirement{Key: "a", Operator: corev1.NodeSelectorOpExists}
	field := []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{"n"}}}
	required := func(terms ...corev1.NodeSelectorTerm) *corev1.Affinity {
		return &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: terms}}}
	}
	expressions := func(e ...corev1.NodeSelectorRequirement) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: e}
	}
	preferred := []corev1.PreferredSchedulingTerm{{Weight: 1, Preference: expressions(own)}}
	apart := &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{TopologyKey: corev1.LabelHostname}}}
	for name, tc := range map[string]struct{ has, want *corev1.Affinity }{
		"none":    {nil, required(expressions(off))},
		"of-pods": {&corev1.Affinity{PodAntiAffinity: apart}, &corev1.Affinity{PodAntiAffinity: apart, NodeAffinity: required(expressions(off)).NodeAffinity}},
		"preferred": {&corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: preferred}}, &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
			PreferredDuringSchedulingIgnoredDuringExecution: preferred,
			RequiredDuringSchedulingIgnoredDuringExecution:  required(expressions(off)).NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution,
		}}},
		"required": {required(expressions(own), corev1.NodeSelectorTerm{MatchFields: field}), required(expressions(own, off), corev1.NodeSelectorTerm{MatchFields: field, MatchExpressions: []corev1.NodeSelectorRequirement{off}})},
		"asked":    {required(expressions(off, own), expressions(own)), required(expressions(off, own), expressions(own, off))},
	} {
		t.Run(name, func(t *testing.T) {
			pod := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "off-" + name, Annotations: map[string]string{apps.ExcludeHostNetwork: "true"}},
				Spec:       corev1.PodSpec{Affinity: tc.has, Containers: []corev1.Container{{Name: "a", Image: "b"}}},
			}
			await(t, "a pod is made", func() error { // the API server may not have read the policy yet
				made := pod.DeepCopy()
				if err := c.Create(t.Context(), made); err != nil {
					return err
				}
				if err := c.Delete(t.Context(), made, client.GracePeriodSeconds(0)); err != nil {
					return err
				}
				if !reflect.DeepEqual(made.Spec.Affinity, tc.want) {
					return fmt.Errorf("got %v, want %v", made.Spec.Affinity, tc.want)
				}
				return nil
			})
		})
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "off-not-asked", Annotations: map[string]string{apps.ExcludeHostNetwork: "false"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "b"}}},
	}
	if err := c.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	defer c.Delete(t.Context(), pod, client.GracePeriodSeconds(0))
	if pod.Spec.Affinity != nil {
		t.Errorf("a pod that does not ask for it got %v", pod.Spec.Affinity)
	}
}

// TestNodesCannotForge has a node write what the manager acts upon.
func TestNodesCannotForge(t *testing.T) {
	c := theCluster(t)
	c.pool(t, "forge", v1beta2.NodePoolSpec{})
	c.node(t, "forger", "forge", "10.9.5.1")
	c.label(t, "forger", apps.EdgeWorkerLabel, "true")
	node := c.as(t, "system:node:forger", "system:nodes", "system:authenticated")
	for text, what := range map[string]string{
		`{"metadata":{"annotations":{"nodepool.openyurt.io/previous-attributes":"{\"taints\":[]}"}}}`: "is written by yurt-manager only",
		`{"metadata":{"labels":{"apps.openyurt.io/nodepool":"other"}}}`:                               "a node cannot change its pool by itself",
		`{"metadata":{"labels":{"apps.openyurt.io/nodepool":null}}}`:                                  "a node cannot change its pool by itself",
		`{"metadata":{"labels":{"apps.openyurt.io/desired-nodepool":"other"}}}`:                       "a node cannot change its pool by itself",
		`{"metadata":{"labels":{"openyurt.io/is-edge-worker":"false"}}}`:                              "a node cannot change openyurt.io/is-edge-worker",
		`{"metadata":{"labels":{"openyurt.io/is-edge-worker":null}}}`:                                 "a node cannot change openyurt.io/is-edge-worker",
	} {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "forger"}}
		patch := client.RawPatch("application/merge-patch+json", []byte(text))
		if err := node.Patch(t.Context(), n, patch); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("patch: got %v, want %q", err, what)
		}
		if err := node.Status().Patch(t.Context(), n, patch); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("patch of status: got %v, want %q", err, what)
		}
	}
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "forger"}}
	err := node.Status().Patch(t.Context(), n, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"a":"b"}}}`)))
	if err != nil {
		t.Errorf("a node's own annotation: %v", err)
	}
	// It cannot go and come back either, but it says what it is when it joins.
	if err := node.Delete(t.Context(), n); !apierrors.IsForbidden(err) {
		t.Errorf("a node's own deletion: got %v", err)
	}
	joins := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "joiner", Labels: map[string]string{apps.NodePoolLabel: "forge", apps.EdgeWorkerLabel: "true"}}}
	if err := c.as(t, "system:node:joiner", "system:nodes", "system:authenticated").Create(t.Context(), joins); err != nil {
		t.Fatalf("a node that joins: %v", err)
	}
	if err := c.Delete(t.Context(), joins); err != nil {
		t.Error(err)
	}
}

// TestDesiredNodePool joins a pool in the older way.
func TestDesiredNodePool(t *testing.T) {
	c := theCluster(t)
	c.node(t, "desires", "", "10.9.5.9")
	in := func(pool, site string) {
		t.Helper()
		await(t, "in pool "+pool, func() error {
			if l := c.get(t, "desires").Labels; l[apps.NodePoolLabel] != pool || l["site"] != site {
				return fmt.Errorf("labels %v", l)
			}
			return nil
		})
	}
	c.label(t, "desires", apps.DesiredNodePoolLabel, "desired")
	in("desired", "")
	c.pool(t, "desired", v1beta2.NodePoolSpec{Labels: map[string]string{"site": "one"}})
	in("desired", "one")
	c.pool(t, "desired-other", v1beta2.NodePoolSpec{Labels: map[string]string{"site": "two"}})
	c.label(t, "desires", apps.DesiredNodePoolLabel, "desired-other")
	c.label(t, "desires", apps.NodePoolLabel, "")
	in("desired-other", "two")
	c.label(t, "desires", apps.NodePoolLabel, "desired") // it counts for a node in no pool
	in("desired", "one")
	c.label(t, "desires", apps.DesiredNodePoolLabel, "")
	c.label(t, "desires", apps.NodePoolLabel, "")
	in("", "")
}

// TestPoolShowsWhatItShares: whatever a user lists.
func TestPoolShowsWhatItShares(t *testing.T) {
	c := theCluster(t)
	services, slices := metav1.GroupVersionResource{Version: "v1", Resource: "services"}, metav1.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
	own := metav1.GroupVersionResource{Group: "example.com", Version: "v1", Resource: "recipes"}
	pool := c.pool(t, "shares", v1beta2.NodePoolSpec{PoolScopeMetadata: []metav1.GroupVersionResource{own}})
	shows := func(want ...metav1.GroupVersionResource) {
		t.Helper()
		var p v1beta2.NodePool
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(pool), &p); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(p.Spec.PoolScopeMetadata, want) || len(p.Shared()) != len(want) {
			t.Errorf("got %v, want %v, sharing %v", p.Spec.PoolScopeMetadata, want, p.Shared())
		}
	}
	shows(own, services, slices)
	c.patch(t, pool, `{"spec":{"poolScopeMetadata":[{"group":"","version":"v1","resource":"services"},{"group":"example.com","version":"v1","resource":"recipes"}]}}`)
	shows(services, own, slices)
	c.patch(t, pool, `{"spec":{"poolScopeMetadata":[]}}`)
	shows(services, slices)
	c.patch(t, pool, `{"spec":{"poolScopeMetadata":null}}`)
	shows(services, slices)
	old := &v1beta1.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "shares-old"}, Spec: v1beta1.NodePoolSpec{Type: "Edge"}}
	if err := c.Create(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	defer c.Delete(t.Context(), old)
	pool = &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "shares-old"}}
	shows(services, slices)
}

// TestNodePoolAccountWritesNothingElse: RBAC lets it patch NodePools, and the
// policy their label of type.
func TestNodePoolAccountWritesNothingElse(t *testing.T) {
	c := theCluster(t)
	pool := c.pool(t, "narrow", v1beta2.NodePoolSpec{Type: v1beta2.Cloud})
	await(t, "the label", func() error {
		var p v1beta2.NodePool
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(pool), &p); err != nil || p.Labels[apps.NodePoolTypeLabel] != "cloud" {
			return fmt.Errorf("labels %v, %w", p.Labels, err)
		}
		return nil
	})
	account := c.as(t, "system:serviceaccount:kube-system:yurt-manager-nodepool-controller")
	c.patch(t, pool, `{"metadata":{"labels":{"mine":"1"}}}`)
	for _, text := range []string{
		`{"spec":{"enableLeaderElection":true}}`, `{"spec":{"poolScopeMetadata":[{"group":"","version":"v1","resource":"configmaps"}]}}`,
		`{"metadata":{"labels":{"other":"1"}}}`, `{"metadata":{"labels":{"mine":"2"}}}`, `{"metadata":{"labels":{"mine":null}}}`,
		`{"metadata":{"labels":{"nodepool.openyurt.io/type":"edge"}}}`, `{"metadata":{"annotations":{"a":"b"}}}`, `{"metadata":{"finalizers":["a/b"]}}`,
	} {
		p := &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "narrow"}}
		err := account.Patch(t.Context(), p, client.RawPatch("application/merge-patch+json", []byte(text)))
		if err == nil || !strings.Contains(err.Error(), "and nothing else") {
			t.Errorf("%s: got %v", text, err)
		}
	}
}

// TestLeaderAccountWritesNothingElse: RBAC lets it write all ConfigMaps of the
// namespace, and the policy those of pools.
func TestLeaderAccountWritesNothingElse(t *testing.T) {
	c := theCluster(t)
	account := c.as(t, "system:serviceaccount:kube-system:yurt-manager-hubleaderconfig-controller")
	for name, want := range map[string]string{"coredns": "leader-hub-<pool> only", "leader-hub-nowhere": ""} {
		made := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
		err := account.Create(t.Context(), made)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("create %s: got %v, want %q", name, err, want)
		}
		if err == nil {
			if err := c.Delete(t.Context(), made); err != nil {
				t.Error(err)
			}
		}
	}
	other := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "extension-apiserver-authentication"}}
	err := account.Patch(t.Context(), other, client.RawPatch("application/merge-patch+json", []byte(`{"data":{"client-ca-file":"mine"}}`)))
	if err == nil || !strings.Contains(err.Error(), "leader-hub-<pool> only") {
		t.Errorf("patch: got %v", err)
	}
}

func (c *cluster) bundle(t *testing.T) *x509.CertPool {
	t.Helper()
	var secret corev1.Secret
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: webhookcert.Secret}, &secret); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(secret.Data["ca.crt"]) {
		t.Fatal("no bundle in the Secret")
	}
	return pool
}

func TestReplicasServeAlike(t *testing.T) {
	c := theCluster(t)
	for _, p := range c.managers {
		await(t, "ready", func() error { return ok("http://" + p.health + "/readyz") })
		conn, err := tls.Dial("tcp", p.webhook, &tls.Config{RootCAs: c.bundle(t)})
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func ok(url string) error {
	resp, err := http.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// scraper is an account that may read metrics.
const scraper = `
{apiVersion: v1, kind: ServiceAccount, metadata: {name: scraper, namespace: default}}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: scraper}, rules: [{nonResourceURLs: [/metrics], verbs: [get]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: scraper}, roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: scraper}, subjects: [{kind: ServiceAccount, name: scraper, namespace: default}]}
`

func TestMetricsAreForWhoMay(t *testing.T) {
	c := theCluster(t)
	await(t, "ready", func() error { return ok("http://" + c.managers[0].health + "/readyz") })
	err := c.cp.Apply(t.Context(), scraper)
	if err != nil {
		t.Fatal(err)
	}
	token := func(namespace, name string) string {
		out, err := c.cp.Kubectl(t.Context(), "create", "token", "-n", namespace, name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	http := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: c.bundle(t)}}}
	defer http.CloseIdleConnections()
	for _, tc := range []struct {
		token string
		want  int
	}{{"", 401}, {"nonsense", 500}, {token("default", "default"), 403}, {token("default", "scraper"), 200}} {
		req, err := newRequest(t, "https://"+c.managers[0].metrics+"/metrics", tc.token)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tc.want || tc.want == 200 != strings.Contains(string(body), "controller_runtime_reconcile_total") {
			t.Errorf("got %s, %v, want %d", resp.Status, err, tc.want)
		}
	}
}

func newRequest(t *testing.T, url, token string) (*http.Request, error) {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err == nil && token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return req, err
}

// TestLeastPrivilege asks the API server what each account may. That it is
// enough, the other tests show: the managers run with these accounts.
func TestLeastPrivilege(t *testing.T) {
	c := theCluster(t)
	verbs := []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "impersonate", "escalate", "bind", "approve", "sign"}
	resources := []schema.GroupResource{
		{Resource: "nodes"},
		{Resource: "nodes/status"},
		{Resource: "pods"},
		{Resource: "pods/exec"},
		{Resource: "secrets"},
		{Resource: "configmaps"},
		{Resource: "serviceaccounts"},
		{Resource: "serviceaccounts/token"},
		{Resource: "users"},
		{Resource: "groups"},
		{Resource: "events"},
		{Resource: "services"},
		{Resource: "services/status"},
		{Group: "discovery.k8s.io", Resource: "endpointslices"},
		{Group: "network.openyurt.io", Resource: "poolservices"},
		{Group: "network.openyurt.io", Resource: "accessfilters"},
		{Group: "network.openyurt.io", Resource: "accessfilters/status"},
		{Group: "admissionregistration.k8s.io", Resource: "validatingwebhookconfigurations"},
		{Group: "apps.openyurt.io", Resource: "nodepools"},
		{Group: "apps.openyurt.io", Resource: "nodepools/status"},
		{Group: "apps.openyurt.io", Resource: "nodebuckets"},
		{Group: rbacv1.GroupName, Resource: "clusterroles"},
		{Group: rbacv1.GroupName, Resource: "clusterrolebindings"},
		{Group: rbacv1.GroupName, Resource: "roles"},
		{Group: "certificates.k8s.io", Resource: "certificatesigningrequests"},
		{Group: "certificates.k8s.io", Resource: "certificatesigningrequests/approval"},
		{Group: "certificates.k8s.io", Resource: "signers"},
		{Group: "apps", Resource: "deployments"},
		{Group: "coordination.k8s.io", Resource: "leases"},
		{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"},
		{Group: "authentication.k8s.io", Resource: "tokenreviews"},
	}
	// By account: verb, resource, and the name where only one is allowed.
	// Where there is an @, it is in that namespace only.
	want := map[string][]string{
		"yurt-manager-access-filter-controller":   {"patch accessfilters/status"},
		"yurt-manager-csr-approver-controller":    {"update certificatesigningrequests/approval", "approve signers kubernetes.io/kubelet-serving"},
		"yurt-manager-delegate-lease-controller":  {"patch nodes", "patch nodes/status", "patch leases @kube-node-lease"},
		"yurt-manager-node-life-cycle-controller": {"patch nodes"},
		"yurt-manager-hubleader-controller":       {"patch nodepools/status"},
		"yurt-manager-hubleaderconfig-controller": {"create configmaps @kube-system", "patch configmaps @kube-system"},
		"yurt-manager-hubleaderrbac-controller":   {"create clusterroles yurt-hub-multiplexer", "patch clusterroles yurt-hub-multiplexer", "escalate clusterroles yurt-hub-multiplexer"},
		"yurt-manager-load-balancer-set-controller": {
			"patch services", "patch services/status", "create poolservices", "patch poolservices", "delete poolservices",
		},
		"yurt-manager-node-bucket-controller":                    {"create nodebuckets", "update nodebuckets", "delete nodebuckets"},
		"yurt-manager-nodepool-controller":                       {"patch nodes", "patch nodepools", "patch nodepools/status"},
		"yurt-manager-pod-binding-controller":                    {"patch pods"},
		"yurt-manager-service-topology-endpointslice-controller": {"patch endpointslices"},
		"yurt-manager-webhook-controller":                        {"create secrets @kube-system", "update secrets yurt-manager-webhook-certs @kube-system", "patch customresourcedefinitions nodepools.apps.openyurt.io", "patch validatingwebhookconfigurations yurt-manager"},
		"yurt-manager": {
			"list nodes", "watch nodes", "list pods", "watch pods", "get nodepools", "list nodepools", "watch nodepools", "list nodebuckets", "watch nodebuckets",
			"list certificatesigningrequests", "watch certificatesigningrequests", "list clusterroles yurt-hub-multiplexer", "watch clusterroles yurt-hub-multiplexer",
			"list customresourcedefinitions nodepools.apps.openyurt.io", "watch customresourcedefinitions nodepools.apps.openyurt.io", "create tokenreviews",
			"list configmaps @kube-system", "watch configmaps @kube-system",
			"list secrets yurt-manager-webhook-certs @kube-system", "watch secrets yurt-manager-webhook-certs @kube-system",
			"impersonate serviceaccounts yurt-manager-nodepool-controller @kube-system",
			"create leases @kube-system", "get leases yurt-manager @kube-system", "update leases yurt-manager @kube-system",
			"create events", "patch events", "list services", "watch services", "list endpointslices", "list poolservices", "watch poolservices",
			"list accessfilters", "watch accessfilters", "list validatingwebhookconfigurations yurt-manager", "watch validatingwebhookconfigurations yurt-manager",
			"list leases @kube-node-lease", "watch leases @kube-node-lease",
			"get configmaps extension-apiserver-authentication @kube-system",
		},
	}
	if len(want) != len(parts)+2 {
		t.Errorf("%d accounts, want %d", len(want), len(parts)+2)
	}
	names := []string{"", vouch.Authentication, "yurt-hub-multiplexer", "yurt-manager", "yurt-manager-nodepool-controller", "kubernetes", webhookcert.Definition, webhookcert.Secret, "kubernetes.io/kubelet-serving"}
	for account, allowed := range want {
		t.Run(account, func(t *testing.T) {
			granted, err := c.grants(t, account)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, verb := range verbs {
				for _, r := range resources {
					for _, ns := range []string{"", "kube-system", "default", corev1.NamespaceNodeLease} {
						for _, name := range names {
							// What is granted more widely is said there.
							wider := name != "" && granted(ns, verb, r, "") || ns != "" && granted("", verb, r, name)
							if granted(ns, verb, r, name) && !wider {
								got = append(got, strings.TrimSpace(strings.Join(strings.Fields(verb+" "+r.Resource+" "+name+" "+at(ns)), " ")))
							}
						}
					}
				}
			}
			slices.Sort(got)
			slices.Sort(allowed)
			if !slices.Equal(got, allowed) {
				t.Errorf("got  %q\nwant %q", got, allowed)
			}
		})
	}
}

// grants returns what RBAC grants an account in a namespace; in none is what it
// grants in all.
func (c *cluster) grants(t *testing.T, account string) (func(ns, verb string, r schema.GroupResource, name string) bool, error) {
	rules := map[string][]authorizationv1.ResourceRule{}
	for _, ns := range []string{"", namespace, "default", corev1.NamespaceNodeLease} {
		review := &authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: cmp.Or(ns, "nowhere")}}
		if err := c.as(t, "system:serviceaccount:"+namespace+":"+account).Create(t.Context(), review); err != nil {
			return nil, err
		}
		rules[ns] = review.Status.ResourceRules
	}
	has := func(list []string, what string) bool {
		return slices.Contains(list, what) || slices.Contains(list, "*")
	}
	return func(ns, verb string, r schema.GroupResource, name string) bool {
		return slices.ContainsFunc(rules[ns], func(rule authorizationv1.ResourceRule) bool {
			return has(rule.Verbs, verb) && has(rule.APIGroups, r.Group) && has(rule.Resources, r.Resource) &&
				(len(rule.ResourceNames) == 0 || name != "" && slices.Contains(rule.ResourceNames, name))
		})
	}, nil
}

func at(ns string) string {
	if ns == "" {
		return ""
	}
	return "@" + ns
}

// TestFailover kills the replica that works.
// TestRenewalsAreAsKubelets: to a busy API server the manager's renewals of
// nodes' leases are what kubelets' are, and nothing else of that account is.
func TestRenewalsAreAsKubelets(t *testing.T) {
	c := theCluster(t)
	level, err := c.kube.FlowcontrolV1().PriorityLevelConfigurations().Get(t.Context(), "node-high", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := c.cp.RESTConfig()
	cfg.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + namespace + ":yurt-manager-delegate-lease-controller"}
	account, err := rest.HTTPClientFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/none": true,
		"/api/v1/nodes/none": false,
	} {
		await(t, "the API server classes "+path, func() error {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPatch, cfg.Host+path, strings.NewReader("{}"))
			if err != nil {
				return err
			}
			req.Header.Set("Content-Type", string(types.MergePatchType))
			resp, err := account.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if got := resp.Header.Get("X-Kubernetes-Pf-Prioritylevel-Uid"); resp.StatusCode != http.StatusNotFound || (got == string(level.UID)) != want {
				return fmt.Errorf("%s, of priority level %s", resp.Status, got)
			}
			return nil
		})
	}
}

func TestFailover(t *testing.T) {
	c := theCluster(t)
	holder := func() string {
		var lease coordinationv1.Lease
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "yurt-manager"}, &lease); err != nil || lease.Spec.HolderIdentity == nil {
			return ""
		}
		return *lease.Spec.HolderIdentity
	}
	await(t, "one leads", func() error {
		if holder() == "" {
			return errors.New("nobody")
		}
		return nil
	})
	before := holder()
	leader := slices.IndexFunc(c.managers, func(p *process) bool { return p.leads(t) })
	if leader < 0 {
		t.Fatal("no replica says that it leads")
	}
	c.managers[leader].kill()
	defer func() {
		if err := c.managers[leader].start(); err != nil {
			t.Error(err)
		}
	}()
	c.pool(t, "after", v1beta2.NodePoolSpec{})
	c.node(t, "after-1", "after", "10.9.6.1")
	await(t, "the other works", func() error {
		var p v1beta2.NodePool
		if err := c.Get(t.Context(), client.ObjectKey{Name: "after"}, &p); err != nil {
			return err
		}
		if p.Status.ReadyNodeNum != 1 {
			return fmt.Errorf("status %+v", p.Status)
		}
		return nil
	})
	if now := holder(); now == before {
		t.Errorf("%s still holds the lease", now)
	}
}
