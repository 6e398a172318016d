// Package conversion converts the older versions of the apps types to the
// stored one and back, without loss: what a version cannot hold travels in an
// annotation and comes back from it. A client of an old version that writes
// what it read therefore changes nothing but what it meant to.
package conversion

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
	"github.com/yurt-edge/yurt/api/apps/v1beta1"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

const (
	// CarriedV1beta2 is the annotation, on objects of older versions, with
	// what only v1beta2 has.
	CarriedV1beta2 = "nodepool.openyurt.io/v1beta2"
	// CarriedV1alpha1 is the annotation, on objects of newer versions, with
	// what only v1alpha1 has.
	CarriedV1alpha1 = "nodepool.openyurt.io/v1alpha1"
	// hostNetwork is how v1alpha1 says it, for lack of a field.
	hostNetwork = "nodepool.openyurt.io/hostnetwork"
)

// newer is what the older versions cannot hold.
type newer struct {
	Spec   v1beta2.NodePoolSpec   `json:"spec"`
	Status v1beta2.NodePoolStatus `json:"status"`
	// Marked says that the annotation hostNetwork was put there to tell of
	// the field.
	Marked bool `json:"marked,omitempty"`
	// Unmarked says that the annotation was there and the field was false.
	Unmarked bool `json:"unmarked,omitempty"`
}

// defaults are the API server's own for v1beta2. It gives them to what is
// written and to what is stored as v1beta2, and not to a pool that OpenYurt
// stored as one of the older versions.
func defaults() newer {
	return newer{Spec: v1beta2.NodePoolSpec{
		LeaderElectionStrategy: v1beta2.ElectRandom, LeaderReplicas: 1,
		PoolScopeMetadata: []metav1.GroupVersionResource{
			{Version: "v1", Resource: "services"}, {Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
		},
	}}
}

// older is what the newer versions cannot hold.
type older struct {
	Selector *metav1.LabelSelector `json:"selector,omitempty"`
}

// V1beta1ToStored converts a pool to the stored version.
func V1beta1ToStored(in *v1beta1.NodePool) (*v1beta2.NodePool, error) {
	out := &v1beta2.NodePool{ObjectMeta: *in.ObjectMeta.DeepCopy()}
	carried, err := takeNewer(&out.ObjectMeta)
	if err != nil {
		return nil, err
	}
	spec := in.Spec.DeepCopy()
	out.Spec, out.Status = carried.Spec, carried.Status
	out.Spec.Type, out.Spec.HostNetwork = v1beta2.NodePoolType(spec.Type), spec.HostNetwork
	out.Spec.Labels, out.Spec.Annotations, out.Spec.Taints = spec.Labels, spec.Annotations, spec.Taints
	out.Status.ReadyNodeNum, out.Status.UnreadyNodeNum = in.Status.ReadyNodeNum, in.Status.UnreadyNodeNum
	out.Status.Nodes = slices.Clone(in.Status.Nodes)
	return out, nil
}

// StoredToV1beta1 converts a pool from the stored version.
func StoredToV1beta1(in *v1beta2.NodePool) (*v1beta1.NodePool, error) {
	in = in.DeepCopy()
	out := &v1beta1.NodePool{
		ObjectMeta: in.ObjectMeta,
		Spec: v1beta1.NodePoolSpec{
			Type: v1beta1.NodePoolType(in.Spec.Type), HostNetwork: in.Spec.HostNetwork,
			Labels: in.Spec.Labels, Annotations: in.Spec.Annotations, Taints: in.Spec.Taints,
		},
		Status: v1beta1.NodePoolStatus{
			ReadyNodeNum: in.Status.ReadyNodeNum, UnreadyNodeNum: in.Status.UnreadyNodeNum, Nodes: in.Status.Nodes,
		},
	}
	return out, carryNewer(&out.ObjectMeta, onlyNewer(in))
}

// V1alpha1ToStored converts a pool to the stored version.
func V1alpha1ToStored(in *v1alpha1.NodePool) (*v1beta2.NodePool, error) {
	out := &v1beta2.NodePool{ObjectMeta: *in.ObjectMeta.DeepCopy()}
	carried, err := takeNewer(&out.ObjectMeta)
	if err != nil {
		return nil, err
	}
	spec := in.Spec.DeepCopy()
	out.Spec, out.Status = carried.Spec, carried.Status
	out.Spec.Type = v1beta2.NodePoolType(spec.Type)
	// The annotation is how a user of v1alpha1 says it; what is carried tells
	// where it says something else than the field did.
	out.Spec.HostNetwork = (out.Annotations[hostNetwork] == "true" || carried.Spec.HostNetwork) && !carried.Unmarked
	if carried.Marked {
		remove(&out.ObjectMeta, hostNetwork)
	}
	out.Spec.Labels, out.Spec.Annotations, out.Spec.Taints = spec.Labels, spec.Annotations, spec.Taints
	out.Status.ReadyNodeNum, out.Status.UnreadyNodeNum = in.Status.ReadyNodeNum, in.Status.UnreadyNodeNum
	out.Status.Nodes = slices.Clone(in.Status.Nodes)
	if spec.Selector == nil {
		return out, nil
	}
	return out, carry(&out.ObjectMeta, CarriedV1alpha1, older{Selector: spec.Selector})
}

// StoredToV1alpha1 converts a pool from the stored version.
func StoredToV1alpha1(in *v1beta2.NodePool) (*v1alpha1.NodePool, error) {
	in = in.DeepCopy()
	out := &v1alpha1.NodePool{
		ObjectMeta: in.ObjectMeta,
		Spec: v1alpha1.NodePoolSpec{
			Type:   v1alpha1.NodePoolType(in.Spec.Type),
			Labels: in.Spec.Labels, Annotations: in.Spec.Annotations, Taints: in.Spec.Taints,
		},
		Status: v1alpha1.NodePoolStatus{
			ReadyNodeNum: in.Status.ReadyNodeNum, UnreadyNodeNum: in.Status.UnreadyNodeNum, Nodes: in.Status.Nodes,
		},
	}
	var before older
	if err := take(&out.ObjectMeta, CarriedV1alpha1, &before); err != nil {
		return nil, err
	}
	out.Spec.Selector = before.Selector
	carried := onlyNewer(in)
	switch mark, set := out.Annotations[hostNetwork]; {
	case in.Spec.HostNetwork && !set:
		carried.Marked = true
		annotate(&out.ObjectMeta, hostNetwork, "true")
	case in.Spec.HostNetwork && mark != "true":
		carried.Spec.HostNetwork = true
	case !in.Spec.HostNetwork && mark == "true":
		carried.Unmarked = true
	}
	return out, carryNewer(&out.ObjectMeta, carried)
}

// onlyNewer returns what of a pool the older versions cannot hold.
func onlyNewer(in *v1beta2.NodePool) newer {
	n := newer{Spec: in.Spec, Status: in.Status}
	n.Spec.Type, n.Spec.HostNetwork = "", false
	n.Spec.Labels, n.Spec.Annotations, n.Spec.Taints = nil, nil, nil
	n.Status.ReadyNodeNum, n.Status.UnreadyNodeNum, n.Status.Nodes = 0, 0, nil
	return n
}

// carryNewer and takeNewer have no annotation stand for the defaults.
func carryNewer(meta *metav1.ObjectMeta, n newer) error {
	if equality.Semantic.DeepEqual(n, defaults()) {
		return nil
	}
	return carry(meta, CarriedV1beta2, n)
}

func takeNewer(meta *metav1.ObjectMeta) (newer, error) {
	if _, ok := meta.Annotations[CarriedV1beta2]; !ok {
		return defaults(), nil
	}
	var n newer
	err := take(meta, CarriedV1beta2, &n)
	return n, err
}

// carry puts into an annotation what would be lost.
func carry(meta *metav1.ObjectMeta, annotation string, what any) error {
	text, err := json.Marshal(what)
	if err != nil {
		return fmt.Errorf("write annotation %s: %w", annotation, err)
	}
	annotate(meta, annotation, string(text))
	return nil
}

// take moves an annotation into what it was made of.
func take(meta *metav1.ObjectMeta, annotation string, into any) error {
	text, ok := meta.Annotations[annotation]
	if !ok {
		return nil
	}
	remove(meta, annotation)
	if err := json.Unmarshal([]byte(text), into); err != nil {
		return fmt.Errorf("annotation %s is not what Yurt wrote; remove it to fall back to defaults: %w", annotation, err)
	}
	return nil
}

func annotate(meta *metav1.ObjectMeta, key, value string) {
	annotations := maps.Clone(meta.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[key] = value
	meta.Annotations = annotations
}

func remove(meta *metav1.ObjectMeta, key string) {
	if delete(meta.Annotations, key); len(meta.Annotations) == 0 {
		meta.Annotations = nil
	}
}
