// Package bed runs a real control plane and a real hub on loopback, with a
// link between them that a test can cut. It needs no root and no machines.
package bed

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/network"
)

// Node is the name of the node whose hub a bed runs.
const Node = "edge-1"

// Bed is a control plane, a hub, and the link between them.
type Bed struct {
	Cloud  *playground.ControlPlane
	Signer *Signer // nil: the controller manager signs
	Link   *Link
	Hub    *Hub

	dir, binary string
}

// Config says how a bed differs from the usual one.
type Config struct {
	APIServerFlags []string
	// CertificateLife is that of nodes' certificates, by a Signer; a year if
	// zero.
	CertificateLife time.Duration
}

// New starts everything and waits until the hub is ready. Close ends it.
func New(ctx context.Context, dir string, cfg Config) (*Bed, error) {
	plane := playground.ControlPlaneConfig{
		Dir: filepath.Join(dir, "cloud"), ControllerManager: true, APIServerFlags: cfg.APIServerFlags, SANs: network.LoopAddresses(),
	}
	if cfg.CertificateLife > 0 {
		WithSigner(&plane)
	}
	cloud, err := playground.StartControlPlane(ctx, plane)
	if err != nil {
		return nil, err
	}
	b := &Bed{Cloud: cloud, dir: dir}
	if cfg.CertificateLife > 0 {
		b.Signer, err = NewSigner(cloud, cfg.CertificateLife) //nolint:contextcheck // it lives until Close
	}
	if err == nil {
		b.binary, err = Build(ctx)
	}
	if err == nil {
		b.Hub, b.Link, err = b.AddHub(ctx, Node)
	}
	if err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// AddHub starts the hub of a further node, with a link of its own, and waits
// until it is ready. The flags are added to its own. Its caller ends both.
func (b *Bed) AddHub(ctx context.Context, node string, flags ...string) (*Hub, *Link, error) {
	link, err := NewLink(b.Cloud.RESTConfig().Host)
	if err != nil {
		return nil, nil, err
	}
	hub, err := NewHub(ctx, b.Cloud, b.binary, node, filepath.Join(b.dir, "hub-"+node), link.URL())
	if err == nil {
		hub.Args = flags
		err = hub.Start(ctx)
	}
	if err != nil {
		if hub != nil {
			hub.Kill()
		}
		link.Close()
		return nil, nil, err
	}
	return hub, link, nil
}

// Close ends all processes.
func (b *Bed) Close() {
	if b.Hub != nil {
		b.Hub.Kill()
	}
	if b.Link != nil {
		b.Link.Close()
	}
	if b.Signer != nil {
		_ = b.Signer.Close() // who needs to know has asked
	}
	b.Cloud.Stop()
}

// built guards the path of the hub once it is built.
var built struct {
	sync.Mutex
	path string
}

// Build builds the hub from this checkout, once in a process, and returns its
// path.
func Build(ctx context.Context) (path string, err error) {
	if path := os.Getenv("YURTHUB"); path != "" {
		return path, nil
	}
	built.Lock()
	defer built.Unlock()
	if built.path == "" {
		built.path, err = build(ctx)
	}
	return built.path, err
}

func build(ctx context.Context) (string, error) {
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find module: %w", err)
	}
	dir := string(root[:len(root)-1])
	out := filepath.Join(dir, "bin", "yurthub")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./cmd/yurthub")
	cmd.Dir = dir
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build yurthub: %w: %s", err, text)
	}
	return out, nil
}

// Hub is one hub process and its directory, which outlives the process.
type Hub struct {
	Dir    string
	Node   string
	URL    string   // of its proxy
	Health string   // of its health server
	Args   []string // more of the command line; the last of a flag wins

	binary string
	args   []string
	node   rest.TLSClientConfig // the credential of the node's own user

	mu  sync.Mutex // guards cmd and done
	cmd *exec.Cmd
	end chan struct{}
}

// NewHub prepares a hub for the named node, which reaches the cloud at server.
func NewHub(ctx context.Context, cloud *playground.ControlPlane, binary, node, dir, server string) (*Hub, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("prepare hub: %w", err)
	}
	token, err := cloud.BootstrapToken(ctx)
	if err != nil {
		return nil, fmt.Errorf("prepare hub: %w", err)
	}
	bootstrap := filepath.Join(dir, "bootstrap.conf")
	err = clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"cluster": {Server: server, CertificateAuthorityData: cloud.CA.CertPEM}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"node": {Token: token}},
		Contexts:       map[string]*clientcmdapi.Context{"hub": {Cluster: "cluster", AuthInfo: "node"}},
		CurrentContext: "hub",
	}, bootstrap)
	if err != nil {
		return nil, fmt.Errorf("prepare hub: %w", err)
	}
	cert, key, err := cloud.CA.Client("system:node:"+node, "system:nodes")
	if err != nil {
		return nil, fmt.Errorf("prepare hub: %w", err)
	}
	ports, err := playground.FreePorts(ctx, "127.0.0.1", 2)
	if err != nil {
		return nil, fmt.Errorf("prepare hub: %w", err)
	}
	proxy, health := strconv.Itoa(ports[0]), strconv.Itoa(ports[1])
	return &Hub{
		Dir: dir, Node: node, binary: binary, node: rest.TLSClientConfig{CertData: cert, KeyData: key},
		URL:    "https://127.0.0.1:" + proxy,
		Health: "http://127.0.0.1:" + health,
		args: []string{
			"--node-name", node, "--nodepool-name", "bench", "--server-addr", server,
			"--root-dir", dir, "--bootstrap-file", bootstrap, "--enable-dummy-if=false",
			"--proxy-secure-port", proxy, "--serve-port", health,
			"--log-level", "debug", "--profiling", "--run-dir", dir,
			// Tests compare Nodes with the cloud's and count writes.
			"--node-conditions=false",
		},
	}, nil
}

// Start starts the process and waits until it says that it is ready.
func (h *Hub) Start(ctx context.Context) error {
	if err := h.Launch(); err != nil {
		return err
	}
	return h.WaitReady(ctx)
}

// Launch starts the process and returns at once.
func (h *Hub) Launch() error {
	log, err := os.OpenFile(filepath.Join(h.Dir, "hub.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start hub: %w", err)
	}
	defer log.Close() //nolint:errcheck // the child has its own descriptor
	//nolint:noctx // it outlives the call; Stop and Kill end it
	cmd := exec.Command(h.binary, slices.Concat(h.args, h.Args)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, end := make(chan error), make(chan struct{})
	go func() { // ends with the process
		// The death signal is tied to the thread that forks, which must
		// therefore live as long as the hub.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(end)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start hub: %w", err)
	}
	h.mu.Lock()
	h.cmd, h.end = cmd, end
	h.mu.Unlock()
	return nil
}

// WaitReady waits until the hub answers that it is ready.
func (h *Hub) WaitReady(ctx context.Context) error {
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.Health+"/readyz", nil)
		if err != nil {
			return fmt.Errorf("wait for hub: %w", err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for hub: %w (log: %s)", context.Cause(ctx), filepath.Join(h.Dir, "hub.log"))
		case <-h.ended():
			return fmt.Errorf("hub ended (log: %s)", filepath.Join(h.Dir, "hub.log"))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (h *Hub) ended() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.end
}

// PID is the process id of the running hub.
func (h *Hub) PID() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cmd.Process.Pid
}

// Kill ends the hub as a power cut would, and waits for its end.
func (h *Hub) Kill() { h.signal(syscall.SIGKILL) }

// Stop ends the hub in good order.
func (h *Hub) Stop() { h.signal(syscall.SIGTERM) }

func (h *Hub) signal(sig syscall.Signal) {
	h.mu.Lock()
	cmd, end := h.cmd, h.end
	h.mu.Unlock()
	if cmd == nil {
		return
	}
	_ = cmd.Process.Signal(sig) // it may be gone
	<-end
}

// RESTConfig is the configuration of a client that talks to the hub with the
// credentials of cfg.
func (h *Hub) RESTConfig(cfg *rest.Config) (*rest.Config, error) {
	out := rest.CopyConfig(cfg)
	out.Host = h.URL
	bundle, err := os.ReadFile(filepath.Join(h.Dir, "pki", "ca-bundle.crt"))
	if err != nil {
		return nil, fmt.Errorf("read the hub's CA bundle: %w", err)
	}
	out.CAFile, out.CAData = "", bundle
	return out, nil
}

// KubeletConfig is the configuration of the node's own user, which has a
// certificate of its own as a kubelet has.
func (h *Hub) KubeletConfig() (*rest.Config, error) {
	return h.RESTConfig(&rest.Config{QPS: -1, TLSClientConfig: h.node})
}

// Link is a TCP relay between the hub and the cloud, which can be cut in two
// ways and counts bytes.
type Link struct {
	target  string
	address string        // where the hub dials
	listens string        // where the relay listens
	loop    *network.Loop // what is between; nil: nothing

	mu       sync.Mutex // guards the following
	listener net.Listener
	mode     Mode
	conns    map[net.Conn]struct{}
	flapping func() // ends flapping; nil if it does not
	waiting  *sync.Cond
	up, down int64
	closed   bool
}

// Mode is how a link is cut.
type Mode int

// The modes of a link: whole, refused at once, or silent; or accepted, and
// then reset or answered by a captive portal.
const (
	Whole Mode = iota
	Down
	Blackhole
	reset
	portal
)

// NewLink relays to the server at url.
func NewLink(url string) (*Link, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // to listen takes no time
	if err != nil {
		return nil, fmt.Errorf("open link: %w", err)
	}
	return newLink(url, listener, listener.Addr().String(), nil), nil
}

func newLink(url string, listener net.Listener, address string, loop *network.Loop) *Link {
	l := &Link{
		target: trimScheme(url), listener: listener, listens: listener.Addr().String(), address: address, loop: loop,
		conns: map[net.Conn]struct{}{},
	}
	l.waiting = sync.NewCond(&l.mu)
	go l.accept(listener) // ends with the listener
	return l
}

func trimScheme(url string) string {
	const scheme = "https://"
	if len(url) > len(scheme) && url[:len(scheme)] == scheme {
		return url[len(scheme):]
	}
	return url
}

// URL is where the hub finds the cloud.
func (l *Link) URL() string { return "https://" + l.address }

// Cut makes the link fail. With Down new connections are refused and old ones
// reset; with Blackhole nothing passes and nobody is told.
func (l *Link) Cut(m Mode) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mode == Down && m != Down {
		if err := l.reopenLocked(); err != nil {
			return err
		}
	}
	l.mode = m
	if m == Down {
		_ = l.listener.Close()
	}
	if m == Down || m == reset || m == portal {
		l.resetLocked()
	}
	l.waiting.Broadcast()
	return nil
}

func (l *Link) resetLocked() {
	for c := range l.conns {
		hardClose(c)
	}
	clear(l.conns)
}

// hardClose resets a connection.
func hardClose(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // a reset, not an orderly end
	}
	_ = c.Close()
}

// now is the mode of the moment.
func (l *Link) now() Mode {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mode
}

// Heal makes the link whole.
func (l *Link) Heal() error {
	if l.loop != nil {
		if err := l.still(); err != nil {
			return err
		}
	}
	return l.Cut(Whole)
}

func (l *Link) reopenLocked() error {
	listener, err := net.Listen("tcp", l.listens) //nolint:noctx // to listen takes no time
	if err != nil {
		return fmt.Errorf("reopen link: %w", err)
	}
	l.listener = listener
	go l.accept(listener) // ends with the listener
	return nil
}

// Bytes returns what passed towards the cloud and from it.
func (l *Link) Bytes() (up, down int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.up, l.down
}

// Close ends the relay.
func (l *Link) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	_ = l.listener.Close()
	for c := range l.conns {
		_ = c.Close()
	}
	l.waiting.Broadcast()
	if l.flapping != nil {
		l.flapping()
		l.flapping = nil
	}
	if l.loop != nil {
		_ = l.loop.Close()
	}
}

func (l *Link) accept(listener net.Listener) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		go l.serve(c) // ends with the connection
	}
}

func (l *Link) serve(c net.Conn) {
	defer c.Close() //nolint:errcheck // both ends are closed below
	switch l.now() {
	case reset:
		hardClose(c)
		return
	case portal:
		welcome(c)
		return
	}
	if !l.pass(c, nil, nil) {
		return
	}
	cloud, err := net.Dial("tcp", l.target) //nolint:noctx // on this machine: answered at once
	if err != nil {
		return
	}
	defer cloud.Close() //nolint:errcheck // as above
	l.mu.Lock()
	l.conns[c], l.conns[cloud] = struct{}{}, struct{}{}
	l.mu.Unlock()
	done := make(chan struct{}, 2)
	pump := func(dst, src net.Conn, count *int64) {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 {
				if !l.pass(c, count, &n) {
					return
				}
				if _, err := dst.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	go pump(cloud, c, &l.up)
	go pump(c, cloud, &l.down)
	<-done
	_ = c.Close()
	_ = cloud.Close()
	<-done
	l.mu.Lock()
	delete(l.conns, c)
	delete(l.conns, cloud)
	l.mu.Unlock()
}

// pass waits until the link is whole and counts what then goes over it.
func (l *Link) pass(_ net.Conn, count *int64, n *int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.mode == Blackhole && !l.closed {
		l.waiting.Wait()
	}
	if count != nil {
		*count += int64(*n)
	}
	return !l.closed && l.mode == Whole
}
