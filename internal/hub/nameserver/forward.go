package nameserver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
)

const (
	// answerBudget is how long other servers are waited for: a client asks
	// again after five seconds.
	answerBudget = 4500 * time.Millisecond
	// firstTry is how long each server may take before the next is asked.
	firstTry = 1500 * time.Millisecond
	// staleAfter is how long somebody waits who could have an old answer.
	staleAfter = 500 * time.Millisecond

	// downAfter is how many failures in a row make a server one that is
	// down, which is asked once in probeEvery.
	downAfter  = 3
	probeEvery = time.Second

	// maxFlights bounds the questions that other servers are asked at a time.
	maxFlights = 256
	maxServers = 3 // as the resolver of the C library
	udpSize    = 1232
)

var (
	errBusy    = errors.New("too many questions at a time")
	errSilent  = errors.New("no name server answers")
	errNone    = errors.New("no name server is known")
	errForeign = errors.New("the answer is to another question")
)

// upstream is another name server.
type upstream struct {
	address string

	fails atomic.Int32 // in a row
	next  atomic.Int64 // when it is asked again while it is down, in ns
}

func (u *upstream) down() bool { return u.fails.Load() >= downAfter }

// may reports whether the server may be asked now.
func (u *upstream) may(now time.Time) bool {
	if !u.down() {
		return true
	}
	next := u.next.Load()
	return now.UnixNano() >= next && u.next.CompareAndSwap(next, now.Add(probeEvery).UnixNano())
}

// took takes note of whether the server answered.
func (u *upstream) took(err error) {
	if err == nil {
		u.fails.Store(0)
		return
	}
	if u.fails.Add(1) == downAfter {
		u.next.Store(time.Now().Add(probeEvery).UnixNano())
	}
}

// forwarder asks other name servers.
type forwarder struct {
	cache   *cache
	metrics *metrics
	survive func(func() error) error // a panic is an error
	flights singleflight.Group
	slots   chan struct{}

	mu      sync.Mutex // guards the following
	servers []*upstream
}

func newForwarder(survive func(func() error) error, m *metrics) *forwarder {
	return &forwarder{cache: newCache(cacheBytes), metrics: m, survive: survive, slots: make(chan struct{}, maxFlights)}
}

// use makes the servers those that are asked. What is known of one that was
// asked before stays.
func (f *forwarder) use(addresses []netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	known := map[string]*upstream{}
	for _, u := range f.servers {
		known[u.address] = u
	}
	var next []*upstream
	for _, a := range addresses[:min(maxServers, len(addresses))] {
		u := known[a.String()]
		if u == nil {
			u = &upstream{address: a.String()}
		}
		next = append(next, u)
	}
	f.servers = next
}

func (f *forwarder) list() []*upstream {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.servers
}

// allDown reports whether no server is one that answers.
func (f *forwarder) allDown() bool {
	for _, u := range f.list() {
		if !u.down() {
			return false
		}
	}
	return true
}

// find answers a question of a name that is not the cluster's. The context is
// the server's.
func (f *forwarder) find(ctx context.Context, q question) reply {
	now := time.Now()
	kept, failed := f.cache.get(q, now)
	switch {
	case kept != nil && kept.fresh(now):
		f.metrics.cache.WithLabelValues("hit").Inc()
		return f.kept(kept, now)
	case failed && kept != nil:
		f.metrics.cache.WithLabelValues("stale").Inc()
		return f.kept(kept, now)
	case failed:
		f.metrics.cache.WithLabelValues("hit").Inc()
		return reply{rcode: dns.RcodeServerFailure, code: dns.ExtendedErrorCodeNoReachableAuthority}
	}
	// It goes on when nobody waits any more, for whoever asks next.
	flight := f.flights.DoChan(fmt.Sprint(q), func() (got any, err error) {
		err = f.survive(func() error {
			got, err = f.ask(ctx, q)
			return err
		})
		return got, err
	})
	wait := answerBudget + time.Second // it ends by itself before
	if kept != nil {
		wait = staleAfter
		if f.allDown() {
			wait = 0
		}
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var err error
	select {
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = errSilent
	case got := <-flight:
		// What cannot be told now is no news, as when a server lost its own way.
		if m, ok := got.Val.(*dns.Msg); got.Err == nil && ok && (kept == nil || tells(m)) {
			f.metrics.cache.WithLabelValues("miss").Inc()
			return replyOf(m.Copy())
		}
		err = got.Err
	}
	if kept != nil {
		f.metrics.cache.WithLabelValues("stale").Inc()
		return f.kept(kept, time.Now())
	}
	f.metrics.cache.WithLabelValues("miss").Inc()
	r := reply{rcode: dns.RcodeServerFailure, code: dns.ExtendedErrorCodeNoReachableAuthority}
	if errors.Is(err, errBusy) {
		r.code = dns.ExtendedErrorCodeOther
	}
	return r
}

func (f *forwarder) kept(e *entry, now time.Time) reply {
	m, err := e.message(now)
	if err != nil { // it was packed by us
		return reply{rcode: dns.RcodeServerFailure}
	}
	r := replyOf(m)
	if r.stale = !e.fresh(now); r.stale {
		r.code = dns.ExtendedErrorCodeStaleAnswer
		if r.rcode == dns.RcodeNameError {
			r.code = dns.ExtendedErrorCodeStaleNXDOMAINAnswer
		}
	}
	return r
}

// tells reports whether a server knows what it was asked.
func tells(m *dns.Msg) bool { return m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError }

func replyOf(m *dns.Msg) reply {
	return reply{rcode: m.Rcode, answer: m.Answer, ns: m.Ns, extra: m.Extra, truncated: m.Truncated, authenticated: m.AuthenticatedData}
}

// ask asks one server after the other, twice, and keeps what is said.
func (f *forwarder) ask(ctx context.Context, q question) (*dns.Msg, error) {
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		return nil, errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, answerBudget)
	defer cancel()
	servers := f.list()
	last, err := (*dns.Msg)(nil), errNone
	for round := range 2 {
		for _, u := range servers {
			if !u.may(time.Now()) {
				continue
			}
			try := answerBudget
			if round == 0 || len(servers) > 1 {
				try = firstTry
			}
			var m *dns.Msg
			m, err = f.exchange(ctx, u, q, try)
			if err == nil && tells(m) {
				if !m.Truncated { // else the whole may come next time
					f.cache.put(q, m, time.Now())
				}
				return m, nil
			}
			if err == nil {
				last = m // it cannot answer this; another may
			}
		}
		if last != nil {
			break
		}
	}
	f.cache.fail(q, time.Now())
	if last != nil {
		return last, nil
	}
	return nil, fmt.Errorf("%w: %w", errSilent, err)
}

// exchange asks one server, over TCP if the answer is long.
func (f *forwarder) exchange(ctx context.Context, u *upstream, q question, limit time.Duration) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	m := new(dns.Msg).SetQuestion(q.name, q.qtype)
	m.CheckingDisabled = q.cd
	m.SetEdns0(udpSize, q.do)
	answer, err := f.send(ctx, "udp", u, m)
	if err == nil && (answer.Rcode == dns.RcodeFormatError || answer.Rcode == dns.RcodeNotImplemented) {
		m.Extra = nil // it may know no EDNS (RFC 6891, section 7)
		answer, err = f.send(ctx, "udp", u, m)
	}
	if err == nil && answer.Truncated {
		if whole, tcp := f.send(ctx, "tcp", u, m); tcp == nil {
			answer = whole
		}
	}
	u.took(err)
	if err != nil {
		f.metrics.failures.Inc()
		return nil, fmt.Errorf("ask %s for %s: %w", u.address, q.name, err)
	}
	return answer, nil
}

func (f *forwarder) send(ctx context.Context, network string, u *upstream, m *dns.Msg) (*dns.Msg, error) {
	// Each question comes from a port of its own, so that an answer is hard
	// to forge.
	client := dns.Client{Net: network, UDPSize: udpSize, Timeout: answerBudget}
	answer, _, err := client.ExchangeContext(ctx, m, u.address)
	if err != nil {
		return nil, err
	}
	if len(answer.Question) != 1 || !answer.Response || answer.Question[0].Qtype != m.Question[0].Qtype ||
		!strings.EqualFold(answer.Question[0].Name, m.Question[0].Name) {
		return nil, errForeign
	}
	opt := answer.IsEdns0() // it speaks of this hop only
	if opt == nil {
		return answer, nil
	}
	kept := answer.Extra[:0]
	for _, rr := range answer.Extra {
		if rr != dns.RR(opt) {
			kept = append(kept, rr)
		}
	}
	answer.Extra = kept
	return answer, nil
}
