package manager

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	coordinationclient "k8s.io/client-go/kubernetes/typed/coordination/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/test/bed"
)

// kubelet renews a lease by the hub as the real one does: it repeats what it
// was last answered, and reads the lease again after a conflict.
type kubelet struct {
	leases    coordinationclient.LeaseInterface
	node      string
	conflicts atomic.Int32
	renewals  atomic.Int32
	end       context.CancelFunc
	ended     sync.WaitGroup
}

func startKubelet(t *testing.T, hub *bed.Hub, lease *coordinationv1.Lease) *kubelet {
	t.Helper()
	cfg, err := hub.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	cfg.ContentType = "application/vnd.kubernetes.protobuf"
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	k := &kubelet{leases: kube.CoordinationV1().Leases(corev1.NamespaceNodeLease), node: hub.Node, end: cancel}
	k.ended.Go(func() { k.run(ctx, lease) })
	t.Cleanup(k.die)
	return k
}

func (k *kubelet) die() {
	k.end()
	k.ended.Wait()
}

func (k *kubelet) run(ctx context.Context, lease *coordinationv1.Lease) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		next := lease.DeepCopy()
		next.Spec.RenewTime = new(metav1.NowMicro())
		got, err := k.leases.Update(ctx, next, metav1.UpdateOptions{})
		switch {
		case apierrors.IsConflict(err):
			k.conflicts.Add(1)
			if got, err = k.leases.Get(ctx, k.node, metav1.GetOptions{}); err == nil {
				lease = got
			}
		case err == nil:
			k.renewals.Add(1)
			lease = got
		}
	}
}

// hubsOfAPool cuts the link of one of two real hubs, and kills what it speaks
// for. Its node is ready until then, to the stock controllers too.
func (c *cluster) hubsOfAPool(t *testing.T) {
	spec := v1beta2.NodePoolSpec{Type: v1beta2.Edge, InterConnectivity: true, EnableLeaderElection: true, LeaderReplicas: 2}
	if err := c.Create(t.Context(), &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "duo"}, Spec: spec}); err != nil {
		t.Fatal(err)
	}
	binary, err := bed.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	var machines []*machine
	var kubelets []*kubelet
	var links []*bed.Link
	var hubs []*bed.Hub
	for i, name := range []string{"duo-1", "duo-2"} {
		address := fmt.Sprintf("127.77.0.%d", i+1)
		m := c.machine(t, name, "duo")
		was := c.get(t, name)
		is := was.DeepCopy()
		is.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}
		if err := c.Status().Patch(t.Context(), is, client.MergeFrom(was)); err != nil {
			t.Fatal(err)
		}
		link, err := bed.NewLink(c.cp.RESTConfig().Host)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(link.Close)
		hub, err := bed.NewHub(t.Context(), c.cp, binary, name, filepath.Join(c.dir, name), link.URL())
		if err != nil {
			t.Fatal(err)
		}
		hub.Args = []string{"--nodepool-name=duo", "--node-ip=" + address, "--multiplexer-port=" + strconv.Itoa(ports[0])}
		if err := hub.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(hub.Kill)
		machines, links, hubs = append(machines, m), append(links, link), append(hubs, hub)
		m.cut() // from now on the lease is renewed by the hub
		kubelets = append(kubelets, startKubelet(t, hub, c.lease(t, name)))
		await(t, "peers are served", func() error {
			conn, err := net.DialTimeout("tcp", net.JoinHostPort(address, strconv.Itoa(ports[0])), time.Second)
			if err == nil {
				err = conn.Close()
			}
			return err
		})
	}
	away, carrier := machines[0], machines[1]
	await(t, "both lead", func() error {
		var p v1beta2.NodePool
		if err := c.Get(t.Context(), client.ObjectKey{Name: "duo"}, &p); err != nil || len(p.Status.LeaderEndpoints) != 2 {
			return fmt.Errorf("status %+v, %w", p.Status, err)
		}
		return nil
	})
	// The manager takes nobody for a witness of whom the node's hub has not
	// heard: so it must be heard once more now that both are in the pool.
	both := time.Now().Add(time.Second)
	await(t, "both are heard", func() error {
		for _, m := range []*machine{away, carrier} {
			if l := c.lease(t, m.name); l.Spec.RenewTime == nil || !l.Spec.RenewTime.After(both) {
				return fmt.Errorf("%s was renewed at %v", m.name, l.Spec.RenewTime)
			}
		}
		return nil
	})
	nodes, err := c.kube.CoreV1().Nodes().Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + away.name})
	if err != nil {
		t.Fatal(err)
	}
	defer nodes.Stop()
	before := c.lease(t, carrier.name)
	conflicts, renewals := kubelets[1].conflicts.Load(), kubelets[1].renewals.Load()
	up, _ := links[1].Bytes()
	if err := links[0].Cut(bed.Down); err != nil {
		t.Fatal(err)
	}
	await(t, "vouched for", func() error {
		if v := conditionOf(c.get(t, away.name), apps.VouchedForCondition); v.Status != corev1.ConditionTrue || !strings.Contains(v.Message, carrier.name) {
			return fmt.Errorf("condition %+v", v)
		}
		return nil
	})
	clock := c.machine(t, "duo-clock", "")
	clock.cut()
	c.awaitEvicted(t, "stock eviction", clock) // more than a grace period later
	c.stay(t, "without a link", machines...)
	if bad := notReady(nodes); bad != "" {
		t.Errorf("the node was not ready: %s", bad)
	}
	l := c.lease(t, carrier.name)
	if len(l.Annotations[apps.Heartbeats]) == 0 || len(l.Annotations[apps.Heartbeats]) > 1500 {
		t.Errorf("carried: %d bytes", len(l.Annotations[apps.Heartbeats]))
	}
	now, _ := links[1].Bytes()
	n := kubelets[1].renewals.Load() - renewals
	t.Logf("%d bytes of heartbeats on the lease; %d bytes sent by the carrier's hub per renewal", len(l.Annotations[apps.Heartbeats]), (now-up)/int64(max(n, 1)))
	if kubelets[1].conflicts.Load() != conflicts || n == 0 || l.UID != before.UID {
		t.Errorf("the carrier's kubelet saw %d conflicts in %d renewals", kubelets[1].conflicts.Load()-conflicts, n)
	}

	// The kubelet dies: nobody speaks for it any more.
	kubelets[0].die()
	c.awaitEvicted(t, "death of a kubelet without a link", away)
	if n := c.get(t, away.name); n.Annotations[apps.Dead] == "" || conditionOf(n, apps.VouchedForCondition).Type != "" {
		t.Errorf("annotations %v, conditions %+v", n.Annotations, n.Status.Conditions)
	}
	await(t, "nothing is carried", func() error {
		if l := c.lease(t, carrier.name); l.Annotations[apps.Heartbeats] != "" {
			return fmt.Errorf("%d bytes", len(l.Annotations[apps.Heartbeats]))
		}
		return nil
	})

	// It comes back, and the link after it.
	startKubelet(t, hubs[0], c.lease(t, away.name))
	await(t, "vouched for again", func() error {
		n := c.get(t, away.name)
		if conditionOf(n, apps.VouchedForCondition).Status != corev1.ConditionTrue || conditionOf(n, corev1.NodeReady).Status != corev1.ConditionTrue || n.Annotations[apps.Dead] != "" {
			return fmt.Errorf("annotations %v, conditions %+v", n.Annotations, n.Status.Conditions)
		}
		return nil
	})
	if err := links[0].Heal(); err != nil {
		t.Fatal(err)
	}
	await(t, "the node speaks for itself", func() error {
		n, l := c.get(t, away.name), c.lease(t, away.name)
		if conditionOf(n, apps.VouchedForCondition).Type != "" || has(n, apps.UnschedulableTaint, corev1.TaintEffectNoSchedule) || l.Annotations[apps.DelegateHeartbeat] != "" {
			return fmt.Errorf("conditions %+v, taints %v, lease %v", n.Status.Conditions, n.Spec.Taints, l.Annotations)
		}
		return nil
	})
}

// notReady returns what a watch saw of a node that was not ready.
func notReady(w watch.Interface) string {
	for {
		select {
		case e := <-w.ResultChan():
			if n, ok := e.Object.(*corev1.Node); ok {
				if c := conditionOf(n, corev1.NodeReady); c.Status != corev1.ConditionTrue {
					return fmt.Sprintf("%+v", c)
				}
			}
		default:
			return ""
		}
	}
}
