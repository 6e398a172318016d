// Package apps names the labels and annotations of group apps.openyurt.io and
// of its neighbours, as OpenYurt's users know them.
package apps

const (
	// NodePoolLabel on a node names its pool.
	NodePoolLabel = "apps.openyurt.io/nodepool"
	// DesiredNodePoolLabel on a node in no pool names the pool that it is put
	// into. It is an older way to join one.
	DesiredNodePoolLabel = "apps.openyurt.io/desired-nodepool"
	// EdgeWorkerLabel on a node is "true" where a hub serves it.
	EdgeWorkerLabel = "openyurt.io/is-edge-worker"
	// HostNetworkLabel on a node is "true" in a pool with hostNetwork.
	HostNetworkLabel = "nodepool.openyurt.io/hostnetwork"
	// ExcludeHostNetwork on a pod, "true", keeps it off nodes with
	// HostNetworkLabel.
	ExcludeHostNetwork = "apps.openyurt.io/exclude-host-network-pool"
	// NodePoolTypeLabel on a NodePool, and on a node if its kubelet is told so,
	// is the pool's type in small letters.
	NodePoolTypeLabel = "nodepool.openyurt.io/type"
	// PoolNameLabel on what belongs to a pool names the pool.
	PoolNameLabel = "openyurt.io/pool-name"
	// ConfigMapNameLabel on a ConfigMap that hubs follow repeats its name.
	ConfigMapNameLabel = "openyurt.io/configmap-name"

	// PreviousAttributes on a node remembers in JSON what its pool put on
	// it, so that it can be taken off again.
	PreviousAttributes = "nodepool.openyurt.io/previous-attributes"

	// AutonomyDuration on a node is how long its pods stay bound to it
	// while it is away: a Go duration, "0s" for ever.
	AutonomyDuration = "node.openyurt.io/autonomy-duration"
	// Autonomy is an older way to say "0s".
	Autonomy = "node.beta.openyurt.io/autonomy"
	// Binding is the oldest one.
	Binding = "apps.openyurt.io/binding"
	// OriginalNotReady on a pod holds the seconds for which it tolerated a node
	// that is not ready, before it was bound.
	OriginalNotReady = "apps.openyurt.io/original-not-ready-toleration-duration"
	// OriginalUnreachable is the same for a node that cannot be reached.
	OriginalUnreachable = "apps.openyurt.io/original-unreachable-toleration-duration"

	// Heartbeats on the lease of a node are heartbeats of others of its pool,
	// which have no link to the cloud.
	Heartbeats = "node.openyurt.io/heartbeats"
	// DelegateHeartbeat on the lease of a node is "true" while it is renewed
	// on the word of another node.
	DelegateHeartbeat = "openyurt.io/delegate-heartbeat"
	// VouchedFor on the lease of a node is the manager's memory of who vouched
	// for it last, and with which heartbeat.
	VouchedFor = "node.openyurt.io/vouched-for"
	// VouchedForCondition of a node is True while another vouches for it.
	VouchedForCondition = "YurtNodeVouchedFor"
	// UnschedulableTaint keeps new pods from a node that cannot hear of them.
	UnschedulableTaint = "node.openyurt.io/unschedulable"
	// Dead on a node says that the manager takes it for dead since its
	// condition Ready became Unknown, at the time that is the value.
	Dead = "node.openyurt.io/dead"
	// SilenceEvicts on a node names its pool if that is a Cloud pool, or is not
	// there: then Kubernetes evicts as it does where there is no Yurt.
	SilenceEvicts = "node.openyurt.io/silence-evicts"

	// TopologyKeys on a Service keeps its traffic near; the values follow.
	TopologyKeys = "openyurt.io/topologyKeys"
	// TopologyNode keeps it on the node.
	TopologyNode = "kubernetes.io/hostname"
	// TopologyPool keeps it in the pool.
	TopologyPool = "openyurt.io/nodepool"
	// TopologyZone is another word for the pool.
	TopologyZone = "kubernetes.io/zone"
	// UpdateTrigger on an EndpointSlice changes when hubs of OpenYurt are to
	// look at it again.
	UpdateTrigger = "openyurt.io/update-trigger"

	// LeaderConfigPrefix begins the names of the ConfigMaps that tell hubs of
	// their pool's leaders; the pool's name follows.
	LeaderConfigPrefix = "leader-hub-"
)
