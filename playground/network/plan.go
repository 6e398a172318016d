package network

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
)

// Plan is the complete desired network.
type Plan struct {
	// Prefix starts the name of every namespace and host link. It holds
	// at most eight lower case letters and digits, so that no plan's
	// prefix is the start of another plan's names.
	Prefix string
	// WAN is the prefix of the routers' own addresses. Its last but one
	// address is the WAN router.
	WAN netip.Prefix
	// Host is the host's address inside WAN, where the control plane
	// listens.
	Host  netip.Addr
	Sites []Site
	// ServiceCIDR, when valid, is routed from the host to the machine
	// named ServiceVia, whose kube-proxy serves it.
	ServiceCIDR netip.Prefix
	ServiceVia  string
}

// Site is a group of machines behind one router with one uplink.
type Site struct {
	Name string
	// Subnet holds the machines' addresses; its first address is the
	// site's router.
	Subnet netip.Prefix
	// NAT masquerades the site behind its router: connections out work,
	// connections in do not.
	NAT      bool
	Machines []Host
}

// Host is one machine of a site.
type Host struct {
	Name string
	Addr netip.Addr
	// PodCIDR, when valid, is routed to the machine everywhere.
	PodCIDR netip.Prefix
}

// HostTarget names the host's own cable to the WAN as a target, so that the
// control plane can be cut off from everybody at once.
const HostTarget = "host"

// MachineNamespace returns the name of the network namespace of a machine.
func (p Plan) MachineNamespace(machine string) string {
	return p.Prefix + "-" + machine
}

// MachineNamespacePath returns the path of the namespace of a machine, as
// systemd-nspawn wants it.
func (p Plan) MachineNamespacePath(machine string) string {
	return namespaceDir + "/" + p.MachineNamespace(machine)
}

func (p Plan) wanRouter() string {
	return p.Prefix + ".wan"
}

func (p Plan) siteRouter(site string) string {
	return p.Prefix + ".site-" + site
}

func (p Plan) hostLink() string {
	return p.Prefix + "-wan"
}

// gateway returns the address of the WAN router.
func (p Plan) gateway() netip.Addr {
	return last(p.WAN).Prev()
}

// uplink returns the WAN address of the router of the i-th site.
func (p Plan) uplink(i int) netip.Addr {
	a := p.gateway()
	for range i + 1 {
		a = a.Prev()
	}
	return a
}

func (s Site) router() netip.Addr {
	return s.Subnet.Masked().Addr().Next()
}

func last(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		a[bit/8] |= 1 << (7 - bit%8)
	}
	return netip.AddrFrom4(a)
}

// Validate returns every fault of the plan.
func (p Plan) Validate() error { //nolint:gocyclo // one check after the other
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf(format, args...))
	}
	if !regexp.MustCompile(`^[a-z][a-z0-9]{0,7}$`).MatchString(p.Prefix) {
		bad("prefix %q: want up to eight lower case letters and digits", p.Prefix)
	}
	taken := map[netip.Prefix]string{}
	claim := func(what string, c netip.Prefix) bool {
		if !c.IsValid() || !c.Addr().Is4() {
			bad("%s: %s is no IPv4 prefix", what, c)
			return false
		}
		for other, owner := range taken {
			if other.Overlaps(c) {
				bad("%s: %s overlaps %s of %s", what, c, other, owner)
			}
		}
		taken[c] = what
		return true
	}
	if claim("WAN", p.WAN) {
		for i := range p.Sites {
			if a := p.uplink(i); a == p.Host || !p.WAN.Contains(a) {
				bad("WAN: %s has no room for %d sites", p.WAN, len(p.Sites))
				break
			}
		}
		if !p.WAN.Contains(p.Host) || p.Host == p.gateway() {
			bad("host address %s is not a free address of %s", p.Host, p.WAN)
		}
	}
	word := regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)
	names := map[string]bool{HostTarget: true}
	name := func(what, n string) {
		if !word.MatchString(n) || len(n) > 63 {
			bad("%s %q: want a DNS name of at most 63 characters", what, n)
		}
		if names[n] {
			bad("%s %q: name taken", what, n)
		}
		names[n] = true
	}
	machines := map[string]bool{}
	for _, s := range p.Sites {
		name("site", s.Name)
		if !claim("site "+s.Name, s.Subnet) {
			continue
		}
		addrs := map[netip.Addr]bool{s.router(): true, last(s.Subnet): true, s.Subnet.Masked().Addr(): true}
		for _, m := range s.Machines {
			name("machine", m.Name)
			machines[m.Name] = true
			if !s.Subnet.Contains(m.Addr) || addrs[m.Addr] {
				bad("machine %s: %s is not a free address of %s", m.Name, m.Addr, s.Subnet)
			}
			addrs[m.Addr] = true
			if m.PodCIDR.IsValid() {
				claim("pods of "+m.Name, m.PodCIDR)
			}
		}
	}
	if p.ServiceCIDR.IsValid() {
		claim("services", p.ServiceCIDR)
		if !machines[p.ServiceVia] {
			bad("services are routed by %q, which is no machine", p.ServiceVia)
		}
	}
	return errors.Join(errs...)
}
