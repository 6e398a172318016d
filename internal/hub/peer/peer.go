// Package peer tells which user of this machine owns the other end of a
// loopback TCP connection.
//
// Unix sockets carry the credentials of their peer, TCP sockets do not. But both
// ends of a loopback connection are sockets of one kernel and one network
// namespace, so the kernel can be asked about the other one by its addresses.
package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

var (
	// ErrNotLocal means that the connection does not come from a process in
	// this network namespace, over loopback.
	ErrNotLocal = errors.New("not a loopback connection of this machine")
	// ErrClosing means that the other end is closed or closing: its socket
	// belongs to nobody any more, and the kernel reports that as root.
	ErrClosing = errors.New("the connection is not open at the other end")
)

// UID returns the user that owns the other end of an open connection. Ask as
// soon as the connection is accepted: what it says later is about whoever has
// the socket then.
func UID(conn net.Conn) (uint32, error) {
	theirs, ours, err := addresses(conn)
	if err != nil {
		return 0, err
	}
	s, err := find(theirs, ours)
	if err != nil {
		return 0, fmt.Errorf("find the peer %s of %s: %w", theirs, ours, err)
	}
	switch {
	// Without an exact match the kernel offers a listener of that port.
	case s.local != theirs || s.remote != ours:
		return 0, fmt.Errorf("peer %s: %w", theirs, ErrNotLocal)
	case s.state != unix.BPF_TCP_ESTABLISHED || s.inode == 0:
		return 0, fmt.Errorf("peer %s: %w", theirs, ErrClosing)
	}
	return s.uid, nil
}

func addresses(conn net.Conn) (theirs, ours netip.AddrPort, err error) {
	remote, ok1 := conn.RemoteAddr().(*net.TCPAddr)
	local, ok2 := conn.LocalAddr().(*net.TCPAddr)
	if !ok1 || !ok2 {
		return theirs, ours, fmt.Errorf("peer %s: %w", conn.RemoteAddr(), ErrNotLocal)
	}
	theirs, ours = remote.AddrPort(), local.AddrPort()
	theirs = netip.AddrPortFrom(theirs.Addr().Unmap(), theirs.Port())
	ours = netip.AddrPortFrom(ours.Addr().Unmap(), ours.Port())
	if !theirs.Addr().IsLoopback() || !ours.Addr().IsLoopback() || theirs.Addr().Is4() != ours.Addr().Is4() {
		return theirs, ours, fmt.Errorf("peer %s: %w", theirs, ErrNotLocal)
	}
	return theirs, ours, nil
}

// socket is what the kernel says about one.
type socket struct {
	state         uint8
	local, remote netip.AddrPort
	uid, inode    uint32
}

// Layout of inet_diag_req_v2, inet_diag_sockid and inet_diag_msg, which are
// part of the kernel's interface.
const (
	requestSize = 56
	idAt        = 8 // of the socket id in a request
	answerSize  = 72
	answerIDAt  = 4
	uidAt       = 64
	inodeAt     = 68
)

// request asks for the one socket with these addresses.
type request struct{ local, remote netip.AddrPort }

// Len and Serialize make request an [nl.NetlinkRequestData].
func (request) Len() int { return requestSize }

// Serialize returns the request as the kernel reads it.
func (r request) Serialize() []byte {
	b := make([]byte, requestSize)
	b[0], b[1] = unix.AF_INET, unix.IPPROTO_TCP
	if !r.local.Addr().Is4() {
		b[0] = unix.AF_INET6
	}
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // any state
	binary.BigEndian.PutUint16(b[idAt:], r.local.Port())
	binary.BigEndian.PutUint16(b[idAt+2:], r.remote.Port())
	copy(b[idAt+4:], r.local.Addr().AsSlice())
	copy(b[idAt+20:], r.remote.Addr().AsSlice())
	for i := idAt + 40; i < requestSize; i++ {
		b[i] = 0xff // no cookie
	}
	return b
}

func find(local, remote netip.AddrPort) (socket, error) {
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	req.AddData(request{local, remote})
	answers, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	switch {
	case errors.Is(err, unix.ENOENT):
		return socket{}, ErrNotLocal
	case err != nil:
		return socket{}, fmt.Errorf("ask the kernel: %w", err)
	case len(answers) != 1 || len(answers[0]) < answerSize:
		return socket{}, errors.New("ask the kernel: it gave no single answer")
	}
	b := answers[0]
	at := func(ip, port int) netip.AddrPort {
		size := 16
		if b[0] == unix.AF_INET {
			size = 4
		}
		addr, _ := netip.AddrFromSlice(b[answerIDAt+ip : answerIDAt+ip+size])
		return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(b[answerIDAt+port:]))
	}
	return socket{
		state: b[1], local: at(4, 0), remote: at(20, 2),
		uid: binary.NativeEndian.Uint32(b[uidAt:]), inode: binary.NativeEndian.Uint32(b[inodeAt:]),
	}, nil
}
