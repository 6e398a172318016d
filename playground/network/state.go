package network

import (
	"context"
	"fmt"

	"github.com/vishvananda/netlink"
)

// TargetState is what is done to a target's link now, as read from the
// kernel.
type TargetState struct {
	Target string
	// Down tells that the link is down.
	Down bool
	// Blackhole is the direction in which packets are dropped; empty when
	// none.
	Blackhole Direction
	// Relayed tells that the link goes through a relay. In and Out are
	// its shapes when this process runs it, and zero otherwise.
	Relayed bool
	In, Out Shape
	// NAT is on a site only.
	NAT bool
}

// Touched tells whether anything is done to the link.
func (t TargetState) Touched() bool {
	return t != TargetState{Target: t.Target}
}

// Counters is what passed over a target's link since it was made, as seen
// from the target. A packet that is dropped on the way out is counted; one
// that is dropped on the way in is not.
type Counters struct {
	PacketsIn, PacketsOut, BytesIn, BytesOut uint64
}

// State returns the state of every target: the host, then each site with its
// machines.
func (n *Network) State(ctx context.Context) ([]TargetState, error) {
	sites := map[string]bool{}
	for _, s := range n.plan.Sites {
		sites[s.Name] = true
	}
	var all []TargetState
	for _, target := range n.layout.order {
		t, err := n.targetState(ctx, target, sites[target])
		if err != nil {
			return nil, fmt.Errorf("read state of %s: %w", target, err)
		}
		all = append(all, t)
	}
	return all, nil
}

func (n *Network) targetState(ctx context.Context, target string, site bool) (TargetState, error) {
	t := TargetState{Target: target}
	c := n.layout.cables[target]
	up, err := isUp(c.end)
	if err != nil {
		return t, err
	}
	t.Down = !up
	if t.Blackhole, err = drops(ctx, c); err != nil {
		return t, err
	}
	if t.Relayed, err = spliced(c); err != nil {
		return t, err
	}
	if site {
		if t.NAT, err = n.natIsOn(ctx, target); err != nil {
			return t, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if r := n.relays[target]; r != nil {
		t.In, _ = r.in.snapshot()
		t.Out, _ = r.out.snapshot()
	}
	return t, nil
}

// Counters returns the counters of a target's link.
func (n *Network) Counters(target string) (Counters, error) {
	var k Counters
	c, err := n.cable(target)
	if err == nil {
		err = withHandle(c.end.ns, func(h *netlink.Handle) error {
			l, err := h.LinkByName(c.end.link)
			if err != nil {
				return err
			}
			if s := l.Attrs().Statistics; s != nil {
				k = Counters{s.RxPackets, s.TxPackets, s.RxBytes, s.TxBytes}
			}
			return nil
		})
	}
	if err != nil {
		return k, fmt.Errorf("read counters of %s: %w", target, err)
	}
	return k, nil
}
