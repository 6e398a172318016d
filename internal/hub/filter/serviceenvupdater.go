package filter

import (
	"slices"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// serviceEnvUpdater leads containers to the hub that say by variables of their
// own where the API is: what KUBERNETES_SERVICE_HOST and _PORT are set to in a
// pod is not taken from the Service.
//
// As in OpenYurt, for init and ephemeral containers as well, and only while the
// hub has a certificate that pods trust. A variable that takes its value from
// elsewhere stays.
func serviceEnvUpdater() *Filter {
	return &Filter{
		Name: "serviceenvupdater", Components: []string{"kubelet"}, EdgeOnly: true,
		Resources: []schema.GroupResource{{Resource: "pods"}},
		uses:      func(s *State) [2]any { return [2]any{s.Hub} },
		show: func(s *State, o Object) ([]byte, bool, error) {
			if s.Hub == nil {
				return o.Data, true, nil
			}
			e := &environment{values: map[string]string{
				"KUBERNETES_SERVICE_HOST": s.Hub.Host, "KUBERNETES_SERVICE_PORT": strconv.Itoa(int(s.Hub.Port)),
			}}
			out, err := o.edit(e.pod, e.jsonPod)
			if !e.changed {
				out = o.Data
			}
			return out, true, err
		},
	}
}

const (
	podSpec        protowire.Number = 2
	podContainers  protowire.Number = 2
	podInit        protowire.Number = 20
	podEphemeral   protowire.Number = 34
	ephemeralBody  protowire.Number = 1
	containerEnv   protowire.Number = 7
	variableName   protowire.Number = 1
	variableValue  protowire.Number = 2
	variableSource protowire.Number = 3
)

// environment sets variables that a container has.
type environment struct {
	values  map[string]string
	changed bool
}

func (e *environment) pod(object []byte) ([]byte, error) {
	return inside(object, podSpec, func(spec []byte) ([]byte, error) {
		return rewrite(spec, func(f field) ([]byte, error) {
			var (
				to  []byte
				err error
			)
			switch f.num {
			case podContainers, podInit:
				to, err = inside(f.value, containerEnv, e.variable)
			case podEphemeral:
				to, err = inside(f.value, ephemeralBody, func(c []byte) ([]byte, error) { return inside(c, containerEnv, e.variable) })
			default:
				return f.whole, nil
			}
			return bytesField(f.num, to), err
		})
	})
}

// inside rewrites one field of a message.
func inside(message []byte, num protowire.Number, to func([]byte) ([]byte, error)) ([]byte, error) {
	return rewrite(message, func(f field) ([]byte, error) {
		if f.num != num {
			return f.whole, nil
		}
		value, err := to(f.value)
		return bytesField(num, value), err
	})
}

func (e *environment) variable(variable []byte) ([]byte, error) {
	name, err := text(variable, variableName)
	if err != nil {
		return nil, err
	}
	value, ok := e.values[name]
	if !ok {
		return variable, nil
	}
	now, set, elsewhere := "", false, false
	err = fields(variable, func(f field) error {
		switch f.num {
		case variableValue:
			now, set = string(f.value), true
		case variableSource:
			elsewhere = true
		}
		return nil
	})
	if err != nil || elsewhere || now == value {
		return variable, err
	}
	e.changed = true
	if !set {
		return slices.Concat(variable, bytesField(variableValue, []byte(value))), nil
	}
	return inside(variable, variableValue, func([]byte) ([]byte, error) { return []byte(value), nil })
}

func (e *environment) jsonPod(object tree) bool {
	spec, _ := object["spec"].(tree)
	for _, list := range []string{"containers", "initContainers", "ephemeralContainers"} {
		for container := range items(spec, list) {
			for variable := range items(container, "env") {
				name, _ := variable["name"].(string)
				value, ok := e.values[name]
				if _, elsewhere := variable["valueFrom"]; ok && !elsewhere && variable["value"] != value {
					variable["value"] = value
					e.changed = true
				}
			}
		}
	}
	return e.changed
}
