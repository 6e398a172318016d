// Package hubleader chooses the leaders of each pool and tells its hubs of
// them: in the status of the NodePool, in the ConfigMap leader-hub-<pool>, and
// by a ClusterRole that lets leaders read what pools share.
package hubleader

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	applymetav1 "k8s.io/client-go/applyconfigurations/meta/v1"
	applyrbacv1 "k8s.io/client-go/applyconfigurations/rbac/v1"
	"k8s.io/utils/clock"
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

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{
	{APIGroups: []string{"apps.openyurt.io"}, Resources: []string{"nodepools/status"}, Verbs: []string{"patch"}},
}

// ConfigRules are what the controller of the ConfigMaps writes, in its
// namespace.
var ConfigRules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"create", "patch"}},
}

type elector struct {
	read, write client.Client
	clock       clock.PassiveClock
}

// gather is for how long changes of nodes are gathered: not as long as the
// controller nodepool does, which writes the same status and would be in the way.
const gather = nodepool.Gather / 2

// Setup adds the controller that elects to mgr.
func Setup(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("hubleader").WithOptions(options).
		Watches(&v1beta2.NodePool{}, nodepool.Pools(gather)).
		Watches(&corev1.Node{}, nodepool.PoolsOfNode{After: gather}, builder.WithPredicates(predicate.Funcs{UpdateFunc: candidacyChanged})).
		Complete(&elector{mgr.GetClient(), write, clock.RealClock{}})
	if err != nil {
		return fmt.Errorf("set up hubleader: %w", err)
	}
	return nil
}

func candidacyChanged(e event.UpdateEvent) bool {
	was, ok := e.ObjectOld.(*corev1.Node)
	is, ok2 := e.ObjectNew.(*corev1.Node)
	return !ok || !ok2 || !reflect.DeepEqual(candidateOf(was), candidateOf(is))
}

func candidateOf(node *corev1.Node) candidate {
	c := candidate{name: node.Name, labels: node.Labels, fit: nodepool.Ready(node), foreign: nodepool.ForeignHub(node)}
	if node.DeletionTimestamp != nil || node.Labels[apps.EdgeWorkerLabel] == "false" { // that has no hub
		c.fit, c.never = false, true
	}
	if nodepool.VouchedFor(node) {
		c.fit = false // it has no link
	}
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			c.address = a.Address
			break
		}
	}
	for _, condition := range node.Status.Conditions {
		if slices.Contains(unfit, condition.Type) && condition.Status == corev1.ConditionFalse {
			c.fit = false
		}
	}
	return c
}

// unfit are the conditions, which hubs keep, that keep a node from leading
// while they are false.
var unfit = []corev1.NodeConditionType{"YurtHubLinkReady", "YurtHubStoreReady"}

// candidatesOf are the nodes of a pool.
func candidatesOf(ctx context.Context, read client.Reader, pool *v1beta2.NodePool) ([]candidate, error) {
	members, err := nodepool.Members(ctx, read, pool.Name)
	if err != nil {
		return nil, err //nolint:wrapcheck // it says what
	}
	out := make([]candidate, len(members))
	for i := range members {
		out[i] = candidateOf(&members[i])
	}
	return out, nil
}

// Reconcile elects the leaders of one pool.
func (c *elector) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pool v1beta2.NodePool
	if err := c.read.Get(ctx, req.NamespacedName, &pool); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	candidates, err := candidatesOf(ctx, c.read, &pool)
	if err != nil {
		return reconcile.Result{}, err
	}
	was := pool.DeepCopy()
	now := metav1.NewTime(c.clock.Now())
	leaders, last := elect(&pool, candidates)
	if !slices.Equal(leaders, pool.Status.LeaderEndpoints) {
		pool.Status.LeaderLastElectedTime = now
	}
	pool.Status.LeaderEndpoints, pool.Status.LeaderNum = leaders, int32(len(leaders)) //nolint:gosec // 16 at most
	pool.Status.Contacts = contacts(&pool, candidates)
	pool.Status.Conditions = slices.DeleteFunc(pool.Status.Conditions, func(c v1beta2.NodePoolCondition) bool { return c.Type == v1beta2.LeaderReady })
	if condition := ready(was, leaders, last, now); condition != nil {
		pool.Status.Conditions = append(pool.Status.Conditions, *condition)
	}
	if reflect.DeepEqual(was.Status, pool.Status) {
		return reconcile.Result{}, nil
	}
	if err := c.write.Status().Patch(ctx, &pool, client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("patch status of pool: %w", err)
	}
	return reconcile.Result{}, nil
}

// teller keeps the ConfigMap of each pool.
type teller struct {
	read, write client.Client
	namespace   string
}

// SetupConfig adds the controller of the ConfigMaps to mgr.
func SetupConfig(mgr ctrl.Manager, write client.Client, namespace string, options controller.Options) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("hubleaderconfig").WithOptions(options).
		For(&v1beta2.NodePool{}).Owns(&corev1.ConfigMap{}).
		Watches(&corev1.Node{}, nodepool.PoolsOfNode{After: gather}, builder.WithPredicates(predicate.Funcs{UpdateFunc: hubReplaced})).
		Complete(&teller{mgr.GetClient(), write, namespace})
	if err != nil {
		return fmt.Errorf("set up hubleaderconfig: %w", err)
	}
	return nil
}

// hubReplaced reports whether the node has moved, or a hub of another kind than
// before.
func hubReplaced(e event.UpdateEvent) bool {
	was, ok := e.ObjectOld.(*corev1.Node)
	is, ok2 := e.ObjectNew.(*corev1.Node)
	return !ok || !ok2 || was.Labels[apps.NodePoolLabel] != is.Labels[apps.NodePoolLabel] || nodepool.ForeignHub(was) != nodepool.ForeignHub(is)
}

// Reconcile tells the hubs of one pool.
func (c *teller) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var pool v1beta2.NodePool
	if err := c.read.Get(ctx, req.NamespacedName, &pool); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	candidates, err := candidatesOf(ctx, c.read, &pool)
	if err != nil {
		return reconcile.Result{}, err
	}
	want := configMap(&pool, told(pool.Status.LeaderEndpoints, candidates), c.namespace)
	var have corev1.ConfigMap
	err = c.read.Get(ctx, types.NamespacedName{Namespace: c.namespace, Name: *want.Name}, &have)
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("read ConfigMap: %w", err)
	}
	// What is not in the cache may be there without the label by which the
	// cache, and hubs, find it: an apply does for both.
	if err == nil && reflect.DeepEqual(have.Data, want.Data) && have.Labels[apps.ConfigMapNameLabel] == have.Name && metav1.IsControlledBy(&have, &pool) {
		return reconcile.Result{}, nil
	}
	if err := c.write.Apply(ctx, want, client.ForceOwnership, client.FieldOwner("yurt-manager")); err != nil {
		return reconcile.Result{}, fmt.Errorf("apply ConfigMap: %w", err)
	}
	return reconcile.Result{}, nil
}

// configMap is what OpenYurt's hubs read.
func configMap(pool *v1beta2.NodePool, told []v1beta2.Leader, namespace string) *applycorev1.ConfigMapApplyConfiguration {
	name := apps.LeaderConfigPrefix + pool.Name
	leaders := make([]string, len(told))
	for i, l := range told {
		leaders[i] = l.NodeName + "/" + l.Address
	}
	slices.Sort(leaders)
	var resources []string
	for _, r := range pool.Shared() {
		resources = append(resources, r.Group+"/"+r.Version+"/"+r.Resource)
	}
	slices.Sort(resources)
	owner := nodepool.Owner(pool)
	labels := map[string]string{}
	if len(validation.IsValidLabelValue(name)) == 0 { // the name of a pool may be longer than that allows
		labels[apps.ConfigMapNameLabel] = name
	}
	return applycorev1.ConfigMap(name, namespace).
		WithLabels(labels).
		WithOwnerReferences(applymetav1.OwnerReference().WithAPIVersion(owner.APIVersion).WithKind(owner.Kind).
			WithName(owner.Name).WithUID(owner.UID).WithController(true)).
		WithData(map[string]string{
			"leaders": strings.Join(leaders, ","), "pool-scoped-metadata": strings.Join(resources, ","),
			"interconnectivity":      strconv.FormatBool(pool.Spec.InterConnectivity),
			"enable-leader-election": strconv.FormatBool(pool.Spec.EnableLeaderElection),
		})
}

// permitter keeps the ClusterRole of what pools share.
type permitter struct {
	read, write client.Client
}

// Multiplexer is the ClusterRole that lets hubs read what pools share.
const Multiplexer = "yurt-hub-multiplexer"

// PermitRules are what the controller of the ClusterRole writes. To grant
// what it has not itself, it needs escalate, on that one role.
var PermitRules = []rbacv1.PolicyRule{{
	APIGroups: []string{rbacv1.GroupName}, Resources: []string{"clusterroles"}, ResourceNames: []string{Multiplexer},
	Verbs: []string{"create", "patch", "escalate"},
}}

// SetupPermit adds the controller of the ClusterRole to mgr.
func SetupPermit(mgr ctrl.Manager, write client.Client, options controller.Options) error {
	options.MaxConcurrentReconciles = 1 // there is one role
	err := ctrl.NewControllerManagedBy(mgr).Named("hubleaderrbac").WithOptions(options).
		For(&v1beta2.NodePool{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&rbacv1.ClusterRole{}, &handler.EnqueueRequestForObject{}).
		Complete(&permitter{mgr.GetClient(), write})
	if err != nil {
		return fmt.Errorf("set up hubleaderrbac: %w", err)
	}
	return nil
}

// Reconcile grants what all pools together share, whichever pool it is
// called for.
func (c *permitter) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	var pools v1beta2.NodePoolList
	if err := c.read.List(ctx, &pools); err != nil {
		return reconcile.Result{}, fmt.Errorf("list pools: %w", err)
	}
	rules := sharedRules(pools.Items)
	var have rbacv1.ClusterRole
	err := c.read.Get(ctx, types.NamespacedName{Name: Multiplexer}, &have)
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("read ClusterRole: %w", err)
	}
	if err == nil && equality.Semantic.DeepEqual(have.Rules, rules) {
		return reconcile.Result{}, nil
	}
	want := applyrbacv1.ClusterRole(Multiplexer)
	for _, r := range rules {
		want.WithRules(applyrbacv1.PolicyRule().WithAPIGroups(r.APIGroups...).WithResources(r.Resources...).WithVerbs(r.Verbs...))
	}
	// Only an apply names what it may create, as the right to it does.
	if err := c.write.Apply(ctx, want, client.ForceOwnership, client.FieldOwner("yurt-manager")); err != nil {
		return reconcile.Result{}, fmt.Errorf("apply ClusterRole: %w", err)
	}
	return reconcile.Result{}, nil
}

// sharedRules is one rule per API group, in order.
func sharedRules(pools []v1beta2.NodePool) []rbacv1.PolicyRule {
	byGroup := map[string][]string{}
	for i := range pools {
		for _, r := range pools[i].Shared() {
			if !slices.Contains(byGroup[r.Group], r.Resource) {
				byGroup[r.Group] = append(byGroup[r.Group], r.Resource)
			}
		}
	}
	groups := make([]string, 0, len(byGroup))
	for group := range byGroup {
		groups = append(groups, group)
	}
	slices.Sort(groups)
	var rules []rbacv1.PolicyRule
	for _, group := range groups {
		slices.Sort(byGroup[group])
		rules = append(rules, rbacv1.PolicyRule{APIGroups: []string{group}, Resources: byGroup[group], Verbs: []string{"list", "watch"}})
	}
	return rules
}
