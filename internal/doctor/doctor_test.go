package doctor

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/report"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority signs certificates for tests.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	a := &authority{t: t}
	a.cert, a.key = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	})
	return a
}

func (a *authority) sign(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return c, key
}

// server is what a server certificate of the authority is like, as changed.
func (a *authority) server(change func(*x509.Certificate)) tls.Certificate {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "kube-apiserver"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(template)
	}
	c, key := a.sign(template)
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key, Leaf: c}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// settings are those of a node with the CA and nothing else.
func settings(t *testing.T, ca *authority) Settings {
	t.Helper()
	s := Settings{RootDir: t.TempDir(), Bind: "127.0.0.1", Credential: "/does/not/exist"}
	if err := os.MkdirAll(s.pki(""), 0o700); err != nil {
		t.Fatal(err)
	}
	if ca != nil {
		if err := os.WriteFile(s.pki("ca.crt"), ca.pem(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// travel makes the checks of the way to a server.
func travel(t *testing.T, s Settings, server string) map[string]Result {
	t.Helper()
	out := map[string]Result{}
	for _, r := range s.way(server).run(t.Context(), nil, func(Result) {}) {
		out[r.Check] = r
	}
	return out
}

// want checks what failed, how, and that what rests on it was left out.
func want(t *testing.T, got map[string]Result, failing, says string, skipped ...string) {
	t.Helper()
	for name, r := range got {
		if (r.Outcome == Fail) != (name == failing) {
			t.Errorf("%s: %+v, want %q to fail and nothing else", name, r, failing)
		}
	}
	if r := got[failing]; failing != "" && (!strings.Contains(r.Text, says) || r.Hint+r.Command == "") {
		t.Errorf("%s: %+v, want %q and a hint", failing, r, says)
	}
	for _, name := range skipped {
		if r := got[name]; r.Outcome != Skipped || !strings.Contains(r.Text, "because of") {
			t.Errorf("%s: %+v, want it left out", name, r)
		}
	}
}

// api answers as an API server does, with the clock off by skew.
func api(skew time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", time.Now().Add(skew).UTC().Format(http.TimeFormat))
		if r.URL.Path == "/version" {
			fmt.Fprint(w, `{"gitVersion": "v1.36.3"}`)
			return
		}
		fmt.Fprint(w, "ok")
	})
}

func serve(t *testing.T, h http.Handler, pair *tls.Certificate) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	if pair == nil {
		s.Start()
	} else {
		s.TLS = &tls.Config{Certificates: []tls.Certificate{*pair}, MinVersion: tls.VersionTLS12}
		s.StartTLS()
	}
	t.Cleanup(s.Close)
	return "https://" + s.Listener.Addr().String()
}

func TestWay(t *testing.T) {
	ca := newAuthority(t, "the cluster")
	other := newAuthority(t, "another")
	good := ca.server(nil)
	after := []string{"answer", "time", "rbac"}
	t.Run("good", func(t *testing.T) {
		got := travel(t, settings(t, ca), serve(t, api(0), &good))
		want(t, got, "", "")
		if got["time"].Outcome != OK || got["tls"].Outcome != OK || got["portal"].Outcome != OK {
			t.Errorf("got %+v", got)
		}
	})
	for _, tc := range []struct {
		name          string
		pair          tls.Certificate
		failing, says string
	}{
		{"wrong CA", other.server(nil), "tls", "wrong CA"},
		{"expired", ca.server(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "tls", "expired on"},
		{"not yet valid", ca.server(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) }), "tls", "valid from"},
		{"wrong name", ca.server(func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }), "tls", "not for 127.0.0.1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want(t, travel(t, settings(t, ca), serve(t, api(0), &tc.pair)), tc.failing, tc.says, after...)
		})
	}
	t.Run("no CA", func(t *testing.T) {
		want(t, travel(t, settings(t, nil), serve(t, api(0), &good)), "tls", "CA is not read", after...)
	})
	t.Run("clock behind", func(t *testing.T) {
		want(t, travel(t, settings(t, ca), serve(t, api(time.Hour), &good)), "time", "behind the server's")
	})
	t.Run("not ready", func(t *testing.T) {
		broken := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/version" {
				fmt.Fprint(w, `{"gitVersion": "v1.36.3"}`)
				return
			}
			http.Error(w, "etcd failed", http.StatusInternalServerError)
		})
		want(t, travel(t, settings(t, ca), serve(t, broken, &good)), "answer", "etcd failed", "rbac")
	})
	html := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://wifi.example/login", http.StatusFound)
	})
	theirs := other.server(nil)
	t.Run("captive portal with a certificate", func(t *testing.T) {
		want(t, travel(t, settings(t, ca), serve(t, html, &theirs)), "portal", "http://wifi.example/login", "tls", "rbac")
	})
	t.Run("captive portal without", func(t *testing.T) {
		want(t, travel(t, settings(t, ca), serve(t, html, nil)), "portal", "http://wifi.example/login", "tls", "rbac")
	})
	t.Run("refused", func(t *testing.T) {
		var lc net.ListenConfig
		l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		_ = l.Close()
		want(t, travel(t, settings(t, ca), "https://"+addr), "connect", "refused", "portal", "tls", "answer", "time", "rbac")
	})
	t.Run("no such name", func(t *testing.T) {
		want(t, travel(t, settings(t, ca), "https://api.invalid:6443"), "dns", "api.invalid", "route", "connect")
	})
	t.Run("no URL", func(t *testing.T) {
		want(t, travel(t, settings(t, ca), "10.0.0.1"), "dns", "no URL")
	})
	t.Run("accepts and never answers", func(t *testing.T) {
		var lc net.ListenConfig
		l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		want(t, travel(t, settings(t, ca), "https://"+l.Addr().String()), "portal", "then no answer", "tls")
	})
}

// inNetwork runs f on a thread in an empty network of its own. Goroutines
// that f starts are elsewhere, so it is for what a single one does.
func inNetwork(t *testing.T, setup func(run func(...string)), f func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // it ends with the goroutine, and the network with it
		ns, err := netns.New()
		if err != nil {
			done <- err
			return
		}
		defer ns.Close()
		setup(func(argv ...string) {
			if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%v: %v: %s", argv, err, out)
			}
		})
		f()
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestNoRouteAndBlackHole(t *testing.T) {
	s := settings(t, nil)
	w := &way{settings: &s, ips: []net.IP{net.IPv4(192, 0, 2, 1)}, port: "6443", url: mustURL(t, "https://192.0.2.1:6443")}
	inNetwork(t, func(run func(...string)) { run("ip", "link", "set", "lo", "up") }, func() {
		if r := w.route(t.Context()); r.Outcome != Fail || !strings.Contains(r.Text, "no route") {
			t.Errorf("empty network: %+v", r)
		}
	})
	inNetwork(t, func(run func(...string)) {
		run("ip", "link", "set", "lo", "up")
		run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
		run("nft", "add table ip hole; add chain ip hole in { type filter hook input priority 0; }; add rule ip hole in tcp dport 6443 drop")
	}, func() {
		if r := w.route(t.Context()); r.Outcome != OK {
			t.Errorf("black hole: route %+v", r)
		}
		begun := time.Now()
		r := w.connect(t.Context())
		if r.Outcome != Fail || !strings.Contains(r.Text, "black hole") || time.Since(begun) > hopLimit+time.Second {
			t.Errorf("black hole: %+v after %s", r, time.Since(begun))
		}
	})
}

func mustURL(t *testing.T, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestDisk(t *testing.T) {
	mount := func(t *testing.T, options string) string {
		t.Helper()
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T) string
		outcome Outcome
		says    string
	}{
		{"good", func(t *testing.T) string { return mount(t, "size=1g") }, OK, "1024 MiB left"},
		{"little room", func(t *testing.T) string { return mount(t, "size=100m") }, Warn, "100 MiB left"},
		{"full", func(t *testing.T) string { return mount(t, "size=1m") }, Fail, "1 MiB left"},
		{"no inodes", func(t *testing.T) string { return mount(t, "size=1g,nr_inodes=10") }, Fail, "inodes left"},
		{"read-only", func(t *testing.T) string {
			dir := mount(t, "size=1g")
			if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			return dir
		}, Fail, "read-only"},
		{"never started", func(t *testing.T) string { return filepath.Join(t.TempDir(), "none") }, Fail, "does not exist"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := Settings{RootDir: tc.prepare(t)}
			r := s.disk(t.Context())
			if r.Outcome != tc.outcome || !strings.Contains(r.Text, tc.says) || (r.Outcome != OK && r.Command == "") {
				t.Errorf("got %+v, want %s %q", r, tc.outcome, tc.says)
			}
			if left, _ := filepath.Glob(filepath.Join(s.RootDir, ".doctor-*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestClock(t *testing.T) {
	s := settings(t, newAuthority(t, "the cluster"))
	if r := s.clock(t.Context()); r.Outcome == Fail {
		t.Errorf("a clock that is right: %+v", r)
	}
	later := time.Now().Add(48 * time.Hour)
	if err := os.Chtimes(s.pki("ca.crt"), later, later); err != nil {
		t.Fatal(err)
	}
	if r := s.clock(t.Context()); r.Outcome != Fail || !strings.Contains(r.Text, "ca.crt was written") {
		t.Errorf("a clock two days behind: %+v", r)
	}
}

func TestCertificate(t *testing.T) {
	ca := newAuthority(t, "the cluster")
	for _, tc := range []struct {
		name    string
		change  func(*x509.Certificate)
		outcome Outcome
		says    string
	}{
		{"good", nil, OK, "valid until"},
		{"expired", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, Fail, "expired on"},
		{"near its end", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().AddDate(0, -1, 0), time.Now().Add(time.Hour)
		}, Warn, "should have been renewed"},
		{"of the future", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) }, Fail, "valid from"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := settings(t, ca)
			pair := ca.server(tc.change)
			text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})
			if err := os.WriteFile(s.pki("hub-client.pem"), text, 0o600); err != nil {
				t.Fatal(err)
			}
			if r := s.certificate(t.Context()); r.Outcome != tc.outcome || !strings.Contains(r.Text, tc.says) {
				t.Errorf("got %+v, want %s %q", r, tc.outcome, tc.says)
			}
		})
	}
	s := settings(t, ca)
	if r := s.certificate(t.Context()); r.Outcome != Fail || !strings.Contains(r.Command, "kubeadm token create") {
		t.Errorf("none: %+v", r)
	}
}

func TestUnit(t *testing.T) {
	for _, tc := range []struct {
		state   string
		outcome Outcome
		says    string
	}{
		{"LoadState=loaded ActiveState=active SubState=running UnitFileState=enabled NRestarts=0", OK, "is active"},
		{"LoadState=loaded ActiveState=active SubState=running UnitFileState=disabled NRestarts=0", Warn, "would not start at boot"},
		{"LoadState=loaded ActiveState=active SubState=running UnitFileState=enabled NRestarts=9", Warn, "9 restarts"},
		{"LoadState=loaded ActiveState=activating SubState=start UnitFileState=enabled", Warn, "first certificate"},
		{"LoadState=loaded ActiveState=activating SubState=auto-restart Result=exit-code NRestarts=3", Fail, "again and again"},
		{"LoadState=loaded ActiveState=failed Result=oom-kill", Fail, "failed (oom-kill)"},
		{"LoadState=not-found", Fail, "not-found"},
	} {
		s := Settings{Unit: unitName, State: map[string]string{}}
		for f := range strings.FieldsSeq(tc.state) {
			name, value, _ := strings.Cut(f, "=")
			s.State[name] = value
		}
		if r := s.unit(t.Context()); r.Outcome != tc.outcome || !strings.Contains(r.Text, tc.says) {
			t.Errorf("%s: got %+v, want %s %q", tc.state, r, tc.outcome, tc.says)
		}
	}
}

func TestPortTakenByAnother(t *testing.T) {
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	s := Settings{Bind: "127.0.0.1", Proxy: port, Health: port, Unit: unitName, State: map[string]string{"MainPID": "1", "ActiveState": "failed"}}
	if r := s.ports(t.Context()); r.Outcome != Fail || !strings.Contains(r.Text, fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("taken: %+v", r)
	}
	s.State["MainPID"] = fmt.Sprint(os.Getpid())
	if r := s.ports(t.Context()); r.Outcome != OK {
		t.Errorf("held by the hub: %+v", r)
	}
	_ = l.Close()
	if r := s.ports(t.Context()); r.Outcome != OK || !strings.Contains(r.Text, "free") {
		t.Errorf("free: %+v", r)
	}
	s.State["ActiveState"] = "active"
	if r := s.ports(t.Context()); r.Outcome != Fail || !strings.Contains(r.Text, "nobody listens") {
		t.Errorf("active and not listening: %+v", r)
	}
}

func TestAddress(t *testing.T) {
	s := Settings{DummyIP: "127.0.0.1"}
	if r := s.address(t.Context()); r.Outcome != OK || !strings.Contains(r.Text, "on lo") {
		t.Errorf("there: %+v", r)
	}
	s.DummyIP = "192.0.2.77"
	if r := s.address(t.Context()); r.Outcome != Fail {
		t.Errorf("missing: %+v", r)
	}
}

func TestKubelet(t *testing.T) {
	ca, other := newAuthority(t, "the node"), newAuthority(t, "another")
	pair := ca.server(nil)
	u := mustURL(t, serve(t, api(0), &pair))
	s := settings(t, ca)
	if _, err := fmt.Sscan(u.Port(), &s.Proxy); err != nil {
		t.Fatal(err)
	}
	s.Kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	write := func(server string, ca *authority) {
		t.Helper()
		file := filepath.Join(filepath.Dir(s.Kubeconfig), "ca.crt")
		if err := os.WriteFile(file, ca.pem(), 0o600); err != nil {
			t.Fatal(err)
		}
		text := "apiVersion: v1\nkind: Config\nclusters:\n- {name: c, cluster: {server: '" + server + "', certificate-authority: ca.crt}}\n" +
			"contexts:\n- {name: x, context: {cluster: c, user: u}}\ncurrent-context: x\nusers:\n- {name: u, user: {}}\n"
		if err := os.WriteFile(s.Kubeconfig, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r := s.kubelet(t.Context()); r.Outcome != Warn {
		t.Errorf("no kubeconfig: %+v", r)
	}
	write(s.hubURL(), ca)
	if r := s.kubelet(t.Context()); r.Outcome != OK {
		t.Errorf("good: %+v", r)
	}
	write("https://10.0.0.1:6443", ca)
	if r := s.kubelet(t.Context()); r.Outcome != Fail || !strings.Contains(r.Command, "--server="+s.hubURL()) {
		t.Errorf("past the hub: %+v", r)
	}
	write(s.hubURL(), other)
	if r := s.kubelet(t.Context()); r.Outcome != Fail || !strings.Contains(r.Text, "does not vouch") {
		t.Errorf("wrong CA: %+v", r)
	}
}

// TestChainIsBounded: a check that hangs, as a system call on a dying disk
// does, costs its limit and what rests on it.
func TestChainIsBounded(t *testing.T) {
	release := make(chan struct{})
	ended := make(chan struct{})
	c := chain{checks: []check{
		{"hangs", nil, 20 * time.Millisecond, func(context.Context) Result { defer close(ended); <-release; return ok("late") }},
		{"rests on it", []string{"hangs"}, time.Second, func(context.Context) Result { return ok("") }},
		{"stands alone", nil, time.Second, func(context.Context) Result { return ok("fine") }},
	}}
	var outcomes []Outcome
	for _, r := range c.run(t.Context(), nil, func(Result) {}) {
		outcomes = append(outcomes, r.Outcome)
	}
	close(release)
	<-ended
	if got := fmt.Sprint(outcomes); got != "[fail skipped ok]" {
		t.Errorf("got %s", got)
	}
}

func TestDefaultsFile(t *testing.T) {
	var s Settings
	s.parse(defaultFlags([]byte("# comment\nYURTHUB_FLAGS=\"--node-name=edge-1 --server-addr=https://a:1,https://b:2 --some-new-flag=7 --root-dir=/srv/hub --enable-dummy-if=false\"\n")))
	if got := fmt.Sprintf("%v %s %d %q", s.Servers, s.RootDir, s.Proxy, s.DummyIP); got != `[https://a:1 https://b:2] /srv/hub 10268 ""` {
		t.Errorf("got %s", got)
	}
}

// TestStatus: the table, the JSON and the exit code, with a hub and without.
func TestStatus(t *testing.T) {
	s := settings(t, newAuthority(t, "the cluster"))
	s.RunDir = t.TempDir()
	r := report.Report{
		Node: "edge-1", Version: "v1", Started: time.Now().Add(-time.Hour), Since: time.Now().Add(-3 * time.Minute), Reason: "i/o timeout",
		StoreHealth: "ok", StatusPending: 2,
		Sharing: &report.Sharing{
			Role: report.RoleMember, Upstream: "edge-2", Live: true, Address: "10.0.0.1:10269",
			Peers: []report.Peer{{Node: "edge-2", Address: "10.0.0.2", Leader: true, Live: true, Seen: time.Now().Add(-time.Second)}},
		},
		Journal:      report.Journal{Bytes: 2048, Oldest: time.Now().Add(-2*time.Minute - time.Second), Delivered: 7, Dropped: 1},
		Certificates: []report.Certificate{{Name: "server-pods"}},
		Conditions:   []report.Condition{{Type: "YurtHubLinkReady", Status: report.False, Reason: "Silent", Message: "m"}},
		Scopes:       []report.Scope{{Scope: "/v1/pods", Objects: 3, Synced: true, Stored: true, Contact: time.Now().Add(-3 * time.Minute)}},
	}
	run := func(args ...string) (string, error) {
		var out strings.Builder
		cmd := NewStatus()
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetArgs(append([]string{"--unit=", "--root-dir", s.RootDir, "--run-dir", s.RunDir}, args...))
		cmd.SetOut(&out)
		err := cmd.ExecuteContext(t.Context())
		return out.String(), err
	}
	out, err := run()
	if err == nil || !strings.Contains(out, "does not answer") || !strings.Contains(out, "yurtadm doctor") {
		t.Errorf("no hub: %v\n%s", err, out)
	}

	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "unix", filepath.Join(s.RunDir, report.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	server := &httpx.Server{Listener: l, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(r); err != nil {
			t.Error(err)
		}
	})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	out, err = run()
	for _, text := range []string{
		"DOWN for 3 min: i/o timeout", "2 status, 0 events wait for the cloud, 2 KiB, the oldest for 2 min", "7 delivered, 1 dropped", "server-pods, none yet", "YurtHubLinkReady  False", "/v1/pods", "yes",
		"member; services and the like come from node edge-2, which hears the cloud; peers reach this hub at 10.0.0.1:10269",
		"edge-2  10.0.0.2  leader  no    yes              1s",
	} {
		if !strings.Contains(out, text) {
			t.Errorf("no %q in\n%s", text, out)
		}
	}
	if err == nil {
		t.Error("a hub that is offline passes for healthy")
	}
	r.Conditions[0].Status = report.True
	out, err = run("-o", "json")
	var back report.Report
	if err != nil || json.Unmarshal([]byte(out), &back) != nil || back.Node != "edge-1" || back.Journal.Dropped != 1 || back.Journal.Oldest.IsZero() {
		t.Errorf("json: %v\n%s", err, out)
	}
	if _, err = run("-o", "yaml"); err == nil {
		t.Error("an unknown form is accepted")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestNames(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		out := new(dns.Msg).SetReply(m)
		switch q := m.Question[0]; {
		case q.Name != "kubernetes.default.svc.cluster.local.":
			out.Rcode = dns.RcodeNameError
		case q.Qtype == dns.TypeA:
			out.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(10, 96, 0, 1)}}
		}
		_ = w.WriteMsg(out)
	})}
	done := make(chan error, 1)
	go func() { done <- server.ActivateAndServe() }()
	at := netip.MustParseAddrPort(pc.LocalAddr().String())
	s := Settings{DummyIP: "127.0.0.1", DNS: true, DNSPort: int(at.Port()), Domain: "cluster.local"}
	if r := s.names(t.Context()); r.Outcome != OK || !strings.Contains(r.Text, "10.96.0.1") {
		t.Errorf("there: %+v", r)
	}
	s.Domain = "other.example"
	if r := s.names(t.Context()); r.Outcome != Warn || !strings.Contains(r.Hint, "--cluster-domain") {
		t.Errorf("another domain: %+v", r)
	}
	if err := pc.Close(); err != nil {
		t.Fatal(err)
	}
	<-done
	if r := s.names(t.Context()); r.Outcome != Warn || !strings.Contains(r.Hint, "port 53") {
		t.Errorf("nobody answers: %+v", r)
	}
	s.DNS = false
	if r := s.names(t.Context()); r.Outcome != OK {
		t.Errorf("turned off: %+v", r)
	}
}
