// Package accessfilter checks AccessFilters when they are written, and keeps
// their status by what hubs tell of them on their Nodes. No hub waits for it:
// each checks what it applies by itself.
package accessfilter

import (
	"context"
	"fmt"
	"reflect"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/accessfilter"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{{
	APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{"accessfilters/status"}, Verbs: []string{"patch"},
}}

// gather is how long the reports of nodes are gathered before a status is
// written: thousands of nodes take a filter at the same time.
const gather = time.Second

type counter struct {
	read, write client.Client
	events      events.EventRecorder
}

// Setup adds the controller to mgr. It writes with the client write.
func Setup(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	c := &counter{mgr.GetClient(), write, mgr.GetEventRecorder("yurt-manager")}
	err := ctrl.NewControllerManagedBy(mgr).Named("accessfilter").WithOptions(options).
		For(&v1alpha1.AccessFilter{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&corev1.Node{}, c.filtersOfNode(), builder.WithPredicates(predicate.Funcs{UpdateFunc: told})).
		Complete(c)
	if err != nil {
		return fmt.Errorf("set up accessfilter: %w", err)
	}
	return nil
}

// told leaves out what no status goes by.
func told(e event.UpdateEvent) bool {
	return e.ObjectOld.GetAnnotations()[network.AccessFiltersAnnotation] != e.ObjectNew.GetAnnotations()[network.AccessFiltersAnnotation] ||
		!reflect.DeepEqual(e.ObjectOld.GetLabels(), e.ObjectNew.GetLabels())
}

type requests = workqueue.TypedRateLimitingInterface[reconcile.Request]

// filtersOfNode enqueues all filters, which are few.
func (c *counter) filtersOfNode() handler.EventHandler {
	enqueue := func(ctx context.Context, q requests) {
		var all v1alpha1.AccessFilterList
		if err := c.read.List(ctx, &all, client.UnsafeDisableDeepCopy); err != nil {
			ctrl.LoggerFrom(ctx).Error(err, "AccessFilters not listed")
			return
		}
		for i := range all.Items {
			q.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Name: all.Items[i].Name}}, gather)
		}
	}
	return handler.Funcs{
		CreateFunc: func(ctx context.Context, _ event.CreateEvent, q requests) { enqueue(ctx, q) },
		UpdateFunc: func(ctx context.Context, _ event.UpdateEvent, q requests) { enqueue(ctx, q) },
		DeleteFunc: func(ctx context.Context, _ event.DeleteEvent, q requests) { enqueue(ctx, q) },
	}
}

// Reconcile counts for one filter.
func (c *counter) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var f v1alpha1.AccessFilter
	if err := c.read.Get(ctx, req.NamespacedName, &f); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	var nodes corev1.NodeList
	if err := c.read.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil {
		return reconcile.Result{}, fmt.Errorf("list nodes: %w", err)
	}
	var members []member
	for i := range nodes.Items {
		node := &nodes.Items[i]
		pool := node.Labels[apps.NodePoolLabel]
		if !hasHub(node) {
			continue
		}
		selected, err := accessfilter.Selects(&f.Spec, pool, node.Labels)
		if err != nil {
			return reconcile.Result{}, reconcile.TerminalError(fmt.Errorf("AccessFilter %s: %w", f.Name, err))
		}
		if selected {
			members = append(members, member{node.Name, pool, reports(node)[f.Name]})
		}
	}
	was := f.DeepCopy()
	f.Status = tally(&f, members)
	if equality.Semantic.DeepEqual(was.Status, f.Status) {
		return reconcile.Result{}, nil
	}
	if err := c.write.Status().Patch(ctx, &f, client.MergeFrom(was)); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("patch status of AccessFilter: %w", err)
	}
	c.tell(was, &f)
	return reconcile.Result{}, nil
}

// tell makes an event of the filter when nodes begin to fail, and when all
// apply it again, so that its description has a history. What happens for each
// node is in the status only.
func (c *counter) tell(was, is *v1alpha1.AccessFilter) {
	before, now := meta.FindStatusCondition(was.Status.Conditions, v1alpha1.AccessFilterReady), meta.FindStatusCondition(is.Status.Conditions, v1alpha1.AccessFilterReady)
	switch {
	case before != nil && before.Reason == now.Reason:
	case now.Reason == reasonFailed:
		c.events.Eventf(is, nil, corev1.EventTypeWarning, reasonFailed, "Apply", "%s", now.Message)
	case now.Reason == reasonActive:
		c.events.Eventf(is, nil, corev1.EventTypeNormal, reasonActive, "Apply", "%s", now.Message)
	}
}
