// Package pool lets the hubs of one pool help each other: a hub serves what
// the pool shares to the hubs of its own pool, takes it from the pool's leader
// instead of the cloud where it can, and relays what a hub without a link has
// to say.
//
// Peers know each other by the certificate that the cluster gave their nodes,
// in both directions, and by what the cluster last said of who is in the pool.
// Nobody else gets an answer, with the cloud or without it.
//
// member.go decides, without input or output, whom to follow; server.go
// listens; peers.go asks.
package pool

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/clock"
	"github.com/yurt-edge/yurt/internal/hub/request"
)

// DefaultPort is where the hubs of a pool listen, on their node's address.
const DefaultPort = 10269

// Leader is a hub that others shall follow, or, as a contact, may.
type Leader struct{ Node, Address string }

// Membership is what the cluster last said of this node's pool. The zero value
// is a node without one.
type Membership struct {
	Pool    string
	Nodes   []string // this one too
	Leaders []Leader // in the order in which hubs try them
	// Contacts are hubs by which others find each other, leaders or not.
	Contacts []Leader
	Shared   []schema.GroupVersionResource
}

// Has reports whether the node is in the pool.
func (m Membership) Has(node string) bool { return slices.Contains(m.Nodes, node) }

// Shares reports whether the pool shares the resource.
func (m Membership) Shares(r schema.GroupVersionResource) bool { return slices.Contains(m.Shared, r) }

func (m Membership) leader(node string) bool {
	return slices.ContainsFunc(m.Leaders, func(l Leader) bool { return l.Node == node })
}

// deputy is whom hubs follow when they can follow no leader: the first contact
// that leads not itself, which is the same for all of them. A pool without
// leaders has none.
func (m Membership) deputy() string {
	for _, c := range m.Contacts {
		if len(m.Leaders) > 0 && m.Has(c.Node) && !m.leader(c.Node) {
			return c.Node
		}
	}
	return ""
}

// Config is what a hub's part in its pool needs. All but Heartbeats and
// Pods must be set.
type Config struct {
	Node string
	Port int // of all hubs of the pool; 0 means DefaultPort

	// Grace is how long an upstream must be of no use before this hub leaves it,
	// and as long again at most: each hub draws its own time. Leaders wait for
	// 5/8 to 7/8 of it. Return is how long a better one must have been good before
	// the hub comes back to it, and up to twice as long again. 0 means the
	// defaults.
	Grace, Return time.Duration

	// Certificate is the node's own, and ClusterCAs are the authorities that
	// vouch for those of peers; they are asked for each connection.
	Certificate func() *tls.Certificate
	ClusterCAs  func() *x509.CertPool
	Clock       *clock.Clock

	// Link tells whether the link to the cloud is up; the channel is closed
	// when that changes.
	Link func() (up bool, changed <-chan struct{})
	// Ages are the times since the cloud last proved what this hub holds of
	// the shared resources, by scope.
	Ages func() map[string]time.Duration

	// Serve answers a list or watch of a peer, of a resource that the pool
	// shares. What it returns before it has written is the answer.
	Serve func(w http.ResponseWriter, r *http.Request, info request.Info, peer string) error
	// Heartbeats answers POST [HeartbeatsPath]; nil: nobody does. Its caller
	// is in the request's context, see [PeerFrom].
	Heartbeats http.Handler
	// Pods answers GET [PodsPath]; nil: nobody does.
	Pods http.Handler
	// Protect stands before everything that the listener serves: against
	// panics and slow peers.
	Protect func(http.Handler) http.Handler
	// Refused counts what was not answered, by reason.
	Refused func(reason string)

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Pool is a hub's part in its pool. Use New, then Run. Its methods may be
// called by several goroutines.
type Pool struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	mu       sync.Mutex // guards the following
	member   Membership
	known    bool          // member is what the cluster says, not the lack of it
	address  net.IP        // where this hub listens; nil: nowhere
	changed  chan struct{} // closed when one of these changes
	machine  *member
	moved    chan struct{} // closed when another upstream is decided on
	helped   chan struct{} // closed when a peer may help that could not before
	decided  bool          // one was
	book     map[string]*entry
	inFlight map[*inFlight]*entry // what is served, by whom it is for
	busy     [2]int               // requests and watches in flight

	proofs proofs
}

// New returns the part of a hub that knows of no pool yet.
func New(cfg Config) *Pool {
	if cfg.Port == 0 {
		cfg.Port = DefaultPort
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Pool{
		cfg: cfg, log: cfg.Log, metrics: newMetrics(cfg.Registerer),
		changed: make(chan struct{}), moved: make(chan struct{}), helped: make(chan struct{}), machine: newMember(cfg.Node, rand.Uint64(), patience{cmp.Or(cfg.Grace, DefaultGrace), cmp.Or(cfg.Return, DefaultReturn)}), book: map[string]*entry{}, inFlight: map[*inFlight]*entry{},
	}
}

// Set tells what the cluster now says of the pool, and at which address of
// this node its peers reach it. What is under way for a hub that is no longer
// of the pool ends. Unless known, the cluster has yet to say it, and may.
func (p *Pool) Set(m Membership, address net.IP, known bool) {
	if !m.Has(p.cfg.Node) {
		m = Membership{} // who is not in it has no say in it
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if same(p.member, m) && p.address.Equal(address) && p.known == known {
		return
	}
	if p.member.Pool != m.Pool {
		p.log.Info("pool changed", "from", p.member.Pool, "to", m.Pool)
	}
	if !p.address.Equal(address) {
		for _, e := range p.book {
			e.close() // connections are made from the address
		}
	}
	reshared := !slices.Equal(p.member.Shared, m.Shared)
	p.member, p.address, p.known = m, address, known
	for node, e := range p.book {
		if !m.Has(node) {
			e.close()
			delete(p.book, node)
		}
	}
	for _, l := range slices.Concat(m.Contacts, m.Leaders) {
		if l.Node != p.cfg.Node && m.Has(l.Node) {
			p.entryLocked(l.Node).setAddress(l.Address)
		}
	}
	for f := range p.inFlight {
		if !m.Has(f.peer) || reshared {
			f.end()
		}
	}
	if reshared {
		close(p.moved) // what is shared goes another way than what is not
		p.moved = make(chan struct{})
	}
	close(p.changed)
	p.changed = make(chan struct{})
	p.helpLocked()
}

// Helped returns a channel that is closed when a peer may help that could not
// before: it says that its link is back, is heard again, or is new.
func (p *Pool) Helped() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.helped
}

func (p *Pool) helpLocked() {
	close(p.helped)
	p.helped = make(chan struct{})
}

func same(a, b Membership) bool {
	return a.Pool == b.Pool && slices.Equal(a.Nodes, b.Nodes) && slices.Equal(a.Leaders, b.Leaders) && slices.Equal(a.Contacts, b.Contacts) && slices.Equal(a.Shared, b.Shared)
}

// Membership returns what Set was last told.
func (p *Pool) Membership() Membership {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.member
}

// Peer is another hub of the pool whose address is known.
type Peer struct {
	Node    string
	Address string
	Leader  bool
	// Link tells whether its link is up, as it or another has said in the last ten
	// seconds. Live is what it last said of itself, false if nothing.
	Link, Live bool
	Seen       time.Time // when it last called or answered; zero: never
}

// Address is where peers reach this hub, empty if nowhere.
func (p *Pool) Address() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.address == nil || p.member.Pool == "" {
		return ""
	}
	return net.JoinHostPort(p.address.String(), strconv.Itoa(p.cfg.Port))
}

// Peers lists them: leaders in their order, then the others by name.
func (p *Pool) Peers() []Peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	var out []Peer
	add := func(node string, leader bool) {
		if e, ok := p.book[node]; ok && e.address != "" {
			out = append(out, Peer{
				Node: node, Address: e.address, Leader: leader, Seen: e.seen, Link: p.machine.hasLink(now, node), Live: p.machine.saidBy(node).Live,
			})
		}
	}
	for _, l := range p.member.Leaders {
		add(l.Node, true)
	}
	for _, node := range p.member.Nodes {
		if !p.member.leader(node) {
			add(node, false)
		}
	}
	return out
}

// Run serves peers and follows the pool until ctx ends, and returns nil.
func (p *Pool) Run(ctx context.Context) error {
	var running sync.WaitGroup
	running.Go(func() { p.listen(ctx) })
	running.Go(func() { p.follow(ctx) })
	running.Wait()
	return nil
}
