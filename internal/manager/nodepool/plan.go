package nodepool

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// attributes are what a pool puts on its nodes. As JSON they are the
// annotation PreviousAttributes, whose form is OpenYurt's.
type attributes struct {
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Taints      []corev1.Taint    `json:"taints,omitempty"`
}

func (a attributes) empty() bool {
	return len(a.Labels) == 0 && len(a.Annotations) == 0 && len(a.Taints) == 0
}

// wanted returns what the pool puts on its nodes; nothing for a node in no
// pool.
func wanted(pool *v1beta2.NodePool) attributes {
	if pool == nil {
		return attributes{}
	}
	a := attributes{Labels: maps.Clone(pool.Spec.Labels), Annotations: pool.Spec.Annotations, Taints: pool.Spec.Taints}
	if pool.Spec.HostNetwork {
		if a.Labels == nil {
			a.Labels = map[string]string{}
		}
		a.Labels[apps.HostNetworkLabel] = "true"
	}
	return a
}

// join puts a node into the pool that it names as the one desired, if it is in
// none, and reports whether it did.
func join(node *corev1.Node) bool {
	desired := node.Labels[apps.DesiredNodePoolLabel]
	if desired == "" || node.Labels[apps.NodePoolLabel] != "" {
		return false
	}
	node.Labels[apps.NodePoolLabel] = desired
	return true
}

// dress puts on the node what its pool wants, and takes off what a pool put
// there before and nobody changed since. It reports whether the node changed.
func dress(node *corev1.Node, want attributes) (bool, error) {
	var before attributes
	text, remembered := node.Annotations[apps.PreviousAttributes]
	if remembered {
		if err := json.Unmarshal([]byte(text), &before); err != nil {
			return false, fmt.Errorf("annotation %s of node %s is not what Yurt wrote; remove it: %w", apps.PreviousAttributes, node.Name, err)
		}
	}
	old := node.DeepCopy()
	node.Labels = dressMap(node.Labels, before.Labels, want.Labels)
	node.Annotations = dressMap(node.Annotations, before.Annotations, want.Annotations)
	node.Spec.Taints = dressTaints(node.Spec.Taints, before.Taints, want.Taints)
	if want.empty() {
		delete(node.Annotations, apps.PreviousAttributes)
	} else {
		text, err := json.Marshal(want)
		if err != nil {
			return false, fmt.Errorf("write annotation %s: %w", apps.PreviousAttributes, err)
		}
		if node.Annotations == nil {
			node.Annotations = map[string]string{}
		}
		node.Annotations[apps.PreviousAttributes] = string(text)
	}
	changed := !maps.Equal(old.Labels, node.Labels) || !maps.Equal(old.Annotations, node.Annotations) ||
		!slices.EqualFunc(old.Spec.Taints, node.Spec.Taints, func(a, b corev1.Taint) bool { return a.ToString() == b.ToString() })
	return changed, nil
}

func dressMap(have, before, want map[string]string) map[string]string {
	out := maps.Clone(have)
	if out == nil {
		out = map[string]string{}
	}
	maps.DeleteFunc(out, func(k, v string) bool { was, ours := before[k]; return ours && v == was })
	maps.Copy(out, want)
	return out
}

// dressTaints knows taints by key and effect, and keeps the order.
func dressTaints(have, before, want []corev1.Taint) []corev1.Taint {
	var out []corev1.Taint
	for _, t := range have {
		if w := find(want, t); w != nil {
			t.Value = w.Value
		} else if was := find(before, t); was != nil && was.Value == t.Value {
			continue
		}
		out = append(out, t)
	}
	for _, w := range want {
		if find(out, w) == nil {
			out = append(out, w)
		}
	}
	return out
}

func find(taints []corev1.Taint, like corev1.Taint) *corev1.Taint {
	for i := range taints {
		if taints[i].MatchTaint(&like) {
			return &taints[i]
		}
	}
	return nil
}

// count returns the status of a pool with these nodes, with what others own in
// it as it was.
func count(was v1beta2.NodePoolStatus, nodes []corev1.Node) v1beta2.NodePoolStatus {
	out := *was.DeepCopy()
	out.ReadyNodeNum, out.UnreadyNodeNum, out.VouchedNodeNum, out.Nodes = 0, 0, 0, nil
	for i := range nodes {
		out.Nodes = append(out.Nodes, nodes[i].Name)
		if Ready(&nodes[i]) {
			out.ReadyNodeNum++
		} else {
			out.UnreadyNodeNum++
		}
		if VouchedFor(&nodes[i]) {
			out.VouchedNodeNum++
		}
	}
	slices.SortFunc(out.Nodes, strings.Compare)
	return out
}

// Ready reports whether the node is ready.
func Ready(node *corev1.Node) bool { return isTrue(node, corev1.NodeReady) }

// VouchedFor reports whether the node has no link, and another vouches for it.
func VouchedFor(node *corev1.Node) bool { return isTrue(node, apps.VouchedForCondition) }

func isTrue(node *corev1.Node, kind corev1.NodeConditionType) bool {
	return slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == kind && c.Status == corev1.ConditionTrue
	})
}

// Conditions of a node by which hubs say that they are there. OpenYurt's writes
// AutonomyCondition alone, since 1.6; ours writes both.
const (
	AutonomyCondition = "Autonomy"
	ourCondition      = "YurtHubLinkReady"
)

// ForeignHub reports whether a hub of OpenYurt serves the node: one that has a
// hub, which says nothing of what ours say. So does one of ours in the moments
// before it has registered.
func ForeignHub(node *corev1.Node) bool {
	return (node.Labels[apps.EdgeWorkerLabel] == "true" || HasCondition(node, AutonomyCondition)) && !HasCondition(node, ourCondition)
}

// HasCondition reports whether the node has a condition, whatever its status.
func HasCondition(node *corev1.Node, kind corev1.NodeConditionType) bool {
	return slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == kind })
}
