package hub

import (
	"context"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/request"
)

const (
	// reaskEvery is how long the hub waits before it asks again about watches
	// of which the cloud said nothing.
	reaskEvery = 5 * time.Second
	// reaskAtOnce bounds the questions under way.
	reaskAtOnce = 8
)

// watches are the open watches that the replica serves to others than the
// node. A watch goes on through a cut of the link, and is asked about again
// when the link is back: its caller's rights may have been revoked meanwhile.
type watches struct {
	mu   sync.Mutex // guards open and the asked of each
	open map[*openWatch]struct{}
}

type openWatch struct {
	r      *http.Request
	caller *identity.Caller
	info   request.Info
	end    context.CancelFunc
	asked  time.Time // when the question was asked that allowed it
}

// add notes a watch. The returned request is the one to serve: it ends when
// the watch is no longer allowed. done takes the watch off the list.
func (w *watches) add(r *http.Request, caller *identity.Caller, info request.Info, asked time.Time) (served *http.Request, done func()) {
	ctx, cancel := context.WithCancel(r.Context())
	o := &openWatch{r: r, caller: caller, info: info, end: cancel, asked: asked}
	w.mu.Lock()
	if w.open == nil {
		w.open = map[*openWatch]struct{}{}
	}
	w.open[o] = struct{}{}
	w.mu.Unlock()
	return r.WithContext(ctx), func() {
		cancel()
		w.mu.Lock()
		delete(w.open, o)
		w.mu.Unlock()
	}
}

// olderThan returns the watches that were last asked about before then.
func (w *watches) olderThan(then time.Time) []*openWatch {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*openWatch
	for o := range w.open {
		if o.asked.Before(then) {
			out = append(out, o)
		}
	}
	return out
}

func (w *watches) confirm(o *openWatch, asked time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	o.asked = asked
}

// reask asks about open watches whenever the link has come back, until the
// cloud has answered about each.
func (h *Hub) reask(ctx context.Context) error {
	for {
		changed := h.link.Changed()
		var again <-chan time.Time
		if state := h.link.State(); state.Up && !h.reaskOnce(ctx, state.Since) {
			again = time.After(reaskEvery)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}

// reaskOnce asks about all watches from before the link came up, ends those
// that are no longer allowed, and reports whether nothing is left to ask.
func (h *Hub) reaskOnce(ctx context.Context, contact time.Time) bool {
	questions, ctx := errgroup.WithContext(ctx)
	questions.SetLimit(reaskAtOnce)
	for _, o := range h.watches.olderThan(contact) {
		questions.Go(func() error {
			began := time.Now()
			allowed, known := h.stillMay(ctx, o)
			switch {
			case !known:
			case allowed:
				h.watches.confirm(o, began)
			default:
				h.metrics.refused.WithLabelValues("revoked").Inc()
				h.log.Info("watch ended: its caller may no longer", "caller", o.caller.Name, "watch", o.info.String())
				o.end()
			}
			return nil
		})
	}
	_ = questions.Wait() // they give no errors
	return len(h.watches.olderThan(contact)) == 0
}

// stillMay asks the cloud who the caller of a watch is and whether it may.
// What the cloud did not say is not known.
func (h *Hub) stillMay(ctx context.Context, o *openWatch) (allowed, known bool) {
	caller := o.caller
	if caller != h.self { // whom root is by the plain listener
		var err error
		caller, err = h.authn.Authenticate(o.r)
		switch {
		case apierrors.IsUnauthorized(err):
			return false, true
		case err != nil || caller.Remembered:
			return false, false
		}
	}
	d, err := h.authz.Authorize(ctx, caller, attributes(o.info))
	return d.Allowed, err == nil && !d.Remembered
}
