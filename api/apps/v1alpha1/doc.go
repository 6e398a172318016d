// Package v1alpha1 holds an older version of the pool types of group
// apps.openyurt.io.
//
// +kubebuilder:object:generate=true
// +groupName=apps.openyurt.io
package v1alpha1
