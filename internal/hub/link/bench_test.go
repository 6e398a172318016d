package link

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// BenchmarkForward compares what a GET costs direct and through the link, by
// protocol to the API server, number of connections and size. cpu-µs/op is
// that of client, hub and server together.
func BenchmarkForward(b *testing.B) {
	for _, size := range []int{1 << 10, 10 << 10} {
		body := bytes.Repeat([]byte(`{"a":1},`), size/8)
		ca := newAuthority(b)
		u := newUpstream(b, ca, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			_, _ = w.Write(body)
		})
		for _, mode := range []string{"direct", "h1", "h2"} {
			target := u.URL
			if mode != "direct" {
				r := newRig(b, ca, nil, u.addr())
				r.shortHTTP2 = mode == "h2"
				r.ClientChanged()
				r.waitUp(b)
				target = r.hub(b, AsNode(), nil).URL
			}
			for _, conns := range []int{1, 8, 64} {
				for _, h2 := range []bool{false, true} {
					client := "client-h1"
					if h2 {
						client = "client-h2"
					}
					b.Run(fmt.Sprintf("%dKB/%s/%s/conns=%d", size>>10, client, mode, conns), func(b *testing.B) {
						load(b, target+"/api/v1/namespaces/default/configmaps/c", conns, h2)
					})
				}
			}
		}
	}
}

func load(b *testing.B, url string, conns int, h2 bool) {
	b.Helper()
	clients := make([]*http.Client, conns)
	for i := range clients {
		var p http.Protocols
		p.SetHTTP1(!h2)
		p.SetHTTP2(h2)
		tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, Protocols: &p, DisableCompression: true}
		defer tr.CloseIdleConnections()
		clients[i] = &http.Client{Transport: tr}
		fetch(b, clients[i], url)
	}
	var left atomic.Int64
	left.Store(int64(b.N))
	before := cpu()
	b.ResetTimer()
	var wg sync.WaitGroup
	for _, c := range clients {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				fetch(b, c, url)
			}
		})
	}
	wg.Wait()
	b.ReportMetric((cpu()-before)/float64(b.N), "cpu-µs/op")
}

func fetch(b *testing.B, c *http.Client, url string) {
	req, err := http.NewRequest(http.MethodGet, url, strings.NewReader(""))
	if err != nil {
		b.Error(err)
		return
	}
	req.Header.Set("Accept", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		b.Error(err)
		return
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		b.Error(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b.Errorf("status %s", resp.Status)
	}
}

func cpu() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e3
}
