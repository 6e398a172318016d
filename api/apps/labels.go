// Package apps names the labels and annotations of group apps.openyurt.io and
// of its neighbours, as OpenYurt's users know them.
package apps

const (
	// NodePoolLabel on a node names its pool.
	NodePoolLabel = "apps.openyurt.io/nodepool"
	// EdgeWorkerLabel on a node is "true" where a hub serves it.
	EdgeWorkerLabel = "openyurt.io/is-edge-worker"
	// HostNetworkLabel on a node is "true" in a pool with hostNetwork.
	HostNetworkLabel = "nodepool.openyurt.io/hostnetwork"
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

	// LeaderConfigPrefix begins the names of the ConfigMaps that tell hubs of
	// their pool's leaders; the pool's name follows.
	LeaderConfigPrefix = "leader-hub-"
)
