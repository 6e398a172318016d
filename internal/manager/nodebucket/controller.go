// Package nodebucket spreads the nodes of each pool over NodeBuckets, small
// objects that hubs follow in place of the NodePool of a large pool.
package nodebucket

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/manager/nodepool"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{
	{APIGroups: []string{"apps.openyurt.io"}, Resources: []string{"nodebuckets"}, Verbs: []string{"create", "update", "delete"}},
}

type distributor struct {
	read, write client.Client
	// fresh reads past the cache: a list that lacks the bucket that was made
	// a moment ago would have it made again.
	fresh client.Reader
	most  int
}

// Setup adds the controller to mgr. Most is the size of a bucket.
func Setup(mgr ctrl.Manager, write client.Client, most int, options controller.Options) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("nodebucket").WithOptions(options).
		For(&v1beta2.NodePool{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Owns(&v1alpha1.NodeBucket{}).
		Watches(&corev1.Node{}, nodepool.PoolsOfNode{After: nodepool.Gather}, builder.WithPredicates(predicate.Funcs{UpdateFunc: moved})).
		Complete(&distributor{mgr.GetClient(), write, mgr.GetAPIReader(), most})
	if err != nil {
		return fmt.Errorf("set up nodebucket: %w", err)
	}
	return nil
}

func moved(e event.UpdateEvent) bool {
	return e.ObjectOld.GetLabels()[apps.NodePoolLabel] != e.ObjectNew.GetLabels()[apps.NodePoolLabel]
}

// Reconcile spreads the nodes of one pool.
func (c *distributor) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pool v1beta2.NodePool
	if err := c.read.Get(ctx, req.NamespacedName, &pool); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err) // its buckets go by their owner
	}
	if pool.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	members, err := nodepool.Members(ctx, c.read, pool.Name)
	if err != nil {
		return reconcile.Result{}, err //nolint:wrapcheck // it says what
	}
	var buckets v1alpha1.NodeBucketList
	if err := c.fresh.List(ctx, &buckets, client.MatchingLabels{apps.PoolNameLabel: pool.Name}); err != nil {
		return reconcile.Result{}, fmt.Errorf("list buckets of pool: %w", err)
	}
	// One that goes anyway holds no node.
	buckets.Items = slices.DeleteFunc(buckets.Items, func(b v1alpha1.NodeBucket) bool { return b.DeletionTimestamp != nil })
	names := make([]string, len(members))
	for i := range members {
		names[i] = members[i].Name
	}
	change := distribute(names, buckets.Items, c.most)
	for i := range change.update {
		if err := c.write.Update(ctx, &change.update[i]); err != nil {
			return reconcile.Result{}, fmt.Errorf("update bucket: %w", err)
		}
	}
	for i := range change.create {
		b := &change.create[i]
		b.Name = pool.Name + "-" + rand.String(6)
		b.Labels = map[string]string{apps.PoolNameLabel: pool.Name}
		b.OwnerReferences = []metav1.OwnerReference{nodepool.Owner(&pool)}
		if err := c.write.Create(ctx, b); err != nil {
			return reconcile.Result{}, fmt.Errorf("create bucket: %w", err)
		}
	}
	for i := range change.remove {
		if err := c.write.Delete(ctx, &change.remove[i], client.Preconditions{ResourceVersion: &change.remove[i].ResourceVersion}); client.IgnoreNotFound(err) != nil {
			return reconcile.Result{}, fmt.Errorf("delete bucket: %w", err)
		}
	}
	return reconcile.Result{}, nil
}
