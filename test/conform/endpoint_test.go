package conform

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/test/bed"
)

// addressesOf are the endpoints of a slice by pod; one that is not ready has a
// mark.
func addressesOf(s *discoveryv1.EndpointSlice) map[string]string {
	out := map[string]string{}
	for _, e := range s.Endpoints {
		text := e.Addresses[0]
		if !*e.Conditions.Ready {
			text += "!"
		}
		out[e.TargetRef.Name] = text
	}
	return out
}

// eachState gathers what a watcher of slices sees of each pod.
type eachState struct {
	mu   sync.Mutex
	seen map[string][]string // by pod, without repetitions
}

func (e *eachState) read(lines *bufio.Reader) {
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var event struct {
			Type   string
			Object discoveryv1.EndpointSlice
		}
		if json.Unmarshal(line, &event) != nil || event.Type == "BOOKMARK" {
			continue
		}
		e.mu.Lock()
		for pod, now := range addressesOf(&event.Object) {
			if n := len(e.seen[pod]); n == 0 || e.seen[pod][n-1] != now {
				e.seen[pod] = append(e.seen[pod], now)
			}
		}
		e.mu.Unlock()
	}
}

func (e *eachState) want(pod string, states ...string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !slices.Equal(e.seen[pod], states) {
		return fmt.Errorf("a watcher saw %s as %q, want %q", pod, e.seen[pod], states)
	}
	return nil
}

// TestEndpointsFollowPods is what a machine's reboot does to its Services while
// the link is cut, with the cloud's own endpoints controller as the judge: one
// pod gets another address, one is not ready any more, and of one nothing
// changes, but the cloud takes it for not ready as it does with a silent node.
func TestEndpointsFollowPods(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const namespace = "conform-endpoints"
	must(second(busy.admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})))
	t.Cleanup(func() {
		if err := busy.admin.CoreV1().Namespaces().Delete(context.WithoutCancel(ctx), namespace, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	must(second(busy.admin.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "shop"},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "shop"}, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}},
	}, metav1.CreateOptions{})))
	const node = "edge-endpoints"
	busy.node(t, node)
	hub, link := busy.hub(t, node)
	cfg, err := hub.KubeletConfig()
	must(err)
	kubelet, err := kubernetes.NewForConfig(cfg)
	must(err)
	pods := map[string]*corev1.Pod{}
	status := func(client kubernetes.Interface, name, ip, ready string) {
		t.Helper()
		patch := fmt.Sprintf(`{"metadata":{"uid":%q},"status":{"phase":"Running","podIP":%q,"podIPs":[{"ip":%q},{"$patch":"replace"}],"conditions":[{"type":"Ready","status":%q}]}}`,
			pods[name].UID, ip, ip, ready)
		must(second(client.CoreV1().Pods(namespace).Patch(ctx, name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status")))
	}
	server, edge := busy.sides(t, hub, "reader")
	for i, name := range []string{"moved", "broken", "same"} {
		mustAwait(t, func(ctx context.Context) error { // the namespace's account comes a little later
			pods[name], err = busy.admin.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "shop"}},
				Spec: corev1.PodSpec{
					NodeName: node, Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
					Containers: []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
				},
			}, metav1.CreateOptions{})
			return err
		})
		status(kubelet, name, fmt.Sprint("10.2.0.", i+1), "True")
	}
	cloud := func(want map[string]string) {
		t.Helper()
		mustAwait(t, func(ctx context.Context) error {
			list, err := busy.admin.DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{})
			if err != nil || len(list.Items) != 1 {
				return fmt.Errorf("%d slices, %w", len(list.Items), err)
			}
			if got := addressesOf(&list.Items[0]); fmt.Sprint(got) != fmt.Sprint(want) {
				return fmt.Errorf("the cloud has %v, want %v", got, want)
			}
			return nil
		})
	}
	cloud(map[string]string{"moved": "10.2.0.1", "broken": "10.2.0.2", "same": "10.2.0.3"})
	path := "/apis/discovery.k8s.io/v1/namespaces/" + namespace + "/endpointslices"
	all := question{path, "resourceVersion=0", inJSON}
	warm(t, edge, path)
	mustAwait(t, func(ctx context.Context) error { return same(ctx, server, edge, all) })
	stream, err := edge.open(ctx, question{path, "watch=true", inJSON})
	must(err)
	watcher := &eachState{seen: map[string][]string{}}
	var reading sync.WaitGroup
	reading.Go(func() { watcher.read(bufio.NewReader(stream.Body)) }) // ends when the body is closed
	defer reading.Wait()
	defer stream.Body.Close()
	saw := func(pod string, states ...string) {
		t.Helper()
		mustAwait(t, func(context.Context) error { return watcher.want(pod, states...) })
	}

	cut(t, link, edge, bed.Down)
	status(kubelet, "moved", "10.2.0.9", "True")
	status(kubelet, "broken", "10.2.0.2", "False")
	saw("moved", "10.2.0.1", "10.2.0.9")
	saw("broken", "10.2.0.2", "10.2.0.2!")
	if a := edge.mustAsk(t, all); !strings.Contains(string(a.body), `"10.2.0.9"`) || strings.Contains(string(a.body), `"10.2.0.1"`) {
		t.Errorf("a list: %s", a.body)
	}
	for name := range pods {
		status(busy.admin, name, map[string]string{"moved": "10.2.0.1", "broken": "10.2.0.2", "same": "10.2.0.3"}[name], "False")
	}
	cloud(map[string]string{"moved": "10.2.0.1!", "broken": "10.2.0.2!", "same": "10.2.0.3!"})
	heal(t, link, edge)
	// The hub delivers what it kept; what is as it was before the kubelet
	// puts right when it next looks.
	cloud(map[string]string{"moved": "10.2.0.9", "broken": "10.2.0.2!", "same": "10.2.0.3!"})
	status(kubelet, "same", "10.2.0.3", "True")
	end := map[string]string{"moved": "10.2.0.9", "broken": "10.2.0.2!", "same": "10.2.0.3"}
	cloud(end)
	mustAwait(t, func(ctx context.Context) error { return same(ctx, server, edge, all) })
	// What comes afterwards is the cloud's word again.
	status(kubelet, "broken", "10.2.0.2", "True")
	saw("broken", "10.2.0.2", "10.2.0.2!", "10.2.0.2")
	saw("moved", "10.2.0.1", "10.2.0.9")
	saw("same", "10.2.0.3")
}
