package loadbalancerset

import (
	"maps"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

func web(selector string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web", UID: "1", Annotations: map[string]string{network.PoolSelector: selector},
		},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, LoadBalancerClass: new("example.com/lb")},
	}
}

func pools() []v1beta2.NodePool {
	return []v1beta2.NodePool{
		{ObjectMeta: metav1.ObjectMeta{Name: "south", Labels: map[string]string{"kind": "shop"}}},
		{ObjectMeta: metav1.ObjectMeta{Name: "north", Labels: map[string]string{"kind": "shop"}}},
		{ObjectMeta: metav1.ObjectMeta{Name: "depot", Labels: map[string]string{"kind": "depot"}}},
		{ObjectMeta: metav1.ObjectMeta{Name: "leaving", Labels: map[string]string{"kind": "shop"}, DeletionTimestamp: &metav1.Time{}}},
	}
}

func TestSpread(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*corev1.Service)
		want   bool
	}{
		{"as asked for", func(*corev1.Service) {}, true},
		{"of another type", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP }, false},
		{"without a class", func(s *corev1.Service) { s.Spec.LoadBalancerClass = nil }, false},
		{"with an empty selector", func(s *corev1.Service) { s.Annotations[network.PoolSelector] = "" }, false},
		{"without annotations", func(s *corev1.Service) { s.Annotations = nil }, false},
		{"being deleted", func(s *corev1.Service) { s.DeletionTimestamp = &metav1.Time{} }, false},
	} {
		s := web("kind=shop")
		tc.change(s)
		if got := spread(s); got != tc.want {
			t.Errorf("a Service %s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestSelected(t *testing.T) {
	for _, tc := range []struct{ selector, want string }{
		{"kind=shop", "north south"},
		{"kind in (shop,depot)", "depot north south"},
		{"kind!=shop", "depot"},
		{"kind=harbour", ""},
		{"kind in", "error"},
	} {
		got := []string{}
		chosen, err := selected(web(tc.selector), pools())
		for _, p := range chosen {
			got = append(got, p.Name)
		}
		if err != nil {
			got = []string{"error"}
			if !strings.Contains(err.Error(), network.PoolSelector) {
				t.Errorf("%v names not the annotation", err)
			}
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%s: got %v, want %s", tc.selector, got, tc.want)
		}
	}
}

// TestPlanSettles carries out what is planned and plans again: nothing is left
// to do, whatever was there before.
func TestPlanSettles(t *testing.T) {
	s := web("kind=shop")
	chosen, err := selected(s, pools())
	if err != nil {
		t.Fatal(err)
	}
	bent := func(change func(*v1alpha1.PoolService)) v1alpha1.PoolService {
		p := poolService(s, chosen[0])
		change(p)
		return *p
	}
	gone := poolService(s, &pools()[2])
	for _, tc := range []struct {
		name string
		have []v1alpha1.PoolService
		want [3]int // created, updated, removed
	}{
		{"nothing", nil, [3]int{2, 0, 0}},
		{"all", []v1alpha1.PoolService{*poolService(s, chosen[0]), *poolService(s, chosen[1])}, [3]int{}},
		{"one of a pool that is not selected", []v1alpha1.PoolService{*gone}, [3]int{2, 0, 1}},
		{"one without its labels", []v1alpha1.PoolService{bent(func(p *v1alpha1.PoolService) { p.Labels = nil })}, [3]int{1, 1, 0}},
		{"one of another class", []v1alpha1.PoolService{bent(func(p *v1alpha1.PoolService) { p.Spec.LoadBalancerClass = nil })}, [3]int{1, 1, 0}},
		{"one without its owners", []v1alpha1.PoolService{bent(func(p *v1alpha1.PoolService) { p.OwnerReferences = nil })}, [3]int{1, 1, 0}},
		{"one that goes", []v1alpha1.PoolService{bent(func(p *v1alpha1.PoolService) { p.DeletionTimestamp = &metav1.Time{} })}, [3]int{1, 0, 0}},
		{"one with labels of others", []v1alpha1.PoolService{bent(func(p *v1alpha1.PoolService) { p.Labels["theirs"] = "x" })}, [3]int{1, 0, 0}},
	} {
		got := plan(s, chosen, tc.have)
		if n := [3]int{len(got.create), len(got.update), len(got.remove)}; n != tc.want {
			t.Errorf("%s: got %v created, updated, removed, want %v", tc.name, n, tc.want)
		}
		after := map[string]v1alpha1.PoolService{}
		for _, p := range tc.have {
			if p.DeletionTimestamp == nil {
				after[p.Name] = p
			}
		}
		for _, p := range got.remove {
			delete(after, p.Name)
		}
		for _, p := range append(got.create, got.update...) {
			after[p.Name] = *p
		}
		var have []v1alpha1.PoolService
		for p := range maps.Values(after) {
			have = append(have, p)
		}
		again := plan(s, chosen, have)
		if len(again.update)+len(again.remove) > 0 || (tc.name != "one that goes" && len(again.create) > 0) {
			t.Errorf("%s: planned again: %+v", tc.name, again)
		}
	}
}

func TestGather(t *testing.T) {
	of := func(labels, annotations map[string]string, ips ...string) v1alpha1.PoolService {
		p := v1alpha1.PoolService{Status: v1alpha1.PoolServiceStatus{AggregateToLabels: labels, AggregateToAnnotations: annotations}}
		for _, ip := range ips {
			p.Status.LoadBalancer.Ingress = append(p.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
		return p
	}
	going := of(map[string]string{"zone": "gone"}, nil, "192.0.2.9")
	going.DeletionTimestamp = &metav1.Time{}
	g := gather([]v1alpha1.PoolService{
		of(map[string]string{"zone": "b", "long": strings.Repeat("x", 40)}, map[string]string{"example.com/id": "2"}, "192.0.2.2", "192.0.2.1"),
		of(map[string]string{"zone": "a", "long": strings.Repeat("y", 40)}, map[string]string{"example.com/id": "1", "no key": "x"}, "192.0.2.1"),
		of(map[string]string{"zone": "b"}, map[string]string{"example.com/id": "2"}),
		going,
	})
	if want := map[string]string{"aggregated.zone": "a_b"}; !reflect.DeepEqual(g.labels, want) {
		t.Errorf("labels: got %v, want %v", g.labels, want)
	}
	if want := map[string]string{"aggregated.example.com/id": "1,2"}; !reflect.DeepEqual(g.annotations, want) {
		t.Errorf("annotations: got %v, want %v", g.annotations, want)
	}
	var ips []string
	for _, i := range g.status.Ingress {
		ips = append(ips, i.IP)
	}
	if got := strings.Join(ips, " "); got != "192.0.2.1 192.0.2.2" {
		t.Errorf("addresses: got %s", got)
	}

	s := web("kind=shop")
	s.Labels = map[string]string{"mine": "x", "aggregated.old": "y"}
	g.show(s)
	if want := map[string]string{"mine": "x", "aggregated.zone": "a_b"}; !reflect.DeepEqual(s.Labels, want) {
		t.Errorf("labels of the Service: got %v, want %v", s.Labels, want)
	}
	gather(nil).show(s)
	if want := map[string]string{"mine": "x"}; !reflect.DeepEqual(s.Labels, want) {
		t.Errorf("labels once nothing is gathered: got %v, want %v", s.Labels, want)
	}
	if want := map[string]string{network.PoolSelector: "kind=shop"}; !reflect.DeepEqual(s.Annotations, want) {
		t.Errorf("annotations once nothing is gathered: got %v, want %v", s.Annotations, want)
	}
	if p := poolService(s, &pools()[0]); p.Name != "web-south" || p.Labels[apps.PoolNameLabel] != "south" || !metav1.IsControlledBy(p, s) {
		t.Errorf("got %+v", p.ObjectMeta)
	}
}
