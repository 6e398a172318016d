package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// ErrSlow is returned by Try for an answer that did not come in time.
var ErrSlow = errors.New("the cloud did not answer in time")

// tryAhead is how much of an answer must have come within the budget of Try
// if not all of it has: a link of half a megabit carries that in two seconds.
const tryAhead = 128 << 10

// Try is Forward for a request that somebody else can answer as well: when
// the answer, or its first tryAhead bytes, has not come within budget, or none
// can come, it returns why and has written nothing. A late answer makes the
// link weak, which ends other tries as well.
func (l *Link) Try(w http.ResponseWriter, r *http.Request, as Credential, keep Keep, budget time.Duration) error {
	if !as.set {
		return errors.New("no credential was chosen to forward with")
	}
	if !l.Online() {
		return ErrDown
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	giveUp := func() { cancel(ErrSlow) }
	trying, ok := l.tries.add(giveUp)
	if !ok {
		return ErrDown
	}
	defer l.tries.remove(trying)
	begun := time.Now()
	timer := time.AfterFunc(budget, func() {
		giveUp()
		l.late()
	})
	defer timer.Stop()
	l.metrics.inFlight.Inc()
	defer l.metrics.inFlight.Dec()
	resp, server, err := l.send(outgoing(r, as).WithContext(ctx), as.cred, short)
	if err == nil {
		defer func() { _ = resp.Body.Close() }()
		if err := unproved(as, resp); err != nil {
			return err
		}
		head := heads.Get().(*bytes.Buffer) //nolint:errcheck // The pool holds nothing else.
		defer putHead(head)
		if err = readAhead(resp, head); err != nil {
			err = l.blame(ctx, nil, server, err)
		}
	}
	l.tries.remove(trying) // what has begun is not broken off
	if !timer.Stop() || errors.Is(context.Cause(ctx), ErrSlow) {
		// Budgets shorter than Stall must not hide a black hole.
		if server >= 0 {
			l.suspect(server)
		}
		return fmt.Errorf("%w (%s)", ErrSlow, budget)
	}
	if err != nil {
		return err
	}
	l.answered(time.Since(begun))
	l.reply(w, r, resp, server, keep)
	return nil
}

// Patience is how long an answer is worth waiting for, by what answers took of
// late, and at most limit.
func (l *Link) Patience(limit time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pace.patience(limit)
}

var heads = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func putHead(b *bytes.Buffer) {
	if b.Cap() <= 2*tryAhead {
		b.Reset()
		heads.Put(b)
	}
}

// readAhead takes the beginning of a body into head and puts both together
// again as the body.
func readAhead(resp *http.Response, head *bytes.Buffer) error {
	n, err := io.CopyN(head, resp.Body, tryAhead)
	if err != nil && err != io.EOF { //nolint:errorlint // CopyN returns it bare.
		return err
	}
	if n < tryAhead {
		if len(resp.Trailer) == 0 {
			resp.ContentLength = n // all is known: it needs no flushes
		}
		resp.Body = bodyOf{head, resp.Body}
		return nil
	}
	resp.Body = bodyOf{io.MultiReader(head, resp.Body), resp.Body}
	return nil
}

type bodyOf struct {
	io.Reader
	io.Closer
}

// late takes note of an answer that somebody waited for in vain.
func (l *Link) late() {
	l.judge(func(now time.Time) bool { return l.pace.late(now) })
}

func (l *Link) answered(took time.Duration) {
	l.judge(func(now time.Time) bool { return l.pace.answered(now, took) })
}

// judge ends all tries when by makes the link slow.
func (l *Link) judge(by func(now time.Time) bool) {
	l.mu.Lock()
	turned := by(time.Now())
	if turned {
		l.slow.Store(true)
	}
	l.mu.Unlock()
	if turned {
		l.metrics.slowed.Inc()
		l.cfg.Log.Info("link is slow: reads are answered from the replica")
		l.tries.end()
	}
}

// Sample copies r, which somebody else answers, to the cloud in the background
// if it is time to see whether the weak link answers within budget again. Keep
// learns from the answer as it would from Try's.
func (l *Link) Sample(r *http.Request, as Credential, keep Keep, budget time.Duration) {
	done, ok := l.sampling()
	if !ok {
		return
	}
	// The copy outlives r.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), budget)
	out := outgoing(r, as).WithContext(ctx)
	go func() { // ends with budget; Run waits for it
		defer cancel()
		done(l.sample(out, as, keep) == nil)
	}()
}

// Sampled is Sample for a request that the hub makes by itself, by ask, which
// may take longer than budget and is made in any case.
func (l *Link) Sampled(budget time.Duration, ask func() error) error {
	done, ok := l.sampling()
	if !ok {
		return ask()
	}
	begun := time.Now()
	err := ask()
	done(err == nil && time.Since(begun) <= budget)
	return err
}

// sampling begins a copy, which done ends.
func (l *Link) sampling() (done func(inTime bool), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped || !l.pace.copy(time.Now()) {
		return nil, false
	}
	l.copies.Add(1)
	return func(inTime bool) {
		defer l.copies.Done()
		l.mu.Lock()
		turned := l.pace.copied(time.Now(), inTime)
		if turned {
			l.slow.Store(false)
		}
		l.mu.Unlock()
		if turned {
			l.cfg.Log.Info("link is slow no more")
		}
	}, true
}

func (l *Link) sample(out *http.Request, as Credential, keep Keep) error {
	resp, server, err := l.send(out, as.cred, short)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	var kept func([]byte)
	if keep != nil {
		kept = keep(resp)
	}
	held := &hold{total: &l.held, on: kept != nil}
	defer held.release()
	if err := copyBody(io.Discard, resp.Body, func() error { return nil }, held); err != nil {
		return l.blame(out.Context(), nil, server, err)
	}
	if held.on {
		kept(held.body)
	}
	return nil
}

// Refuse answers r with the Status that fits an error of Try.
func Refuse(w http.ResponseWriter, r *http.Request, err error) { refuse(w, r, err) }
