package pools

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/test/bed"
)

// TestPeersPodsStay cuts a whole pool off. What the kubelet of one node says of
// its pod is seen on another, which asks their leader: an address that is new,
// too. When the link of that one returns, the cloud has taken the silent nodes'
// pods for not ready, and an open watch shows none of that, as long as the first
// node lives; when it dies, its pod is not ready.
func TestPeersPodsStay(t *testing.T) {
	s := newSite(t, "alive", 3)
	s.elect(t, 1)
	pod, slice := newPod(t, s.node(1))
	for i := range s.hubs {
		s.start(t, i)
	}
	here, there := s.hubs[2], s.hubs[1]
	for _, h := range s.hubs[1:] {
		h.follows(t, s.node(0), true)
	}
	kubelet := there.client(t)
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: there.Node},
		Spec:       coordinationv1.LeaseSpec{LeaseDurationSeconds: new(int32(3600)), RenewTime: new(metav1.NowMicro())},
	}
	if _, err := kubelet.CoordinationV1().Leases("kube-node-lease").Create(t.Context(), lease, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, "the kubelet sees its pod", func() error {
		pods, err := kubelet.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{ResourceVersion: "0", FieldSelector: "spec.nodeName=" + there.Node})
		if err == nil && len(pods.Items) != 1 {
			err = fmt.Errorf("it sees %d", len(pods.Items))
		}
		return err
	})
	says := func(ip string, ready bool) {
		t.Helper()
		status := map[bool]string{true: "True", false: "False"}[ready]
		patch := fmt.Sprintf(`{"metadata":{"uid":%q},"status":{"phase":"Running","podIP":%q,"podIPs":[{"ip":%q},{"$patch":"replace"}],"conditions":[{"type":"Ready","status":%q}]}}`,
			pod.UID, ip, ip, status)
		if _, err := kubelet.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status"); err != nil {
			t.Fatal(err)
		}
	}
	said := here.told(t, slice)
	said.last(t, "10.9.0.1 true")

	for _, h := range s.hubs {
		cut(t, h, bed.Down)
		h.offline(t)
	}
	says("10.9.0.1", false)
	said.last(t, "10.9.0.1 false")
	says("10.9.0.2", true)
	said.last(t, "10.9.0.2 true")

	slice.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(false)}
	slice.Annotations = map[string]string{"pools.test/cloud": "silent"}
	if _, err := shared.admin.DiscoveryV1().EndpointSlices("pools").Update(t.Context(), slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	heal(t, here)
	said.last(t, "10.9.0.2 true silent")
	there.Kill()
	said.last(t, "10.9.0.1 false silent")
	want := []string{"10.9.0.1 true", "10.9.0.1 false", "10.9.0.2 true", "10.9.0.2 true silent", "10.9.0.1 false silent"}
	if got := said.all(); !slices.Equal(got, want) {
		t.Errorf("the watch showed %s, want %s", strings.Join(got, ", "), strings.Join(want, ", "))
	}
}

// newPod makes a pod on a node, and a slice with its endpoint as the controllers
// of Kubernetes would.
func newPod(t *testing.T, node string) (*corev1.Pod, *discoveryv1.EndpointSlice) {
	t.Helper()
	var pod *corev1.Pod
	await(t, "pod on "+node, func() (err error) { // its ServiceAccount may be made just now
		pod, err = shared.admin.CoreV1().Pods("pools").Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "on-" + node},
			Spec: corev1.PodSpec{
				NodeName: node, Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers: []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
			},
		}, metav1.CreateOptions{})
		return err
	})
	slice, err := shared.admin.DiscoveryV1().EndpointSlices("pools").Create(t.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: "on-" + node, Labels: map[string]string{
			discoveryv1.LabelServiceName: "on-" + node, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
		}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints: []discoveryv1.Endpoint{{
			Addresses: []string{"10.9.0.1"}, NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true)},
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod, slice
}

// lines are what one watch showed of a slice with one endpoint.
type lines struct {
	mu   sync.Mutex // guards the following
	seen []string
	err  error
}

// told watches a slice at the hub until the test ends.
func (h *hub) told(t *testing.T, slice *discoveryv1.EndpointSlice) *lines {
	t.Helper()
	l := &lines{}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	stream, err := h.client(t).DiscoveryV1().EndpointSlices(slice.Namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: "metadata.name=" + slice.Name, ResourceVersion: "0", TimeoutSeconds: new(int64(3600)),
	})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for ev := range stream.ResultChan() {
			l.take(ev.Object)
		}
		if ctx.Err() == nil {
			l.mu.Lock()
			l.err = fmt.Errorf("the watch has ended")
			l.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		cancel()
		stream.Stop()
		running.Wait()
	})
	return l
}

func (l *lines) take(object any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	slice, ok := object.(*discoveryv1.EndpointSlice)
	if !ok || len(slice.Endpoints) != 1 {
		l.err = fmt.Errorf("the watch showed %v", object)
		return
	}
	e := slice.Endpoints[0]
	line := strings.TrimSpace(fmt.Sprintf("%s %v %s", e.Addresses[0], *e.Conditions.Ready, slice.Annotations["pools.test/cloud"]))
	if n := len(l.seen); n == 0 || l.seen[n-1] != line {
		l.seen = append(l.seen, line)
	}
}

func (l *lines) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.seen)
}

// last waits until the watch has shown that.
func (l *lines) last(t *testing.T, want string) {
	t.Helper()
	await(t, want, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.err != nil {
			return l.err
		}
		if n := len(l.seen); n == 0 || l.seen[n-1] != want {
			return fmt.Errorf("the watch showed %v", l.seen)
		}
		return nil
	})
}
