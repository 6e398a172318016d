package v1beta2

import (
	"reflect"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestShared(t *testing.T) {
	r := func(group, version, resource string) metav1.GroupVersionResource {
		return metav1.GroupVersionResource{Group: group, Version: version, Resource: resource}
	}
	p := &NodePool{Spec: NodePoolSpec{PoolScopeMetadata: []metav1.GroupVersionResource{
		r("", "v1", "services"), r("apps", "v1", "deployments"), r("apps", "v1", "deployments"),
		r("", "v1", "secrets"), r("", "v1", "pods"), r("", "v1", "nodes"),
		r("", "v1", "*"), r("*", "v1", "secrets"), r("", "v1", "pods/log"), r("", "", "configmaps"), r("", "v1", ""),
	}}}
	want := []metav1.GroupVersionResource{
		r("", "v1", "services"), r("discovery.k8s.io", "v1", "endpointslices"), r("apps", "v1", "deployments"),
	}
	if got := p.Shared(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
