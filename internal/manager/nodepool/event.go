package nodepool

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
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

type requests = workqueue.TypedRateLimitingInterface[reconcile.Request]

func add(q requests, node client.Object) {
	if pool := node.GetLabels()[apps.NodePoolLabel]; pool != "" {
		q.Add(reconcile.Request{NamespacedName: types.NamespacedName{Name: pool}})
	}
}

// Create enqueues the pool of a new node.
func (PoolsOfNode) Create(_ context.Context, e event.CreateEvent, q requests) { add(q, e.Object) }

// Update enqueues the pools of a node before and after.
func (PoolsOfNode) Update(_ context.Context, e event.UpdateEvent, q requests) {
	add(q, e.ObjectOld)
	add(q, e.ObjectNew)
}

// Delete enqueues the pool of a node that is gone.
func (PoolsOfNode) Delete(_ context.Context, e event.DeleteEvent, q requests) { add(q, e.Object) }

// Generic enqueues the pool of a node.
func (PoolsOfNode) Generic(_ context.Context, e event.GenericEvent, q requests) { add(q, e.Object) }
