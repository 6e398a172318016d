package wire

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

var seeds = []string{"pod.pb", "pods.pb", "slices.pb", "statefulset.pb", "services.watch.pb", "pod.json", "pods.json", "fancy.json", "fancies.json", "services.watch.json"}

func seed(f *testing.F) {
	f.Helper()
	for _, name := range seeds {
		b := recorded(f, name)
		f.Add(b)
		if _, _, object, err := ReadObject(encodingOf(name), b); err == nil {
			f.Add(object)
		}
	}
	f.Add([]byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Add([]byte(`{"metadata":{"labels":{"a":"\ud800"},"resourceVersion":"x"}}`))
}

func FuzzReadMeta(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, enc := range []Encoding{JSON, Protobuf} {
			if _, err := ReadMeta(enc, data, true); err == nil && enc == JSON && !json.Valid(data) {
				t.Errorf("took invalid JSON %q", data)
			}
			_, _, _ = ReadBookmark(enc, data)
			_, _ = ReadStatus(enc, data)
			_, _ = PartialMetadata(enc, data)
		}
	})
}

func FuzzReadObject(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, enc := range []Encoding{JSON, Protobuf} {
			apiVersion, kind, object, err := ReadObject(enc, body)
			if err != nil {
				continue
			}
			v, k, again, err := ReadObject(enc, AppendObject(nil, enc, apiVersion, kind, object))
			if err != nil || v != apiVersion || k != kind || !bytes.Equal(again, object) {
				t.Errorf("%s round trip: %v", enc, err)
			}
		}
	})
}

func FuzzReadList(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, enc := range []Encoding{JSON, Protobuf} {
			l, err := ReadList(enc, body)
			if err != nil {
				continue
			}
			total := 0
			for _, item := range l.Items {
				total += len(item)
				if enc == JSON && !json.Valid(item) {
					t.Errorf("item is invalid JSON %q", item)
				}
			}
			if enc == Protobuf && total > len(body) {
				t.Errorf("%d bytes of items from %d", total, len(body))
			}
		}
	})
}

func FuzzEventReader(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, stream []byte) {
		for _, enc := range []Encoding{JSON, Protobuf} {
			er := NewEventReader(bytes.NewReader(stream), enc, 1<<20)
			for {
				ev, err := er.Read()
				if err != nil {
					break
				}
				if len(ev.Object) > len(stream) {
					t.Fatalf("%d bytes from %d", len(ev.Object), len(stream))
				}
			}
		}
	})
}

func FuzzToJSON(f *testing.F) {
	seed(f)
	kinds := [][2]string{
		{"v1", "Pod"},
		{"v1", "Secret"},
		{"apps/v1", "StatefulSet"},
		{"discovery.k8s.io/v1", "EndpointSlice"},
		{"authentication.k8s.io/v1", "TokenReview"},
		{"apiextensions.k8s.io/v1", "CustomResourceDefinition"},
	}
	f.Fuzz(func(t *testing.T, object []byte) {
		for _, k := range kinds {
			out, err := ToJSON(nil, k[0], k[1], object, true)
			if err == nil && !json.Valid(out) {
				t.Errorf("%s: invalid JSON %q", k[1], out)
			}
		}
	})
}

// FuzzView: whatever an object is, a view of it is as its JSON, and an edit of
// it as one of its JSON.
func FuzzView(f *testing.F) {
	seed(f)
	type edit struct {
		path  string
		value any
	}
	kinds := []struct {
		apiVersion, kind string
		edits            []edit
	}{
		{"v1", "Pod", []edit{
			{"metadata/labels/a", "b"},
			{"metadata/labels/a", nil},
			{"metadata/annotations", nil},
			{"spec/containers/0/image", "i"},
			{"spec/containers/0/resources/limits/cpu", "1"},
			{"spec/volumes/0/hostPath/path", "/x"},
			{"spec/volumes/0/emptyDir", nil},
			{"spec/hostNetwork", true},
		}},
		{"v1", "ConfigMap", []edit{{"data/a", "b"}, {"binaryData/a", "aGk="}, {"immutable", nil}}},
		{"discovery.k8s.io/v1", "EndpointSlice", []edit{{"endpoints/0/conditions/ready", true}, {"ports/0/port", int64(80)}, {"endpoints/0/addresses", nil}, {"endpoints", nil}}},
		{"authentication.k8s.io/v1", "TokenReview", []edit{{"status/user/extra/a", []any{"b"}}}},
		{"apiextensions.k8s.io/v1", "CustomResourceDefinition", []edit{{"spec/versions/0/name", "v2"}}},
	}
	f.Fuzz(func(t *testing.T, object []byte) {
		for _, k := range kinds {
			v, err := NewView(k.apiVersion, k.kind, object)
			if err != nil {
				t.Fatal(err)
			}
			got := plainOf(t, v)
			text, err := ToJSON(nil, k.apiVersion, k.kind, object, true)
			if err != nil {
				continue // it has what a view does not see
			}
			want, err := parse(text)
			if err != nil {
				continue // a number beyond all
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: view %v, JSON %v", k.kind, got, want)
			}
			for _, e := range k.edits {
				path := strings.Split(e.path, "/")
				out, err := Edit(k.apiVersion, k.kind, object, path, e.value)
				if err != nil {
					continue // there is no such element
				}
				have := without(asJSON(t, k.apiVersion, k.kind, out))
				if want := without(put(want, path, e.value)); !reflect.DeepEqual(have, want) {
					t.Fatalf("%s %s: %v, want %v", k.kind, e.path, have, want)
				}
			}
		}
	})
}

// plainOf is what a view shows, as JSON would have it.
func plainOf(t *testing.T, v *View) any {
	t.Helper()
	text, err := json.Marshal(unviewed(v)) // mends names that are no text
	if err != nil {
		return err
	}
	plain, err := parse(text)
	if err != nil {
		return err
	}
	return plain
}

func FuzzScannerAgreesWithEncodingJSON(f *testing.F) {
	seed(f)
	for _, s := range []string{`[1,-0.5e+3,"\u00e9",true,false,null,{}]`, `[`, `{"a"}`, `01`, `-`, "\"\x01\"", `[1,]`, ` 1 `} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s := scanner{data: data}
		err := s.skip()
		if err == nil {
			err = s.end()
		}
		if (err == nil) != json.Valid(data) {
			t.Errorf("%q: %v", data, err)
		}
	})
}

func FuzzJSONStringEqualsEncodingJSON(f *testing.F) {
	f.Add("a<b>&\u2028\xff\x7f\x00\"\\")
	f.Fuzz(func(t *testing.T, s string) {
		want, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if got := appendJSONString(nil, s); !bytes.Equal(got, want) {
			t.Errorf("got %s, want %s", got, want)
		}
		if got := appendJSONString(nil, []byte(s)); !bytes.Equal(got, want) {
			t.Errorf("got %s, want %s", got, want)
		}
		sc := scanner{data: want}
		if got, err := sc.stringBytes(); err != nil || utf8.ValidString(s) && string(got) != s {
			t.Errorf("read back %q, %v", got, err)
		}
	})
}
