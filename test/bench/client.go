package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/client-go/rest"
)

const (
	protobuf = "application/vnd.kubernetes.protobuf"
	jsonType = "application/json"
	metaList = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
)

// target is one way to the API, as one user.
type target struct {
	url   string
	token string
	tls   *tls.Config
	http1 bool
	agent string // what it calls itself; empty: the bench
}

func newTarget(cfg *rest.Config, http1 bool) (target, error) {
	t := target{url: cfg.Host, token: cfg.BearerToken, http1: http1, tls: &tls.Config{
		RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12,
	}}
	if !t.tls.RootCAs.AppendCertsFromPEM(cfg.CAData) {
		return target{}, errors.New("no CA certificate for " + cfg.Host)
	}
	if len(cfg.CertData) > 0 {
		pair, err := tls.X509KeyPair(cfg.CertData, cfg.KeyData)
		if err != nil {
			return target{}, fmt.Errorf("load the node's certificate: %w", err)
		}
		t.tls.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// conn is a client with one connection of its own. It is for one goroutine.
type conn struct {
	target
	client http.Client
	buf    []byte
	gzip   bool // asks for compressed answers, as client-go does
}

func (t target) connect() *conn {
	transport := &http.Transport{
		TLSClientConfig: t.tls.Clone(), DisableCompression: true, ForceAttemptHTTP2: !t.http1, ReadBufferSize: 64 << 10,
	}
	if t.http1 {
		transport.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	return &conn{target: t, client: http.Client{Transport: transport}, buf: make([]byte, 64<<10)}
}

func (c *conn) close() { c.client.CloseIdleConnections() }

// open sends a request and returns the answer, which must be 200 or 201.
func (c *conn) open(ctx context.Context, method, path, accept string, body []byte, contentType string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", path, err)
	}
	if body == nil {
		req.Body, req.GetBody = http.NoBody, nil
	}
	req.Header.Set("User-Agent", cmp.Or(c.agent, "yurt-bench"))
	req.Header.Set("Accept", accept)
	if c.gzip {
		req.Header.Set("Accept-Encoding", "gzip")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 400))
		resp.Body.Close()
		return nil, &statusError{resp.StatusCode, fmt.Sprintf("%s %s: %d: %s", method, c.url+path, resp.StatusCode, text)}
	}
	return resp, nil
}

type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return e.text }

// send sends a request, reads the answer to its end and returns its size.
func (c *conn) send(ctx context.Context, method, path, accept string, body []byte, contentType string) (int, error) {
	resp, err := c.open(ctx, method, path, accept, body, contentType)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	size := 0
	for {
		n, err := resp.Body.Read(c.buf)
		size += n
		if errors.Is(err, io.EOF) {
			return size, nil
		}
		if err != nil {
			return size, fmt.Errorf("read %s: %w", path, err)
		}
	}
}

func (c *conn) get(ctx context.Context, path, accept string) (int, error) {
	return c.send(ctx, http.MethodGet, path, accept, nil, "")
}

// read returns an answer.
func (c *conn) read(ctx context.Context, path, accept string) ([]byte, error) {
	resp, err := c.open(ctx, http.MethodGet, path, accept, nil, "")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

// list returns the names of the bench's objects in a list, and its resource
// version. Controllers have objects in any namespace too.
func (c *conn) list(ctx context.Context, path string) ([]string, string, error) {
	resp, err := c.open(ctx, http.MethodGet, path, metaList, nil, "")
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	var list struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
		Items []struct {
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
		} `json:"items"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return nil, "", fmt.Errorf("read list %s: %w", path, err)
	}
	var names []string
	for i := range list.Items {
		if name := list.Items[i].Metadata.Name; strings.HasPrefix(name, "object-") {
			names = append(names, name)
		}
	}
	return names, list.Metadata.ResourceVersion, nil
}

// load is a request that several connections repeat.
type load struct {
	path, accept string
	gzip         bool
}

// rate repeats a request over all connections for a time and returns how many
// were answered per second, and the size of one answer.
func rate(ctx context.Context, conns []*conn, l load, d time.Duration) (float64, int, error) {
	var (
		wg    sync.WaitGroup
		count atomic.Int64
		size  atomic.Int64
		once  sync.Once
		fault error
		start = time.Now()
	)
	for _, c := range conns {
		wg.Go(func() {
			c.gzip = l.gzip
			for time.Since(start) < d {
				n, err := c.get(ctx, l.path, l.accept)
				if err != nil {
					once.Do(func() { fault = err })
					return
				}
				size.Store(int64(n))
				count.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(count.Load()) / time.Since(start).Seconds(), int(size.Load()), fault
}

// sides are connections of both ways.
type sides [2][]*conn

func connect(direct, hub target, n int) sides {
	var s sides
	for range n {
		s[0], s[1] = append(s[0], direct.connect()), append(s[1], hub.connect())
	}
	return s
}

func (s sides) close() {
	for _, side := range s {
		for _, c := range side {
			c.close()
		}
	}
}

// comparison is what alternating rounds of a request came to.
type comparison struct {
	pace rounds // answers per second
	// cost is the processor time in µs that an answer takes all servers: the
	// API server, etcd and the hub, whoever of them works. The client is not
	// in it.
	cost rounds
	size [2]int // bytes of an answer
}

func (c comparison) note() string {
	spread := c.pace.spread()
	size := fmt.Sprintf("%d B", c.size[1])
	if c.size[1] > 10000 {
		size = fmt.Sprintf("%d KB", c.size[1]/1000)
	}
	if c.size[0] != c.size[1] {
		size = fmt.Sprintf("%d B direct and %d B", c.size[0], c.size[1])
	}
	return fmt.Sprintf("%s each; %.2f to %.2f in %d rounds", size, spread[0], spread[1], len(c.pace))
}

// compare measures a request both ways.
func (s sides) compare(ctx context.Context, h *hub, l load, n int, d time.Duration) (comparison, error) {
	cloud, err := servers()
	if err != nil {
		return comparison{}, err
	}
	return s.measure(ctx, append(cloud, h.PID()), l, n, d)
}

// measure measures a request both ways in alternating rounds, and what it takes
// the processes that serve.
func (s sides) measure(ctx context.Context, pids []int, l load, n int, d time.Duration) (comparison, error) {
	var out comparison
	for _, side := range s { // warm connections and caches
		if _, _, err := rate(ctx, side, l, d/4); err != nil {
			return out, err
		}
	}
	for i := range n {
		var pace, cost [2]float64
		for j := range 2 {
			which := (i + j) % 2 // neither is always first
			before, err := busy(pids...)
			if err != nil {
				return out, err
			}
			start := time.Now()
			if pace[which], out.size[which], err = rate(ctx, s[which], l, d); err != nil {
				return out, err
			}
			count := pace[which] * time.Since(start).Seconds()
			after, err := busy(pids...)
			if err != nil {
				return out, err
			}
			cost[which] = float64((after - before).Microseconds()) / count
		}
		out.pace, out.cost = append(out.pace, pace), append(out.cost, cost)
	}
	return out, nil
}
