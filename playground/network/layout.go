package network

import (
	"fmt"
	"net/netip"
)

// A port is a link in a namespace; the empty namespace is the host's own.
type port struct {
	ns, link string
}

// A cable is a veth pair between something's far end and a bridge of its
// router. The bridge lets a relay be spliced in without either end seeing a
// change of address, route or name.
type cable struct {
	// end is the side that belongs to the thing at the edge: a machine,
	// a site's router or the host.
	end port
	// plug is the side in the router, a port of the bridge.
	plug   port
	bridge string
	label  string
}

type address struct {
	port
	local netip.Prefix
	// peer, when valid, makes the link point to point.
	peer netip.Addr
}

type route struct {
	port
	dst netip.Prefix
	via netip.Addr
}

// layout is a plan turned into kernel objects. It is computed without
// looking at the kernel, so that every process agrees on it.
type layout struct {
	routers  []string
	machines []string
	bridges  []port
	cables   map[string]cable
	// order is the order in which cables are made.
	order     []string
	addresses []address
	routes    []route
}

const (
	machineLink = "eth0"
	uplinkLink  = "uplink"
	lanBridge   = "lan"
)

func newLayout(p Plan) layout {
	l := layout{cables: map[string]cable{}}
	wan := p.wanRouter()
	l.routers = append(l.routers, wan)
	gw := p.gateway()
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)

	// attach joins an end to the WAN by a bridge of its own.
	attach := func(name, bridge string, end port, addr netip.Addr) port {
		at := port{wan, bridge}
		l.bridges = append(l.bridges, at)
		l.cable(name, cable{end: end, plug: port{wan, bridge + "p"}, bridge: bridge, label: name})
		l.addresses = append(l.addresses,
			address{at, netip.PrefixFrom(gw, 32), addr},
			address{end, netip.PrefixFrom(addr, 32), gw})
		return at
	}
	host := port{"", p.hostLink()}
	attach(HostTarget, "h", host, p.Host)
	l.reach(host, gw, p.WAN)

	for i, s := range p.Sites {
		r := p.siteRouter(s.Name)
		l.routers = append(l.routers, r)
		lan, up := port{r, lanBridge}, port{r, uplinkLink}
		at := attach(s.Name, fmt.Sprintf("s%d", i), up, p.uplink(i))
		l.bridges = append(l.bridges, lan)
		l.addresses = append(l.addresses, address{port: lan, local: netip.PrefixFrom(s.router(), s.Subnet.Bits())})
		l.routes = append(l.routes, route{up, all, gw})
		l.reach(at, p.uplink(i), s.Subnet)
		l.reach(host, gw, s.Subnet)
		for j, m := range s.Machines {
			ns := p.MachineNamespace(m.Name)
			eth := port{ns, machineLink}
			l.machines = append(l.machines, ns)
			l.cable(m.Name, cable{end: eth, plug: port{r, fmt.Sprintf("m%d", j)}, bridge: lanBridge, label: m.Name})
			l.addresses = append(l.addresses, address{port: eth, local: netip.PrefixFrom(m.Addr, s.Subnet.Bits())})
			l.routes = append(l.routes, route{eth, all, s.router()})
			for _, peer := range s.Machines {
				if peer.Name != m.Name {
					l.reach(eth, peer.Addr, peer.PodCIDR)
				}
			}
			l.reach(lan, m.Addr, m.PodCIDR)
			l.reach(at, p.uplink(i), m.PodCIDR)
			l.reach(host, gw, m.PodCIDR)
			if m.Name == p.ServiceVia {
				l.reach(lan, m.Addr, p.ServiceCIDR)
				l.reach(at, p.uplink(i), p.ServiceCIDR)
				l.reach(host, gw, p.ServiceCIDR)
			}
		}
	}
	return l
}

func (l *layout) cable(name string, c cable) {
	l.cables[name] = c
	l.order = append(l.order, name)
}

// reach adds a route unless there is nothing to reach.
func (l *layout) reach(from port, via netip.Addr, dst netip.Prefix) {
	if dst.IsValid() {
		l.routes = append(l.routes, route{from, dst.Masked(), via})
	}
}

func (l *layout) routesOver(p port) []route {
	var over []route
	for _, r := range l.routes {
		if r.port == p {
			over = append(over, r)
		}
	}
	return over
}
