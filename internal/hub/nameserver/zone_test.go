package nameserver

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// shown is an answer as text: its code and its records in order, without the
// SOA's serial and the weights of SRV.
func shown(m *dns.Msg) string {
	lines := []string{dns.RcodeToString[m.Rcode]}
	section := func(prefix string, all []dns.RR) {
		var out []string
		for _, rr := range all {
			switch rr := rr.(type) {
			case *dns.SOA:
				rr.Serial = 0
			case *dns.OPT:
				continue
			}
			out = append(out, prefix+strings.Join(strings.Fields(rr.String()), " "))
		}
		slices.Sort(out)
		lines = append(lines, out...)
	}
	section("", m.Answer)
	section("ns ", m.Ns)
	section("extra ", m.Extra)
	return strings.Join(lines, "\n")
}

func TestRecords(t *testing.T) {
	t.Parallel()
	l := start(t, shop(), nil)
	const (
		soa  = "ns cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 0 7200 1800 86400 5"
		none = "NXDOMAIN\n" + soa
		only = "NOERROR\n" + soa
	)
	for question, want := range map[string]string{
		"cluster.local. A":                              only,
		"cluster.local. SOA":                            "NOERROR\ncluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 0 7200 1800 86400 5",
		"cluster.local. NS":                             "NOERROR\ncluster.local. 5 IN NS ns.dns.cluster.local.\nextra ns.dns.cluster.local. 5 IN A 127.0.0.1",
		"ns.dns.cluster.local. A":                       "NOERROR\nns.dns.cluster.local. 5 IN A 127.0.0.1",
		"dns-version.cluster.local. TXT":                "NOERROR\ndns-version.cluster.local. 28800 IN TXT \"1.1.0\"",
		"svc.cluster.local. A":                          only,
		"default.svc.cluster.local. A":                  only,
		"nowhere.svc.cluster.local. A":                  none,
		"web.default.svc.cluster.local. A":              "NOERROR\nweb.default.svc.cluster.local. 5 IN A 10.96.0.20",
		"web.default.svc.cluster.local. AAAA":           "NOERROR\nweb.default.svc.cluster.local. 5 IN AAAA fd00:96::20",
		"web.default.svc.cluster.local. TXT":            only,
		"web.default.svc.cluster.local. HTTPS":          only,
		"WEB.default.svc.Cluster.Local. A":              "NOERROR\nWEB.default.svc.Cluster.Local. 5 IN A 10.96.0.20",
		"gone.default.svc.cluster.local. A":             none,
		"web.shop.svc.cluster.local. A":                 none,
		"web.default.cluster.local. A":                  none,
		"a.b.c.web.default.svc.cluster.local. A":        none,
		"http.tcp.web.default.svc.cluster.local. SRV":   none,
		"_none._tcp.web.default.svc.cluster.local. SRV": none,
		"_http._udp.web.default.svc.cluster.local. SRV": none,
		"_http._tcp.web.default.svc.cluster.local. SRV": "NOERROR\n_http._tcp.web.default.svc.cluster.local. 5 IN SRV 0 100 80 web.default.svc.cluster.local.\n" +
			"extra web.default.svc.cluster.local. 5 IN A 10.96.0.20\nextra web.default.svc.cluster.local. 5 IN AAAA fd00:96::20",
		"web.default.svc.cluster.local. SRV": "NOERROR\nweb.default.svc.cluster.local. 5 IN SRV 0 50 53 web.default.svc.cluster.local.\n" +
			"web.default.svc.cluster.local. 5 IN SRV 0 50 80 web.default.svc.cluster.local.\n" +
			"extra web.default.svc.cluster.local. 5 IN A 10.96.0.20\nextra web.default.svc.cluster.local. 5 IN AAAA fd00:96::20",
		"10-244-1-7.web.default.svc.cluster.local. A": "NOERROR\n10-244-1-7.web.default.svc.cluster.local. 5 IN A 10.244.1.7",
		"db.shop.svc.cluster.local. A":                "NOERROR\ndb.shop.svc.cluster.local. 5 IN A 10.244.1.8\ndb.shop.svc.cluster.local. 5 IN A 10.244.1.9",
		"db.shop.svc.cluster.local. AAAA":             "NOERROR\ndb.shop.svc.cluster.local. 5 IN AAAA fd00:244::8",
		"db-0.db.shop.svc.cluster.local. A":           "NOERROR\ndb-0.db.shop.svc.cluster.local. 5 IN A 10.244.1.8",
		"db-0.db.shop.svc.cluster.local. AAAA":        "NOERROR\ndb-0.db.shop.svc.cluster.local. 5 IN AAAA fd00:244::8",
		"db-2.db.shop.svc.cluster.local. A":           none, // not ready
		"10-244-1-9.db.shop.svc.cluster.local. A":     "NOERROR\n10-244-1-9.db.shop.svc.cluster.local. 5 IN A 10.244.1.9",
		"_sql._tcp.db.shop.svc.cluster.local. SRV": "NOERROR\n_sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 50 5432 10-244-1-9.db.shop.svc.cluster.local.\n" +
			"_sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 50 5432 db-0.db.shop.svc.cluster.local.\n" +
			"extra 10-244-1-9.db.shop.svc.cluster.local. 5 IN A 10.244.1.9\nextra db-0.db.shop.svc.cluster.local. 5 IN A 10.244.1.8\n" +
			"extra db-0.db.shop.svc.cluster.local. 5 IN AAAA fd00:244::8",
		"empty.shop.svc.cluster.local. A": none,
		// Without a port there is nothing to say of one.
		"bare.shop.svc.cluster.local. A":            "NOERROR\nbare.shop.svc.cluster.local. 5 IN A 10.244.1.11",
		"bare-0.bare.shop.svc.cluster.local. A":     "NOERROR\nbare-0.bare.shop.svc.cluster.local. 5 IN A 10.244.1.11",
		"bare.shop.svc.cluster.local. SRV":          only,
		"_http._tcp.bare.shop.svc.cluster.local. A": none,
		"mail.shop.svc.cluster.local. CNAME":        "NOERROR\nmail.shop.svc.cluster.local. 5 IN CNAME mail.example.com.",
		// No other server is known: the alias is, what it leads to is not.
		"mail.shop.svc.cluster.local. A":                                                "NOERROR\nmail.shop.svc.cluster.local. 5 IN CNAME mail.example.com.",
		"again.shop.svc.cluster.local. A":                                               "NOERROR\nagain.shop.svc.cluster.local. 5 IN CNAME web.default.svc.cluster.local.\nweb.default.svc.cluster.local. 5 IN A 10.96.0.20",
		"x.mail.shop.svc.cluster.local. A":                                              none,
		"10-1-2-3.default.pod.cluster.local. A":                                         "NOERROR\n10-1-2-3.default.pod.cluster.local. 5 IN A 10.1.2.3",
		"10-1-2-3.default.pod.cluster.local. AAAA":                                      only,
		"fd00--1.default.pod.cluster.local. AAAA":                                       "NOERROR\nfd00--1.default.pod.cluster.local. 5 IN AAAA fd00::1",
		"10-1-2-300.default.pod.cluster.local. A":                                       none,
		"web.default.pod.cluster.local. A":                                              none,
		"default.pod.cluster.local. A":                                                  only,
		"20.0.96.10.in-addr.arpa. PTR":                                                  "NOERROR\n20.0.96.10.in-addr.arpa. 5 IN PTR web.default.svc.cluster.local.",
		"20.0.96.10.in-addr.arpa. A":                                                    only,
		"8.1.244.10.in-addr.arpa. PTR":                                                  "NOERROR\n8.1.244.10.in-addr.arpa. 5 IN PTR db-0.db.shop.svc.cluster.local.",
		"0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa. PTR": "NOERROR\n0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa. 5 IN PTR web.default.svc.cluster.local.",
		// What a resolver makes of names by its search path.
		"web.default.svc.cluster.local.default.svc.cluster.local. A": none,
		"example.com.default.svc.cluster.local. AAAA":                none,
	} {
		name, qtype, _ := strings.Cut(question, " ")
		got := l.ask(t, name, dns.StringToType[qtype])
		if shown(got) != want {
			t.Errorf("%s:\n%s\nwant\n%s", question, shown(got), want)
		}
		if !got.Authoritative || !got.RecursionAvailable || got.Question[0].Name != name {
			t.Errorf("%s: header %v", question, got.MsgHdr)
		}
	}
	// An alias that leads to itself ends.
	if got := l.ask(t, "round.shop.svc.cluster.local.", dns.TypeA); len(got.Answer) != maxAliases+1 {
		t.Errorf("an alias of itself: %s", shown(got))
	}
	if l.cluster.agents["coredns/yurthub"] != true || len(l.cluster.agents) != 1 {
		t.Errorf("the API was asked by %v", l.cluster.agents)
	}
}

// TestAnyOrder lets clients that take the first address take different ones.
func TestAnyOrder(t *testing.T) {
	t.Parallel()
	l := start(t, shop(), nil)
	first := map[string]bool{}
	await(t, "another order", func() bool {
		a, ok := l.ask(t, "db.shop.svc.cluster.local.", dns.TypeA).Answer[0].(*dns.A)
		if ok {
			first[a.A.String()] = true
		}
		return len(first) == 2
	})
}

func TestNodeNames(t *testing.T) {
	t.Parallel()
	l := start(t, shop(), func(c *Config) {
		c.Node = func(name string) []netip.Addr {
			if name == "edge-1" {
				return []netip.Addr{netip.MustParseAddr("192.168.0.11")}
			}
			return nil
		}
	})
	if got := shown(l.ask(t, "Edge-1.", dns.TypeA)); got != "NOERROR\nEdge-1. 5 IN A 192.168.0.11" {
		t.Error(got)
	}
	if got := shown(l.ask(t, "edge-1.", dns.TypeAAAA)); got != "NOERROR" {
		t.Error(got)
	}
	if got := shown(l.ask(t, "edge-2.", dns.TypeA)); got != "SERVFAIL" {
		t.Error(got) // nobody else can be asked
	}
}
