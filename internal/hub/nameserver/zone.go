package nameserver

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

const (
	// ttl of names of the cluster. To ask again costs nothing but a packet
	// within the machine, and a pod may have another address any moment.
	ttl = 5
	// specification is the version of the DNS specification of Kubernetes.
	specification = "1.1.0"
	specTTL       = 28800
	// maxRecords bounds one answer: it is what a message can hold of the
	// smallest records.
	maxRecords = 4000
	// maxReverse bounds the names of one address.
	maxReverse = 16
)

// reply is what is said to one question.
type reply struct {
	rcode         int
	answer, extra []dns.RR
	ns            []dns.RR
	alias         string // where the answer goes on; "": nowhere
	truncated     bool   // there is more
	authoritative bool
	authenticated bool // by another server
	stale         bool
	code          uint16 // extended error; 0: none
}

// zone answers for the names of the cluster.
type zone struct {
	domain string // with a dot at its end
	index  *index
	own    []netip.Addr // of the name server
}

// find answers a question for a name of the zone, with at most so many
// records.
func (z *zone) find(q dns.Question, most int) reply {
	most = min(most, maxRecords)
	name := strings.ToLower(q.Name)
	labels := dns.SplitDomainName(strings.TrimSuffix(name, z.domain))
	r := reply{authoritative: true, rcode: dns.RcodeNameError}
	switch n := len(labels); {
	case n == 0:
		r.rcode = dns.RcodeSuccess
		z.apex(q, &r)
	case n == 1 && labels[0] == "dns-version":
		r.rcode = dns.RcodeSuccess
		if q.Qtype == dns.TypeTXT {
			r.answer = []dns.RR{&dns.TXT{Hdr: header(q.Name, dns.TypeTXT, specTTL), Txt: []string{specification}}}
		}
	case n == 2 && labels[0] == "ns" && labels[1] == "dns":
		r.rcode = dns.RcodeSuccess
		r.answer, r.truncated = addresses(q.Name, q.Qtype, z.own, most)
	case labels[n-1] == "svc":
		z.services(q, labels[:n-1], most, &r)
	case labels[n-1] == "pod":
		pod(q, labels[:n-1], &r)
	}
	if len(r.answer) == 0 {
		r.ns = []dns.RR{z.soa(z.domain)}
	}
	return r
}

func (z *zone) apex(q dns.Question, r *reply) {
	server := "ns.dns." + z.domain
	switch q.Qtype {
	case dns.TypeSOA:
		r.answer = []dns.RR{z.soa(q.Name)}
	case dns.TypeNS:
		r.answer = []dns.RR{&dns.NS{Hdr: header(q.Name, dns.TypeNS, ttl), Ns: server}}
		for _, t := range []uint16{dns.TypeA, dns.TypeAAAA} {
			extra, _ := addresses(server, t, z.own, maxRecords)
			r.extra = append(r.extra, extra...)
		}
	}
}

func (z *zone) soa(name string) dns.RR {
	return &dns.SOA{
		Hdr: header(name, dns.TypeSOA, ttl), Ns: "ns.dns." + z.domain, Mbox: "hostmaster." + z.domain,
		Serial: z.index.serial(), Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl,
	}
}

// services answers for [endpoint or port and protocol,] service, namespace.
func (z *zone) services(q dns.Question, labels []string, most int, r *reply) {
	n := len(labels)
	if n < 2 {
		if n == 0 || z.index.has(labels[0]) {
			r.rcode = dns.RcodeSuccess // there are names below it
		}
		return
	}
	at := key{namespace: labels[n-1], name: labels[n-2]}
	s, in := z.index.at(at)
	if s == nil {
		return
	}
	want, ok := wantedOf(labels[:n-2])
	if !ok {
		return
	}
	if s.external != "" {
		if want == (wanted{}) {
			r.rcode, r.alias = dns.RcodeSuccess, dns.Fqdn(s.external)
			r.answer = []dns.RR{&dns.CNAME{Hdr: header(q.Name, dns.TypeCNAME, ttl), Target: r.alias}}
		}
		return
	}
	var found []target
	base := at.name + "." + at.namespace + ".svc." + z.domain
	if s.headless || want.endpoint != "" {
		for _, sl := range in {
			found = sl.targets(found, base, want)
		}
	} else {
		s.ports.each(func(p port) {
			if want.matches(p) {
				for _, ip := range s.ips {
					found = append(found, target{name: base, addr: ip, port: p.number})
				}
			}
		})
	}
	if len(found) == 0 {
		return
	}
	r.rcode = dns.RcodeSuccess
	if q.Qtype == dns.TypeSRV {
		r.srv(q.Name, found, most)
		return
	}
	r.answer, r.truncated = addresses(q.Name, q.Qtype, addrsOf(found), most)
}

// wanted are the parts of a question that choose among what a Service has.
type wanted struct{ endpoint, port, protocol string }

// wantedOf reads the labels in front of a Service's own.
func wantedOf(labels []string) (wanted, bool) {
	switch len(labels) {
	case 0:
		return wanted{}, true
	case 1:
		return wanted{endpoint: labels[0]}, true
	case 2:
		name, named := strings.CutPrefix(labels[0], "_")
		protocol, known := strings.CutPrefix(labels[1], "_")
		return wanted{port: name, protocol: protocol}, named && known && name != "" && protocol != ""
	}
	return wanted{}, false
}

func (w wanted) matches(p port) bool {
	return w.port == "" || strings.EqualFold(w.port, p.name) && w.protocol == p.protocol
}

// target is one place where a Service is served.
type target struct {
	name string
	addr netip.Addr
	port uint16
}

func (sl *slice) targets(found []target, base string, want wanted) []target {
	var open []port
	sl.ports.each(func(p port) {
		if want.matches(p) {
			open = append(open, p)
		}
	})
	if len(open) == 0 {
		return found
	}
	sl.each(func(addr netip.Addr, host string) {
		name := label(addr, host)
		if want.endpoint != "" && want.endpoint != name {
			return
		}
		for _, p := range open {
			found = append(found, target{name: name + "." + base, addr: addr, port: p.number})
		}
	})
	return found
}

func addrsOf(found []target) []netip.Addr {
	out := make([]netip.Addr, 0, len(found))
	seen := make(map[netip.Addr]struct{}, len(found))
	for _, t := range found {
		if _, ok := seen[t.addr]; !ok {
			seen[t.addr] = struct{}{}
			out = append(out, t.addr)
		}
	}
	return out
}

// srv answers with a record for each port of each target, and the targets'
// addresses. One target may have several of both.
func (r *reply) srv(name string, found []target, most int) {
	type place struct {
		name string
		port uint16
	}
	var places []place
	seen := map[place]struct{}{}
	extra := map[netip.Addr]struct{}{}
	for _, t := range found {
		p := place{t.name, t.port}
		if _, ok := seen[p]; !ok && p.port != 0 {
			seen[p] = struct{}{}
			places = append(places, p)
		}
	}
	if len(places) == 0 {
		return
	}
	shuffle(places)
	if len(places) > most {
		places, r.truncated = places[:most], true
	}
	weight := uint16(max(1, 100/len(places))) //nolint:gosec // at most 100
	for _, p := range places {
		r.answer = append(r.answer, &dns.SRV{Hdr: header(name, dns.TypeSRV, ttl), Weight: weight, Port: p.port, Target: p.name})
	}
	for _, t := range found {
		if _, ok := extra[t.addr]; ok || len(r.extra) >= most {
			continue
		}
		extra[t.addr] = struct{}{}
		r.extra = append(r.extra, address(t.name, t.addr))
	}
}

// pod answers for an address written as a name: pods have no other names, and
// whether there is such a pod the node may not know.
func pod(q dns.Question, labels []string, r *reply) {
	switch len(labels) {
	case 0, 1:
		r.rcode = dns.RcodeSuccess
	case 2:
		text := strings.ReplaceAll(labels[0], "-", ":")
		if strings.Count(labels[0], "-") == 3 && !strings.Contains(labels[0], "--") {
			text = strings.ReplaceAll(labels[0], "-", ".")
		}
		if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
			r.rcode = dns.RcodeSuccess
			r.answer, _ = addresses(q.Name, q.Qtype, []netip.Addr{ip}, 1)
		}
	}
}

// findReverse answers for an address of the cluster; false: it is of none.
func (z *zone) findReverse(q dns.Question) (reply, bool) {
	addr, ok := addrOf(strings.ToLower(q.Name))
	if !ok {
		return reply{}, false
	}
	of, labels, keys := z.index.behind(addr, maxReverse)
	var names []string
	if of != (key{}) {
		names = []string{of.name + "." + of.namespace + ".svc." + z.domain}
	}
	for i, label := range labels {
		names = append(names, label+"."+keys[i].name+"."+keys[i].namespace+".svc."+z.domain)
	}
	if len(names) == 0 {
		return reply{}, false
	}
	r := reply{authoritative: true}
	if q.Qtype != dns.TypePTR {
		r.ns = []dns.RR{z.soa(z.domain)}
		return r, true
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		r.answer = append(r.answer, &dns.PTR{Hdr: header(q.Name, dns.TypePTR, ttl), Ptr: name})
	}
	return r, true
}

// addrOf reads the name of a whole address below in-addr.arpa or ip6.arpa.
func addrOf(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		parts := strings.Split(rest, ".")
		slices.Reverse(parts)
		ip, err := netip.ParseAddr(strings.Join(parts, "."))
		return ip, err == nil && ip.Is4()
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa.")
	parts := strings.Split(rest, ".")
	if !ok || len(parts) != 32 {
		return netip.Addr{}, false
	}
	var raw [16]byte
	for i, part := range parts {
		nibble, err := strconv.ParseUint(part, 16, 4)
		if err != nil || len(part) != 1 {
			return netip.Addr{}, false
		}
		raw[15-i/2] |= byte(nibble) << (4 * (i % 2))
	}
	return netip.AddrFrom16(raw).Unmap(), true
}

// addresses are the records of one type for a name, in any order.
func addresses(name string, qtype uint16, all []netip.Addr, most int) (out []dns.RR, more bool) {
	all = slices.DeleteFunc(slices.Clone(all), func(a netip.Addr) bool {
		return a.Is4() != (qtype == dns.TypeA) || qtype != dns.TypeA && qtype != dns.TypeAAAA
	})
	shuffle(all)
	if len(all) > most {
		all, more = all[:most], true
	}
	for _, a := range all {
		out = append(out, address(name, a))
	}
	return out, more
}

func address(name string, a netip.Addr) dns.RR {
	if a.Is4() {
		return &dns.A{Hdr: header(name, dns.TypeA, ttl), A: net.IP(a.AsSlice())}
	}
	return &dns.AAAA{Hdr: header(name, dns.TypeAAAA, ttl), AAAA: net.IP(a.AsSlice())}
}

func header(name string, rrtype uint16, seconds uint32) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: seconds}
}

// shuffle spreads clients that take the first over all.
func shuffle[T any](s []T) {
	rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
}
