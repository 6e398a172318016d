package endpoint

import (
	"encoding/json"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func podRef(name, uid string) *corev1.ObjectReference {
	return &corev1.ObjectReference{Kind: "Pod", Namespace: "ns", Name: name, UID: types.UID(uid)}
}

// made is an endpoint as the controller of Kubernetes makes it.
func made(name, node, ip string, ready, serving, terminating bool) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{
		Addresses: []string{ip}, NodeName: new(node), TargetRef: podRef(name, "u-"+name), Zone: new("z"),
		Conditions: discoveryv1.EndpointConditions{Ready: new(ready), Serving: new(serving), Terminating: new(terminating)},
	}
}

func slice(family discoveryv1.AddressType, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: "web-1", ResourceVersion: "7",
			Labels: map[string]string{
				discoveryv1.LabelServiceName: "web", discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
			},
		},
		AddressType: family, Endpoints: endpoints, Ports: []discoveryv1.EndpointPort{{Port: new(int32(80)), Name: new("<http>")}},
	}
}

// forms are an object's bytes in both encodings.
func forms(t *testing.T, object any) map[wire.Encoding][]byte {
	t.Helper()
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	message, err := object.(interface{ Marshal() ([]byte, error) }).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return map[wire.Encoding][]byte{wire.JSON: text, wire.Protobuf: message}
}

func parse(t *testing.T, enc wire.Encoding, data []byte, into any) {
	t.Helper()
	err := json.Unmarshal(data, into)
	if enc == wire.Protobuf {
		err = into.(interface{ Unmarshal(data []byte) error }).Unmarshal(data)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestFollow says what an endpoint becomes, by the rules of the endpoint
// controllers.
func TestFollow(t *testing.T) {
	v4, v6 := discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6
	both := []string{"10.0.0.9", "fd00::9"}
	for _, c := range []struct {
		name    string
		family  discoveryv1.AddressType
		was     discoveryv1.Endpoint
		pod     Pod
		publish bool
		want    discoveryv1.Endpoint
	}{
		{"nothing changed", v4, made("a", "edge-1", "10.0.0.9", true, true, false), Pod{Addresses: both, Ready: true}, false, made("a", "edge-1", "10.0.0.9", true, true, false)},
		{"new address", v4, made("a", "edge-1", "10.0.0.1", true, true, false), Pod{Addresses: both, Ready: true}, false, made("a", "edge-1", "10.0.0.9", true, true, false)},
		{"new address of the other family", v6, made("a", "edge-1", "fd00::1", true, true, false), Pod{Addresses: both, Ready: true}, false, made("a", "edge-1", "fd00::9", true, true, false)},
		{"not ready", v4, made("a", "edge-1", "10.0.0.9", true, true, false), Pod{Addresses: both}, false, made("a", "edge-1", "10.0.0.9", false, false, false)},
		{"ready again", v4, made("a", "edge-1", "10.0.0.9", false, false, false), Pod{Addresses: both, Ready: true}, false, made("a", "edge-1", "10.0.0.9", true, true, false)},
		{"ended", v4, made("a", "edge-1", "10.0.0.9", true, true, false), Pod{Addresses: both, Ready: true, Ended: true}, true, made("a", "edge-1", "10.0.0.9", false, false, false)},
		{"no address of this family", v6, made("a", "edge-1", "fd00::1", true, true, false), Pod{Addresses: both[:1], Ready: true}, true, made("a", "edge-1", "fd00::1", false, false, false)},
		{"no address yet", v4, made("a", "edge-1", "10.0.0.1", true, true, false), Pod{}, true, made("a", "edge-1", "10.0.0.1", false, false, false)},
		{"names stay", discoveryv1.AddressTypeFQDN, made("a", "edge-1", "a.example", true, true, false), Pod{Addresses: both, Ready: true}, false, made("a", "edge-1", "a.example", false, false, false)},
		{"not ready, published", v4, made("a", "edge-1", "10.0.0.1", true, true, false), Pod{Addresses: both}, true, made("a", "edge-1", "10.0.0.9", true, false, false)},
		{"not ready, published as the cloud shows", v4, made("a", "edge-1", "10.0.0.1", true, false, false), Pod{Addresses: both}, false, made("a", "edge-1", "10.0.0.9", true, false, false)},
		{"terminating", v4, made("a", "edge-1", "10.0.0.1", false, true, true), Pod{Addresses: both, Ready: true}, false, made("a", "edge-1", "10.0.0.9", false, true, true)},
		{"terminating and not ready", v4, made("a", "edge-1", "10.0.0.9", false, true, true), Pod{Addresses: both}, false, made("a", "edge-1", "10.0.0.9", false, false, true)},
		{"terminating, published", v4, made("a", "edge-1", "10.0.0.1", true, true, true), Pod{Addresses: both, Ready: true}, false, made("a", "edge-1", "10.0.0.9", true, true, true)},
	} {
		t.Run(c.name, func(t *testing.T) {
			other := made("b", "edge-2", "10.0.0.2", false, false, false)
			before, want := slice(c.family, other, c.was, other), slice(c.family, other, c.want, other)
			for enc, data := range forms(t, before) {
				e := editor{change: func(p point, family discoveryv1.AddressType) point {
					if p.name != "a" || p.uid != "u-a" || p.kind != "Pod" || p.namespace != "ns" || p.node != "edge-1" {
						return p
					}
					return p.follow(c.pod, family, c.publish)
				}}
				out, err := e.edit(resources[0], enc, data)
				if err != nil {
					t.Fatal(err)
				}
				got := &discoveryv1.EndpointSlice{}
				parse(t, enc, out, got)
				if !equality.Semantic.DeepEqual(want, got) {
					t.Errorf("%s:\nwant %+v\ngot  %+v", enc, want.Endpoints, got.Endpoints)
				}
				if changed := !equality.Semantic.DeepEqual(before, want); e.changed != changed {
					t.Errorf("%s: changed is %v, want %v", enc, e.changed, changed)
				}
			}
		})
	}
}

func TestFollowWithoutConditions(t *testing.T) {
	was := discoveryv1.Endpoint{Addresses: []string{"10.0.0.1"}, NodeName: new("edge-1"), TargetRef: podRef("a", "")}
	for enc, data := range forms(t, slice(discoveryv1.AddressTypeIPv4, was)) {
		for _, ready := range []bool{true, false} {
			e := editor{change: func(p point, family discoveryv1.AddressType) point {
				return p.follow(Pod{Addresses: []string{"10.0.0.1"}, Ready: ready}, family, false)
			}}
			out, err := e.edit(resources[0], enc, data)
			if err != nil || e.changed == ready {
				t.Fatalf("%s: changed %v, %v", enc, e.changed, err)
			}
			got := &discoveryv1.EndpointSlice{}
			parse(t, enc, out, got)
			if c := got.Endpoints[0].Conditions; !ready && (c.Ready == nil || *c.Ready || c.Serving == nil || *c.Serving) {
				t.Errorf("%s: %+v", enc, c)
			}
		}
	}
}

func TestFollowInEndpoints(t *testing.T) {
	address := func(name, ip string) corev1.EndpointAddress {
		return corev1.EndpointAddress{IP: ip, Hostname: "h-" + name, NodeName: new("edge-1"), TargetRef: podRef(name, "u-"+name)}
	}
	ports := []corev1.EndpointPort{{Name: "http", Port: 80}}
	before := &corev1.Endpoints{ //nolint:staticcheck // old clients still read them
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", ResourceVersion: "7"},
		Subsets: []corev1.EndpointSubset{ //nolint:staticcheck // see above
			{Addresses: []corev1.EndpointAddress{address("a", "10.0.0.1"), address("b", "10.0.0.2")}, NotReadyAddresses: []corev1.EndpointAddress{address("c", "10.0.0.3")}, Ports: ports},
			{Addresses: []corev1.EndpointAddress{address("d", "10.0.0.4")}, Ports: ports[:0]},
		},
	}
	want := before.DeepCopy()
	want.Subsets[0].Addresses = []corev1.EndpointAddress{address("a", "10.0.0.9"), address("c", "10.0.0.3")}
	want.Subsets[0].NotReadyAddresses = []corev1.EndpointAddress{address("b", "10.0.0.2")}
	pods := map[string]Pod{
		"a": {Addresses: []string{"10.0.0.9"}, Ready: true}, "b": {Addresses: []string{"10.0.0.2"}},
		"c": {Addresses: []string{"10.0.0.3"}, Ready: true}, "d": {Addresses: []string{"10.0.0.4"}, Ready: true},
	}
	for enc, data := range forms(t, before) {
		e := editor{change: func(p point, family discoveryv1.AddressType) point { return p.follow(pods[p.name], family, false) }}
		out, err := e.edit(resources[1], enc, data)
		if err != nil || !e.changed {
			t.Fatalf("%s: changed %v, %v", enc, e.changed, err)
		}
		got := &corev1.Endpoints{} //nolint:staticcheck // see above
		parse(t, enc, out, got)
		if !equality.Semantic.DeepEqual(want, got) {
			t.Errorf("%s:\nwant %+v\ngot  %+v", enc, want.Subsets, got.Subsets)
		}
	}
}

// TestUnknownFieldsStay adds a field of the future at every level that is
// rewritten.
func TestUnknownFieldsStay(t *testing.T) {
	future := func(message []byte, text string) []byte {
		return protowire.AppendString(protowire.AppendTag(message, 99, protowire.BytesType), text)
	}
	conditions, err := (&discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true)}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	endpoint, err := (&discoveryv1.Endpoint{Addresses: []string{"10.0.0.1"}, NodeName: new("edge-1"), TargetRef: podRef("a", "u-a")}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	endpoint = protowire.AppendTag(endpoint, 2, protowire.BytesType)
	endpoint = protowire.AppendBytes(endpoint, future(conditions, "of conditions"))
	whole, err := slice(discoveryv1.AddressTypeIPv4).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	whole = protowire.AppendTag(whole, 2, protowire.BytesType)
	whole = protowire.AppendBytes(whole, future(endpoint, "of an endpoint"))
	whole = future(whole, "of a slice")
	text := []byte(`{"future":{"a":[1.50,"<&>"]},"addressType":"IPv4","endpoints":[{"addresses":["10.0.0.1"],"future":12345678901234567890,
		"conditions":{"ready":true,"future":"of conditions"},"nodeName":"edge-1","targetRef":{"kind":"Pod","name":"a","namespace":"ns"}}]}`)
	for enc, data := range map[wire.Encoding][]byte{wire.Protobuf: whole, wire.JSON: text} {
		e := editor{change: func(p point, family discoveryv1.AddressType) point {
			return p.follow(Pod{Addresses: []string{"10.0.0.9"}}, family, false)
		}}
		out, err := e.edit(resources[0], enc, data)
		if err != nil || !e.changed {
			t.Fatalf("%s: changed %v, %v", enc, e.changed, err)
		}
		wanted := []string{"of conditions", "of an endpoint", "of a slice", "10.0.0.9"}
		if enc == wire.JSON {
			wanted = []string{`"future":{"a":[1.50,"<&>"]}`, `"future":12345678901234567890`, `"future":"of conditions"`, `"addresses":["10.0.0.9"]`, `"ready":false`}
		}
		for _, part := range wanted {
			if !containsText(out, part) {
				t.Errorf("%s: %q is missing in %q", enc, part, out)
			}
		}
	}
}

func FuzzEdit(f *testing.F) {
	message, err := slice(discoveryv1.AddressTypeIPv4, made("a", "edge-1", "10.0.0.1", true, true, false)).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(message, false, false)
	f.Add([]byte(`{"subsets":[{"addresses":[{"ip":"10.0.0.1","targetRef":{"kind":"Pod"}}]}]}`), true, true)
	f.Fuzz(func(t *testing.T, data []byte, text, old bool) {
		enc, r := wire.Protobuf, resources[0]
		if text {
			enc = wire.JSON
		}
		if old {
			r = resources[1]
		}
		pod := Pod{Addresses: []string{"10.0.0.9", "fd00::9"}, Ready: true}
		follow := func(p point, family discoveryv1.AddressType) point { return p.follow(pod, family, false) }
		e := editor{change: follow}
		out, err := e.edit(r, enc, data)
		if err != nil || !e.changed {
			return
		}
		// What follows already is left alone.
		again := editor{change: follow}
		if _, err := again.edit(r, enc, out); err != nil || again.changed {
			t.Errorf("edited again: changed %v, %v\n%q\n%q", again.changed, err, data, out)
		}
	})
}
