package servicetopology

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

func where(pools map[string][]string) sites {
	var list []v1beta2.NodePool
	for name, nodes := range pools {
		list = append(list, v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: v1beta2.NodePoolStatus{Nodes: nodes}})
	}
	return newSites(list)
}

// TestMarkChangesWithWhatHubsShow changes one thing at a time: the mark of a
// slice changes when a hub may show another part of it, and else stays.
func TestMarkChangesWithWhatHubsShow(t *testing.T) {
	slice := &discoveryv1.EndpointSlice{}
	for _, node := range []string{"n1", "n2", "s1"} {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{NodeName: &node})
	}
	slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{})
	before := map[string][]string{"north": {"n1", "n2"}, "south": {"s1"}, "west": {"w1"}}
	for _, tc := range []struct {
		name    string
		keys    string
		after   map[string][]string
		changes bool
	}{
		{"nothing", apps.TopologyPool, before, false},
		{"order", apps.TopologyPool, map[string][]string{"north": {"n2", "n1"}, "south": {"s1"}, "west": {"w1"}}, false},
		{"a node without endpoints joins a pool with some", apps.TopologyPool, map[string][]string{"north": {"n1", "n2", "n3"}, "south": {"s1"}, "west": {"w1"}}, true},
		{"a node joins a pool without endpoints", apps.TopologyPool, map[string][]string{"north": {"n1", "n2"}, "south": {"s1"}, "west": {"w1", "w2"}}, false},
		{"an endpoint's node leaves its pool", apps.TopologyPool, map[string][]string{"north": {"n1"}, "south": {"s1"}, "west": {"w1"}}, true},
		{"an endpoint's node moves", apps.TopologyZone, map[string][]string{"north": {"n1"}, "south": {"s1", "n2"}, "west": {"w1"}}, true},
		{"an endpoint's node moves, and nodes count alone", apps.TopologyNode, map[string][]string{"north": {"n1"}, "south": {"s1", "n2"}, "west": {"w1"}}, false},
		{"an unknown word", "example.com/rack", map[string][]string{"north": {"n1"}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			was, is := mark(tc.keys, slice, where(before)), mark(tc.keys, slice, where(tc.after))
			if changed := was != is; changed != tc.changes {
				t.Errorf("the mark was %q and is %q", was, is)
			}
		})
	}
	marks := map[string]string{}
	for _, keys := range []string{"", "example.com/rack", apps.TopologyNode, apps.TopologyPool} {
		marks[keys] = mark(keys, slice, where(before))
	}
	if marks[""] != "" || marks["example.com/rack"] != "" {
		t.Errorf("slices that no hub filters are marked: %v", marks)
	}
	if marks[apps.TopologyNode] == "" || marks[apps.TopologyNode] == marks[apps.TopologyPool] {
		t.Errorf("the annotation does not tell: %v", marks)
	}
}

func TestForeign(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for _, tc := range []struct {
		name       string
		worker     string
		age        time.Duration
		conditions []corev1.NodeConditionType
		want       bool
	}{
		{"no hub", "", time.Hour, []corev1.NodeConditionType{corev1.NodeReady}, false},
		{"no hub, and says so", "false", time.Hour, []corev1.NodeConditionType{corev1.NodeReady}, false},
		{"a hub of OpenYurt", "", 0, []corev1.NodeConditionType{corev1.NodeReady, "Autonomy"}, true},
		{"a hub of OpenYurt from before 1.6", "true", settled, []corev1.NodeConditionType{corev1.NodeReady}, true},
		{"whose is not known yet", "true", settled - 1, []corev1.NodeConditionType{corev1.NodeReady}, false},
		{"a hub of ours", "true", time.Hour, []corev1.NodeConditionType{corev1.NodeReady, "Autonomy", "YurtHubLinkReady"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: metav1.NewTime(now.Add(-tc.age)), Labels: map[string]string{apps.EdgeWorkerLabel: tc.worker}}}
			for _, c := range tc.conditions {
				n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: c})
			}
			if got := foreign(n, now); got != tc.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
