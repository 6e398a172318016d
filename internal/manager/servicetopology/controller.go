// Package servicetopology makes hubs of OpenYurt look again at EndpointSlices.
// Such a hub leaves out endpoints that are far when a slice passes it, and not
// when the Service's annotation or its pool changes later. So the slice itself
// is changed then: it gets another value of an annotation.
//
// Hubs of ours need none of this, and each change of a slice costs the link of
// each node. While no node has a hub of OpenYurt, nothing is written or read.
package servicetopology

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
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
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{
	{APIGroups: []string{discoveryv1.GroupName}, Resources: []string{"endpointslices"}, Verbs: []string{"patch"}},
}

// gather is how long changes of pools are waited for, so that many nodes that
// join at a time change each slice once.
const gather = 2 * time.Second

type trigger struct {
	read, write client.Client
	// fresh reads slices past the cache, which would hold all of them for
	// what is seldom needed.
	fresh client.Reader
}

// Setup adds the controller to mgr.
func Setup(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	c := &trigger{mgr.GetClient(), write, mgr.GetAPIReader()}
	near := predicate.Funcs{
		CreateFunc: func(e event.CreateEvent) bool { return e.Object.GetAnnotations()[apps.TopologyKeys] != "" },
		UpdateFunc: func(e event.UpdateEvent) bool {
			return e.ObjectOld.GetAnnotations()[apps.TopologyKeys] != e.ObjectNew.GetAnnotations()[apps.TopologyKeys]
		},
		DeleteFunc: func(event.DeleteEvent) bool { return false },
	}
	members := predicate.Funcs{
		CreateFunc: func(event.CreateEvent) bool { return false }, // it has no nodes yet, or the Services come too
		UpdateFunc: func(e event.UpdateEvent) bool {
			was, isWas := e.ObjectOld.(*v1beta2.NodePool)
			is, isIs := e.ObjectNew.(*v1beta2.NodePool)
			return isWas && isIs && !slices.Equal(was.Status.Nodes, is.Status.Nodes)
		},
	}
	first := predicate.Funcs{
		CreateFunc: func(event.CreateEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			was, isWas := e.ObjectOld.(*corev1.Node)
			is, isIs := e.ObjectNew.(*corev1.Node)
			now := time.Now()
			return isWas && isIs && !foreign(was, now) && foreign(is, now)
		},
		DeleteFunc: func(event.DeleteEvent) bool { return false },
	}
	err := ctrl.NewControllerManagedBy(mgr).Named("servicetopology").WithOptions(options).
		For(&corev1.Service{}, builder.WithPredicates(near)).
		Watches(&v1beta2.NodePool{}, c.later(), builder.WithPredicates(members)).
		Watches(&corev1.Node{}, c.later(), builder.WithPredicates(first)).
		Complete(c)
	if err != nil {
		return fmt.Errorf("set up servicetopology: %w", err)
	}
	return nil
}

type requests = workqueue.TypedRateLimitingInterface[reconcile.Request]

// later enqueues, in a moment, the Services that keep their traffic near.
func (c *trigger) later() handler.EventHandler {
	add := func(ctx context.Context, q requests) {
		var all corev1.ServiceList
		if err := c.read.List(ctx, &all, client.UnsafeDisableDeepCopy); err != nil {
			ctrl.LoggerFrom(ctx).Error(err, "services not listed")
			return
		}
		for i := range all.Items {
			if all.Items[i].Annotations[apps.TopologyKeys] != "" {
				q.AddAfter(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&all.Items[i])}, gather)
			}
		}
	}
	return handler.Funcs{
		UpdateFunc: func(ctx context.Context, _ event.UpdateEvent, q requests) { add(ctx, q) },
		DeleteFunc: func(ctx context.Context, _ event.DeleteEvent, q requests) { add(ctx, q) },
	}
}

// Reconcile marks the slices of one Service.
func (c *trigger) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var nodes corev1.NodeList
	if err := c.read.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil {
		return reconcile.Result{}, fmt.Errorf("list nodes: %w", err)
	}
	now := time.Now()
	if !slices.ContainsFunc(nodes.Items, func(n corev1.Node) bool { return foreign(&n, now) }) {
		return reconcile.Result{}, nil
	}
	var service corev1.Service
	if err := c.read.Get(ctx, req.NamespacedName, &service); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err) // its slices go with it
	}
	var pools v1beta2.NodePoolList
	if err := c.read.List(ctx, &pools, client.UnsafeDisableDeepCopy); err != nil {
		return reconcile.Result{}, fmt.Errorf("list pools: %w", err)
	}
	var all discoveryv1.EndpointSliceList
	if err := c.fresh.List(ctx, &all, client.InNamespace(req.Namespace), client.MatchingLabels{discoveryv1.LabelServiceName: req.Name}); err != nil {
		return reconcile.Result{}, fmt.Errorf("list slices of Service: %w", err)
	}
	where := newSites(pools.Items)
	var errs []error
	for i := range all.Items {
		slice := &all.Items[i]
		want := mark(service.Annotations[apps.TopologyKeys], slice, where)
		if slice.Annotations[apps.UpdateTrigger] == want {
			continue
		}
		was := slice.DeepCopy()
		if want == "" {
			delete(slice.Annotations, apps.UpdateTrigger)
		} else {
			if slice.Annotations == nil {
				slice.Annotations = map[string]string{}
			}
			slice.Annotations[apps.UpdateTrigger] = want
		}
		if err := c.write.Patch(ctx, slice, client.MergeFrom(was)); client.IgnoreNotFound(err) != nil {
			errs = append(errs, fmt.Errorf("patch slice %s: %w", slice.Name, err))
		}
	}
	return reconcile.Result{}, errors.Join(errs...)
}
