package servicetopology

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// Conditions of a node by which hubs say that they are there. OpenYurt's writes
// autonomy alone, ours both.
const (
	autonomy = "Autonomy"
	ours     = "YurtHubLinkReady"
)

// foreign reports whether a hub of OpenYurt serves the node. One from before
// autonomy proxies is not known.
func foreign(n *corev1.Node) bool {
	has := func(t corev1.NodeConditionType) bool {
		return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == t })
	}
	return has(autonomy) && !has(ours)
}

// byPool reports whether the value of the annotation keeps traffic in a pool.
func byPool(topology string) bool {
	return topology == apps.TopologyPool || topology == apps.TopologyZone
}

// sites are the pools of a cluster as hubs know them.
type sites struct {
	pool  map[string]string // by node
	nodes map[string]string // by pool, in order
}

func newSites(pools []v1beta2.NodePool) sites {
	s := sites{map[string]string{}, map[string]string{}}
	for i := range pools {
		p := &pools[i]
		s.nodes[p.Name] = strings.Join(slices.Sorted(slices.Values(p.Status.Nodes)), ",")
		for _, n := range p.Status.Nodes {
			s.pool[n] = p.Name
		}
	}
	return s
}

// mark returns the value of the trigger for a slice. It is another one exactly
// when some hub may show another part of the same endpoints: by the Service's
// annotation, or by the nodes of the pools that the endpoints are in. It is
// empty where no hub leaves anything out.
func mark(topology string, slice *discoveryv1.EndpointSlice, s sites) string {
	if topology != apps.TopologyNode && !byPool(topology) {
		return ""
	}
	lines := []string{topology}
	if byPool(topology) {
		var pools []string
		for i := range slice.Endpoints {
			if n := slice.Endpoints[i].NodeName; n != nil {
				pools = append(pools, s.pool[*n])
			}
		}
		slices.Sort(pools)
		for _, pool := range slices.Compact(pools) {
			lines = append(lines, pool+" "+s.nodes[pool])
		}
	}
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	return hex.EncodeToString(sum[:8])
}
