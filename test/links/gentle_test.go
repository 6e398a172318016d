package links

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/test/bed"
)

// TestGentleReturn deletes the pods of a node that is cut off. What the node's
// watch then tells of comes one after the other when the cut was long, each
// with an event before, and at once when it was short.
func TestGentleReturn(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]string{"long": "1s", "short": "1h"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testReturn(t, "gentle-"+name, after, name == "long")
		})
	}
}

func testReturn(t *testing.T, node, after string, gentle bool) {
	const count, free = 10, 5 // of which so many go at once
	ctx := t.Context()
	p, err := bed.NewPatient(ctx, shared.cloud, shared.binary, shared.dir, node, func(p *bed.Patient) {
		p.Hub.Args = append(p.Hub.Args, "--gentle-after", after, "--gentle-rate", "60")
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	admin, err := shared.cloud.Client()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := p.Hub.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	kubelet, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	pods := admin.CoreV1().Pods("default")
	for i := range count {
		_, err := pods.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s-%d", node, i)},
			Spec: corev1.PodSpec{
				NodeName: node, Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers: []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	own := metav1.ListOptions{FieldSelector: "spec.nodeName=" + node, ResourceVersion: "0"}
	var version string
	err = bed.Await(ctx, func(ctx context.Context) error {
		l, err := kubelet.CoreV1().Pods("").List(ctx, own)
		if err == nil && len(l.Items) != count+1 {
			err = fmt.Errorf("the hub has %d pods", len(l.Items))
		}
		version = l.ResourceVersion
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	own.ResourceVersion = version
	w, err := kubelet.CoreV1().Pods("").Watch(ctx, own)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()

	if err := p.Link.Cut(bed.Down); err != nil {
		t.Fatal(err)
	}
	var noticed time.Time
	err = bed.Await(ctx, func(ctx context.Context) error {
		switch err := p.Forwarded(ctx); {
		case err == nil:
			return errors.New("the hub has not noticed the cut")
		case noticed.IsZero():
			noticed = time.Now()
		}
		if d := time.Since(noticed); d < 3*time.Second {
			return fmt.Errorf("the hub has noticed for %s only", d)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range count {
		var opts metav1.DeleteOptions
		if i%2 == 1 { // gone at once, as when its node was declared dead
			opts.GracePeriodSeconds = new(int64)
		}
		if err := pods.Delete(ctx, fmt.Sprintf("%s-%d", node, i), opts); err != nil {
			t.Fatal(err)
		}
	}
	healed := time.Now()
	if err := p.Link.Heal(); err != nil {
		t.Fatal(err)
	}

	var last time.Duration
	seen := map[types.UID]bool{}
	again := &restarted{}
	for i := range count {
		pod := next(t, w, seen)
		if again.alive[pod.Name] {
			other := next(t, again.watch, again.seen)
			for !again.alive[other.Name] { // it may be told twice of who was gone
				other = next(t, again.watch, again.seen)
			}
			if other.Name != pod.Name {
				t.Fatalf("who has listed meanwhile is told of %s, not of %s", other.Name, pod.Name)
			}
		}
		if want := fmt.Sprintf("%s-%d", node, i); pod.Name != want {
			t.Fatalf("%s ends, want %s", pod.Name, want)
		}
		last = time.Since(healed)
		events, err := admin.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: fields.Set{
			"involvedObject.uid": string(pod.UID), "reason": "StoppedAfterAbsence",
		}.String()})
		if err != nil {
			t.Fatal(err)
		}
		if !gentle {
			if len(events.Items) != 0 {
				t.Errorf("after a short cut: %s", events.Items[0].Message)
			}
			continue
		}
		if len(events.Items) != 1 || !strings.Contains(events.Items[0].Message, "in the cloud while node "+node+" was away") {
			t.Errorf("%s ends, and its events are %v", pod.Name, events.Items)
		}
		if turn := time.Duration(i-free+1) * time.Second; last < turn {
			t.Errorf("%s ends %s after the return, its turn is after %s", pod.Name, last, turn)
		}
		if i == free-1 {
			again = listAnew(t, kubelet, node)
			final := fmt.Sprintf("%s-%d", node, count-1)
			if took := time.Since(healed); took < (count-free)*time.Second && !again.alive[final] {
				t.Errorf("who lists %s after the return does not see %s, which has not ended", took, final)
			}
		}
	}
	t.Logf("the last ended %s after the return", last.Round(time.Millisecond))
}

// restarted is a kubelet that begins anew while pods wait to end.
type restarted struct {
	watch watch.Interface
	alive map[string]bool
	seen  map[types.UID]bool
}

func listAnew(t *testing.T, kubelet *kubernetes.Clientset, node string) *restarted {
	t.Helper()
	own := metav1.ListOptions{FieldSelector: "spec.nodeName=" + node, ResourceVersion: "0"}
	l, err := kubelet.CoreV1().Pods("").List(t.Context(), own)
	if err != nil {
		t.Fatal(err)
	}
	out := &restarted{alive: map[string]bool{}, seen: map[types.UID]bool{}}
	for i := range l.Items {
		if pod := &l.Items[i]; pod.DeletionTimestamp == nil {
			out.alive[pod.Name] = true
		} else {
			out.seen[pod.UID] = true
		}
	}
	own.ResourceVersion = l.ResourceVersion
	if out.watch, err = kubelet.CoreV1().Pods("").Watch(t.Context(), own); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(out.watch.Stop)
	return out
}

// next returns the next pod whose end the watch tells of first.
func next(t *testing.T, w watch.Interface, seen map[types.UID]bool) *corev1.Pod {
	t.Helper()
	timeout := time.After(2 * time.Minute)
	for {
		select {
		case <-timeout:
			t.Fatal("no pod ends")
		case ev, ok := <-w.ResultChan():
			if !ok {
				t.Fatal("the watch ended")
			}
			pod, ok := ev.Object.(*corev1.Pod)
			if ok && !seen[pod.UID] && (ev.Type == watch.Deleted || pod.DeletionTimestamp != nil) {
				seen[pod.UID] = true
				return pod
			}
		}
	}
}
