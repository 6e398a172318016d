package playground

import (
	"strings"
	"testing"
)

func TestDefaultTopology(t *testing.T) {
	top, err := DefaultTopology()
	if err != nil {
		t.Fatal(err)
	}
	edge := map[string]int{}
	for _, m := range top.Machines {
		if m.Role == RoleEdge && m.Hub {
			edge[m.Pool]++
		}
	}
	if len(top.Machines) != 5 || edge["hangzhou"] != 2 || edge["shanghai"] != 2 {
		t.Errorf("want one cloud machine and two pools of two hubs, got %+v", top.Machines)
	}
	if via, ok := top.serviceRouter(); !ok || via != "cloud-1" {
		t.Errorf("machine that routes services: want cloud-1, got %q", via)
	}
}

func TestTopologyFaultsNameTheFieldAndTheCure(t *testing.T) {
	for _, tc := range []struct{ name, old, new, want string }{
		{"unknown field", "nat: false", "nta: false", `unknown field "nta"`},
		{"network", "wan: 10.90.0.0/24", "wan: 10.90.0.0", `wan: "10.90.0.0" is not an IPv4 network; write it as 10.90.0.0/24`},
		{"address", "address: 10.90.1.11", "address: here", `machines[0].address: "here" is not an IPv4 address; write it as 10.90.0.1`},
		{"port", "port: 6443", "port: 70000", "port: 70000 is not a port; use 6443"},
		{"pool", "pool: cloud", "pool: sky", `machines[0].pool: there is no pool "sky"; add it to pools or use one of them`},
		{"role", "role: cloud", "role: boss", `machines[0].role: "boss" is not known; use cloud or edge`},
		{"name", "name: cloud-1", "name: Cloud_1", `machines[0].name: "Cloud_1" is not a node name; use small letters, digits and dashes`},
		{"pod CIDR outside", "podCIDR: 10.244.1.0/24", "podCIDR: 10.9.1.0/24", "machines[0].podCIDR: 10.9.1.0/24 is not within clusterCIDR 10.244.0.0/16"},
		{"DNS outside", "dns: 10.96.0.10", "dns: 10.97.0.10", "dns: 10.97.0.10 is not within serviceCIDR 10.96.0.0/16"},
		{"prefix", "name: yurt\n", "name: my-playground\n", "want up to eight lower case letters and digits"},
		{"address twice", "address: 10.90.11.12", "address: 10.90.11.11", "machine hangzhou-2: 10.90.11.11 is not a free address"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := strings.Replace(DefaultTopologyYAML, tc.old, tc.new, 1)
			if text == DefaultTopologyYAML {
				t.Fatalf("%q is not in the default topology", tc.old)
			}
			_, err := ParseTopology([]byte(text))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("want an error with %q, got %v", tc.want, err)
			}
		})
	}
}

func TestTopologyWithoutMachines(t *testing.T) {
	head, _, _ := strings.Cut(DefaultTopologyYAML, "machines:")
	_, err := ParseTopology([]byte(head))
	if err == nil || !strings.Contains(err.Error(), "machines: none has role cloud, and yurt-manager runs there; add one") {
		t.Errorf("want an error about machines, got %v", err)
	}
}
