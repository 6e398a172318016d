package manager

import (
	"context"
	"fmt"
	"net/http"

	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	webhook "sigs.k8s.io/controller-runtime/pkg/webhook/conversion"

	"github.com/yurt-edge/yurt/api/apps/conversion"
	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
	"github.com/yurt-edge/yurt/api/apps/v1beta1"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// reviewLimit is the size of a conversion request. An API server sends a page
// of a list at once, and an object has 1.5 MiB at most.
const reviewLimit = 256 << 20

// setupConversion serves conversions of NodePools at /convert.
func setupConversion(mgr ctrl.Manager) error {
	converter, err := webhook.NewHubSpokeConverter(&v1beta2.NodePool{},
		webhook.NewSpokeConverter(&v1beta1.NodePool{}, into(conversion.StoredToV1beta1), into(conversion.V1beta1ToStored)),
		webhook.NewSpokeConverter(&v1alpha1.NodePool{}, into(conversion.StoredToV1alpha1), into(conversion.V1alpha1ToStored)),
	)(mgr.GetScheme())
	if err != nil {
		return fmt.Errorf("set up conversion: %w", err)
	}
	registry := mgr.GetConverterRegistry()
	if err := registry.RegisterConverter(v1beta2.GroupVersion.WithKind("NodePool").GroupKind(), converter); err != nil {
		return fmt.Errorf("set up conversion: %w", err)
	}
	mgr.GetWebhookServer().Register("/convert", http.MaxBytesHandler(webhook.NewWebhookHandler(mgr.GetScheme(), registry), reviewLimit))
	return nil
}

// into makes a conversion fill an object that has its kind already.
func into[S, D any, P interface {
	*D
	client.Object
}](convert func(*S) (*D, error),
) func(context.Context, *S, P) error {
	return func(_ context.Context, src *S, dst P) error {
		out, err := convert(src)
		if err != nil {
			return err
		}
		kind := dst.GetObjectKind().GroupVersionKind()
		*dst = *out
		dst.GetObjectKind().SetGroupVersionKind(kind)
		return nil
	}
}
