package nameserver

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
)

const (
	// routesEvery is how long a verdict holds: routes change.
	routesEvery = 10 * time.Second
	maxVerdicts = 4096
)

// Neighbours tells the node's own programs and pods from other hosts, which
// are those that the node reaches over an interface with a default route.
// Linux takes packets for the node's link-local addresses from them, too.
type Neighbours struct {
	mu       sync.Mutex // guards the following
	until    time.Time
	uplinks  map[int]bool
	verdicts map[netip.Addr]bool
}

// Admit reports whether the address is of this node or of a pod on it.
func (n *Neighbours) Admit(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if now := time.Now(); now.After(n.until) || len(n.verdicts) >= maxVerdicts {
		uplinks, err := uplinks()
		if err != nil {
			return false // it can be asked again
		}
		n.until, n.uplinks, n.verdicts = now.Add(routesEvery), uplinks, map[netip.Addr]bool{}
	}
	verdict, ok := n.verdicts[a]
	if !ok {
		verdict = n.near(a)
		n.verdicts[a] = verdict
	}
	return verdict
}

func (n *Neighbours) near(a netip.Addr) bool {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return false // no answer would get there
	}
	return !n.uplinks[routes[0].LinkIndex]
}

// uplinks are the interfaces with a default route.
func uplinks() (map[int]bool, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return uplinksOf(routes), nil
}

func uplinksOf(routes []netlink.Route) map[int]bool {
	out := map[int]bool{}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		out[r.LinkIndex] = true
		for _, hop := range r.MultiPath {
			out[hop.LinkIndex] = true
		}
	}
	delete(out, 0)
	return out
}
