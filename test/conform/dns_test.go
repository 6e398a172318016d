package conform

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/test/bed"
)

// answered is what a name server says, in an order and without what it may
// choose: the serial of the zone and the weights of SRV.
func answered(m *dns.Msg) string {
	lines := []string{dns.RcodeToString[m.Rcode]}
	ns := m.Ns
	if len(m.Answer) > 0 {
		ns = nil // why there is no more of it may be said or not
	}
	for name, section := range map[string][]dns.RR{"answer": m.Answer, "ns": ns, "extra": m.Extra} {
		for _, rr := range section {
			switch rr := rr.(type) {
			case *dns.SOA:
				rr.Serial = 0
			case *dns.SRV:
				rr.Weight = 0
			case *dns.OPT:
				continue
			}
			if rr.Header().Rrtype != dns.TypeTXT {
				rr.Header().Ttl = 5
			}
			lines = append(lines, name+" "+strings.Join(strings.Fields(rr.String()), " "))
		}
	}
	slices.Sort(lines[1:])
	return strings.Join(slices.Compact(lines), "\n")
}

// zone is what DNS is asked about, in a namespace of its own.
func (w *world) zone(t *testing.T, namespace string) {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(second(w.admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})))
	t.Cleanup(func() {
		if err := w.admin.CoreV1().Namespaces().Delete(context.WithoutCancel(ctx), namespace, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	must(w.Cloud.Apply(ctx, strings.ReplaceAll(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: @}
spec: {ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: one, namespace: @}
spec: {ports: [{port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: @}
spec: {clusterIP: None, ports: [{name: sql, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: @}
spec: {clusterIP: None, ports: [{name: sql, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: bare, namespace: @}
spec: {clusterIP: None}
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: @}
spec: {type: ExternalName, externalName: www.example.com}
---
apiVersion: v1
kind: Service
metadata: {name: inside, namespace: @}
spec: {type: ExternalName, externalName: db.@.svc.cluster.local}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-v4, namespace: @, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 5432, protocol: TCP}]
endpoints:
- {addresses: [10.201.0.1], hostname: db-0, conditions: {ready: true}}
- {addresses: [10.201.0.2], conditions: {ready: true}}
- {addresses: [10.201.0.3], hostname: db-2, conditions: {ready: false}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-v6, namespace: @, labels: {kubernetes.io/service-name: db}}
addressType: IPv6
ports: [{name: sql, port: 5432, protocol: TCP}]
endpoints:
- {addresses: ["fd00:201::1"], hostname: db-0, conditions: {ready: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: bare-v4, namespace: @, labels: {kubernetes.io/service-name: bare}}
addressType: IPv4
ports: []
endpoints:
- {addresses: [10.201.0.11], hostname: bare-0, conditions: {ready: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-v4, namespace: @, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: [10.201.0.9], conditions: {ready: true}}
`, "@", namespace)))
}

// upstream is a name server for all names that are not the cluster's.
type upstream struct {
	address string
	silent  atomic.Bool

	mu    sync.Mutex
	asked map[string]int
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{address: freeDNS(t), asked: map[string]int{}}
	for _, network := range []string{"udp", "tcp"} {
		started := make(chan struct{})
		server := &dns.Server{Addr: u.address, Net: network, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(u.answer)}
		done := make(chan error, 1)
		go func() { done <- server.ListenAndServe() }() // ends with the test
		select {
		case <-started:
		case err := <-done:
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = server.Shutdown()
			<-done
		})
	}
	return u
}

func (u *upstream) answer(w dns.ResponseWriter, m *dns.Msg) {
	q := m.Question[0]
	u.mu.Lock()
	u.asked[strings.ToLower(q.Name)]++
	u.mu.Unlock()
	if u.silent.Load() {
		return
	}
	out := new(dns.Msg).SetReply(m)
	known := strings.EqualFold(q.Name, "www.example.com.")
	if known && q.Qtype == dns.TypeA {
		out.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(192, 0, 2, 80)}}
	} else {
		if !known {
			out.Rcode = dns.RcodeNameError
		}
		out.Ns = []dns.RR{&dns.SOA{
			Hdr: dns.RR_Header{Name: "example.com.", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 300},
			Ns:  "ns.example.com.", Mbox: "admin.example.com.", Minttl: 300,
		}}
	}
	_ = w.WriteMsg(out)
}

func (u *upstream) count(name string) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.asked[name]
}

// freeDNS is an address of loopback that is free for UDP and TCP.
func freeDNS(t *testing.T) string {
	t.Helper()
	var out string
	mustAwait(t, func(ctx context.Context) error {
		ports, err := playground.FreePorts(ctx, "127.0.0.1", 1)
		if err != nil {
			return err
		}
		out = net.JoinHostPort("127.0.0.1", strconv.Itoa(ports[0]))
		p, err := net.ListenPacket("udp", out)
		if err != nil {
			return err
		}
		return p.Close()
	})
	return out
}

// dnsHub starts a hub that answers DNS.
func (w *world) dnsHub(t *testing.T, node, upstream string) (hub *bed.Hub, link *bed.Link, address string) {
	t.Helper()
	address = freeDNS(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	hub, link = w.hub(t, node, "--dns-address=127.0.0.1", "--dns-port="+port, "--dns-upstream="+upstream)
	return hub, link, address
}

func ask(ctx context.Context, address, name string, qtype uint16) (*dns.Msg, error) {
	m := new(dns.Msg).SetQuestion(name, qtype)
	m.SetEdns0(1232, false)
	client := dns.Client{Timeout: 5 * time.Second}
	out, _, err := client.ExchangeContext(ctx, m, address)
	return out, err
}

// TestDNSAnswersAsCoreDNS asks CoreDNS and the hub the same.
func TestDNSAnswersAsCoreDNS(t *testing.T) {
	t.Parallel()
	const namespace = "conform-dns"
	busy.zone(t, namespace)
	up := newUpstream(t)
	_, _, hub := busy.dnsHub(t, "edge-dns", up.address)

	bin, err := playground.EnsureCoreDNS(t.Context(), playground.Progress{})
	if err != nil {
		t.Fatal(err)
	}
	dir, core := t.TempDir(), freeDNS(t)
	_, port, err := net.SplitHostPort(core)
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := busy.Cloud.WriteKubeconfig(kubeconfig, "dns", "system:masters"); err != nil {
		t.Fatal(err)
	}
	corefile := fmt.Sprintf(`.:%s {
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        kubeconfig %s
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
    }
    forward . %s
}
`, port, kubeconfig, up.address)
	if err := os.WriteFile(filepath.Join(dir, "Corefile"), []byte(corefile), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, bin.Path("coredns"), "-conf", filepath.Join(dir, "Corefile"))
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("coredns: %s", said.String())
		}
	}()
	ip := func(name string) string {
		s, err := busy.admin.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		reverse, err := dns.ReverseAddr(s.Spec.ClusterIP)
		if err != nil {
			t.Fatal(err)
		}
		return reverse
	}
	names := []string{
		"cluster.local.", "svc.cluster.local.", "dns-version.cluster.local.", "nonsense.cluster.local.",
		"kubernetes.default.svc.cluster.local.", "@.svc.cluster.local.", "web.@.svc.cluster.local.", "WEB.@.SVC.cluster.local.", "one.@.svc.cluster.local.",
		"_http._tcp.web.@.svc.cluster.local.", "_dns._udp.web.@.svc.cluster.local.", "_http._udp.web.@.svc.cluster.local.", "_none._tcp.web.@.svc.cluster.local.",
		"db.@.svc.cluster.local.", "_sql._tcp.db.@.svc.cluster.local.", "db-0.db.@.svc.cluster.local.", "db-2.db.@.svc.cluster.local.", "10-201-0-2.db.@.svc.cluster.local.",
		"fd00-201--1.db.@.svc.cluster.local.", "10-201-0-9.web.@.svc.cluster.local.", "empty.@.svc.cluster.local.", "none.@.svc.cluster.local.", "a.b.c.web.@.svc.cluster.local.",
		"web.nowhere.svc.cluster.local.", "web.@.svc.cluster.local.@.svc.cluster.local.", "www.example.com.@.svc.cluster.local.",
		"10-1-2-3.@.pod.cluster.local.", "fd00--1.@.pod.cluster.local.", "web.@.pod.cluster.local.", "@.pod.cluster.local.", "pod.cluster.local.",
		"outside.@.svc.cluster.local.", "inside.@.svc.cluster.local.", "x.outside.@.svc.cluster.local.", "_http._tcp.outside.@.svc.cluster.local.",
		"bare.@.svc.cluster.local.", "bare-0.bare.@.svc.cluster.local.", "_http._tcp.bare.@.svc.cluster.local.", "11.0.201.10.in-addr.arpa.",
		ip("web"), ip("one"), "1.0.201.10.in-addr.arpa.", "2.0.201.10.in-addr.arpa.", "3.0.201.10.in-addr.arpa.",
		"www.example.com.", "none.example.com.",
	}
	types := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypePTR, dns.TypeTXT, dns.TypeCNAME, dns.TypeSOA, dns.TypeHTTPS, dns.TypeMX}
	for _, server := range []string{core, hub} { // both have to hear of the objects
		mustAwait(t, func(ctx context.Context) error {
			for _, name := range []string{"one.@.svc.cluster.local.", "inside.@.svc.cluster.local.", "10-201-0-9.web.@.svc.cluster.local.", "10-201-0-2.db.@.svc.cluster.local.", "bare.@.svc.cluster.local."} {
				out, err := ask(ctx, server, strings.ReplaceAll(name, "@", namespace), dns.TypeA)
				if err != nil {
					return err
				}
				if len(out.Answer) == 0 {
					return fmt.Errorf("%s is not known", name)
				}
			}
			for _, name := range []string{"web", "one"} { // a hub that was there before knows older ones
				out, err := ask(ctx, server, ip(name), dns.TypePTR)
				if err != nil {
					return err
				}
				if len(out.Answer) == 0 {
					return fmt.Errorf("the address of %s is not known", name)
				}
			}
			return nil
		})
	}
	compared := 0
	for _, name := range names {
		name = strings.ReplaceAll(name, "@", namespace)
		for _, qtype := range types {
			if differs(name, qtype) {
				continue
			}
			want, err := ask(ctx, core, name, qtype)
			if err != nil {
				t.Fatal(err)
			}
			got, err := ask(ctx, hub, name, qtype)
			if err != nil {
				t.Fatal(err)
			}
			if w, g := answered(want), answered(got); w != g {
				t.Errorf("%s %s: CoreDNS says\n%s\nthe hub says\n%s", name, dns.TypeToString[qtype], w, g)
			}
			compared++
			if got.Authoritative != want.Authoritative {
				t.Errorf("%s %s: authoritative %v, CoreDNS %v", name, dns.TypeToString[qtype], got.Authoritative, want.Authoritative)
			}
		}
	}
	t.Logf("%d answers are those of CoreDNS", compared)
}

// differs tells where the two do, on purpose: CoreDNS has records there that no
// client asks for, or says that a name does not exist that has names below it
// or records of other types.
func differs(name string, qtype uint16) bool {
	switch {
	case strings.HasSuffix(name, ".arpa."): // it asks the other server for all but PTR
		return qtype != dns.TypePTR
	case strings.HasPrefix(name, "dns-version."):
		return qtype != dns.TypeTXT
	case strings.HasPrefix(name, "outside."), strings.HasPrefix(name, "inside."): // an alias is one for every type
		return qtype != dns.TypeA && qtype != dns.TypeAAAA && qtype != dns.TypeCNAME
	}
	switch qtype {
	case dns.TypeSOA:
		return name != "cluster.local." // elsewhere it has none, whether there is such a name or not
	case dns.TypeSRV:
		return strings.Contains(name, ".pod.") // of port 0
	case dns.TypeTXT:
		return dns.CountLabel(name) <= 4 // zones and namespaces
	}
	return false
}

// asker asks for names of the cluster without end, as a pod's resolver does.
type asker struct {
	address string
	names   map[string]string // what each leads to

	asked, failed, lost, wrong atomic.Int64

	mu    sync.Mutex
	took  []time.Duration
	first string // failure
}

func (a *asker) run(ctx context.Context) {
	for ctx.Err() == nil {
		for name, want := range a.names {
			began := time.Now()
			out, err := ask(ctx, a.address, name, dns.TypeA)
			switch took := time.Since(began); {
			case ctx.Err() != nil:
				return
			case err != nil:
				a.lost.Add(1) // the hub is not there
				select {
				case <-ctx.Done():
				case <-time.After(5 * time.Millisecond):
				}
				continue
			case out.Rcode == dns.RcodeServerFailure:
				a.failed.Add(1)
			default:
				got := dns.RcodeToString[out.Rcode]
				if len(out.Answer) == 1 {
					if rr, ok := out.Answer[0].(*dns.A); ok {
						got = rr.A.String()
					}
				}
				if got != want {
					a.wrong.Add(1)
					a.mu.Lock()
					a.first = fmt.Sprintf("%s is %s, want %s", name, got, want)
					a.mu.Unlock()
				}
				a.mu.Lock()
				a.took = append(a.took, took)
				a.mu.Unlock()
			}
			a.asked.Add(1)
		}
	}
}

// more waits until so many more questions are answered.
func (a *asker) more(t *testing.T, n int64) {
	t.Helper()
	until := a.asked.Load() + n
	mustAwait(t, func(context.Context) error {
		if now := a.asked.Load(); now < until {
			return fmt.Errorf("%d of %d", now, until)
		}
		return nil
	})
}

// TestDNSNeverFailsForTheCluster asks through all that may happen to a node.
func TestDNSNeverFailsForTheCluster(t *testing.T) {
	t.Parallel()
	const namespace = "conform-dns-load"
	busy.zone(t, namespace)
	up := newUpstream(t)
	hub, link, address := busy.dnsHub(t, "edge-dns-load", up.address)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	web, err := busy.admin.CoreV1().Services(namespace).Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	zone := namespace + ".svc.cluster.local."
	a := &asker{address: address, names: map[string]string{
		"web." + zone: web.Spec.ClusterIP, "db-0.db." + zone: "10.201.0.1", "none." + zone: "NXDOMAIN",
		"web." + zone + zone: "NXDOMAIN", "www.example.com." + zone: "NXDOMAIN",
	}}
	mustAwait(t, func(ctx context.Context) error {
		for name, want := range a.names {
			out, err := ask(ctx, address, name, dns.TypeA)
			if err != nil {
				return err
			}
			if want != "NXDOMAIN" && len(out.Answer) != 1 {
				return fmt.Errorf("%s is not known yet", name)
			}
		}
		return nil
	})
	outside := func(want string) {
		t.Helper()
		mustAwait(t, func(ctx context.Context) error {
			out, err := ask(ctx, address, "www.example.com.", dns.TypeA)
			if err == nil && !strings.Contains(out.String(), want) {
				err = errors.New(out.String())
			}
			return err
		})
	}
	outside("192.0.2.80")
	var asking sync.WaitGroup
	for range 4 {
		asking.Go(func() { a.run(ctx) })
	}
	defer asking.Wait()
	defer cancel()
	a.more(t, 500)

	// A storm for names that are not there.
	for range 500 {
		for _, name := range []string{"none.example.com.", "none." + zone} {
			if _, err := ask(ctx, address, name, dns.TypeA); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := up.count("none.example.com."); n != 1 {
		t.Errorf("a storm asks the other server %d times", n)
	}
	// The link is cut, and then the other server dies.
	for _, step := range []func() error{
		func() error { return link.Cut(bed.Blackhole) },
		func() error { up.silent.Store(true); return nil },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
		a.more(t, 500)
		outside("192.0.2.80") // old, if need be
	}
	if lost := a.lost.Load(); lost != 0 {
		t.Errorf("%d questions have no answer though the hub was there all the time", lost)
	}
	// A power cut, and a start alone.
	hub.Kill()
	mustAwait(t, func(context.Context) error {
		if a.lost.Load() == 0 {
			return errors.New("nobody has noticed")
		}
		return nil
	})
	if err := hub.Start(ctx); err != nil {
		t.Fatal(err)
	}
	a.more(t, 1000)
	// All is well again, and news come.
	up.silent.Store(false)
	if err := link.Heal(); err != nil {
		t.Fatal(err)
	}
	moved := "10.201.0.77"
	slice, err := busy.admin.DiscoveryV1().EndpointSlices(namespace).Get(ctx, "db-v4", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{moved}})
	if _, err := busy.admin.DiscoveryV1().EndpointSlices(namespace).Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	mustAwait(t, func(ctx context.Context) error {
		out, err := ask(ctx, address, "db."+zone, dns.TypeA)
		if err == nil && !strings.Contains(out.String(), moved) {
			err = errors.New(out.String())
		}
		return err
	})
	outside("192.0.2.80")
	a.more(t, 500)
	cancel()
	asking.Wait()
	slices.Sort(a.took)
	t.Logf("%d questions, p50 %s, p99 %s, beside all other tests", a.asked.Load(), a.took[len(a.took)/2], a.took[len(a.took)*99/100])
	if n := a.failed.Load(); n != 0 {
		t.Errorf("%d of %d questions for the cluster's names failed", n, a.asked.Load())
	}
	if n := a.wrong.Load(); n != 0 {
		t.Errorf("%d of %d answers are wrong: %s", n, a.asked.Load(), a.first)
	}
}
