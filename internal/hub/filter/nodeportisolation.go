package filter

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// NodePortListen is the annotation that says on the nodes of which pools the
// ports of a Service are open: names of pools, or * for all, or -name for all
// but one where * is given too. Empty, it says in none.
const NodePortListen = "nodeport.openyurt.io/listen"

// nodePortIsolation closes the node ports of a Service on nodes of pools that
// are not to have them. A node in no pool has all.
//
// OpenYurt leaves the whole Service out, and with it its cluster address, so
// that pods of the node cannot reach it at all. Here it is only the ports.
func nodePortIsolation() *Filter {
	return &Filter{
		Name: "nodeportisolation", Components: []string{"kube-proxy"},
		Resources: []schema.GroupResource{{Resource: "services"}},
		uses:      func(s *State) [2]any { return [2]any{s.Place} },
		show: func(s *State, o Object) ([]byte, bool, error) {
			if s.Place == nil || s.Place.Pool == "" {
				return o.Data, true, nil
			}
			listen, asked, err := o.annotation(NodePortListen)
			if err != nil || !asked || listens(listen, s.Place.Pool) {
				return o.Data, true, err
			}
			kind, err := o.serviceType()
			if err != nil || kind != corev1.ServiceTypeNodePort && kind != corev1.ServiceTypeLoadBalancer {
				return o.Data, true, err
			}
			out, err := o.edit(closePorts, closeJSONPorts)
			return out, true, err
		},
	}
}

// listens reports whether the ports are open in a pool, by the annotation.
func listens(annotation, pool string) bool {
	open := false
	for word := range strings.SplitSeq(annotation, ",") {
		switch strings.TrimSpace(word) {
		case "-" + pool:
			return false
		case pool, "*":
			open = true
		}
	}
	return open
}

// Numbers of the fields of a Service.
const (
	serviceSpec         protowire.Number = 2
	specPorts           protowire.Number = 1
	specType            protowire.Number = 4
	specHealthCheckPort protowire.Number = 12
	servicePortNodePort protowire.Number = 5
)

func closePorts(object []byte) ([]byte, error) {
	return rewrite(object, func(f field) ([]byte, error) {
		if f.num != serviceSpec {
			return f.whole, nil
		}
		spec, err := rewrite(f.value, func(f field) ([]byte, error) {
			switch f.num {
			case specHealthCheckPort:
				return nil, nil
			case specPorts:
				port, err := drop(f.value, func(f field) (bool, error) { return f.num != servicePortNodePort, nil })
				return bytesField(f.num, port), err
			}
			return f.whole, nil
		})
		return bytesField(f.num, spec), err
	})
}

func closeJSONPorts(object tree) bool {
	spec, ok := object["spec"].(tree)
	if !ok {
		return false
	}
	delete(spec, "healthCheckNodePort")
	for port := range items(spec, "ports") {
		delete(port, "nodePort")
	}
	return true
}

// serviceType is spec.type of a Service.
func (o Object) serviceType() (corev1.ServiceType, error) {
	var kind corev1.ServiceType
	_, err := o.edit(func(object []byte) ([]byte, error) {
		return object, fields(object, func(f field) error {
			if f.num != serviceSpec {
				return nil
			}
			found, err := text(f.value, specType)
			kind = corev1.ServiceType(found)
			return err
		})
	}, func(object tree) bool {
		spec, _ := object["spec"].(tree)
		found, _ := spec["type"].(string)
		kind = corev1.ServiceType(found)
		return false
	})
	return kind, err
}
