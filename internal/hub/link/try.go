package link

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// ErrSlow is returned by Try for an answer that did not begin in time.
var ErrSlow = errors.New("the cloud did not answer in time")

// Try is Forward for a read that somebody else can answer as well: when no
// answer has begun within budget, or none can come, it returns why and has
// written nothing. Once the answer has begun it is streamed as by Forward.
func (l *Link) Try(w http.ResponseWriter, r *http.Request, as Credential, keep Keep, budget time.Duration) error {
	if !as.set {
		return errors.New("no credential was chosen to forward with")
	}
	if !l.Online() {
		return ErrDown
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	timer := time.AfterFunc(budget, func() { cancel(ErrSlow) })
	defer timer.Stop()
	l.metrics.inFlight.Inc()
	defer l.metrics.inFlight.Dec()
	resp, server, err := l.send(outgoing(r, as).WithContext(ctx), as.cred, false)
	if err == nil && !timer.Stop() {
		_ = resp.Body.Close()
		err = ErrSlow
	}
	if err != nil {
		if errors.Is(context.Cause(ctx), ErrSlow) {
			// Budgets shorter than Stall must not hide a black hole.
			if server >= 0 {
				l.suspect(server)
			}
			return fmt.Errorf("%w (%s)", ErrSlow, budget)
		}
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	l.reply(w, r, resp, server, keep)
	return nil
}

// Refuse answers r with the Status that fits an error of Try.
func Refuse(w http.ResponseWriter, r *http.Request, err error) { refuse(w, r, err) }
