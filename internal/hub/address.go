package hub

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
)

// addressEvery is how often the link-local address is looked after: network
// managers take away what they do not know.
const addressEvery = 30 * time.Second

// ensureAddress puts the address at which pods reach the hub on an interface
// of its own; on lo where the kernel has no dummy interfaces. It is not taken
// away at exit: pods keep their connections' address over a restart.
func (h *Hub) ensureAddress() error {
	ip := h.cfg.DummyIP
	if ip == nil {
		return nil
	}
	mask := net.CIDRMask(8*len(ip), 8*len(ip))
	if v4 := ip.To4(); v4 != nil {
		ip, mask = v4, net.CIDRMask(32, 32)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: mask}}
	held, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range held {
		// All addresses of a loopback network are there with the first.
		if a.IP.Equal(ip) || (ip.IsLoopback() && a.Contains(ip)) {
			return nil
		}
	}
	on, err := h.dummyLink()
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(on, addr); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("add %s to %s: %w", ip, on.Attrs().Name, err)
	}
	return nil
}

func (h *Hub) dummyLink() (netlink.Link, error) {
	name := h.cfg.DummyName
	on, err := netlink.LinkByName(name)
	if err == nil {
		return on, nil
	}
	dummy := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: name}}
	if err := netlink.LinkAdd(dummy); err != nil {
		h.log.Debug("no dummy interface, using lo", "err", err)
		return netlink.LinkByName("lo")
	}
	if on, err = netlink.LinkByName(name); err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(on); err != nil {
		return nil, fmt.Errorf("set %s up: %w", name, err)
	}
	return on, nil
}

func (h *Hub) keepAddress(ctx context.Context) error {
	tick := time.NewTicker(addressEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := h.ensureAddress(); err != nil {
				h.log.Warn("link-local address missing", "err", err)
			}
		}
	}
}
