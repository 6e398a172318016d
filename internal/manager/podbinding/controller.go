// Package podbinding keeps pods bound to nodes whose annotations ask for it:
// their tolerations of an absent node are lengthened, and put back when the
// annotation goes.
package podbinding

import (
	"context"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"patch"}}}

// NodeNameIndex is the field of pods by which the manager's cache finds those
// of a node.
const NodeNameIndex = "spec.nodeName"

type binder struct {
	read, write client.Client
	events      events.EventRecorder
}

// Setup adds the controller to mgr, whose cache must have NodeNameIndex.
func Setup(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	c := &binder{mgr.GetClient(), write, mgr.GetEventRecorder("yurt-manager")}
	err := ctrl.NewControllerManagedBy(mgr).Named("podbinding").WithOptions(options).
		For(&corev1.Pod{}, builder.WithPredicates(predicate.Funcs{
			UpdateFunc: func(e event.UpdateEvent) bool {
				was, ok := e.ObjectOld.(*corev1.Pod)
				is, ok2 := e.ObjectNew.(*corev1.Pod)
				return !ok || !ok2 || was.Spec.NodeName != is.Spec.NodeName
			},
			DeleteFunc: func(event.DeleteEvent) bool { return false },
		})).
		Watches(&corev1.Node{}, handler.EnqueueRequestsFromMapFunc(c.podsOf), builder.WithPredicates(predicate.Funcs{
			UpdateFunc: func(e event.UpdateEvent) bool {
				return !reflect.DeepEqual(e.ObjectOld.GetAnnotations(), e.ObjectNew.GetAnnotations())
			},
			DeleteFunc: func(event.DeleteEvent) bool { return false },
		})).
		Complete(c)
	if err != nil {
		return fmt.Errorf("set up podbinding: %w", err)
	}
	return nil
}

func (c *binder) podsOf(ctx context.Context, node client.Object) []reconcile.Request {
	if n, ok := node.(*corev1.Node); ok {
		if _, err := bindingOf(n); err != nil {
			c.events.Eventf(n, nil, corev1.EventTypeWarning, "BadAutonomy", "Bind", "%v", err)
			return nil
		}
	}
	var pods corev1.PodList
	if err := c.read.List(ctx, &pods, client.MatchingFields{NodeNameIndex: node.GetName()}); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "pods not listed", "node", node.GetName())
		return nil
	}
	requests := make([]reconcile.Request, len(pods.Items))
	for i := range pods.Items {
		requests[i].NamespacedName = client.ObjectKeyFromObject(&pods.Items[i])
	}
	return requests
}

// Reconcile binds one pod.
func (c *binder) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pod corev1.Pod
	if err := c.read.Get(ctx, req.NamespacedName, &pod); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if pod.Spec.NodeName == "" || pod.DeletionTimestamp != nil || staysAnyway(&pod) {
		return reconcile.Result{}, nil
	}
	var node corev1.Node
	if err := c.read.Get(ctx, types.NamespacedName{Name: pod.Spec.NodeName}, &node); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	b, err := bindingOf(&node)
	if err != nil {
		return reconcile.Result{}, nil //nolint:nilerr // told as an event of the node; nothing changes
	}
	was := pod.DeepCopy()
	if !bind(&pod, b) {
		return reconcile.Result{}, nil
	}
	patch := client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{})
	if err := c.write.Patch(ctx, &pod, patch); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("patch pod: %w", err)
	}
	return reconcile.Result{}, nil
}

// staysAnyway reports whether nobody evicts the pod: DaemonSets' and mirror
// pods.
func staysAnyway(pod *corev1.Pod) bool {
	if _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return true
	}
	owner := metav1.GetControllerOf(pod)
	return owner != nil && owner.Kind == "DaemonSet"
}
