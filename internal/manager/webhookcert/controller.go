// Package webhookcert keeps the certificate of the manager's webhooks in a
// Secret, the bundle that verifies it where API servers look for it, which is
// the CustomResourceDefinition that is converted there and the configuration of
// what is checked there, and both fresh.
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

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
)

const (
	// Secret is the name of the Secret.
	Secret = "yurt-manager-webhook-certs"
	// Definition is the name of the CustomResourceDefinition that is
	// converted.
	Definition = "nodepools.apps.openyurt.io"
	// Checks is the name of the ValidatingWebhookConfiguration.
	Checks = "yurt-manager"
	// Service is the name of the Service that leads to the webhooks.
	Service = "yurt-manager-webhook-service"
)

// Rules are what the controller writes.
var Rules = []rbacv1.PolicyRule{
	{
		APIGroups: []string{apiextensionsv1.GroupName}, Resources: []string{"customresourcedefinitions"},
		ResourceNames: []string{Definition}, Verbs: []string{"patch"},
	},
	{
		APIGroups: []string{admissionv1.GroupName}, Resources: []string{"validatingwebhookconfigurations"},
		ResourceNames: []string{Checks}, Verbs: []string{"patch"},
	},
}

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
	read   client.Reader
	write  client.Client
	holder *Holder
	secret types.NamespacedName
	names  []string
}

// begun is a cache that the manager starts before controllers, elected or not:
// it does so with what has GetCache.
type begun struct{ cache.Cache }

func (b begun) GetCache() cache.Cache { return b.Cache }

// Setup adds the controller to mgr. It writes with the client write and fills
// holder. What it reads has a cache of its own, made by options: a controller
// begins when all that its cache follows was listed, and pools that OpenYurt
// stored cannot be listed before there is a certificate.
func Setup(mgr ctrl.Manager, write client.Client, options cache.Options, namespace string, holder *Holder) error {
	options.Scheme, options.Mapper, options.HTTPClient = mgr.GetScheme(), mgr.GetRESTMapper(), mgr.GetHTTPClient()
	own, err := cache.New(mgr.GetConfig(), options)
	if err == nil {
		err = mgr.Add(begun{own})
	}
	if err != nil {
		return fmt.Errorf("set up cache of webhookcert: %w", err)
	}
	c := &keeper{
		read: own, write: write, holder: holder,
		secret: types.NamespacedName{Namespace: namespace, Name: Secret},
		names:  []string{Service + "." + namespace + ".svc", Service + "." + namespace, Service, "localhost"},
	}
	everyReplica := false
	secret := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: c.secret}}
	})
	err = ctrl.NewControllerManagedBy(mgr).Named("webhookcert").
		WithOptions(controller.Options{NeedLeaderElection: &everyReplica}).
		WatchesRawSource(source.Kind[client.Object](own, &corev1.Secret{}, secret)).
		WatchesRawSource(source.Kind[client.Object](own, &apiextensionsv1.CustomResourceDefinition{}, secret)).
		WatchesRawSource(source.Kind[client.Object](own, &admissionv1.ValidatingWebhookConfiguration{}, secret)).
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
	trusted, err := c.trust(ctx, &definition, secret.Data[bundleKey])
	if err != nil {
		return reconcile.Result{}, err
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

// trust writes the bundle where API servers look for it, and returns the one
// that all of them had before: the bundle itself, or the first that differs.
func (c *keeper) trust(ctx context.Context, definition *apiextensionsv1.CustomResourceDefinition, bundle []byte) ([]byte, error) {
	trusted := bundle
	if conversion := clientConfig(definition); conversion != nil && !bytes.Equal(conversion.CABundle, bundle) {
		trusted = conversion.CABundle
		if len(bundle) > 0 {
			was := definition.DeepCopy()
			conversion.CABundle = bundle
			if err := c.write.Patch(ctx, definition, client.MergeFrom(was)); err != nil {
				return nil, fmt.Errorf("patch bundle of CustomResourceDefinition: %w", err)
			}
		}
	}
	var checks admissionv1.ValidatingWebhookConfiguration
	if err := c.read.Get(ctx, types.NamespacedName{Name: Checks}, &checks); err != nil {
		if apierrors.IsNotFound(err) {
			return trusted, nil // its coming is an event
		}
		return nil, fmt.Errorf("read ValidatingWebhookConfiguration: %w", err)
	}
	was := checks.DeepCopy()
	for i := range checks.Webhooks {
		if check := &checks.Webhooks[i].ClientConfig; !bytes.Equal(check.CABundle, bundle) {
			trusted, check.CABundle = check.CABundle, bundle
		}
	}
	if len(bundle) == 0 || equality.Semantic.DeepEqual(was.Webhooks, checks.Webhooks) {
		return trusted, nil
	}
	// Webhooks are a list that a merge patch replaces. If somebody else was
	// first, that is an event.
	err := c.write.Patch(ctx, &checks, client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{}))
	if err != nil && !apierrors.IsConflict(err) {
		return nil, fmt.Errorf("patch bundle of ValidatingWebhookConfiguration: %w", err)
	}
	return trusted, nil
}

// clientConfig says how API servers reach the webhook, nil where they do not.
func clientConfig(d *apiextensionsv1.CustomResourceDefinition) *apiextensionsv1.WebhookClientConfig {
	if d.Spec.Conversion == nil || d.Spec.Conversion.Webhook == nil {
		return nil
	}
	return d.Spec.Conversion.Webhook.ClientConfig
}
