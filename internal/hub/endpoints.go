package hub

import (
	"context"
	"net/http"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/endpoint"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// trackEndpoints makes the tracker by which endpoints follow the node's pods.
func (h *Hub) trackEndpoints() {
	h.endpoints = endpoint.New(endpoint.Config{
		Node: h.cfg.NodeName, Online: h.link.Online, Changed: h.link.Changed, Log: h.log, Registerer: h.cfg.Registerer,
		Pending: func() bool { return h.journal.Stats().Status > 0 },
		Each: func(r schema.GroupVersionResource, namespace string, fn func(string, replica.Kind, []byte) error) error {
			return h.replica.Each(r, namespace, fn)
		},
		Refresh: func(r schema.GroupVersionResource, namespace, name string) error {
			return h.replica.Refresh(r, namespace, name)
		},
	})
}

// overlay is what local readers see in place of the cloud's objects.
func (h *Hub) overlay(r schema.GroupVersionResource, key string, k replica.Kind, base []byte) ([]byte, bool) {
	if endpoint.Holds(r) {
		return h.endpoints.Overlay(r, key, k, base)
	}
	return h.journal.Overlay(r, key, k, base)
}

// show lets local readers see what was kept before a restart, before the
// first of them comes.
func (h *Hub) show() {
	h.journal.Show()
	if h.journal.Stats().Status > 0 {
		h.endpoints.Hold()
	}
}

// runEndpoints begins once it is known whether the cloud is there: if it is,
// there is nothing to do.
func (h *Hub) runEndpoints(ctx context.Context) error {
	h.settle(ctx)
	return h.endpoints.Run(ctx)
}

// wrotePod tells the tracker what the kubelet wrote of a pod in the cloud.
func (h *Hub) wrotePod(info request.Info) link.Keep {
	if info.Resource != podsResource || !h.endpoints.Active() {
		return nil
	}
	return func(resp *http.Response) func([]byte) {
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Encoding") != "" {
			return nil
		}
		enc := encodingOf(resp.Header.Get("Content-Type"))
		return func(body []byte) {
			if _, kind, object, err := wire.ReadObject(enc, body); err == nil && kind == "Pod" {
				h.endpoints.Wrote(enc, object)
			}
		}
	}
}
