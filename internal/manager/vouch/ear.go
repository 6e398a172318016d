package vouch

import (
	"context"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/internal/heartbeat"
)

// Ear remembers when a node was last heard, by the manager's own clock: what
// nodes write into their leases is the time by theirs. It is safe for
// concurrent use.
type Ear struct {
	gap time.Duration

	mu    sync.Mutex // guards the following
	began time.Time  // zero: not yet
	nodes map[string]Heard
}

// Heard is when a node was last heard.
type Heard struct {
	uid     types.UID // of the lease
	renewed metav1.MicroTime
	// Own is when the node last spoke for itself, and Any when it did or
	// another vouched for it. Zero: not since the ear began.
	Own, Any time.Time
	// Since is since when it has spoken for itself without a gap.
	Since time.Time
	// Spoke is when a node that is vouched for last spoke for itself, as the
	// manager wrote it down; zero for others.
	Spoke time.Time
}

// slack is how late a renewal may be for any other reason than that one was
// lost, however short the lives of leases are.
const slack = 5 * time.Second

// NewEar returns an ear that has not begun to listen. To it a node that says
// nothing for longer than gap begins anew, and so does one of which a renewal is
// overdue.
func NewEar(gap time.Duration) *Ear { return &Ear{gap: gap, nodes: map[string]Heard{}} }

// Began is since when it listens: its first lease, or the first call of this.
// A replica that stands by hears nothing, for however long.
func (e *Ear) Began(now time.Time) time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.beganLocked(now)
}

func (e *Ear) beganLocked(now time.Time) time.Time {
	if e.began.IsZero() {
		e.began = now
	}
	return e.began
}

// Hear takes the lease of a node as it is now. One that is seen for the first
// time proves nothing: nobody knows how old it is.
func (e *Ear) Hear(lease *coordinationv1.Lease, now time.Time) {
	if lease.Spec.RenewTime == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.beganLocked(now)
	h, known := e.nodes[lease.Name]
	switch {
	case !known || h.uid != lease.UID:
		h.uid = lease.UID
	case h.renewed.Equal(lease.Spec.RenewTime):
		return
	default:
		h.Any = now
		if !ByAnother(lease) {
			if silence := now.Sub(h.Own); silence > e.gap || silence > slack && heartbeat.Due(silence, durationOf(lease)) {
				h.Since = now
			}
			h.Own = now
		}
	}
	h.renewed, h.Spoke = *lease.Spec.RenewTime, time.Time{}
	if m := Remembered(lease); ByAnother(lease) {
		h.Spoke = m.Spoke.Time
	}
	e.nodes[lease.Name] = h
}

// Handler listens to a watch of leases.
func (e *Ear) Handler(now func() time.Time) handler.EventHandler {
	hear := func(obj client.Object) {
		if lease, ok := obj.(*coordinationv1.Lease); ok {
			e.Hear(lease, now())
		}
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, ev event.CreateEvent, _ queue) { hear(ev.Object) },
		UpdateFunc: func(_ context.Context, ev event.UpdateEvent, _ queue) { hear(ev.ObjectNew) },
		DeleteFunc: func(_ context.Context, ev event.DeleteEvent, _ queue) { e.Forget(ev.Object.GetName()) },
	}
}

type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// Forget drops the node of a lease that is gone.
func (e *Ear) Forget(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.nodes, name)
}

// Last returns when the node was last heard.
func (e *Ear) Last(name string) Heard {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.nodes[name]
}
