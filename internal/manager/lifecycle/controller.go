// Package lifecycle tells a node that is dead from one whose link is, for the
// nodes of Edge pools.
//
// It works beside the node lifecycle controller of Kubernetes, which cannot
// tell them apart. That one goes on as it is: it finds that a node is silent,
// and evicts pods of nodes that are ready to say that they are not. A policy
// that the API server evaluates keeps it from evicting for silence, whether
// the manager runs or not. This package lifts that for nodes that are dead, and
// for those that are not in an Edge pool.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/heartbeat"
	"github.com/yurt-edge/yurt/internal/manager/nodepool"
	"github.com/yurt-edge/yurt/internal/manager/vouch"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"patch"}}}

// lookEvery is how many times in a grace period a pool is looked at.
const lookEvery = 4

type watcher struct {
	read, write client.Client
	clock       clock.PassiveClock
	events      events.EventRecorder
	ear         *vouch.Ear
	grace       time.Duration
	buried      prometheus.Counter

	mu    sync.Mutex // guards pools, whose own are of one worker at a time
	pools map[string]*pool
}

// Setup adds the controller to mgr. A node that is silent for grace is dead if
// others of its pool were heard for as long.
func Setup(mgr ctrl.Manager, write client.Client, grace time.Duration, metrics prometheus.Registerer, options controller.Options) error {
	wall := clock.RealClock{}
	c := &watcher{
		read: mgr.GetClient(), write: write, clock: wall, events: mgr.GetEventRecorder("yurt-manager"),
		ear: vouch.NewEar(grace), grace: grace, pools: map[string]*pool{},
		buried: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "yurt_manager_dead_nodes_total", Help: "Nodes of Edge pools that were taken for dead.",
		}),
	}
	metrics.MustRegister(c.buried)
	err := ctrl.NewControllerManagedBy(mgr).Named("nodelifecycle").WithOptions(options).
		For(&v1beta2.NodePool{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&corev1.Node{}, nodepool.PoolsOfNode{}, builder.WithPredicates(predicate.Funcs{UpdateFunc: stateChanged})).
		Watches(&coordinationv1.Lease{}, c.ear.Handler(wall.Now)).
		Complete(c)
	if err != nil {
		return fmt.Errorf("set up nodelifecycle: %w", err)
	}
	return setupMarker(mgr, write, options)
}

// stateChanged leaves out the updates that change nothing here.
func stateChanged(e event.UpdateEvent) bool {
	was, ok := e.ObjectOld.(*corev1.Node)
	is, ok2 := e.ObjectNew.(*corev1.Node)
	return !ok || !ok2 || gone(was) != gone(is) || was.Annotations[apps.Dead] != is.Annotations[apps.Dead] ||
		was.Labels[apps.NodePoolLabel] != is.Labels[apps.NodePoolLabel] || len(was.Spec.Taints) != len(is.Spec.Taints)
}

// Reconcile looks at one pool.
func (c *watcher) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var np v1beta2.NodePool
	if err := c.read.Get(ctx, req.NamespacedName, &np); err != nil {
		c.forget(req.Name)
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if np.Spec.Type != v1beta2.Edge {
		return reconcile.Result{}, nil
	}
	members, err := c.members(ctx, np.Name)
	if err != nil {
		return reconcile.Result{}, err
	}
	now := c.clock.Now()
	p := c.pool(&np, now)
	p.meet(members, now)
	var dead *corev1.Node
	if np.Spec.InterConnectivity { // else none can vouch for another, and silence proves nothing
		dead = p.dying(members, c.grace, now)
	}
	var errs []error // of one node; the others are looked at all the same
	for _, m := range members {
		was := m.node.DeepCopy()
		if m.node == dead {
			bury(m.node, now)
		} else if !tend(m.node, now) {
			continue
		}
		// Taints are a list that a merge patch replaces, so the patch must
		// not meet a node that has changed since.
		patch := client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{})
		if err := c.write.Patch(ctx, m.node, patch); client.IgnoreNotFound(err) != nil {
			errs = append(errs, fmt.Errorf("patch node %s: %w", m.node.Name, err))
			continue
		}
		if m.node == dead {
			c.buried.Inc()
			c.events.Eventf(m.node, nil, corev1.EventTypeWarning, "NodeDead", "Evict",
				"silent for %s and nobody of pool %s vouches for it, while %s are heard: its pods are evicted after the time that they tolerate",
				now.Sub(m.silent).Round(time.Second), np.Name, heardOf(members, m.silent))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return reconcile.Result{}, err
	}
	return reconcile.Result{RequeueAfter: c.grace / lookEvery}, nil
}

// members are the nodes of a pool and when they were heard.
func (c *watcher) members(ctx context.Context, pool string) ([]member, error) {
	nodes, err := nodepool.Members(ctx, c.read, pool)
	if err != nil {
		return nil, err //nolint:wrapcheck // it says what
	}
	members := make([]member, len(nodes))
	for i := range nodes {
		heard := c.ear.Last(nodes[i].Name)
		members[i] = member{node: &nodes[i], Heard: heard, silent: later(heard.Any, c.ear.Began(c.clock.Now()))}
	}
	if slices.ContainsFunc(members, func(m member) bool { return gone(m.node) != "" }) {
		return members, c.carry(ctx, members)
	}
	return members, nil
}

// carry looks for the nodes of which another that is heard carries a heartbeat
// that came to nothing yet. Who vouches is believed by another controller, which
// may be behind: the API server has much to do when many nodes fall silent.
func (c *watcher) carry(ctx context.Context, members []member) error {
	brought, taken := map[string]time.Time{}, map[string]time.Time{}
	for i := range members {
		m := &members[i]
		var lease coordinationv1.Lease
		err := c.read.Get(ctx, client.ObjectKey{Namespace: corev1.NamespaceNodeLease, Name: m.node.Name}, &lease)
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("read lease of node: %w", err)
		}
		taken[m.node.Name] = vouch.Remembered(&lease).Time.Time
		if c.clock.Since(m.Own) > c.grace {
			continue
		}
		all, err := heartbeat.Split(lease.Annotations[apps.Heartbeats])
		if err != nil {
			continue // it is refused elsewhere
		}
		for _, s := range all {
			if b := s.Claimed(); b.Node != m.node.Name {
				brought[b.Node] = later(brought[b.Node], b.Time.Time)
			}
		}
	}
	for i := range members {
		node := members[i].node.Name
		members[i].carried = brought[node].After(taken[node])
	}
	return nil
}

func (c *watcher) pool(np *v1beta2.NodePool, now time.Time) *pool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pools[np.Name] == nil {
		p := &pool{}
		if np.CreationTimestamp.After(c.ear.Began(now)) {
			p.joined = map[string]time.Time{} // the manager sees its nodes come
		}
		c.pools[np.Name] = p
	}
	return c.pools[np.Name]
}

func (c *watcher) forget(pool string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pools, pool)
}
