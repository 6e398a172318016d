package manager

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/api/network"
	networkv1alpha1 "github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// TestLoadBalancerSet spreads a Service over pools, and takes it back.
func TestLoadBalancerSet(t *testing.T) {
	c := theCluster(t)
	for _, name := range []string{"lb-north", "lb-south"} {
		c.patch(t, c.pool(t, name, v1beta2.NodePoolSpec{}), `{"metadata":{"labels":{"lb":"yes"}}}`)
	}
	taken := &networkv1alpha1.PoolService{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "taken-lb-north"}}
	service := func(name string) *corev1.Service {
		return &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "default", Name: name, Annotations: map[string]string{network.PoolSelector: "lb=yes"},
			},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeLoadBalancer, LoadBalancerClass: new("example.com/lb"),
				Ports: []corev1.ServicePort{{Port: 80}},
			},
		}
	}
	web, other, wrong, lone := service("web-everywhere"), service("taken"), service("wrong"), service("lone")
	wrong.Annotations[network.PoolSelector], lone.Annotations[network.PoolSelector] = "lb in", "lb=never"
	for _, o := range []client.Object{taken, web, other, wrong, lone} {
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	has := func(want ...string) {
		t.Helper()
		await(t, fmt.Sprintf("PoolServices %v", want), func() error {
			var list networkv1alpha1.PoolServiceList
			if err := c.List(t.Context(), &list, client.InNamespace("default"), client.MatchingLabels{
				network.ManagedByLabel: network.ManagedBy, network.ServiceNameLabel: web.Name,
			}); err != nil {
				return err
			}
			var got []string
			for i := range list.Items {
				got = append(got, strings.TrimPrefix(list.Items[i].Name, web.Name+"-"))
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				return fmt.Errorf("got %v", got)
			}
			return nil
		})
	}
	has("lb-north", "lb-south")

	// One that has lost its owners, as in a backup, gets them back.
	orphan := &networkv1alpha1.PoolService{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: web.Name + "-lb-north"}}
	c.patch(t, orphan, `{"metadata":{"ownerReferences":null}}`)
	await(t, "it has its owners again", func() error {
		err := c.Get(t.Context(), client.ObjectKeyFromObject(orphan), orphan)
		if err == nil && !metav1.IsControlledBy(orphan, web) {
			err = fmt.Errorf("owners %v", orphan.OwnerReferences)
		}
		return err
	})

	// What an implementation says of one pool shows on the Service.
	for name, ip := range map[string]string{"lb-north": "192.0.2.2", "lb-south": "192.0.2.1"} {
		p := &networkv1alpha1.PoolService{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: web.Name + "-" + name}}
		patch := fmt.Sprintf(`{"status":{"loadBalancer":{"ingress":[{"ip":%q}]},"aggregateToAnnotations":{"example.com/id":%q}}}`, ip, name)
		if err := c.Status().Patch(t.Context(), p, client.RawPatch(types.MergePatchType, []byte(patch))); err != nil {
			t.Fatal(err)
		}
	}
	shows := func(ips, ids string) {
		t.Helper()
		await(t, "the Service shows "+ips, func() error {
			var s corev1.Service
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(web), &s); err != nil {
				return err
			}
			var got []string
			for _, i := range s.Status.LoadBalancer.Ingress {
				got = append(got, i.IP)
			}
			if strings.Join(got, " ") != ips || s.Annotations[network.AggregatedPrefix+"example.com/id"] != ids {
				return fmt.Errorf("it shows %v, %v", got, s.Annotations)
			}
			return nil
		})
	}
	shows("192.0.2.1 192.0.2.2", "lb-north,lb-south")

	// A pool that is selected no longer takes its load balancer with it.
	c.patch(t, &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "lb-south"}}, `{"metadata":{"labels":{"lb":"no"}}}`)
	has("lb-north")
	shows("192.0.2.2", "lb-north")

	// Who corrects a mistake, or is told of one, finds it where kubectl
	// describe looks.
	for reason, name := range map[string]string{"BadPoolSelector": wrong.Name, "NameTaken": other.Name, "NoMatchNodePool": lone.Name} {
		await(t, "event "+reason, func() error {
			var list eventsv1.EventList
			if err := c.List(t.Context(), &list, client.InNamespace("default")); err != nil {
				return err
			}
			if !slices.ContainsFunc(list.Items, func(e eventsv1.Event) bool { return e.Reason == reason && e.Regarding.Name == name }) {
				return fmt.Errorf("not among %d events", len(list.Items))
			}
			return nil
		})
	}
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(taken), taken); err != nil || len(taken.OwnerReferences) > 0 {
		t.Errorf("somebody else's PoolService was taken over: %v, %v", taken.OwnerReferences, err)
	}

	// The Service stays until an implementation has let go of its PoolService.
	north := &networkv1alpha1.PoolService{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: web.Name + "-lb-north"}}
	c.patch(t, north, `{"metadata":{"finalizers":["example.com/lb"]}}`)
	for _, o := range []client.Object{web, other, wrong, lone} {
		if err := c.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the PoolService is to go", func() error {
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(north), north); err != nil {
			return err
		}
		if north.DeletionTimestamp == nil {
			return fmt.Errorf("it is not")
		}
		return nil
	})
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(web), web); err != nil {
		t.Errorf("the Service went before its PoolService: %v", err)
	}
	c.patch(t, north, `{"metadata":{"finalizers":null}}`)
	for _, o := range []client.Object{web, other, wrong, lone} {
		await(t, "Service "+o.GetName()+" is gone", func() error {
			err := c.Get(t.Context(), client.ObjectKeyFromObject(o), o)
			if apierrors.IsNotFound(err) {
				return nil
			}
			return fmt.Errorf("it is there: %w", err)
		})
	}
	if err := c.Delete(t.Context(), taken); err != nil {
		t.Error(err)
	}
}
