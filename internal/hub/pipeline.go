package hub

import (
	"context"
	"errors"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/journal"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/request"
)

// authenticate tells who sent a request, in the way of the listener that it
// came by. Its errors can be sent as they are.
type authenticate func(*http.Request) (*identity.Caller, error)

// handler is the way of a request through the hub. Watches and other long
// requests end with life, so that a stop waits for answers only.
func (h *Hub) handler(life context.Context, who authenticate) http.Handler {
	var handler http.Handler = http.HandlerFunc(h.route)
	for _, stage := range []func(http.Handler) http.Handler{ // innermost first
		h.limit(life),   // one caller cannot starve the others: see limit.go
		h.resolve,       // everything below reads request.From(ctx)
		h.identify(who), // nobody unknown gets any further
		h.observe,       // counts what the client got, refusals too
		h.survive,       // outermost: a bug costs one request, not the node's API
	} {
		handler = stage(handler)
	}
	return handler
}

func (h *Hub) survive(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		guard := httpx.Protect(w, r, answerPatience)
		defer guard.End()
		defer func() {
			cause := recover()
			if cause == nil {
				return
			}
			if err, ok := cause.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(cause) // the way to break off an answer
			}
			h.metrics.panics.Inc()
			h.log.Error("request panicked", "path", r.URL.Path, "cause", daemon.PanicCause(cause), "stack", string(debug.Stack()))
			if guard.Begun() {
				panic(http.ErrAbortHandler) // half an answer must not look whole
			}
			httpx.WriteStatus(guard, r, apierrors.NewInternalError(errors.New("the hub failed on this request")))
		}()
		next.ServeHTTP(guard, r)
	})
}

func (h *Hub) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.metrics.inFlight.Inc()
		defer h.metrics.inFlight.Dec()
		next.ServeHTTP(w, r)
	})
}

func (h *Hub) identify(who authenticate) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, err := who(r)
			if err != nil {
				h.metrics.refused.WithLabelValues("unauthenticated").Inc()
				httpx.WriteStatus(w, r, err)
				return
			}
			if caller.Certificate && impersonates(r) {
				h.metrics.refused.WithLabelValues("impersonation").Inc()
				httpx.WriteStatus(w, r, forbidden("the hub does not impersonate for callers with a client certificate; use a token"))
				return
			}
			if h.isNode(caller) {
				httpx.KeepConn(r.Context())
			}
			next.ServeHTTP(w, r.WithContext(withCaller(r.Context(), caller)))
		})
	}
}

// forbidden is a refusal that concerns no object.
func forbidden(why string) error {
	err := apierrors.NewForbidden(podsResource.GroupResource(), "", nil)
	err.ErrStatus.Details, err.ErrStatus.Message = nil, "yurthub: "+why
	return err
}

func impersonates(r *http.Request) bool {
	for name := range r.Header {
		if strings.HasPrefix(name, "Impersonate-") {
			return true
		}
	}
	return false
}

func (h *Hub) resolve(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.RequestURI) > maxURL {
			h.refuse(w, r, "url", tooLong())
			return
		}
		info, err := request.Resolve(r)
		if err != nil {
			httpx.WriteStatus(w, r, apierrors.NewBadRequest(err.Error()))
			return
		}
		next.ServeHTTP(w, r.WithContext(request.With(r.Context(), info)))
	})
}

// isNode reports whether the caller is this node's own user: the kubelet. The
// name alone does not make it one: to the cloud a node is a node by its group,
// and with the hub's certificate the caller would have it.
func (h *Hub) isNode(c *identity.Caller) bool {
	return c.Certificate && c.Name == h.self.Name && slices.Contains(c.Groups, user.NodesGroup)
}

// as returns the credential with which the caller's requests are forwarded.
// The hub's certificate stands for nobody but the node.
func (h *Hub) as(c *identity.Caller) link.Credential {
	switch {
	case h.isNode(c):
		return link.AsNode()
	case c.Certificate:
		// The API server adds system:authenticated by itself; to ask for it
		// would need a right of its own.
		groups := slices.DeleteFunc(slices.Clone(c.Groups), func(g string) bool { return g == user.AllAuthenticated })
		return link.AsUser(&user.DefaultInfo{Name: c.Name, UID: c.UID, Groups: groups, Extra: c.Extra})
	}
	return link.AsBearer()
}

// route sends a request to the part that answers it.
func (h *Hub) route(w http.ResponseWriter, r *http.Request) {
	caller, info := callerFrom(r.Context()), request.From(r.Context())
	as := h.as(caller)
	if impersonates(r) {
		// Whose rights count is for the API server to say.
		h.forward(w, r, caller, as)
		return
	}
	if h.isNode(caller) && info.IsResource && !info.Upgrade {
		if route := h.nodeRoute(info); route != nil {
			route(w, r, as)
			return
		}
	}
	switch {
	case info.Reads():
		h.read(w, r, caller, as)
	case !info.IsResource && r.Method == http.MethodGet && isDocument(info.Path):
		h.document(w, r, caller, as)
	default:
		h.forward(w, r, caller, as)
	}
}

// nodeRoute returns what answers a request of the node's own user that must
// have an answer while the cloud is away. Nil: nothing special.
func (h *Hub) nodeRoute(info request.Info) func(http.ResponseWriter, *http.Request, link.Credential) {
	group, resource := info.Resource.Group, info.Resource.Resource
	switch {
	case h.isOwnLease(info):
		return h.lease
	case group == "" && resource == "serviceaccounts" && info.Subresource == "token" && info.Verb == "create":
		return h.token
	case group == "" && resource == "nodes" && info.Verb == "create":
		return h.register
	case writesCSINode(info):
		return h.csiNode
	case info.Subresource == "status" && info.Verb == "patch" && journal.HasStatus(info.Resource):
		return h.patchStatus
	case info.Verb == "create" && isReview(info):
		return h.review
	case writesEvent(info):
		// The node's own only: what is journalled is delivered with its
		// credential, which is lent to nobody.
		return h.event
	}
	return nil
}

func (h *Hub) isOwnLease(info request.Info) bool {
	return info.Resource.Group == "coordination.k8s.io" && info.Resource.Resource == "leases" &&
		info.Namespace == "kube-node-lease" && (info.Name == h.cfg.NodeName || info.Verb == "create")
}

func writesCSINode(info request.Info) bool {
	return info.Resource.Group == "storage.k8s.io" && info.Resource.Resource == "csinodes" &&
		(info.Verb == "create" || info.Verb == "update" || info.Verb == "patch")
}

func isReview(info request.Info) bool {
	group, resource := info.Resource.Group, info.Resource.Resource
	return group == "authorization.k8s.io" && resource == "subjectaccessreviews" ||
		group == "authentication.k8s.io" && resource == "tokenreviews"
}

func writesEvent(info request.Info) bool {
	return isEvent(info) && (info.Verb == "create" || info.Verb == "patch")
}

func isEvent(info request.Info) bool {
	return info.Resource.Resource == "events" && info.Subresource == "" &&
		(info.Resource.Group == "" || info.Resource.Group == "events.k8s.io")
}

// isDocument tells the paths that say the same to everybody.
func isDocument(path string) bool {
	return path == "/version" || path == "/api" || path == "/apis" ||
		strings.HasPrefix(path, "/api/") || strings.HasPrefix(path, "/apis/") || strings.HasPrefix(path, "/openapi/")
}

func (h *Hub) forward(w http.ResponseWriter, r *http.Request, c *identity.Caller, as link.Credential) {
	if c.Local {
		httpx.WriteStatus(w, r, apierrors.NewUnauthorized(
			"yurthub: this token was made while the cloud was away and is good for reads on this node only; its file is renewed soon"))
		return
	}
	info := request.From(r.Context())
	if !h.link.Online() {
		httpx.WriteStatus(w, r, h.away(info))
		return
	}
	h.link.Forward(w, r, as, h.doubt(c))
}

// doubt returns a link.Keep that notices when the cloud no longer accepts the
// caller's token.
func (h *Hub) doubt(c *identity.Caller) link.Keep {
	return func(resp *http.Response) func([]byte) {
		if c.Token != "" && resp.StatusCode == http.StatusUnauthorized {
			h.authn.Doubt(c.Token)
		}
		return nil
	}
}
