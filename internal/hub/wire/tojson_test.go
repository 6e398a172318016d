package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	appsv1beta1 "k8s.io/api/apps/v1beta1"
	appsv1beta2 "k8s.io/api/apps/v1beta2"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/randfill"
)

// protoKinds lists every kind that has a Protobuf form.
func protoKinds() []schema.GroupVersionKind {
	var out []schema.GroupVersionKind
	for gvk, typ := range kinds().AllKnownTypes() {
		if gvk.Version != runtime.APIVersionInternal && isObject(typ) {
			out = append(out, gvk)
		}
	}
	slices.SortFunc(out, func(a, b schema.GroupVersionKind) int { return strings.Compare(a.String(), b.String()) })
	return out
}

// source is a generator in the form that the fuzzers of apimachinery want.
type source struct{ *rand.PCG }

func (s source) Int63() int64 { return int64(s.Uint64() >> 1) }

func (s source) Seed(seed int64) { s.PCG.Seed(uint64(seed), 0) }

func newFiller(seed int64) *randfill.Filler {
	codecs := serializer.NewCodecFactory(kinds())
	return fuzzer.FuzzerFor(
		fuzzer.MergeFuzzerFuncs(metafuzzer.Funcs, func(serializer.CodecFactory) []any {
			return []any{
				// The API server holds JSON in these.
				func(r *runtime.RawExtension, c randfill.Continue) {
					*r = runtime.RawExtension{Raw: []byte(`{"a": "<` + "\\u2028" + `>"}`)}
					if c.Bool() {
						r.Raw = nil
					}
				},
				func(f *metav1.FieldsV1, c randfill.Continue) {
					f.SetRawBytes([]byte([]string{`{"f:metadata":{"f:labels":{".":{},"k:{\"a\":\"b\"}":{}}}}`, `{ "f:a<": {} }`, ``}[c.Intn(3)]))
				},
				// Schemas recur without end.
				func(s *apiextensionsv1.JSONSchemaProps, c randfill.Continue) {
					depth, maximum := c.Intn(3), 0.1
					*s = apiextensionsv1.JSONSchemaProps{Type: "object", Maximum: &maximum, Default: &apiextensionsv1.JSON{Raw: []byte(`{"a":"<"}`)}}
					for range depth {
						inner := *s
						*s = apiextensionsv1.JSONSchemaProps{
							Properties: map[string]apiextensionsv1.JSONSchemaProps{"b": inner, "a": inner},
							Items:      &apiextensionsv1.JSONSchemaPropsOrArray{Schema: &inner},
						}
					}
				},
				func(s *string, c randfill.Continue) {
					switch c.Intn(4) {
					case 0:
						*s = ""
					case 1:
						*s = "a<b>&\"\\\n\t\x01\u2028\u2029é\U0001f600"
					case 2:
						*s = "bad\xff\xc3utf8\x7f"
					default:
						*s = "plain-" + c.String(8)
					}
				},
			}
		}), source{rand.NewPCG(uint64(seed), 0)}, codecs).NilChance(0.3).NumElements(1, 2)
}

// typedJSON is what ToJSON must equal.
func typedJSON(t testing.TB, gvk schema.GroupVersionKind, data []byte, withType bool) []byte {
	t.Helper()
	obj, err := kinds().New(gvk)
	if err != nil {
		t.Fatal(err)
	}
	if err := obj.(protoMessage).Unmarshal(data); err != nil {
		t.Fatalf("unmarshal %s: %v", gvk, err)
	}
	setClaimTypes(obj)
	if withType {
		obj.GetObjectKind().SetGroupVersionKind(gvk)
	}
	out, err := json.Marshal(obj)
	if err != nil {
		t.Fatalf("marshal %s: %v", gvk, err)
	}
	return out
}

// setClaimTypes does what the API server's conversion does on the way out.
func setClaimTypes(obj runtime.Object) {
	typ := metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolumeClaim"}
	each := func(c []corev1.PersistentVolumeClaim) {
		for i := range c {
			c[i].TypeMeta = typ
		}
	}
	switch o := obj.(type) {
	case *appsv1.StatefulSet:
		each(o.Spec.VolumeClaimTemplates)
	case *appsv1.StatefulSetList:
		for i := range o.Items {
			each(o.Items[i].Spec.VolumeClaimTemplates)
		}
	case *appsv1beta1.StatefulSet:
		each(o.Spec.VolumeClaimTemplates)
	case *appsv1beta1.StatefulSetList:
		for i := range o.Items {
			each(o.Items[i].Spec.VolumeClaimTemplates)
		}
	case *appsv1beta2.StatefulSet:
		each(o.Spec.VolumeClaimTemplates)
	case *appsv1beta2.StatefulSetList:
		for i := range o.Items {
			each(o.Items[i].Spec.VolumeClaimTemplates)
		}
	}
}

func TestToJSONEqualsTypedForEveryKind(t *testing.T) {
	const rounds = 20
	fill := newFiller(1)
	all := protoKinds()
	if len(all) < 300 {
		t.Fatalf("only %d kinds", len(all))
	}
	for _, gvk := range all {
		if strings.HasSuffix(gvk.Kind, "List") {
			continue // their items are kinds themselves
		}
		for i := range rounds + 1 {
			obj, err := kinds().New(gvk)
			if err != nil {
				t.Fatal(err)
			}
			if i > 0 { // the first is empty
				fill.Fill(obj)
			}
			data, err := obj.(protoMessage).Marshal()
			if err != nil {
				t.Fatalf("%s: %v", gvk, err)
			}
			want := typedJSON(t, gvk, data, i%2 == 0)
			av, k := gvk.ToAPIVersionAndKind()
			got, err := ToJSON([]byte("x"), av, k, data, i%2 == 0)
			if err != nil {
				t.Errorf("%s: %v", gvk, err)
				break
			}
			if got = got[1:]; !bytes.Equal(got, want) {
				at := 0
				for at < min(len(got), len(want)) && got[at] == want[at] {
					at++
				}
				t.Errorf("%s differs at %d:\n got ...%s\nwant ...%s", gvk, at, cut(got, at), cut(want, at))
				break
			}
		}
	}
}

func cut(b []byte, at int) []byte { return b[max(0, at-60):min(len(b), at+60)] }

func TestEveryKindHasAPlan(t *testing.T) {
	for _, gvk := range protoKinds() {
		if gvk.Kind == "TableOptions" {
			continue // has a Go-only field, is never an object
		}
		m, err := shared().plans.of(gvk)
		if err != nil || m == nil {
			shared().plans.mu.Lock()
			_, why := shared().plans.message(kinds().AllKnownTypes()[gvk])
			shared().plans.mu.Unlock()
			t.Errorf("%s: %v %v", gvk, err, why)
		}
	}
}

func TestToJSONRefusesUnknownField(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: corev1.PodSpec{NodeName: "n"}}
	data, err := pod.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	top := appendStringField(slices.Clone(data), 900, "new")
	meta, err := pod.ObjectMeta.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	nested := appendBytesField(nil, 1, appendStringField(meta, 90, "new"))
	for _, data := range [][]byte{top, nested} {
		if _, err := ToJSON(nil, "v1", "Pod", data, true); !errors.Is(err, ErrUnknownField) {
			t.Errorf("got %v, want ErrUnknownField", err)
		}
	}
	if _, err := ToJSON(nil, "example.com/v1", "Foo", data, true); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("got %v, want ErrUnknownKind", err)
	}
	if _, err := ToJSON(nil, "meta.k8s.io/v1", "Table", data, true); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("got %v, want ErrUnknownKind", err)
	}
}
