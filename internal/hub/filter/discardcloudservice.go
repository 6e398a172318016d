package filter

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// DiscardService is the annotation of Services of type LoadBalancer that nodes
// of the edge are not to know.
const DiscardService = "svc.openyurt.io/discard"

// discardCloudService leaves out Services that only the cloud needs: load
// balancers that say so, and that of the tunnel's servers. As in OpenYurt.
func discardCloudService() *Filter {
	return &Filter{
		Name: "discardcloudservice", Components: []string{"kube-proxy"}, EdgeOnly: true,
		Resources: []schema.GroupResource{{Resource: "services"}},
		uses:      func(*State) [2]any { return [2]any{} },
		show: func(_ *State, o Object) ([]byte, bool, error) {
			namespace, name, err := o.name()
			if err != nil {
				return o.Data, true, err
			}
			if namespace == "kube-system" && name == "x-tunnel-server-internal-svc" {
				return nil, false, nil
			}
			if discard, err := o.Annotation(DiscardService); err != nil || discard != "true" {
				return o.Data, true, err
			}
			kind, err := o.serviceType()
			return o.Data, kind != corev1.ServiceTypeLoadBalancer, err
		},
	}
}
