package pools

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/api/crds"
	"github.com/yurt-edge/yurt/internal/report"
	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/test/bed"
)

// patience is how long a test waits for what must happen soon. Nothing waits
// that long when all is well.
const patience = 90 * time.Second

// rights are what the chart grants to nodes, and what the manager grants them
// by what pools share.
const rights = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: yurt-hub}
rules:
- {apiGroups: [apps.openyurt.io], resources: [nodepools, nodebuckets], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [configmaps], resourceNames: [yurt-hub-cfg], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [services], verbs: [get, list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [get, list, watch]}
- {apiGroups: [network.openyurt.io], resources: [accessfilters], verbs: [get, list, watch]}
- {apiGroups: [pools.test], resources: [widgets], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: yurt-hub}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: yurt-hub}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:nodes"}
---
apiVersion: v1
kind: Namespace
metadata: {name: pools}
`

// shared is set by TestMain and read by tests.
var shared struct {
	cloud  *playground.ControlPlane
	admin  *kubernetes.Clientset
	binary string
	dir    string
}

func TestMain(m *testing.M) { os.Exit(bed.Run(m, "pools", setUp)) }

func setUp(ctx context.Context, dir string) (tearDown func() error, err error) {
	shared.dir = dir
	if shared.binary, err = bed.Build(ctx); err != nil {
		return nil, err
	}
	shared.cloud, err = playground.StartControlPlane(ctx, playground.ControlPlaneConfig{
		Dir: filepath.Join(dir, "cloud"), ControllerManager: true,
		// These two watch all resources half a minute after they are defined, and
		// tests count who watches.
		ControllerManagerFlags: []string{"--controllers=*,-garbage-collector-controller,-resourcequota-controller"},
	})
	if err != nil {
		return nil, err
	}
	tearDown = func() error {
		shared.cloud.Stop()
		return nil
	}
	if shared.admin, err = shared.cloud.Client(); err != nil {
		return tearDown, err
	}
	documents := []string{rights}
	for _, text := range crds.YAML() {
		documents = append(documents, string(text))
	}
	for _, text := range documents {
		if err := shared.cloud.Apply(ctx, text); err != nil {
			return tearDown, err
		}
	}
	return tearDown, nil
}

// await repeats try until it gives no error or patience is over.
func await(t *testing.T, what string, try func() error) {
	t.Helper()
	if err := bed.Until(t.Context(), patience, func(context.Context) error { return try() }); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// freePort returns a port that is free at all loopback addresses.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// site is a pool of hubs, each a process with an address and a link of its
// own.
type site struct {
	name string
	port int
	hubs []*hub
	args []string // of all hubs, beside those that they need
	seq  int      // of the last write, see write
}

// hub is one of a site.
type hub struct {
	*bed.Hub
	link    *bed.Link
	way     *way // that of its peers to it
	address string
	watcher *watcher
}

// way passes connections on to a hub, at an address of its own, but for those
// of hubs that it is cut for.
type way struct {
	listener net.Listener
	to       string

	mu    sync.Mutex // guards the following
	cut   map[string]bool
	conns map[net.Conn]string // by the address that they come from
}

func newWay(t *testing.T, at, to string) *way {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	w := &way{listener: l, to: to, cut: map[string]bool{}, conns: map[net.Conn]string{}}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { w.pass(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		w.end(func(string) bool { return true })
		running.Wait()
	})
	return w
}

// pass goes on with a connection as if it came from where it does.
func (w *way) pass(c net.Conn) {
	defer c.Close()
	from, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.IP}, Timeout: patience}
	there, err := dialer.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer there.Close()
	w.mu.Lock()
	if w.cut[from.IP.String()] {
		w.mu.Unlock()
		return
	}
	w.conns[c], w.conns[there] = from.IP.String(), from.IP.String()
	w.mu.Unlock()
	var both sync.WaitGroup
	for src, dst := range map[net.Conn]net.Conn{c: there, there: c} {
		both.Go(func() {
			_, _ = io.Copy(dst, src) // either end closes both
			_ = src.Close()
			_ = dst.Close()
		})
	}
	both.Wait()
	w.mu.Lock()
	delete(w.conns, c)
	delete(w.conns, there)
	w.mu.Unlock()
}

func (w *way) end(those func(from string) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c, from := range w.conns {
		if those(from) {
			_ = c.Close()
		}
	}
}

// set cuts the way for the hub at an address, or heals it.
func (w *way) set(from string, cut bool) {
	w.mu.Lock()
	w.cut[from] = cut
	w.mu.Unlock()
	if cut {
		w.end(func(f string) bool { return f == from })
	}
}

var network byte // the last that a site has taken; tests run one after the other

// newSite makes a pool with so many nodes, and no hub yet. It shares the named
// resources of group and version pools.test/v1 too.
func newSite(t *testing.T, name string, nodes int, shares ...string) *site {
	t.Helper()
	network++
	s := &site{name: name, port: freePort(t)}
	var more []string
	for _, resource := range shares {
		more = append(more, "{group: pools.test, version: v1, resource: "+resource+"}")
	}
	pool := fmt.Sprintf(`
apiVersion: apps.openyurt.io/v1beta2
kind: NodePool
metadata: {name: %s}
spec: {type: Edge, interConnectivity: true, enableLeaderElection: true, leaderReplicas: 2, poolScopeMetadata: [%s]}
`, name, strings.Join(more, ", "))
	await(t, "node pool", func() error { return shared.cloud.Apply(t.Context(), pool) })
	for i := range nodes {
		h := &hub{address: fmt.Sprintf("127.%d.0.%d", 20+network, i+1)}
		s.hubs = append(s.hubs, h)
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("%s-%d", name, i+1), Labels: map[string]string{"apps.openyurt.io/nodepool": name},
		}}
		if _, err := shared.admin.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *site) node(i int) string { return fmt.Sprintf("%s-%d", s.name, i+1) }

// status is what the manager writes of the pool: who is in it and who leads.
func (s *site) status(t *testing.T, nodes []string, leaders map[string]string, order ...string) {
	t.Helper()
	endpoints := []map[string]string{}
	for _, node := range order {
		endpoints = append(endpoints, map[string]string{"nodeName": node, "address": leaders[node]})
	}
	s.patchStatus(t, map[string]any{"nodes": nodes, "leaderEndpoints": endpoints})
}

func (s *site) patchStatus(t *testing.T, status map[string]any) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		t.Fatal(err)
	}
	err = shared.admin.RESTClient().Patch(types.MergePatchType).AbsPath("/apis/apps.openyurt.io/v1beta2/nodepools/" + s.name + "/status").
		Body(patch).Do(t.Context()).Error()
	if err != nil {
		t.Fatal(err)
	}
}

// elect makes the hubs of the first nodes leaders, at the addresses of the ways
// to them.
func (s *site) elect(t *testing.T, leaders int) {
	t.Helper()
	var nodes, order []string
	at := map[string]string{}
	for i, h := range s.hubs {
		nodes = append(nodes, s.node(i))
		if i < leaders {
			order = append(order, s.node(i))
			at[s.node(i)] = h.wayAddress()
		}
	}
	s.status(t, nodes, at, order...)
}

// start starts the hub of node i.
func (s *site) start(t *testing.T, i int) *hub {
	t.Helper()
	h := s.hubs[i]
	var err error
	h.way = newWay(t, net.JoinHostPort(h.wayAddress(), strconv.Itoa(s.port)), net.JoinHostPort(h.address, strconv.Itoa(s.port)))
	if h.link, err = bed.NewLink(shared.cloud.RESTConfig().Host); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.link.Close)
	h.Hub, err = bed.NewHub(t.Context(), shared.cloud, shared.binary, s.node(i), filepath.Join(shared.dir, s.node(i)), h.link.URL())
	if err != nil {
		t.Fatal(err)
	}
	h.Args = []string{"--nodepool-name=" + s.name, "--node-ip=" + h.address, "--multiplexer-port=" + strconv.Itoa(s.port)}
	h.Args = append(h.Args, s.args...)
	t.Cleanup(h.Kill)
	if err := h.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h
}

// wayAddress is where peers find the hub.
func (h *hub) wayAddress() string { return strings.Replace(h.address, ".0.", ".1.", 1) }

// follows waits until the hub takes what is shared from that upstream, "cloud"
// or a node, and says that it hears the cloud, or does not.
func (h *hub) follows(t *testing.T, upstream string, live bool) {
	t.Helper()
	await(t, h.Node+" follows "+upstream, func() error {
		r, err := report.Ask(t.Context(), h.Dir)
		switch {
		case err != nil:
			return err
		case r.Sharing == nil:
			return fmt.Errorf("it is in no pool")
		case r.Sharing.Upstream != upstream || r.Sharing.Live != live:
			return fmt.Errorf("it follows %+v", r.Sharing)
		}
		return nil
	})
}

func (h *hub) client(t *testing.T) *kubernetes.Clientset {
	t.Helper()
	cfg, err := h.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// names are those of the objects that write writes, in turn.
func (s *site) names() []string { return []string{s.name + "-a", s.name + "-b", s.name + "-c"} }

const seqKey = "pools.test/seq"

// write makes one change in the cloud, with the next number.
func (s *site) write(t *testing.T) {
	t.Helper()
	s.seq++
	names := s.names()
	slices := shared.admin.DiscoveryV1().EndpointSlices("pools")
	if s.seq <= len(names) {
		_, err := slices.Create(t.Context(), &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Name: names[s.seq-1], Annotations: map[string]string{seqKey: strconv.Itoa(s.seq)},
			},
			AddressType: discoveryv1.AddressTypeIPv4,
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:"%d"}}}`, seqKey, s.seq)
	_, err := slices.Patch(t.Context(), names[s.seq%len(names)], types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// watcher is a client of one hub with one watch, which must not end and must
// show each write once and in order.
type watcher struct {
	node string

	mu   sync.Mutex // guards the following
	seen int
	over bool // its hub was killed
	err  error
}

// watch begins a watch of node i's hub. It has seen all writes until now.
func (s *site) watch(t *testing.T, i int) {
	t.Helper()
	h, client := s.hubs[i], s.hubs[i].client(t)
	w := &watcher{node: h.Node, seen: s.seq}
	h.watcher = w
	options := metav1.ListOptions{ResourceVersion: "0", TimeoutSeconds: new(int64(3600))}
	var version string
	await(t, "list of "+h.Node, func() error {
		list, err := client.DiscoveryV1().EndpointSlices("pools").List(t.Context(), options)
		if err != nil {
			return err
		}
		seen := 0
		for i := range list.Items {
			if strings.HasPrefix(list.Items[i].Name, s.name+"-") {
				n, err := strconv.Atoi(list.Items[i].Annotations[seqKey])
				if err != nil {
					return err
				}
				seen = max(seen, n)
			}
		}
		if seen != s.seq {
			return fmt.Errorf("it has seen write %d of %d", seen, s.seq)
		}
		version = list.ResourceVersion
		return nil
	})
	options.ResourceVersion = version
	// It must outlive the test's own context, whose end it would show.
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	stream, err := client.DiscoveryV1().EndpointSlices("pools").Watch(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for ev := range stream.ResultChan() {
			w.take(s, ev)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if ctx.Err() == nil && !w.over && w.err == nil {
			w.err = fmt.Errorf("the watch ended after write %d", w.seen)
		}
	})
	t.Cleanup(func() {
		w.mu.Lock()
		if w.err != nil {
			t.Errorf("%s: %v", w.node, w.err)
		}
		w.mu.Unlock()
		cancel()
		stream.Stop()
		running.Wait()
	})
}

func (w *watcher) take(s *site, ev watch.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	slice, ok := ev.Object.(*discoveryv1.EndpointSlice)
	if !ok {
		w.err = fmt.Errorf("the watch showed %v after write %d", ev, w.seen)
		return
	}
	if !strings.HasPrefix(slice.Name, s.name+"-") {
		return
	}
	n, err := strconv.Atoi(slice.Annotations[seqKey])
	if n != w.seen+1 {
		w.err = errors.Join(fmt.Errorf("after write %d the watch showed %s of %s, write %d", w.seen, ev.Type, slice.Name, n), err)
	}
	w.seen = n
}

// forget drops the hub's watcher: the hub is about to be killed.
func (h *hub) forget(t *testing.T) {
	t.Helper()
	h.watcher.mu.Lock()
	defer h.watcher.mu.Unlock()
	if h.watcher.err != nil {
		t.Errorf("%s: %v", h.Node, h.watcher.err)
	}
	h.watcher.over = true
}

// seen waits until the watchers of these hubs have seen all writes.
func (s *site) seen(t *testing.T, which ...int) {
	t.Helper()
	for _, i := range which {
		w := s.hubs[i].watcher
		await(t, w.node, func() error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.err != nil {
				t.Fatalf("%s: %v", w.node, w.err)
			}
			if w.seen < s.seq {
				return fmt.Errorf("it has seen write %d of %d", w.seen, s.seq)
			}
			return nil
		})
	}
}

func cut(t *testing.T, h *hub, how bed.Mode) {
	t.Helper()
	if err := h.link.Cut(how); err != nil {
		t.Fatal(err)
	}
}

func heal(t *testing.T, h *hub) {
	t.Helper()
	if err := h.link.Heal(); err != nil {
		t.Fatal(err)
	}
}
