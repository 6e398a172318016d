package servicetopology

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/manager/nodepool"
)

// settled is how old a node is before its silence about its hub tells
// something: hubs of OpenYurt before 1.6 say nothing at all, and one of ours
// says it soon.
const settled = 10 * time.Minute

// foreign reports whether a hub of OpenYurt serves the node.
func foreign(n *corev1.Node, now time.Time) bool {
	return nodepool.ForeignHub(n) && (nodepool.HasCondition(n, nodepool.AutonomyCondition) || now.Sub(n.CreationTimestamp.Time) >= settled)
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
