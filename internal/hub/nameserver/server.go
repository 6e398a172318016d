package nameserver

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// syncPatience is how long a question waits for the names of the cluster
	// when the hub has just started.
	syncPatience = 4500 * time.Millisecond
	// listenAgain is when an address is tried again that could not be had.
	listenAgain = 10 * time.Second
	// serversEvery is how often it is looked what the node's servers are.
	serversEvery = 10 * time.Second

	// Questions that wait for something, in all and of one source. What is
	// more is refused.
	maxWaiting       = 512
	maxWaitingSource = 128
	// Connections at a time, in all and of one source.
	maxConns       = 256
	maxConnsSource = 32
	maxConnQueries = 1000
	connIdle       = 10 * time.Second
	connTimeout    = 3 * time.Second

	socketBytes = 2 << 20

	maxAliases = 8
	maxTCP     = dns.MaxMsgSize
	smallUDP   = dns.MinMsgSize
)

// Config is what a Server needs.
type Config struct {
	// Domain is the cluster's, as cluster.local.
	Domain string
	// Addresses are where it listens, by UDP and TCP.
	Addresses []netip.AddrPort
	// Servers are asked for names that are not the cluster's; none: those in
	// ResolvConf, which is /etc/resolv.conf if empty.
	Servers    []netip.AddrPort
	ResolvConf string
	// API is the hub's own API, as the node's user.
	API http.RoundTripper
	// Admit tells who may ask.
	Admit func(netip.Addr) bool
	// Node returns the addresses of a node of that name, none if there is none
	// that is known.
	Node func(name string) []netip.Addr

	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Server answers DNS. Use New, then Run.
type Server struct {
	cfg     Config
	index   *index
	zone    zone
	forward *forwarder
	metrics *metrics
	waiting *places
	conns   *places

	listening atomic.Int32
	synced    chan struct{}          // closed once all is known
	loop      atomic.Pointer[string] // the name that must not come back to us
	looped    atomic.Bool            // it did
}

// New returns a server that knows nothing yet.
func New(cfg Config) *Server {
	s := &Server{
		cfg: cfg, index: newIndex(), synced: make(chan struct{}),
		waiting: newPlaces(maxWaiting, maxWaitingSource), conns: newPlaces(maxConns, maxConnsSource),
	}
	s.cfg.Domain = strings.ToLower(dns.Fqdn(cfg.Domain))
	if s.cfg.ResolvConf == "" {
		s.cfg.ResolvConf = resolvConf
	}
	s.zone = zone{domain: s.cfg.Domain, index: s.index, own: s.own()}
	s.metrics = newMetrics(cfg.Registerer, s)
	s.forward = newForwarder(s.survive, s.metrics)
	return s
}

func (s *Server) own() []netip.Addr {
	var out []netip.Addr
	for _, a := range s.cfg.Addresses {
		out = append(out, a.Addr())
	}
	return out
}

// Run answers until ctx ends and returns nil. That an address cannot be had
// is no error: it is logged and tried again.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	all := []resource{services, endpointSlices}
	var known atomic.Int32
	for _, r := range all {
		group.Go(func() error {
			return s.follow(ctx, r, sync.OnceFunc(func() {
				if int(known.Add(1)) == len(all) {
					close(s.synced)
				}
			}))
		})
	}
	group.Go(func() error { return s.keepServers(ctx) })
	for _, a := range s.cfg.Addresses {
		for _, network := range []string{"udp", "tcp"} {
			group.Go(func() error { return s.listen(ctx, network, a) })
		}
	}
	return group.Wait()
}

func (s *Server) isSynced() bool {
	select {
	case <-s.synced:
		return true
	default:
		return false
	}
}

// listen answers at an address until ctx ends.
func (s *Server) listen(ctx context.Context, network string, address netip.AddrPort) error {
	told := false
	for ctx.Err() == nil {
		err := s.serve(ctx, network, address)
		if err != nil && !told {
			told = true
			s.cfg.Log.Error("no DNS is answered here; the rest of the hub goes on", "network", network, "address", address.String(), "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(listenAgain):
		}
	}
	return nil
}

func (s *Server) serve(ctx context.Context, network string, address netip.AddrPort) error {
	server := &dns.Server{
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) { s.answer(ctx, w, m) }),
		UDPSize: dns.DefaultMsgSize, MsgAcceptFunc: accept, MaxTCPQueries: maxConnQueries,
		ReadTimeout: connTimeout, WriteTimeout: connTimeout, IdleTimeout: func() time.Duration { return connIdle },
	}
	lc := net.ListenConfig{Control: widen}
	var err error
	if network == "udp" {
		server.PacketConn, err = lc.ListenPacket(ctx, network, address.String())
	} else {
		var l net.Listener
		if l, err = lc.Listen(ctx, network, address.String()); err == nil {
			server.Listener = &listener{Listener: l, server: s}
		}
	}
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	done := make(chan error, 1)
	started := make(chan struct{})
	server.NotifyStartedFunc = func() { close(started) }
	go func() { done <- server.ActivateAndServe() }()
	select {
	case err := <-done:
		return err
	case <-started:
	}
	s.listening.Add(1)
	defer s.listening.Add(-1)
	s.cfg.Log.Info("DNS is answered", "network", network, "address", address.String())
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), connTimeout)
	defer cancel()
	err = server.ShutdownContext(stop)
	<-done //nolint:errcheck // it was told to stop
	return err
}

// widen lets a burst of questions wait: the system's default holds some two
// hundred.
func widen(network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "udp") {
		return nil
	}
	return c.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBytes) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, socketBytes) // as wide as may be
		}
	})
}

// accept drops what is no question before more than its header is read.
func accept(h dns.Header) dns.MsgAcceptAction {
	const opcodes = 0xF << 11
	if h.Bits&opcodes != 0 && h.Bits&(1<<15) == 0 {
		return dns.MsgRejectNotImplemented
	}
	return dns.DefaultMsgAcceptFunc(h)
}

// answer answers one message.
func (s *Server) answer(ctx context.Context, w dns.ResponseWriter, m *dns.Msg) {
	began := time.Now()
	from := addrPortOf(w.RemoteAddr())
	if !s.cfg.Admit(from) {
		s.metrics.refused.WithLabelValues("stranger").Inc()
		return // an answer could be what somebody else is flooded with
	}
	_, udp := w.RemoteAddr().(*net.UDPAddr)
	out := new(dns.Msg).SetReply(m)
	opt := m.IsEdns0()
	size := maxTCP
	if udp {
		size = smallUDP
		if opt != nil {
			size = max(smallUDP, min(int(opt.UDPSize()), udpSize))
		}
	}
	kind, r := "", reply{rcode: dns.RcodeServerFailure}
	_ = s.survive(func() error { // it is logged
		kind, r = s.reply(ctx, from, m, opt, size)
		return nil
	})
	out.Rcode, out.Answer, out.Ns, out.Extra = r.rcode, r.answer, r.ns, r.extra
	out.Authoritative, out.RecursionAvailable, out.Compress = r.authoritative, true, true
	out.CheckingDisabled = m.CheckingDisabled
	out.AuthenticatedData = r.authenticated && (m.AuthenticatedData || opt != nil && opt.Do())
	if opt != nil {
		out.SetEdns0(udpSize, opt.Do())
		if r.code != 0 {
			e := out.IsEdns0()
			e.Option = append(e.Option, &dns.EDNS0_EDE{InfoCode: r.code})
		}
	}
	out.Truncate(size)
	out.Truncated = out.Truncated || r.truncated
	if kind != "" {
		s.metrics.count(kind, r.rcode, time.Since(began))
	}
	if err := w.WriteMsg(out); err != nil {
		s.cfg.Log.Debug("DNS answer not sent", "err", err)
	}
}

func addrPortOf(a net.Addr) netip.Addr {
	var out netip.AddrPort
	switch a := a.(type) {
	case *net.UDPAddr:
		out = a.AddrPort()
	case *net.TCPAddr:
		out = a.AddrPort()
	}
	return out.Addr().Unmap().WithZone("")
}

// reply answers the question of a message, and says what it was about: "" if
// it was none that is answered.
func (s *Server) reply(ctx context.Context, from netip.Addr, m *dns.Msg, opt *dns.OPT, size int) (string, reply) {
	refuse := func(reason string, rcode int) (string, reply) {
		s.metrics.refused.WithLabelValues(reason).Inc()
		return "", reply{rcode: rcode}
	}
	q := m.Question[0]
	switch {
	case opt != nil && opt.Version() != 0:
		return refuse("version", dns.RcodeBadVers)
	case q.Qclass != dns.ClassINET:
		return refuse("class", dns.RcodeRefused)
	case q.Qtype == dns.TypeANY, q.Qtype == dns.TypeAXFR, q.Qtype == dns.TypeIXFR:
		// Nobody needs them but those who want much for little.
		return refuse("type", dns.RcodeRefused)
	}
	if loop := s.loop.Load(); loop != nil && strings.EqualFold(q.Name, *loop) {
		s.looped.Store(true)
		return refuse("loop", dns.RcodeRefused)
	}
	a := asked{
		server: s, from: from, most: size / 16, // the smallest record
		do: opt != nil && opt.Do(), cd: m.CheckingDisabled, recurse: m.RecursionDesired,
	}
	return a.find(ctx, q, 0)
}

// asked is how a question was asked.
type asked struct {
	server          *Server
	from            netip.Addr
	most            int
	do, cd, recurse bool
}

func (a *asked) find(ctx context.Context, q dns.Question, depth int) (string, reply) {
	s := a.server
	name := strings.ToLower(q.Name)
	switch {
	case dns.IsSubDomain(s.cfg.Domain, name):
		if !s.await(ctx, a.from) {
			return kindCluster, reply{rcode: dns.RcodeServerFailure, code: dns.ExtendedErrorCodeNotReady}
		}
		r := s.zone.find(q, a.most)
		if r.alias != "" && q.Qtype != dns.TypeCNAME {
			a.goOn(ctx, q, &r, depth)
		}
		return kindCluster, r
	case strings.HasSuffix(name, ".arpa."):
		if s.isSynced() {
			if r, ok := s.zone.findReverse(q); ok {
				return kindReverse, r
			}
		}
	default:
		if at := s.cfg.Node(strings.TrimSuffix(name, ".")); len(at) > 0 {
			r := reply{authoritative: true}
			r.answer, r.truncated = addresses(q.Name, q.Qtype, at, a.most)
			return kindNode, r
		}
	}
	if !a.recurse {
		return kindOther, reply{rcode: dns.RcodeRefused}
	}
	leave, ok := s.waiting.enter(a.from)
	if !ok {
		s.metrics.refused.WithLabelValues("waiting").Inc()
		return kindOther, reply{rcode: dns.RcodeServerFailure, code: dns.ExtendedErrorCodeOther}
	}
	defer leave()
	r := s.forward.find(ctx, question{name: name, qtype: q.Qtype, do: a.do, cd: a.cd})
	rename(r.answer, name, q.Name)
	return kindOther, r
}

// rename gives records the name as it was asked for, in its case.
func rename(all []dns.RR, from, to string) {
	for _, rr := range all {
		if h := rr.Header(); from != to && h.Name == from {
			h.Name = to
		}
	}
}

// goOn follows an alias. What it leads to may be unknown, the alias is not.
func (a *asked) goOn(ctx context.Context, q dns.Question, r *reply, depth int) {
	if depth >= maxAliases {
		return
	}
	q.Name = r.alias
	_, next := a.find(ctx, q, depth+1)
	r.answer = append(r.answer, next.answer...)
	r.truncated = next.truncated
	if next.rcode == dns.RcodeNameError {
		r.rcode = dns.RcodeNameError // RFC 6604: it is said of the alias's end
	}
	if len(next.answer) == 0 && (next.rcode == dns.RcodeSuccess || next.rcode == dns.RcodeNameError) {
		r.ns = next.ns
	}
}

// await waits until the names of the cluster are known, for a while.
func (s *Server) await(ctx context.Context, from netip.Addr) bool {
	if s.isSynced() {
		return true
	}
	leave, ok := s.waiting.enter(from)
	if !ok {
		s.metrics.refused.WithLabelValues("waiting").Inc()
		return false
	}
	defer leave()
	timer := time.NewTimer(syncPatience)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return false
	case <-s.synced:
		return true
	}
}

// keepServers keeps the servers that others' names are asked of: those that
// were given, else the machine's.
func (s *Server) keepServers(ctx context.Context) error {
	tick := time.NewTicker(serversEvery)
	defer tick.Stop()
	var last error
	var known []netip.AddrPort
	for {
		servers, err := s.cfg.Servers, error(nil)
		if len(servers) == 0 {
			servers, err = readServers(s.cfg.ResolvConf, resolvConfResolved, s.own())
		}
		if err != nil && (last == nil || err.Error() != last.Error()) {
			s.cfg.Log.Warn("names that are not the cluster's cannot be found", "err", err)
		}
		if last = err; err == nil && !slices.Equal(servers, known) {
			known = servers
			s.cfg.Log.Info("name servers", "servers", fmt.Sprint(servers))
			s.forward.use(servers)
			s.findLoops(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// findLoops asks each server for a name that nobody else asks for, and no
// longer uses those through which it comes back.
func (s *Server) findLoops(ctx context.Context) {
	var good []netip.AddrPort
	for _, u := range s.forward.list() {
		s.looped.Store(false)
		name := strings.ToLower(rand.Text()) + ".loop.yurthub."
		s.loop.Store(&name)
		_, err := s.forward.exchange(ctx, u, question{name: name, qtype: dns.TypeHINFO}, firstTry)
		s.loop.Store(nil)
		if s.looped.Load() {
			s.cfg.Log.Error("name server leads back to the hub and is not used; give --dns-upstream", "server", u.address)
			continue
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Debug("name server does not answer", "server", u.address, "err", err)
		}
		good = append(good, netip.MustParseAddrPort(u.address))
	}
	s.forward.use(good)
}

// listener accepts connections within limits.
type listener struct {
	net.Listener
	server *Server
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := addrPortOf(c.RemoteAddr())
		reason := "stranger"
		if l.server.cfg.Admit(from) {
			leave, ok := l.server.conns.enter(from)
			if ok {
				return &conn{Conn: c, leave: sync.OnceFunc(leave)}, nil
			}
			reason = "connections"
		}
		l.server.metrics.refused.WithLabelValues(reason).Inc()
		_ = c.Close()
	}
}

// conn gives its place back when it is closed.
type conn struct {
	net.Conn
	leave func()
}

func (c *conn) Close() error {
	c.leave()
	return c.Conn.Close()
}

// places bound what is under way at a time, in all and of one source. Programs
// on the node share its addresses, and half of all places.
type places struct {
	mu            sync.Mutex // guards the following
	total, source int
	all           int
	each          map[netip.Addr]int
}

func newPlaces(total, source int) *places {
	return &places{total: total, source: source, each: map[netip.Addr]int{}}
}

// enter takes a place, if there is one, and returns what gives it back.
func (p *places) enter(from netip.Addr) (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	most := p.source
	if from.IsLoopback() {
		most = p.total / 2
	}
	if p.all >= p.total || p.each[from] >= most {
		return nil, false
	}
	p.all++
	p.each[from]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.all--
		if p.each[from]--; p.each[from] == 0 {
			delete(p.each, from)
		}
	}, true
}
