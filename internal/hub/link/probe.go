package link

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"
)

// maxProbes bounds the probes of one server under way at the same time. In a
// black hole each takes Patience to fail, and one sets out every Retry, so
// that the first packet after the link's return is never far.
const maxProbes = 5

// watchOver probes server i when the tracker wants it, until ctx ends.
func (l *Link) watchOver(ctx context.Context, i int) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, maxProbes)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.servers[i].wake:
		case <-timer.C:
		}
		wait, gentle := l.next(i, time.Now())
		if wait > 0 {
			timer.Reset(wait)
			continue
		}
		timer.Reset(0)
		select {
		case slots <- struct{}{}:
		default:
			timer.Reset(l.cfg.Budgets.Retry)
			continue
		}
		started, connect := l.begin(i)
		wg.Go(func() {
			defer func() { <-slots }()
			if gentle && l.ping(ctx, i) {
				return
			}
			l.probe(ctx, i, started, connect)
		})
	}
}

// next returns how long server i need not be probed, and whether a request
// on a pooled connection will do when the time has come.
func (l *Link) next(i int, now time.Time) (wait time.Duration, gentle bool) {
	heard := l.heardAt(i)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tracker.hear(i, heard)
	s := &l.tracker.servers[i]
	return s.due.Sub(now), s.healthy && !s.suspected
}

func (l *Link) begin(i int) (started time.Time, connect time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	return now, l.tracker.start(i, now, 0.8+0.4*rand.Float64())
}

// suspect tells the prober of server i that something may be wrong.
func (l *Link) suspect(i int) {
	l.mu.Lock()
	due := l.tracker.suspect(i, time.Now())
	l.mu.Unlock()
	if due {
		l.wake(i)
	}
}

// wake makes the prober of server i look at the tracker again.
func (l *Link) wake(i int) {
	select {
	case l.servers[i].wake <- struct{}{}:
	default:
	}
}

// ping asks server i for a sign of life on a connection that is open
// already. It costs some hundred bytes, a probe ten times that.
func (l *Link) ping(ctx context.Context, i int) bool {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Budgets.Stall)
	defer cancel()
	s := l.lanes.Load()
	for _, cred := range []credential{node, bearer} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+l.servers[i].addr+readyPath(l.servers[i].url), nil)
		if err != nil {
			return false
		}
		req.Host = l.servers[i].url.Host
		asked := time.Now()
		resp, err := s.by[cred].stream.RoundTrip(req)
		if _, ok := errors.AsType[*credentialError](err); ok {
			continue
		}
		if err != nil {
			return false
		}
		l.tell(resp.Header, asked)
		v, _ := judge(resp)
		_ = resp.Body.Close()
		return v == alive
	}
	return false
}

// probe finds out on a fresh connection whether server i can be reached and
// serves, and reports what it found.
func (l *Link) probe(ctx context.Context, i int, started time.Time, patience time.Duration) {
	v, connected, reason := l.look(ctx, i, patience)
	if ctx.Err() != nil {
		return
	}
	l.report(i, started, v, connected, reason)
}

func (l *Link) report(i int, started time.Time, v verdict, connected time.Duration, reason string) {
	reason = l.servers[i].addr + ": " + reason
	heard := l.heardAt(i)
	l.mu.Lock()
	l.tracker.hear(i, heard)
	from := l.tracker.state
	now := time.Now()
	turned := l.tracker.report(i, started, now, v, connected, reason)
	state := l.tracker.state
	l.servers[i].healthy.Store(l.tracker.servers[i].healthy)
	var old *lanes
	if turned {
		l.up.Store(state.Up)
		if !state.Up {
			old = l.lanes.Swap(l.newLanesLocked())
		}
		close(l.changed)
		l.changed = make(chan struct{})
	}
	l.mu.Unlock()

	l.wake(i)
	l.metrics.probed(v)
	if !turned {
		return
	}
	l.metrics.turned()
	if old != nil {
		old.cut()
		l.cfg.Log.Warn("link is down", "reason", state.Reason, "was_up_for", state.Since.Sub(from.Since))
		return
	}
	l.cfg.Log.Info("link is up", "reason", state.Reason, "was_down_for", state.Since.Sub(from.Since))
}

// look makes a fresh connection to server i and asks whether it is ready.
func (l *Link) look(ctx context.Context, i int, patience time.Duration) (v verdict, connected time.Duration, reason string) {
	begun := time.Now()
	raw, err := race(ctx, l.servers[i].addr, patience)
	if err != nil {
		return silence, 0, err.Error()
	}
	connected = time.Since(begun)
	defer func() { _ = raw.Close() }()

	ctx, cancel := context.WithTimeout(ctx, l.cfg.Budgets.Answer)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	cred := node
	if _, err := l.cfg.ClientCertificate(); err != nil {
		cred = bearer
	}
	d := dialer{link: l, cred: cred, tickets: l.ticketsOf(cred)}
	t, err := d.handshake(ctx, &conn{Conn: raw, traffic: &l.traffic[cred], link: l, heard: &l.servers[i].heard}, i, []string{"http/1.1"})
	if err != nil {
		return l.why(ctx, err)
	}
	asked := time.Now()
	if _, err := fmt.Fprintf(t, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: yurthub\r\nConnection: close\r\n\r\n",
		readyPath(l.servers[i].url), l.servers[i].url.Host); err != nil {
		return l.why(ctx, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(t), nil)
	if err != nil {
		return l.why(ctx, err)
	}
	defer func() { _ = resp.Body.Close() }()
	v, reason = judge(resp)
	if v == alive {
		l.told.Store(0) // a link that returns tells the time at once
		l.tell(resp.Header, asked)
	}
	return v, connected, reason
}

// hedge is how much later than the first the second try of a probe sets out.
const hedge = 400 * time.Millisecond

// race connects to addr by the faster of two tries, because one lost packet
// costs a second and must not pass for a cut.
func race(ctx context.Context, addr string, patience time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result, 2)
	try := func() {
		c, err := connect(ctx, addr, patience)
		results <- result{c, err}
	}
	go try()
	tries := 1
	second := time.NewTimer(hedge)
	defer second.Stop()
	select {
	case r := <-results:
		return r.conn, r.err // an answer, whatever it is
	case <-second.C:
		go try()
		tries++
	}
	first := <-results
	if first.err == nil {
		cancel()
	}
	for range tries - 1 {
		if other := <-results; first.err != nil && other.err == nil {
			first = other
		} else if other.err == nil {
			_ = other.conn.Close()
		}
	}
	return first.conn, first.err
}

// why tells who does not satisfy us from who does not answer at all.
func (l *Link) why(ctx context.Context, err error) (verdict, time.Duration, string) {
	var record tls.RecordHeaderError
	var cert *tls.CertificateVerificationError
	switch {
	case ctx.Err() != nil:
		return silence, 0, fmt.Sprintf("no answer within %s of connecting", l.cfg.Budgets.Answer)
	case errors.As(err, &record), errors.As(err, &cert):
		return stranger, 0, err.Error()
	}
	return silence, 0, err.Error()
}

// judge tells the answer of an API server that serves from any other. The
// certificate has been verified by then, but a balancer may hold one too.
func judge(resp *http.Response) (verdict, string) {
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return silence, fmt.Sprintf("read answer: %v", err)
	}
	body = bytes.TrimSpace(body)
	switch resp.StatusCode {
	case http.StatusOK:
		if string(body) == "ok" {
			return alive, "ready"
		}
		return stranger, "answers, but not like an API server"
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
		// It may refuse us this question and serve others.
		if bytes.Contains(body, []byte(`"kind":"Status"`)) || bytes.Contains(body, []byte(`"kind": "Status"`)) ||
			resp.StatusCode == http.StatusTooManyRequests {
			return alive, "answers " + resp.Status
		}
	}
	return unwell, "not ready: " + resp.Status
}
