package nodepool

import (
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

func taint(text string) corev1.Taint {
	rest, effect, _ := strings.Cut(text, ":")
	key, value, _ := strings.Cut(rest, "=")
	return corev1.Taint{Key: key, Value: value, Effect: corev1.TaintEffect(effect)}
}

func taints(texts ...string) []corev1.Taint {
	var out []corev1.Taint
	for _, text := range texts {
		out = append(out, taint(text))
	}
	return out
}

func pool(labels map[string]string, t ...string) *v1beta2.NodePool {
	return &v1beta2.NodePool{Spec: v1beta2.NodePoolSpec{Labels: labels, Annotations: labels, Taints: taints(t...)}}
}

// TestDress takes a node through steps: a pool, or a change by somebody else.
func TestDress(t *testing.T) {
	type step struct {
		pool   *v1beta2.NodePool // nil: none
		others func(*corev1.Node)
		labels map[string]string
		taints []string
	}
	l := func(kv ...string) map[string]string {
		out := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			out[kv[i]] = kv[i+1]
		}
		return out
	}
	for name, steps := range map[string][]step{
		"joins and leaves": {
			{pool: pool(l("a", "1"), "x=1:NoSchedule"), labels: l("own", "0", "a", "1"), taints: []string{"own:NoExecute", "x=1:NoSchedule"}},
			{labels: l("own", "0"), taints: []string{"own:NoExecute"}},
		},
		"moves": {
			{pool: pool(l("a", "1", "b", "1"), "x=1:NoSchedule", "y:NoExecute"), labels: l("own", "0", "a", "1", "b", "1"), taints: []string{"own:NoExecute", "x=1:NoSchedule", "y:NoExecute"}},
			{pool: pool(l("b", "2", "c", "2"), "y=2:NoExecute"), labels: l("own", "0", "b", "2", "c", "2"), taints: []string{"own:NoExecute", "y=2:NoExecute"}},
			{labels: l("own", "0"), taints: []string{"own:NoExecute"}},
		},
		"what others changed since stays": {
			{pool: pool(l("a", "1"), "x=1:NoSchedule"), labels: l("own", "0", "a", "1"), taints: []string{"own:NoExecute", "x=1:NoSchedule"}},
			{others: func(n *corev1.Node) { n.Labels["a"] = "theirs"; n.Spec.Taints[1].Value = "theirs" }, labels: l("own", "0", "a", "theirs"), taints: []string{"own:NoExecute", "x=theirs:NoSchedule"}},
		},
		"the pool wins while the node is in it": {
			{pool: pool(l("a", "1"), "x=1:NoSchedule"), labels: l("own", "0", "a", "1"), taints: []string{"own:NoExecute", "x=1:NoSchedule"}},
			{others: func(n *corev1.Node) { delete(n.Labels, "a"); n.Spec.Taints = nil }, pool: pool(l("a", "1"), "x=1:NoSchedule"), labels: l("own", "0", "a", "1"), taints: []string{"x=1:NoSchedule"}},
		},
		"the same key with another effect is another taint": {
			{pool: pool(nil, "own:NoSchedule"), labels: l("own", "0"), taints: []string{"own:NoExecute", "own:NoSchedule"}},
			{labels: l("own", "0"), taints: []string{"own:NoExecute"}},
		},
		"host network": {
			{pool: &v1beta2.NodePool{Spec: v1beta2.NodePoolSpec{HostNetwork: true}}, labels: l("own", "0", apps.HostNetworkLabel, "true"), taints: []string{"own:NoExecute"}},
			{pool: pool(nil), labels: l("own", "0"), taints: []string{"own:NoExecute"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			node := &corev1.Node{
				ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: l("own", "0"), Annotations: l("own", "0")},
				Spec:       corev1.NodeSpec{Taints: taints("own:NoExecute")},
			}
			for i, s := range steps {
				if s.others != nil {
					s.others(node)
				}
				if _, err := dress(node, wanted(s.pool)); err != nil {
					t.Fatal(err)
				}
				var have []string
				for _, taint := range node.Spec.Taints {
					have = append(have, taint.ToString())
				}
				if !maps.Equal(node.Labels, s.labels) || !slices.Equal(have, s.taints) {
					t.Errorf("step %d: got %v %v, want %v %v", i, node.Labels, have, s.labels, s.taints)
				}
				// Again changes nothing.
				if changed, err := dress(node, wanted(s.pool)); changed || err != nil {
					t.Errorf("step %d again: got %t, %v", i, changed, err)
				}
			}
		})
	}
}

func TestForeignMemory(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Annotations: map[string]string{apps.PreviousAttributes: "{"}}}
	if _, err := dress(node, attributes{}); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("got %v, want what to do", err)
	}
}

func TestCountKeepsWhatOthersOwn(t *testing.T) {
	node := func(name string, status corev1.ConditionStatus) corev1.Node {
		return corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}},
		}
	}
	got := count(v1beta2.NodePoolStatus{LeaderNum: 7, ReadyNodeNum: 9, Nodes: []string{"gone"}},
		[]corev1.Node{node("b", corev1.ConditionTrue), node("a", corev1.ConditionUnknown), node("c", corev1.ConditionFalse)})
	if got.ReadyNodeNum != 1 || got.UnreadyNodeNum != 2 || got.LeaderNum != 7 || !slices.Equal(got.Nodes, []string{"a", "b", "c"}) {
		t.Errorf("got %+v", got)
	}
}
