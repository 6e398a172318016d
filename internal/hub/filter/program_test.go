package filter

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// program compiles one for what kube-proxy sees of a resource.
func program(tb testing.TB, name string, resource schema.GroupVersionResource, text string) *Program {
	tb.Helper()
	af := &v1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: name, Generation: 1}}
	if err := yaml.UnmarshalStrict([]byte(text), &af.Spec); err != nil {
		tb.Fatal(err)
	}
	af.Spec.Components = []string{"kube-proxy"}
	af.Spec.Resources = []v1alpha1.AccessFilterResource{{Group: resource.Group, Version: resource.Version, Resource: resource.Resource}}
	f, err := accessfilter.Compile(af)
	if err != nil {
		tb.Fatal(err)
	}
	return &Program{Filter: f}
}

var (
	servicesV1 = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	slicesV1   = schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
	podsV1     = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
)

const nearEndpoints = `set: [{path: /endpoints, value: "object.endpoints.filter(e, e.nodeName in pool.nodes)"}]`

// TestProgramsInBothEncodings: a program makes the same of an object in
// Protobuf and in JSON, and both keep what nobody knows.
func TestProgramsInBothEncodings(t *testing.T) {
	slice := `
metadata: {name: web-1, namespace: shop, creationTimestamp: "2026-01-02T03:04:05Z", labels: {a: b}}
addressType: IPv4
endpoints:
- {addresses: [10.0.0.1], nodeName: edge-1, conditions: {ready: true}}
- {addresses: [10.0.0.2], nodeName: edge-9, conditions: {ready: true}}
ports: [{name: http, port: 80}]`
	service := `
metadata: {name: web, namespace: shop, labels: {tier: cloud}}
spec: {type: LoadBalancer, clusterIP: 10.0.0.1, ports: [{port: 80, targetPort: http, nodePort: 30080}, {port: 443, targetPort: 8443}]}`
	pod := `
metadata: {name: web, namespace: shop}
spec:
  containers: [{name: c, image: old, resources: {limits: {cpu: 500m}}, env: [{name: A, value: b}]}]
  volumes: [{name: v, emptyDir: {}}]`
	for name, tc := range map[string]struct {
		resource schema.GroupVersionResource
		object   string
		specs    []string
		want     string // empty: gone
		failed   string
	}{
		"drop":       {servicesV1, service, []string{`drop: object.metadata.labels.tier == 'cloud' && object.apiVersion == 'v1' && object.kind == 'Service'`}, "", ""},
		"keep":       {servicesV1, service, []string{`keep: object.spec.ports.exists(p, p.targetPort == 8443) && object.spec.ports.exists(p, p.targetPort == 'http')`}, service, ""},
		"near":       {slicesV1, slice, []string{nearEndpoints}, strings.Replace(slice, "\n- {addresses: [10.0.0.2], nodeName: edge-9, conditions: {ready: true}}", "", 1), ""},
		"dates":      {slicesV1, slice, []string{`drop: timestamp(object.metadata.creationTimestamp) < timestamp('2027-01-01T00:00:00Z')`}, "", ""},
		"set":        {servicesV1, service, []string{`set: [{path: /spec/ports/0/nodePort, value: '0'}, {path: /metadata/annotations/x, value: "string(size(object.spec.ports))"}, {path: /spec/ports/1/targetPort, value: "'https'"}]`}, strings.NewReplacer(", nodePort: 30080", "", "targetPort: 8443", "targetPort: https", "{tier: cloud}", "{tier: cloud}, annotations: {x: '2'}").Replace(service), ""},
		"remove":     {servicesV1, service, []string{`remove: [{path: /metadata/labels/tier}, {path: /spec/ports/1}, {path: /spec/clusterIPs}]`}, strings.NewReplacer(", labels: {tier: cloud}", "", ", {port: 443, targetPort: 8443}", "").Replace(service), ""},
		"deep":       {podsV1, pod, []string{`set: [{path: /spec/containers/0/image, value: "'mirror/' + object.spec.containers[0].image"}, {path: /spec/containers/0/resources/limits/cpu, value: "'1'"}, {path: /spec/volumes/0, value: "{'name': dyn('v'), 'hostPath': dyn({'path': '/x'})}"}]`}, strings.NewReplacer("image: old", "image: mirror/old", "500m", `"1"`, "emptyDir: {}", "hostPath: {path: /x}").Replace(pod), ""},
		"names":      {servicesV1, strings.Replace(service, "tier: cloud", "tier: cloud, c: '', a: '', b: ''", 1), []string{`set: [{path: /metadata/annotations/x, value: "object.metadata.map(k, k).join(' ') + ': ' + object.metadata.labels.map(k, k).join(' ')"}]`}, strings.Replace(service, "{tier: cloud}", "{tier: cloud, c: '', a: '', b: ''}, annotations: {x: 'labels name namespace: a b c tier'}", 1), ""},
		"in order":   {servicesV1, service, []string{"set: [{path: /metadata/labels/tier, value: \"'edge'\"}]", "drop: object.metadata.labels.tier == 'cloud'"}, strings.Replace(service, "tier: cloud", "tier: edge", 1), ""},
		"one fails":  {servicesV1, service, []string{"drop: object.spec.nothing == 1", "set: [{path: /metadata/labels/tier, value: \"'edge'\"}]"}, strings.Replace(service, "tier: cloud", "tier: edge", 1), "spec.drop: no such key"},
		"no place":   {servicesV1, service, []string{"set: [{path: /metadata/labels/a, value: \"'b'\"}, {path: /spec/type/x, value: '1'}]"}, service, "spec.set[1]: the object has no place for the value"},
		"wrong type": {servicesV1, service, []string{"set: [{path: /spec/ports, value: dyn(3)}]"}, "", "spec.set[0]: the object has no place for the value"},
	} {
		t.Run(name, func(t *testing.T) {
			var programs []*Program
			for i, text := range tc.specs {
				programs = append(programs, program(t, fmt.Sprint(i), tc.resource, text))
			}
			s := &State{Programs: programs, Place: &Place{Node: "edge-1", Pool: "p", Nodes: map[string]struct{}{"edge-1": {}, "edge-2": {}}}}
			reader := New(Config{Cloud: true, Disabled: []string{"servicetopology", "nodeportisolation"}}, s, nil).Reader("kube-proxy")
			in := empty(tc.resource)
			if err := yaml.Unmarshal([]byte(tc.object), in); err != nil {
				t.Fatal(err)
			}
			data, err := in.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			k := replica.Kind{APIVersion: tc.resource.GroupVersion().String(), Encoding: wire.Protobuf}
			k.Kind = map[schema.GroupVersionResource]string{servicesV1: "Service", slicesV1: "EndpointSlice", podsV1: "Pod"}[tc.resource]
			deep := 3
			if name == "keep" || name == "dates" {
				deep = 1 // a date and a port have no future
			}
			strange := estrange(data, deep)
			shown, ok := reader.Show(tc.resource, k, strange)
			if name == "wrong type" { // JSON has no types to be wrong
				if !ok || !bytes.Equal(shown, strange) || programs[0].Failure() != tc.failed {
					t.Errorf("shown: %v, failure %q", ok, programs[0].Failure())
				}
				return
			}
			if ok != (tc.want != "") {
				t.Fatalf("in Protobuf shown: %v", ok)
			}
			if got := programs[0].Failure(); got != tc.failed {
				t.Errorf("failure: %q, want %q", got, tc.failed)
			}

			text, err := wire.ToJSON(nil, k.APIVersion, k.Kind, data, true)
			if err != nil {
				t.Fatal(err)
			}
			text = append([]byte(`{"future":{"a":12345678901234567890},`), text[1:]...)
			k.Encoding = wire.JSON
			asText, okText := reader.Show(tc.resource, k, text)
			if okText != ok {
				t.Fatalf("in JSON shown: %v", okText)
			}
			if !ok {
				return
			}
			want, have, fromText := empty(tc.resource), empty(tc.resource), empty(tc.resource)
			for _, in := range []func() error{
				func() error { return yaml.Unmarshal([]byte(tc.want), want) },
				func() error { return have.Unmarshal(shown) },
				func() error { return json.Unmarshal(asText, fromText) },
			} {
				if err := in(); err != nil {
					t.Fatal(err)
				}
			}
			canonical := func(m message) string {
				data, err := m.Marshal() // without type and what is only Go's
				if err != nil {
					t.Fatal(err)
				}
				out := empty(tc.resource)
				if err := out.Unmarshal(data); err != nil {
					t.Fatal(err)
				}
				return normal(t, out)
			}
			if got, want := canonical(have), canonical(want); got != want {
				t.Errorf("Protobuf shows\n%s\nwant\n%s", got, want)
			}
			if got, want := canonical(fromText), canonical(want); got != want {
				t.Errorf("JSON shows\n%s\nwant\n%s", got, want)
			}
			if !bytes.Contains(asText, []byte(`"future":{"a":12345678901234567890}`)) {
				t.Errorf("JSON lost what is not known: %s", asText)
			}
			wantData, err := want.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			made := map[string]int{"set": 2, "deep": 3, "in order": 1, "one fails": 1, "names": 1}[name] // what a filter makes anew knows no future
			if lost := bytes.Count(estrange(wantData, deep), stranger) - bytes.Count(shown, stranger); lost > made {
				t.Errorf("%d unknown fields are lost", lost)
			}
		})
	}
}

// TestProgramsComeLast: a program sees what a component would have seen, and
// none of what a filter before it hides.
func TestProgramsComeLast(t *testing.T) {
	p := program(t, "p", servicesV1, "set: [{path: /metadata/labels/ports, value: \"string(object.spec.ports[0].?nodePort.orValue(0))\"}]")
	s := &State{Programs: []*Program{p}, Place: &Place{Node: "edge-1", Pool: "p"}}
	service := corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "a", Annotations: map[string]string{"nodeport.openyurt.io/listen": "other"}},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80, NodePort: 30080}}},
	}
	data, err := service.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	shown, ok := New(Config{}, s, nil).Reader("kube-proxy").Show(servicesV1, replica.Kind{APIVersion: "v1", Kind: "Service", Encoding: wire.Protobuf}, data)
	var got corev1.Service
	if err := got.Unmarshal(shown); err != nil || !ok || got.Labels["ports"] != "0" {
		t.Errorf("the program saw port %q (%v %v), not what nodeportisolation left", got.Labels["ports"], ok, err)
	}
}

// TestReadersOfPrograms: readers differ where their programs do, or what those
// go by.
func TestReadersOfPrograms(t *testing.T) {
	plain, placed := program(t, "a", podsV1, "drop: 'false'"), program(t, "b", podsV1, "drop: node.name == 'x'")
	reader := func(place *Place, ps ...*Program) *Reader {
		return New(Config{}, &State{Programs: ps, Place: place}, nil).Reader("kube-proxy")
	}
	here, there := &Place{Node: "a"}, &Place{Node: "b"}
	for name, tc := range map[string]struct {
		a, b *Reader
		want bool
	}{
		"alike":                   {reader(here, plain), reader(here, plain), true},
		"another place":           {reader(here, plain), reader(there, plain), true},
		"another place, by which": {reader(here, placed), reader(there, placed), false},
		"another program":         {reader(here, plain), reader(here, program(t, "a", podsV1, "drop: 'false'")), false},
		"one more":                {reader(here, plain), reader(here, plain, placed), false},
		"none":                    {reader(here), reader(here, plain), false},
	} {
		if got := tc.a.Same(podsV1, tc.b); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	with, without := New(Config{}, &State{Programs: []*Program{plain}}, nil), New(Config{}, &State{}, nil)
	if !with.Filters("kube-proxy", podsV1) || without.Filters("kube-proxy", podsV1) || with.Filters("kubectl", podsV1) {
		t.Error("who sees pods filtered is not who the programs are for")
	}
	if adds := with.Adds(without); !reflect.DeepEqual(adds, []schema.GroupResource{{Resource: "pods"}}) {
		t.Errorf("the program adds %v", adds)
	}
	if New(Config{Off: true}, &State{Programs: []*Program{plain}}, nil).Filters("kube-proxy", podsV1) {
		t.Error("programs are applied though filters are off")
	}
}

// FuzzPrograms: whatever an object is, a program shows it alike each time,
// leaves the bytes that it was given, and what could be read still can.
func FuzzPrograms(f *testing.F) {
	specs := []string{
		"drop: object.metadata.name == 'a'",
		nearEndpoints,
		"set: [{path: /metadata/labels/a, value: object.metadata.name}, {path: /ports/0/port, value: '80'}, {path: /endpoints/0/conditions/ready, value: 'true'}]",
		"remove: [{path: /endpoints/0/addresses}, {path: /metadata/labels/a}, {path: /ports}]",
		"keep: object.endpoints.all(e, e.addresses.all(a, a != 'x')) && size(object) > 2 && object == object",
	}
	var readers []*Reader
	for i, text := range specs {
		s := &State{
			Programs: []*Program{program(f, fmt.Sprint(i), slicesV1, text)},
			Place:    &Place{Node: "edge-1", Pool: "p", Nodes: map[string]struct{}{"edge-1": {}}},
		}
		readers = append(readers, New(Config{Off: false, Disabled: []string{"servicetopology", "forwardkubesvctraffic"}}, s, nil).Reader("kube-proxy"))
	}
	node := "edge-1"
	slice := discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"a": "b"}}, AddressType: "IPv4",
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.1"}, NodeName: &node}, {Addresses: []string{"x"}}},
		Ports:     []discoveryv1.EndpointPort{{}},
	}
	data, err := slice.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	text, err := json.Marshal(slice)
	if err != nil {
		f.Fatal(err)
	}
	for i := range specs {
		f.Add(uint8(i), false, estrange(data, 3)) //nolint:gosec // few
		f.Add(uint8(i), true, text)               //nolint:gosec // few
	}
	f.Fuzz(func(t *testing.T, which uint8, text bool, object []byte) {
		reader := readers[int(which)%len(readers)]
		k := replica.Kind{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice", Encoding: wire.Protobuf}
		if text {
			k.Encoding = wire.JSON
		}
		before := bytes.Clone(object)
		shown, ok := reader.Show(slicesV1, k, object)
		again, okAgain := reader.Show(slicesV1, k, object)
		if ok != okAgain || !bytes.Equal(shown, again) {
			t.Fatal("it is shown otherwise the second time")
		}
		if !bytes.Equal(before, object) {
			t.Fatal("the object itself was changed")
		}
		if !ok {
			return
		}
		var was, is discoveryv1.EndpointSlice
		if text {
			if json.Valid(object) && !json.Valid(shown) {
				t.Fatalf("%q became %q", object, shown)
			}
		} else if was.Unmarshal(object) == nil && is.Unmarshal(shown) != nil {
			t.Fatalf("%x became %x", object, shown)
		}
	})
}
