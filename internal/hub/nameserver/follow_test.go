package nameserver

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// addressOf is what a name leads to, or the code.
func (l *lab) addressOf(tb testing.TB, name string) string {
	tb.Helper()
	m := l.ask(tb, name+".svc.cluster.local.", dns.TypeA)
	if len(m.Answer) == 1 {
		if a, ok := m.Answer[0].(*dns.A); ok {
			return a.A.String()
		}
	}
	return dns.RcodeToString[m.Rcode]
}

func clusterIP(namespace, name, ip string) *corev1.Service {
	return serviceOf(namespace, name, corev1.ServiceSpec{
		ClusterIP: ip, ClusterIPs: []string{ip}, Ports: []corev1.ServicePort{servicePort("http", corev1.ProtocolTCP, 80)},
	})
}

func TestNamesFollowTheAPI(t *testing.T) {
	t.Parallel()
	c := shop()
	l := start(t, c, nil)
	becomes := func(name, want string) {
		t.Helper()
		await(t, name+" is "+want, func() bool { return l.addressOf(t, name) == want })
	}
	reverse := func(name string) string {
		m := l.ask(t, name+".in-addr.arpa.", dns.TypePTR)
		if len(m.Answer) == 1 {
			if p, ok := m.Answer[0].(*dns.PTR); ok {
				return p.Ptr
			}
		}
		return dns.RcodeToString[m.Rcode]
	}
	becomes("new.default", "NXDOMAIN")
	c.set(clusterIP("default", "new", "10.96.0.21"))
	becomes("new.default", "10.96.0.21")
	c.set(clusterIP("default", "new", "10.96.0.22"))
	becomes("new.default", "10.96.0.22")
	if got := reverse("21.0.96.10"); got != "SERVFAIL" {
		t.Errorf("the address that the Service had is still its: %s", got)
	}
	// The endpoint of a headless Service moves, leaves and comes back.
	ports := []discoveryv1.EndpointPort{endpointPort("sql", corev1.ProtocolTCP, 5432)}
	one := func(e ...discoveryv1.Endpoint) {
		c.set(sliceOf("shop", "db-1", "db", discoveryv1.AddressTypeIPv4, ports, e...))
	}
	one(endpointAt("10.244.1.50", "db-0", true))
	becomes("db.shop", "10.244.1.50")
	one(endpointAt("10.244.1.50", "db-0", false))
	becomes("db.shop", "NOERROR") // it has another of IPv6
	one(endpointAt("10.244.1.51", "db-0", true))
	becomes("db-0.db.shop", "10.244.1.51")
	// A slice changes its Service, and goes.
	c.set(serviceOf("shop", "other", corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}))
	c.set(sliceOf("shop", "db-1", "other", discoveryv1.AddressTypeIPv4, ports, endpointAt("10.244.1.51", "db-0", true)))
	becomes("other.shop", "10.244.1.51")
	becomes("db.shop", "NOERROR")
	c.remove(sliceOf("shop", "db-1", "other", discoveryv1.AddressTypeIPv4, ports))
	becomes("other.shop", "NXDOMAIN")
	c.remove(clusterIP("default", "new", "10.96.0.22"))
	becomes("new.default", "NXDOMAIN")

	// While the API is away everything stays; then it goes on where it was.
	c.away(true)
	if got := l.addressOf(t, "web.default"); got != "10.96.0.20" {
		t.Errorf("with the API away: %s", got)
	}
	c.set(clusterIP("default", "later", "10.96.0.23"))
	c.away(false)
	becomes("later.default", "10.96.0.23")

	// When the history is lost, what went meanwhile goes here too.
	c.away(true)
	c.remove(clusterIP("default", "later", "10.96.0.23"))
	c.remove(sliceOf("default", "web-1", "web", discoveryv1.AddressTypeIPv4, nil))
	c.set(clusterIP("default", "last", "10.96.0.24"))
	c.interrupt(true)
	c.away(false)
	becomes("last.default", "10.96.0.24")
	becomes("later.default", "NXDOMAIN")
	becomes("10-244-1-7.web.default", "NXDOMAIN")
	if got := l.addressOf(t, "web.default"); got != "10.96.0.20" {
		t.Errorf("after a new list: %s", got)
	}
	// What is left is what is there.
	c.mu.Lock()
	wantServices, wantSlices := len(c.objects[services.path]), len(c.objects[endpointSlices.path])
	c.mu.Unlock()
	await(t, "the index is what the API has", func() bool {
		s, e := l.index.size()
		return s == wantServices && e == wantSlices
	})
	l.index.mu.RLock()
	defer l.index.mu.RUnlock()
	if n := len(l.index.names); n != wantServices {
		t.Errorf("%d names for %d services", n, wantServices)
	}
}

// TestFirstWordIsWaitedFor asks a server that knows nothing yet.
func TestFirstWordIsWaitedFor(t *testing.T) {
	t.Parallel()
	c := shop()
	c.away(true)
	l := start(t, c, nil)
	if got := l.addressOf(t, "web.default"); got != "SERVFAIL" {
		t.Errorf("with nothing known: %s", got)
	}
	c.away(false)
	if got := l.addressOf(t, "web.default"); got != "10.96.0.20" {
		t.Errorf("once the API is there: %s", got)
	}
}

func TestIndexIsSmall(t *testing.T) {
	const n = 10_000
	x := newIndex()
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range n {
		ip := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}).String()
		s := clusterIP(fmt.Sprintf("namespace-%d", i%50), fmt.Sprintf("service-%d", i), ip)
		data, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := services.set(x, data, false); err != nil {
			t.Fatal(err)
		}
		var all []discoveryv1.Endpoint
		for e := range 10 {
			all = append(all, endpointAt(netip.AddrFrom4([4]byte{10, byte(e), byte(i >> 8), byte(i)}).String(), "", true))
		}
		data, err = sliceOf(s.Namespace, s.Name+"-abcde", s.Name, discoveryv1.AddressTypeIPv4,
			[]discoveryv1.EndpointPort{endpointPort("http", corev1.ProtocolTCP, 8080)}, all...).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := endpointSlices.set(x, data, false); err != nil {
			t.Fatal(err)
		}
	}
	used := float64(heap()-before) / (1 << 20)
	t.Logf("%d services and slices of 10 endpoints: %.1f MB", n, used)
	if used > 10 {
		t.Errorf("the index takes %.1f MB", used)
	}
	if s, e := x.size(); s != n || e != n {
		t.Errorf("it holds %d services and %d slices", s, e)
	}
}
