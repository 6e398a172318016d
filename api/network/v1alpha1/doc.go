// Package v1alpha1 holds the types of group network.openyurt.io.
//
// +kubebuilder:object:generate=true
// +groupName=network.openyurt.io
package v1alpha1
