package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/turn"
)

// What one request may be. Header sizes, connections and HTTP/2 streams are
// bounded by httpx.Server.
const (
	maxURL = 16 << 10
	// maxBody is the API server's own limit.
	maxBody = 3 << 20
	// bodyPatience is how long a body may stand still.
	bodyPatience = 30 * time.Second
	// answerPatience is how long a client may take for a piece of its
	// answer, followPatience the same where a person may be reading.
	answerPatience = 30 * time.Second
	followPatience = 10 * time.Minute
)

// What callers may have in flight. A pod that shares its ServiceAccount with
// others has its own room.
const (
	maxRequests      = 100 // of one caller, other than watches
	maxWatches       = 500 // of one caller
	maxTotalRequests = 600 // of all but the node
	maxTotalWatches  = 2000
)

// lanes bound what callers have in flight. The node's own user has a lane that
// nobody else can fill, and takes nobody's turn.
type lanes struct {
	turns *turn.Queue // for heavy work of all but the node

	mu     sync.Mutex // guards the following
	busy   map[string]*lane
	others lane // in flight for all callers but the node
}

// lane counts by kind: requests and watches.
type lane [2]int

func newLanes() *lanes {
	// The other processors stay free for the node and for short requests.
	return &lanes{turns: turn.New(max(1, runtime.GOMAXPROCS(0)/2)), busy: map[string]*lane{}}
}

// enter takes a place and returns the function that gives it back, or which
// limit there is none by.
func (l *lanes) enter(who string, watch, node bool) (leave func(), limit string) {
	kind, most, total := 0, maxRequests, maxTotalRequests
	if watch {
		kind, most, total = 1, maxWatches, maxTotalWatches
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.busy[who]
	switch {
	case own != nil && own[kind] >= most:
		return nil, fmt.Sprintf("this caller has %d of them in flight", most)
	case !node && l.others[kind] >= total:
		return nil, fmt.Sprintf("callers have %d of them in flight", total)
	case own == nil:
		own = &lane{}
		l.busy[who] = own
	}
	own[kind]++
	if !node {
		l.others[kind]++
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		own[kind]--
		if !node {
			l.others[kind]--
		}
		if *own == (lane{}) {
			delete(l.busy, who)
		}
	}, ""
}

// laneOf names the lane of a caller: a pod's, where its token names the pod.
func laneOf(c *identity.Caller) string {
	if pod := c.Extra["authentication.kubernetes.io/pod-uid"]; len(pod) == 1 {
		return c.Name + "/" + pod[0]
	}
	return c.Name
}

// limit is the stage that bounds what a caller may send, hold open and keep
// busy. What it refuses may be asked again: the node's memory and processor
// are shared, not the caller's fault alone.
//
//nolint:contextcheck // life ends what r's own context does not
func (h *Hub) limit(life context.Context) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, info := callerFrom(r.Context()), request.From(r.Context())
			node, long := h.isNode(caller), isLong(info)
			who := laneOf(caller)
			leave, full := h.lanes.enter(who, long, node)
			if leave == nil {
				h.refuse(w, r, "limit", tooMany(1, "too many requests: %s", full))
				return
			}
			defer leave()
			if !node && isHeavy(info) && h.memory.short() {
				h.refuse(w, r, "memory", tooMany(5, "the hub is short of memory and begins no lists and watches but the node's"))
				return
			}
			if info.Subresource != "proxy" && !info.Upgrade {
				if err := httpx.LimitBody(r, maxBody, bodyPatience); err != nil {
					h.refuse(w, r, "body", err)
					return
				}
			}
			if g, ok := w.(*httpx.Guard); ok && (info.Subresource == "log" || info.Subresource == "proxy") {
				g.SetPatience(followPatience)
			}
			ctx := r.Context()
			if !node {
				ctx = h.lanes.turns.With(ctx, who)
			}
			if long {
				var cancel context.CancelFunc
				ctx, cancel = context.WithCancel(ctx)
				defer cancel()
				defer context.AfterFunc(life, cancel)()
			}
			next.ServeHTTP(w, r.WithContext(ctx))
		})
	}
}

// isLong tells requests that may stay for as long as the client likes.
func isLong(info request.Info) bool {
	return info.Verb == "watch" || info.Upgrade || info.Subresource == "log" || info.Subresource == "proxy"
}

// isHeavy tells requests whose answers may be large.
func isHeavy(info request.Info) bool {
	return info.Verb == "list" || info.Verb == "watch" || !info.IsResource
}

func (h *Hub) refuse(w http.ResponseWriter, r *http.Request, reason string, err error) {
	h.metrics.refused.WithLabelValues(reason).Inc()
	httpx.WriteStatus(w, r, err)
}

// unconnected counts a connection that there was no room for.
func (h *Hub) unconnected(limit string) { h.metrics.refused.WithLabelValues(limit).Inc() }

func tooMany(after int, format string, args ...any) error {
	return apierrors.NewTooManyRequests(fmt.Sprintf(format, args...), after)
}

func tooLong() error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusRequestURITooLong, Reason: metav1.StatusReasonBadRequest,
		Message: fmt.Sprintf("the URL is longer than %d bytes: use fewer or shorter selectors", maxURL),
	}}
}

// bodyError is the answer to a body that could not be read.
func bodyError(err error) error {
	if status := apierrors.APIStatus(nil); errors.As(err, &status) {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return apierrors.NewBadRequest("the request's body ended early")
	}
	return apierrors.NewBadRequest(fmt.Sprintf("read body: %v", err))
}
