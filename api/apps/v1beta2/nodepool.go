package v1beta2

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NodePoolType says where the machines of a pool are.
//
// +kubebuilder:validation:Enum=Edge;Cloud
type NodePoolType string

// The types of pools.
const (
	Edge  NodePoolType = "Edge"
	Cloud NodePoolType = "Cloud"
)

// LeaderElectionStrategy says which nodes of a pool may lead it.
//
// +kubebuilder:validation:Enum=random;mark
type LeaderElectionStrategy string

// The strategies.
const (
	// ElectRandom takes any node that is ready.
	ElectRandom LeaderElectionStrategy = "random"
	// ElectMark takes only nodes that leaderNodeLabelSelector matches.
	ElectMark LeaderElectionStrategy = "mark"
)

// LeaderReady is the type of the condition that tells whether a pool that
// elects leaders has as many as it wants.
const LeaderReady = "LeaderReady"

// NodePoolSpec is what is wanted of a pool.
//
// +kubebuilder:validation:XValidation:rule="self.type != 'Cloud' || !has(self.hostNetwork) || !self.hostNetwork",message="a Cloud pool cannot set hostNetwork; use type Edge",fieldPath=".hostNetwork"
// +kubebuilder:validation:XValidation:rule="!has(self.leaderElectionStrategy) || self.leaderElectionStrategy != 'mark' || (has(self.leaderNodeLabelSelector) && size(self.leaderNodeLabelSelector) > 0)",message="strategy mark needs leaderNodeLabelSelector to say which nodes are marked",fieldPath=".leaderNodeLabelSelector"
// +kubebuilder:validation:XValidation:rule="(has(self.hostNetwork) && self.hostNetwork) == (has(oldSelf.hostNetwork) && oldSelf.hostNetwork)",message="hostNetwork cannot change; make a new pool and move the nodes",fieldPath=".hostNetwork"
// +kubebuilder:validation:XValidation:rule="(has(self.interConnectivity) && self.interConnectivity) == (has(oldSelf.interConnectivity) && oldSelf.interConnectivity)",message="interConnectivity cannot change; make a new pool and move the nodes",fieldPath=".interConnectivity"
type NodePoolSpec struct {
	// Type is Edge or Cloud. It cannot change.
	//
	// +optional
	// +kubebuilder:default=Edge
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="type cannot change; make a new pool and move the nodes"
	Type NodePoolType `json:"type,omitempty"`

	// HostNetwork says that pods on the pool's nodes use the network of the
	// host only. It cannot change.
	//
	// +optional
	HostNetwork bool `json:"hostNetwork,omitempty"`

	// Labels are put on each node of the pool. A label that is taken from
	// here is taken from the nodes too.
	//
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	// +kubebuilder:validation:XValidation:rule="self.all(k, size(k) <= 317 && size(self[k]) <= 63)",message="a label's value has at most 63 characters"
	// +kubebuilder:validation:XValidation:rule="!('apps.openyurt.io/nodepool' in self) && !('openyurt.io/is-edge-worker' in self)",message="apps.openyurt.io/nodepool and openyurt.io/is-edge-worker belong to Yurt"
	Labels map[string]string `json:"labels,omitempty"`

	// Annotations are put on each node of the pool, as Labels are.
	//
	// +optional
	// +kubebuilder:validation:MaxProperties=64
	Annotations map[string]string `json:"annotations,omitempty"`

	// Taints are put on each node of the pool, as Labels are. A taint is
	// known by its key and effect.
	//
	// +optional
	// +listType=map
	// +listMapKey=key
	// +listMapKey=effect
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:XValidation:rule="self.all(t, t.effect in ['NoSchedule', 'PreferNoSchedule', 'NoExecute'])",message="effect is one of NoSchedule, PreferNoSchedule, NoExecute"
	Taints []corev1.Taint `json:"taints,omitempty"`

	// InterConnectivity says that the nodes of the pool reach each other
	// without the cloud, so that one can lead the others. It cannot change.
	//
	// +optional
	InterConnectivity bool `json:"interConnectivity,omitempty"`

	// LeaderElectionStrategy says which nodes may lead: with random any node,
	// with mark those that LeaderNodeLabelSelector selects.
	//
	// +optional
	// +kubebuilder:default=random
	LeaderElectionStrategy LeaderElectionStrategy `json:"leaderElectionStrategy,omitempty"`

	// LeaderNodeLabelSelector selects the nodes that may lead, for strategy
	// mark.
	//
	// +optional
	// +kubebuilder:validation:MaxProperties=16
	LeaderNodeLabelSelector map[string]string `json:"leaderNodeLabelSelector,omitempty"`

	// EnableLeaderElection lets the pool have leaders, from which its other
	// nodes take what PoolScopeMetadata names.
	//
	// +optional
	EnableLeaderElection bool `json:"enableLeaderElection,omitempty"`

	// PoolScopeMetadata are the resources that the pool fetches once. Services
	// and EndpointSlices are among them in any case.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:default={{group:"",version:"v1",resource:"services"},{group:"discovery.k8s.io",version:"v1",resource:"endpointslices"}}
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:XValidation:rule="self.all(r, size(r.version) > 0 && size(r.resource) > 0)",message="version and resource must not be empty"
	// +kubebuilder:validation:XValidation:rule="!self.exists(r, r.resource == '*' || has(r.group) && r.group == '*')",message="name each group and resource: no wildcards"
	// +kubebuilder:validation:XValidation:rule="!self.exists(r, (!has(r.group) || r.group == '') && r.resource in ['secrets', 'pods', 'nodes'])",message="secrets, pods and nodes are for one node each and are not shared in a pool"
	PoolScopeMetadata []metav1.GroupVersionResource `json:"poolScopeMetadata,omitempty"`

	// LeaderReplicas is how many leaders the pool has, when that many nodes
	// can lead; 16 at most.
	//
	// +optional
	// +kubebuilder:default=1
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=16
	LeaderReplicas int32 `json:"leaderReplicas,omitempty"`
}

// MaxContacts bounds the contacts of a pool.
const MaxContacts = 8

// Leader is a node that leads its pool, or a contact.
type Leader struct {
	// NodeName is the name of its Node.
	NodeName string `json:"nodeName"`
	// Address is the node's internal IP, where the other hubs of the pool
	// reach its hub.
	Address string `json:"address"`
}

// NodePoolStatus is what was observed of a pool.
type NodePoolStatus struct {
	// The defaults are for the columns: a patch of what differs never writes a
	// first 0.

	// ReadyNodeNum is how many nodes are ready.
	//
	// +optional
	// +kubebuilder:default=0
	ReadyNodeNum int32 `json:"readyNodeNum"`
	// UnreadyNodeNum is how many nodes are not ready.
	//
	// +optional
	// +kubebuilder:default=0
	UnreadyNodeNum int32 `json:"unreadyNodeNum"`
	// VouchedNodeNum is how many nodes have no link to the cloud and are
	// vouched for by another node of the pool.
	//
	// +optional
	VouchedNodeNum int32 `json:"vouchedNodeNum,omitempty"`
	// Nodes are the names of the pool's nodes, sorted.
	//
	// +optional
	// +listType=atomic
	Nodes []string `json:"nodes,omitempty"`
	// LeaderEndpoints are the leaders, in the order in which hubs try them.
	//
	// +optional
	// +listType=atomic
	LeaderEndpoints []Leader `json:"leaderEndpoints,omitempty"`
	// Contacts are nodes by which the hubs of the pool find each other when they
	// know of no leader that answers: all of a small pool.
	//
	// +optional
	// +listType=atomic
	Contacts []Leader `json:"contacts,omitempty"`
	// LeaderNum is how many LeaderEndpoints there are.
	//
	// +optional
	LeaderNum int32 `json:"leaderNum,omitempty"`
	// LeaderLastElectedTime is when LeaderEndpoints changed last.
	//
	// +optional
	LeaderLastElectedTime metav1.Time `json:"leaderLastElectedTime,omitempty"`
	// Conditions are aspects of the pool's state. LeaderReady is False while a
	// pool that elects leaders has none, or none that is heard.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []NodePoolCondition `json:"conditions,omitempty"`
}

// NodePoolCondition is one aspect of a pool's state.
type NodePoolCondition struct {
	// Type is LeaderReady.
	Type string `json:"type"`
	// Status is True, False or Unknown.
	Status corev1.ConditionStatus `json:"status,omitempty"`
	// LastTransitionTime is when Status changed last.
	//
	// +optional
	LastTransitionTime metav1.Time `json:"lastTransitionTime,omitempty"`
	// Reason is a word for programs.
	//
	// +optional
	Reason string `json:"reason,omitempty"`
	// Message is for people.
	//
	// +optional
	Message string `json:"message,omitempty"`
}

// NodePool is a set of nodes at one place.
//
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 63",message="a pool's name is the value of a label on its nodes: at most 63 characters"
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,path=nodepools,shortName=np,categories=yurt
// +kubebuilder:subresource:status
// +kubebuilder:storageversion
// +kubebuilder:printcolumn:name="Type",type="string",JSONPath=".spec.type",description="Edge or Cloud"
// +kubebuilder:printcolumn:name="ReadyNodes",type="integer",JSONPath=".status.readyNodeNum",description="nodes that are ready"
// +kubebuilder:printcolumn:name="NotReadyNodes",type="integer",JSONPath=".status.unreadyNodeNum",description="nodes that are not ready"
// +kubebuilder:printcolumn:name="Vouched",type="integer",JSONPath=".status.vouchedNodeNum",description="nodes without a link, vouched for by another of the pool",priority=1
// +kubebuilder:printcolumn:name="LeaderNodes",type="integer",JSONPath=".status.leaderNum",description="nodes that lead the pool"
// +kubebuilder:printcolumn:name="Leader",type="string",JSONPath=".status.leaderEndpoints[0].nodeName",description="the leader that hubs try first",priority=1
// +kubebuilder:printcolumn:name="LeaderElectionAge",type="date",JSONPath=".status.leaderLastElectedTime",description="time since the leaders last changed"
// +kubebuilder:printcolumn:name="Age",type="date",JSONPath=".metadata.creationTimestamp"
type NodePool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	// +kubebuilder:default={}
	Spec NodePoolSpec `json:"spec,omitempty"`
	// +optional
	// +kubebuilder:default={}
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
