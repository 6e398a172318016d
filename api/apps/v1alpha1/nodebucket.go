package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Node is a node of a bucket.
type Node struct {
	// Name is that of a Node.
	Name string `json:"name"`
}

// NodeBucket holds some of the nodes of a pool, so that a change of a large
// pool is a change of one small object. The label openyurt.io/pool-name names
// the pool.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,path=nodebuckets,shortName=nb,categories=yurt
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="NUM-NODES",type="integer",JSONPath=".numNodes",description="nodes in the bucket"
// +kubebuilder:printcolumn:name="AGE",type="date",JSONPath=".metadata.creationTimestamp"
type NodeBucket struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// NumNodes is the number of Nodes.
	NumNodes int32 `json:"numNodes"`
	// Nodes are the bucket's nodes.
	//
	// +listType=map
	// +listMapKey=name
	Nodes []Node `json:"nodes"`
}

// NodeBucketList is a list of buckets.
//
// +kubebuilder:object:root=true
type NodeBucketList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []NodeBucket `json:"items"`
}
