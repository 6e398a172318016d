// Package v1beta1 holds an older version of the pool types of group
// apps.openyurt.io.
//
// +kubebuilder:object:generate=true
// +groupName=apps.openyurt.io
package v1beta1
