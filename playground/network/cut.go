package network

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"sigs.k8s.io/knftables"
)

// Mode is how a target is cut off.
type Mode string

const (
	// LinkDown takes the link down, as pulling a cable does: who is at
	// the end learns at once that there is no route.
	LinkDown Mode = "down"
	// Blackhole drops every packet in silence, those of established
	// connections too. ARP still passes, so that nobody learns anything.
	Blackhole Mode = "blackhole"
)

// Direction is the way of packets as seen from the target.
type Direction string

const (
	// Both is traffic to and from the target.
	Both Direction = "both"
	// In is traffic to the target.
	In Direction = "in"
	// Out is traffic from the target.
	Out Direction = "out"
)

func (d Direction) has(one Direction) bool {
	return d == one || d == Both
}

// cutTable is in every router. Its two sets hold the ports whose packets
// are dropped, so that a cut is one atomic change and can be read back.
const cutTable = "cut"

func prepareCuts(ctx context.Context, ns string) error {
	return withTable(ns, knftables.BridgeFamily, cutTable, func(t knftables.Interface) error {
		tx := t.NewTransaction()
		tx.Add(&knftables.Table{})
		for _, c := range []struct {
			dir  Direction
			hook knftables.BaseChainHook
			key  string
		}{
			{Out, knftables.PreroutingHook, "iifname"},
			{In, knftables.PostroutingHook, "oifname"},
		} {
			set := string(c.dir)
			tx.Add(&knftables.Set{Name: set, Type: "ifname"})
			tx.Add(&knftables.Chain{
				Name:     "drop-" + set,
				Type:     knftables.PtrTo(knftables.FilterType),
				Hook:     new(c.hook),
				Priority: knftables.PtrTo(knftables.BaseChainPriority("0")),
			})
			tx.Add(&knftables.Rule{
				Chain: "drop-" + set,
				Rule:  knftables.Concat(c.key, "@", set, "ether type != arp", "drop"),
			})
		}
		return t.Run(ctx, tx)
	})
}

// Cut cuts a machine's own link or a site's uplink (or HostTarget). A link
// can only be taken down in both directions. Cutting again changes nothing;
// the two modes can be on at once.
func (n *Network) Cut(ctx context.Context, target string, mode Mode, dir Direction) error {
	c, err := n.cable(target)
	if err != nil {
		return fmt.Errorf("cut: %w", err)
	}
	switch mode {
	case LinkDown:
		if dir != Both {
			return fmt.Errorf("cut %s: a link goes down in both directions only", target)
		}
		err = withHandle(c.end.ns, func(h *netlink.Handle) error {
			l, err := h.LinkByName(c.end.link)
			if err != nil {
				return fmt.Errorf("find link %s: %w", c.end.link, err)
			}
			return h.LinkSetDown(l)
		})
	case Blackhole:
		err = n.setDrops(ctx, c, dir)
	default:
		err = fmt.Errorf("unknown mode %q", mode)
	}
	if err != nil {
		return fmt.Errorf("cut %s: %w", target, err)
	}
	return nil
}

// Heal undoes every cut of a target. Healing what is whole is no fault.
func (n *Network) Heal(ctx context.Context, target string) error {
	c, err := n.cable(target)
	if err != nil {
		return fmt.Errorf("heal: %w", err)
	}
	err = withHandle(c.end.ns, func(h *netlink.Handle) error { return setUp(h, c.end.link) })
	if err == nil {
		// Taking the link down took its routes away.
		err = n.restoreRoutes(c.end)
	}
	if err == nil {
		err = n.setDrops(ctx, c, "")
	}
	if err != nil {
		return fmt.Errorf("heal %s: %w", target, err)
	}
	return nil
}

// setDrops makes a plug a member of the sets of exactly the directions dir.
func (n *Network) setDrops(ctx context.Context, c cable, dir Direction) error {
	return withTable(c.plug.ns, knftables.BridgeFamily, cutTable, func(t knftables.Interface) error {
		tx := t.NewTransaction()
		for _, d := range []Direction{In, Out} {
			el := &knftables.Element{Set: string(d), Key: []string{quoted(c.plug.link)}}
			// Adding first makes the deletion safe.
			tx.Add(el)
			if !dir.has(d) {
				tx.Delete(el)
			}
		}
		return t.Run(ctx, tx)
	})
}

// drops returns the direction in which a plug drops, or the empty one.
func drops(ctx context.Context, c cable) (dir Direction, err error) {
	err = withTable(c.plug.ns, knftables.BridgeFamily, cutTable, func(t knftables.Interface) error {
		for _, d := range []Direction{In, Out} {
			els, err := t.ListElements(ctx, "set", string(d))
			if err != nil {
				return err
			}
			cut := slices.ContainsFunc(els, func(e *knftables.Element) bool {
				return strings.Trim(e.Key[0], `"`) == c.plug.link
			})
			switch {
			case cut && dir == "":
				dir = d
			case cut:
				dir = Both
			}
		}
		return nil
	})
	return dir, err
}

const (
	natTable = "nat"
	natChain = "leaving"
)

// SetNAT switches masquerading of a site on its uplink on or off. While it
// is on, connections from outside into the site are dropped in silence.
// Established connections through the router do not survive the change.
func (n *Network) SetNAT(ctx context.Context, site string, on bool) error {
	if !slices.ContainsFunc(n.plan.Sites, func(s Site) bool { return s.Name == site }) {
		return fmt.Errorf("set NAT: %w: %q", ErrUnknownTarget, site)
	}
	ns := n.plan.siteRouter(site)
	err := withTable(ns, knftables.IPv4Family, natTable, func(t knftables.Interface) error {
		tx := t.NewTransaction()
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
		if on {
			tx.Add(&knftables.Table{})
			tx.Add(&knftables.Chain{
				Name:     natChain,
				Type:     knftables.PtrTo(knftables.NATType),
				Hook:     knftables.PtrTo(knftables.PostroutingHook),
				Priority: knftables.PtrTo(knftables.SNATPriority),
			})
			tx.Add(&knftables.Rule{Chain: natChain, Rule: "oifname " + uplinkLink + " masquerade"})
			tx.Add(&knftables.Chain{
				Name:     "guard",
				Type:     knftables.PtrTo(knftables.FilterType),
				Hook:     knftables.PtrTo(knftables.ForwardHook),
				Priority: knftables.PtrTo(knftables.FilterPriority),
			})
			tx.Add(&knftables.Rule{Chain: "guard", Rule: "iifname " + uplinkLink + " ct state established,related accept"})
			tx.Add(&knftables.Rule{Chain: "guard", Rule: "iifname " + uplinkLink + " drop"})
		}
		return t.Run(ctx, tx)
	})
	if err == nil {
		err = withHandle(ns, func(h *netlink.Handle) error {
			return h.ConntrackTableFlush(netlink.ConntrackTable)
		})
	}
	if err != nil {
		return fmt.Errorf("set NAT of %s: %w", site, err)
	}
	return nil
}

func (n *Network) natIsOn(ctx context.Context, site string) (on bool, err error) {
	err = withTable(n.plan.siteRouter(site), knftables.IPv4Family, natTable, func(t knftables.Interface) error {
		rules, err := t.ListRules(ctx, natChain)
		if knftables.IsNotFound(err) {
			return nil
		}
		on = len(rules) > 0
		return err
	})
	return on, err
}

func withTable(ns string, family knftables.Family, table string, f func(knftables.Interface) error) error {
	return inside(ns, func() error {
		t, err := knftables.New(family, table)
		if err != nil {
			return fmt.Errorf("open nftables in %s: %w", ns, err)
		}
		return f(t)
	})
}

func nft(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "nft", args...).CombinedOutput()
	if err != nil {
		return errors.Join(fmt.Errorf("nft %s: %w", strings.Join(args, " "), err), errors.New(strings.TrimSpace(string(out))))
	}
	return nil
}

func quoted(s string) string {
	return `"` + s + `"`
}
