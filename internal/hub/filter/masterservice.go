package filter

import (
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// masterService shows the kubelet the hub's address in the Service
// default/kubernetes. The kubelet makes the variables KUBERNETES_SERVICE_HOST
// and _PORT of it, so that a pod's InClusterConfig leads to the hub.
//
// As in OpenYurt, but only while the hub has a certificate of the cluster for
// that address: without it pods would refuse what they find there.
func masterService() *Filter {
	return &Filter{
		Name: "masterservice", Components: []string{"kubelet"},
		Resources: []schema.GroupResource{{Resource: "services"}},
		uses:      func(s *State) [2]any { return [2]any{s.Hub} },
		show: func(s *State, o Object) ([]byte, bool, error) {
			if s.Hub == nil {
				return o.Data, true, nil
			}
			if namespace, name, err := o.name(); err != nil || namespace != "default" || name != "kubernetes" {
				return o.Data, true, err
			}
			out, err := o.edit(s.Hub.service, s.Hub.jsonService)
			return out, true, err
		},
	}
}

// Numbers of the fields of a Service.
const (
	specClusterIP     protowire.Number = 3
	specClusterIPs    protowire.Number = 18
	servicePortName   protowire.Number = 1
	servicePortNumber protowire.Number = 3
)

func (h *Hub) service(object []byte) ([]byte, error) {
	return rewrite(object, func(f field) ([]byte, error) {
		if f.num != serviceSpec {
			return f.whole, nil
		}
		first := true
		spec, err := rewrite(f.value, func(f field) ([]byte, error) {
			switch f.num {
			case specClusterIP:
				return bytesField(f.num, []byte(h.Host)), nil
			case specClusterIPs: // the first is the one above
				if first {
					first = false
					return bytesField(f.num, []byte(h.Host)), nil
				}
			case specPorts:
				port, err := h.port(f.value)
				return bytesField(f.num, port), err
			}
			return f.whole, nil
		})
		return bytesField(f.num, spec), err
	})
}

func (h *Hub) port(port []byte) ([]byte, error) {
	name, err := text(port, servicePortName)
	if err != nil || name != "https" {
		return port, err
	}
	return rewrite(port, func(f field) ([]byte, error) {
		if f.num != servicePortNumber {
			return f.whole, nil
		}
		return numberField(f.num, uint64(h.Port)), nil //nolint:gosec // a port
	})
}

func (h *Hub) jsonService(object tree) bool {
	spec, ok := object["spec"].(tree)
	if !ok {
		return false
	}
	spec["clusterIP"] = h.Host
	if ips, ok := spec["clusterIPs"].([]any); ok && len(ips) > 0 {
		ips[0] = h.Host
	}
	for port := range items(spec, "ports") {
		if port["name"] == "https" {
			port["port"] = h.Port
		}
	}
	return true
}
