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
const maxProbes = 16

// watchOver probes server i when the tracker wants it, until ctx ends.
func (l *Link) watchOver(ctx context.Context, i int) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, maxProbes)
	first := true
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.servers[i].wake:
		case <-timer.C:
		}
		if wait := l.next(i, time.Now()); wait > 0 {
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
		p := l.begin(i)
		greet := first
		first = false
		wg.Go(func() {
			defer func() { <-slots }()
			if p.gentle && l.ping(ctx, i) || greet && l.greet(ctx, i, p) {
				return
			}
			l.probe(ctx, i, p)
		})
	}
}

// next returns how long server i need not be probed.
func (l *Link) next(i int, now time.Time) time.Duration {
	heard := l.heardAt(i)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tracker.hear(i, heard)
	return l.tracker.servers[i].due.Sub(now)
}

// probing is a probe under way.
type probing struct {
	started         time.Time
	connect, answer time.Duration // how long each may take
	gentle          bool          // a request on a pooled connection will do
}

func (l *Link) begin(i int) probing {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &l.tracker.servers[i]
	p := probing{started: time.Now(), gentle: s.healthy && !s.suspected}
	p.connect, p.answer = l.tracker.start(i, p.started, 0.8+0.4*rand.Float64())
	return p
}

// suspect tells the prober of server i that something may be wrong.
func (l *Link) suspect(i int) {
	l.mu.Lock()
	due := l.tracker.suspect(i, time.Now())
	l.servers[i].doubted.Store(l.tracker.servers[i].healthy)
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
		resp, err := s.by[cred].by[stream].RoundTrip(req)
		if _, ok := errors.AsType[*credentialError](err); ok {
			continue
		}
		if err != nil {
			return false
		}
		l.tell(resp.Header, asked)
		v, _ := judgeAnswer(resp)
		_ = resp.Body.Close()
		return v == alive
	}
	return false
}

// probe finds out on a fresh connection whether server i can be reached and
// serves, and reports what it found.
func (l *Link) probe(ctx context.Context, i int, p probing) {
	f := l.look(ctx, i, p)
	if ctx.Err() != nil {
		return
	}
	l.report(i, p.started, f)
}

func (l *Link) report(i int, started time.Time, f finding) {
	f.reason = l.servers[i].addr + ": " + f.reason
	to := &l.servers[i]
	heard := l.heardAt(i)
	l.mu.Lock()
	l.tracker.hear(i, heard)
	from := l.tracker.state
	overtaken := started.Before(l.tracker.servers[i].heard)
	now := time.Now()
	turned := l.tracker.report(i, started, now, f)
	state, s := l.tracker.state, &l.tracker.servers[i]
	healthy := s.healthy
	lost := to.healthy.Load() && !s.healthy
	if lost {
		// Nodes that lost the cloud together must not ask for it together.
		s.due = now.Add(rand.N(l.cfg.Budgets.Retry))
	}
	to.healthy.Store(s.healthy)
	if to.doubted.Swap(s.healthy && s.suspected) && !to.doubted.Load() {
		close(l.sure)
		l.sure = make(chan struct{})
	}
	to.preferred.Store(int64(s.preferred.Sub(l.begun)))
	l.metrics.probed(f.verdict)
	var old *lanes
	if turned {
		l.metrics.turned() // before anybody is told
		l.up.Store(state.Up)
		if state.Up && l.pace.renew(now) || !state.Up && l.pace.cut(now) {
			l.slow.Store(false)
		}
		if !state.Up {
			old = l.lanes.Swap(l.newLanesLocked(&registry{}))
		}
		close(l.changed)
		l.changed = make(chan struct{})
	}
	current := l.lanes.Load()
	l.mu.Unlock()

	l.wake(i)
	switch {
	case lost && old == nil:
		current.cutServer(i) // what waits there shall try elsewhere
	case f.verdict == alive:
		to.proven.Store(int64(now.Sub(l.begun)))
		current.cull(i, l.cfg.Budgets.Stall)
	case f.verdict == silence && healthy && !overtaken: // it was spared
		l.late()
	}
	if !turned {
		return
	}
	if old != nil {
		old.cut()
		l.cfg.Log.Warn("link is down", "reason", state.Reason, "was_up_for", state.Since.Sub(from.Since))
		return
	}
	l.cfg.Log.Info("link is up", "reason", state.Reason, "was_down_for", state.Since.Sub(from.Since))
}

// sweep looks for connections whose other end is gone, without a word, while
// others work: what was sent on them is not even acknowledged.
func (l *Link) sweep(ctx context.Context) {
	tick := time.NewTicker(l.cfg.Budgets.Stall)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		l.sweepOnce()
	}
}

func (l *Link) sweepOnce() {
	lanes := l.lanes.Load()
	for i := range l.servers {
		if len(lanes.silent(i, l.cfg.Budgets.Stall)) > 0 {
			l.suspect(i)
		}
	}
}

// look makes a fresh connection to server i and asks whether it is ready.
func (l *Link) look(ctx context.Context, i int, p probing) finding {
	begun := time.Now()
	raw, err := race(ctx, l.servers[i].addr, p.connect)
	if err != nil {
		return finding{verdict: silence, reason: err.Error()}
	}
	f := finding{connect: time.Since(begun)}
	defer func() { _ = raw.Close() }()
	l.mu.Lock()
	l.tracker.reached(i, p.started)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.tracker.answered(i)
		l.mu.Unlock()
	}()

	begun = time.Now()
	ctx, cancel := context.WithTimeout(ctx, p.answer)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	f.verdict, f.reason = l.question(ctx, i, raw)
	f.answer = time.Since(begun)
	if f.verdict == silence && ctx.Err() != nil {
		f.reason = fmt.Sprintf("no answer within %s of connecting", p.answer)
	}
	return f
}

// question asks server i on a raw connection whether it is ready.
func (l *Link) question(ctx context.Context, i int, raw net.Conn) (verdict, string) {
	cred := node
	if _, err := l.cfg.ClientCertificate(); err != nil {
		cred = bearer
	}
	d := dialer{link: l, cred: cred, tickets: l.ticketsOf(cred)}
	t, err := d.handshake(ctx, &conn{Conn: raw, traffic: &l.traffic[cred], link: l}, i, []string{"http/1.1"})
	if err != nil {
		return why(ctx, err)
	}
	asked := time.Now()
	if _, err := fmt.Fprintf(t, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: yurthub\r\nConnection: close\r\n\r\n",
		readyPath(l.servers[i].url), l.servers[i].url.Host); err != nil {
		return why(ctx, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(t), nil)
	if err != nil {
		return why(ctx, err)
	}
	defer func() { _ = resp.Body.Close() }()
	v, reason := judgeAnswer(resp)
	if v == alive {
		l.told.Store(0) // a link that returns tells the time at once
		l.tell(resp.Header, asked)
	}
	return v, reason
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
func why(ctx context.Context, err error) (verdict, string) {
	var record tls.RecordHeaderError
	var cert *tls.CertificateVerificationError
	if ctx.Err() == nil && (errors.As(err, &record) || errors.As(err, &cert)) {
		return stranger, err.Error()
	}
	return silence, err.Error()
}

// judgeAnswer tells the answer of an API server that serves from any other. The
// certificate has been verified by then, but a balancer may hold one too.
func judgeAnswer(resp *http.Response) (verdict, string) {
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
	if bytes.HasPrefix(body, []byte("[+]ping ok")) {
		return unready, "not ready: " + resp.Status // an API server's own words
	}
	return unwell, "not ready: " + resp.Status
}
