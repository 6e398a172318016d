package link

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
)

func TestForwardPassesRequestAndAnswer(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	var mu sync.Mutex
	var got *http.Request
	var gotBody []byte
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		got, gotBody = r, body
		mu.Unlock()
		w.Header().Set("Warning", `299 - "careful"`)
		w.Header().Set("Connection", "X-Hop")
		w.Header().Set("X-Hop", "1")
		w.Header().Set("Trailer", "X-Sum")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "made")
		w.Header().Set("X-Sum", "42")
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	req, err := http.NewRequest(http.MethodPost, h.URL+"/api/v1/namespaces/a%2Fb/pods?dryRun=All&x=%20", strings.NewReader("pod"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/vnd.kubernetes.protobuf")
	req.Header.Set("Accept-Encoding", "gzip")
	req.Header.Set("User-Agent", "kubelet/v1.36")
	resp, err := h.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "made" || resp.StatusCode != http.StatusCreated {
		t.Errorf("answer %s %q, %v", resp.Status, body, err)
	}
	if resp.Header.Get("Warning") != `299 - "careful"` || resp.Header.Get("X-Hop") != "" || resp.Trailer.Get("X-Sum") != "42" {
		t.Errorf("header %v, trailer %v", resp.Header, resp.Trailer)
	}
	mu.Lock()
	defer mu.Unlock()
	if got.Method != http.MethodPost || got.RequestURI != "/api/v1/namespaces/a%2Fb/pods?dryRun=All&x=%20" || string(gotBody) != "pod" || got.ContentLength != 3 {
		t.Errorf("request %s %s %q", got.Method, got.RequestURI, gotBody)
	}
	for name, want := range map[string]string{
		"Accept": "application/vnd.kubernetes.protobuf", "Accept-Encoding": "gzip", "User-Agent": "kubelet/v1.36",
	} {
		if got.Header.Get(name) != want {
			t.Errorf("%s: %q", name, got.Header.Get(name))
		}
	}
}

// TestRefusedHubIsNoRefusedCaller has the cloud take no certificate any more.
func TestRefusedHubIsNoRefusedCaller(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusUnauthorized)
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	for _, tc := range []struct {
		name string
		as   Credential
		code int
	}{
		{"node", AsNode(), http.StatusServiceUnavailable},
		{"user", AsUser(&user.DefaultInfo{Name: "alice"}), http.StatusServiceUnavailable},
		{"bearer", AsBearer(), http.StatusUnauthorized},
	} {
		w := httptest.NewRecorder()
		r.Forward(w, newRequest(t, "/api"), tc.as, nil)
		if w.Code != tc.code {
			t.Errorf("%s: forwarded: %d %s, want %d", tc.name, w.Code, w.Body, tc.code)
		}
		w = httptest.NewRecorder()
		err := r.Try(w, newRequest(t, "/api"), tc.as, nil, patience)
		if (err == nil) != (tc.code == http.StatusUnauthorized) || err != nil && w.Body.Len() > 0 {
			t.Errorf("%s: tried: %v, wrote %d %s", tc.name, err, w.Code, w.Body)
		}
	}
}

func TestForwardChoosesIdentity(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		h := http.Header{}
		for k, v := range r.Header {
			if k == "Authorization" || strings.HasPrefix(k, "Impersonate") || strings.HasPrefix(k, "X-Remote") {
				h[k] = v
			}
		}
		for _, c := range r.TLS.PeerCertificates {
			h.Add("Certificate", c.Subject.CommonName)
		}
		_ = json.NewEncoder(w).Encode(h)
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	evil := http.Header{
		"Authorization":     {"Bearer t"},
		"Impersonate-User":  {"admin"},
		"Impersonate-Group": {"system:masters"},
		"X-Remote-User":     {"admin"},
		"X-Remote-Extra-A":  {"b"},
	}
	const hub = "system:node:edge-1"
	for _, tc := range []struct {
		name string
		as   Credential
		code int
		want http.Header
	}{
		{"node", AsNode(), 200, http.Header{"Certificate": {hub}}},
		{"bearer", AsBearer(), 200, http.Header{
			"Authorization": {"Bearer t"}, "Impersonate-User": {"admin"}, "Impersonate-Group": {"system:masters"},
		}},
		{"user", AsUser(&user.DefaultInfo{
			Name: "alice", UID: "7", Groups: []string{"dev", "system:authenticated"},
			Extra: map[string][]string{"example.com/a b": {"1", "2"}},
		}), 200, http.Header{
			"Certificate": {hub}, "Impersonate-User": {"alice"}, "Impersonate-Uid": {"7"},
			"Impersonate-Group":                     {"dev", "system:authenticated"},
			"Impersonate-Extra-Example.com%2fa%20b": {"1", "2"},
		}},
		{"none", Credential{}, 500, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := r.hub(t, tc.as, nil)
			req, err := http.NewRequest(http.MethodGet, h.URL+"/api", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = maps.Clone(evil)
			resp, err := h.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			if resp.StatusCode != tc.code {
				t.Errorf("status %s", resp.Status)
			}
			if tc.want == nil {
				return
			}
			var got http.Header
			if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got  %v\nwant %v", got, tc.want)
			}
		})
	}
}

func TestForwardFlushesEachEvent(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	events, ended := make(chan string), make(chan struct{})
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.Flush()
		for {
			select {
			case e := <-events:
				_, _ = io.WriteString(w, e)
				_ = rc.Flush()
			case <-r.Context().Done():
				ended <- struct{}{}
				return
			}
		}
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	h.Client().Timeout = 2 * patience
	for _, path := range []string{"/api/v1/pods?watch=true", "/api/v1/namespaces/a/pods/b/log?follow=true", "/api/v1/namespaces/a/services/b/proxy/sse"} {
		resp, err := h.Client().Get(h.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		// Half a frame must come through as it is, too.
		for _, e := range []string{`{"type":"ADDED"}` + "\n", `{"type":`, `"MODIFIED"}` + "\n"} {
			events <- e
			buf := make([]byte, len(e))
			if _, err := io.ReadFull(resp.Body, buf); err != nil || string(buf) != e {
				t.Errorf("%s: got %q, %v", path, buf, err)
			}
		}
		_ = resp.Body.Close()
		receive(t, ended) // or it would take events of the next
	}
}

func TestForwardPassesGzipUntouched(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = z.Write(bytes.Repeat([]byte("a"), 1<<16))
	_ = z.Close()
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Accept-Encoding") != "gzip" {
			_, _ = fmt.Fprintf(w, "accept-encoding is %q", r.Header.Get("Accept-Encoding"))
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(zipped.Bytes())
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	c := rawClient(t)
	req, err := http.NewRequest(http.MethodGet, h.URL+"/api", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept-Encoding", "gzip")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := read(resp, nil); err != nil || body != zipped.String() || resp.Header.Get("Content-Encoding") != "gzip" {
		t.Errorf("got %d bytes, %v, %v", len(body), resp.Header, err)
	}
	if _, _, body, err := get(t, c, h.URL+"/api"); err != nil || string(body) != `accept-encoding is ""` {
		t.Errorf("got %q, %v", body, err)
	}
}

func TestForwardAbortsABodyCutShort(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/length" {
			w.Header().Set("Content-Length", "100")
		}
		_, _ = io.WriteString(w, `{"kind":"PodList","items":[`)
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	kept := make(chan []byte, 10)
	h := r.hub(t, AsNode(), func(*http.Response) func([]byte) { return func(b []byte) { kept <- b } })
	for _, c := range []*http.Client{h.Client(), rawClient(t)} {
		for _, path := range []string{"/length", "/chunked", "/pods?watch=true"} {
			_, _, body, err := get(t, c, h.URL+path)
			if err == nil {
				t.Errorf("%s: clean end after %q", path, body)
			}
		}
	}
	if len(kept) > 0 {
		t.Errorf("half a body was kept: %q", <-kept)
	}
}

func TestForwardKeepsWholeBodies(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	large := strings.Repeat("x", KeepLimit+1)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			_, _ = io.WriteString(w, large)
			return
		}
		_, _ = io.WriteString(w, "small")
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	kept := make(chan string, 10)
	h := r.hub(t, AsNode(), func(resp *http.Response) func([]byte) {
		if resp.Request.URL.Path == "/unwanted" {
			return nil
		}
		return func(b []byte) { kept <- resp.Request.URL.Path + " " + string(b) }
	})
	for _, path := range []string{"/unwanted", "/large", "/small"} {
		if _, _, _, err := get(t, h.Client(), h.URL+path); err != nil {
			t.Fatal(err)
		}
	}
	if got := receive(t, kept); got != "/small small" || len(kept) > 0 {
		t.Errorf("kept %q and %d more", got, len(kept))
	}
}

func TestForwardTellsTheServerThatTheClientLeft(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	entered, left := make(chan struct{}, 1), make(chan struct{}, 1)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "" {
			_ = http.NewResponseController(w).Flush()
		}
		entered <- struct{}{}
		<-r.Context().Done()
		left <- struct{}{}
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	for _, c := range []*http.Client{h.Client(), rawClient(t)} {
		for _, path := range []string{"/api", "/pods?watch=true"} {
			ctx, cancel := context.WithCancel(t.Context())
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.URL+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				if resp, err := c.Do(req); err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
				}
			}()
			receive(t, entered)
			cancel()
			receive(t, left)
			receive(t, done)
		}
	}
	if !r.Online() {
		t.Error("a client that leaves is no evidence")
	}
}

func TestForwardRefusesWithAStatus(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/reset":
			c, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_ = c.(*tls.Conn).NetConn().(*net.TCPConn).SetLinger(0)
				_ = c.(*tls.Conn).NetConn().Close()
			}
		case "/busy":
			w.Header().Set("Retry-After", "7")
			http.Error(w, "busy", http.StatusTooManyRequests)
		}
	})
	w := newWire(t, u.addr())
	r := newRig(t, ca, nil, w.addr)
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	check := func(method, path string, code int, retry string) {
		t.Helper()
		req, err := http.NewRequest(method, h.URL+path, strings.NewReader(""))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := h.Client().Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", method, path, err)
			return
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != code || resp.Header.Get("Retry-After") != retry {
			t.Errorf("%s %s: %s, Retry-After %q", method, path, resp.Status, resp.Header.Get("Retry-After"))
		}
		var s metav1.Status
		if path != "/busy" && (json.NewDecoder(resp.Body).Decode(&s) != nil || int(s.Code) != code || s.Kind != "Status") {
			t.Errorf("%s %s: status %+v", method, path, s)
		}
	}
	check(http.MethodGet, "/busy", 429, "7")
	check(http.MethodGet, "/reset", 502, "1")
	check(http.MethodPost, "/reset", 502, "")
	w.refuse()
	r.waitDown(t)
	check(http.MethodGet, "/api", 503, "1")
	check(http.MethodPost, "/api", 503, "1")
}

func TestForwardFailsWaitingRequestsWhenTheLinkGoesDown(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	entered := make(chan struct{}, 10)
	u := newUpstream(t, ca, func(_ http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-r.Context().Done()
	})
	w := newWire(t, u.addr())
	r := newRig(t, ca, func(c *Config) {
		c.Budgets = Budgets{Stall: 100 * time.Millisecond, Answer: 4 * time.Second, Connect: 4 * time.Second}
	}, w.addr)
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	codes := make(chan int, 2)
	for range 2 {
		go func() {
			code, _, _, _ := get(t, h.Client(), h.URL+"/api") //nolint:dogsled // only the code counts
			codes <- code
		}()
	}
	receive(t, entered)
	receive(t, entered)
	w.blackhole()
	for range 2 {
		if code := receive(t, codes); code != http.StatusServiceUnavailable {
			t.Errorf("code %d", code)
		}
	}
	// What was pooled is gone: the first request after the return works.
	w.heal(t)
	r.waitUp(t)
}

func TestForwardHoldsLittleOfLargeBodies(t *testing.T) {
	const size = 256 << 20
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		if n != 0 {
			_, _ = fmt.Fprint(w, n)
			return
		}
		_, _ = io.CopyN(w, zeros{}, size)
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	stop, most := make(chan struct{}), make(chan uint64, 1)
	go func() {
		var peak uint64
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				most <- peak
				return
			case <-tick.C:
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapAlloc)
			}
		}
	}()
	resp, err := h.Client().Get(h.URL + "/")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != size {
		t.Errorf("downloaded %d, %v", n, err)
	}
	_ = resp.Body.Close()
	resp, err = h.Client().Post(h.URL+"/", "", io.LimitReader(zeros{}, size))
	if body, err := read(resp, err); err != nil || body != fmt.Sprint(size) {
		t.Errorf("uploaded %q, %v", body, err)
	}
	close(stop)
	if peak := <-most; peak > 48<<20 {
		t.Errorf("heap grew to %d MiB", peak>>20)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestUpgradeIsATunnel(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refused" {
			http.Error(w, "no exec for you", http.StatusForbidden)
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n"+
			"Sec-Websocket-Protocol: %s\r\nX-Who: %s\r\n\r\nfirst", r.Header.Get("Upgrade"),
			r.Header.Get("Sec-Websocket-Protocol"), r.TLS.PeerCertificates[0].Subject.CommonName)
		_ = rw.Flush()
		_, _ = io.Copy(c, rw)
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	for _, protocol := range []string{"SPDY/3.1", "websocket"} {
		c, resp, from := dialUpgrade(t, h, "/exec", protocol)
		if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Upgrade") != protocol ||
			resp.Header.Get("Sec-Websocket-Protocol") != "v5.channel.k8s.io" || resp.Header.Get("X-Who") != "system:node:edge-1" {
			t.Fatalf("%s: %s %v", protocol, resp.Status, resp.Header)
		}
		msg := bytes.Repeat([]byte("stdin"), 20_000)
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = c.Write(msg) })
		got := make([]byte, len("first")+len(msg))
		if _, err := io.ReadFull(from, got); err != nil || string(got[:5]) != "first" || !bytes.Equal(got[5:], msg) {
			t.Errorf("%s: echo failed: %v", protocol, err)
		}
		wg.Wait()
		_ = c.Close()
	}
	c, resp, _ := dialUpgrade(t, h, "/refused", "SPDY/3.1")
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusForbidden || string(body) != "no exec for you\n" || err != nil {
		t.Errorf("refusal: %s %q, %v", resp.Status, body, err)
	}
	_ = c.Close()
}

func TestUpgradeEndsWithEitherSide(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	ended := make(chan struct{})
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
		if r.URL.Path == "/server-ends" {
			return
		}
		_, _ = io.Copy(io.Discard, rw)
		close(ended)
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	h := r.hub(t, AsNode(), nil)
	c, _, from := dialUpgrade(t, h, "/server-ends", "SPDY/3.1")
	if _, err := from.ReadByte(); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("tunnel did not end: %v", err)
	}
	_ = c.Close()
	c, _, _ = dialUpgrade(t, h, "/client-ends", "SPDY/3.1")
	_ = c.Close()
	receive(t, ended)
}

func dialUpgrade(t *testing.T, h *httptest.Server, path, protocol string) (net.Conn, *http.Response, *bufio.Reader) {
	t.Helper()
	c, err := tls.Dial("tcp", h.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: hub\r\nConnection: Upgrade\r\nUpgrade: %s\r\n"+
		"Sec-WebSocket-Protocol: v5.channel.k8s.io\r\nContent-Length: 0\r\n\r\n", path, protocol)
	if err != nil {
		t.Fatal(err)
	}
	from := bufio.NewReader(c)
	resp, err := http.ReadResponse(from, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c, resp, from
}

// rawClient speaks HTTP/1.1 and asks for no compression of its own.
func rawClient(t *testing.T) *http.Client {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestIsStream(t *testing.T) {
	t.Parallel()
	for target, want := range map[string]bool{
		"/api/v1/pods":                                false,
		"/api/v1/pods?watch=true":                     true,
		"/api/v1/pods?watch=1&resourceVersion=3":      true,
		"/api/v1/pods?watch=false":                    false,
		"/api/v1/pods?watch=":                         false,
		"/api/v1/pods?labelSelector=watch%3Dtrue":     false,
		"/api/v1/watch/pods":                          true,
		"/api/v1/namespaces/a/pods/b/log?follow=true": true,
	} {
		if got := isStream(httptest.NewRequest(http.MethodGet, target, nil)); got != want {
			t.Errorf("%s: %v", target, got)
		}
	}
	if isStream(httptest.NewRequest(http.MethodDelete, "/api/v1/pods?watch=true", nil)) {
		t.Error("a DELETE is no stream")
	}
}

func TestForwardCarriesMoreWatchesThanOneConnectionTakes(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// Connections that the server ends must not count for ever: hence rounds.
	for range 10 {
		before := u.dials.Load()
		const watches = 600 // the server takes 250 on a connection
		responses := make(chan *http.Response, watches)
		var wg sync.WaitGroup
		for range watches {
			wg.Go(func() {
				// One that was sent on a connection that just ended fails,
				// as it should; its client asks again.
				for {
					resp, err := r.Node().RoundTrip(newRequest(t, "/api/v1/pods?watch=true"))
					if err == nil {
						responses <- resp
						return
					}
					if ctx.Err() != nil || r.WaitUp(ctx) != nil {
						return
					}
				}
			})
		}
		wg.Wait()
		u.CloseClientConnections()
		close(responses)
		for resp := range responses {
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
		if n := u.dials.Load() - before; n < 3 || n > 40 {
			t.Errorf("%d connections for %d watches", n, watches)
		}
	}
}

func TestForwardKeepsTheHubsOwnWarning(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Warning", "theirs") })
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	w := httptest.NewRecorder()
	w.Header().Set("Warning", "ours")
	r.Forward(w, httptest.NewRequest(http.MethodGet, "/api", nil), AsNode(), nil)
	if got := w.Header().Values("Warning"); !reflect.DeepEqual(got, []string{"ours", "theirs"}) {
		t.Errorf("warnings %q", got)
	}
}

func TestTryGivesUpAndAsksForAProbe(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, "hello")
	})
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	try := func(path string, budget time.Duration) (*httptest.ResponseRecorder, error) {
		w := httptest.NewRecorder()
		return w, r.Try(w, httptest.NewRequest(http.MethodGet, path, nil), AsNode(), nil, budget)
	}
	if w, err := try("/quick", time.Minute); err != nil || w.Body.String() != "hello" {
		t.Errorf("quick: %q, %v", w.Body, err)
	}
	asked := u.asked.Load()
	w, err := try("/slow", time.Millisecond)
	if !errors.Is(err, ErrSlow) || w.Body.Len() > 0 {
		t.Errorf("slow: %q, %v", w.Body, err)
	}
	waitFor(t, func() bool { return u.asked.Load() > asked })
	Refuse(w, httptest.NewRequest(http.MethodGet, "/slow", nil), err)
	if w.Code != http.StatusGatewayTimeout {
		t.Errorf("refused with %d", w.Code)
	}
}
