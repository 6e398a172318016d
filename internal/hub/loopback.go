package hub

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/peer"
)

type peerKey struct{}

// peerOf is what is known of a connection's other end.
type peerOf struct {
	uid uint32
	err error
}

// withPeer asks for the other end of a new connection at once: later the
// answer could be about somebody else.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	uid, err := peer.UID(c)
	return withPeerOf(ctx, peerOf{uid: uid, err: err})
}

func withPeerOf(ctx context.Context, p peerOf) context.Context {
	return context.WithValue(ctx, peerKey{}, p)
}

// local authenticates the requests of the plain listener. A process of root
// is the node: it could take the node's key as well. With a
// token it is whom the token names.
func (h *Hub) local(r *http.Request) (*identity.Caller, error) {
	p, ok := r.Context().Value(peerKey{}).(peerOf)
	switch {
	case !ok:
		return nil, forbidden("it is not known who asks")
	case p.err != nil:
		h.log.Debug("peer of the plain listener is not known", "err", p.err)
		return nil, forbidden("only processes of root on this node may use this port: " + p.err.Error())
	case p.uid != 0:
		return nil, forbidden("only processes of root on this node may use this port; use HTTPS and a credential at --proxy-secure-port")
	case !isLoopbackHost(r.Host):
		// A name that was made to lead here is how a web page gets in.
		return nil, forbidden("ask for localhost or a loopback address at this port")
	case isBrowser(r.Header):
		return nil, forbidden("this port does not serve browsers")
	case identity.Presents(r):
		return h.authn.Authenticate(r)
	}
	return h.self, nil
}

// isLoopbackHost tells whether the Host header names this machine as itself.
func isLoopbackHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return err == nil && ip.Zone() == "" && ip.Unmap().IsLoopback()
}

// isBrowser tells by headers that a script cannot keep its browser from
// sending. Programs of Kubernetes send none of them.
func isBrowser(h http.Header) bool {
	for name := range h {
		if name == "Origin" || name == "Referer" || strings.HasPrefix(name, "Sec-Fetch-") {
			return true
		}
	}
	return false
}
