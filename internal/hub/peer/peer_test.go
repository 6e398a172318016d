package peer_test

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/hub/peer"
)

// connect returns both ends of a connection to address.
func connect(t *testing.T, address string) (client, server *net.TCPConn) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := new(net.Dialer).DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func TestUID(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "127.0.0.9:0", "[::1]:0"} {
		client, server := connect(t, address)
		for _, conn := range []*net.TCPConn{client, server} {
			uid, err := peer.UID(conn)
			if err != nil || int(uid) != os.Getuid() {
				t.Errorf("%s: uid %d, %v", address, uid, err)
			}
		}
	}
}

// TestOrphan is about a process that sends a request and goes: its socket
// would count as root's.
func TestOrphan(t *testing.T) {
	client, server := connect(t, "127.0.0.1:0")
	if _, err := client.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(server); err != nil { // to the end, so that it has arrived
		t.Fatal(err)
	}
	if uid, err := peer.UID(server); !errors.Is(err, peer.ErrClosing) {
		t.Errorf("a closed peer: uid %d, %v", uid, err)
	}

	client, server = connect(t, "127.0.0.1:0")
	if err := client.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if uid, err := peer.UID(server); err == nil {
		t.Errorf("a peer that reset the connection: uid %d", uid)
	}

	client, server = connect(t, "127.0.0.1:0")
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(server); err != nil {
		t.Fatal(err)
	}
	if uid, err := peer.UID(server); !errors.Is(err, peer.ErrClosing) {
		t.Errorf("a peer that is closing: uid %d, %v", uid, err)
	}
}

// TestListenerIsNotThePeer is about a port at which another process listens
// once the peer is gone.
func TestListenerIsNotThePeer(t *testing.T) {
	client, server := connect(t, "127.0.0.1:0")
	if err := client.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	port := client.LocalAddr().(*net.TCPAddr).Port
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if uid, err := peer.UID(server); !errors.Is(err, peer.ErrNotLocal) {
		t.Errorf("a listener in the peer's place: uid %d, %v", uid, err)
	}
}

// foreign is a connection whose addresses are made up.
type foreign struct {
	net.Conn

	local, remote net.Addr
}

func (f foreign) LocalAddr() net.Addr  { return f.local }
func (f foreign) RemoteAddr() net.Addr { return f.remote }

func TestForeign(t *testing.T) {
	at := func(ip string, port int) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: port} }
	client, server := connect(t, "127.0.0.1:0")
	for name, conn := range map[string]net.Conn{
		"another host":      foreign{local: server.LocalAddr(), remote: at("192.0.2.1", 4711)},
		"another address":   foreign{local: at("192.0.2.2", 10261), remote: client.LocalAddr()},
		"a port of nobody":  foreign{local: server.LocalAddr(), remote: at("127.0.0.1", 1)},
		"a forged loopback": foreign{local: server.LocalAddr(), remote: at("127.0.0.77", client.LocalAddr().(*net.TCPAddr).Port)},
		"a Unix socket":     foreign{local: &net.UnixAddr{Name: "x"}, remote: &net.UnixAddr{Name: "y"}},
	} {
		if uid, err := peer.UID(conn); !errors.Is(err, peer.ErrNotLocal) {
			t.Errorf("%s: uid %d, %v", name, uid, err)
		}
	}
	if uid, err := peer.UID(server); err != nil || int(uid) != unix.Getuid() {
		t.Errorf("uid %d, %v", uid, err)
	}
}

func BenchmarkUID(b *testing.B) {
	l, err := new(net.ListenConfig).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := new(net.Dialer).DialContext(b.Context(), "tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	for b.Loop() {
		if _, err := peer.UID(c); err != nil && !errors.Is(err, peer.ErrClosing) {
			b.Fatal(err)
		}
	}
}
