// Package loadbalancerset gives a Service a load balancer in each pool that it
// selects: a PoolService for each, which the pools' own implementations fill,
// and what these say gathered on the Service.
package loadbalancerset

import (
	"context"
	"errors"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"services", "services/status"}, Verbs: []string{"patch"}},
	{APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{"poolservices"}, Verbs: []string{"create", "patch", "delete"}},
}

type spreader struct {
	read, write client.Client
	events      events.EventRecorder
}

// Setup adds the controller to mgr.
func Setup(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	c := &spreader{mgr.GetClient(), write, mgr.GetEventRecorder("yurt-manager")}
	err := ctrl.NewControllerManagedBy(mgr).Named("loadbalancerset").WithOptions(options).
		For(&corev1.Service{}, builder.WithPredicates(predicate.NewPredicateFuncs(concerns))).
		Owns(&v1alpha1.PoolService{}).
		Watches(&v1beta2.NodePool{}, handler.EnqueueRequestsFromMapFunc(c.services), builder.WithPredicates(predicate.Funcs{
			UpdateFunc: func(e event.UpdateEvent) bool {
				return !reflect.DeepEqual(e.ObjectOld.GetLabels(), e.ObjectNew.GetLabels()) ||
					(e.ObjectOld.GetDeletionTimestamp() == nil) != (e.ObjectNew.GetDeletionTimestamp() == nil)
			},
		})).
		Complete(c)
	if err != nil {
		return fmt.Errorf("set up loadbalancerset: %w", err)
	}
	return nil
}

// concerns reports whether the object is a Service that is spread over pools,
// or was.
func concerns(o client.Object) bool {
	s, ok := o.(*corev1.Service)
	return ok && (spread(s) || controllerutil.ContainsFinalizer(s, network.PoolServicesFinalizer))
}

// services are those that any change of a pool may concern.
func (c *spreader) services(ctx context.Context, _ client.Object) []reconcile.Request {
	var all corev1.ServiceList
	if err := c.read.List(ctx, &all); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "services not listed")
		return nil
	}
	var out []reconcile.Request
	for i := range all.Items {
		if concerns(&all.Items[i]) {
			out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&all.Items[i])})
		}
	}
	return out
}

// Reconcile spreads one Service over its pools.
func (c *spreader) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var service corev1.Service
	if err := c.read.Get(ctx, req.NamespacedName, &service); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !concerns(&service) {
		return reconcile.Result{}, nil
	}
	have, err := c.poolServices(ctx, &service)
	if err != nil {
		return reconcile.Result{}, err
	}
	var pools []*v1beta2.NodePool
	if spread(&service) {
		var all v1beta2.NodePoolList
		if err := c.read.List(ctx, &all); err != nil {
			return reconcile.Result{}, fmt.Errorf("list pools: %w", err)
		}
		if pools, err = selected(&service, all.Items); err != nil {
			// What there is stays until somebody corrects it.
			c.events.Eventf(&service, nil, corev1.EventTypeWarning, "BadPoolSelector", "Spread", "%v", err)
			return reconcile.Result{}, nil
		}
		if len(pools) == 0 {
			c.events.Eventf(&service, nil, corev1.EventTypeWarning, "NoMatchNodePool", "Spread",
				"no NodePool has the labels that annotation %s asks for", network.PoolSelector)
		}
	}
	todo := plan(&service, pools, have)
	// The finalizer goes on before the first PoolService and off after the last.
	keep := spread(&service) || len(have) > 0
	if err := c.show(ctx, &service, gather(have), keep); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	return reconcile.Result{}, c.carryOut(ctx, &service, todo)
}

// poolServices returns those that the Service controls, whatever their labels,
// and those that the manager made for it and that have lost their owners.
func (c *spreader) poolServices(ctx context.Context, s *corev1.Service) ([]v1alpha1.PoolService, error) {
	var all v1alpha1.PoolServiceList
	if err := c.read.List(ctx, &all, client.InNamespace(s.Namespace)); err != nil {
		return nil, fmt.Errorf("list PoolServices: %w", err)
	}
	var out []v1alpha1.PoolService
	for i := range all.Items {
		p := &all.Items[i]
		lost := metav1.GetControllerOf(p) == nil && p.Labels[network.ManagedByLabel] == network.ManagedBy && p.Labels[network.ServiceNameLabel] == s.Name
		if lost || metav1.IsControlledBy(p, s) {
			out = append(out, *p)
		}
	}
	return out, nil
}

// show writes to the Service what was gathered. One that is spread no longer
// shows nothing.
func (c *spreader) show(ctx context.Context, s *corev1.Service, g gathered, keep bool) error {
	was := s.DeepCopy()
	if keep {
		controllerutil.AddFinalizer(s, network.PoolServicesFinalizer)
	} else {
		controllerutil.RemoveFinalizer(s, network.PoolServicesFinalizer)
	}
	g.show(s)
	status := s.Spec.Type == corev1.ServiceTypeLoadBalancer && !equality.Semantic.DeepEqual(s.Status.LoadBalancer, g.status)
	// The status first: without its finalizer a Service may be gone.
	if status {
		next := was.DeepCopy()
		next.Status.LoadBalancer = g.status
		if err := c.write.Status().Patch(ctx, next, client.MergeFrom(was)); err != nil {
			return fmt.Errorf("patch status of Service: %w", err)
		}
		s.ResourceVersion, was.ResourceVersion = next.ResourceVersion, next.ResourceVersion
	}
	if equality.Semantic.DeepEqual(was.ObjectMeta, s.ObjectMeta) {
		return nil
	}
	if err := c.write.Patch(ctx, s, client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("patch Service: %w", err)
	}
	return nil
}

func (c *spreader) carryOut(ctx context.Context, s *corev1.Service, todo change) error {
	var errs []error
	for _, p := range todo.create {
		err := c.write.Create(ctx, p)
		if apierrors.IsAlreadyExists(err) {
			var other v1alpha1.PoolService
			if c.read.Get(ctx, client.ObjectKeyFromObject(p), &other) == nil && !metav1.IsControlledBy(&other, s) {
				c.events.Eventf(s, &other, corev1.EventTypeWarning, "NameTaken", "Spread",
					"PoolService %s is not this Service's; delete or rename it", other.Name)
				continue
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("create PoolService %s: %w", p.Name, err))
		}
	}
	for _, p := range todo.update {
		was := &v1alpha1.PoolService{}
		err := c.read.Get(ctx, client.ObjectKeyFromObject(p), was)
		if err == nil {
			err = c.write.Patch(ctx, p, client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{}))
		}
		if client.IgnoreNotFound(err) != nil {
			errs = append(errs, fmt.Errorf("patch PoolService %s: %w", p.Name, err))
		}
	}
	for _, p := range todo.remove {
		if err := c.write.Delete(ctx, p, client.Preconditions{UID: &p.UID}); client.IgnoreNotFound(err) != nil {
			errs = append(errs, fmt.Errorf("delete PoolService %s: %w", p.Name, err))
		}
	}
	return errors.Join(errs...)
}
