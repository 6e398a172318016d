package playground

import (
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"

	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/playground/network"
)

// DefaultTopologyYAML is the topology of a playground for which none is given:
// one cloud machine and two edge pools with two machines each.
//
//go:embed topology.yaml
var DefaultTopologyYAML string

// Roles of a machine.
const (
	RoleCloud = "cloud"
	RoleEdge  = "edge"
)

// Topology says which machines there are and how they are joined.
type Topology struct {
	Name        string    `json:"name"`
	WAN         string    `json:"wan"`
	Host        string    `json:"host"`
	Port        int       `json:"port"`
	ServiceCIDR string    `json:"serviceCIDR"`
	ClusterCIDR string    `json:"clusterCIDR"`
	DNS         string    `json:"dns"`
	Pools       []Pool    `json:"pools"`
	Machines    []Machine `json:"machines"`
}

// Pool is a network behind a router of its own.
type Pool struct {
	Name   string `json:"name"`
	Subnet string `json:"subnet"`
	NAT    bool   `json:"nat"`
}

// Machine is one node of the cluster.
type Machine struct {
	Name    string `json:"name"`
	Pool    string `json:"pool"`
	Role    string `json:"role"`
	Address string `json:"address"`
	PodCIDR string `json:"podCIDR"`
	Hub     bool   `json:"hub"`
}

// DefaultTopology returns the topology of [DefaultTopologyYAML].
func DefaultTopology() (Topology, error) { return ParseTopology([]byte(DefaultTopologyYAML)) }

// ReadTopology reads a topology from a YAML file; the empty path means the
// default topology.
func ReadTopology(path string) (Topology, error) {
	if path == "" {
		return DefaultTopology()
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return Topology{}, fmt.Errorf("read topology: %w", err)
	}
	t, err := ParseTopology(content)
	if err != nil {
		return Topology{}, fmt.Errorf("topology %s: %w", path, err)
	}
	return t, nil
}

// ParseTopology parses and validates a topology. Fields that it does not know
// are errors, because a misspelt field would silently be its default.
func ParseTopology(content []byte) (Topology, error) {
	var t Topology
	if err := yaml.UnmarshalStrict(content, &t); err != nil {
		return Topology{}, err
	}
	if t.Port == 0 {
		t.Port = 6443
	}
	return t, t.Validate()
}

// Validate returns every fault of the topology. Each names its field and says
// what would be right.
func (t Topology) Validate() error {
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}
	prefix := func(field, value string) {
		if p, err := netip.ParsePrefix(value); err != nil || !p.Addr().Is4() {
			bad(field, "%q is not an IPv4 network; write it as 10.90.0.0/24", value)
		}
	}
	address := func(field, value string) {
		if a, err := netip.ParseAddr(value); err != nil || !a.Is4() {
			bad(field, "%q is not an IPv4 address; write it as 10.90.0.1", value)
		}
	}
	prefix("wan", t.WAN)
	address("host", t.Host)
	prefix("serviceCIDR", t.ServiceCIDR)
	prefix("clusterCIDR", t.ClusterCIDR)
	address("dns", t.DNS)
	if t.Port < 1 || t.Port > 65535 {
		bad("port", "%d is not a port; use 6443", t.Port)
	}
	pools := map[string]bool{}
	for i, p := range t.Pools {
		prefix(fmt.Sprintf("pools[%d].subnet", i), p.Subnet)
		pools[p.Name] = true
	}
	node := regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	for i, m := range t.Machines {
		field := func(name string) string { return fmt.Sprintf("machines[%d].%s", i, name) }
		if !node.MatchString(m.Name) || len(m.Name) > 63 {
			bad(field("name"), "%q is not a node name; use small letters, digits and dashes", m.Name)
		}
		if !pools[m.Pool] {
			bad(field("pool"), "there is no pool %q; add it to pools or use one of them", m.Pool)
		}
		if m.Role != RoleCloud && m.Role != RoleEdge {
			bad(field("role"), "%q is not known; use cloud or edge", m.Role)
		}
		address(field("address"), m.Address)
		prefix(field("podCIDR"), m.PodCIDR)
	}
	if _, ok := t.serviceRouter(); !ok {
		bad("machines", "none has role cloud, and yurt-manager runs there; add one")
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	cluster := netip.MustParsePrefix(t.ClusterCIDR)
	for i, m := range t.Machines {
		if pod := netip.MustParsePrefix(m.PodCIDR); !cluster.Contains(pod.Addr()) || pod.Bits() < cluster.Bits() {
			bad(fmt.Sprintf("machines[%d].podCIDR", i), "%s is not within clusterCIDR %s", pod, cluster)
		}
	}
	if services := netip.MustParsePrefix(t.ServiceCIDR); !services.Contains(netip.MustParseAddr(t.DNS)) {
		bad("dns", "%s is not within serviceCIDR %s", t.DNS, services)
	}
	// What is left is for the network to judge: overlaps, room, free names.
	return errors.Join(append(errs, t.plan().Validate())...)
}

// plan is the network of the topology, which must be free of syntax errors.
func (t Topology) plan() network.Plan {
	p := network.Plan{
		Prefix: t.Name,
		WAN:    netip.MustParsePrefix(t.WAN),
		Host:   netip.MustParseAddr(t.Host),
	}
	for _, pool := range t.Pools {
		site := network.Site{Name: pool.Name, Subnet: netip.MustParsePrefix(pool.Subnet), NAT: pool.NAT}
		for _, m := range t.Machines {
			if m.Pool == pool.Name {
				site.Machines = append(site.Machines, network.Host{
					Name:    m.Name,
					Addr:    netip.MustParseAddr(m.Address),
					PodCIDR: netip.MustParsePrefix(m.PodCIDR),
				})
			}
		}
		p.Sites = append(p.Sites, site)
	}
	if via, ok := t.serviceRouter(); ok {
		p.ServiceCIDR, p.ServiceVia = netip.MustParsePrefix(t.ServiceCIDR), via
	}
	return p
}

// serviceRouter is the machine through which the control plane reaches
// services: webhooks and aggregated APIs are services.
func (t Topology) serviceRouter() (string, bool) {
	i := slices.IndexFunc(t.Machines, func(m Machine) bool { return m.Role == RoleCloud })
	if i < 0 {
		return "", false
	}
	return t.Machines[i].Name, true
}

// poolType is the type of the NodePool of a pool: cloud where a machine is.
func (t Topology) poolType(name string) string {
	for _, m := range t.Machines {
		if m.Pool == name && m.Role == RoleCloud {
			return RoleCloud
		}
	}
	return RoleEdge
}

// Machine returns the machine of a name.
func (t Topology) Machine(name string) (Machine, bool) {
	i := slices.IndexFunc(t.Machines, func(m Machine) bool { return m.Name == name })
	if i < 0 {
		return Machine{}, false
	}
	return t.Machines[i], true
}
