package wire

import (
	"bytes"
	"encoding/json"
	"maps"
	"testing"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestAnnotate edits the lease of a kubelet that is newer than this program.
func TestAnnotate(t *testing.T) {
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"keep": "a", "change": "b", "drop": "c"}},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: new("n")},
	}
	proto, err := lease.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	unknown := appendStringField(nil, 99, "of the object")
	meta := appendBytesField(nil, fieldMetadata, appendStringField(nil, 99, "of the metadata")) // merges with the first
	proto = append(append(proto, unknown...), meta...)
	text := []byte(`{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","future":{"a":[1,2.50]},"metadata":{"name":"n","future":12345678901234567890,` +
		`"labels":{"l":"1"},"annotations":{"keep":"a","change":"b","drop":"c"}},"spec":{"holderIdentity":"n","future":"<>"}}`)
	set := map[string]*string{"change": new("<B>"), "drop": nil, "none": nil, "new": new("d")}
	want := map[string]string{"keep": "a", "change": "<B>", "new": "d"}

	out, err := Annotate(Protobuf, proto, set)
	if err != nil {
		t.Fatal(err)
	}
	var got coordinationv1.Lease
	if err := got.Unmarshal(out); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got.Annotations, want) || got.Name != "n" || got.Labels["l"] != "1" || *got.Spec.HolderIdentity != "n" {
		t.Errorf("got %+v", got)
	}
	if !bytes.Contains(out, unknown) || !bytes.Contains(out, appendStringField(nil, 99, "of the metadata")) {
		t.Error("a field that is not known is lost")
	}
	if empty, err := Annotate(Protobuf, nil, set); err != nil || got.Unmarshal(empty) != nil {
		t.Errorf("no object: %v", err)
	}

	if out, err = Annotate(JSON, text, set); err != nil {
		t.Fatal(err)
	}
	var tree map[string]json.RawMessage
	if err := json.Unmarshal(out, &tree); err != nil {
		t.Fatal(err)
	}
	if s := string(tree["future"]) + string(tree["spec"]); s != `{"a":[1,2.50]}{"holderIdentity":"n","future":"\u003c\u003e"}` {
		t.Errorf("got %s", out)
	}
	if s := string(tree["metadata"]); s != `{"annotations":{"change":"\u003cB\u003e","keep":"a","new":"d"},"future":12345678901234567890,"labels":{"l":"1"},"name":"n"}` {
		t.Errorf("got %s", s)
	}
	for _, text := range []string{`{}`, `{"metadata":null}`, `{"metadata":{"annotations":null}}`} {
		out, err := Annotate(JSON, []byte(text), map[string]*string{"a": new("b")})
		if err != nil || string(out) != `{"metadata":{"annotations":{"a":"b"}}}` {
			t.Errorf("%s: got %s, %v", text, out, err)
		}
	}
	for _, broken := range [][]byte{{0x0a, 0xff}, []byte(`{"metadata":[]}`), []byte(`{"metadata":{},"metadata":{}}`), []byte(`{} {}`)} {
		for _, enc := range []Encoding{JSON, Protobuf} {
			if out, err := Annotate(enc, broken, set); err == nil {
				t.Errorf("%s %q: got %q", enc, broken, out)
			}
		}
	}
}

func FuzzAnnotate(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, object []byte) {
		for _, enc := range []Encoding{JSON, Protobuf} {
			before, err := ReadMeta(enc, object, false)
			if err != nil {
				continue
			}
			out, err := Annotate(enc, object, map[string]*string{"a": new("b"), "c": nil})
			if err != nil {
				continue // deeper than what is read of it
			}
			after, err := ReadMeta(enc, out, false)
			if err != nil || after.Name != before.Name || after.Version != before.Version || !maps.Equal(after.Labels, before.Labels) {
				t.Errorf("%s: %+v became %+v, %v", enc, before, after, err)
			}
			if v, err := annotation(enc, out, "a"); err != nil || v != "b" {
				t.Errorf("%s: annotated with %q, %v", enc, v, err)
			}
		}
	})
}
