package v1beta1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NodePoolType says where the machines of a pool are: Edge or Cloud.
type NodePoolType string

// NodePoolSpec is what is wanted of a pool. Its fields are those of v1beta2.
type NodePoolSpec struct {
	// Type is Edge or Cloud. It cannot change.
	//
	// +optional
	// +kubebuilder:default=Edge
	Type NodePoolType `json:"type,omitempty"`
	// HostNetwork says that pods on the pool's nodes use the network of the
	// host only. It cannot change.
	//
	// +optional
	HostNetwork bool `json:"hostNetwork,omitempty"`
	// Labels are put on each node of the pool.
	//
	// +optional
	Labels map[string]string `json:"labels,omitempty"`
	// Annotations are put on each node of the pool.
	//
	// +optional
	Annotations map[string]string `json:"annotations,omitempty"`
	// Taints are put on each node of the pool.
	//
	// +optional
	Taints []corev1.Taint `json:"taints,omitempty"`
}

// NodePoolStatus is what was observed of a pool.
type NodePoolStatus struct {
	// ReadyNodeNum is how many nodes are ready.
	//
	// +optional
	ReadyNodeNum int32 `json:"readyNodeNum"`
	// UnreadyNodeNum is how many nodes are not ready.
	//
	// +optional
	UnreadyNodeNum int32 `json:"unreadyNodeNum"`
	// Nodes are the names of the pool's nodes, sorted.
	//
	// +optional
	Nodes []string `json:"nodes,omitempty"`
}

// NodePool is a set of nodes at one place. What this version cannot hold of
// v1beta2 is in the annotation nodepool.openyurt.io/v1beta2.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,path=nodepools,shortName=np,categories=yurt
// +kubebuilder:subresource:status
// +kubebuilder:deprecatedversion:warning="apps.openyurt.io/v1beta1 NodePool is deprecated; use apps.openyurt.io/v1beta2"
// +kubebuilder:printcolumn:name="Type",type="string",JSONPath=".spec.type",description="Edge or Cloud"
// +kubebuilder:printcolumn:name="ReadyNodes",type="integer",JSONPath=".status.readyNodeNum",description="nodes that are ready"
// +kubebuilder:printcolumn:name="NotReadyNodes",type="integer",JSONPath=".status.unreadyNodeNum",description="nodes that are not ready"
// +kubebuilder:printcolumn:name="Age",type="date",JSONPath=".metadata.creationTimestamp"
type NodePool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec NodePoolSpec `json:"spec,omitempty"`
	// +optional
	Status NodePoolStatus `json:"status,omitempty"`
}

// NodePoolList is a list of pools.
//
// +kubebuilder:object:root=true
type NodePoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []NodePool `json:"items"`
}
