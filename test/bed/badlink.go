package bed

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"sync"
	"time"

	"github.com/yurt-edge/yurt/playground/network"
)

// Illness is a way in which a link is bad.
type Illness string

// The illnesses. The packets between hub and relay go through a loop of the
// playground's network, which loses, delays and queues them one by one: what
// TCP makes of that is the kernel's doing.
const (
	// Refused resets what is open and refuses what comes.
	Refused Illness = "refused"
	// Reset accepts connections, and resets them.
	Reset Illness = "reset"
	// Silent drops every packet.
	Silent Illness = "black hole"
	// HalfOpen drops the packets of all connections that were open, as a
	// NAT without its table does. New ones work.
	HalfOpen Illness = "half-open"
	// OneWayOut lets nothing pass that the hub sends, OneWayIn nothing that
	// it should receive.
	OneWayOut Illness = "one-way: nothing out"
	OneWayIn  Illness = "one-way: nothing in"
	// Far takes 3 s from the hub to the cloud and back.
	Far Illness = "3 s RTT"
	// Lossy loses 40 % of the packets, in each direction.
	Lossy Illness = "40 % loss"
	// Narrow carries 50 kbit/s in each direction, behind a queue of 64 KiB.
	Narrow Illness = "50 kbit/s"
	// Flapping is a black hole for five seconds, and whole for five.
	Flapping Illness = "flapping"
	// Portal answers every connection with 200 and a page: on plain HTTP, and
	// on TLS with a certificate of its own.
	Portal Illness = "captive portal"
)

// Illnesses are all there are.
func Illnesses() []Illness {
	return []Illness{
		Refused, Reset, Silent, HalfOpen, OneWayOut, OneWayIn, Far, Lossy, Narrow, Flapping, Portal,
	}
}

// Works reports whether requests get through, sooner or later, while the
// link is ill.
func (i Illness) Works() bool {
	switch i {
	case HalfOpen, Far, Lossy, Narrow, Flapping:
		return true
	}
	return false
}

const flapEvery = 5 * time.Second

// NewLoopLink is NewLink over a loop, so that the link can fall ill. It needs
// root.
func NewLoopLink(url string) (*Link, error) {
	loop, err := network.OpenLoop()
	if err != nil {
		return nil, fmt.Errorf("open link: %w", err)
	}
	listener, err := loop.Listen()
	if err != nil {
		return nil, errors.Join(err, loop.Close())
	}
	return newLink(url, listener, loop.Address(), loop), nil
}

// Sicken makes the link ill until Heal.
func (l *Link) Sicken(i Illness) error {
	shape := func(dir network.Direction, s network.Shape) error { return l.loop.Shape(dir, s) }
	hole := network.Shape{Loss: 1}
	switch i {
	case Refused:
		return l.Cut(Down)
	case Reset:
		return l.Cut(reset)
	case Portal:
		return l.Cut(portal)
	case Silent:
		return shape(network.Both, hole)
	case OneWayOut:
		return shape(network.Out, hole)
	case OneWayIn:
		return shape(network.In, hole)
	case Far:
		return shape(network.Both, network.Shape{Delay: 1500 * time.Millisecond})
	case Lossy:
		return shape(network.Both, network.Shape{Loss: 0.4})
	case Narrow:
		return shape(network.Both, network.Shape{Rate: 50_000})
	case HalfOpen:
		l.loop.Forget()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.resetLocked() // the cloud's end is gone; the hub is not told
		return nil
	case Flapping:
		return l.flap()
	}
	return fmt.Errorf("unknown illness %q", i)
}

// flap lets the link vanish and come back until Heal or Close.
func (l *Link) flap() error {
	if err := l.loop.Shape(network.Both, network.Shape{Loss: 1}); err != nil {
		return err
	}
	stop := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(flapEvery)
		defer tick.Stop()
		for loss := 0.0; ; loss = 1 - loss {
			select {
			case <-stop:
				return
			case <-tick.C:
				_ = l.loop.Shape(network.Both, network.Shape{Loss: loss}) // valid as it stands
			}
		}
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flapping = func() {
		close(stop)
		done.Wait()
	}
	return nil
}

// still undoes what Sicken did to the loop.
func (l *Link) still() error {
	l.mu.Lock()
	stop := l.flapping
	l.flapping = nil
	l.mu.Unlock()
	if stop != nil {
		stop()
	}
	return l.loop.Shape(network.Both, network.Shape{})
}

// welcome is a captive portal.
func welcome(c net.Conn) {
	const page = "<html><body>Welcome to the hotel. Room number?</body></html>"
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	buffered := bufio.NewReader(c)
	first, err := buffered.Peek(1)
	if err != nil {
		return
	}
	var talk io.ReadWriter = struct {
		io.Reader
		io.Writer
	}{buffered, c}
	const handshake = 22 // the type of the record that begins TLS
	if first[0] == handshake {
		talk = tls.Server(&peeked{c, buffered}, &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{hotel()}})
	}
	if _, err := talk.Read(make([]byte, 4<<10)); err != nil {
		return
	}
	_, _ = fmt.Fprintf(talk, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s", len(page), page)
}

type peeked struct {
	net.Conn
	from io.Reader
}

func (p *peeked) Read(b []byte) (int, error) { return p.from.Read(b) }

// hotel is the portal's certificate, which nobody has signed.
var hotel = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // the system has no randomness
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "wifi.hotel.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"wifi.hotel.example"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err) // the template is at fault
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})
