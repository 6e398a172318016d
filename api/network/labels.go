// Package network names the labels and annotations of group
// network.openyurt.io, as OpenYurt's users know them.
package network

const (
	// PoolSelector on a Service of type LoadBalancer selects, by their labels,
	// the pools in which it gets a load balancer.
	PoolSelector = "service.openyurt.io/nodepool-labelselector"
	// ServiceNameLabel on a PoolService names its Service.
	ServiceNameLabel = "openyurt.io/service-name"
	// ManagedByLabel on a PoolService is ManagedBy where yurt-manager made it.
	ManagedByLabel = "poolservice.openyurt.io/managed-by"
	// ManagedBy is the value of ManagedByLabel.
	ManagedBy = "load-balancer-set-controller"
	// PoolServicesFinalizer keeps a Service until its PoolServices are gone.
	PoolServicesFinalizer = "poolservice.openyurt.io/resources"
	// AggregatedPrefix begins the keys of labels and annotations of a Service
	// that are gathered from its PoolServices.
	AggregatedPrefix = "aggregated."
	// AccessFiltersAnnotation on a Node is what its hub tells of the
	// AccessFilters that select it: an object of v1alpha1.AccessFilterReport
	// in JSON, by the filters' names. Without any filter it is not there.
	AccessFiltersAnnotation = "network.openyurt.io/accessfilters"
)
