package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// credential says who a connection belongs to.
type credential int

const (
	bearer credential = iota // no client certificate
	node                     // the hub's own certificate
)

// Traffic counts the bytes of connections, TLS and all.
type Traffic struct{ in, out atomic.Int64 }

// Read is how many bytes have come in.
func (t *Traffic) Read() int64 { return t.in.Load() }

// Written is how many bytes have gone out.
func (t *Traffic) Written() int64 { return t.out.Load() }

// lanes are the pooled connections of one generation. A generation ends when
// the link goes down, and all of it is cut; or when the client certificate
// changes, and what is on the way may finish. The next one then shares its
// registry, so that what goes on in the old one is watched over and ends with
// the link like the rest.
type lanes struct {
	by [2]lane // by credential
	*registry
}

// lane carries the requests of one credential. Short requests and streams
// do not share connections: a request is cheaper over HTTP/1.1, and neither
// has to wait behind a stream's bytes; a stream is cheaper over HTTP/2,
// where a hundred of them need one connection and a ping shows that it is
// alive. The hub's own questions are small, and come many at a time when the
// link comes up: a connection for each would cost ten times their bytes.
type lane struct {
	by    [3]*http.Transport // by way
	gates [3]gate            // by way; unused for short
}

// way is how a request travels in its lane.
type way int

const (
	short    way = iota // HTTP/1.1, a connection each at a time
	stream              // HTTP/2, shared
	question            // the same, with other connections
)

func wayOf(r *http.Request) way {
	if isStream(r) {
		return stream
	}
	return short
}

// cut ends every connection and every dial at once, and all later ones.
func (s *lanes) cut() {
	s.registry.cut()
	s.retire()
}

// retire closes the connections that carry nothing; the others follow when
// they have been idle for long enough.
func (s *lanes) retire() {
	for _, l := range s.by {
		for _, t := range l.by {
			t.CloseIdleConnections()
		}
	}
}

// registry holds what must end together: dials and connections.
type registry struct {
	mu   sync.Mutex // guards the following
	open map[*closer]struct{}
	dead bool
}

// closer ends one thing in a registry.
type closer struct {
	end    func()
	server int   // -1 if it is of none in particular
	conn   *conn // nil if it is none
}

// add registers end to be called by cut. It reports false when that has
// happened already.
func (g *registry) add(end func()) (*closer, bool) { return g.addTo(-1, nil, end) }

func (g *registry) addTo(server int, conn *conn, end func()) (*closer, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.dead {
		return nil, false
	}
	c := &closer{end, server, conn}
	if g.open == nil {
		g.open = make(map[*closer]struct{})
	}
	g.open[c] = struct{}{}
	return c, true
}

func (g *registry) remove(c *closer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, c)
}

// cut ends everything in the registry, and refuses all that comes later.
func (g *registry) cut() {
	g.mu.Lock()
	g.dead = true
	open := g.open
	g.open = nil
	g.mu.Unlock()
	for c := range open {
		c.end()
	}
}

// end ends what is in the registry now.
func (g *registry) end() {
	for _, c := range g.those(func(*closer) bool { return true }) {
		c.end()
	}
}

// cutServer ends the dials and connections to server i.
func (g *registry) cutServer(i int) {
	for _, c := range g.those(func(c *closer) bool { return c.server == i }) {
		c.end()
	}
}

// cull ends the connections to server i that silent returns. It is called
// when a fresh connection has just been answered.
func (g *registry) cull(i int, patience time.Duration) {
	for _, c := range g.silent(i, patience) {
		c.end()
	}
}

// silent returns the connections to server i whose other end has not even
// acknowledged what was sent to it for as long as patience. A server that
// thinks is not among them: its kernel has acknowledged.
func (g *registry) silent(i int, patience time.Duration) []*closer {
	waiting := g.those(func(c *closer) bool {
		return c.server == i && c.conn != nil && c.conn.waits(patience)
	})
	return slices.DeleteFunc(waiting, func(c *closer) bool { return !c.conn.unacknowledged(patience) })
}

func (g *registry) those(belong func(*closer) bool) []*closer {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []*closer
	for c := range g.open {
		if belong(c) {
			out = append(out, c)
		}
	}
	return out
}

func (g *registry) isDead() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.dead
}

func (l *Link) newLanes() *lanes {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.newLanesLocked(&registry{})
}

func (l *Link) newLanesLocked(r *registry) *lanes {
	s := &lanes{registry: r}
	for cred := range s.by {
		d := &dialer{link: l, lanes: s, cred: credential(cred), tickets: l.tickets[cred]}
		s.by[cred] = lane{
			by:    [3]*http.Transport{short: l.shortTransport(d), stream: l.streamTransport(d), question: l.questionTransport(d)},
			gates: [3]gate{stream: newGate(len(l.servers)), question: newGate(len(l.servers))},
		}
	}
	return s
}

func (l *Link) shortTransport(d *dialer) *http.Transport {
	if l.shortHTTP2 {
		return l.streamTransport(d)
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		Protocols: &protocols,
		DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return d.dial(ctx, addr, "http/1.1")
		},
		DisableCompression:  true,
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     30 * time.Second,
	}
}

func (l *Link) streamTransport(d *dialer) *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	return &http.Transport{
		Protocols: &protocols,
		DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return d.dial(ctx, addr, "h2", "http/1.1")
		},
		DisableCompression: true,
		IdleConnTimeout:    90 * time.Second,
		// Many streams that start at once would make a connection each if
		// they could; four carry a thousand.
		MaxConnsPerHost: 4,
		HTTP2: &http.HTTP2Config{
			// A client that does not read its watch holds at most this
			// much of our memory; 1 MiB is 10 MB/s at 100 ms.
			MaxReceiveBufferPerStream: 1 << 20,
			MaxReadFrameSize:          64 << 10,
			SendPingTimeout:           l.cfg.Budgets.Idle,
			// That a connection is half open shows sooner, see sweep; on
			// a bad link an answer may take this long.
			PingTimeout:      userTimeout,
			WriteByteTimeout: userTimeout,
		},
	}
}

// questionTransport is for questions. Their connection is not pinged: it may
// be idle for long, and a question that waits shows soon that it is dead.
func (l *Link) questionTransport(d *dialer) *http.Transport {
	t := l.streamTransport(d)
	t.HTTP2.SendPingTimeout = 0
	return t
}

// dialer makes the connections of one credential.
type dialer struct {
	link    *Link
	lanes   *lanes // nil for connections that outlive their generation
	cred    credential
	tickets tls.ClientSessionCache
}

// dialError says that a connection could not be made, so that nothing of a
// request has been sent.
type dialError struct{ error }

func (e *dialError) Unwrap() error { return e.error }

// credentialError says that we have no certificate to show. It is no
// evidence about the link.
type credentialError struct{ error }

func (e *credentialError) Unwrap() error { return e.error }

// dial makes a connection and completes the TLS handshake on it.
func (d *dialer) dial(ctx context.Context, addr string, protos ...string) (net.Conn, error) {
	i := d.link.indexOf(addr)
	b := d.link.cfg.Budgets
	ctx, cancel := context.WithTimeout(ctx, 2*b.Patience)
	defer cancel()
	if d.lanes != nil {
		// A request whose connection was cut because the server is lost is
		// repeated by net/http, and shall go to another one instead.
		dialing, ok := d.lanes.addTo(i, nil, cancel)
		if !ok || !d.link.servers[i].healthy.Load() && ctx.Value(greeting{}) == nil {
			return nil, &dialError{ErrDown}
		}
		defer d.lanes.remove(dialing)
	}
	if err := d.link.dials.Wait(ctx); err != nil {
		return nil, &dialError{fmt.Errorf("too many connections are being made: %w", err)}
	}
	raw, err := connect(ctx, addr, b.Patience)
	if err != nil {
		return nil, err
	}
	c := &conn{
		Conn: raw, lanes: d.lanes, traffic: &d.link.traffic[d.cred], link: d.link, server: &d.link.servers[i],
	}
	if c.lanes != nil {
		var ok bool
		if c.entry, ok = c.lanes.addTo(i, c, func() { _ = raw.Close() }); !ok {
			_ = raw.Close()
			return nil, &dialError{ErrDown}
		}
	}
	secured, err := d.handshake(ctx, c, i, protos)
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	c.proven = true
	return secured, nil
}

// handshake secures c as a connection to server i.
func (d *dialer) handshake(ctx context.Context, c net.Conn, i int, protos []string) (*tls.Conn, error) {
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         d.link.servers[i].url.Hostname(),
		RootCAs:            d.link.cfg.ClusterCAs(),
		NextProtos:         protos,
		ClientSessionCache: d.tickets,
	}
	if cfg.RootCAs == nil {
		return nil, &credentialError{errors.New("no cluster CA to verify the server by")}
	}
	d.link.cfg.Clock.Server(cfg)
	if d.cred == node {
		cert, err := d.link.cfg.ClientCertificate()
		if err != nil {
			return nil, &credentialError{fmt.Errorf("read client certificate: %w", err)}
		}
		// Not Certificates: the certificate is shown whatever authorities
		// the server hints at.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	t := tls.Client(c, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, &dialError{fmt.Errorf("tls handshake with %s: %w", d.link.servers[i].addr, err)}
	}
	return t, nil
}

// userTimeout is how long what was sent may go without acknowledgement before
// the connection ends, and a ping without answer. It outlasts the pauses that
// TCP makes on a link that loses much.
const userTimeout = 30 * time.Second

// connect makes a TCP connection that the kernel ends by itself when its
// peer is silent for too long, for connections that no ping watches over.
func connect(ctx context.Context, addr string, patience time.Duration) (net.Conn, error) {
	d := net.Dialer{
		Timeout: patience,
		KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: 20 * time.Second, Interval: 5 * time.Second, Count: 3,
		},
		Control: func(_, _ string, c syscall.RawConn) error {
			var sockErr error
			err := c.Control(func(fd uintptr) {
				sockErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond))
			})
			return errors.Join(err, sockErr)
		},
	}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, &dialError{err}
	}
	return c, nil
}

func (l *Link) indexOf(addr string) int {
	for i := range l.servers {
		if l.servers[i].addr == addr {
			return i
		}
	}
	return 0 // unreachable: requests are only made to servers
}

// conn counts its bytes, and notes when the server was last heard. The bytes of
// a handshake count too, but for a while only: a link that many handshakes fill
// is no cut one, and who never completes any is no server. A probe's own bytes
// do not count.
type conn struct {
	net.Conn
	lanes   *lanes
	entry   *closer
	traffic *Traffic
	link    *Link
	server  *target      // nil: of a probe
	waiting atomic.Int64 // since when something sent has no answer, since Link.begun; 0: nothing is
	proven  bool         // the handshake is done: bytes are the server's
}

// waits reports whether the connection has waited for bytes for that long.
func (c *conn) waits(patience time.Duration) bool {
	since := c.waiting.Load()
	return since != 0 && time.Since(c.link.begun)-time.Duration(since) >= patience
}

// unacknowledged reports whether the peer's kernel has said nothing for that
// long, to more than one repetition of what was sent.
func (c *conn) unacknowledged(patience time.Duration) (yes bool) {
	t, ok := c.Conn.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) { // an error: it is closed
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		yes = err == nil && info.Retransmits > 1 && time.Duration(info.Last_ack_recv)*time.Millisecond >= patience
	})
	return yes
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.traffic.in.Add(int64(n))
		c.waiting.Store(0)
		if c.server != nil {
			c.server.hear(time.Since(c.link.begun), c.proven, 2*c.link.cfg.Budgets.Patience)
		}
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	if c.waiting.Load() == 0 {
		c.waiting.Store(max(1, int64(time.Since(c.link.begun))))
	}
	n, err := c.Conn.Write(p)
	c.traffic.out.Add(int64(n))
	return n, err
}

func (c *conn) Close() error {
	if c.entry != nil {
		c.lanes.remove(c.entry)
	}
	return c.Conn.Close()
}

// pick returns the server for the next try of a request, or -1 when no
// healthy one is left. Tried holds a bit for each server that has failed it.
// One that is in doubt, or has just come back in priority mode, is a last
// resort.
func (l *Link) pick(tried uint64) int {
	n, first := len(l.servers), 0
	if n == 1 {
		if tried == 0 && l.servers[0].healthy.Load() {
			return 0
		}
		return -1
	}
	var now int64
	if l.cfg.Mode == RoundRobin {
		first = int(l.turn.Add(1) % uint32(n))
	} else {
		now = int64(time.Since(l.begun))
	}
	resort := -1
	for k := range n {
		i := (first + k) % n
		s := &l.servers[i]
		if tried&(1<<i) != 0 || !s.healthy.Load() {
			continue
		}
		if !s.doubted.Load() && (now == 0 || s.preferred.Load() <= now) {
			return i
		}
		if resort < 0 || l.servers[resort].doubted.Load() && !s.doubted.Load() {
			resort = i
		}
	}
	return resort
}

// send sends req, whose URL it changes, to a healthy server; to another one
// if no connection could be made to the first, or if that was lost and req
// only reads. It returns the server too. The response and any error are
// evidence.
func (l *Link) send(req *http.Request, cred credential, by way) (*http.Response, int, error) {
	s := l.lanes.Load() // before the check: new ones are made when down
	if !l.up.Load() {
		closeBody(req)
		return nil, -1, ErrDown
	}
	t, gate := s.by[cred].by[by], s.by[cred].gates[by]
	path, rawPath := req.URL.Path, req.URL.RawPath
	var body *retained
	if req.Body != nil && len(l.servers) > 1 {
		body = &retained{ReadCloser: req.Body}
		req.Body = body
		defer body.release()
	}
	var tried uint64
	var err error
	for {
		i := l.pick(tried)
		if i < 0 {
			closeBody(req)
			if err == nil {
				err = ErrDown
			}
			return nil, -1, err
		}
		tried |= 1 << i
		to := l.servers[i].url
		req.URL.Scheme, req.URL.Host = to.Scheme, l.servers[i].addr
		req.URL.Path, req.URL.RawPath = path, rawPath
		if to.Path != "" && to.Path != "/" {
			req.URL.Path, req.URL.RawPath = joinPath(to, req.URL)
		}
		req.Host = to.Host
		var resp *http.Response
		asked := time.Now()
		stalled := time.AfterFunc(l.cfg.Budgets.Stall, func() { l.suspect(i) })
		resp, err = gate.roundTrip(t, req, i, s.registry)
		stalled.Stop()
		if err == nil {
			l.tell(resp.Header, asked)
			return resp, i, nil
		}
		err = l.blame(req.Context(), s, i, err)
		var noConn *dialError
		reads := req.Method == http.MethodGet && req.Body == nil && len(l.servers) > 1
		if !errors.As(err, &noConn) && !reads || req.Context().Err() != nil {
			return nil, i, err
		}
	}
}

// blame judges an error of a request or a body of server i. What the caller
// did itself is no evidence; anything else asks for a probe.
func (l *Link) blame(ctx context.Context, s *lanes, i int, err error) error {
	var cred *credentialError
	switch {
	case ctx.Err() != nil, errors.As(err, &cred), clientError(err) != nil:
		return err
	case s != nil && s.isDead():
		if errors.Is(err, ErrDown) {
			return err
		}
		return fmt.Errorf("%w: %w", ErrDown, err)
	}
	l.suspect(i)
	return err
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close()
	}
}

// retained keeps a request body open while its request may still be sent to
// another server.
type retained struct {
	io.ReadCloser
	mu               sync.Mutex
	released, closed bool
}

func (b *retained) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if !b.released {
		return nil
	}
	return b.ReadCloser.Close()
}

func (b *retained) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.released = true
	if b.closed {
		_ = b.ReadCloser.Close()
	}
}

// roundTripper is the link as the hub's own clients see it.
type roundTripper struct {
	link *Link
	cred credential
	asks bool // small questions only
}

// RoundTrip implements [http.RoundTripper].
func (t roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	out := req.WithContext(req.Context())
	u := *req.URL
	out.URL = &u
	by := wayOf(req)
	if t.asks {
		by = question
	}
	resp, i, err := t.link.send(out, t.cred, by)
	if err != nil {
		return nil, err
	}
	resp.Request = req
	resp.Body = &witness{ReadCloser: resp.Body, link: t.link, ctx: req.Context(), server: i}
	return resp, nil
}

// witness turns the end of a body into evidence.
type witness struct {
	io.ReadCloser
	link   *Link
	ctx    context.Context //nolint:containedctx // that of the request, as in http.Request
	server int
}

func (b *witness) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // Read returns it bare.
		err = b.link.blame(b.ctx, nil, b.server, err)
	}
	return n, err
}
