package nameserver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/vishvananda/netlink"
)

// TestWhatIsRefused sends what no resolver of a pod sends.
func TestWhatIsRefused(t *testing.T) {
	t.Parallel()
	l := start(t, shop(), nil)
	for what, tc := range map[string]struct {
		change func(*dns.Msg, *dns.Client)
		want   int
	}{
		"ANY":             {func(m *dns.Msg, _ *dns.Client) { m.Question[0].Qtype = dns.TypeANY }, dns.RcodeRefused},
		"a zone transfer": {func(m *dns.Msg, c *dns.Client) { m.Question[0].Qtype = dns.TypeAXFR; byTCP(m, c) }, dns.RcodeRefused},
		"another class":   {func(m *dns.Msg, _ *dns.Client) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		"NOTIFY":          {func(m *dns.Msg, _ *dns.Client) { m.Opcode = dns.OpcodeNotify }, dns.RcodeNotImplemented},
		"UPDATE":          {func(m *dns.Msg, _ *dns.Client) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		"two questions":   {func(m *dns.Msg, _ *dns.Client) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		"EDNS of later":   {func(m *dns.Msg, _ *dns.Client) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(9) }, dns.RcodeBadVers},
	} {
		got := l.ask(t, "web.default.svc.cluster.local.", dns.TypeA, tc.change)
		if got.Rcode != tc.want || len(got.Answer) != 0 {
			t.Errorf("%s: %s", what, shown(got))
		}
	}
	// Without recursion there is only what the server knows itself.
	still := func(m *dns.Msg, _ *dns.Client) { m.RecursionDesired = false }
	if got := l.ask(t, "web.default.svc.cluster.local.", dns.TypeA, still); len(got.Answer) != 1 {
		t.Error(shown(got))
	}
	if got := l.ask(t, "www.example.com.", dns.TypeA, still); got.Rcode != dns.RcodeRefused {
		t.Error(shown(got))
	}
}

// TestStrangersGetNothing asks as another host.
func TestStrangersGetNothing(t *testing.T) {
	t.Parallel()
	var admits atomic.Bool
	l := start(t, shop(), func(c *Config) { c.Admit = func(netip.Addr) bool { return admits.Load() } })
	m := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)
	for _, network := range []string{"udp", "tcp"} {
		client := dns.Client{Net: network, Timeout: 200 * time.Millisecond}
		if out, _, err := client.Exchange(m, l.at.String()); err == nil {
			t.Errorf("a stranger by %s is told %s", network, shown(out))
		}
	}
	if n := testutil.ToFloat64(l.metrics.refused.WithLabelValues("stranger")); n != 2 {
		t.Errorf("%v strangers are counted", n)
	}
	admits.Store(true)
	if got := l.addressOf(t, "web.default"); got != "10.96.0.20" {
		t.Error(got)
	}
}

func TestUplinks(t *testing.T) {
	t.Parallel()
	network := func(text string) *net.IPNet {
		_, out, err := net.ParseCIDR(text)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	got := uplinksOf([]netlink.Route{
		{LinkIndex: 2, Dst: network("0.0.0.0/0")},
		{LinkIndex: 3, Dst: network("10.244.1.0/24")},
		{LinkIndex: 4, Dst: nil},
		{LinkIndex: 5, Dst: network("fe80::/64")},
		{Dst: network("::/0"), MultiPath: []*netlink.NexthopInfo{{LinkIndex: 6}, {LinkIndex: 7}}},
	})
	for link, want := range map[int]bool{0: false, 2: true, 3: false, 4: true, 5: false, 6: true, 7: true} {
		if got[link] != want {
			t.Errorf("link %d is an uplink: %v", link, got[link])
		}
	}
	// The node's own addresses are no strangers, wherever the default route is.
	var n Neighbours
	held, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil || len(held) == 0 {
		t.Fatalf("no address: %v", err)
	}
	for _, a := range held {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); !ok || !n.Admit(ip) {
			t.Errorf("the node's own %s is a stranger", a.IP)
		}
	}
}

// TestOneSourceCannotTakeAll lets a source ask what nobody answers.
func TestOneSourceCannotTakeAll(t *testing.T) {
	t.Parallel()
	p := newPlaces(10, 4)
	one, two := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("10.244.1.3")
	var leave []func()
	for range 4 {
		f, ok := p.enter(one)
		if !ok {
			t.Fatal("there is place")
		}
		leave = append(leave, f)
	}
	if _, ok := p.enter(one); ok {
		t.Error("a source has more than its part")
	}
	f, ok := p.enter(two)
	if !ok {
		t.Error("another source has none")
	}
	for _, f := range append(leave, f) {
		f()
	}
	if p.all != 0 || len(p.each) != 0 {
		t.Errorf("%d places are taken, %v", p.all, p.each)
	}

	// The same on the wire: many questions wait for a silent server, and the
	// names of the cluster are answered meanwhile.
	o := newOther(t, silent)
	l := start(t, shop(), withServers(o))
	var waiting sync.WaitGroup
	var failed atomic.Int32
	for i := range maxWaiting {
		waiting.Go(func() {
			m := new(dns.Msg).SetQuestion(fmt.Sprintf("x%d.example.com.", i), dns.TypeA)
			client := dns.Client{Timeout: 2 * answerBudget}
			for range 3 { // as resolvers do: a packet may be lost
				if out, _, err := client.Exchange(m, l.at.String()); err == nil && out.Rcode == dns.RcodeServerFailure {
					return
				}
			}
			failed.Add(1)
		})
	}
	await(t, "some are refused", func() bool { return testutil.ToFloat64(l.metrics.refused.WithLabelValues("waiting")) > 0 })
	if got := l.addressOf(t, "web.default"); got != "10.96.0.20" {
		t.Error(got)
	}
	waiting.Wait()
	if n := failed.Load(); n != 0 {
		t.Errorf("%d questions have no answer", n)
	}
}

// TestConnectionsAreBounded holds connections open.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	l := start(t, shop(), nil)
	l.conns.mu.Lock()
	l.conns.total = 4 // a loopback source has half
	l.conns.mu.Unlock()
	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	for range 2 {
		c, err := net.Dial("tcp", l.at.String())
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	await(t, "both are accepted", func() bool {
		l.conns.mu.Lock()
		defer l.conns.mu.Unlock()
		return l.conns.all == 2
	})
	m := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)
	client := dns.Client{Net: "tcp", Timeout: time.Second}
	if _, _, err := client.Exchange(m, l.at.String()); err == nil {
		t.Error("there are more connections than may be")
	}
	_ = open[0].Close()
	await(t, "there is place again", func() bool {
		_, _, err := client.Exchange(m, l.at.String())
		return err == nil
	})
}

// TestPortThatIsTaken goes on without it and takes it when it is free.
func TestPortThatIsTaken(t *testing.T) {
	t.Parallel()
	at := freePort(t)
	taken, err := net.ListenPacket("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	free := freePort(t)
	s := New(Config{Domain: "cluster.local", Log: discard(), Registerer: newRegistry(), Admit: func(netip.Addr) bool { return true }})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := s.serve(ctx, "udp", at); err == nil {
		t.Error("a port that is taken is no error")
	}
	_ = taken.Close()
	done := make(chan error, 2)
	for _, a := range []netip.AddrPort{at, free} {
		go func() { done <- s.listen(ctx, "udp", a) }()
	}
	await(t, "both are had", func() bool { return s.listening.Load() == 2 })
	cancel()
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestAPanicCostsOneQuestion fails on a question, and answers the next.
func TestAPanicCostsOneQuestion(t *testing.T) {
	t.Parallel()
	l := start(t, shop(), func(c *Config) {
		c.Node = func(name string) []netip.Addr {
			if name == "bad" {
				panic("a fault")
			}
			return nil
		}
	})
	if got := l.ask(t, "bad.", dns.TypeA); got.Rcode != dns.RcodeServerFailure {
		t.Error(shown(got))
	}
	if got := l.addressOf(t, "web.default"); got != "10.96.0.20" {
		t.Error(got)
	}
	if n := testutil.ToFloat64(l.metrics.panics); n != 1 {
		t.Errorf("%v panics are counted", n)
	}
}

// FuzzMessage gives any bytes to the server, which has an answer or none, of
// the size that it may have.
func FuzzMessage(f *testing.F) {
	for _, q := range []string{"web.default.svc.cluster.local. A", "_sql._tcp.db.shop.svc.cluster.local. SRV", "8.1.244.10.in-addr.arpa. PTR", "mail.shop.svc.cluster.local. A", `a\.b.svc.cluster.local. A`} {
		var name, qtype string
		if _, err := fmt.Sscan(q, &name, &qtype); err != nil {
			f.Fatal(err)
		}
		m := new(dns.Msg).SetQuestion(name, dns.StringToType[qtype])
		m.SetEdns0(1232, true)
		data, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, true)
		f.Add(data, false)
	}
	c := shop()
	s := New(Config{Domain: "cluster.local", Log: discard(), Registerer: newRegistry(), Admit: func(netip.Addr) bool { return true }, Node: func(string) []netip.Addr { return nil }})
	for _, r := range []resource{services, endpointSlices} {
		for _, o := range c.objects[r.path] {
			data, err := o.Marshal()
			if err != nil {
				f.Fatal(err)
			}
			if _, _, err := r.set(s.index, data, false); err != nil {
				f.Fatal(err)
			}
		}
	}
	close(s.synced)
	f.Fuzz(func(t *testing.T, data []byte, udp bool) {
		m := new(dns.Msg)
		if m.Unpack(data) != nil || len(m.Question) != 1 {
			return // the library lets none of these through
		}
		w := &recorder{udp: udp}
		s.answer(t.Context(), w, m)
		if w.out == nil {
			t.Fatal("no answer")
		}
		packed, err := w.out.Pack()
		if err != nil {
			return // a name of the question that cannot be written again
		}
		if most := 1232; udp && len(packed) > most {
			t.Errorf("%d bytes by UDP", len(packed))
		}
		if w.out.Id != m.Id || !w.out.Response || !slices.Equal(w.out.Question, m.Question) {
			t.Errorf("%v answers %v", w.out, m)
		}
	})
}

// recorder takes an answer.
type recorder struct {
	dns.ResponseWriter
	udp bool
	out *dns.Msg
}

func (r *recorder) RemoteAddr() net.Addr {
	if r.udp {
		return &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	}
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
}

func (r *recorder) WriteMsg(m *dns.Msg) error {
	r.out = m
	return nil
}

// BenchmarkNames asks by UDP for names of a cluster of 10 000 Services, and
// reports the slowest of a hundred.
func BenchmarkNames(b *testing.B) {
	c := newCluster()
	for i := range 10_000 {
		c.set(clusterIP("default", fmt.Sprintf("service-%d", i), netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}).String()))
	}
	l := start(b, c, nil)
	l.addressOf(b, "service-0.default")
	client := dns.Client{}
	conn, err := client.Dial(l.at.String())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	var times []time.Duration
	i := 0
	for b.Loop() {
		i++
		m := new(dns.Msg).SetQuestion(fmt.Sprintf("service-%d.default.svc.cluster.local.", i%10_000), dns.TypeA)
		_, took, err := client.ExchangeWithConn(m, conn)
		if err != nil {
			b.Fatal(err)
		}
		times = append(times, took)
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-us")
}
