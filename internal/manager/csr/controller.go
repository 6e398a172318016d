// Package csr approves the certificate requests of hubs, and only what the
// requester may have: a client certificate for itself, where the cluster's own
// rules let it ask for one, and a server certificate whose names lead to it.
//
// It denies nothing: a request that it does not approve is left to an
// administrator, with an event that says why.
package csr

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{
	{APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"certificatesigningrequests/approval"}, Verbs: []string{"update"}},
	{
		APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"signers"}, Verbs: []string{"approve"},
		ResourceNames: []string{certificatesv1.KubeAPIServerClientSignerName, certificatesv1.KubeletServingSignerName},
	},
	{APIGroups: []string{"authorization.k8s.io"}, Resources: []string{"subjectaccessreviews"}, Verbs: []string{"create"}},
}

// A hub may ask before its kubelet has registered the Node.
var errUnregistered = errors.New("the node is not registered yet")

const unregisteredWait = 10 * time.Second

type approver struct {
	read, write client.Client
	events      events.EventRecorder
	dummyIP     net.IP
}

// Setup adds the controller to mgr. DummyIP is the address at which pods reach
// the hub of their node.
func Setup(mgr ctrl.Manager, write client.Client, dummyIP net.IP, options controller.Options) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("csrapprover").WithOptions(options).
		For(&certificatesv1.CertificateSigningRequest{}).
		Complete(&approver{mgr.GetClient(), write, mgr.GetEventRecorder("yurt-manager"), dummyIP})
	if err != nil {
		return fmt.Errorf("set up csrapprover: %w", err)
	}
	return nil
}

// Reconcile decides one request.
func (c *approver) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var r certificatesv1.CertificateSigningRequest
	if err := c.read.Get(ctx, req.NamespacedName, &r); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if len(r.Status.Certificate) > 0 || len(r.Status.Conditions) > 0 {
		return reconcile.Result{}, nil
	}
	k, err := recognise(&r)
	if k == nil && err == nil {
		return reconcile.Result{}, nil
	}
	if err == nil {
		err = c.allowed(ctx, &r, k)
	}
	if errors.Is(err, errUnregistered) {
		return reconcile.Result{RequeueAfter: unregisteredWait}, nil
	}
	if no := (*refusal)(nil); errors.As(err, &no) {
		c.events.Eventf(&r, nil, corev1.EventTypeWarning, "NotApproved", "Approve", "left to an administrator: %v", no)
		return reconcile.Result{}, nil
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	r.Status.Conditions = append(r.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue,
		Reason: "AutoApproved", Message: "yurt-manager: a hub's own certificate",
	})
	if err := c.write.SubResource("approval").Update(ctx, &r); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("approve request: %w", err)
	}
	return reconcile.Result{}, nil
}

// allowed returns a refusal when the requester may not have what it asks for,
// another error when that could not be found out.
func (c *approver) allowed(ctx context.Context, r *certificatesv1.CertificateSigningRequest, k *kind) error {
	if k.server {
		var node corev1.Node
		err := c.read.Get(ctx, types.NamespacedName{Name: k.node}, &node)
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("read node: %w", err)
		}
		registered := err == nil
		common, err := c.common(ctx)
		if err != nil {
			return err
		}
		foreign, err := foreignNames(r.Spec.Request, &node, common)
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		// A hub of OpenYurt serves nobody without this certificate, the kubelet
		// included, which would register the node: it waits only for an address
		// that the Node has to confirm.
		if foreign != "" && !registered {
			return errUnregistered
		}
		if foreign != "" {
			return &refusal{fmt.Sprintf("%q is no address of node %s", foreign, k.node)}
		}
		return nil
	}
	extra := make(map[string]authorizationv1.ExtraValue, len(r.Spec.Extra))
	for key, v := range r.Spec.Extra {
		extra[key] = authorizationv1.ExtraValue(v)
	}
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: r.Spec.Username, UID: r.Spec.UID, Groups: r.Spec.Groups, Extra: extra,
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Group: certificatesv1.GroupName, Version: "*", Resource: "certificatesigningrequests", Subresource: k.subresource, Verb: "create",
		},
	}}
	if err := c.write.Create(ctx, review); err != nil {
		return fmt.Errorf("ask whether %s may have it: %w", r.Spec.Username, err)
	}
	if !review.Status.Allowed {
		return &refusal{fmt.Sprintf("%s may not create certificatesigningrequests/%s", r.Spec.Username, k.subresource)}
	}
	return nil
}

// common are the names by which the node and its pods know its hub, whichever
// node it is.
func (c *approver) common(ctx context.Context) (names, error) {
	out := names{
		dns: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		ips: []net.IP{c.dummyIP, net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	var service corev1.Service
	if err := c.read.Get(ctx, types.NamespacedName{Namespace: "default", Name: "kubernetes"}, &service); err != nil {
		return out, fmt.Errorf("read service default/kubernetes: %w", err)
	}
	for _, text := range service.Spec.ClusterIPs {
		if ip := net.ParseIP(text); ip != nil {
			out.ips = append(out.ips, ip)
		}
	}
	return out, nil
}
