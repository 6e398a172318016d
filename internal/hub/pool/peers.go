package pool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	dialPatience = 3 * time.Second
	idleConn     = 30 * time.Second
	// pingAfter and pingPatience find out that a peer is gone without a word.
	pingAfter    = 5 * time.Second
	pingPatience = 5 * time.Second
)

// entry is what the hub knows of a peer. It is guarded by the pool's mu, but
// for transport, which is made once for an address.
type entry struct {
	node      string
	address   string               // IP; empty: not known
	seen      time.Time            // when it last called or answered
	busy      [2]int               // its requests and watches in flight here
	proved    map[string]time.Time // when the cloud last proved what it holds, by scope
	transport *http.Transport
}

func (p *Pool) entryLocked(node string) *entry {
	e, ok := p.book[node]
	if !ok {
		e = &entry{node: node}
		p.book[node] = e
	}
	return e
}

func (e *entry) setAddress(address string) {
	if e.address == address {
		return
	}
	e.close()
	e.address = address
}

// close drops the connections that carry nothing; the others end with what
// they carry.
func (e *entry) close() {
	if e.transport != nil {
		e.transport.CloseIdleConnections()
		e.transport = nil
	}
}

// Transport returns the way to a peer, over mutual TLS: who answers is that
// node's hub or nobody. Of a request's URL only path and query count.
func (p *Pool) Transport(node string) http.RoundTripper { return way{p, node} }

type way struct {
	pool *Pool
	node string
}

// RoundTrip implements [http.RoundTripper].
func (t way) RoundTrip(req *http.Request) (*http.Response, error) {
	p := t.pool
	p.mu.Lock()
	e, ok := p.book[t.node]
	if !ok || e.address == "" {
		p.mu.Unlock()
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, fmt.Errorf("ask peer %s: its address is not known", t.node)
	}
	if e.transport == nil {
		e.transport = p.transportTo(t.node, p.address, net.ParseIP(e.address))
	}
	transport, host := e.transport, net.JoinHostPort(e.address, strconv.Itoa(p.cfg.Port))
	p.mu.Unlock()
	out := req.WithContext(req.Context())
	u := *req.URL
	u.Scheme, u.Host = "https", host
	out.URL, out.Host = &u, host
	resp, err := transport.RoundTrip(out)
	if err != nil {
		return nil, fmt.Errorf("ask peer %s at %s: %w", t.node, host, err)
	}
	if resp.StatusCode == http.StatusUnauthorized {
		// By now there may be another certificate: the next request makes
		// connections of its own, busy as these are.
		p.mu.Lock()
		if e.transport == transport {
			e.close()
		}
		p.mu.Unlock()
	}
	resp.Request = req
	p.mu.Lock()
	e.seen = time.Now()
	p.mu.Unlock()
	return resp, nil
}

// transportTo connects to one peer, from the address at which it finds this
// hub in return.
func (p *Pool) transportTo(node string, from, to net.IP) *http.Transport {
	dialer := net.Dialer{Timeout: dialPatience}
	if from != nil && (from.To4() == nil) == (to.To4() == nil) {
		dialer.LocalAddr = &net.TCPAddr{IP: from}
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	return &http.Transport{
		Protocols:          &protocols,
		DisableCompression: true,
		IdleConnTimeout:    idleConn,
		MaxConnsPerHost:    4,
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 2*dialPatience)
			defer cancel()
			raw, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err //nolint:wrapcheck // wrapped once, in RoundTrip
			}
			c := tls.Client(&counted{Conn: raw, in: &p.metrics.in, out: &p.metrics.out}, p.clientTLS(node))
			if err := c.HandshakeContext(ctx); err != nil {
				_ = raw.Close()
				return nil, err //nolint:wrapcheck // as above
			}
			return c, nil
		},
		HTTP2: &http.HTTP2Config{
			MaxReceiveBufferPerStream: 1 << 20, MaxReadFrameSize: 64 << 10,
			SendPingTimeout: pingAfter, PingTimeout: pingPatience, WriteByteTimeout: pingPatience,
		},
	}
}

// clientTLS shows this node's certificate and takes only that of the node.
// Nodes' certificates carry no addresses, so a name is what is compared.
func (p *Pool) clientTLS(node string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2", "http/1.1"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c := p.cfg.Certificate(); c != nil {
				return c, nil
			}
			return nil, errors.New("the hub has no certificate yet")
		},
		InsecureSkipVerify: true, // VerifyConnection does more than what this skips
		VerifyConnection: func(state tls.ConnectionState) error {
			got, err := p.verify(state.PeerCertificates)
			if err == nil && got != node {
				err = fmt.Errorf("node %s answers there", got)
			}
			return err
		},
	}
}

// counted counts the bytes of a connection.
type counted struct {
	net.Conn
	in, out *atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.in.Add(int64(n))
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.out.Add(int64(n))
	return n, err
}

func cutPrefix(user string) (node string, ok bool) {
	node, ok = strings.CutPrefix(user, "system:node:")
	return node, ok && node != ""
}
