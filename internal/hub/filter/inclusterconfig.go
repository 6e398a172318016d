package filter

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// inClusterConfig takes the kubeconfig out of the configuration of a kube-proxy
// that kubeadm set up, so that it finds the API as any pod does: at the hub.
//
// As in OpenYurt, but only while masterservice leads pods to the hub: before,
// kube-proxy would look for the API behind a cluster address that it has yet to
// set up itself.
func inClusterConfig() *Filter {
	return &Filter{
		Name: "inclusterconfig", Components: []string{"kubelet"},
		Resources: []schema.GroupResource{{Resource: "configmaps"}},
		uses:      func(s *State) [2]any { return [2]any{s.Hub} },
		show: func(s *State, o Object) ([]byte, bool, error) {
			if s.Hub == nil {
				return o.Data, true, nil
			}
			if namespace, name, err := o.name(); err != nil || namespace != "kube-system" || name != "kube-proxy" {
				return o.Data, true, err
			}
			out, err := o.edit(func(object []byte) ([]byte, error) {
				return rewrite(object, func(f field) ([]byte, error) {
					if f.num != configMapData {
						return f.whole, nil
					}
					key, value, err := pair(f.value)
					if err != nil || string(key) != proxyConfig {
						return f.whole, err
					}
					entry, err := inside(f.value, entryValue, func([]byte) ([]byte, error) { return []byte(withoutKubeconfig(string(value))), nil })
					return bytesField(f.num, entry), err
				})
			}, func(object tree) bool {
				data, _ := object["data"].(tree)
				config, ok := data[proxyConfig].(string)
				if ok {
					data[proxyConfig] = withoutKubeconfig(config)
				}
				return ok
			})
			return out, true, err
		},
	}
}

const (
	configMapData protowire.Number = 2
	entryValue    protowire.Number = 2 // of an entry of a map
	proxyConfig                    = "config.conf"
)

// withoutKubeconfig comments out the line that names a kubeconfig.
func withoutKubeconfig(config string) string {
	lines := strings.Split(config, "\n")
	for i, line := range lines {
		if text := strings.TrimLeft(line, " \t"); strings.HasPrefix(text, "kubeconfig:") {
			lines[i] = line[:len(line)-len(text)] + "#" + text
		}
	}
	return strings.Join(lines, "\n")
}
