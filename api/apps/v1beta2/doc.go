// Package v1beta2 is the stored version of the pool types of group
// apps.openyurt.io, as OpenYurt 1.7 defines them.
//
// +kubebuilder:object:generate=true
// +groupName=apps.openyurt.io
package v1beta2
