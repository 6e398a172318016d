package pool

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/heartbeat"
	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/request"
)

// What the listener serves beside lists and watches.
const (
	// StatePath says how the hub does, see [State]. Who asks says of itself whether
	// its link is up, and whether it hears the cloud.
	StatePath = "/pool/v1/state"
	linkParam = "link"
	liveParam = "live"
	// HeartbeatsPath takes the heartbeats of hubs without a link.
	HeartbeatsPath = "/pool/v1/heartbeats"
	// PodsPath says what the node's kubelet says of its pods.
	PodsPath = "/pool/v1/pods"
)

// What peers may send and have in flight.
const (
	maxBody       = heartbeat.MaxText
	bodyPatience  = 10 * time.Second
	maxRequests   = 32   // of one peer, other than watches
	maxWatches    = 256  // of one peer
	totalRequests = 512  // of all
	totalWatches  = 8192 // of all
	stopGrace     = time.Second
	listenRetry   = 5 * time.Second
)

// connLimits suit peers that keep one connection, or a few.
var connLimits = httpx.ConnLimits{Total: 2048, Fresh: 128, PerSource: 32, Rate: 20, Burst: 60}

// inFlight is a request of a peer.
type inFlight struct {
	peer  string
	watch bool
	end   context.CancelFunc
}

type peerKey struct{}

// PeerFrom returns the node whose hub sent the request that the context is
// of: one of this hub's pool. It is empty elsewhere.
func PeerFrom(ctx context.Context) string {
	node, _ := ctx.Value(peerKey{}).(string)
	return node
}

// listen serves peers while the node is in a pool and its address is known,
// until ctx ends. A port that is taken is tried again: the node does without
// its pool meanwhile.
func (p *Pool) listen(ctx context.Context) {
	for ctx.Err() == nil {
		p.mu.Lock()
		in, address, changed := p.member.Pool != "", p.address, p.changed
		p.mu.Unlock()
		if !in || address == nil {
			select {
			case <-ctx.Done():
			case <-changed:
			}
			continue
		}
		err := p.listenOn(ctx, address)
		if err == nil {
			continue // the address changed
		}
		p.log.Warn("peers cannot reach this hub", "err", err, "remedy", "free the port, or give --node-ip and --multiplexer-port")
		select {
		case <-ctx.Done():
		case <-time.After(listenRetry):
		}
	}
}

// listenOn serves at one address until ctx ends, or the node leaves its pool
// or has another address.
func (p *Pool) listenOn(ctx context.Context, address net.IP) error {
	at := net.JoinHostPort(address.String(), strconv.Itoa(p.cfg.Port))
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", at)
	if err != nil {
		return fmt.Errorf("listen for peers: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with ctx
		for ctx.Err() == nil {
			p.mu.Lock()
			moved, changed := p.member.Pool == "" || !p.address.Equal(address), p.changed
			p.mu.Unlock()
			if moved {
				cancel()
				return
			}
			select {
			case <-ctx.Done():
			case <-changed:
			}
		}
	}()
	p.log.Info("peers are served", "address", at)
	s := httpx.Server{
		Listener: l, Handler: p.cfg.Protect(p.handler(ctx)), TLS: p.serverTLS(), Grace: stopGrace,
		Conns: connLimits, Refused: p.cfg.Refused, Log: p.log,
	}
	return s.Run(ctx) //nolint:wrapcheck // it names the listener
}

// serverTLS lets in who shows the certificate of a node of this cluster, and
// nobody else as far as the first request.
func (p *Pool) serverTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := p.cfg.Certificate(); c != nil {
				return c, nil
			}
			return nil, errors.New("the hub has no certificate yet")
		},
		ClientAuth: tls.RequireAnyClientCert,
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := p.verify(state.PeerCertificates)
			return err
		},
		SessionTicketsDisabled: true,
	}
}

// handler answers peers. Watches end with life.
func (p *Pool) handler(life context.Context) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Again: a connection may outlive its certificate.
		peer, err := p.verify(r.TLS.PeerCertificates)
		if err != nil {
			p.refuse(w, r, "unauthenticated", apierrors.NewUnauthorized(err.Error()))
			return
		}
		if speaksForOthers(r) {
			p.refuse(w, r, "credential", forbidden("a hub speaks for itself here: no token, no impersonation"))
			return
		}
		ctx, leave, err := p.enter(r, peer)
		if err != nil {
			p.refuse(w, r, "peer", err)
			return
		}
		defer leave()
		defer context.AfterFunc(life, leave)()
		p.route(w, r.WithContext(ctx), peer) //nolint:contextcheck // it is r's, and life ends what that does not
	})
}

// speaksForOthers tells a request with another credential than its
// connection's.
func speaksForOthers(r *http.Request) bool {
	for name := range r.Header {
		if name == "Authorization" || strings.HasPrefix(name, "Impersonate-") || strings.HasPrefix(name, "X-Remote-") {
			return true
		}
	}
	return false
}

// enter admits a request of a hub of this pool, if there is room for it.
func (p *Pool) enter(r *http.Request, peer string) (context.Context, context.CancelFunc, error) {
	ctx, cancel := context.WithCancel(context.WithValue(r.Context(), peerKey{}, peer))
	f := &inFlight{peer: peer, watch: r.URL.Query().Get("watch") != "", end: cancel}
	err := p.admit(f, remoteIP(r))
	if err != nil {
		cancel()
		return nil, nil, err
	}
	return ctx, func() {
		cancel()
		p.leave(f)
	}, nil
}

func (p *Pool) admit(f *inFlight, from net.IP) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.member.Has(f.peer) || f.peer == p.cfg.Node {
		return forbidden(fmt.Sprintf("node %s is not in the pool of %s, as this hub knows it", f.peer, p.cfg.Node))
	}
	e := p.entryLocked(f.peer)
	if time.Since(e.seen) > silentFor {
		p.helpLocked()
	}
	e.seen = time.Now()
	if from != nil && !p.member.leader(f.peer) {
		e.setAddress(from.String())
	}
	kind, most, total := 0, maxRequests, totalRequests
	if f.watch {
		kind, most, total = 1, maxWatches, totalWatches
	}
	if e.busy[kind] >= most || p.busy[kind] >= total {
		return apierrors.NewTooManyRequests(fmt.Sprintf("this hub serves %d requests of one peer and %d of all", most, total), 1)
	}
	p.inFlight[f] = e
	e.busy[kind]++
	p.busy[kind]++
	return nil
}

func (p *Pool) leave(f *inFlight) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, ok := p.inFlight[f]
	if !ok {
		return
	}
	delete(p.inFlight, f)
	kind := 0
	if f.watch {
		kind = 1
	}
	e.busy[kind]--
	p.busy[kind]--
}

func remoteIP(r *http.Request) net.IP {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return nil
	}
	return net.ParseIP(host)
}

// route knows all that there is for peers. What it does not name is refused.
func (p *Pool) route(w http.ResponseWriter, r *http.Request, peer string) {
	switch r.URL.Path {
	case HeartbeatsPath:
		switch {
		case r.Method != http.MethodPost:
			p.refuse(w, r, "method", methodNotAllowed(r.Method))
		case p.cfg.Heartbeats == nil:
			p.refuse(w, r, "path", forbidden("this hub vouches for nobody"))
		default:
			if err := httpx.LimitBody(r, maxBody, bodyPatience); err != nil {
				p.refuse(w, r, "body", err)
				return
			}
			p.cfg.Heartbeats.ServeHTTP(w, r)
		}
		return
	}
	if r.Method != http.MethodGet {
		p.refuse(w, r, "method", methodNotAllowed(r.Method))
		return
	}
	if r.URL.Path == PodsPath && p.cfg.Pods != nil {
		p.cfg.Pods.ServeHTTP(w, r)
		return
	}
	if r.URL.Path == StatePath {
		says := r.URL.Query()
		p.hint(peer, says.Get(linkParam) == "true", says.Get(liveParam) == "true")
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(p.State()) // the peer may be gone
		return
	}
	info, err := request.Resolve(r)
	if err != nil {
		p.refuse(w, r, "request", apierrors.NewBadRequest(err.Error()))
		return
	}
	if !info.Reads() || info.Verb == "get" || info.Upgrade || !p.Membership().Shares(info.Resource) {
		p.refuse(w, r, "path", forbidden("peers may list and watch what the pool shares, and nothing else; this is "+info.String()))
		return
	}
	if err := httpx.LimitBody(r, 0, bodyPatience); err != nil {
		p.refuse(w, r, "body", err)
		return
	}
	if err := p.cfg.Serve(w, r, info, peer); err != nil {
		httpx.WriteStatus(w, r, err)
	}
}

func (p *Pool) refuse(w http.ResponseWriter, r *http.Request, reason string, err error) {
	p.cfg.Refused("peers: " + reason)
	httpx.WriteStatus(w, r, err)
}

func forbidden(why string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden, Message: "yurthub: " + why,
	}}
}

func methodNotAllowed(method string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusMethodNotAllowed, Reason: metav1.StatusReasonMethodNotAllowed,
		Message: "yurthub: " + method + " is not for peers",
	}}
}
