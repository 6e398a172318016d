package nameserver

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// key names an object in its namespace.
type key struct{ namespace, name string }

// service is what the index holds of a Service. It is never changed.
type service struct {
	ips      []netip.Addr // none: headless, or external
	external string       // the name that it stands for
	ports    ports
	headless bool
}

// slice is what the index holds of an EndpointSlice. It is never changed.
type slice struct {
	service key
	ports   ports
	// addrs are the ready endpoints' addresses, one after the other, of four
	// bytes or of sixteen.
	addrs string
	wide  bool
	hosts []string // their names, "": by its address; nil: all are
}

// each calls fn for every ready endpoint.
func (s *slice) each(fn func(addr netip.Addr, host string)) {
	size := 4
	if s.wide {
		size = 16
	}
	for i := 0; (i+1)*size <= len(s.addrs); i++ {
		addr, _ := netip.AddrFromSlice([]byte(s.addrs[i*size : (i+1)*size])) // of a right size
		host := ""
		if s.hosts != nil {
			host = s.hosts[i]
		}
		fn(addr, host)
	}
}

// label is an endpoint's own name below its Service's.
func label(addr netip.Addr, host string) string {
	if host != "" {
		return strings.ToLower(host)
	}
	return strings.NewReplacer(".", "-", ":", "-").Replace(addr.String())
}

// ports are named ports as text, protocol/number/name: many Services have the
// same.
type ports string

type port struct {
	protocol, name string
	number         uint16 // 0: none, or any
}

func (p ports) each(fn func(port)) {
	for line := range strings.Lines(string(p)) {
		part := strings.SplitN(strings.TrimSuffix(line, "\n"), "/", 3)
		number, _ := strconv.ParseUint(part[1], 10, 16) // it was written by portsText
		fn(port{protocol: part[0], number: uint16(number), name: part[2]})
	}
}

func portsText(all []port) ports {
	var text strings.Builder
	for _, p := range all {
		text.WriteString(strings.ToLower(p.protocol) + "/" + strconv.Itoa(int(p.number)) + "/" + p.name + "\n")
	}
	return ports(shared(text.String()))
}

// shared returns a string of which there is one copy.
func shared(s string) string { return unique.Make(s).Value() }

// named is what is known of one name: the Service, and its slices, which may
// come first.
type named struct {
	service *service
	slices  []*slice // never changed in place
}

// index is what names are answered from.
type index struct {
	mu       sync.RWMutex // guards the following
	names    map[key]*named
	slices   map[key]*slice // by their own names
	services map[string]int // in each namespace
	reverse  map[netip.Addr]key
	changed  time.Time
}

func newIndex() *index {
	return &index{
		names: map[key]*named{}, slices: map[key]*slice{}, services: map[string]int{},
		reverse: map[netip.Addr]key{}, changed: time.Now(),
	}
}

// at returns what is at a name. It stays as it is.
func (x *index) at(k key) (*service, []*slice) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if n := x.names[k]; n != nil {
		return n.service, n.slices
	}
	return nil, nil
}

// has reports whether a namespace holds a Service.
func (x *index) has(namespace string) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.services[namespace] > 0
}

// size returns how many Services and slices there are.
func (x *index) size() (services, endpointSlices int) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, n := range x.services {
		services += n
	}
	return services, len(x.slices)
}

// serial is the zone's version: when it last changed.
func (x *index) serial() uint32 {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return uint32(x.changed.Unix()) //nolint:gosec // serials wrap by design
}

// behind returns the names that an address has: of a Service, else of the
// endpoints there, at most so many. Who asks that is a person or a log, so
// that no memory is spent on finding endpoints.
func (x *index) behind(addr netip.Addr, most int) (of key, labels []string, keys []key) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if k, ok := x.reverse[addr]; ok {
		return k, nil, nil
	}
	for _, s := range x.slices {
		if s.wide == addr.Is4() {
			continue
		}
		s.each(func(at netip.Addr, host string) {
			if at == addr && len(labels) < most {
				labels, keys = append(labels, label(at, host)), append(keys, s.service)
			}
		})
	}
	return key{}, labels, keys
}

// setService puts a Service in place of what is there; nil takes it away.
func (x *index) setService(k key, s *service) {
	x.mu.Lock()
	defer x.mu.Unlock()
	k = key{namespace: shared(k.namespace), name: shared(k.name)}
	n := x.names[k]
	if n == nil {
		if s == nil {
			return
		}
		n = &named{}
		x.names[k] = n
	}
	if n.service != nil {
		x.services[k.namespace]--
		for _, ip := range n.service.ips {
			if x.reverse[ip] == k {
				delete(x.reverse, ip)
			}
		}
	}
	n.service = s
	x.changed = time.Now()
	if s != nil {
		x.services[k.namespace]++
		for _, ip := range s.ips {
			x.reverse[ip] = k
		}
	}
	x.tidyLocked(k, n)
}

// setSlice puts a slice in place of what is there; nil takes it away.
func (x *index) setSlice(k key, s *slice) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.changed = time.Now()
	if old := x.slices[k]; old != nil {
		delete(x.slices, k)
		if n := x.names[old.service]; n != nil {
			n.slices = slices.DeleteFunc(slices.Clone(n.slices), func(in *slice) bool { return in == old })
			x.tidyLocked(old.service, n)
		}
	}
	if s == nil {
		return
	}
	k.namespace = shared(k.namespace)
	x.slices[k] = s
	n := x.names[s.service]
	if n == nil {
		n = &named{}
		x.names[s.service] = n
	}
	n.slices = append(slices.Clip(n.slices), s)
}

func (x *index) tidyLocked(k key, n *named) {
	if n.service == nil && len(n.slices) == 0 {
		delete(x.names, k)
	}
	if x.services[k.namespace] == 0 {
		delete(x.services, k.namespace)
	}
}

// keepServices takes away all Services but those in seen.
func (x *index) keepServices(seen map[key]struct{}) {
	for _, k := range x.held(func(yield func(key)) {
		for k, n := range x.names {
			if n.service != nil {
				yield(k)
			}
		}
	}, seen) {
		x.setService(k, nil)
	}
}

// keepSlices takes away all slices but those in seen.
func (x *index) keepSlices(seen map[key]struct{}) {
	for _, k := range x.held(func(yield func(key)) {
		for k := range x.slices {
			yield(k)
		}
	}, seen) {
		x.setSlice(k, nil)
	}
}

// held collects the keys that are not in seen.
func (x *index) held(all func(func(key)), seen map[key]struct{}) (out []key) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all(func(k key) {
		if _, ok := seen[k]; !ok {
			out = append(out, k)
		}
	})
	return out
}

// readService returns what the index holds of the Service.
func readService(in *corev1.Service) *service {
	out := &service{}
	var list []port
	for _, p := range in.Spec.Ports {
		list = append(list, port{protocol: string(p.Protocol), name: p.Name, number: uint16(p.Port)}) //nolint:gosec // the API bounds it
	}
	out.ports = portsText(list)
	if in.Spec.Type == corev1.ServiceTypeExternalName {
		if _, err := netip.ParseAddr(in.Spec.ExternalName); err == nil || in.Spec.ExternalName == "" {
			return nil // no name
		}
		out.external = in.Spec.ExternalName
		return out
	}
	ips := in.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{in.Spec.ClusterIP}
	}
	for _, text := range ips {
		if ip, err := netip.ParseAddr(text); err == nil {
			out.ips = append(out.ips, ip.Unmap())
		}
	}
	out.headless = in.Spec.ClusterIP == corev1.ClusterIPNone
	return out
}

// readSlice returns what the index holds of the EndpointSlice; nil: nothing.
func readSlice(in *discoveryv1.EndpointSlice) *slice {
	name := in.Labels[discoveryv1.LabelServiceName]
	if name == "" || in.AddressType == discoveryv1.AddressTypeFQDN {
		return nil
	}
	out := &slice{service: key{namespace: shared(in.Namespace), name: shared(name)}}
	var list []port
	for _, p := range in.Ports {
		one := port{protocol: string(corev1.ProtocolTCP)}
		if p.Protocol != nil {
			one.protocol = string(*p.Protocol)
		}
		if p.Name != nil {
			one.name = *p.Name
		}
		if p.Port != nil {
			one.number = uint16(*p.Port) //nolint:gosec // the API bounds it
		}
		list = append(list, one)
	}
	if len(list) == 0 { // of a headless Service, which need not have any
		list = []port{{}}
	}
	out.ports = portsText(list)
	out.wide = in.AddressType == discoveryv1.AddressTypeIPv6
	var addrs []byte
	var hosts []string
	named := false
	for _, e := range in.Endpoints {
		if e.Conditions.Ready != nil && !*e.Conditions.Ready {
			continue
		}
		host := ""
		if e.Hostname != nil {
			host = *e.Hostname
		}
		for _, text := range e.Addresses {
			ip, err := netip.ParseAddr(text)
			if err != nil || ip.Is4() == out.wide {
				continue
			}
			addrs, hosts = append(addrs, ip.AsSlice()...), append(hosts, host)
			named = named || host != ""
		}
	}
	out.addrs = string(addrs)
	if named {
		out.hosts = slices.Clip(hosts)
	}
	return out
}
