// Package webhookcert keeps the certificate of the manager's webhook in a
// Secret, the bundle that verifies it in the CustomResourceDefinitions that
// are converted there, and both fresh.
//
// Each replica runs it, elected or not, for each serves. They write with the
// version that they read, so the first one wins and the others take what it
// made.
package webhookcert

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

const (
	// Secret is the name of the Secret.
	Secret = "yurt-manager-webhook-certs"
	// Definition is the name of the CustomResourceDefinition that is
	// converted.
	Definition = "nodepools.apps.openyurt.io"
	// Service is the name of the Service that leads to the webhook.
	Service = "yurt-manager-webhook-service"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{{
	APIGroups: []string{apiextensionsv1.GroupName}, Resources: []string{"customresourcedefinitions"},
	ResourceNames: []string{Definition}, Verbs: []string{"patch"},
}}

// NamespacedRules are what it writes in the manager's namespace.
var NamespacedRules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"create"}},
	{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{Secret}, Verbs: []string{"update"}},
}

// Holder has the certificate that is served now.
type Holder struct {
	certificate atomic.Pointer[tls.Certificate]
}

var errNoCertificate = errors.New("the webhook has no certificate yet")

// Configure makes a server serve the certificate.
func (h *Holder) Configure(cfg *tls.Config) {
	cfg.MinVersion = tls.VersionTLS13
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if c := h.certificate.Load(); c != nil {
			return c, nil
		}
		return nil, errNoCertificate
	}
}

// Check is a readiness check: it fails until there is a certificate.
func (h *Holder) Check(*http.Request) error {
	if h.certificate.Load() == nil {
		return errNoCertificate
	}
	return nil
}

type keeper struct {
	read, write client.Client
	holder      *Holder
	secret      types.NamespacedName
	names       []string
}

// Setup adds the controller to mgr. It writes with the client write and fills
// holder.
func Setup(mgr ctrl.Manager, write client.Client, namespace string, holder *Holder) error {
	c := &keeper{
		read: mgr.GetClient(), write: write, holder: holder,
		secret: types.NamespacedName{Namespace: namespace, Name: Secret},
		names:  []string{Service + "." + namespace + ".svc", Service + "." + namespace, Service, "localhost"},
	}
	everyReplica := false
	err := ctrl.NewControllerManagedBy(mgr).Named("webhookcert").
		WithOptions(controller.Options{NeedLeaderElection: &everyReplica}).
		For(&corev1.Secret{}).
		Watches(&apiextensionsv1.CustomResourceDefinition{}, handler.EnqueueRequestsFromMapFunc(
			func(context.Context, client.Object) []reconcile.Request {
				return []reconcile.Request{{NamespacedName: c.secret}}
			})).
		Complete(c)
	if err != nil {
		return fmt.Errorf("set up webhookcert: %w", err)
	}
	return nil
}

// Reconcile takes one step.
func (c *keeper) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	var secret corev1.Secret
	err := c.read.Get(ctx, c.secret, &secret)
	if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("read Secret: %w", err)
	}
	var definition apiextensionsv1.CustomResourceDefinition
	if err := c.read.Get(ctx, types.NamespacedName{Name: Definition}, &definition); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err) // its coming is an event
	}
	if pair, err := tls.X509KeyPair(secret.Data[serverKey], secret.Data[serverKeyKey]); err == nil {
		c.holder.certificate.Store(&pair)
	}
	bundle := secret.Data[bundleKey]
	client := clientConfig(&definition)
	if client != nil && len(bundle) > 0 && !bytes.Equal(client.CABundle, bundle) {
		if err := c.trust(ctx, &definition, bundle); err != nil {
			return reconcile.Result{}, err
		}
	}
	trusted := bundle
	if client != nil {
		trusted = client.CABundle
	}
	data, wait, err := next(secret.Data, trusted, c.names, time.Now())
	if err != nil {
		return reconcile.Result{}, err
	}
	if data == nil {
		return reconcile.Result{RequeueAfter: wait}, nil
	}
	return c.save(ctx, &secret, data)
}

// save writes the Secret. Where another replica was first, its Secret comes as
// an event; the wait is for the case that it does not.
func (c *keeper) save(ctx context.Context, secret *corev1.Secret, data map[string][]byte) (reconcile.Result, error) {
	secret.Data = data
	var err error
	if secret.ResourceVersion == "" {
		secret.ObjectMeta = metav1.ObjectMeta{Namespace: c.secret.Namespace, Name: c.secret.Name}
		err = c.write.Create(ctx, secret)
	} else {
		err = c.write.Update(ctx, secret)
	}
	if err != nil && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
		return reconcile.Result{}, fmt.Errorf("write Secret: %w", err)
	}
	return reconcile.Result{RequeueAfter: 5 * time.Second}, nil
}

func (c *keeper) trust(ctx context.Context, definition *apiextensionsv1.CustomResourceDefinition, bundle []byte) error {
	was := definition.DeepCopy()
	clientConfig(definition).CABundle = bundle
	if err := c.write.Patch(ctx, definition, client.MergeFrom(was)); err != nil {
		return fmt.Errorf("patch bundle of CustomResourceDefinition: %w", err)
	}
	return nil
}

// clientConfig says how API servers reach the webhook, nil where they do not.
func clientConfig(d *apiextensionsv1.CustomResourceDefinition) *apiextensionsv1.WebhookClientConfig {
	if d.Spec.Conversion == nil || d.Spec.Conversion.Webhook == nil {
		return nil
	}
	return d.Spec.Conversion.Webhook.ClientConfig
}
