package nameserver

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is an API with watches of Services and EndpointSlices.
type cluster struct {
	mu      sync.Mutex
	version uint64
	objects map[string]map[key]object // by path
	events  map[string][]event
	floor   uint64 // older versions are expired
	changed chan struct{}
	down    bool
	ended   chan struct{} // closed to end all watches
	agents  map[string]bool
}

type object interface {
	Marshal() ([]byte, error)
	metav1.Object
}

type event struct {
	version uint64
	typ     string
	object  object
}

func newCluster() *cluster {
	return &cluster{
		version: 1, objects: map[string]map[key]object{services.path: {}, endpointSlices.path: {}}, events: map[string][]event{},
		changed: make(chan struct{}), ended: make(chan struct{}), agents: map[string]bool{},
	}
}

func pathOf(o object) string {
	if _, ok := o.(*corev1.Service); ok {
		return services.path
	}
	return endpointSlices.path
}

// set adds or changes objects.
func (c *cluster) set(all ...object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range all {
		c.version++
		o.SetResourceVersion(strconv.FormatUint(c.version, 10))
		path, k := pathOf(o), key{o.GetNamespace(), o.GetName()}
		typ := "ADDED"
		if c.objects[path][k] != nil {
			typ = "MODIFIED"
		}
		c.objects[path][k] = o
		c.tellLocked(path, event{c.version, typ, o})
	}
}

func (c *cluster) remove(o object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version++
	path := pathOf(o)
	delete(c.objects[path], key{o.GetNamespace(), o.GetName()})
	c.tellLocked(path, event{c.version, "DELETED", o})
}

func (c *cluster) tellLocked(path string, e event) {
	c.events[path] = append(c.events[path], e)
	close(c.changed)
	c.changed = make(chan struct{})
}

// interrupt ends all watches; forget makes their versions too old.
func (c *cluster) interrupt(forget bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if forget {
		c.version++
		c.floor = c.version
	}
	close(c.ended)
	c.ended = make(chan struct{})
}

func (c *cluster) away(down bool) {
	c.mu.Lock()
	c.down = down
	c.mu.Unlock()
	c.interrupt(false)
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	path, query := r.URL.Path, r.URL.Query()
	kind, apiVersion := "Service", "v1"
	if path == endpointSlices.path {
		kind, apiVersion = "EndpointSlice", "discovery.k8s.io/v1"
	}
	c.agents[r.UserAgent()] = true
	down, ended, at := c.down, c.ended, c.version
	var first []object
	if query.Get("sendInitialEvents") == "true" {
		for _, o := range c.objects[path] {
			first = append(first, o)
		}
	} else {
		at, _ = strconv.ParseUint(query.Get("resourceVersion"), 10, 64)
	}
	old := at < c.floor
	c.mu.Unlock()
	if down {
		http.Error(w, "the cloud is away", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
	w.WriteHeader(http.StatusOK)
	send := func(frame []byte) {
		_, _ = w.Write(frame)
		_ = http.NewResponseController(w).Flush()
	}
	if old {
		send(wire.AppendStatusEvent(nil, wire.Protobuf, &metav1.Status{Code: http.StatusGone}))
		return
	}
	object := func(typ string, o object) {
		data, err := o.Marshal()
		if err != nil {
			panic(err)
		}
		send(wire.AppendEvent(nil, wire.Protobuf, typ, apiVersion, kind, data))
	}
	for _, o := range first {
		object("ADDED", o)
	}
	if query.Get("sendInitialEvents") == "true" {
		send(wire.AppendBookmark(nil, wire.Protobuf, apiVersion, kind, at, true))
	}
	for {
		c.mu.Lock()
		changed, events := c.changed, c.events[path]
		c.mu.Unlock()
		for _, e := range events {
			if e.version > at {
				at = e.version
				object(e.typ, e.object)
			}
		}
		send(wire.AppendBookmark(nil, wire.Protobuf, apiVersion, kind, at, false))
		select {
		case <-r.Context().Done():
			return
		case <-ended:
			return
		case <-changed:
		}
	}
}

// toServer sends requests to a test's server, whatever their host.
type toServer struct {
	http.RoundTripper
	host string
}

func (t toServer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Host = t.host
	return t.RoundTripper.RoundTrip(r)
}

// lab is a name server, its API and its upstreams.
type lab struct {
	*Server
	cluster *cluster
	at      netip.AddrPort
	reg     *prometheus.Registry
}

// start runs a name server until the test ends.
func start(tb testing.TB, c *cluster, change func(*Config)) *lab {
	tb.Helper()
	api := httptest.NewServer(c)
	transport := &http.Transport{}
	reg := prometheus.NewRegistry()
	cfg := Config{
		Domain: "cluster.local", Addresses: []netip.AddrPort{freePort(tb)},
		ResolvConf: "testdata/resolv-none.conf", API: toServer{transport, api.Listener.Addr().String()},
		Admit: func(netip.Addr) bool { return true }, Node: func(string) []netip.Addr { return nil },
		Log: slog.New(slog.DiscardHandler), Registerer: reg,
	}
	if change != nil {
		change(&cfg)
	}
	s := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
		transport.CloseIdleConnections()
		api.CloseClientConnections()
		api.Close()
	})
	await(tb, "listening", func() bool { return s.listening.Load() == int32(2*len(cfg.Addresses)) })
	return &lab{Server: s, cluster: c, at: cfg.Addresses[0], reg: reg}
}

// freePort is a port of 127.0.0.1 that is free for UDP and TCP.
func freePort(tb testing.TB) netip.AddrPort {
	tb.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		p, err := net.ListenPacket("udp", l.Addr().String())
		_ = l.Close()
		if err == nil {
			_ = p.Close()
			return netip.MustParseAddrPort(l.Addr().String())
		}
	}
	tb.Fatal("no free port")
	return netip.AddrPort{}
}

// await waits until the condition holds.
func await(tb testing.TB, what string, holds func() bool) {
	tb.Helper()
	limit := time.After(30 * time.Second)
	for !holds() {
		select {
		case <-limit:
			tb.Fatalf("never: %s", what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// ask asks by UDP, or by another way if the question is of one.
func (l *lab) ask(tb testing.TB, name string, qtype uint16, change ...func(*dns.Msg, *dns.Client)) *dns.Msg {
	tb.Helper()
	m, client := new(dns.Msg).SetQuestion(name, qtype), &dns.Client{Timeout: 10 * time.Second}
	for _, fn := range change {
		fn(m, client)
	}
	out, _, err := client.Exchange(m, l.at.String())
	if err != nil {
		tb.Fatalf("%s %s: %v", name, dns.TypeToString[qtype], err)
	}
	return out
}

func byTCP(_ *dns.Msg, c *dns.Client) { c.Net = "tcp" }

// other is another name server.
type other struct {
	at     netip.AddrPort
	server [2]*dns.Server

	mu     sync.Mutex
	asked  map[string]int
	answer func(w dns.ResponseWriter, m *dns.Msg)
}

// newOther starts a server whose answers a test decides.
func newOther(tb testing.TB, answer func(w dns.ResponseWriter, m *dns.Msg)) *other {
	tb.Helper()
	o := &other{at: freePort(tb), asked: map[string]int{}, answer: answer}
	for i, network := range []string{"udp", "tcp"} {
		started := make(chan struct{})
		o.server[i] = &dns.Server{
			Addr: o.at.String(), Net: network, NotifyStartedFunc: func() { close(started) },
			Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
				o.mu.Lock()
				o.asked[m.Question[0].Name+" "+dns.TypeToString[m.Question[0].Qtype]]++
				answer := o.answer
				o.mu.Unlock()
				answer(w, m)
			}),
		}
		done := make(chan error, 1)
		go func() { done <- o.server[i].ListenAndServe() }()
		select {
		case <-started:
		case err := <-done:
			tb.Fatal(err)
		}
		tb.Cleanup(func() {
			_ = o.server[i].Shutdown()
			<-done
		})
	}
	return o
}

func (o *other) set(answer func(w dns.ResponseWriter, m *dns.Msg)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.answer = answer
}

func (o *other) count(question string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.asked[question]
}

// says answers with the records, or with a code if there are none.
func says(rcode int, records ...string) func(w dns.ResponseWriter, m *dns.Msg) {
	return func(w dns.ResponseWriter, m *dns.Msg) {
		out := new(dns.Msg).SetRcode(m, rcode)
		for _, text := range records {
			rr, err := dns.NewRR(text)
			if err != nil {
				panic(err)
			}
			if _, ok := rr.(*dns.SOA); ok {
				out.Ns = append(out.Ns, rr)
			} else {
				out.Answer = append(out.Answer, rr)
			}
		}
		_ = w.WriteMsg(out)
	}
}

func silent(dns.ResponseWriter, *dns.Msg) {}

// Objects of the tests.

func serviceOf(namespace, name string, spec corev1.ServiceSpec) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: spec}
}

func servicePort(name string, protocol corev1.Protocol, number int32) corev1.ServicePort {
	return corev1.ServicePort{Name: name, Protocol: protocol, Port: number}
}

func sliceOf(namespace, name, service string, family discoveryv1.AddressType, ports []discoveryv1.EndpointPort, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: family, Ports: ports, Endpoints: endpoints,
	}
}

func endpointPort(name string, protocol corev1.Protocol, number int32) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: &number}
}

func endpointAt(address, host string, ready bool) discoveryv1.Endpoint {
	out := discoveryv1.Endpoint{Addresses: []string{address}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}
	if host != "" {
		out.Hostname = &host
	}
	return out
}

// shop is a cluster with one of each kind.
func shop() *cluster {
	c := newCluster()
	c.set(
		serviceOf("default", "web", corev1.ServiceSpec{
			ClusterIP: "10.96.0.20", ClusterIPs: []string{"10.96.0.20", "fd00:96::20"},
			Ports: []corev1.ServicePort{servicePort("http", corev1.ProtocolTCP, 80), servicePort("dns", corev1.ProtocolUDP, 53)},
		}),
		serviceOf("shop", "db", corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Ports: []corev1.ServicePort{servicePort("sql", corev1.ProtocolTCP, 5432)}}),
		serviceOf("shop", "empty", corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}),
		serviceOf("shop", "bare", corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}),
		serviceOf("shop", "mail", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "mail.example.com"}),
		serviceOf("shop", "again", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "web.default.svc.cluster.local"}),
		serviceOf("shop", "round", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "round.shop.svc.cluster.local"}),
		sliceOf("shop", "bare-1", "bare", discoveryv1.AddressTypeIPv4, nil, endpointAt("10.244.1.11", "bare-0", true)),
		sliceOf("default", "web-1", "web", discoveryv1.AddressTypeIPv4,
			[]discoveryv1.EndpointPort{endpointPort("http", corev1.ProtocolTCP, 8080)}, endpointAt("10.244.1.7", "", true)),
		sliceOf("shop", "db-1", "db", discoveryv1.AddressTypeIPv4,
			[]discoveryv1.EndpointPort{endpointPort("sql", corev1.ProtocolTCP, 5432)},
			endpointAt("10.244.1.8", "db-0", true), endpointAt("10.244.1.9", "", true), endpointAt("10.244.1.10", "db-2", false)),
		sliceOf("shop", "db-2", "db", discoveryv1.AddressTypeIPv6,
			[]discoveryv1.EndpointPort{endpointPort("sql", corev1.ProtocolTCP, 5432)}, endpointAt("fd00:244::8", "db-0", true)),
	)
	return c
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newRegistry() *prometheus.Registry { return prometheus.NewRegistry() }
