package filter

import (
	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// serviceTopology shows of a Service with openyurt.io/topologyKeys the
// endpoints of the same node, or of the nodes of the same pool. A node in no
// pool sees its own. Hints and zones of what is left stay, so that
// trafficDistribution goes on choosing among it.
//
// An endpoint without a node is in no pool. If it is a pod's it is left out;
// else it is an address that somebody wrote down, and stays.
//
// Unlike OpenYurt's it holds for v1 Endpoints as well. As there, nothing is
// left out while the Service or the nodes of the pool are not known.
func serviceTopology() *Filter {
	return &Filter{
		Name: "servicetopology", Components: []string{"kube-proxy", "coredns", "nginx-ingress-controller"},
		Resources: []schema.GroupResource{{Resource: "endpoints"}, {Group: "discovery.k8s.io", Resource: "endpointslices"}},
		uses:      func(s *State) [2]any { return [2]any{s.Place, s.Services} },
		show: func(s *State, o Object) ([]byte, bool, error) {
			if s.Place == nil || s.Services == nil || len(s.Services.Topology) == 0 {
				return o.Data, true, nil
			}
			service, err := o.service()
			if err != nil {
				return o.Data, true, err
			}
			near := s.near(s.Services.Topology[service])
			if near == nil {
				return o.Data, true, nil
			}
			e := endpoints{near: near}
			if o.Resource.Resource == "endpoints" {
				out, err := o.edit(e.subsets, e.jsonSubsets)
				return out, true, err
			}
			out, err := o.edit(e.slice, e.jsonSlice)
			return out, true, err
		},
	}
}

// near returns which nodes are near by a value of the annotation; nil: all.
func (s *State) near(topology string) func(node []byte) bool {
	p := s.Place
	alone := func(node []byte) bool { return string(node) == p.Node }
	switch topology {
	case apps.TopologyNode:
		return alone
	case apps.TopologyPool, apps.TopologyZone:
		switch {
		case p.Pool == "":
			return alone
		case p.Nodes == nil:
			return nil
		}
		return func(node []byte) bool {
			_, ok := p.Nodes[string(node)]
			return ok || string(node) == p.Node // a node that has just joined is in no list yet
		}
	}
	return nil
}

// service returns the namespace and name of the Service that an object holds
// endpoints of.
func (o Object) service() (string, error) {
	if o.Encoding == wire.Protobuf {
		return o.protoService()
	}
	meta, err := wire.ReadMeta(o.Encoding, o.Data, false)
	if err != nil {
		return "", err
	}
	name := meta.Name
	if o.Resource.Resource != "endpoints" {
		name = meta.Labels[discoveryv1.LabelServiceName]
	}
	return meta.Namespace + "/" + name, nil
}

func (o Object) protoService() (string, error) {
	meta, err := bytesOf(o.Data, objectMetadata)
	if err != nil {
		return "", err
	}
	var namespace, name, label []byte
	for len(meta) > 0 {
		f, err := first(meta)
		if err != nil {
			return "", err
		}
		meta = meta[len(f.whole):]
		switch f.num {
		case metadataName:
			name = f.value
		case metadataNamespace:
			namespace = f.value
		case metadataLabels:
			key, value, err := pair(f.value)
			if err != nil {
				return "", err
			}
			if string(key) == discoveryv1.LabelServiceName {
				label = value
			}
		}
	}
	if o.Resource.Resource != "endpoints" {
		name = label
	}
	return string(namespace) + "/" + string(name), nil
}

// endpoints leaves out what is not near.
type endpoints struct{ near func(node []byte) bool }

func (e endpoints) keeps(node, kind string) bool {
	if node == "" {
		return kind != "Pod"
	}
	return e.near([]byte(node))
}

const (
	sliceEndpoints protowire.Number = 2

	endpointTarget   protowire.Number = 4
	endpointTopology protowire.Number = 5 // of old: a map
	endpointNode     protowire.Number = 6

	endpointsSubsets protowire.Number = 2

	subsetReady    protowire.Number = 1
	subsetNotReady protowire.Number = 2

	addressTarget protowire.Number = 2
	addressNode   protowire.Number = 4

	referenceKind protowire.Number = 1
)

func (e endpoints) slice(object []byte) ([]byte, error) {
	return drop(object, func(f field) (bool, error) {
		if f.num != sliceEndpoints {
			return true, nil
		}
		return e.has(f.value, endpointNode, endpointTarget, endpointTopology)
	})
}

// has reports whether an endpoint stays, by the numbers of its fields. It is
// what costs most in a list, and makes nothing for the heap.
func (e endpoints) has(endpoint []byte, node, target, topology protowire.Number) (bool, error) {
	var name, host, kind []byte
	for len(endpoint) > 0 {
		f, err := first(endpoint)
		if err != nil {
			return false, err
		}
		endpoint = endpoint[len(f.whole):]
		if f.value == nil {
			continue
		}
		switch f.num {
		case node:
			name = f.value
		case topology:
			key, value, err := pair(f.value)
			if err != nil {
				return false, err
			}
			if string(key) == corev1.LabelHostname {
				host = value
			}
		case target:
			if kind, err = bytesOf(f.value, referenceKind); err != nil {
				return false, err
			}
		}
	}
	if len(name) == 0 {
		name = host
	}
	if len(name) == 0 {
		return string(kind) != "Pod", nil
	}
	return e.near(name), nil
}

func (e endpoints) subsets(object []byte) ([]byte, error) {
	changed := false
	out, err := rewrite(object, func(f field) ([]byte, error) {
		if f.num != endpointsSubsets {
			return f.whole, nil
		}
		left := 0
		subset, err := drop(f.value, func(f field) (bool, error) {
			if f.num != subsetReady && f.num != subsetNotReady {
				return true, nil
			}
			keep, err := e.has(f.value, addressNode, addressTarget, 0)
			if keep {
				left++
			}
			return keep, err
		})
		if err != nil || len(subset) == len(f.value) {
			return f.whole, err
		}
		changed = true
		if left == 0 {
			return nil, nil // the API knows no subset without an address
		}
		return bytesField(f.num, subset), nil
	})
	if err != nil || !changed {
		return object, err
	}
	return out, nil
}

func (e endpoints) jsonKeeps(endpoint tree) bool {
	node, _ := endpoint["nodeName"].(string)
	for _, member := range []string{"deprecatedTopology", "topology"} {
		if topology, ok := endpoint[member].(tree); ok && node == "" {
			node, _ = topology[corev1.LabelHostname].(string)
		}
	}
	target, _ := endpoint["targetRef"].(tree)
	kind, _ := target["kind"].(string)
	return e.keeps(node, kind)
}

func (e endpoints) jsonSlice(object tree) bool { return keepItems(object, "endpoints", e.jsonKeeps) }

func (e endpoints) jsonSubsets(object tree) bool {
	changed := false
	keepItems(object, "subsets", func(subset tree) bool {
		lost, left := false, 0
		for _, name := range []string{"addresses", "notReadyAddresses"} {
			lost = keepItems(subset, name, e.jsonKeeps) || lost
			if list, _ := subset[name].([]any); len(list) > 0 {
				left += len(list)
			} else {
				delete(subset, name)
			}
		}
		changed = changed || lost
		return !lost || left > 0
	})
	return changed
}
