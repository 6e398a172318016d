package manager

import (
	admissionv1 "k8s.io/api/admissionregistration/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
	"github.com/yurt-edge/yurt/api/apps/v1beta1"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	networkv1alpha1 "github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/manager/hubleader"
	"github.com/yurt-edge/yurt/internal/manager/webhookcert"
)

// newScheme has the types that the manager reads and writes.
func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		clientgoscheme.AddToScheme, apiextensionsv1.AddToScheme,
		v1alpha1.AddToScheme, v1beta1.AddToScheme, v1beta2.AddToScheme, networkv1alpha1.AddToScheme,
	} {
		utilruntime.Must(add(s))
	}
	return s
}

// readRules are what the caches read everywhere, and what servicetopology
// (EndpointSlices) and nodelifecycle (a pool) read past them; readIn what they
// read in the working namespace. They say what cacheOptions does.
var (
	readRules = []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"nodes", "pods", "services"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{"apps.openyurt.io"}, Resources: []string{"nodepools", "nodebuckets"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{"apps.openyurt.io"}, Resources: []string{"nodepools"}, Verbs: []string{"get"}},
		{APIGroups: []string{discoveryv1.GroupName}, Resources: []string{"endpointslices"}, Verbs: []string{"list"}},
		{APIGroups: []string{"network.openyurt.io"}, Resources: []string{"poolservices", "accessfilters"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"certificatesigningrequests"}, Verbs: []string{"list", "watch"}},
		{
			APIGroups: []string{rbacv1.GroupName}, Resources: []string{"clusterroles"}, ResourceNames: []string{hubleader.Multiplexer},
			Verbs: []string{"list", "watch"},
		},
		{
			APIGroups: []string{apiextensionsv1.GroupName}, Resources: []string{"customresourcedefinitions"},
			ResourceNames: []string{webhookcert.Definition}, Verbs: []string{"list", "watch"},
		},
		{
			APIGroups: []string{admissionv1.GroupName}, Resources: []string{"validatingwebhookconfigurations"},
			ResourceNames: []string{webhookcert.Checks}, Verbs: []string{"list", "watch"},
		},
	}
	readIn = []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{webhookcert.Secret}, Verbs: []string{"list", "watch"}},
	}
	readLeases = []rbacv1.PolicyRule{ // in kube-node-lease
		{APIGroups: []string{coordinationv1.GroupName}, Resources: []string{"leases"}, Verbs: []string{"list", "watch"}},
	}
)

// cacheOptions keeps what the controllers read and no more.
func cacheOptions(namespace string) cache.Options {
	named := func(name string) fields.Selector { return fields.OneTermEqualSelector(metav1.ObjectNameField, name) }
	followed := labels.NewSelector()
	if r, err := labels.NewRequirement(apps.ConfigMapNameLabel, selection.Exists, nil); err == nil {
		followed = followed.Add(*r)
	}
	return cache.Options{
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}:           {Transform: slimPod},
			&coordinationv1.Lease{}: {Namespaces: map[string]cache.Config{corev1.NamespaceNodeLease: {}}},
			&corev1.ConfigMap{}:     {Namespaces: map[string]cache.Config{namespace: {LabelSelector: followed}}},
			&corev1.Secret{}:        {Namespaces: map[string]cache.Config{namespace: {FieldSelector: named(webhookcert.Secret)}}},
			&corev1.Service{}:       {Transform: slimService},
			&rbacv1.ClusterRole{}: {
				Field: named(hubleader.Multiplexer),
			},
			&apiextensionsv1.CustomResourceDefinition{}:   {Field: named(webhookcert.Definition)},
			&admissionv1.ValidatingWebhookConfiguration{}: {Field: named(webhookcert.Checks)},
		},
	}
}

// slimPod keeps what podbinding reads of a pod: there are many. Writes are
// patches of what differs, so what is left out stays as it is.
func slimPod(obj any) (any, error) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return obj, nil
	}
	pod.ManagedFields = nil
	pod.Spec = corev1.PodSpec{NodeName: pod.Spec.NodeName, Tolerations: pod.Spec.Tolerations}
	pod.Status = corev1.PodStatus{}
	return pod, nil
}

// slimService keeps what csrapprover and loadbalancerset read of a Service.
func slimService(obj any) (any, error) {
	s, ok := obj.(*corev1.Service)
	if !ok {
		return obj, nil
	}
	s.ManagedFields = nil
	s.Spec = corev1.ServiceSpec{
		Type: s.Spec.Type, LoadBalancerClass: s.Spec.LoadBalancerClass, ClusterIP: s.Spec.ClusterIP, ClusterIPs: s.Spec.ClusterIPs,
	}
	s.Status = corev1.ServiceStatus{LoadBalancer: s.Status.LoadBalancer}
	return s, nil
}
