package nameserver

import (
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/miekg/dns"
)

// Where a node's name servers are written down. The second is of machines
// whose first names systemd-resolved on the machine itself.
const (
	resolvConf         = "/etc/resolv.conf"
	resolvConfResolved = "/run/systemd/resolve/resolv.conf"
)

// readServers returns the servers of the first file, or those of the second
// where all of the first are on this machine. Those in own are left out: they
// are we.
func readServers(first, second string, own []netip.Addr) ([]netip.AddrPort, error) {
	out, err := readResolvConf(first, own)
	if err != nil {
		return nil, err
	}
	local := func(a netip.AddrPort) bool { return a.Addr().IsLoopback() }
	if !slices.ContainsFunc(out, func(a netip.AddrPort) bool { return !local(a) }) {
		if behind, err := readResolvConf(second, own); err == nil && len(behind) > 0 {
			return behind, nil
		}
	}
	return out, nil
}

func readResolvConf(path string, own []netip.Addr) ([]netip.AddrPort, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("find name servers: %w", err)
	}
	defer file.Close() //nolint:errcheck // it was read only
	conf, err := dns.ClientConfigFromReader(file)
	if err != nil {
		return nil, fmt.Errorf("find name servers in %s: %w", path, err)
	}
	var out []netip.AddrPort
	for _, text := range conf.Servers {
		a, err := netip.ParseAddr(text)
		if err != nil || slices.Contains(own, a.Unmap()) {
			continue
		}
		out = append(out, netip.AddrPortFrom(a.Unmap(), 53))
	}
	return out, nil
}
