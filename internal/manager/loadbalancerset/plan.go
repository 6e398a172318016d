package loadbalancerset

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// spread reports whether the Service asks for a load balancer in each pool
// that it selects.
func spread(s *corev1.Service) bool {
	return s.Spec.Type == corev1.ServiceTypeLoadBalancer && s.Spec.LoadBalancerClass != nil &&
		s.Annotations[network.PoolSelector] != "" && s.DeletionTimestamp == nil
}

// selected returns the pools that the Service selects, in order.
func selected(s *corev1.Service, pools []v1beta2.NodePool) ([]*v1beta2.NodePool, error) {
	selector, err := labels.Parse(s.Annotations[network.PoolSelector])
	if err != nil {
		return nil, fmt.Errorf("annotation %s is no label selector such as \"region=north,kind in (shop,depot)\": %w", network.PoolSelector, err)
	}
	var out []*v1beta2.NodePool
	for i := range pools {
		if p := &pools[i]; p.DeletionTimestamp == nil && selector.Matches(labels.Set(p.Labels)) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *v1beta2.NodePool) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// change is what must be done to a Service's PoolServices.
type change struct {
	create, update, remove []*v1alpha1.PoolService
}

// plan makes the PoolServices that the Service has those of the pools.
func plan(s *corev1.Service, pools []*v1beta2.NodePool, have []v1alpha1.PoolService) change {
	byName := map[string]*v1alpha1.PoolService{}
	for i := range have {
		byName[have[i].Name] = &have[i]
	}
	var out change
	for _, pool := range pools {
		want := poolService(s, pool)
		is, there := byName[want.Name]
		delete(byName, want.Name)
		switch {
		case !there:
			out.create = append(out.create, want)
		case is.DeletionTimestamp != nil: // made anew once it is gone
		case !same(is, want):
			fixed := is.DeepCopy()
			if fixed.Labels == nil {
				fixed.Labels = map[string]string{}
			}
			maps.Copy(fixed.Labels, want.Labels)
			fixed.OwnerReferences, fixed.Spec = want.OwnerReferences, want.Spec
			out.update = append(out.update, fixed)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		if byName[name].DeletionTimestamp == nil {
			out.remove = append(out.remove, byName[name])
		}
	}
	return out
}

func same(is, want *v1alpha1.PoolService) bool {
	for key, value := range want.Labels {
		if is.Labels[key] != value {
			return false
		}
	}
	return equality.Semantic.DeepEqual(is.OwnerReferences, want.OwnerReferences) && equality.Semantic.DeepEqual(is.Spec, want.Spec)
}

// poolService is the load balancer of the Service in one pool. The Service
// controls it; it goes when both are gone, if the manager is not there to
// delete it before.
func poolService(s *corev1.Service, pool *v1beta2.NodePool) *v1alpha1.PoolService {
	controller := *metav1.NewControllerRef(s, corev1.SchemeGroupVersion.WithKind("Service"))
	controller.BlockOwnerDeletion = nil
	return &v1alpha1.PoolService{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace, Name: s.Name + "-" + pool.Name,
			Labels: map[string]string{
				network.ServiceNameLabel: s.Name, apps.PoolNameLabel: pool.Name, network.ManagedByLabel: network.ManagedBy,
			},
			OwnerReferences: []metav1.OwnerReference{controller, {
				APIVersion: v1beta2.GroupVersion.String(), Kind: "NodePool", Name: pool.Name, UID: pool.UID,
			}},
		},
		Spec: v1alpha1.PoolServiceSpec{LoadBalancerClass: s.Spec.LoadBalancerClass},
	}
}

// gathered is what a Service shows of its PoolServices.
type gathered struct {
	status              corev1.LoadBalancerStatus
	labels, annotations map[string]string
}

// gather puts together what the load balancers of all pools say. Values that
// differ stand side by side, in order: in annotations with a comma between
// them, in labels, where a comma may not be, with an underscore. A label that
// gets too long is left out.
func gather(have []v1alpha1.PoolService) gathered {
	var out gathered
	inLabels, inAnnotations := map[string][]string{}, map[string][]string{}
	for i := range have {
		if have[i].DeletionTimestamp != nil {
			continue
		}
		status := &have[i].Status
		out.status.Ingress = append(out.status.Ingress, status.LoadBalancer.Ingress...)
		collect(inLabels, status.AggregateToLabels)
		collect(inAnnotations, status.AggregateToAnnotations)
	}
	slices.SortStableFunc(out.status.Ingress, func(a, b corev1.LoadBalancerIngress) int {
		return cmp.Or(cmp.Compare(a.IP, b.IP), cmp.Compare(a.Hostname, b.Hostname))
	})
	// Pools may share an address.
	out.status.Ingress = slices.CompactFunc(out.status.Ingress, func(a, b corev1.LoadBalancerIngress) bool {
		return equality.Semantic.DeepEqual(a, b)
	})
	out.labels, out.annotations = joined(inLabels, "_"), joined(inAnnotations, ",")
	maps.DeleteFunc(out.labels, func(key, value string) bool {
		return len(validation.IsQualifiedName(key)) > 0 || len(validation.IsValidLabelValue(value)) > 0
	})
	maps.DeleteFunc(out.annotations, func(key, _ string) bool {
		return len(validation.IsQualifiedName(strings.ToLower(key))) > 0
	})
	return out
}

func collect(into map[string][]string, from map[string]string) {
	for key, value := range from {
		into[key] = append(into[key], value)
	}
}

func joined(values map[string][]string, separator string) map[string]string {
	out := make(map[string]string, len(values))
	for key, all := range values {
		slices.Sort(all)
		out[network.AggregatedPrefix+key] = strings.Join(slices.Compact(all), separator)
	}
	return out
}

// show puts what was gathered in the metadata of the Service, in place of what
// was gathered before.
func (g gathered) show(s *corev1.Service) {
	s.Labels, s.Annotations = replaced(s.Labels, g.labels), replaced(s.Annotations, g.annotations)
}

func replaced(have, gathered map[string]string) map[string]string {
	out := maps.Clone(have)
	maps.DeleteFunc(out, func(key, _ string) bool { return strings.HasPrefix(key, network.AggregatedPrefix) })
	if out == nil && len(gathered) > 0 {
		out = map[string]string{}
	}
	maps.Copy(out, gathered)
	return out
}
