package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// Mode says how requests are spread over several servers.
type Mode string

const (
	// RoundRobin gives each healthy server its turn.
	RoundRobin Mode = "rr"
	// Priority uses the first healthy server in the order of Servers.
	Priority Mode = "priority"
)

// A hub makes at most dialBurst connections at once and then dialsPerSecond:
// it is not the only one to which the cloud comes back.
const dialBurst, dialsPerSecond = 128, 50

// maxServers bounds Config.Servers, so that a set of them fits in a word.
const maxServers = 64

// ErrDown is returned for requests while the link is down.
var ErrDown = errors.New("the cloud cannot be reached")

// Config is what a link needs. All but Budgets, Mode, Log and Registerer
// must be set.
type Config struct {
	// Servers are the https URLs of the API servers.
	Servers []*url.URL
	// ClusterCAs returns the authorities that may vouch for a server. It is
	// called for each new connection.
	ClusterCAs func() *x509.CertPool
	// ClientCertificate returns the hub's own certificate. It is called for
	// each new connection of Node. An error, as before bootstrap, fails the
	// requests that need it and says nothing about the link.
	ClientCertificate func() (*tls.Certificate, error)
	// Mode is RoundRobin when empty.
	Mode    Mode
	Budgets Budgets
	// Clock judges certificates and is told the time that servers give; the
	// machine's if nil.
	Clock      *clock.Clock
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Link is the connection to the cloud. Its methods may be called by several
// goroutines at once, before and during Run; until Run it is down.
type Link struct {
	cfg     Config
	servers []target
	begun   time.Time    // when the link was made
	told    atomic.Int64 // when the clock was last told, since begun
	metrics *metrics
	turn    atomic.Uint32 // round robin
	traffic [2]Traffic    // by credential: bearer, node
	lanes   atomic.Pointer[lanes]
	tunnels registry     // upgraded connections
	tries   registry     // those of Try, which end when the link turns slow
	held    atomic.Int64 // bytes of bodies kept on their way
	up      atomic.Bool  // copy of tracker.state.Up for the hot path
	slow    atomic.Bool  // copy of pace.slow
	dials   *rate.Limiter
	copies  sync.WaitGroup // of requests, in the background

	// shortHTTP2 is for the benchmark that chose HTTP/1.1.
	shortHTTP2 bool

	mu      sync.Mutex // guards the following
	tracker *tracker
	pace    pace
	stopped bool
	changed chan struct{} // closed and replaced at each change of Up
	sure    chan struct{} // the same when the doubt about a server ends
	// tickets resume TLS sessions, by credential: a resumed session carries
	// the client certificate of the one that it continues.
	tickets [2]tls.ClientSessionCache
}

// target is one server as requests see it.
type target struct {
	url     *url.URL
	addr    string // host:port to dial
	healthy atomic.Bool
	// doubted says that something is wrong, and that nobody knows yet what:
	// requests go elsewhere.
	doubted atomic.Bool
	// preferred is when it may be preferred to the servers behind it, since
	// Link.begun.
	preferred atomic.Int64
	heard     atomic.Int64  // when the last byte came in, since Link.begun
	proven    atomic.Int64  // when it was last certain who sent it
	wake      chan struct{} // tells the prober that its due time has changed
}

// hear takes bytes that came in at now, since Link.begun. Those that anybody
// may have sent count for as long after the server's own as bridge says.
func (t *target) hear(now time.Duration, proven bool, bridge time.Duration) {
	switch {
	case proven:
		t.proven.Store(int64(now))
	case now-time.Duration(t.proven.Load()) > bridge:
		return
	}
	t.heard.Store(int64(now))
}

// New makes a link. It starts nothing; Run does.
func New(cfg Config) (*Link, error) {
	if len(cfg.Servers) == 0 || len(cfg.Servers) > maxServers {
		return nil, fmt.Errorf("%d servers given, need 1 to %d", len(cfg.Servers), maxServers)
	}
	switch cfg.Mode {
	case "":
		cfg.Mode = RoundRobin
	case RoundRobin, Priority:
	default:
		return nil, fmt.Errorf("unknown mode %q of the link, need %q or %q", cfg.Mode, RoundRobin, Priority)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Budgets = cfg.Budgets.withDefaults()
	l := &Link{
		cfg:     cfg,
		servers: make([]target, len(cfg.Servers)),
		begun:   time.Now(),
		tracker: newTracker(len(cfg.Servers), cfg.Budgets, time.Now()),
		changed: make(chan struct{}),
		sure:    make(chan struct{}),
		tickets: newTickets(len(cfg.Servers)),
		dials:   rate.NewLimiter(dialsPerSecond, dialBurst),
	}
	for i, u := range cfg.Servers {
		if u.Scheme != "https" || u.Hostname() == "" {
			return nil, fmt.Errorf("server %q is not an https URL", u)
		}
		port := u.Port()
		if port == "" {
			port = "443"
		}
		s := &l.servers[i]
		s.url = u
		s.addr = net.JoinHostPort(u.Hostname(), port)
		s.wake = make(chan struct{}, 1)
	}
	l.metrics = newMetrics(cfg.Registerer, l)
	l.lanes.Store(l.newLanes())
	return l, nil
}

// Run watches over the link until ctx ends, then cuts all that goes through
// it and returns nil. All goroutines of the link end with it.
func (l *Link) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for i := range l.servers {
		wg.Go(func() { l.watchOver(ctx, i) })
	}
	wg.Go(func() { l.sweep(ctx) })
	wg.Wait()
	l.mu.Lock()
	l.stopped = true
	l.tracker.state = State{Since: time.Now(), Reason: "the hub stops"}
	l.up.Store(false)
	l.mu.Unlock()
	l.lanes.Load().cut()
	l.tunnels.cut()
	l.tries.cut()
	l.copies.Wait()
	return nil
}

// State returns the state of the link.
func (l *Link) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tracker.state
}

// Online reports whether the link is up. It costs one atomic read.
func (l *Link) Online() bool { return l.up.Load() }

// Weak reports whether the link is up and nobody should wait for it who has
// another way: answers came too late of late, or every server is in doubt.
func (l *Link) Weak() bool {
	return l.up.Load() && (l.slow.Load() || l.doubtful())
}

// doubtful reports whether no healthy server is free of doubt.
func (l *Link) doubtful() bool {
	for i := range l.servers {
		if s := &l.servers[i]; s.healthy.Load() && !s.doubted.Load() {
			return false
		}
	}
	return true
}

// Changed returns a channel that is closed when the link next goes up or
// down. Take it before reading the state, so that no change is missed.
func (l *Link) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// WaitUp returns nil as soon as the link is up and some server is not in
// doubt, or the error of ctx.
func (l *Link) WaitUp(ctx context.Context) error {
	for {
		l.mu.Lock()
		changed, sure := l.changed, l.sure
		l.mu.Unlock()
		if l.Online() && !l.doubtful() {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-sure:
		}
	}
}

// ClientChanged makes new requests use new connections, made with what
// ClientCertificate and ClusterCAs return then. Requests and streams that are
// on the way finish on the old ones.
func (l *Link) ClientChanged() {
	l.mu.Lock()
	l.tickets = newTickets(len(l.servers))
	old := l.lanes.Load()
	l.lanes.Store(l.newLanesLocked(old.registry))
	l.mu.Unlock()
	old.retire()
}

// Node returns a transport that authenticates with the hub's certificate.
//
// Of the request's URL only path and query count; the link chooses the
// server. Requests fail with ErrDown while the link is down.
func (l *Link) Node() http.RoundTripper { return roundTripper{link: l, cred: node} }

// Questions is Node for small requests that may come many at a time: they
// share a connection, and must not wait behind each other's bytes for long.
func (l *Link) Questions() http.RoundTripper { return roundTripper{link: l, cred: node, asks: true} }

// Bearer returns a transport without client certificate: a request carries
// its own Authorization header. Otherwise it is like Node.
func (l *Link) Bearer() http.RoundTripper { return roundTripper{link: l, cred: bearer} }

// Traffic returns what has gone over the wire, TLS and all: with the hub's
// certificate, which includes probes, and without.
func (l *Link) Traffic() (node, bearer *Traffic) {
	return &l.traffic[0], &l.traffic[1]
}

// tellEvery is how often the clock is told the time while answers come.
const tellEvery = time.Minute

// tell lets the clock know what time a server says it is. The server has been
// verified by then.
func (l *Link) tell(h http.Header, asked time.Time) {
	now := int64(time.Since(l.begun))
	last := l.told.Load()
	if last != 0 && now-last < int64(tellEvery) || !l.told.CompareAndSwap(last, now) {
		return
	}
	date, err := http.ParseTime(h.Get("Date"))
	if err == nil {
		l.cfg.Clock.Hear(date, time.Since(asked))
	}
}

// heardAt returns when server i was last heard, as a time that no step of the
// machine's clock shifts; zero if never.
func (l *Link) heardAt(i int) time.Time {
	d := time.Duration(l.servers[i].heard.Load())
	if d == 0 {
		return time.Time{}
	}
	return l.begun.Add(d)
}

func newTickets(servers int) [2]tls.ClientSessionCache {
	return [2]tls.ClientSessionCache{
		bearer: tls.NewLRUClientSessionCache(servers), node: tls.NewLRUClientSessionCache(servers),
	}
}

func (l *Link) ticketsOf(cred credential) tls.ClientSessionCache {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tickets[cred]
}
