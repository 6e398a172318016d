package accessfilter

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

func of(generation int64) *v1alpha1.AccessFilter {
	return &v1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: "f", Generation: generation}}
}

func says(node, pool string, generation, applied int64, err string) member {
	return member{node, pool, v1alpha1.AccessFilterReport{Generation: generation, Applied: applied, Error: err}}
}

func TestTally(t *testing.T) {
	for _, tc := range []struct {
		name  string
		nodes []member
		// nodes/active/failed of all, then of each pool
		want, reason, message string
		status                metav1.ConditionStatus
	}{
		{name: "no node", want: "0/0/0", reason: reasonNoNodes, status: metav1.ConditionFalse, message: "spec.pools"},
		{
			name: "all", nodes: []member{says("b", "p", 3, 3, ""), says("a", "p", 3, 3, ""), says("c", "", 3, 3, "")},
			want: "3/3/0 :1/1/0 p:2/2/0", reason: reasonActive, status: metav1.ConditionTrue, message: "all 3 nodes apply generation 3",
		},
		{
			name: "not heard of it", nodes: []member{says("a", "p", 3, 3, ""), says("b", "p", 2, 2, ""), says("c", "q", 0, 0, "")},
			want: "3/1/0 p:2/1/0 q:1/0/0", reason: reasonWaiting, status: metav1.ConditionUnknown, message: "2 of 3 nodes",
		},
		{
			name: "the last good one stays", nodes: []member{says("a", "p", 3, 2, "no such key"), says("b", "q", 3, 3, "")},
			want: "2/1/1 p:1/0/1 q:1/1/0", reason: reasonFailed, status: metav1.ConditionFalse, message: "1 of 2 nodes do not apply it in full; a: generation 2 stays: no such key",
		},
		{
			name: "never was a good one", nodes: []member{says("a", "p", 3, 0, "no such key")},
			want: "1/0/1 p:1/0/1", reason: reasonFailed, status: metav1.ConditionFalse, message: "a: not applied: no such key",
		},
		{
			name: "applied but for some objects", nodes: []member{says("a", "p", 3, 3, "no such key")},
			want: "1/0/1 p:1/0/1", reason: reasonFailed, status: metav1.ConditionFalse, message: "a: no such key",
		},
		{
			name: "what was wrong before it", nodes: []member{says("a", "p", 2, 1, "no such key")},
			want: "1/0/0 p:1/0/0", reason: reasonWaiting, status: metav1.ConditionUnknown, message: "generation 3",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := of(3)
			got := tally(f, tc.nodes)
			text := fmt.Sprintf("%d/%d/%d", got.Nodes, got.Active, got.Failed)
			for _, p := range got.Pools {
				text += fmt.Sprintf(" %s:%d/%d/%d", p.Name, p.Nodes, p.Active, p.Failed)
			}
			if text != tc.want || got.ObservedGeneration != 3 {
				t.Errorf("got %s of generation %d, want %s of 3", text, got.ObservedGeneration, tc.want)
			}
			c := meta.FindStatusCondition(got.Conditions, v1alpha1.AccessFilterReady)
			if c == nil || c.Status != tc.status || c.Reason != tc.reason || !strings.Contains(c.Message, tc.message) || c.ObservedGeneration != 3 {
				t.Errorf("condition %+v, want %s %s %q", c, tc.status, tc.reason, tc.message)
			}
			var failed int32
			for _, why := range got.Failures {
				failed += why.Count
			}
			if got.Failed != failed {
				t.Errorf("failures %v", got.Failures)
			}
		})
	}
}

// TestFailuresAreReasons: the reason of most nodes comes first, with some of
// them.
func TestFailuresAreReasons(t *testing.T) {
	nodes := []member{says("a", "p", 1, 0, "old hub"), says("z", "p", 1, 1, "")}
	for i := range 12 {
		nodes = append(nodes, says(fmt.Sprintf("n%02d", i), "q", 1, 1, "no such key"))
	}
	got := tally(of(1), nodes)
	want := []v1alpha1.AccessFilterFailure{
		{Message: "no such key", Count: 12, Nodes: []string{"n00", "n01", "n02", "n03", "n04", "n05", "n06", "n07", "n08", "n09"}},
		{Message: "not applied: old hub", Count: 1, Nodes: []string{"a"}},
	}
	if !reflect.DeepEqual(got.Failures, want) {
		t.Errorf("got %+v", got.Failures)
	}
	if message := got.Conditions[0].Message; !strings.HasPrefix(message, "13 of 14 nodes do not apply it in full; n00: no such key") {
		t.Errorf("message %q", message)
	}
}

// TestStatusIsBounded has 3 000 nodes fail with a long message.
func TestStatusIsBounded(t *testing.T) {
	var nodes []member
	for i := range 3000 {
		pool := fmt.Sprintf("pool-%03d", i%1000)
		switch {
		case i%1000 < 900:
			nodes = append(nodes, says(fmt.Sprintf("node-%d", i), pool, 1, 1, ""))
		default:
			nodes = append(nodes, says(fmt.Sprintf("node-%d", i), pool, 1, 0, fmt.Sprint(i%20, strings.Repeat("é", 4000))))
		}
	}
	got := tally(of(1), nodes)
	if got.Nodes != 3000 || got.Active != 2700 || got.Failed != 300 {
		t.Errorf("got %d/%d/%d", got.Nodes, got.Active, got.Failed)
	}
	if len(got.Pools) != mostPools || len(got.Failures) != mostFailures {
		t.Errorf("%d pools, %d failures", len(got.Pools), len(got.Failures))
	}
	for _, f := range got.Failures {
		if len(f.Message) > mostMessage || len(f.Nodes) > mostFailures || int(f.Count) < len(f.Nodes) {
			t.Errorf("a failure of %d bytes on %d of %d nodes", len(f.Message), len(f.Nodes), f.Count)
		}
	}
	failed := 0
	for i, p := range got.Pools {
		if p.Failed > 0 {
			failed++
		}
		if len(p.Message) > mostMessage {
			t.Errorf("a message of %d bytes", len(p.Message))
		}
		if i > 0 && got.Pools[i-1].Name >= p.Name {
			t.Errorf("pool %s after %s", p.Name, got.Pools[i-1].Name)
		}
	}
	if failed != 100 {
		t.Errorf("%d of the 100 pools that failed are told", failed)
	}
	if c := got.Conditions[0]; len(c.Message) > mostMessage || strings.ToValidUTF8(c.Message, "") != c.Message {
		t.Errorf("message of %d bytes, or not UTF-8", len(c.Message))
	}
}

func TestReports(t *testing.T) {
	for text, want := range map[string]int64{
		"": 0, "nonsense": 0, `["f"]`: 0, `{"g":{"generation":2}}`: 0, `{"f":{"generation":2,"applied":2}}`: 2,
	} {
		node := &corev1.Node{}
		node.Annotations = map[string]string{network.AccessFiltersAnnotation: text}
		if got := reports(node)["f"].Generation; got != want {
			t.Errorf("%s: got %d, want %d", text, got, want)
		}
	}
	edge, other := &corev1.Node{}, &corev1.Node{}
	edge.Labels = map[string]string{apps.EdgeWorkerLabel: "true"}
	if !hasHub(edge) || hasHub(other) {
		t.Error("an edge worker has a hub, another node has not until it reports")
	}
}
