package httpx

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener of in-memory connections, whose clock a bubble moves.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

type pipe struct {
	net.Conn
	from net.Addr
}

func (p pipe) RemoteAddr() net.Addr { return p.from }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// dial returns the client's end of a new connection from an address.
func (p *pipes) dial(from string) net.Conn {
	client, server := net.Pipe()
	p.conns <- pipe{server, &net.TCPAddr{IP: net.ParseIP(from), Port: 1}}
	return client
}

// isClosed reports whether the server has closed the connection.
func isClosed(c net.Conn) bool {
	synctest.Wait()
	_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := io.Copy(io.Discard, c) // what it says before it closes
	_ = c.SetReadDeadline(time.Time{})
	return err == nil
}

// get asks over a connection and reads the answer.
func get(t *testing.T, c net.Conn) {
	t.Helper()
	go func() { _, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") }()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	synctest.Wait()
}

// inBubble serves handler on pipes, in a bubble.
func inBubble(t *testing.T, limits ConnLimits, handler http.Handler, test func(t *testing.T, p *pipes, refused map[string]int)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p, refused := newPipes(), map[string]int{}
		ctx, cancel := context.WithCancel(t.Context())
		s := Server{Listener: p, Handler: handler, Conns: limits, Refused: func(limit string) { refused[limit]++ }}
		stopped := make(chan error, 1)
		go func() { stopped <- s.Run(ctx) }()
		test(t, p, refused)
		cancel()
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	})
}

var empty = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})

func TestSlowHeadersAndIdleConnectionsEnd(t *testing.T) {
	t.Parallel()
	inBubble(t, ConnLimits{}, empty, func(t *testing.T, p *pipes, _ map[string]int) {
		slow, idle := p.dial("10.0.0.1"), p.dial("10.0.0.2")
		get(t, idle)
		for range 9 { // a byte a second does not help
			if _, err := io.WriteString(slow, "G"); err != nil {
				t.Fatalf("closed before its time: %v", err)
			}
			<-time.After(time.Second)
		}
		if isClosed(slow) {
			t.Fatal("closed before its time")
		}
		<-time.After(readHeaderTimeout - 9*time.Second)
		if !isClosed(slow) {
			t.Error("a header that never ends is waited for")
		}
		if isClosed(idle) {
			t.Fatal("an idle connection is closed at once")
		}
		<-time.After(idleTimeout)
		if !isClosed(idle) {
			t.Error("an idle connection is kept")
		}
	})
}

func TestConnectionsHaveLimits(t *testing.T) {
	t.Parallel()
	limits := ConnLimits{Total: 6, Fresh: 3, PerSource: 2, Rate: 1, Burst: 20}
	release := make(chan struct{})
	busy := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/keep" {
			KeepConn(r.Context())
			return
		}
		if r.URL.Path == "/wait" {
			<-release
		}
	})
	// send asks and does not wait for the answer.
	send := func(c net.Conn, path string) {
		_, _ = io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n")
		synctest.Wait()
	}
	inBubble(t, limits, busy, func(t *testing.T, p *pipes, refused map[string]int) {
		release = make(chan struct{}) // of the bubble
		// Handshakes: the oldest makes room.
		var fresh []net.Conn
		for i := range limits.Fresh + 1 {
			fresh = append(fresh, p.dial(fmt.Sprintf("10.0.1.%d", i)))
			<-time.After(time.Second)
		}
		if !isClosed(fresh[0]) || isClosed(fresh[1]) || refused["handshakes"] != 1 {
			t.Errorf("after %d silent connections: %v", len(fresh), refused)
		}
		for _, c := range fresh {
			_ = c.Close()
		}
		synctest.Wait()

		// A source: what is idle makes room, what is busy does not.
		one, two := p.dial("10.0.2.1"), p.dial("10.0.2.1")
		send(one, "/wait")
		get(t, two)
		three := p.dial("10.0.2.1")
		if !isClosed(two) || isClosed(one) {
			t.Error("the idle connection of a source does not make room for its next")
		}
		send(three, "/wait")
		four := p.dial("10.0.2.1")
		if !isClosed(four) || refused["connections of a source"] != 2 {
			t.Errorf("a source has more connections than it may: %v", refused)
		}
		// Others are not hurt, and loopback is nobody's own.
		var local []net.Conn
		for range 3 {
			c := p.dial("127.0.0.1")
			get(t, c)
			local = append(local, c)
			<-time.After(time.Second)
		}
		// In all: a connection that is kept is not the one to go.
		go func() { _, _ = io.WriteString(local[0], "GET /keep HTTP/1.1\r\nHost: x\r\n\r\n") }()
		if resp, err := http.ReadResponse(bufio.NewReader(local[0]), nil); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatal(err)
		}
		synctest.Wait()
		for range 2 {
			get(t, p.dial("127.0.0.1"))
		}
		if isClosed(local[0]) || !isClosed(local[1]) || isClosed(one) || refused["connections"] != 1 {
			t.Errorf("in all: %v", refused)
		}
		// Rate: a source that comes too often waits.
		for range limits.Burst {
			c := p.dial("10.0.3.1")
			_ = c.Close()
			synctest.Wait()
		}
		if c := p.dial("10.0.3.1"); !isClosed(c) || refused["connection rate"] != 1 {
			t.Errorf("rate: %v", refused)
		}
		close(release)
		for _, c := range []net.Conn{one, three} {
			_, _ = http.ReadResponse(bufio.NewReader(c), nil)
		}
	})
}

// TestSilentHandshakesDoNotLockOut fills a real TLS listener with connections
// that say nothing.
func TestSilentHandshakesDoNotLockOut(t *testing.T) {
	t.Parallel()
	made := httptest.NewUnstartedServer(nil)
	made.StartTLS() // for its certificate
	defer made.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := Server{Listener: l, Handler: empty, TLS: made.TLS.Clone(), Conns: ConnLimits{Total: 50, Fresh: 10}}
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- s.Run(ctx) }()
	for range 100 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
	}
	client := made.Client()
	resp, err := client.Get("https://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	client.CloseIdleConnections()
	cancel()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// guarded serves handler behind a guard, over HTTP/1.1 and HTTP/2.
func guarded(t *testing.T, handler func(g *Guard, w http.ResponseWriter, r *http.Request)) map[string]*httptest.Server {
	t.Helper()
	out := map[string]*httptest.Server{}
	for _, name := range []string{"HTTP/1.1", "HTTP/2.0"} {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			g := Protect(w, r, 200*time.Millisecond)
			defer g.End()
			handler(g, g, r)
		}))
		s.EnableHTTP2 = name == "HTTP/2.0"
		s.Config.MaxHeaderBytes = maxHeaderBytes
		s.StartTLS()
		t.Cleanup(s.Close)
		out[name] = s
	}
	return out
}

// slowly is a body of which only a part comes.
type slowly struct {
	io.Reader
	stop <-chan struct{}
}

func (s slowly) Read(p []byte) (int, error) {
	if n, err := s.Reader.Read(p); err == nil {
		return n, nil
	}
	<-s.stop
	return 0, io.ErrUnexpectedEOF
}

func TestBodiesHaveLimits(t *testing.T) {
	t.Parallel()
	const limit = 1000
	servers := guarded(t, func(_ *Guard, w http.ResponseWriter, r *http.Request) {
		err := LimitBody(r, limit, 100*time.Millisecond)
		if err == nil {
			_, err = io.Copy(io.Discard, r.Body)
		}
		if err != nil {
			WriteStatus(w, r, err)
		}
	})
	unsized := func(r io.Reader) io.Reader { return struct{ io.Reader }{r} }
	for name, s := range servers {
		stop := make(chan struct{})
		for what, tc := range map[string]struct {
			body io.Reader
			want int
		}{
			"as long as it may be":          {strings.NewReader(strings.Repeat("x", limit)), 200},
			"the same, of no stated length": {unsized(strings.NewReader(strings.Repeat("x", limit))), 200},
			"too long":                      {strings.NewReader(strings.Repeat("x", limit+1)), 413},
			"too long, of no stated length": {unsized(strings.NewReader(strings.Repeat("x", limit+1))), 413},
			"much too long":                 {unsized(strings.NewReader(strings.Repeat("x", 4<<20))), 413},
			"standing still":                {slowly{strings.NewReader("x"), stop}, 408},
		} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL, tc.body)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := s.Client().Do(req)
			if err != nil {
				t.Errorf("%s: a body %s: %v", name, what, err)
				continue
			}
			if resp.StatusCode != tc.want || resp.Proto != name {
				t.Errorf("%s: a body %s: %s %s, want %d", name, what, resp.Proto, resp.Status, tc.want)
			}
			if tc.want == 408 {
				close(stop) // the client waits for its own body
			}
			_ = resp.Body.Close()
		}
		// Headers are bounded by the server.
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			req.Header.Set(fmt.Sprintf("X-Long-%d", i), strings.Repeat("x", maxHeaderBytes/10))
		}
		if resp, err := s.Client().Do(req); err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("%s: a long header: %s", name, resp.Status)
			}
		} else if name == "HTTP/1.1" || !strings.Contains(err.Error(), "header list") {
			// Over HTTP/2 the server names its limit, and clients keep it.
			t.Errorf("%s: a long header: %v", name, err)
		}
	}
}

// TestWhoTakesNothingIsCutOff writes more than any buffer holds to a client
// that does not read.
func TestWhoTakesNothingIsCutOff(t *testing.T) {
	t.Parallel()
	ended := make(chan error, 2)
	servers := guarded(t, func(g *Guard, w http.ResponseWriter, r *http.Request) {
		piece := make([]byte, 1<<20)
		for {
			if _, err := w.Write(piece); err != nil {
				if !g.Begun() {
					err = errors.New("the guard does not know that the answer has begun")
				}
				ended <- err
				return
			}
			if r.Context().Err() != nil {
				ended <- errors.New("the client went away by itself")
				return
			}
		}
	})
	for name, s := range servers {
		resp, err := s.Client().Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !strings.Contains(err.Error(), "timeout") && !strings.Contains(err.Error(), "stream closed") {
			t.Errorf("%s: %v", name, err)
		}
		_ = resp.Body.Close()
	}
}

// TestGuardLeavesTheConnectionAlone uses a connection again after a guard that
// had deadlines on it.
func TestGuardLeavesTheConnectionAlone(t *testing.T) {
	t.Parallel()
	for name, s := range guarded(t, func(_ *Guard, w http.ResponseWriter, r *http.Request) {
		if err := LimitBody(r, 100, 10*time.Second); err != nil {
			WriteStatus(w, r, err)
			return
		}
		if r.URL.Path == "/read" {
			_, _ = io.Copy(w, r.Body)
		}
	}) {
		for _, path := range []string{"/read", "/leave", "/read"} {
			resp, err := s.Client().Post(s.URL+path, "text/plain", strings.NewReader("hello"))
			if err != nil {
				t.Fatalf("%s %s: %v", name, path, err)
			}
			text, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if want := map[string]string{"/read": "hello"}[path]; err != nil || string(text) != want {
				t.Errorf("%s %s: %q, %v", name, path, text, err)
			}
		}
	}
}
