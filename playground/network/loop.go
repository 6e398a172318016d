package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Loop is a link of real packets within one network namespace, which needs
// root and no machine. A TUN device gives every packet that is sent to its
// far address back to the kernel with the two addresses exchanged: who dials
// far reaches the listener at near, and both ends are ordinary sockets.
// Between, each direction passes a lane, so that packets are lost, delayed
// and queued as on a wire, and TCP does what it does there.
type Loop struct {
	near, far netip.Addr
	tun       *os.File
	out, in   *lane // towards the listener, and back
	stop      context.CancelFunc
	wg        sync.WaitGroup

	mu    sync.Mutex      // guards the following
	port  uint16          // of the listener
	flows map[uint16]bool // by the dialler's port: whether it is forgotten
}

// MaxLoops is how many loops a machine may have at once.
const MaxLoops = 64

// loopFar and loopNear are the addresses of the loop with device number n,
// from the range that is reserved for benchmarks of networks.
func loopFar(n int) netip.Addr  { return netip.AddrFrom4([4]byte{198, 18, 113, byte(2 * n)}) }
func loopNear(n int) netip.Addr { return loopFar(n).Next() }

// LoopAddresses are all addresses that loops are dialled at, for the
// certificates of servers behind them.
func LoopAddresses() []string {
	out := make([]string, MaxLoops)
	for n := range out {
		out[n] = loopFar(n).String()
	}
	return out
}

// OpenLoop makes a loop. Close ends it.
func OpenLoop() (*Loop, error) {
	tun, name, err := openTUN("ylink%d")
	if err != nil {
		return nil, err
	}
	l := &Loop{tun: tun, out: newLane(), in: newLane(), flows: map[uint16]bool{}}
	if err := l.setUp(name); err != nil {
		return nil, errors.Join(fmt.Errorf("set up %s: %w", name, err), tun.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	l.wg.Go(l.receive)
	l.wg.Go(func() { deliver(ctx, tun, l.out) })
	l.wg.Go(func() { deliver(ctx, tun, l.in) })
	return l, nil
}

func openTUN(pattern string) (*os.File, string, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(pattern)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, "", fmt.Errorf("create TUN %s: %w", pattern, err)
	}
	return os.NewFile(uintptr(fd), req.Name()), req.Name(), nil
}

func (l *Loop) setUp(name string) error {
	var n int
	if _, err := fmt.Sscanf(name, "ylink%d", &n); err != nil || n >= MaxLoops {
		return fmt.Errorf("more than %d loops on this machine", MaxLoops)
	}
	l.near, l.far = loopNear(n), loopFar(n)
	dev, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	err = netlink.AddrAdd(dev, &netlink.Addr{
		IPNet: &net.IPNet{IP: l.near.AsSlice(), Mask: net.CIDRMask(31, 32)},
	})
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(dev)
}

// Listen listens at the loop's near end, once.
func (l *Loop) Listen() (net.Listener, error) {
	//nolint:noctx // to listen takes no time
	listener, err := net.Listen("tcp", net.JoinHostPort(l.near.String(), "0"))
	if err != nil {
		return nil, fmt.Errorf("listen on loop: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.port = listener.Addr().(*net.TCPAddr).AddrPort().Port() //nolint:errcheck // it listens on TCP
	return listener, nil
}

// Address is where the listener is dialled.
func (l *Loop) Address() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return netip.AddrPortFrom(l.far, l.port).String()
}

// Shape narrows the loop: Out is towards the listener. A Loss of 1 is a black
// hole.
func (l *Loop) Shape(dir Direction, s Shape) error {
	if !s.valid() {
		return fmt.Errorf("impossible shape %+v", s)
	}
	if dir.has(Out) {
		l.out.set(s)
	}
	if dir.has(In) {
		l.in.set(s)
	}
	return nil
}

// Forget makes the loop drop the packets of all connections that went over it
// so far, as a NAT does that has lost its table: neither end is told.
func (l *Loop) Forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for port := range l.flows {
		l.flows[port] = true
	}
}

// Stats counts the packets of both directions.
func (l *Loop) Stats() RelayStats {
	_, in := l.in.snapshot()
	_, out := l.out.snapshot()
	return RelayStats{In: in, Out: out}
}

// Close ends the loop. Its addresses vanish.
func (l *Loop) Close() error {
	l.stop()
	err := l.tun.Close()
	l.wg.Wait()
	if err != nil {
		return fmt.Errorf("close loop: %w", err)
	}
	return nil
}

// receive turns the packets round until the device is closed.
func (l *Loop) receive() {
	buf := make([]byte, maxFrame)
	for {
		n, err := l.tun.Read(buf)
		if err != nil {
			return
		}
		packet := append([]byte(nil), buf[:n]...)
		if lane := l.route(packet); lane != nil {
			lane.admit(time.Now(), packet)
		}
	}
}

// route exchanges the addresses of a packet, which leaves all checksums as
// they are, and returns the lane that it takes; nil drops it.
func (l *Loop) route(packet []byte) *lane {
	const shortest, protocol, source, destination, address = 20, 9, 12, 16, 4
	if len(packet) < shortest || packet[0]>>4 != 4 || packet[protocol] != unix.IPPROTO_TCP {
		return nil
	}
	header := int(packet[0]&15) * 4
	if len(packet) < header+4 {
		return nil
	}
	var kept [address]byte
	copy(kept[:], packet[source:])
	copy(packet[source:], packet[destination:destination+address])
	copy(packet[destination:], kept[:])
	from, to := binary.BigEndian.Uint16(packet[header:]), binary.BigEndian.Uint16(packet[header+2:])
	l.mu.Lock()
	defer l.mu.Unlock()
	way, client := l.out, from
	if to != l.port {
		way, client = l.in, to
	}
	gone := l.flows[client]
	l.flows[client] = gone
	if gone {
		return nil
	}
	return way
}
