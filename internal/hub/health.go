package hub

import (
	"encoding/json"
	"net/http"
	"net/http/pprof"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/identity"
)

// health serves what tells of the hub itself. Health is open to everybody on
// the node; the rest asks who calls, and the cluster whether they may.
func (h *Hub) health() http.Handler {
	mux := http.NewServeMux()
	for _, path := range []string{"GET /healthz", "GET /livez", "GET /v1/healthz"} {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("OK")) })
	}
	for _, path := range []string{"GET /readyz", "GET /v1/readyz"} {
		mux.HandleFunc(path, h.readyz)
	}
	mux.Handle("GET /metrics", h.guarded(promhttp.HandlerFor(h.cfg.Gatherer, promhttp.HandlerOpts{})))
	mux.Handle("GET /v1/status", h.guarded(http.HandlerFunc(h.status)))
	if h.cfg.Profiling {
		mux.Handle("GET /debug/pprof/", h.guarded(http.HandlerFunc(pprof.Index)))
		mux.Handle("GET /debug/pprof/profile", h.guarded(http.HandlerFunc(pprof.Profile)))
		mux.Handle("GET /debug/pprof/trace", h.guarded(http.HandlerFunc(pprof.Trace)))
	}
	return h.survive(mux)
}

// readyz says whether the hub can do its work, which does not need the cloud.
func (h *Hub) readyz(w http.ResponseWriter, r *http.Request) {
	select {
	case <-h.certs.Ready():
	default:
		http.Error(w, "the hub has no client certificate yet", http.StatusServiceUnavailable)
		return
	}
	if err := h.diskHealth(); err != nil {
		http.Error(w, "store: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write([]byte("OK"))
}

// guarded lets in who may get the path by the cluster's rules.
func (h *Hub) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := h.authn.Authenticate(r)
		if err != nil {
			httpx.WriteStatus(w, r, err)
			return
		}
		if impersonates(r) {
			httpx.WriteStatus(w, r, forbidden("the hub does not impersonate on this port"))
			return
		}
		d, err := h.authz.Authorize(r.Context(), caller, identity.Attributes{Verb: "get", Path: r.URL.Path})
		if err != nil {
			httpx.WriteStatus(w, r, statusOf(err))
			return
		}
		if !d.Allowed {
			httpx.WriteStatus(w, r, forbidden("user "+caller.Name+" may not get "+r.URL.Path+": "+d.Reason))
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (h *Hub) status(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(h.report()) // the client may be gone
}
