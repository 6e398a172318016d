package link

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/yurt-edge/yurt/internal/httpx"
)

// upgradeOf returns the protocol that a header asks to change to, or "".
func upgradeOf(h http.Header) string {
	for _, line := range h["Connection"] {
		for token := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "upgrade") {
				return h.Get("Upgrade")
			}
		}
	}
	return ""
}

// upgrade forwards out over an HTTP/1.1 connection of its own and, if the
// server agrees, turns it and the client's into a tunnel. The tunnel
// outlives a cut of the link for as long as TCP does: an exec session is
// worth waiting for.
func (l *Link) upgrade(w http.ResponseWriter, r, out *http.Request, cred credential, protocol string) {
	out.Header.Set("Connection", "Upgrade")
	out.Header.Set("Upgrade", protocol)
	server, i, err := l.dialAny(r.Context(), cred)
	if err != nil {
		refuse(w, r, err)
		return
	}
	defer func() { _ = server.Close() }()
	unregister, ok := l.tunnels.add(func() { _ = server.Close() })
	if !ok {
		refuse(w, r, ErrDown)
		return
	}
	defer l.tunnels.remove(unregister)

	// Until the answer is in, the client's going away ends it.
	stop := context.AfterFunc(r.Context(), func() { _ = server.Close() })
	out.URL.Scheme, out.URL.Host, out.Host = "https", l.servers[i].addr, l.servers[i].url.Host
	if to := l.servers[i].url; to.Path != "" && to.Path != "/" {
		out.URL.Path, out.URL.RawPath = joinPath(to, out.URL)
	}
	from := bufio.NewReader(server)
	resp, err := ask(server, from, out)
	if err != nil {
		stop()
		refuse(w, r, l.blame(r.Context(), nil, i, err))
		return
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer stop()
		defer func() { _ = resp.Body.Close() }()
		l.reply(w, r, resp, i, nil)
		return
	}
	stop()
	if got := upgradeOf(resp.Header); !strings.EqualFold(got, protocol) {
		refuse(w, r, fmt.Errorf("server changed to protocol %q, not %q", got, protocol))
		return
	}
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		httpx.WriteStatus(w, r, apierrors.NewBadRequest("cannot change protocols on this connection: "+err.Error()))
		return
	}
	defer func() { _ = client.Close() }()
	resp.Body = nil
	if err := resp.Write(client); err != nil {
		return
	}
	tunnel(client, buffered.Reader, server, from)
}

// ask sends req on c and reads the header of the answer.
func ask(c net.Conn, from *bufio.Reader, req *http.Request) (*http.Response, error) {
	if err := req.Write(c); err != nil {
		return nil, fmt.Errorf("send request: %w", err)
	}
	resp, err := http.ReadResponse(from, req)
	if err != nil {
		return nil, fmt.Errorf("read response: %w", err)
	}
	return resp, nil
}

// dialAny connects to a healthy server, to the next one if that fails.
func (l *Link) dialAny(ctx context.Context, cred credential) (net.Conn, int, error) {
	if !l.up.Load() {
		return nil, -1, ErrDown
	}
	err := ErrDown
	var tried uint64
	for {
		i := l.pick(tried)
		if i < 0 {
			return nil, -1, err
		}
		tried |= 1 << i
		d := dialer{link: l, cred: cred, tickets: l.ticketsOf(cred)}
		var c net.Conn
		if c, err = d.dial(ctx, l.servers[i].addr, "http/1.1"); err == nil {
			return c, i, nil
		}
		err = l.blame(ctx, nil, i, err)
		var noConn *dialError
		if !errors.As(err, &noConn) || ctx.Err() != nil {
			return nil, -1, err
		}
	}
}

// tunnel copies both ways until either side ends, then closes both.
func tunnel(client net.Conn, fromClient io.Reader, server net.Conn, fromServer io.Reader) {
	var wg sync.WaitGroup
	pass := func(to net.Conn, from io.Reader) {
		buf := copyBuffers.Get().(*copyBuffer) //nolint:errcheck // The pool holds nothing else.
		defer copyBuffers.Put(buf)
		_, _ = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, buf[:])
		_ = client.Close()
		_ = server.Close()
	}
	wg.Go(func() { pass(server, fromClient) })
	pass(client, fromServer)
	wg.Wait()
}
