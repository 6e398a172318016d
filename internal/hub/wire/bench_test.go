package wire

import (
	"fmt"
	"testing"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// bigSlice is an EndpointSlice of 50 endpoints.
func bigSlice(b *testing.B) []byte {
	b.Helper()
	node, yes := "edge-1", true
	slice := discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "web", ResourceVersion: "12345", Labels: map[string]string{"kubernetes.io/service-name": "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for i := range 50 {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{fmt.Sprintf("10.0.0.%d", i)}, NodeName: &node,
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes},
		})
	}
	data, err := slice.Marshal()
	if err != nil {
		b.Fatal(err)
	}
	return data
}

func realPod(b *testing.B, enc Encoding) []byte {
	b.Helper()
	name := "pod.json"
	if enc == Protobuf {
		name = "pod.pb"
	}
	_, _, object, err := ReadObject(enc, recorded(b, name))
	if err != nil {
		b.Fatal(err)
	}
	return object
}

func BenchmarkReadMeta(b *testing.B) {
	for _, enc := range []Encoding{Protobuf, JSON} {
		b.Run(enc.String(), func(b *testing.B) {
			data := realPod(b, enc)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ReadMeta(enc, data, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkToJSON(b *testing.B) {
	for _, c := range []struct {
		apiVersion, kind string
		data             []byte
	}{
		{"v1", "Pod", realPod(b, Protobuf)},
		{"discovery.k8s.io/v1", "EndpointSlice", bigSlice(b)},
	} {
		for name, f := range map[string]func([]byte, string, string, []byte, bool) ([]byte, error){"direct": ToJSON, "typed": typedToJSON} {
			b.Run(c.kind+"/"+name, func(b *testing.B) {
				var dst []byte
				b.ReportAllocs()
				for b.Loop() {
					var err error
					if dst, err = f(dst[:0], c.apiVersion, c.kind, c.data, true); err != nil {
						b.Fatal(err)
					}
				}
				b.SetBytes(int64(len(dst)))
			})
		}
	}
}
