package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// testPlan returns a plan of a cloud machine, two machines at a and one at
// b. Tests run beside playgrounds, so each has a prefix and addresses of its
// own.
func testPlan(prefix string, net int) Plan {
	cidr := func(format string, args ...any) netip.Prefix {
		return netip.MustParsePrefix(fmt.Sprintf("10.%d.", net) + fmt.Sprintf(format, args...))
	}
	machine := func(name string, site, i int) Host {
		return Host{
			Name:    name,
			Addr:    cidr("%d.%d/32", site, 10+i).Addr(),
			PodCIDR: cidr("%d.0/24", 100+10*site+i),
		}
	}
	return Plan{
		Prefix: prefix,
		WAN:    cidr("0.0/24"),
		Host:   cidr("0.1/32").Addr(),
		Sites: []Site{
			{Name: "sky", Subnet: cidr("1.0/24"), Machines: []Host{machine("cloud", 1, 0)}},
			{Name: "a", Subnet: cidr("2.0/24"), Machines: []Host{machine("a1", 2, 0), machine("a2", 2, 1)}},
			{Name: "b", Subnet: cidr("3.0/24"), Machines: []Host{machine("b1", 3, 0)}},
		},
		ServiceCIDR: cidr("200.0/24"),
		ServiceVia:  "cloud",
	}
}

// host is what the host has of links, namespaces, routes, filters and
// settings.
func hostState(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, args := range [][]string{
		{"ip", "-o", "link"},
		{"ip", "-o", "addr"},
		{"ip", "route", "show", "table", "all"},
		{"ip", "rule"},
		{"ip", "netns", "list"},
		{"nft", "list", "ruleset"},
		{"sysctl", "net.ipv4.ip_forward", "net.ipv4.conf.all.rp_filter"},
	} {
		out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		for line := range strings.Lines(string(out)) {
			// Other networks may come and go meanwhile.
			if strings.Contains(line, "yurt") || strings.Contains(line, "10.90.") || strings.Contains(line, "m-") {
				continue
			}
			b.WriteString(line)
		}
	}
	return b.String()
}

func mustUp(t *testing.T, p Plan) *Network {
	t.Helper()
	n, err := Up(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if err := Down(context.Background(), p.Prefix); err != nil {
			t.Error(err)
		}
	})
	return n
}

// place is a namespace and an address in it; the empty namespace is the
// host's.
type place struct {
	ns   string
	addr netip.Addr
}

func (n *Network) place(name string) place {
	if name == HostTarget {
		return place{"", n.plan.Host}
	}
	for _, s := range n.plan.Sites {
		for _, m := range s.Machines {
			if m.Name == name {
				return place{n.plan.MachineNamespace(name), m.Addr}
			}
		}
	}
	panic("no machine " + name)
}

// serve echoes TCP on port 80 of a place.
func serve(t *testing.T, p place) {
	t.Helper()
	var l net.Listener
	err := inside(p.ns, func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(p.addr, 8080).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
}

func dial(p place, to netip.Addr, patience time.Duration) (c net.Conn, err error) {
	err = inside(p.ns, func() error {
		d := net.Dialer{Timeout: patience}
		c, err = d.Dial("tcp4", netip.AddrPortFrom(to, 8080).String())
		return err
	})
	return c, err
}

// echo sends bytes over a connection and waits for them to come back.
func echo(c net.Conn, size int, patience time.Duration) (time.Duration, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	start := time.Now()
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, size))
		sent <- err
	}()
	if _, err := io.CopyN(io.Discard, c, int64(size)); err != nil {
		return 0, err
	}
	return time.Since(start), <-sent
}

const (
	reached     = "reached"
	unreachable = "unreachable"
	silent      = "silent"
)

func (n *Network) try(from, to string) string {
	c, err := dial(n.place(from), n.place(to).addr, 700*time.Millisecond)
	switch {
	case err == nil:
		_ = c.Close()
		return reached
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return unreachable
	case isTimeout(err):
		return silent
	}
	return err.Error()
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func (n *Network) expect(t *testing.T, want string, pairs ...string) {
	t.Helper()
	for _, pair := range pairs {
		from, to, _ := strings.Cut(pair, ">")
		if got := n.try(from, to); got != want {
			t.Errorf("%s: got %s, want %s", pair, got, want)
		}
	}
}

func serveAll(t *testing.T, n *Network) {
	t.Helper()
	for _, name := range []string{HostTarget, "cloud", "a1", "a2", "b1"} {
		serve(t, n.place(name))
	}
}

func TestUpConnectsEverybodyAndDownLeavesNothing(t *testing.T) {
	before := hostState(t)
	p := testPlan("tnup", 191)
	for range 2 {
		n, err := Up(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		t.Run("traffic", func(t *testing.T) {
			serveAll(t, n)
			n.expect(t, reached, "a1>a2", "a1>host", "a1>cloud", "a1>b1", "cloud>b1", "host>a1", "host>cloud", "host>b1")
		})
		if _, err := Up(t.Context(), p); !errors.Is(err, ErrExists) {
			t.Errorf("second Up: got %v, want %v", err, ErrExists)
		}
		if _, err := Attach(p); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := Down(t.Context(), p.Prefix); err != nil {
				t.Fatal(err)
			}
		}
	}
	if after := hostState(t); after != before {
		t.Errorf("host changed:\n%s\nbefore:\n%s", after, before)
	}
	if _, err := Attach(p); err == nil {
		t.Error("attached to a network that is down")
	}
}

func TestPodsAndServicesAreRouted(t *testing.T) {
	p := testPlan("tnpod", 192)
	n := mustUp(t, p)
	// An address of each pod network, and of the services, on its machine.
	pods := map[string]netip.Addr{}
	for _, s := range p.Sites {
		for _, m := range s.Machines {
			pods[m.Name] = m.PodCIDR.Addr().Next()
			add(t, n, m.Name, pods[m.Name])
		}
	}
	service := p.ServiceCIDR.Addr().Next()
	add(t, n, "cloud", service)
	for _, c := range []struct {
		from string
		to   netip.Addr
	}{
		{"a1", pods["a2"]}, {"a1", pods["cloud"]}, {"cloud", pods["b1"]}, {"host", pods["a2"]}, {"host", service},
	} {
		conn, err := dial(n.place(c.from), c.to, time.Second)
		if err != nil {
			t.Errorf("%s to %s: %v", c.from, c.to, err)
			continue
		}
		_ = conn.Close()
	}
}

func add(t *testing.T, n *Network, machine string, a netip.Addr) {
	t.Helper()
	ns := n.place(machine).ns
	if err := setAddress(address{port: port{ns, "lo"}, local: netip.PrefixFrom(a, 32)}); err != nil {
		t.Fatal(err)
	}
	serve(t, place{ns, a})
}

func TestCutMachine(t *testing.T) {
	n := mustUp(t, testPlan("tncm", 193))
	serveAll(t, n)
	live, err := dial(n.place("a1"), n.place("host").addr, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()

	must(t, n.Cut(t.Context(), "a1", LinkDown, Both))
	n.expect(t, unreachable, "a1>host", "a1>a2", "a1>cloud")
	n.expect(t, reached, "a2>host")
	must(t, n.Heal(t.Context(), "a1"))
	n.expect(t, reached, "a1>host", "a1>a2", "host>a1", "a1>cloud")

	must(t, n.Cut(t.Context(), "a1", Blackhole, Both))
	n.expect(t, silent, "a1>host", "a1>a2", "host>a1")
	n.expect(t, reached, "a2>host")
	if _, err := echo(live, 10, 300*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("established connection through a black hole: %v", err)
	}
	if got := n.state(t, "a1"); got.Blackhole != Both || got.Down {
		t.Errorf("state is %+v", got)
	}
	must(t, n.Heal(t.Context(), "a1"))
	n.expect(t, reached, "a1>host", "host>a1")
	if got := n.state(t, "a1"); got.Touched() {
		t.Errorf("state after heal is %+v", got)
	}
}

func TestCutSite(t *testing.T) {
	p := testPlan("tncs", 194)
	serveAll(t, mustUp(t, p))
	// Another process may do the cutting.
	n, err := Attach(p)
	if err != nil {
		t.Fatal(err)
	}
	must(t, n.Cut(t.Context(), "a", LinkDown, Both))
	n.expect(t, unreachable, "a1>host", "a2>cloud")
	n.expect(t, reached, "a1>a2", "b1>cloud")
	if got := n.state(t, "a"); !got.Down {
		t.Errorf("state is %+v", got)
	}
	must(t, n.Heal(t.Context(), "a"))
	n.expect(t, reached, "a1>host", "host>a1", "cloud>a2")
	must(t, n.Cut(t.Context(), "a", Blackhole, Both))
	n.expect(t, silent, "a1>host", "host>a2")
	n.expect(t, reached, "a1>a2", "b1>cloud")
	must(t, n.Heal(t.Context(), "a"))
	n.expect(t, reached, "a1>host", "host>a1")
}

func TestCutInOneDirectionOnly(t *testing.T) {
	n := mustUp(t, testPlan("tncd", 195))
	serveAll(t, n)
	for _, dir := range []Direction{In, Out} {
		must(t, n.Cut(t.Context(), "b1", Blackhole, dir))
		n.expect(t, silent, "b1>host", "host>b1")
		if got := n.state(t, "b1"); got.Blackhole != dir {
			t.Errorf("state is %+v, want %s", got, dir)
		}
		before, err := n.Counters("b1")
		must(t, err)
		n.try("host", "b1")
		after, err := n.Counters("b1")
		must(t, err)
		if came := after.PacketsIn > before.PacketsIn; came != (dir == Out) {
			t.Errorf("cut %s: packets came in: %t", dir, came)
		}
		must(t, n.Heal(t.Context(), "b1"))
		n.expect(t, reached, "b1>host", "host>b1")
	}
	if err := n.Cut(t.Context(), "b1", LinkDown, In); err == nil {
		t.Error("a link went down in one direction")
	}
	if err := n.Cut(t.Context(), "nobody", LinkDown, Both); !errors.Is(err, ErrUnknownTarget) {
		t.Errorf("got %v, want %v", err, ErrUnknownTarget)
	}
}

func TestNATLetsOnlyConnectionsOut(t *testing.T) {
	p := testPlan("tnnat", 196)
	p.Sites[1].NAT = true
	n := mustUp(t, p)
	serveAll(t, n)
	n.expect(t, reached, "a1>host", "a1>cloud", "a1>a2", "host>b1")
	n.expect(t, silent, "host>a1", "cloud>a2")
	if got := n.state(t, "a"); !got.NAT {
		t.Errorf("state is %+v", got)
	}
	must(t, n.SetNAT(t.Context(), "a", false))
	n.expect(t, reached, "host>a1", "cloud>a2", "a1>host")
	if got := n.state(t, "a"); got.Touched() {
		t.Errorf("state is %+v", got)
	}
	must(t, n.SetNAT(t.Context(), "b", true))
	n.expect(t, silent, "host>b1")
}

func TestShape(t *testing.T) {
	n := mustUp(t, testPlan("tnsh", 197))
	serveAll(t, n)
	c, err := dial(n.place("a1"), n.place("host").addr, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	rtt := func() time.Duration {
		t.Helper()
		var all []time.Duration
		for range 9 {
			d, err := echo(c, 1, 3*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, d)
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	direct := rtt()
	if direct > 15*time.Millisecond {
		t.Errorf("direct round trip takes %s", direct)
	}
	for _, target := range []string{"a", "a1", HostTarget} {
		must(t, n.Shape(t.Context(), target, Out, Shape{Delay: 30 * time.Millisecond}))
		must(t, n.Shape(t.Context(), target, In, Shape{Delay: 10 * time.Millisecond}))
		if d := rtt(); d < 40*time.Millisecond || d > 60*time.Millisecond {
			t.Errorf("%s: round trip takes %s, want 40ms", target, d)
		} else {
			t.Logf("%s: round trip direct %s, with 30+10 ms %s", target, direct, d)
		}
		if got := n.state(t, target); !got.Relayed || got.In.Delay != 10*time.Millisecond {
			t.Errorf("state is %+v", got)
		}
		// A cut counts behind a relay too.
		if target != HostTarget {
			must(t, n.Cut(t.Context(), target, Blackhole, Both))
			n.expect(t, silent, "a1>host")
			must(t, n.Heal(t.Context(), target))
		}
		must(t, n.Shape(t.Context(), target, Both, Shape{}))
		if got := n.state(t, target); got.Touched() {
			t.Errorf("state is %+v", got)
		}
		if d := rtt(); d > 15*time.Millisecond {
			t.Errorf("%s: round trip after the end takes %s", target, d)
		}
	}

	// 20 Mbit/s: half a megabyte takes 0.2 s there, and back meanwhile.
	must(t, n.Shape(t.Context(), "a", Both, Shape{Rate: 20e6}))
	const size = 1 << 20
	d, err := echo(c, size, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	rate := float64(size) * 8 / d.Seconds() / 1e6
	if rate < 10 || rate > 21 {
		t.Errorf("rate is %.1f Mbit/s, want up to 20", rate)
	}
	t.Logf("rate %.1f of 20 Mbit/s", rate)
	must(t, n.Shape(t.Context(), "a", Both, Shape{Delay: time.Millisecond}))
	if d, err = echo(c, size, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	t.Logf("relay without rate: %.0f Mbit/s", float64(size)*8/d.Seconds()/1e6)
}

func TestShapeLosesItsShare(t *testing.T) {
	n := mustUp(t, testPlan("tnloss", 198))
	const loss, packets = 0.2, 4000
	must(t, n.Shape(t.Context(), "b1", Out, Shape{Loss: loss}))
	to := netip.AddrPortFrom(n.place("host").addr, 9)
	err := inside(n.place("b1").ns, func() error {
		c, err := net.Dial("udp4", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		// Bursts, until the relay has seen enough: a queue before it may
		// drop some too.
		await(t, func() bool {
			for range 50 {
				// Nobody listens there, which the socket may report.
				_, _ = c.Write([]byte("x"))
			}
			s, _ := n.RelayStats("b1")
			return s.Out.Packets+s.Out.Lost >= packets
		})
		return nil
	})
	must(t, err)
	s, _ := n.RelayStats("b1")
	got := float64(s.Out.Lost) / float64(s.Out.Lost+s.Out.Packets)
	if got < loss-0.04 || got > loss+0.04 {
		t.Errorf("lost %.3f, want %.3f", got, loss)
	}
	t.Logf("lost %.3f of %d, want %.3f; %+v", got, packets, loss, s)
}

// await polls for what the kernel will do soon.
func await(t *testing.T, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("waited in vain")
		}
	}
}

// A relay that died with its process must not keep the link cut.
func TestShapeZeroJoinsACableLeftByADeadRelay(t *testing.T) {
	p := testPlan("tndead", 199)
	n := mustUp(t, p)
	serveAll(t, n)
	c, err := n.cable("a")
	must(t, err)
	r, err := newRelay(c)
	must(t, err)
	r.close()
	if got := n.state(t, "a"); !got.Relayed {
		t.Errorf("state is %+v", got)
	}
	must(t, n.Shape(t.Context(), "a", Both, Shape{}))
	n.expect(t, reached, "a1>host")
}

func TestFailedUpLeavesNothing(t *testing.T) {
	before := hostState(t)
	p := testPlan("tnfail", 190)
	p.Sites[2].NAT = true
	broken := errors.New("broken")
	for fail := 1; ; fail += 7 {
		steps := 0
		_, err := up(t.Context(), p, func(string) error {
			if steps++; steps == fail {
				return broken
			}
			return nil
		})
		if err == nil {
			t.Logf("%d steps", steps)
			break
		}
		if !errors.Is(err, broken) {
			t.Fatal(err)
		}
		if after := hostState(t); after != before {
			t.Fatalf("host changed by step %d:\n%s", fail, after)
		}
	}
	must(t, Down(t.Context(), p.Prefix))
}

// A process killed in the middle of Up leaves a part of the network, and may
// leave the file of a namespace that is no namespace yet.
func TestDownAfterACrash(t *testing.T) {
	before := hostState(t)
	p := testPlan("tncr", 189)
	l := newLayout(p)
	for _, ns := range l.routers[:2] {
		must(t, createSpace(ns, true))
	}
	must(t, createBridge(l.bridges[0]))
	must(t, lay(l.cables[HostTarget]))
	must(t, os.WriteFile(namespaceDir+"/"+l.machines[0], nil, 0o444))
	if yes, err := Exists(p.Prefix); err != nil || !yes {
		t.Errorf("exists: %t, %v", yes, err)
	}
	must(t, Down(t.Context(), p.Prefix))
	if after := hostState(t); after != before {
		t.Errorf("host changed:\n%s\nbefore:\n%s", after, before)
	}
}

func TestResetTakesOutWhatTheMachineMade(t *testing.T) {
	n := mustUp(t, testPlan("tnrs", 188))
	serveAll(t, n)
	ns := n.place("a1").ns
	clean := func() string {
		out, err := exec.CommandContext(t.Context(), "nsenter", "--net="+namespaceDir+"/"+ns,
			"sh", "-c", "ip -o -4 addr; ip route; ip rule; nft list ruleset").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	before := clean()
	out, err := exec.CommandContext(t.Context(), "nsenter", "--net="+namespaceDir+"/"+ns, "sh", "-ec", `
		ip link add cni0 type bridge; ip link set cni0 up; ip addr add 10.188.120.1/24 dev cni0
		ip addr add 169.254.2.1/32 dev lo; ip rule add from 1.2.3.4 lookup 99
		nft add table ip kube-proxy; ip route add 10.9.9.0/24 via 10.188.2.11`).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	must(t, n.Cut(t.Context(), "a1", Blackhole, Both))
	must(t, n.Reset(t.Context(), "a1"))
	n.expect(t, silent, "a1>host")
	must(t, n.Heal(t.Context(), "a1"))
	if after := clean(); after != before {
		t.Errorf("after reset:\n%s\nwant:\n%s", after, before)
	}
	n.expect(t, reached, "a1>host", "a1>a2")
	must(t, n.Cut(t.Context(), "a1", LinkDown, Both))
	must(t, n.Reset(t.Context(), "a1"))
	if got := n.state(t, "a1"); !got.Down {
		t.Error("reset healed a cut")
	}
}

func TestUpRefusesTakenAddresses(t *testing.T) {
	p := testPlan("tntk", 187)
	mustUp(t, p)
	p.Prefix = "tntl"
	if _, err := Up(t.Context(), p); err == nil || !strings.Contains(err.Error(), "overlaps") {
		t.Errorf("got %v", err)
		_ = Down(t.Context(), p.Prefix)
	}
}

func (n *Network) state(t *testing.T, target string) TargetState {
	t.Helper()
	all, err := n.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Target == target {
			return s
		}
	}
	t.Fatalf("no state of %s", target)
	return TargetState{}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
