package hub

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"

	"github.com/miekg/dns"
	"github.com/spf13/pflag"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/nameserver"
)

// DNSConfig says what DNS the hub answers.
type DNSConfig struct {
	Domain    string           // the cluster's
	Addresses []netip.AddrPort // where it is answered; none: nowhere
	Servers   []netip.AddrPort // for other names; none: the machine's own
}

// dnsFlags are the flags of DNSConfig.
type dnsFlags struct {
	on                 bool
	domain             string
	addresses, servers []string
	port               uint16
}

func (f *dnsFlags) add(fs *pflag.FlagSet) {
	fs.BoolVar(&f.on, "enable-dns", true, "answer DNS for pods and programs of this node")
	fs.StringVar(&f.domain, "cluster-domain", "cluster.local", "domain of the cluster's names, as the kubelet's clusterDomain")
	fs.StringSliceVar(&f.addresses, "dns-address", nil, "addresses of this node at which DNS is answered (default --dummy-if-ip)")
	fs.Uint16Var(&f.port, "dns-port", 53, "port at which DNS is answered")
	fs.StringSliceVar(&f.servers, "dns-upstream", nil, "name servers for names that are not the cluster's, as address[:port] (default those of /etc/resolv.conf)")
}

func (f *dnsFlags) config(dummy net.IP) (DNSConfig, error) {
	cfg := DNSConfig{Domain: f.domain}
	if _, ok := dns.IsDomainName(f.domain); !ok || strings.Trim(f.domain, ".") == "" {
		return cfg, fmt.Errorf("--cluster-domain %q is no domain: give it as cluster.local", f.domain)
	}
	for _, text := range f.servers {
		at, err := netip.ParseAddrPort(text)
		if err != nil {
			ip, err := netip.ParseAddr(strings.Trim(text, "[]"))
			if err != nil {
				return cfg, fmt.Errorf("--dns-upstream %q is no address: give it as 192.0.2.53 or 192.0.2.53:5353", text)
			}
			at = netip.AddrPortFrom(ip, 53)
		}
		cfg.Servers = append(cfg.Servers, at)
	}
	if !f.on {
		return cfg, nil
	}
	if f.port == 0 {
		return cfg, fmt.Errorf("--dns-port %d is not a port: give one between 1 and 65535", f.port)
	}
	var ips []net.IP
	for _, text := range f.addresses {
		ip, err := unroutable("--dns-address", strings.TrimSpace(text))
		if err != nil {
			return cfg, err
		}
		ips = append(ips, ip)
	}
	if len(ips) == 0 && dummy != nil {
		ips = append(ips, dummy)
	}
	for _, ip := range ips {
		a, _ := netip.AddrFromSlice(ip) // it was parsed
		cfg.Addresses = append(cfg.Addresses, netip.AddrPortFrom(a.Unmap(), f.port))
	}
	return cfg, nil
}

// newDNS makes the name server. It is a client of the hub as others are: the
// node's user, at a listener of its own, by the one pipeline.
func (h *Hub) newDNS() {
	if len(h.cfg.DNS.Addresses) == 0 {
		return
	}
	h.api = newInside()
	neighbours := &nameserver.Neighbours{}
	h.dns = nameserver.New(nameserver.Config{
		Domain: h.cfg.DNS.Domain, Addresses: h.cfg.DNS.Addresses, Servers: h.cfg.DNS.Servers,
		API: &http.Transport{DialContext: h.api.dial}, Admit: neighbours.Admit, Node: h.nodeAddresses,
		Log: h.log.With("part", "dns"), Registerer: h.cfg.Registerer,
	})
}

// runDNS answers DNS until ctx ends.
func (h *Hub) runDNS(ctx context.Context) error {
	if h.dns == nil {
		<-ctx.Done()
		return nil
	}
	who := func(*http.Request) (*identity.Caller, error) { return h.self, nil }
	server := &httpx.Server{Listener: h.api, Handler: h.handler(ctx, who), Grace: stopGrace, Log: h.log}
	return daemon.Group(ctx, server.Run, h.dns.Run)
}

// nodeAddresses returns the addresses of this node, or of another of its pool.
func (h *Hub) nodeAddresses(name string) []netip.Addr {
	var text []string
	switch {
	case name == h.cfg.NodeName:
		if node, err := h.ownNode(); err == nil {
			for _, a := range node.Status.Addresses {
				text = append(text, a.Address)
			}
		}
		for _, ip := range h.cfg.NodeIPs {
			text = append(text, ip.String())
		}
	case h.pool.Membership().Has(name):
		for _, p := range h.pool.Peers() {
			if p.Node == name {
				text = append(text, p.Address)
			}
		}
	}
	var out []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, t := range text {
		if at, err := netip.ParseAddrPort(t); err == nil {
			t = at.Addr().String()
		}
		if ip, err := netip.ParseAddr(t); err == nil && !seen[ip.Unmap()] {
			seen[ip.Unmap()] = true
			out = append(out, ip.Unmap())
		}
	}
	return out
}

// inside is a listener for the hub's own clients.
type inside struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newInside() *inside { return &inside{conns: make(chan net.Conn), done: make(chan struct{})} }

func (l *inside) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept is of net.Listener.
func (l *inside) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close is of net.Listener.
func (l *inside) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr is of net.Listener.
func (l *inside) Addr() net.Addr { return &net.UnixAddr{Name: "inside", Net: "unix"} }
