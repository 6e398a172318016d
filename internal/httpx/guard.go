package httpx

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// drainBudget is how long a connection is read on for what is left of a body
// that nobody wants, before it is closed.
const drainBudget = time.Second

// Guard is a ResponseWriter that gives up on a client that takes nothing of
// its answer for Patience, and knows whether an answer has begun. Make one
// with Protect. It is used by one handler at a time.
type Guard struct {
	http.ResponseWriter
	begun   bool
	control *http.ResponseController
	writes  alarm
	body    *body // nil: the request has none
}

// Protect puts a guard between a handler and its client. Both may take and
// send as slowly as they like as long as they go on: patience bounds the wait
// for each piece. Call End when the handler has returned.
func Protect(w http.ResponseWriter, r *http.Request, patience time.Duration) *Guard {
	g := &Guard{ResponseWriter: w, control: http.NewResponseController(w)}
	g.writes = alarm{patience: patience, ring: func() { _ = g.control.SetWriteDeadline(time.Now()) }}
	if r.Body != nil && r.Body != http.NoBody {
		g.body = &body{ReadCloser: r.Body, left: -1}
		g.body.reads = alarm{ring: func() { _ = g.control.SetReadDeadline(time.Now()) }}
		r.Body = g.body
	}
	return g
}

// SetPatience changes how long a client may take for a piece of its answer.
func (g *Guard) SetPatience(d time.Duration) { g.writes.patience = d }

// Begun reports whether the header of the answer is out.
func (g *Guard) Begun() bool { return g.begun }

// End takes the guard off. What is left of the request's body is waited for
// only briefly.
func (g *Guard) End() {
	g.writes.end()
	if g.body == nil {
		return
	}
	g.body.reads.end()
	if !g.body.done.Load() {
		// The server reads on, so that the connection can be used again.
		_ = g.control.SetReadDeadline(time.Now().Add(drainBudget))
	}
}

// WriteHeader passes the header on.
func (g *Guard) WriteHeader(code int) {
	g.begun = g.begun || code >= 200
	g.ResponseWriter.WriteHeader(code)
}

// Write passes a piece of the answer on.
func (g *Guard) Write(p []byte) (int, error) {
	g.begun = true
	g.writes.set()
	defer g.writes.stop()
	return g.ResponseWriter.Write(p)
}

// FlushError sends what was written.
func (g *Guard) FlushError() error {
	g.begun = true
	g.writes.set()
	defer g.writes.stop()
	return g.control.Flush()
}

// Unwrap lets [http.ResponseController] find the writer below.
func (g *Guard) Unwrap() http.ResponseWriter { return g.ResponseWriter }

// alarm rings when something takes longer than patience. It costs a timer and
// no system call while nothing does.
type alarm struct {
	patience time.Duration
	ring     func()

	mu    sync.Mutex // guards the following; held while ringing
	timer *time.Timer
	armed bool
}

func (a *alarm) set() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed = true
	if a.timer != nil {
		a.timer.Reset(a.patience)
		return
	}
	a.timer = time.AfterFunc(a.patience, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.armed {
			a.ring()
		}
	})
}

func (a *alarm) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed = false
	a.timer.Stop()
}

// end makes sure that the alarm does not ring any more: the connection may be
// in other hands.
func (a *alarm) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed, a.ring = false, func() {}
	if a.timer != nil {
		a.timer.Stop()
	}
}

// body is a request's body within bounds.
type body struct {
	io.ReadCloser
	reads alarm
	limit int64
	left  int64       // of limit; negative: there is none
	err   error       // that ended it
	done  atomic.Bool // read to its end
}

// LimitBody bounds the body of a request whose writer is a Guard: to size
// bytes, of which the next must come within patience. A body that is known to
// be larger is refused at once. Readers get a status error, 413 or 408.
func LimitBody(r *http.Request, size int64, patience time.Duration) error {
	b, ok := r.Body.(*body)
	if !ok {
		return nil
	}
	b.limit, b.left, b.reads.patience = size, size, patience
	if r.ContentLength > size {
		return b.tooLarge()
	}
	return nil
}

func (b *body) tooLarge() error {
	return apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("limit is %d", b.limit))
}

func (b *body) tooSlow() error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusRequestTimeout, Reason: metav1.StatusReasonTimeout,
		Message: fmt.Sprintf("the request's body stood still for %s", b.reads.patience),
	}}
}

// Read is one of the body below, within bounds.
func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.left >= 0 && int64(len(p)) > b.left+1 {
		p = p[:b.left+1] // one more tells whether there is more
	}
	if b.reads.patience > 0 {
		b.reads.set()
		defer b.reads.stop()
	}
	n, err := b.ReadCloser.Read(p)
	switch {
	case b.left >= 0 && int64(n) > b.left:
		n, err = int(b.left), b.tooLarge()
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = b.tooSlow()
	case err == io.EOF: //nolint:errorlint // Read returns it bare.
		b.done.Store(true)
	}
	if b.left >= 0 {
		b.left -= int64(n)
	}
	b.err = err
	return n, err
}
