package accessfilter

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// What a status holds at most. Each of its changes goes to every hub.
const (
	mostPools    = 256
	mostFailures = 10 // and nodes of each
	mostMessage  = 512
)

// Reasons of the condition Ready.
const (
	reasonActive  = "Active"
	reasonFailed  = "NodesFailed"
	reasonWaiting = "Waiting"
	reasonNoNodes = "NoNodes"
)

// member is a node that a filter selects, and what it says of the filter.
type member struct {
	node, pool string
	report     v1alpha1.AccessFilterReport
}

// reports returns what a node says of its filters. Who writes nonsense there
// has said nothing.
func reports(node *corev1.Node) map[string]v1alpha1.AccessFilterReport {
	var out map[string]v1alpha1.AccessFilterReport
	if text := node.Annotations[network.AccessFiltersAnnotation]; text == "" || json.Unmarshal([]byte(text), &out) != nil {
		return nil
	}
	return out
}

// hasHub reports whether a hub runs on the node, as far as one can tell here.
func hasHub(node *corev1.Node) bool {
	_, reports := node.Annotations[network.AccessFiltersAnnotation]
	return reports || node.Labels[apps.EdgeWorkerLabel] == "true"
}

// tally returns the status of a filter that these nodes have, with what others
// own in it as it was.
func tally(f *v1alpha1.AccessFilter, nodes []member) v1alpha1.AccessFilterStatus {
	out := *f.Status.DeepCopy()
	out.ObservedGeneration, out.Pools, out.Failures = f.Generation, nil, nil
	out.Nodes, out.Active, out.Failed = 0, 0, 0
	slices.SortFunc(nodes, func(a, b member) int { return cmp.Or(cmp.Compare(a.pool, b.pool), cmp.Compare(a.node, b.node)) })
	for _, n := range nodes {
		if i := len(out.Pools); i == 0 || out.Pools[i-1].Name != n.pool {
			out.Pools = append(out.Pools, v1alpha1.AccessFilterPool{Name: n.pool})
		}
		pool := &out.Pools[len(out.Pools)-1]
		pool.Nodes++
		out.Nodes++
		switch {
		case n.report.Generation != f.Generation: // it has not heard of this one
		case n.report.Error != "":
			pool.Failed++
			out.Failed++
			message := cut(n.report.Error)
			if n.report.Applied != f.Generation {
				message = cut(instead(n.report.Applied) + n.report.Error)
			}
			if pool.Message == "" {
				pool.Message = cut(n.node + ": " + message)
			}
			out.Failures = fail(out.Failures, n.node, message)
		case n.report.Applied == f.Generation:
			pool.Active++
			out.Active++
		}
	}
	slices.SortStableFunc(out.Failures, func(a, b v1alpha1.AccessFilterFailure) int { return cmp.Compare(b.Count, a.Count) })
	out.Failures = out.Failures[:min(len(out.Failures), mostFailures)]
	if len(out.Pools) > mostPools {
		slices.SortStableFunc(out.Pools, func(a, b v1alpha1.AccessFilterPool) int { return cmp.Compare(min(b.Failed, 1), min(a.Failed, 1)) })
		out.Pools = out.Pools[:mostPools]
		slices.SortFunc(out.Pools, func(a, b v1alpha1.AccessFilterPool) int { return cmp.Compare(a.Name, b.Name) })
	}
	meta.SetStatusCondition(&out.Conditions, ready(f, &out))
	return out
}

// fail counts a node to those that fail for the same reason.
func fail(failures []v1alpha1.AccessFilterFailure, node, message string) []v1alpha1.AccessFilterFailure {
	i := slices.IndexFunc(failures, func(f v1alpha1.AccessFilterFailure) bool { return f.Message == message })
	if i < 0 {
		i = len(failures)
		failures = append(failures, v1alpha1.AccessFilterFailure{Message: message})
	}
	f := &failures[i]
	if f.Count++; len(f.Nodes) < mostFailures {
		f.Nodes = append(f.Nodes, node)
	}
	return failures
}

// instead says what a node applies that cannot apply the newest generation.
func instead(applied int64) string {
	if applied == 0 {
		return "not applied: "
	}
	return fmt.Sprintf("generation %d stays: ", applied)
}

func ready(f *v1alpha1.AccessFilter, s *v1alpha1.AccessFilterStatus) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.AccessFilterReady, ObservedGeneration: f.Generation}
	switch waiting := s.Nodes - s.Active - s.Failed; {
	case s.Nodes == 0:
		c.Status, c.Reason = metav1.ConditionFalse, reasonNoNodes
		c.Message = "no node with a hub is selected; look at spec.pools and spec.nodeSelector"
	case s.Failed > 0:
		c.Status, c.Reason = metav1.ConditionFalse, reasonFailed
		f := s.Failures[0]
		c.Message = cut(fmt.Sprintf("%d of %d nodes do not apply it in full; %s: %s", s.Failed, s.Nodes, f.Nodes[0], f.Message))
	case waiting > 0:
		c.Status, c.Reason = metav1.ConditionUnknown, reasonWaiting
		c.Message = fmt.Sprintf("%d of %d nodes have not said yet that they apply generation %d", waiting, s.Nodes, f.Generation)
	default:
		c.Status, c.Reason = metav1.ConditionTrue, reasonActive
		c.Message = fmt.Sprintf("all %d nodes apply generation %d", s.Nodes, f.Generation)
	}
	return c
}

// cut keeps a text within what a status may hold.
func cut(text string) string {
	text = strings.ToValidUTF8(text, "?")
	if len(text) <= mostMessage {
		return text
	}
	end := mostMessage - len("...")
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "..."
}
