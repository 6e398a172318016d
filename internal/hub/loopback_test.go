package hub

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/yurt-edge/yurt/internal/hub/identity"
)

// FuzzPlainRequest sends headers as root to the plain listener: whoever is let
// in without a credential is so by a loopback name and from no browser.
func FuzzPlainRequest(f *testing.F) {
	h := &Hub{log: slog.New(slog.DiscardHandler), self: &identity.Caller{Name: "system:node:edge-1", Certificate: true}}
	h.authn = identity.NewAuthenticator(identity.AuthenticatorConfig{
		Memory: &identity.MapMemory{}, Online: func() bool { return false }, Log: h.log,
	})
	for _, host := range []string{
		"localhost", "LOCALHOST:10261", "127.0.0.1:10261", "127.9.9.9", "[::1]:10261", "[::1]", "::ffff:127.0.0.1",
		"localhost.evil.example", "127.0.0.1.evil.example:10261", "evil.example", "169.254.2.1:10261", "0.0.0.0", "", "[::1%lo]",
	} {
		f.Add(host, "X-A", "b")
	}
	f.Add("localhost", "Origin", "null")
	f.Add("localhost", "sec-fetch-mode", "navigate")
	f.Add("localhost", "Referer", "https://evil.example")
	f.Add("localhost", "Authorization", "")
	f.Add("localhost", "Authorization", "Basic eA==")
	f.Add("localhost", "Authorization", "Bearer x.y.z")
	f.Fuzz(func(t *testing.T, host, name, value string) {
		r := httptest.NewRequest(http.MethodGet, "/api/v1/pods", http.NoBody)
		r.Host = host
		r.Header.Set(name, value)
		for _, p := range []peerOf{{uid: 0}, {uid: 1000}, {err: errors.New("closing")}} {
			c, err := h.local(r.WithContext(withPeerOf(r.Context(), p)))
			if (c == nil) == (err == nil) {
				t.Fatalf("got %v and %v", c, err)
			}
			switch header := http.CanonicalHeaderKey(name); {
			case err != nil:
				if !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err) {
					t.Fatalf("%q, %q: %v", host, name, err)
				}
			case p.uid != 0 || p.err != nil, !isLoopbackHost(host), header == "Origin", header == "Referer",
				strings.HasPrefix(header, "Sec-Fetch-"), header == "Authorization":
				t.Fatalf("%q, %q: %q, %+v is let in as %v", host, name, value, p, c)
			case c != h.self:
				t.Fatalf("let in as %v", c)
			}
		}
	})
}

func TestLoopbackHost(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "LocalHost:10261": true, "127.0.0.1:10261": true, "127.3.2.1": true, "[::1]:10261": true, "[::1]": true, "::1": true,
		"": false, "localhost.": false, "localhost.evil.example": false, "127.0.0.1.evil.example": false, "evil.example:10261": false,
		"169.254.2.1:10261": false, "0.0.0.0:10261": false, "[::]:10261": false, "[::1%lo]:10261": false, "10.0.0.1": false,
	} {
		if got := isLoopbackHost(host); got != want {
			t.Errorf("%q: %t, want %t", host, got, want)
		}
	}
	h := &Hub{}
	if _, err := h.local(httptest.NewRequest(http.MethodGet, "/", http.NoBody)); !apierrors.IsForbidden(err) {
		t.Errorf("a request of a connection that nobody looked at: %v", err)
	}
}

// TestFlagsOfListeners is about flags that could open the hub to others.
func TestFlagsOfListeners(t *testing.T) {
	config := func(args ...string) (Config, error) {
		var f Flags
		fs := pflag.NewFlagSet("yurthub", pflag.ContinueOnError)
		fs.SetOutput(io.Discard)
		f.Add(fs)
		if err := fs.Parse(append([]string{"--node-name=n", "--server-addr=https://10.0.0.1:6443"}, args...)); err != nil {
			t.Fatal(err)
		}
		return f.Config()
	}
	cfg, err := config()
	if err != nil || cfg.InsecurePort != 0 || cfg.BindAddress != "127.0.0.1" {
		t.Errorf("by default: plain port %d, address %s, %v", cfg.InsecurePort, cfg.BindAddress, err)
	}
	if cfg, err := config("--insecure-loopback", "--bind-address=::1", "--dummy-if-ip=fd00::2:1"); err != nil || cfg.InsecurePort != 10261 {
		t.Errorf("plain port %d, %v", cfg.InsecurePort, err)
	}
	for _, args := range [][]string{
		{"--bind-address=0.0.0.0"},
		{"--bind-address=192.0.2.1"},
		{"--bind-address="},
		{"--bind-address=::"},
		{"--bind-address=localhost"},
		{"--dummy-if-ip=192.0.2.1"},
		{"--dummy-if-ip=10.0.0.1"},
		{"--dummy-if-ip=0.0.0.0"},
		{"--dummy-if-ip=2001:db8::1"},
		{"--insecure-loopback", "--proxy-port=0"},
		{"--insecure-loopback", "--proxy-port=65536"},
	} {
		flag := strings.TrimPrefix(strings.Split(args[len(args)-1], "=")[0], "--")
		if _, err := config(args...); err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// TestNodeIsNameAndGroup is about whom the hub's certificate stands for.
func TestNodeIsNameAndGroup(t *testing.T) {
	h := &Hub{self: &identity.Caller{Name: "system:node:edge-1"}}
	for want, callers := range map[bool][]*identity.Caller{
		true: {{Name: "system:node:edge-1", Groups: []string{"system:authenticated", "system:nodes"}, Certificate: true}},
		false: {
			{Name: "system:node:edge-1", Groups: []string{"system:authenticated"}, Certificate: true},
			{Name: "system:node:edge-1", Groups: []string{"system:nodes"}, Token: "t"},
			{Name: "system:node:edge-2", Groups: []string{"system:nodes"}, Certificate: true},
		},
	} {
		for _, c := range callers {
			if h.isNode(c) != want {
				t.Errorf("%+v: isNode is %t", c, !want)
			}
		}
	}
}
