package lifecycle

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
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
	"github.com/yurt-edge/yurt/internal/manager/nodepool"
)

// marker says on nodes that their pool is none whose silence is to be spared.
// The policy spares each node that names a pool, so that it need not look at
// pools, unless the node has the mark for that very pool.
type marker struct {
	read, live client.Reader // from the cache, and from the API server
	write      client.Client
}

func setupMarker(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("nodelifecycle-marks").WithOptions(options).
		For(&corev1.Node{}, builder.WithPredicates(predicate.Funcs{UpdateFunc: markChanged})).
		Watches(&v1beta2.NodePool{}, handler.EnqueueRequestsFromMapFunc(nodepool.NodesOfPool(mgr.GetClient())),
			builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Complete(&marker{mgr.GetClient(), mgr.GetAPIReader(), write})
	if err != nil {
		return fmt.Errorf("set up marks of nodelifecycle: %w", err)
	}
	return nil
}

// markChanged leaves out the updates that change nothing here.
func markChanged(e event.UpdateEvent) bool {
	was, is := e.ObjectOld, e.ObjectNew
	return was.GetLabels()[apps.NodePoolLabel] != is.GetLabels()[apps.NodePoolLabel] ||
		was.GetAnnotations()[apps.SilenceEvicts] != is.GetAnnotations()[apps.SilenceEvicts]
}

// Reconcile marks one node.
func (m *marker) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var node corev1.Node
	if err := m.read.Get(ctx, req.NamespacedName, &node); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	pool, have := node.Labels[apps.NodePoolLabel], node.Annotations[apps.SilenceEvicts]
	want, err := mark(ctx, m.read, pool)
	if err == nil && want != "" && want != have {
		// The cache may not have heard of a pool that is new. To spare a node for
		// too long does less harm than not to.
		want, err = mark(ctx, m.live, pool)
	}
	if err != nil || want == have {
		return reconcile.Result{}, err
	}
	was := node.DeepCopy()
	if want == "" {
		delete(node.Annotations, apps.SilenceEvicts)
	} else {
		if node.Annotations == nil {
			node.Annotations = map[string]string{}
		}
		node.Annotations[apps.SilenceEvicts] = want
	}
	// If the node has moved meanwhile the mark names another pool than it does,
	// and means nothing.
	if err := m.write.Patch(ctx, &node, client.MergeFrom(was)); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("mark node %s: %w", node.Name, err)
	}
	return reconcile.Result{}, nil
}

// mark returns what the mark of a node is that names the pool: nothing if it is
// an Edge pool.
func mark(ctx context.Context, r client.Reader, pool string) (string, error) {
	if pool == "" {
		return "", nil
	}
	var p v1beta2.NodePool
	err := r.Get(ctx, client.ObjectKey{Name: pool}, &p)
	if err == nil && p.Spec.Type == v1beta2.Cloud || apierrors.IsNotFound(err) {
		return pool, nil
	}
	if err != nil {
		return "", fmt.Errorf("read pool %s: %w", pool, err)
	}
	return "", nil
}
