package httpx

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// ConnLimits bound the connections of a listener. Room is made by closing
// what has waited longest for a request; when nothing waits, the newcomer is
// refused. Programs on this machine share its loopback address, so limits per
// source are for other addresses only.
type ConnLimits struct {
	Total     int        // open at a time
	Fresh     int        // of which no request has come: handshakes among them
	PerSource int        // open at a time from one address
	Rate      rate.Limit // new ones per second from one address
	Burst     int
}

// DefaultConnLimits are those of a server that names none.
var DefaultConnLimits = ConnLimits{Total: 1024, Fresh: 256, PerSource: 256, Rate: 100, Burst: 400}

// stuckAfter is how long a connection may take no byte at all.
const stuckAfter = 10 * time.Minute

// maxSources is how many addresses are remembered that have no connection.
const maxSources = 1024

// conns is a listener within limits.
type conns struct {
	net.Listener
	limits  ConnLimits
	refused func(reason string)

	mu      sync.Mutex // guards the following, and the state of every guest
	open    map[*guest]struct{}
	fresh   int
	sources map[netip.Addr]*source
}

type source struct {
	open int
	pace *rate.Limiter
}

// guest is an open connection.
type guest struct {
	net.Conn
	conns  *conns
	from   *source   // nil: loopback
	since  time.Time // when it began to wait
	fresh  bool      // no request has come yet
	busy   bool      // a request is under way
	kept   bool      // never closed to make room
	closed bool

	timed atomic.Bool // somebody else has set a deadline for writes
}

func newConns(l net.Listener, limits ConnLimits, refused func(string)) *conns {
	if limits == (ConnLimits{}) {
		limits = DefaultConnLimits
	}
	if refused == nil {
		refused = func(string) {}
	}
	return &conns{
		Listener: l, limits: limits, refused: refused,
		open: map[*guest]struct{}{}, sources: map[netip.Addr]*source{},
	}
}

// Accept returns the next connection that there is room for.
func (c *conns) Accept() (net.Conn, error) {
	for {
		conn, err := c.Listener.Accept()
		if err != nil {
			return nil, err
		}
		g, victim, reason := c.admit(conn)
		if victim != nil {
			_ = victim.Close()
		}
		if reason != "" {
			c.refused(reason)
		}
		if g != nil {
			return g, nil
		}
		if t, ok := conn.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // a reset: nothing is left to wait for
		}
		_ = conn.Close()
	}
}

// admit makes a guest of a connection. When a limit was met it says which, and
// which guest makes room.
func (c *conns) admit(conn net.Conn) (g, victim *guest, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	from := c.sourceOf(conn)
	if from != nil && !from.pace.Allow() {
		return nil, nil, "connection rate"
	}
	var makesRoom func(*guest) bool
	switch {
	case from != nil && from.open >= c.limits.PerSource:
		reason, makesRoom = "connections of a source", func(o *guest) bool { return o.from == from }
	case c.fresh >= c.limits.Fresh:
		reason, makesRoom = "handshakes", func(o *guest) bool { return o.fresh }
	case len(c.open) >= c.limits.Total:
		reason, makesRoom = "connections", func(*guest) bool { return true }
	}
	if makesRoom != nil {
		for o := range c.open {
			if !o.busy && !o.kept && makesRoom(o) && (victim == nil || o.since.Before(victim.since)) {
				victim = o
			}
		}
		if victim == nil {
			return nil, nil, reason
		}
		c.forget(victim)
	}
	g = &guest{Conn: conn, conns: c, from: from, since: time.Now(), fresh: true}
	c.open[g] = struct{}{}
	c.fresh++
	if from != nil {
		from.open++
	}
	return g, victim, reason
}

func (c *conns) sourceOf(conn net.Conn) *source {
	tcp, ok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok || tcp.IP.IsLoopback() {
		return nil
	}
	addr, _ := netip.AddrFromSlice(tcp.IP)
	addr = addr.Unmap()
	s := c.sources[addr]
	if s == nil {
		if len(c.sources) >= maxSources {
			for a, old := range c.sources {
				if old.open == 0 {
					delete(c.sources, a)
				}
			}
		}
		s = &source{pace: rate.NewLimiter(c.limits.Rate, c.limits.Burst)}
		c.sources[addr] = s
	}
	return s
}

// forget takes a guest off the lists, once.
func (c *conns) forget(g *guest) {
	if g.closed {
		return
	}
	g.closed = true
	delete(c.open, g)
	if g.fresh {
		c.fresh--
	}
	if g.from != nil {
		g.from.open--
	}
}

// Close ends the connection.
func (g *guest) Close() error {
	g.conns.mu.Lock()
	g.conns.forget(g)
	g.conns.mu.Unlock()
	return g.Conn.Close()
}

// Write is that of a connection whose peer must take something now and then.
func (g *guest) Write(p []byte) (int, error) {
	if !g.timed.Load() {
		_ = g.Conn.SetWriteDeadline(time.Now().Add(stuckAfter))
	}
	return g.Conn.Write(p)
}

// SetWriteDeadline sets a deadline that stands until the next one, zero
// included.
func (g *guest) SetWriteDeadline(t time.Time) error {
	g.timed.Store(!t.IsZero())
	return g.Conn.SetWriteDeadline(t)
}

// follow is the server's word on what a connection does.
func (c *conns) follow(conn net.Conn, state http.ConnState) {
	g := guestOf(conn)
	if g == nil || (state != http.StateActive && state != http.StateIdle && state != http.StateHijacked) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if g.fresh && !g.closed {
		c.fresh--
	}
	g.fresh, g.busy, g.since = false, state != http.StateIdle, time.Now()
	if state == http.StateHijacked {
		g.timed.Store(true) // the new owner's business
	}
}

func guestOf(conn net.Conn) *guest {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	g, _ := conn.(*guest)
	return g
}

type guestKey struct{}

// KeepConn makes the connection of a request one that is never closed to make
// room for others.
func KeepConn(ctx context.Context) {
	if g, _ := ctx.Value(guestKey{}).(*guest); g != nil {
		g.conns.mu.Lock()
		g.kept = true
		g.conns.mu.Unlock()
	}
}
