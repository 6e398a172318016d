// Package nodepool keeps the nodes of a pool as the pool says, and the status
// of the pool as its nodes are.
package nodepool

import (
	"context"
	"fmt"
	"reflect"
	"strings"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// Rules are what the controllers of this package write.
var Rules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"patch"}},
	{APIGroups: []string{"apps.openyurt.io"}, Resources: []string{"nodepools", "nodepools/status"}, Verbs: []string{"patch"}},
}

// nodes puts on each node what its pool wants.
type nodes struct {
	read, write client.Client
}

// pools keeps the status of each pool.
type pools struct {
	read, write client.Client
}

// Setup adds the controllers to mgr. They write with the client write.
func Setup(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("nodepool-nodes").WithOptions(options).
		For(&corev1.Node{}, builder.WithPredicates(predicate.Funcs{UpdateFunc: attributesChanged})).
		Watches(&v1beta2.NodePool{}, handler.EnqueueRequestsFromMapFunc(NodesOfPool(mgr.GetClient())),
			builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Complete(&nodes{mgr.GetClient(), write})
	if err != nil {
		return fmt.Errorf("set up controller of nodes: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).Named("nodepool").WithOptions(options).
		Watches(&v1beta2.NodePool{}, Pools(Gather)).
		Watches(&corev1.Node{}, PoolsOfNode{Gather}, builder.WithPredicates(predicate.Funcs{UpdateFunc: membershipChanged})).
		Complete(&pools{mgr.GetClient(), write})
	if err != nil {
		return fmt.Errorf("set up controller of pools: %w", err)
	}
	return nil
}

// attributesChanged leaves out the updates that heartbeats make.
func attributesChanged(e event.UpdateEvent) bool {
	was, ok := e.ObjectOld.(*corev1.Node)
	is, ok2 := e.ObjectNew.(*corev1.Node)
	return !ok || !ok2 || !reflect.DeepEqual(was.Labels, is.Labels) ||
		!reflect.DeepEqual(was.Annotations, is.Annotations) || !reflect.DeepEqual(was.Spec.Taints, is.Spec.Taints)
}

// membershipChanged leaves out what no pool's status tells.
func membershipChanged(e event.UpdateEvent) bool {
	was, ok := e.ObjectOld.(*corev1.Node)
	is, ok2 := e.ObjectNew.(*corev1.Node)
	return !ok || !ok2 || was.Labels[apps.NodePoolLabel] != is.Labels[apps.NodePoolLabel] || Ready(was) != Ready(is) ||
		VouchedFor(was) != VouchedFor(is)
}

// NodesOfPool returns the nodes that name a pool.
func NodesOfPool(c client.Reader) handler.MapFunc {
	return func(ctx context.Context, pool client.Object) []reconcile.Request {
		members, err := Members(ctx, c, pool.GetName())
		if err != nil {
			ctrl.LoggerFrom(ctx).Error(err, "nodes not listed", "pool", pool.GetName())
			return nil
		}
		requests := make([]reconcile.Request, len(members))
		for i := range members {
			requests[i].NamespacedName = types.NamespacedName{Name: members[i].Name}
		}
		return requests
	}
}

// Reconcile dresses one node.
func (c *nodes) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var node corev1.Node
	if err := c.read.Get(ctx, req.NamespacedName, &node); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	was := node.DeepCopy()
	changed := join(&node)
	pool, there, err := c.poolOf(ctx, &node)
	if err != nil {
		return reconcile.Result{}, err
	}
	if there {
		dressed, err := dress(&node, wanted(pool))
		if err != nil {
			return reconcile.Result{}, reconcile.TerminalError(err)
		}
		changed = changed || dressed
	}
	if !changed {
		return reconcile.Result{}, nil
	}
	// Taints are a list that a merge patch replaces, so the patch must not
	// meet a node that has changed since.
	patch := client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{})
	if err := c.write.Patch(ctx, &node, patch); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("patch node: %w", err)
	}
	return reconcile.Result{}, nil
}

// poolOf returns the pool of the node, nil for a node in none. A pool that is
// not there, or not yet, leaves the node as it is: its coming is an event of
// its own.
func (c *nodes) poolOf(ctx context.Context, node *corev1.Node) (pool *v1beta2.NodePool, there bool, err error) {
	name := node.Labels[apps.NodePoolLabel]
	if name == "" {
		return nil, true, nil
	}
	pool = &v1beta2.NodePool{}
	err = c.read.Get(ctx, types.NamespacedName{Name: name}, pool)
	if client.IgnoreNotFound(err) != nil {
		return nil, false, fmt.Errorf("read pool of node: %w", err)
	}
	return pool, err == nil, nil
}

// label lets pools be selected by their type.
func (c *pools) label(ctx context.Context, pool *v1beta2.NodePool) error {
	want := strings.ToLower(string(pool.Spec.Type))
	if pool.Labels[apps.NodePoolTypeLabel] == want || pool.DeletionTimestamp != nil {
		return nil
	}
	was := pool.DeepCopy()
	if pool.Labels == nil {
		pool.Labels = map[string]string{}
	}
	pool.Labels[apps.NodePoolTypeLabel] = want
	if err := c.write.Patch(ctx, pool, client.MergeFrom(was)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("label pool: %w", err)
	}
	return nil
}

// Reconcile counts one pool.
func (c *pools) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pool v1beta2.NodePool
	if err := c.read.Get(ctx, req.NamespacedName, &pool); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if err := c.label(ctx, &pool); err != nil {
		return reconcile.Result{}, err
	}
	members, err := Members(ctx, c.read, pool.Name)
	if err != nil {
		return reconcile.Result{}, err
	}
	was := pool.DeepCopy()
	pool.Status = count(pool.Status, members)
	if reflect.DeepEqual(was.Status, pool.Status) {
		return reconcile.Result{}, nil
	}
	if err := c.write.Status().Patch(ctx, &pool, client.MergeFrom(was)); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("patch status of pool: %w", err)
	}
	return reconcile.Result{}, nil
}
