package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AccessFilterResource is a resource as one version has it, for an expression
// is written for the fields of a version.
type AccessFilterResource struct {
	// Group is empty for the core group.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?$`
	Group string `json:"group,omitempty"`
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	// Version is the version of the group, such as v1.
	Version string `json:"version"`
	// Resource is the name in the plural, as in `kubectl api-resources`.
	//
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	Resource string `json:"resource"`
}

// AccessFilterSet gives a field a value.
type AccessFilterSet struct {
	// Path is the field, as a JSON pointer (RFC 6901): /metadata/labels/zone. A
	// list's element is named by its index. What is missing above the field is
	// made, but no elements of lists.
	//
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:Pattern=`^(/([^/~]|~[01])+)+$`
	Path string `json:"path"`
	// Value is a CEL expression for the value.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Value string `json:"value"`
	// When is a CEL expression; only where it is true the field is set.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	When string `json:"when,omitempty"`
}

// AccessFilterRemove takes a field away.
type AccessFilterRemove struct {
	// Path is the field, as in Set. One that is not there is no error.
	//
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:Pattern=`^(/([^/~]|~[01])+)+$`
	Path string `json:"path"`
	// When is a CEL expression; only where it is true the field is removed.
	//
	// +optional
	// +kubebuilder:validation:MaxLength=4096
	When string `json:"when,omitempty"`
}

// AccessFilterSpec says who is shown what otherwise than it is.
//
// Its expressions see object, which is the object as JSON has it and as the
// filters before left it, node, pool and component.
//
// +kubebuilder:validation:XValidation:rule="has(self.drop) || has(self.keep) || has(self.set) || has(self.remove)",message="the filter does nothing: give one of drop, keep, set and remove"
// +kubebuilder:validation:XValidation:rule="!('kubelet' in self.components) || !self.resources.exists(r, r.resource in ['pods', 'nodes'] && (!has(r.group) || size(r.group) == 0) || r.resource == 'leases' && has(r.group) && r.group == 'coordination.k8s.io')",message="what kubelet sees of pods, nodes and leases is not filtered: its pods would stop",fieldPath=".resources"
type AccessFilterSpec struct {
	// Priority orders filters: the lowest is applied first, those that are
	// alike by name. All come after the hub's own filters.
	//
	// +optional
	// +kubebuilder:default=0
	// +kubebuilder:validation:Minimum=-1000000
	// +kubebuilder:validation:Maximum=1000000
	Priority int32 `json:"priority,omitempty"`

	// Components are who sees it: what programs call themselves, which is the
	// first word of their User-Agent, in lower case.
	//
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:Pattern=`^[^\s/*A-Z]+$`
	Components []string `json:"components"`

	// Resources are what is seen otherwise.
	//
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	Resources []AccessFilterResource `json:"resources"`

	// Pools are where: the nodes of these. Without any it is all nodes, also
	// those in no pool.
	//
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	Pools []string `json:"pools,omitempty"`

	// NodeSelector narrows it to nodes with such labels.
	//
	// +optional
	NodeSelector *metav1.LabelSelector `json:"nodeSelector,omitempty"`

	// Drop is a CEL expression: an object for which it is true is not seen.
	//
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Drop string `json:"drop,omitempty"`

	// Keep is a CEL expression: an object for which it is false is not seen.
	//
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=4096
	Keep string `json:"keep,omitempty"`

	// Set gives fields of the objects that are seen other values. All values
	// are made of the object as it came to the filter.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	Set []AccessFilterSet `json:"set,omitempty"`

	// Remove takes fields away, after Set.
	//
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	Remove []AccessFilterRemove `json:"remove,omitempty"`
}

// AccessFilterReady is the type of the condition that tells whether each node
// that the filter selects applies it as it is.
const AccessFilterReady = "Ready"

// AccessFilterPool is how a filter does on the nodes of one pool.
type AccessFilterPool struct {
	// Name is the pool's; empty: nodes in no pool.
	//
	// +kubebuilder:default=""
	Name string `json:"name"`
	// Nodes is how many nodes have it.
	Nodes int32 `json:"nodes"`
	// Active is how many of these apply it as it is.
	Active int32 `json:"active"`
	// Failed is how many apply an older generation, or nothing, since they
	// cannot apply this one, and how many could not apply it to some objects.
	Failed int32 `json:"failed"`
	// Message is what one of the nodes that failed says.
	//
	// +optional
	Message string `json:"message,omitempty"`
}

// AccessFilterFailure is a reason why nodes do otherwise than the filter says.
type AccessFilterFailure struct {
	// Message is the reason.
	Message string `json:"message"`
	// Count is how many nodes say so.
	Count int32 `json:"count"`
	// Nodes are some of them, ten at most.
	//
	// +listType=atomic
	Nodes []string `json:"nodes"`
}

// AccessFilterStatus is what was observed of an AccessFilter.
type AccessFilterStatus struct {
	// Nodes is how many nodes have the filter.
	//
	// +optional
	// +kubebuilder:default=0
	Nodes int32 `json:"nodes"`
	// Active is how many of these apply it as it is.
	//
	// +optional
	// +kubebuilder:default=0
	Active int32 `json:"active"`
	// Failed is how many cannot apply it, or could not to some objects.
	//
	// +optional
	// +kubebuilder:default=0
	Failed int32 `json:"failed"`
	// ObservedGeneration is the generation that the status is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions are aspects of the filter's state. Ready is True when all
	// nodes apply it as it is, and Unknown while some have not said so yet.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Pools tells of the pools whose nodes have the filter; of more than 256,
	// of those first where nodes failed.
	//
	// +optional
	// +listType=map
	// +listMapKey=name
	Pools []AccessFilterPool `json:"pools,omitempty"`
	// Failures are the reasons why nodes failed, those of most nodes first, ten
	// at most.
	//
	// +optional
	// +listType=atomic
	Failures []AccessFilterFailure `json:"failures,omitempty"`
}

// AccessFilter has components on nodes see some of the cluster otherwise than
// it is: without some objects, or with other values in their fields.
//
// It is no access control: who may read an object may read all of it by
// another name.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,path=accessfilters,shortName=af,categories=yurt
// +kubebuilder:subresource:status
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 63",message="a filter's name has at most 63 characters"
// +kubebuilder:printcolumn:name="PRIORITY",type="integer",JSONPath=".spec.priority"
// +kubebuilder:printcolumn:name="COMPONENTS",type="string",JSONPath=".spec.components"
// +kubebuilder:printcolumn:name="RESOURCES",type="string",JSONPath=".spec.resources[*].resource"
// +kubebuilder:printcolumn:name="NODES",type="integer",JSONPath=".status.nodes"
// +kubebuilder:printcolumn:name="ACTIVE",type="integer",JSONPath=".status.active"
// +kubebuilder:printcolumn:name="FAILED",type="integer",JSONPath=".status.failed"
// +kubebuilder:printcolumn:name="READY",type="string",JSONPath=".status.conditions[?(@.type==\"Ready\")].status"
// +kubebuilder:printcolumn:name="MESSAGE",type="string",JSONPath=".status.conditions[?(@.type==\"Ready\")].message",priority=1
// +kubebuilder:printcolumn:name="AGE",type="date",JSONPath=".metadata.creationTimestamp"
type AccessFilter struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec AccessFilterSpec `json:"spec"`
	// +optional
	Status AccessFilterStatus `json:"status,omitempty"`
}

// AccessFilterList is a list of AccessFilters.
//
// +kubebuilder:object:root=true
type AccessFilterList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AccessFilter `json:"items"`
}

// AccessFilterReport is what a node tells of one filter that selects it. The
// annotation network.AccessFiltersAnnotation of a Node holds an object of them
// by the filters' names.
//
// +kubebuilder:object:generate=false
type AccessFilterReport struct {
	// Generation is the newest that the node knows.
	Generation int64 `json:"generation"`
	// Applied is the generation that the node applies; 0: none.
	Applied int64 `json:"applied,omitempty"`
	// Error is why Applied is not Generation, or why the filter left objects
	// as they were that it should have changed.
	Error string `json:"error,omitempty"`
}
