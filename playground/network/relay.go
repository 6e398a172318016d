package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A relay carries the frames of one cable through this process. The cable's
// plug is moved from its bridge to a bridge of its own together with one
// TAP; a second TAP takes the plug's place. Neither end sees a change of
// address, route or name, and ARP passes through as well.
type relay struct {
	cable cable
	// near is on the side of the target, far is in the router.
	near, far *os.File
	// in is what reaches the target, out what leaves it.
	in, out *lane
}

// running is a relay with the goroutine that runs it.
type running struct {
	*relay
	stop context.CancelFunc
	done chan error
}

const (
	maxFrame  = 64 << 10
	nearTAP   = "n"
	farTAP    = "f"
	relayLink = "r"
)

func newRelay(c cable) (*relay, error) {
	r := &relay{cable: c, in: newLane(), out: newLane()}
	// A relay of a process that died leaves its bridge behind.
	if err := splice(c, false); err != nil {
		return nil, err
	}
	err := inside(c.plug.ns, func() (err error) {
		if r.near, err = openTAP(c.plug.link + nearTAP); err != nil {
			return err
		}
		r.far, err = openTAP(c.plug.link + farTAP)
		return err
	})
	if err == nil {
		err = splice(c, true)
	}
	if err != nil {
		r.close()
		return nil, errors.Join(err, splice(c, false))
	}
	return r, nil
}

// close closes the TAPs, which removes them from their namespace.
func (r *relay) close() {
	for _, f := range []*os.File{r.near, r.far} {
		if f != nil {
			_ = f.Close()
		}
	}
}

func openTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("create TAP %s: %w", name, err)
	}
	// Non-blocking from the start: reads end when the file is closed.
	return os.NewFile(uintptr(fd), name), nil
}

// splice moves the plug of a cable to the relay's bridge, or back.
func splice(c cable, into bool) error {
	bridge := c.plug.link + relayLink
	return withHandle(c.plug.ns, func(h *netlink.Handle) error {
		if !into {
			if err := plugInto(h, c.plug.link, c.bridge); err != nil {
				return err
			}
			l, err := h.LinkByName(bridge)
			if errors.As(err, &netlink.LinkNotFoundError{}) {
				return nil
			}
			if err == nil {
				err = h.LinkDel(l)
			}
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridge
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("create bridge %s: %w", bridge, err)
		}
		for _, tap := range []struct{ name, bridge string }{
			{c.plug.link + nearTAP, bridge},
			{c.plug.link + farTAP, c.bridge},
		} {
			if err := plugInto(h, tap.name, tap.bridge); err != nil {
				return err
			}
			if err := setUp(h, tap.name); err != nil {
				return err
			}
		}
		if err := setUp(h, bridge); err != nil {
			return err
		}
		return plugInto(h, c.plug.link, bridge)
	})
}

// spliced tells whether a cable goes through a relay, alive or not.
func spliced(c cable) (yes bool, err error) {
	err = withHandle(c.plug.ns, func(h *netlink.Handle) error {
		l, err := h.LinkByName(c.plug.link)
		if err != nil {
			return fmt.Errorf("find link %s: %w", c.plug.link, err)
		}
		b, err := h.LinkByName(c.bridge)
		if err != nil {
			return fmt.Errorf("find bridge %s: %w", c.bridge, err)
		}
		yes = l.Attrs().MasterIndex != b.Attrs().Index
		return nil
	})
	return yes, err
}

// run carries frames until ctx ends, then joins the cable again.
func (r *relay) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, 2)
	var wg sync.WaitGroup
	carry := func(from, to *os.File, l *lane) {
		wg.Go(func() {
			errs <- receive(from, l)
			cancel()
		})
		wg.Go(func() { deliver(ctx, to, l) })
	}
	carry(r.near, r.far, r.out)
	carry(r.far, r.near, r.in)
	<-ctx.Done()
	err := splice(r.cable, false)
	if errors.Is(err, fs.ErrNotExist) || errors.As(err, &netlink.LinkNotFoundError{}) {
		// The network is down.
		err = nil
	}
	r.close()
	wg.Wait()
	return errors.Join(err, <-errs, <-errs)
}

// receive reads frames into a lane until the file is closed or its link is
// deleted.
func receive(from *os.File, l *lane) error {
	buf := make([]byte, maxFrame)
	for {
		n, err := from.Read(buf)
		switch {
		case errors.Is(err, os.ErrClosed), errors.Is(err, unix.EBADFD):
			return nil
		case err != nil:
			return fmt.Errorf("read frames of %s: %w", from.Name(), err)
		}
		l.admit(time.Now(), append([]byte(nil), buf[:n]...))
	}
}

// deliver writes the frames of a lane when they are due, until ctx ends.
func deliver(ctx context.Context, to *os.File, l *lane) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		due, wait := l.take(time.Now())
		for _, data := range due {
			// A link that is down or gone drops frames, as any does.
			_, _ = to.Write(data)
		}
		var later <-chan time.Time
		if wait > 0 {
			timer.Reset(wait)
			later = timer.C
		}
		select {
		case <-later:
		case <-l.more:
		case <-ctx.Done():
			return
		}
	}
}

// Shape narrows a target's link in one direction or both, by a relay that
// runs in this process until the shapes of both directions are zero or the
// network is closed. A change takes effect with the next packet.
func (n *Network) Shape(ctx context.Context, target string, dir Direction, s Shape) error {
	c, err := n.cable(target)
	if err == nil && !s.valid() {
		err = fmt.Errorf("impossible shape %+v", s)
	}
	if err == nil && !dir.has(In) && !dir.has(Out) {
		err = fmt.Errorf("unknown direction %q", dir)
	}
	if err != nil {
		return fmt.Errorf("shape %s: %w", target, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.relays[target]
	if r == nil {
		if s.IsZero() {
			// Another process may have left a relay behind.
			if err := splice(c, false); err != nil {
				return fmt.Errorf("shape %s: %w", target, err)
			}
			return nil
		}
		raw, err := newRelay(c)
		if err != nil {
			return fmt.Errorf("shape %s: %w", target, err)
		}
		// The relay outlives the call; Close ends it.
		runCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
		r = &running{relay: raw, stop: stop, done: make(chan error, 1)}
		go func() { r.done <- r.run(runCtx) }()
		n.relays[target] = r
	}
	if dir.has(In) {
		r.in.set(s)
	}
	if dir.has(Out) {
		r.out.set(s)
	}
	in, _ := r.in.snapshot()
	out, _ := r.out.snapshot()
	if in.IsZero() && out.IsZero() {
		return n.unshape(target)
	}
	return nil
}

// unshape ends a relay. The caller holds mu.
func (n *Network) unshape(target string) error {
	r := n.relays[target]
	delete(n.relays, target)
	r.stop()
	if err := <-r.done; err != nil {
		return fmt.Errorf("end relay of %s: %w", target, err)
	}
	return nil
}

// Close ends the relays of this process and leaves the network up.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for target := range n.relays {
		errs = append(errs, n.unshape(target))
	}
	return errors.Join(errs...)
}

// RelayStats counts the packets of a relay by direction.
type RelayStats struct {
	In, Out LaneStats
}

// RelayStats returns the counters of a target's relay, and false when this
// process runs none.
func (n *Network) RelayStats(target string) (RelayStats, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.relays[target]
	if r == nil {
		return RelayStats{}, false
	}
	_, in := r.in.snapshot()
	_, out := r.out.snapshot()
	return RelayStats{In: in, Out: out}, true
}

// hardwareAddr returns a fixed address for a bridge. A bridge without one
// takes that of a port, and changes it when a relay is spliced in.
func hardwareAddr(p port) net.HardwareAddr {
	sum := uint32(2166136261)
	for _, b := range []byte(p.ns + "/" + p.link) {
		sum = (sum ^ uint32(b)) * 16777619
	}
	return net.HardwareAddr{0x02, 0x59, byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)}
}
