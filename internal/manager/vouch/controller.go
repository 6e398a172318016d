// Package vouch renews the leases of nodes that have no link to the cloud, on
// heartbeats that their hubs signed and other nodes of the pool carried here.
//
// A node carries the heartbeats of others as an annotation of its own lease,
// which nobody but that node may write. So the cloud knows who vouches.
package vouch

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/heartbeat"
)

// Rules are what the controller writes, and LeaseRules what it writes among
// the leases of nodes.
var (
	Rules = []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"nodes", "nodes/status"}, Verbs: []string{"patch"}},
	}
	LeaseRules = []rbacv1.PolicyRule{
		{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"patch"}},
	}
)

type listener struct {
	read, write client.Client
	leases      client.Client // writes them
	clock       clock.PassiveClock
	events      events.EventRecorder
	ear         *Ear
	authority   *authority
	cloud       *Cloud
	heartbeats  *prometheus.CounterVec
}

// Setup adds the controller to mgr. It writes leases with a client of their own:
// a limit to that would have leases lapse. Cloud knows the API server's clock.
func Setup(mgr ctrl.Manager, write, leases client.Client, cloud *Cloud, metrics prometheus.Registerer, options controller.Options) error {
	wall := clock.RealClock{}
	c := &listener{
		read: mgr.GetClient(), write: write, leases: leases, clock: wall, events: mgr.GetEventRecorder("yurt-manager"), ear: NewEar(heartbeat.Good),
		authority: &authority{read: mgr.GetAPIReader(), clock: wall}, cloud: cloud,
		heartbeats: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "yurt_manager_heartbeats_total", Help: "Heartbeats that nodes carried for others, by what became of them.",
		}, []string{"result"}),
	}
	metrics.MustRegister(c.heartbeats)
	// The ear hears of a lease before the lease is looked at: handlers are
	// called in the order in which they are added.
	err := ctrl.NewControllerManagedBy(mgr).Named("delegatelease").WithOptions(options).
		Watches(&coordinationv1.Lease{}, c.ear.Handler(wall.Now)).
		Watches(&coordinationv1.Lease{}, byUrgency(), builder.WithPredicates(predicate.NewPredicateFuncs(concerns))).
		Watches(&corev1.Node{}, handler.Funcs{
			CreateFunc: func(_ context.Context, e event.CreateEvent, q queue) {
				if marked(e.Object) {
					q.AddAfter(leaseOf(e.Object), rest)
				}
			},
			UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
				if marked(e.ObjectNew) && !marked(e.ObjectOld) {
					q.AddAfter(leaseOf(e.ObjectNew), rest)
				}
			},
		}).
		Complete(c)
	if err != nil {
		return fmt.Errorf("set up delegatelease: %w", err)
	}
	return nil
}

// concerns tells the leases that carry heartbeats, or are renewed by such.
func concerns(lease client.Object) bool {
	a := lease.GetAnnotations()
	return a[apps.Heartbeats] != "" || a[apps.VouchedFor] != ""
}

// urgent is the priority of a lease that carries heartbeats. If the API server is
// slow, what is said of nodes may wait; leases that nobody renews lapse. So that
// it does not wait for ever, one in share of those goes with the urgent ones:
// each renewal of a lease is another chance for its node.
const urgent, share = 1, 8

// byUrgency enqueues leases.
func byUrgency() handler.EventHandler {
	add := func(q queue, lease client.Object) {
		req := reconcile.Request{NamespacedName: client.ObjectKeyFromObject(lease)}
		if first, ok := q.(priorityqueue.PriorityQueue[reconcile.Request]); ok && (lease.GetAnnotations()[apps.Heartbeats] != "" || rand.N(share) == 0) { //nolint:gosec // a lot, no secret
			first.AddWithOpts(priorityqueue.AddOpts{Priority: new(urgent)}, req)
			return
		}
		q.Add(req)
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent, q queue) { add(q, e.Object) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) { add(q, e.ObjectNew) },
	}
}

// marked reports whether the node looks vouched for.
func marked(node client.Object) bool {
	n, ok := node.(*corev1.Node)
	return ok && (tell(n.DeepCopy(), standing{}, time.Time{}) || closeTo(n.DeepCopy(), false, time.Time{}))
}

// rest is when a node is looked at that has just got a mark: mostly the
// controller itself is still about to write more of it, which would conflict.
const rest = time.Second

func leaseOf(node client.Object) reconcile.Request {
	return reconcile.Request{NamespacedName: types.NamespacedName{Namespace: corev1.NamespaceNodeLease, Name: node.GetName()}}
}

// Reconcile believes or refuses what a node carries, and says of the node
// itself whether it is vouched for.
func (c *listener) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var lease coordinationv1.Lease
	if err := c.read.Get(ctx, req.NamespacedName, &lease); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	var node corev1.Node
	if err := c.read.Get(ctx, types.NamespacedName{Name: lease.Name}, &node); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	var next time.Duration
	if text := lease.Annotations[apps.Heartbeats]; text != "" {
		var err error
		if next, err = c.listen(ctx, &node, text); err != nil {
			return reconcile.Result{}, err
		}
	}
	until, err := c.stand(ctx, &lease, &node)
	return reconcile.Result{RequeueAfter: sooner(next, until)}, err
}

// sooner returns the shorter of two waits, of which those that are not above 0
// are none.
func sooner(a, b time.Duration) time.Duration {
	if a <= 0 || b > 0 && b < a {
		return max(0, b)
	}
	return a
}

// listen takes what the voucher carries. It goes on after one that fails. Next
// is when to look at it again; 0: when it carries something else.
func (c *listener) listen(ctx context.Context, voucher *corev1.Node, text string) (next time.Duration, err error) {
	all, err := heartbeat.Split(text)
	if err != nil {
		c.judge(voucher, unreadable, err)
		return 0, nil
	}
	var errs []error
	for _, s := range all {
		roots, err := c.authority.roots(ctx)
		if err != nil {
			return 0, err
		}
		v, why, err := c.take(ctx, voucher, s, roots, &next)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c.judge(voucher, v, why)
	}
	return next, errors.Join(errs...)
}

// take renews the lease of the node that the heartbeat is of, if it is worth
// that. Why says what is wrong with it, and next becomes no later than when it
// is worth something.
func (c *listener) take(ctx context.Context, voucher *corev1.Node, s heartbeat.Signed, roots *x509.CertPool, next *time.Duration) (v verdict, why, err error) {
	now := c.clock.Now()
	claimed := s.Claimed()
	var lease coordinationv1.Lease
	key := types.NamespacedName{Namespace: corev1.NamespaceNodeLease, Name: claimed.Node}
	if err := c.read.Get(ctx, key, &lease); err != nil {
		return unknown, nil, client.IgnoreNotFound(err)
	}
	heard, ahead := c.ear.Last(claimed.Node), c.cloud.Ahead()
	if v = worth(&lease, claimed, heard, ahead, now); v != renewed {
		if v == notYet {
			*next = sooner(*next, again(&lease, heard, now))
		}
		return v, nil, nil
	}
	b, why := s.Open(roots, now.Add(ahead))
	if why != nil {
		return forged, why, nil
	}
	if why = b.Fresh(now.Add(ahead)); why != nil {
		return stale, fmt.Errorf("heartbeat of %s: %w", b.Node, why), nil
	}
	if why = b.For(voucher.Name); why != nil {
		return foreign, why, nil
	}
	var node corev1.Node
	if err := c.read.Get(ctx, types.NamespacedName{Name: b.Node}, &node); err != nil {
		return unknown, nil, client.IgnoreNotFound(err)
	}
	pool := voucher.Labels[apps.NodePoolLabel]
	switch {
	case node.UID != b.UID:
		return unknown, nil, nil
	case pool == "" || node.Labels[apps.NodePoolLabel] != pool || node.Name == voucher.Name:
		return foreign, fmt.Errorf("%s is not another node of pool %q", node.Name, pool), nil
	}
	was := lease.DeepCopy()
	heard = c.ear.Last(b.Node)
	if v = renew(&lease, b, voucher.Name, heard, ahead, SpokeAt(&node, heard, now), now); v != renewed {
		return v, nil, nil
	}
	// If the node speaks for itself in this moment, its word counts.
	patch := client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{})
	if err := c.leases.Patch(ctx, &lease, patch); client.IgnoreNotFound(err) != nil {
		return v, nil, fmt.Errorf("renew lease of %s: %w", b.Node, err)
	}
	return v, nil, nil
}

// judge counts, and tells of what should not have been carried. The recorder
// makes one event of many that are alike.
func (c *listener) judge(voucher *corev1.Node, v verdict, why error) {
	c.heartbeats.WithLabelValues(string(v)).Inc()
	if slices.Contains(refused, v) {
		c.events.Eventf(voucher, nil, corev1.EventTypeWarning, "HeartbeatRefused", "Vouch", "%s: %v", v, why)
	}
}

// stand says of a node whether it is vouched for, and for how long if nobody
// says more.
func (c *listener) stand(ctx context.Context, lease *coordinationv1.Lease, node *corev1.Node) (until time.Duration, err error) {
	was := lease.DeepCopy()
	if settle(lease) {
		patch := client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{})
		if err := c.leases.Patch(ctx, lease, patch); client.IgnoreNotFound(err) != nil {
			return 0, fmt.Errorf("patch lease of %s: %w", node.Name, err)
		}
	}
	now := c.clock.Now()
	s := standingOf(lease, c.ear.Last(node.Name), c.ear.Began(now), now)
	before := node.DeepCopy()
	if tell(node, s, now) {
		// The patch names the conditions that change, and no others.
		patch := client.StrategicMergeFrom(before, client.MergeFromWithOptimisticLock{})
		if err := c.write.Status().Patch(ctx, node, patch); client.IgnoreNotFound(err) != nil {
			return 0, fmt.Errorf("patch status of node: %w", err)
		}
		before = node.DeepCopy()
	}
	if closeTo(node, s.vouched, now) {
		patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
		if err := c.write.Patch(ctx, node, patch); client.IgnoreNotFound(err) != nil {
			return 0, fmt.Errorf("patch node: %w", err)
		}
	}
	return s.until, nil
}
