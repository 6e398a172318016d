package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrExists is returned by Up when something of the prefix is there already.
var ErrExists = errors.New("network exists")

// ErrUnknownTarget is returned for a target that is in no plan.
var ErrUnknownTarget = errors.New("no such machine or site")

// A Network is a plan that is up. Its methods may be called concurrently.
type Network struct {
	plan   Plan
	layout layout

	mu     sync.Mutex // guards relays
	relays map[string]*running
}

// Up makes the network. On error nothing of it is left.
func Up(ctx context.Context, p Plan) (*Network, error) {
	return up(ctx, p, func(string) error { return nil })
}

// up calls step before each change, so that a test can fail any of them.
func up(ctx context.Context, p Plan, step func(string) error) (_ *Network, err error) {
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("network plan: %w", err)
	}
	old, err := leftovers(p.Prefix)
	if err != nil {
		return nil, err
	}
	if len(old) > 0 {
		return nil, fmt.Errorf("%w: %v", ErrExists, old)
	}
	if err := free(p); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			// The undo must not be cut short by what stopped the Up.
			err = errors.Join(err, Down(context.WithoutCancel(ctx), p.Prefix))
		}
	}()
	n := newNetwork(p)
	do := func(what string, f func() error) {
		if err != nil {
			return
		}
		if err = ctx.Err(); err != nil {
			return
		}
		if err = step(what); err == nil {
			err = f()
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
	}
	l := n.layout
	for _, ns := range slices.Concat(l.routers, l.machines) {
		quiet := slices.Contains(l.routers, ns)
		do("create namespace "+ns, func() error { return createSpace(ns, quiet) })
	}
	for _, b := range l.bridges {
		do("create bridge "+b.link, func() error { return createBridge(b) })
	}
	for _, name := range l.order {
		do("lay cable of "+name, func() error { return lay(l.cables[name]) })
	}
	for _, a := range l.addresses {
		do("set address "+a.local.String(), func() error { return setAddress(a) })
	}
	for _, r := range l.routes {
		do("add route to "+r.dst.String(), func() error { return addRoutes([]route{r}) })
	}
	for _, ns := range l.routers {
		do("prepare cuts in "+ns, func() error { return prepareCuts(ctx, ns) })
	}
	for _, s := range p.Sites {
		if s.NAT {
			do("set NAT of "+s.Name, func() error { return n.SetNAT(ctx, s.Name, true) })
		}
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", p.Prefix, err)
	}
	return n, nil
}

// Attach returns the network of a plan that another process made.
func Attach(p Plan) (*Network, error) {
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("network plan: %w", err)
	}
	have, err := namespaces(p.Prefix)
	if err != nil {
		return nil, err
	}
	n := newNetwork(p)
	for _, ns := range slices.Concat(n.layout.routers, n.layout.machines) {
		if !slices.Contains(have, ns) {
			return nil, fmt.Errorf("network %s: namespace %s is missing", p.Prefix, ns)
		}
	}
	return n, nil
}

func newNetwork(p Plan) *Network {
	return &Network{plan: p, layout: newLayout(p), relays: map[string]*running{}}
}

// Down removes everything that the prefix owns, however much of it there
// is. It may be called again and again. It ends no process: one that still
// runs in a namespace is left there without a link.
func Down(ctx context.Context, prefix string) error {
	var errs []error
	names, err := namespaces(prefix)
	if err != nil {
		return err
	}
	for _, ns := range names {
		errs = append(errs, deleteNamespace(ns))
	}
	errs = append(errs, withHandle("", func(h *netlink.Handle) error {
		name := Plan{Prefix: prefix}.hostLink()
		l, err := h.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err == nil {
			err = h.LinkDel(l)
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("delete link %s: %w", name, err)
		}
		return nil
	}))
	return errors.Join(append(errs, ctx.Err())...)
}

// Exists tells whether the prefix owns anything on this host.
func Exists(prefix string) (bool, error) {
	old, err := leftovers(prefix)
	return len(old) > 0, err
}

func leftovers(prefix string) ([]string, error) {
	names, err := namespaces(prefix)
	if err != nil {
		return nil, err
	}
	link := Plan{Prefix: prefix}.hostLink()
	if _, err := net.InterfaceByName(link); err == nil {
		names = append(names, "link "+link)
	}
	return names, nil
}

// free returns an error when the host uses an address of the plan already.
func free(p Plan) error {
	ours := []netip.Prefix{p.WAN}
	if p.ServiceCIDR.IsValid() {
		ours = append(ours, p.ServiceCIDR)
	}
	for _, s := range p.Sites {
		ours = append(ours, s.Subnet)
		for _, m := range s.Machines {
			if m.PodCIDR.IsValid() {
				ours = append(ours, m.PodCIDR)
			}
		}
	}
	return withHandle("", func(h *netlink.Handle) error {
		routes, err := h.RouteList(nil, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("list routes of the host: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil {
				continue
			}
			addr, ok := netip.AddrFromSlice(r.Dst.IP.To4())
			bits, _ := r.Dst.Mask.Size()
			if !ok || bits == 0 {
				continue
			}
			for _, o := range ours {
				if o.Overlaps(netip.PrefixFrom(addr, bits)) {
					return fmt.Errorf("the host has a route to %s already, which overlaps %s", r.Dst, o)
				}
			}
		}
		return nil
	})
}

func (n *Network) cable(target string) (cable, error) {
	c, ok := n.layout.cables[target]
	if !ok {
		return cable{}, fmt.Errorf("%w: %q", ErrUnknownTarget, target)
	}
	return c, nil
}

func createSpace(name string, router bool) error {
	if err := createNamespace(name); err != nil {
		return err
	}
	return inside(name, func() error {
		// Loose reverse path checks: a cut makes routes come and go.
		values := map[string]string{
			"net/ipv4/ip_forward":              "1",
			"net/ipv4/conf/all/rp_filter":      "0",
			"net/ipv4/conf/default/rp_filter":  "0",
			"net/ipv4/conf/all/send_redirects": "0",
		}
		if router {
			// Counters of an uplink must not count neighbour
			// discovery that nobody asked for.
			values["net/ipv6/conf/all/disable_ipv6"] = "1"
			values["net/ipv6/conf/default/disable_ipv6"] = "1"
		}
		if err := sysctl(values); err != nil {
			return err
		}
		return withHandle(name, func(h *netlink.Handle) error {
			return setUp(h, "lo")
		})
	})
}

func createBridge(b port) error {
	return withHandle(b.ns, func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = b.link
		attrs.HardwareAddr = hardwareAddr(b)
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return err
		}
		return setUp(h, b.link)
	})
}

// lay makes a cable and plugs it into its bridge.
func lay(c cable) error {
	far, err := openNamespace(c.end.ns)
	if err != nil {
		return err
	}
	defer far.Close() //nolint:errcheck // read only
	err = withHandle(c.plug.ns, func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = c.plug.link
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: c.end.link, PeerNamespace: netlink.NsFd(int(far))}
		if err := h.LinkAdd(veth); err != nil {
			return err
		}
		if err := h.LinkSetAlias(veth, c.label); err != nil {
			return err
		}
		if err := plugInto(h, c.plug.link, c.bridge); err != nil {
			return err
		}
		return setUp(h, c.plug.link)
	})
	if err != nil {
		return err
	}
	return withHandle(c.end.ns, func(h *netlink.Handle) error { return setUp(h, c.end.link) })
}

func plugInto(h *netlink.Handle, link, bridge string) error {
	l, err := h.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find link %s: %w", link, err)
	}
	b, err := h.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
	}
	if err := h.LinkSetMaster(l, b); err != nil {
		return fmt.Errorf("plug %s into %s: %w", link, bridge, err)
	}
	return nil
}

func setUp(h *netlink.Handle, link string) error {
	l, err := h.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find link %s: %w", link, err)
	}
	if err := h.LinkSetUp(l); err != nil {
		return fmt.Errorf("set link %s up: %w", link, err)
	}
	return nil
}

func setAddress(a address) error {
	return withHandle(a.ns, func(h *netlink.Handle) error {
		l, err := h.LinkByName(a.link)
		if err != nil {
			return fmt.Errorf("find link %s: %w", a.link, err)
		}
		addr := &netlink.Addr{IPNet: ipNet(a.local)}
		if a.peer.IsValid() {
			addr.Peer = ipNet(netip.PrefixFrom(a.peer, 32))
		}
		return h.AddrAdd(l, addr)
	})
}

// addRoutes adds routes that may be there already.
func addRoutes(routes []route) error {
	for _, r := range routes {
		err := withHandle(r.ns, func(h *netlink.Handle) error {
			l, err := h.LinkByName(r.link)
			if err != nil {
				return fmt.Errorf("find link %s: %w", r.link, err)
			}
			return h.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(r.dst), Gw: r.via.AsSlice()})
		})
		if err != nil {
			return fmt.Errorf("route to %s by %s: %w", r.dst, r.via, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// Reset takes out of a machine's namespace whatever its last life put there,
// as the power cut of a real machine would: links, addresses, rules, filters
// and connections. Its own link, cuts and shape stay. Nothing may run in the
// machine.
func (n *Network) Reset(ctx context.Context, machine string) error {
	c, err := n.cable(machine)
	if err == nil && !slices.Contains(n.layout.machines, c.end.ns) {
		err = fmt.Errorf("%w: %q", ErrUnknownTarget, machine)
	}
	if err != nil {
		return fmt.Errorf("reset %s: %w", machine, err)
	}
	err = withHandle(c.end.ns, func(h *netlink.Handle) error {
		if err := deleteLinks(h, "lo", machineLink); err != nil {
			return err
		}
		if err := restoreAddresses(h, n.layout.addresses, c.end.ns); err != nil {
			return err
		}
		if err := deleteRules(h); err != nil {
			return err
		}
		if err := deleteRoutes(h); err != nil {
			return err
		}
		return h.ConntrackTableFlush(netlink.ConntrackTable)
	})
	if err == nil {
		err = inside(c.end.ns, func() error { return nft(ctx, "flush", "ruleset") })
	}
	if err == nil {
		err = n.restoreRoutes(c.end)
	}
	if err != nil {
		return fmt.Errorf("reset %s: %w", machine, err)
	}
	return nil
}

// restoreAddresses removes every IPv4 address of a namespace that is not in
// the layout.
func restoreAddresses(h *netlink.Handle, want []address, ns string) error {
	have, err := h.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range have {
		ip, _ := netip.AddrFromSlice(a.IP.To4())
		ours := ip.IsLoopback() && a.Label == "lo" || slices.ContainsFunc(want, func(w address) bool {
			return w.ns == ns && w.local.Addr() == ip
		})
		if ours {
			continue
		}
		l, err := h.LinkByIndex(a.LinkIndex)
		if err == nil {
			err = h.AddrDel(l, &a)
		}
		if err != nil {
			return fmt.Errorf("delete address %s: %w", ip, err)
		}
	}
	return nil
}

// deleteRules removes every routing rule but the kernel's own three.
func deleteRules(h *netlink.Handle) error {
	rules, err := h.RuleList(netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	for _, r := range rules {
		switch {
		case r.Table == unix.RT_TABLE_LOCAL && r.Priority <= 0:
		case r.Table == unix.RT_TABLE_MAIN && r.Priority == 32766:
		case r.Table == unix.RT_TABLE_DEFAULT && r.Priority == 32767:
		default:
			if err := h.RuleDel(&r); err != nil {
				return fmt.Errorf("delete rule %d: %w", r.Priority, err)
			}
		}
	}
	return nil
}

// deleteRoutes removes every route that the kernel did not make by itself.
func deleteRoutes(h *netlink.Handle) error {
	routes, err := h.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Protocol == unix.RTPROT_KERNEL {
			continue
		}
		if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

// restoreRoutes puts the routes over a link back, when the link is up.
func (n *Network) restoreRoutes(end port) error {
	up, err := isUp(end)
	if err != nil || !up {
		return err
	}
	return addRoutes(n.layout.routesOver(end))
}

func isUp(p port) (up bool, err error) {
	err = withHandle(p.ns, func(h *netlink.Handle) error {
		l, err := h.LinkByName(p.link)
		if err != nil {
			return fmt.Errorf("find link %s: %w", p.link, err)
		}
		up = l.Attrs().Flags&net.FlagUp != 0
		return nil
	})
	return up, err
}
