package filter

import (
	"net/netip"

	"google.golang.org/protobuf/encoding/protowire"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// forwardKubeSvcTraffic shows kube-proxy the hub as the one endpoint of the
// Service default/kubernetes, so that pods that use its name or cluster address
// find the API at the hub.
//
// As in OpenYurt, but only while the hub has a certificate that pods trust and
// that names the Service's cluster address, and for v1 Endpoints as well. A slice of the other address family is left empty.
func forwardKubeSvcTraffic() *Filter {
	return &Filter{
		Name: "forwardkubesvctraffic", Components: []string{"kube-proxy"}, EdgeOnly: true,
		Resources: []schema.GroupResource{{Group: "discovery.k8s.io", Resource: "endpointslices"}, {Resource: "endpoints"}},
		uses:      func(s *State) [2]any { return [2]any{s.Hub} },
		show: func(s *State, o Object) ([]byte, bool, error) {
			if s.Hub == nil || !s.Hub.Behind {
				return o.Data, true, nil
			}
			if service, err := o.service(); err != nil || service != "default/kubernetes" {
				return o.Data, true, err
			}
			if o.Resource.Resource == "endpoints" {
				out, err := o.edit(s.Hub.subsets, s.Hub.jsonSubsets)
				return out, true, err
			}
			out, err := o.edit(s.Hub.slice, s.Hub.jsonSlice)
			return out, true, err
		},
	}
}

const (
	slicePorts     protowire.Number = 3
	sliceFamily    protowire.Number = 4
	endpointPort   protowire.Number = 3 // the number of an EndpointPort of a slice
	endpointIP     protowire.Number = 1 // of an Endpoint or an EndpointAddress
	endpointReady  protowire.Number = 2
	conditionReady protowire.Number = 1

	subsetPorts    protowire.Number = 3
	endpointsPort  protowire.Number = 2 // the number of an EndpointPort of v1 Endpoints
	jsonFamilyName                  = "addressType"
)

func (h *Hub) family() discoveryv1.AddressType {
	if ip, err := netip.ParseAddr(h.Host); err == nil && ip.Is6() {
		return discoveryv1.AddressTypeIPv6
	}
	return discoveryv1.AddressTypeIPv4
}

func (h *Hub) slice(object []byte) ([]byte, error) {
	family, err := text(object, sliceFamily)
	if err != nil {
		return object, err
	}
	out, err := rewrite(object, func(f field) ([]byte, error) {
		switch f.num {
		case sliceEndpoints:
			return nil, nil
		case slicePorts:
			port, err := setNumber(f.value, endpointPort, h.Port)
			return bytesField(f.num, port), err
		}
		return f.whole, nil
	})
	if err != nil || discoveryv1.AddressType(family) != h.family() {
		return out, err
	}
	endpoint := bytesField(endpointIP, []byte(h.Host))
	endpoint = append(endpoint, bytesField(endpointReady, numberField(conditionReady, 1))...)
	return append(out, bytesField(sliceEndpoints, endpoint)...), nil
}

// setNumber returns a message with another number in a field.
func setNumber(message []byte, num protowire.Number, to int32) ([]byte, error) {
	return rewrite(message, func(f field) ([]byte, error) {
		if f.num != num {
			return f.whole, nil
		}
		return numberField(num, uint64(to)), nil //nolint:gosec // a port
	})
}

func (h *Hub) jsonSlice(object tree) bool {
	for port := range items(object, "ports") {
		port["port"] = h.Port
	}
	object["endpoints"] = []any{}
	if object[jsonFamilyName] == string(h.family()) {
		object["endpoints"] = []any{tree{"addresses": []any{h.Host}, "conditions": tree{"ready": true}}}
	}
	return true
}

func (h *Hub) subsets(object []byte) ([]byte, error) {
	return rewrite(object, func(f field) ([]byte, error) {
		if f.num != endpointsSubsets {
			return f.whole, nil
		}
		subset, err := rewrite(f.value, func(f field) ([]byte, error) {
			switch f.num {
			case subsetReady, subsetNotReady:
				return nil, nil
			case subsetPorts:
				port, err := setNumber(f.value, endpointsPort, h.Port)
				return bytesField(f.num, port), err
			}
			return f.whole, nil
		})
		subset = append(subset, bytesField(subsetReady, bytesField(endpointIP, []byte(h.Host)))...)
		return bytesField(f.num, subset), err
	})
}

func (h *Hub) jsonSubsets(object tree) bool {
	for subset := range items(object, "subsets") {
		delete(subset, "notReadyAddresses")
		subset["addresses"] = []any{tree{"ip": h.Host}}
		for port := range items(subset, "ports") {
			port["port"] = h.Port
		}
	}
	return true
}
