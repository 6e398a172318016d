package accessfilter

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
	"k8s.io/kube-openapi/pkg/validation/spec"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/clusterschema"
)

// Path is where API servers ask about an AccessFilter.
const Path = "/validate-accessfilter"

const (
	// reviewLimit is the size of a question: an object, as it was and as it is
	// to be, which has 1.5 MiB at most.
	reviewLimit = 4 << 20
	// budget bounds each request to the API server for a check.
	budget = 5 * time.Second
	// atOnce is how many are checked at once: anybody in the cloud can ask.
	atOnce = 2
	// mostResources is what the type allows.
	mostResources = 16
)

var errBusy = errors.New("too many AccessFilters are being checked; try again")

// Serve checks AccessFilters on the manager's webhook server, in each replica.
func Serve(mgr ctrl.Manager) error {
	cfg := rest.CopyConfig(mgr.GetConfig())
	cfg.Timeout = budget
	client, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return fmt.Errorf("set up check of AccessFilters: %w", err)
	}
	c := &checker{clusterschema.New(client, mgr.GetRESTMapper()), admission.NewDecoder(mgr.GetScheme()), make(chan struct{}, atOnce)}
	mgr.GetWebhookServer().Register(Path, http.MaxBytesHandler(&webhook.Admission{Handler: c}, reviewLimit))
	return nil
}

type checker struct {
	schemas *clusterschema.Source
	decoder admission.Decoder
	places  chan struct{} // holds one for each that is being checked
}

// Handle answers whether an AccessFilter may be written.
func (c *checker) Handle(ctx context.Context, req admission.Request) admission.Response {
	var f v1alpha1.AccessFilter
	if err := c.decoder.Decode(req, &f); err != nil {
		return admission.Errored(http.StatusBadRequest, fmt.Errorf("read AccessFilter: %w", err))
	}
	if n := len(f.Spec.Resources); n > mostResources {
		return admission.Denied(fmt.Sprintf("spec.resources has %d entries, more than %d", n, mostResources))
	}
	select {
	case c.places <- struct{}{}:
		defer func() { <-c.places }()
	case <-ctx.Done():
		return admission.Errored(http.StatusTooManyRequests, errBusy)
	}
	var warnings []string
	err := accessfilter.Check(&f, func(gvr schema.GroupVersionResource) (*spec.Schema, error) {
		s, err := c.schemas.Of(gvr)
		if errors.Is(err, resolver.ErrSchemaNotFound) {
			warnings = append(warnings, fmt.Sprintf("expressions were not checked against the fields of %s: %v", gvr, err))
			return nil, nil
		}
		return s, err
	})
	if bad, ok := errors.AsType[accessfilter.Problems](err); ok {
		status := apierrors.NewInvalid(v1alpha1.GroupVersion.WithKind("AccessFilter").GroupKind(), f.Name, bad.Fields()).Status()
		return admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{Result: &status}}
	}
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, fmt.Errorf("check AccessFilter %s: %w", f.Name, err))
	}
	return admission.Allowed("").WithWarnings(warnings...)
}
