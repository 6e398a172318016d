package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// PoolServiceSpec is what is wanted of a PoolService.
type PoolServiceSpec struct {
	// LoadBalancerClass names the implementation that gives the Service an
	// address in the pool.
	//
	// +optional
	LoadBalancerClass *string `json:"loadBalancerClass,omitempty"`
}

// PoolServiceStatus is what was observed of a PoolService.
type PoolServiceStatus struct {
	// LoadBalancer is the load balancer's state, as in a Service.
	//
	// +optional
	LoadBalancer corev1.LoadBalancerStatus `json:"loadBalancer,omitempty"`
	// AggregateToAnnotations are shown as annotations of the Service, under
	// keys that begin with "aggregated.".
	//
	// +optional
	AggregateToAnnotations map[string]string `json:"aggregateToAnnotations,omitempty"`
	// AggregateToLabels are shown as labels of the Service, likewise.
	//
	// +optional
	AggregateToLabels map[string]string `json:"aggregateToLabels,omitempty"`
	// Conditions are the implementation's.
	//
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// PoolService is the load balancer of one Service in one pool.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Namespaced,path=poolservices,shortName=ps,categories=yurt
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="AGE",type="date",JSONPath=".metadata.creationTimestamp"
type PoolService struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec PoolServiceSpec `json:"spec,omitempty"`
	// +optional
	Status PoolServiceStatus `json:"status,omitempty"`
}

// PoolServiceList is a list of PoolServices.
//
// +kubebuilder:object:root=true
type PoolServiceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []PoolService `json:"items"`
}
