package conform

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/test/bed"
)

// hubCyclesEnv is how often `make torture` kills the hub.
const hubCyclesEnv = "HUB_KILL_CYCLES"

// TestKilledHubLosesNoAcknowledgedWrite kills a hub again and again while the
// kubelet writes to it with the link cut, and looks at what its next life
// shows.
func TestKilledHubLosesNoAcknowledgedWrite(t *testing.T) {
	t.Parallel()
	cycles := 6
	if v := os.Getenv(hubCyclesEnv); v != "" {
		n, err := strconv.Atoi(v)
		do(t, err)
		cycles = n
	}
	ctx := t.Context()
	const node = "edge-killed"
	busy.node(t, node)
	hub, link := busy.hub(t, node)
	cfg, err := hub.KubeletConfig()
	do(t, err)
	kubelet, err := kubernetes.NewForConfig(cfg)
	do(t, err)
	made, err := busy.admin.CoreV1().Pods("conform-b").Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "killed"},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: "reader", Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers: []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
		},
	}, metav1.CreateOptions{})
	do(t, err)
	defer func() {
		// The test's own context has ended with a failed test.
		err := busy.admin.CoreV1().Pods("conform-b").Delete(context.WithoutCancel(ctx), "killed", *metav1.NewDeleteOptions(0))
		do(t, err)
	}()
	pods := kubelet.CoreV1().Pods("conform-b")
	mine := metav1.ListOptions{ResourceVersion: "0", FieldSelector: "spec.nodeName=" + node}
	held := func(ctx context.Context) (int, error) {
		all, err := kubelet.CoreV1().Pods("").List(ctx, mine)
		if err != nil {
			return 0, err
		}
		for i := range all.Items {
			if p := &all.Items[i]; p.UID == made.UID {
				n, _ := strconv.Atoi(p.Status.Message) // none is 0
				return n, nil
			}
		}
		return 0, fmt.Errorf("%d pods, the one is not among them", len(all.Items))
	}
	mustAwait(t, func(ctx context.Context) error { _, err := held(ctx); return err })
	do(t, link.Cut(bed.Down))

	rng := rand.New(rand.NewPCG(9, 9))
	acked, written := 0, 0
	for cycle := range cycles {
		ends := rng.IntN(30)
		done := make(chan struct{})
		reached := make(chan struct{})
		go func() { // ends when the hub is killed
			defer close(done)
			for writes := 0; ; writes++ {
				patch := fmt.Appendf(nil, `{"metadata":{"uid":%q},"status":{"phase":"Running","message":"%d"}}`, made.UID, written+1)
				written++
				if _, err := pods.Patch(ctx, "killed", types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
					return
				}
				acked = written
				if writes == ends {
					close(reached)
				}
			}
		}()
		select {
		case <-reached:
		case <-done:
			t.Fatalf("cycle %d: writes ended after %d", cycle, acked)
		case <-time.After(patience):
			t.Fatalf("cycle %d: not %d writes within %s", cycle, ends+1, patience)
		}
		hub.Kill()
		<-done
		do(t, hub.Start(ctx))
		var n int
		mustAwait(t, func(ctx context.Context) error {
			var err error
			n, err = held(ctx)
			return err
		})
		if n < acked || n > written {
			t.Fatalf("cycle %d: the hub shows status %d, acknowledged %d, written %d", cycle, n, acked, written)
		}
		if (cycle+1)%20 == 0 {
			t.Logf("%d cycles, %d statuses acknowledged", cycle+1, acked)
		}
	}
	t.Logf("%d cycles, %d statuses acknowledged, none lost", cycles, acked)
	do(t, link.Heal())
	mustAwait(t, func(ctx context.Context) error {
		p, err := busy.admin.CoreV1().Pods("conform-b").Get(ctx, "killed", metav1.GetOptions{})
		if err == nil && p.Status.Message != strconv.Itoa(written) && p.Status.Message != strconv.Itoa(acked) {
			err = fmt.Errorf("the cloud has status %q, written %d", p.Status.Message, written)
		}
		return err
	})
}
