package nameserver

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func withServers(all ...*other) func(*Config) {
	return func(c *Config) {
		for _, o := range all {
			c.Servers = append(c.Servers, o.at)
		}
	}
}

const soaOfExample = "example.com. 60 IN SOA ns.example.com. admin.example.com. 1 2 3 4 60"

// TestOthersAreAskedOnce asks many times for what another server answers.
func TestOthersAreAskedOnce(t *testing.T) {
	t.Parallel()
	o := newOther(t, says(dns.RcodeSuccess, "www.example.com. 300 IN A 192.0.2.1"))
	l := start(t, shop(), withServers(o))
	var together sync.WaitGroup
	for range 50 {
		together.Go(func() {
			if got := shown(l.ask(t, "www.example.com.", dns.TypeA)); !strings.HasPrefix(got, "NOERROR\nwww.example.com. ") || !strings.HasSuffix(got, "IN A 192.0.2.1") {
				t.Error(got)
			}
		})
	}
	together.Wait()
	if n := o.count("www.example.com. A"); n != 1 {
		t.Errorf("the other server was asked %d times", n)
	}
	// The client's own spelling, and another question.
	if got := l.ask(t, "WWW.Example.com.", dns.TypeA); got.Answer[0].Header().Name != "WWW.Example.com." || o.count("www.example.com. A") != 1 {
		t.Errorf("in another case: %s", shown(got))
	}
	o.set(says(dns.RcodeNameError, soaOfExample))
	for range 100 {
		if got := l.ask(t, "none.example.com.", dns.TypeA); got.Rcode != dns.RcodeNameError || len(got.Ns) != 1 {
			t.Fatal(shown(got))
		}
	}
	if n := o.count("none.example.com. A"); n != 1 {
		t.Errorf("a storm for a name that is not there: asked %d times", n)
	}
	o.set(says(dns.RcodeSuccess, soaOfExample))
	for range 100 {
		if got := l.ask(t, "www.example.com.", dns.TypeAAAA); got.Rcode != dns.RcodeSuccess || len(got.Answer) != 0 {
			t.Fatal(shown(got))
		}
	}
	if n := o.count("www.example.com. AAAA"); n != 1 {
		t.Errorf("a storm for an address that is not there: asked %d times", n)
	}
	o.set(says(dns.RcodeServerFailure))
	for range 100 {
		if got := l.ask(t, "broken.example.com.", dns.TypeA); got.Rcode != dns.RcodeServerFailure {
			t.Fatal(shown(got))
		}
	}
	if n := o.count("broken.example.com. A"); n > 4 { // once in two seconds
		t.Errorf("a storm for a name that nobody can tell: asked %d times", n)
	}
	// Nothing of the cluster's was asked of it.
	for _, name := range []string{"web.default.svc.cluster.local.", "none.svc.cluster.local.", "example.com.default.svc.cluster.local."} {
		l.ask(t, name, dns.TypeA)
		if n := o.count(name + " A"); n != 0 {
			t.Errorf("%s was asked of another server", name)
		}
	}
}

func TestAliasLeadsOutside(t *testing.T) {
	t.Parallel()
	o := newOther(t, says(dns.RcodeSuccess, "mail.example.com. 300 IN A 192.0.2.2"))
	l := start(t, shop(), withServers(o))
	want := "NOERROR\nmail.example.com. 300 IN A 192.0.2.2\nmail.shop.svc.cluster.local. 5 IN CNAME mail.example.com."
	if got := shown(l.ask(t, "mail.shop.svc.cluster.local.", dns.TypeA)); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// TestDeadServers gives old answers, and quick ones, when no server answers.
func TestDeadServers(t *testing.T) {
	t.Parallel()
	short := says(dns.RcodeSuccess, "www.example.com. 0 IN A 192.0.2.1")
	o := newOther(t, short)
	l := start(t, shop(), withServers(o))
	l.ask(t, "www.example.com.", dns.TypeA)
	o.set(silent)
	got := l.ask(t, "www.example.com.", dns.TypeA, func(m *dns.Msg, _ *dns.Client) { m.SetEdns0(1232, false) })
	if len(got.Answer) != 1 || got.Answer[0].Header().Ttl != staleTTL {
		t.Errorf("an old answer: %s", shown(got))
	}
	if e, ok := got.IsEdns0().Option[0].(*dns.EDNS0_EDE); !ok || e.InfoCode != dns.ExtendedErrorCodeStaleAnswer {
		t.Errorf("an old answer does not say so: %v", got.IsEdns0())
	}
	await(t, "the server is taken for dead", func() bool {
		l.ask(t, fmt.Sprintf("x%d.example.com.", time.Now().UnixNano()), dns.TypeA, func(_ *dns.Msg, c *dns.Client) { c.Timeout = 20 * time.Second })
		return l.forward.allDown()
	})
	// From now on nobody waits, but one in a second.
	quick := 0
	for i := range 50 {
		began := time.Now()
		if got := l.ask(t, fmt.Sprintf("y%d.example.com.", i), dns.TypeA); got.Rcode != dns.RcodeServerFailure {
			t.Fatal(shown(got))
		}
		if time.Since(began) < firstTry/2 {
			quick++
		}
		if quick >= 10 {
			break
		}
	}
	if quick < 10 {
		t.Errorf("%d answers were quick", quick)
	}
	// The cluster's names are none of its business.
	if got := l.addressOf(t, "web.default"); got != "10.96.0.20" {
		t.Errorf("a name of the cluster: %s", got)
	}
	// It is back.
	o.set(short)
	await(t, "the server is asked again", func() bool {
		return l.ask(t, fmt.Sprintf("z%d.example.com.", time.Now().UnixNano()), dns.TypeA).Rcode == dns.RcodeSuccess
	})
}

// TestServerThatHasLostItsWay gives old answers, too, when the server itself
// cannot ask anybody, as a router of a site that is cut off.
func TestServerThatHasLostItsWay(t *testing.T) {
	t.Parallel()
	o := newOther(t, says(dns.RcodeSuccess, "www.example.com. 0 IN A 192.0.2.1"))
	l := start(t, shop(), withServers(o))
	l.ask(t, "www.example.com.", dns.TypeA)
	for _, rcode := range []int{dns.RcodeServerFailure, dns.RcodeRefused} {
		o.set(says(rcode))
		for range 3 {
			if got := l.ask(t, "www.example.com.", dns.TypeA); len(got.Answer) != 1 || got.Answer[0].Header().Ttl != staleTTL {
				t.Errorf("an old answer: %s", shown(got))
			}
		}
		if got := l.ask(t, "new.example.com.", dns.TypeA); got.Rcode != dns.RcodeServerFailure && got.Rcode != rcode {
			t.Errorf("what was never known: %s", shown(got))
		}
		l.forward.cache.mu.Lock()
		clear(l.forward.cache.failed) // as after its time
		l.forward.cache.mu.Unlock()
	}
	o.set(says(dns.RcodeNameError, soaOfExample))
	if got := l.ask(t, "www.example.com.", dns.TypeA); got.Rcode != dns.RcodeNameError {
		t.Errorf("the name is gone: %s", shown(got))
	}
}

// TestServerWithoutEDNS asks one of before 1999, as some routers have.
func TestServerWithoutEDNS(t *testing.T) {
	t.Parallel()
	for _, rcode := range []int{dns.RcodeFormatError, dns.RcodeNotImplemented} {
		o := newOther(t, func(w dns.ResponseWriter, m *dns.Msg) {
			if m.IsEdns0() != nil {
				_ = w.WriteMsg(new(dns.Msg).SetRcode(m, rcode))
				return
			}
			says(dns.RcodeSuccess, "www.example.com. 60 IN A 192.0.2.1")(w, m)
		})
		l := start(t, shop(), withServers(o))
		if got := l.ask(t, "www.example.com.", dns.TypeA); len(got.Answer) != 1 {
			t.Errorf("%s: %s", dns.RcodeToString[rcode], shown(got))
		}
	}
}

// TestNextServer asks another server when one refuses or is silent.
func TestNextServer(t *testing.T) {
	t.Parallel()
	bad, good := newOther(t, says(dns.RcodeRefused)), newOther(t, says(dns.RcodeSuccess, "www.example.com. 300 IN A 192.0.2.1"))
	l := start(t, shop(), withServers(bad, good))
	if got := l.ask(t, "www.example.com.", dns.TypeA); len(got.Answer) != 1 {
		t.Errorf("one refuses: %s", shown(got))
	}
	bad.set(silent)
	if got := l.ask(t, "www.example.com.", dns.TypeTXT); got.Rcode != dns.RcodeSuccess {
		t.Errorf("one is silent: %s", shown(got))
	}
}

// TestForeignAnswers takes no answer to another question.
func TestForeignAnswers(t *testing.T) {
	t.Parallel()
	forger := newOther(t, func(w dns.ResponseWriter, m *dns.Msg) {
		m = m.Copy()
		m.Question[0].Name = "evil.example.com."
		says(dns.RcodeSuccess, "evil.example.com. 300 IN A 192.0.2.66")(w, m)
	})
	l := start(t, shop(), withServers(forger))
	if got := l.ask(t, "www.example.com.", dns.TypeA); got.Rcode != dns.RcodeServerFailure {
		t.Errorf("a forged answer: %s", shown(got))
	}
	if n, _ := l.forward.cache.size(); n != 0 {
		t.Errorf("%d answers of a forger are kept", n)
	}
}

// TestLongAnswers come by TCP, from the other server and to the client.
func TestLongAnswers(t *testing.T) {
	t.Parallel()
	var records []string
	for i := range 200 {
		records = append(records, fmt.Sprintf("many.example.com. 300 IN A 192.0.2.%d", i))
	}
	o := newOther(t, func(w dns.ResponseWriter, m *dns.Msg) {
		if w.RemoteAddr().Network() == "udp" {
			out := new(dns.Msg).SetReply(m)
			out.Truncated = true
			_ = w.WriteMsg(out)
			return
		}
		says(dns.RcodeSuccess, records...)(w, m)
	})
	l := start(t, shop(), withServers(o))
	whole := l.ask(t, "many.example.com.", dns.TypeA, byTCP)
	if len(whole.Answer) != 200 || whole.Truncated {
		t.Errorf("by TCP: %d of 200", len(whole.Answer))
	}
	for size, change := range map[int]func(*dns.Msg, *dns.Client){
		512:  func(*dns.Msg, *dns.Client) {},
		1000: func(m *dns.Msg, _ *dns.Client) { m.SetEdns0(1000, false) },
		1232: func(m *dns.Msg, c *dns.Client) { m.SetEdns0(65000, false); c.UDPSize = 65000 },
	} {
		part := l.ask(t, "many.example.com.", dns.TypeA, change)
		part.Compress = true
		if !part.Truncated || part.Len() > size || len(part.Answer) == 0 {
			t.Errorf("within %d bytes: %d of %d records, truncated %v", size, len(part.Answer), part.Len(), part.Truncated)
		}
	}
}

// TestPartsAreNotKept loses the way to the other server by TCP, and finds it.
func TestPartsAreNotKept(t *testing.T) {
	t.Parallel()
	const name, record = "many.example.com.", "many.example.com. 300 IN A 192.0.2.1"
	o := newOther(t, func(w dns.ResponseWriter, m *dns.Msg) {
		if w.RemoteAddr().Network() == "tcp" {
			_ = w.Close()
			return
		}
		out := new(dns.Msg).SetReply(m)
		out.Truncated = true
		_ = w.WriteMsg(out)
	})
	l := start(t, shop(), withServers(o))
	if part := l.ask(t, name, dns.TypeA); !part.Truncated {
		t.Errorf("a part that does not say so: %s", shown(part))
	}
	o.set(says(dns.RcodeSuccess, record))
	if whole := l.ask(t, name, dns.TypeA, byTCP); len(whole.Answer) != 1 || whole.Truncated {
		t.Errorf("the part was kept: %s", shown(whole))
	}
}

// TestLoop finds that a server leads back here.
func TestLoop(t *testing.T) {
	t.Parallel()
	var l *lab
	ready := make(chan struct{})
	back := newOther(t, func(w dns.ResponseWriter, m *dns.Msg) {
		<-ready
		if out, err := dns.Exchange(m, l.at.String()); err == nil {
			_ = w.WriteMsg(out)
		}
	})
	l = start(t, shop(), withServers(back))
	close(ready)
	await(t, "the server is not used", func() bool { return len(l.forward.list()) == 0 })
	if got := l.ask(t, "www.example.com.", dns.TypeA); got.Rcode != dns.RcodeServerFailure {
		t.Error(shown(got))
	}
}

// TestCacheIsBounded fills the cache with more than it holds.
func TestCacheIsBounded(t *testing.T) {
	t.Parallel()
	c, now := newCache(10_000), time.Now()
	answer := func(i int) (question, *dns.Msg) {
		name := fmt.Sprintf("x%d.example.com.", i)
		m := new(dns.Msg).SetQuestion(name, dns.TypeA)
		rr, err := dns.NewRR(name + " 60 IN A 192.0.2.1")
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = []dns.RR{rr}
		return question{name: name, qtype: dns.TypeA}, m
	}
	for i := range 1000 {
		q, m := answer(i)
		c.put(q, m, now)
		c.put(q, m, now) // again, as after its time
		if _, bytes := c.size(); bytes > 10_000 {
			t.Fatalf("%d bytes after %d answers", bytes, i)
		}
	}
	n, bytes := c.size()
	q, _ := answer(999)
	if e, _ := c.get(q, now); e == nil || n < 20 || bytes < 9_000 {
		t.Errorf("it keeps %d answers of %d bytes", n, bytes)
	}
	sum := 0
	for _, k := range c.lru.Keys() {
		e, _ := c.lru.Peek(k)
		sum += cost(k, e)
	}
	if sum != bytes {
		t.Errorf("%d bytes are counted as %d", sum, bytes)
	}
	for i := range 3 * maxFailed {
		c.fail(question{name: fmt.Sprint(i)}, now)
	}
	if len(c.failed) > maxFailed {
		t.Errorf("%d failures are remembered", len(c.failed))
	}
}

// TestTimes lets answers grow old.
func TestTimes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCache(cacheBytes)
		put := func(rcode int, records ...string) (question, *dns.Msg) {
			m := new(dns.Msg).SetQuestion("a.example.com.", dns.TypeA)
			m.Rcode = rcode
			for _, text := range records {
				rr, err := dns.NewRR(text)
				if err != nil {
					t.Fatal(err)
				}
				if rr.Header().Rrtype == dns.TypeSOA {
					m.Ns = append(m.Ns, rr)
				} else {
					m.Answer = append(m.Answer, rr)
				}
			}
			q := question{name: "a.example.com.", qtype: dns.TypeA}
			c.put(q, m, time.Now())
			return q, m
		}
		for what, tc := range map[string]struct {
			want    time.Duration
			rcode   int
			records []string
		}{
			"an address":             {100 * time.Second, dns.RcodeSuccess, []string{"a.example.com. 100 IN A 192.0.2.1"}},
			"the shorter of two":     {50 * time.Second, dns.RcodeSuccess, []string{"a.example.com. 50 IN CNAME b.example.com.", "b.example.com. 100 IN A 192.0.2.1"}},
			"a very long one":        {maxTTL, dns.RcodeSuccess, []string{"a.example.com. 1000000 IN A 192.0.2.1"}},
			"no such name":           {60 * time.Second, dns.RcodeNameError, []string{soaOfExample}},
			"no such name, for long": {maxNegative, dns.RcodeNameError, []string{"example.com. 9000 IN SOA ns.example.com. admin.example.com. 1 2 3 4 9000"}},
			"no such name, unsaid":   {unsaidTTL, dns.RcodeNameError, nil},
			"no data":                {60 * time.Second, dns.RcodeSuccess, []string{soaOfExample}},
			"no data at an alias":    {50 * time.Second, dns.RcodeSuccess, []string{"a.example.com. 50 IN CNAME b.example.com.", soaOfExample}},
		} {
			q, _ := put(tc.rcode, tc.records...)
			e, _ := c.get(q, time.Now())
			if e.ttl != tc.want {
				t.Errorf("%s holds for %s, want %s", what, e.ttl, tc.want)
			}
		}
		q, _ := put(dns.RcodeSuccess, "a.example.com. 100 IN A 192.0.2.1")
		left := func() uint32 {
			e, _ := c.get(q, time.Now())
			m, err := e.message(time.Now())
			if err != nil {
				t.Fatal(err)
			}
			return m.Answer[0].Header().Ttl
		}
		<-time.After(40 * time.Second)
		if left() != 60 {
			t.Errorf("after 40 s of 100 it has %d left", left())
		}
		<-time.After(60 * time.Second)
		if e, _ := c.get(q, time.Now()); e.fresh(time.Now()) || left() != staleTTL {
			t.Errorf("after its time it has %d left", left())
		}
		<-time.After(staleFor + time.Second)
		if e, _ := c.get(q, time.Now()); e != nil {
			t.Error("it is kept for ever")
		}
		c.fail(q, time.Now())
		if _, failed := c.get(q, time.Now()); !failed {
			t.Error("a failure is forgotten at once")
		}
		<-time.After(failureTTL)
		if _, failed := c.get(q, time.Now()); failed {
			t.Error("a failure counts for ever")
		}
	})
}

func TestReadServers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string, lines ...string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	own := []netip.Addr{netip.MustParseAddr("169.254.2.1")}
	stub := file("stub", "nameserver 127.0.0.53", "options edns0")
	actual := file("real", "nameserver 192.0.2.53", "nameserver 2001:db8::53")
	for what, tc := range map[string]struct{ first, second, want string }{
		"plain":                         {actual, stub, "192.0.2.53:53 [2001:db8::53]:53"},
		"behind systemd-resolved":       {stub, actual, "192.0.2.53:53 [2001:db8::53]:53"},
		"a server of the machine":       {stub, filepath.Join(dir, "none"), "127.0.0.53:53"},
		"ourselves":                     {file("own", "nameserver 169.254.2.1", "nameserver 192.0.2.54"), stub, "192.0.2.54:53"},
		"nothing":                       {file("empty", "# nothing"), filepath.Join(dir, "none"), ""},
		"words that are no address":     {file("odd", "nameserver example.com", "nameserver", "nameserver 192.0.2.55"), stub, "192.0.2.55:53"},
		"only ourselves, behind a stub": {file("self", "nameserver 169.254.2.1"), actual, "192.0.2.53:53 [2001:db8::53]:53"},
	} {
		got, err := readServers(tc.first, tc.second, own)
		if text := strings.Trim(fmt.Sprint(got), "[]"); err != nil || strings.Join(strings.Fields(text), " ") != strings.Trim(tc.want, "[]") {
			t.Errorf("%s: %v, %v, want %s", what, got, err, tc.want)
		}
	}
	if _, err := readServers(filepath.Join(dir, "none"), actual, own); err == nil {
		t.Error("a file that is not there is no error")
	}
}

// TestServersChange follows the machine's file.
func TestServersAreKept(t *testing.T) {
	t.Parallel()
	f := newForwarder(nil, nil)
	a, b := netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("192.0.2.2:53")
	f.use([]netip.AddrPort{a})
	f.list()[0].fails.Store(downAfter)
	f.use([]netip.AddrPort{b, a})
	if all := f.list(); len(all) != 2 || all[0].down() || !all[1].down() {
		t.Error("what was known of a server is forgotten")
	}
	f.use(slices.Repeat([]netip.AddrPort{a}, 10))
	if n := len(f.list()); n != maxServers {
		t.Errorf("%d servers are used", n)
	}
}

func TestMetricsOfAnswers(t *testing.T) {
	t.Parallel()
	l := start(t, shop(), nil)
	l.addressOf(t, "web.default")
	l.addressOf(t, "none.default")
	for labels, want := range map[[2]string]float64{{kindCluster, "NOERROR"}: 1, {kindCluster, "NXDOMAIN"}: 1} {
		if got := testutil.ToFloat64(l.metrics.queries.WithLabelValues(labels[0], labels[1])); got != want {
			t.Errorf("%v: %v", labels, got)
		}
	}
}
