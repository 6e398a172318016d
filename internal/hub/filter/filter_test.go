package filter

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	discoveryv1beta1 "k8s.io/api/discovery/v1beta1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

var update = flag.Bool("update", false, "rewrite the expected halves of testdata")

// message is an object that has a Protobuf form.
type message interface {
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
}

func empty(r schema.GroupVersionResource) message {
	switch r.Version + "/" + r.Resource {
	case "v1/services":
		return &corev1.Service{}
	case "v1/endpoints":
		return &corev1.Endpoints{} //nolint:staticcheck // old clients read them
	case "v1/configmaps":
		return &corev1.ConfigMap{}
	case "v1/pods":
		return &corev1.Pod{}
	case "v1/endpointslices":
		return &discoveryv1.EndpointSlice{}
	case "v1beta1/endpointslices":
		return &discoveryv1beta1.EndpointSlice{}
	}
	panic("no such resource: " + r.String())
}

// golden is one file of testdata: a state, and what components see of objects.
type golden struct {
	State struct {
		Hub      string            `json:"hub"`
		Node     string            `json:"node"`
		Pool     string            `json:"pool"`
		Nodes    []string          `json:"nodes"`
		Topology map[string]string `json:"topology"`
		Cloud    bool              `json:"cloud"`
		Unnamed  bool              `json:"unnamed"`
	} `json:"state"`
	Component string `json:"component"`
	Resource  string `json:"resource"`
}

func (g golden) state() *State {
	s := &State{Services: &Services{Topology: g.State.Topology}}
	if g.State.Hub != "" {
		s.Hub = &Hub{Host: g.State.Hub, Port: 10268, Behind: !g.State.Unnamed}
	}
	s.Place = &Place{Node: g.State.Node, Pool: g.State.Pool}
	if g.State.Nodes != nil {
		s.Place.Nodes = map[string]struct{}{}
		for _, n := range g.State.Nodes {
			s.Place.Nodes[n] = struct{}{}
		}
	}
	return s
}

func (g golden) gvr() schema.GroupVersionResource {
	parts := strings.Split(g.Resource, "/")
	r := schema.GroupVersionResource{Version: parts[len(parts)-2], Resource: parts[len(parts)-1]}
	if len(parts) == 3 {
		r.Group = parts[0]
	}
	return r
}

// TestGolden goes through testdata: each file has, separated by ---, what there
// is, an object, and the object as the component sees it, "gone" if it does
// not. Both encodings must agree, and keep what nobody knows.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	tested := map[string]bool{}
	for _, file := range files {
		name := filepath.Base(filepath.Dir(file))
		tested[name] = true
		t.Run(strings.TrimSuffix(strings.TrimPrefix(file, "testdata/"), ".yaml"), func(t *testing.T) { testGolden(t, file) })
	}
	for _, f := range All() {
		if !tested[f.Name] {
			t.Errorf("filter %s has no cases in testdata", f.Name)
		}
	}
}

func testGolden(t *testing.T, file string) {
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(content), "\n---\n")
	if len(parts) != 3 {
		t.Fatalf("%d parts, want 3", len(parts))
	}
	var g golden
	if err := yaml.UnmarshalStrict([]byte(parts[0]), &g); err != nil {
		t.Fatal(err)
	}
	object, err := yaml.YAMLToJSON([]byte(parts[1]))
	if err != nil {
		t.Fatal(err)
	}
	s, r := g.state(), g.gvr()
	reader := New(Config{Cloud: g.State.Cloud}, s, nil).Reader(g.Component)
	before := slices.Clone(object)
	shown, ok := reader.Show(r, replica.Kind{Encoding: wire.JSON}, object)
	if !bytes.Equal(before, object) {
		t.Error("the object itself was changed")
	}
	got := "gone\n"
	if ok {
		text, err := yaml.JSONToYAML(shown)
		if err != nil {
			t.Fatal(err)
		}
		got = string(text)
	}
	if *update {
		parts[2] = got
		if err := os.WriteFile(file, []byte(strings.Join(parts, "\n---\n")), 0o600); err != nil {
			t.Fatal(err)
		}
	} else if got != parts[2] {
		t.Errorf("JSON shows\n%swant\n%s", got, parts[2])
	}

	in, typed := empty(r), empty(r)
	if err := json.Unmarshal(object, in); err != nil {
		t.Fatal(err)
	}
	data, err := in.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	strange := estrange(data, 3)
	before = slices.Clone(strange)
	seen, seenOK := reader.Show(r, replica.Kind{Encoding: wire.Protobuf}, strange)
	if !bytes.Equal(before, strange) {
		t.Error("the object itself was changed")
	}
	if seenOK != ok {
		t.Fatalf("shown in JSON: %v, in Protobuf: %v", ok, seenOK)
	}
	if !ok {
		return
	}
	if err := json.Unmarshal(shown, typed); err != nil {
		t.Fatal(err)
	}
	want, err := typed.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	out, have := empty(r), empty(r) // without type, as Protobuf
	if err := out.Unmarshal(want); err != nil {
		t.Fatal(err)
	}
	if err := have.Unmarshal(seen); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(normal(t, have), normal(t, out)) {
		t.Errorf("Protobuf shows\n%s\nJSON\n%s", normal(t, have), normal(t, out))
	}
	// What is left has kept what nobody knows, at each level; the endpoint that
	// forwardkubesvctraffic makes has nothing of that kind.
	lack := bytes.Count(estrange(want, 3), stranger) - bytes.Count(seen, stranger)
	if made := strings.HasPrefix(file, "testdata/forwardkubesvctraffic"); lack != 0 && (!made || lack < 0 || lack > 2) {
		t.Errorf("%d unknown fields are lost", lack)
	}
}

func normal(t *testing.T, m message) string {
	t.Helper()
	text, err := yaml.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// stranger is a field that no version of Kubernetes has.
var stranger = bytesField(9999, []byte("from the future"))

// estrange puts an unknown field into a message and into those within it, so
// deep.
func estrange(m []byte, deep int) []byte {
	out, err := rewrite(m, func(f field) ([]byte, error) {
		if deep > 0 && isMessage(f) {
			return bytesField(f.num, estrange(f.value, deep-1)), nil
		}
		return f.whole, nil
	})
	if err != nil {
		panic(err)
	}
	return append(out, stranger...)
}

// isMessage guesses: text does not parse as fields, mostly.
func isMessage(f field) bool {
	if len(f.value) < 4 {
		return false
	}
	for _, b := range f.value {
		if b < 0x20 {
			return fields(f.value, func(in field) error {
				if in.num > 100 {
					return fmt.Errorf("field %d", in.num)
				}
				return nil
			}) == nil
		}
	}
	return false
}

func TestComponent(t *testing.T) {
	for agent, want := range map[string]string{
		"kubelet/v1.36.0 (linux/amd64) kubernetes/abc": "kubelet", "CoreDNS/1.12": "coredns", "": "", "curl": "curl",
	} {
		if got := Component(agent); got != want {
			t.Errorf("%q: %q", agent, got)
		}
	}
}

func TestTable(t *testing.T) {
	slices := schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
	pods := schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	s := &State{}
	extra := Extra(map[string]string{"servicetopology": " Traefik, ,kube-proxy", "unknown": "x", "cache_agents": "*", "filter_servicetopology": "envoy/endpointslices#list;watch"})
	table := New(Config{}, s, extra)
	for component, want := range map[string]bool{"kube-proxy": true, "coredns": true, "traefik": true, "envoy": true, "kubectl": false, "x": false} {
		if got := table.Filters(component, slices); got != want {
			t.Errorf("%s: %v", component, got)
		}
	}
	if table.Filters("kube-proxy", pods) {
		t.Error("pods are filtered for kube-proxy")
	}
	if n := testing.AllocsPerRun(100, func() { table.Filters(Component("kubectl/v1.36"), slices) }); n > 0 {
		t.Errorf("to find that nothing is filtered takes %v allocations", n)
	}
	for name, c := range map[string]Config{"off": {Off: true}, "disabled": {Disabled: []string{"servicetopology", "forwardkubesvctraffic"}}} {
		if New(c, s, extra).Filters("kube-proxy", slices) {
			t.Errorf("%s: filtered", name)
		}
	}
	if err := (Config{Disabled: []string{"servicetopolgy"}}).Check(); err == nil || !strings.Contains(err.Error(), "servicetopology") {
		t.Errorf("a name that no filter has: %v", err)
	}
	if New(Config{}, s, extra).Reader("nobody") == nil {
		t.Error("nobody sees nothing")
	}

	// Readers differ where what their filters look at does.
	a := table.Reader("kube-proxy")
	b := New(Config{}, &State{Version: 7}, extra).Reader("kube-proxy")
	c := New(Config{}, &State{Place: &Place{}}, extra).Reader("kube-proxy")
	if !a.Same(slices, b) || a.Same(slices, c) || !a.Same(pods, c) || a.Same(slices, table.Reader("nobody")) {
		t.Error("readers that see the same differ, or others do not")
	}
}

func FuzzShow(f *testing.F) {
	s := golden{}.state()
	s.Hub = &Hub{Host: "169.254.2.1", Port: 10268, Behind: true}
	s.Place = &Place{Node: "edge-1", Pool: "p", Nodes: map[string]struct{}{"edge-1": {}, "edge-2": {}}}
	s.Services.Topology = map[string]string{"default/web": apps.TopologyPool, "default/db": apps.TopologyNode}
	files, err := filepath.Glob("testdata/*/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	resources := []string{"v1/services", "v1/endpoints", "v1/configmaps", "v1/pods", "discovery.k8s.io/v1/endpointslices", "discovery.k8s.io/v1beta1/endpointslices"}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		parts := strings.Split(string(content), "\n---\n")
		var g golden
		if err := yaml.Unmarshal([]byte(parts[0]), &g); err != nil {
			f.Fatal(err)
		}
		text, err := yaml.YAMLToJSON([]byte(parts[1]))
		if err != nil {
			f.Fatal(err)
		}
		which := uint8(slices.Index(resources, g.Resource)) //nolint:gosec // few
		f.Add(which, true, text)
		m := empty(g.gvr())
		if err := json.Unmarshal(text, m); err != nil {
			f.Fatal(err)
		}
		data, err := m.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(which, false, data)
	}
	table := New(Config{}, s, nil)
	f.Fuzz(func(t *testing.T, which uint8, text bool, object []byte) {
		g := golden{Resource: resources[int(which)%len(resources)]}
		k := replica.Kind{Encoding: wire.Protobuf}
		if text {
			k.Encoding = wire.JSON
		}
		for _, component := range table.Components() {
			before := slices.Clone(object)
			shown, ok := table.Reader(component).Show(g.gvr(), k, object)
			if !bytes.Equal(before, object) {
				t.Fatal("the object itself was changed")
			}
			again, okAgain := table.Reader(component).Show(g.gvr(), k, object)
			if ok != okAgain || !bytes.Equal(shown, again) {
				t.Fatal("it is shown otherwise the second time")
			}
			if !ok {
				continue
			}
			// What could be read still can.
			if text {
				if json.Valid(object) && !json.Valid(shown) {
					t.Fatalf("%q became %q", object, shown)
				}
			} else if m := empty(g.gvr()); m.Unmarshal(object) == nil && m.Unmarshal(shown) != nil {
				t.Fatalf("%x became %x", object, shown)
			}
			if twice, ok := table.Reader(component).Show(g.gvr(), k, shown); !ok || len(twice) > len(shown)+64 {
				t.Fatalf("what is shown is filtered again: %v", ok)
			}
		}
	})
}
