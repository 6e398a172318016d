package nodepool

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// Owner makes a pool the controller of an object, which goes with it. It does
// not block the pool's deletion, for which nobody here has the right.
func Owner(pool *v1beta2.NodePool) metav1.OwnerReference {
	owner := *metav1.NewControllerRef(pool, v1beta2.GroupVersion.WithKind("NodePool"))
	owner.BlockOwnerDeletion = nil
	return owner
}

// Gather is for how long changes of a pool's nodes are gathered before its status
// is written: when a site loses its link all its nodes change, one by one.
const Gather = time.Second

type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// PoolsOfNode enqueues the pool of a node, and the one that it has left, to be
// seen to after a while, counted from the first node of several.
type PoolsOfNode struct{ After time.Duration }

var _ handler.EventHandler = PoolsOfNode{}

func (h PoolsOfNode) add(q queue, node client.Object) {
	if pool := node.GetLabels()[apps.NodePoolLabel]; pool != "" {
		q.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Name: pool}}, h.After)
	}
}

// Create enqueues the pool of a new node.
func (h PoolsOfNode) Create(_ context.Context, e event.CreateEvent, q queue) { h.add(q, e.Object) }

// Update enqueues the pools of a node before and after.
func (h PoolsOfNode) Update(_ context.Context, e event.UpdateEvent, q queue) {
	h.add(q, e.ObjectOld)
	h.add(q, e.ObjectNew)
}

// Delete enqueues the pool of a node that is gone.
func (h PoolsOfNode) Delete(_ context.Context, e event.DeleteEvent, q queue) { h.add(q, e.Object) }

// Generic enqueues the pool of a node.
func (h PoolsOfNode) Generic(_ context.Context, e event.GenericEvent, q queue) { h.add(q, e.Object) }

// Pools enqueues a pool: at once if it is new or its spec has changed, and
// otherwise after a while. Else the controllers that share its status would have
// each other write it again for each node that changes meanwhile.
func Pools(after time.Duration) handler.EventHandler {
	add := func(q queue, pool client.Object, after time.Duration) {
		q.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Name: pool.GetName()}}, after)
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent, q queue) { add(q, e.Object, 0) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
			if e.ObjectOld.GetGeneration() != e.ObjectNew.GetGeneration() {
				add(q, e.ObjectNew, 0)
				return
			}
			add(q, e.ObjectNew, after)
		},
	}
}

const byPool = "pool"

// IndexNodes lets Members find the nodes of a pool without a look at all nodes.
func IndexNodes(ctx context.Context, indexer client.FieldIndexer) error {
	return indexer.IndexField(ctx, &corev1.Node{}, byPool, func(node client.Object) []string { //nolint:wrapcheck // the caller says more
		if pool := node.GetLabels()[apps.NodePoolLabel]; pool != "" {
			return []string{pool}
		}
		return nil
	})
}

// Members are the nodes of a pool, read by a cache with IndexNodes.
func Members(ctx context.Context, read client.Reader, pool string) ([]corev1.Node, error) {
	var nodes corev1.NodeList
	if err := read.List(ctx, &nodes, client.MatchingFields{byPool: pool}); err != nil {
		return nil, fmt.Errorf("list nodes of pool %s: %w", pool, err)
	}
	return nodes.Items, nil
}
