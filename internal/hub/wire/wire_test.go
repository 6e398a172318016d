package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
)

// recorded returns bytes that a kube-apiserver 1.36.3 sent.
func recorded(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func encodingOf(name string) Encoding {
	if strings.HasSuffix(name, ".pb") {
		return Protobuf
	}
	return JSON
}

func TestReadMetaEqualsTyped(t *testing.T) {
	fill := newFiller(2)
	for range 200 {
		var pod corev1.Pod
		fill.Fill(&pod)
		pod.ResourceVersion = "12345678901"
		proto, err := pod.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(&pod)
		if err != nil {
			t.Fatal(err)
		}
		for enc, data := range map[Encoding][]byte{Protobuf: proto, JSON: text} {
			var typed corev1.Pod
			if enc == Protobuf {
				err = typed.Unmarshal(data)
			} else {
				err = utiljson.Unmarshal(data, &typed)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := Meta{
				Namespace: typed.Namespace, Name: typed.Name, UID: string(typed.UID), Version: 12345678901,
				Labels: typed.Labels, NodeName: typed.Spec.NodeName, Phase: string(typed.Status.Phase), DeletionTimestamp: typed.DeletionTimestamp != nil,
			}
			got, err := ReadMeta(enc, data, true)
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Labels) == 0 && len(want.Labels) == 0 {
				got.Labels, want.Labels = nil, nil
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: got %+v, want %+v", enc, got, want)
			}
			if got, err = ReadMeta(enc, data, false); err != nil || got.NodeName != "" || got.Phase != "" {
				t.Fatalf("node name %q and phase %q of no pod, %v", got.NodeName, got.Phase, err)
			}
		}
	}
}

func TestEventsSurviveAnyChunking(t *testing.T) {
	for _, name := range []string{"services.watch.pb", "services.watch.json"} {
		raw, enc := recorded(t, name), encodingOf(name)
		er := NewEventReader(iotest.OneByteReader(bytes.NewReader(raw)), enc, 1<<20)
		var out []byte
		n := 0
		for {
			ev, err := er.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if ev.APIVersion != "v1" || ev.Kind != "Service" {
				t.Fatalf("got %s %s", ev.APIVersion, ev.Kind)
			}
			n++
			out = AppendEvent(out, enc, ev.Type, ev.APIVersion, ev.Kind, ev.Object)
		}
		if n != 8 || !bytes.Equal(out, raw) {
			t.Errorf("%s: %d events, differ: %t", name, n, !bytes.Equal(out, raw))
		}
	}
}

func TestTruncatedStreamIsUnexpectedEOF(t *testing.T) {
	for _, name := range []string{"services.watch.pb", "services.watch.json"} {
		enc := encodingOf(name)
		er := NewEventReader(bytes.NewReader(recorded(t, name)), enc, 1<<20)
		ev, err := er.Read()
		if err != nil {
			t.Fatal(err)
		}
		frame := AppendEvent(nil, enc, ev.Type, ev.APIVersion, ev.Kind, ev.Object)
		frame = bytes.TrimSpace(frame)
		for cut := range frame {
			_, err := NewEventReader(bytes.NewReader(frame[:cut]), enc, 1<<20).Read()
			want := io.ErrUnexpectedEOF
			if cut == 0 {
				want = io.EOF
			}
			if !errors.Is(err, want) {
				t.Fatalf("%s cut at %d: got %v, want %v", name, cut, err, want)
			}
		}
	}
}

func TestFrameLimit(t *testing.T) {
	head := binary.BigEndian.AppendUint32(nil, 1<<31)
	if _, err := NewEventReader(bytes.NewReader(head), Protobuf, 1<<20).Read(); !errors.Is(err, ErrTooLarge) {
		t.Errorf("protobuf: got %v, want ErrTooLarge", err)
	}
	endless := io.MultiReader(strings.NewReader(`{"type":"`), endlessReader{})
	if _, err := NewEventReader(endless, JSON, 1<<20).Read(); !errors.Is(err, ErrTooLarge) {
		t.Errorf("JSON: got %v, want ErrTooLarge", err)
	}
}

// endlessReader is a peer that never closes its string.
type endlessReader struct{}

func (endlessReader) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'a'
	}
	return len(p), nil
}

func TestReadErrorIsPassedOn(t *testing.T) {
	reset := errors.New("reset")
	for _, enc := range []Encoding{JSON, Protobuf} {
		r := io.MultiReader(strings.NewReader("{\x00"), iotest.ErrReader(reset))
		if _, err := NewEventReader(r, enc, 1<<20).Read(); !errors.Is(err, reset) {
			t.Errorf("%s: got %v, want %v", enc, err, reset)
		}
	}
}

func TestListsComeApartAndTogether(t *testing.T) {
	for _, name := range []string{"pods.pb", "slices.pb", "fancies.json"} {
		body, enc := recorded(t, name), encodingOf(name)
		l, err := ReadList(enc, body)
		if err != nil {
			t.Fatal(err)
		}
		if len(l.Items) < 2 || l.Version == 0 {
			t.Errorf("%s: %d items at version %d", name, len(l.Items), l.Version)
		}
		h := ListHeader{APIVersion: l.APIVersion, Kind: l.Kind, Version: l.Version}
		size := 0
		for _, item := range l.Items {
			size += ItemSize(enc, len(item))
		}
		out := AppendListStart(nil, enc, h, size)
		for i, item := range l.Items {
			out = AppendItem(out, enc, i == 0, item)
		}
		if out = AppendListEnd(out, enc, h); !bytes.Equal(out, body) {
			t.Errorf("%s: got %q", name, out)
		}
	}
}

func TestJSONItemsGetTheirType(t *testing.T) {
	want, err := ReadList(Protobuf, recorded(t, "pods.pb"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadList(JSON, recorded(t, "pods.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Items) != len(want.Items) {
		t.Fatalf("got %d items, want %d", len(got.Items), len(want.Items))
	}
	for i := range got.Items {
		text, err := ToJSON(nil, "v1", "Pod", want.Items[i], true)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Items[i], text) {
			t.Errorf("got %s\nwant %s", got.Items[i], text)
		}
	}
	l, err := ReadList(JSON, []byte(` { "items" : [ { } , {"a":1} ], "metadata":{"remainingItemCount": 7, "continue":"c\u003d"}, "kind":"PodList","apiVersion":"v1" } `))
	if err != nil {
		t.Fatal(err)
	}
	if string(l.Items[0]) != `{"kind":"Pod","apiVersion":"v1"}` && string(l.Items[0]) != `{"kind":"Pod","apiVersion":"v1" }` {
		t.Errorf("got %s", l.Items[0])
	}
	if *l.Remaining != 7 || l.Continue != "c=" {
		t.Errorf("got %d %q", *l.Remaining, l.Continue)
	}
}

func TestPartialMetadataOfCustomResourceDropsTheRest(t *testing.T) {
	_, _, object, err := ReadObject(JSON, recorded(t, "fancy.json"))
	if err != nil {
		t.Fatal(err)
	}
	partial, err := PartialMetadata(JSON, object)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(partial, []byte(`{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"full",`)) || bytes.Contains(partial, []byte("spec\":{\"text")) {
		t.Errorf("got %s", partial)
	}
	proto, err := FromJSON("meta.k8s.io/v1", "PartialObjectMetadata", partial)
	if err != nil {
		t.Fatal(err)
	}
	m, err := ReadMeta(Protobuf, proto, false)
	if err != nil || m.Name != "full" || m.Version == 0 {
		t.Errorf("got %+v, %v", m, err)
	}
}

func TestFromJSONIsStrict(t *testing.T) {
	for text, ok := range map[string]bool{
		`{"metadata":{"name":"a"}}`:                                        true,
		`{"kind":"Pod","apiVersion":"v1","metadata":{"name":"a"}}`:         true,
		`{"kind":"Node","apiVersion":"v1"}`:                                false,
		`{"metadata":{"nom":"a"}}`:                                         false,
		`{"Metadata":{}}`:                                                  false,
		`{"metadata":{"name":"a","name":"b"}}`:                             false,
		`{"metadata":`:                                                     false,
		`{"spec":{"containers":[{"resources":{"limits":{"cpu":"x y"}}}]}}`: false,
	} {
		if _, err := FromJSON("v1", "Pod", []byte(text)); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := FromJSON("example.com/v1", "Foo", []byte(`{}`)); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("got %v, want ErrUnknownKind", err)
	}
}

func TestStatusRoundTrip(t *testing.T) {
	for _, enc := range []Encoding{JSON, Protobuf} {
		frame := AppendStatusEvent(nil, enc, &metav1.Status{Status: "Failure", Code: 410, Reason: metav1.StatusReasonExpired})
		ev, err := NewEventReader(bytes.NewReader(frame), enc, 1<<20).Read()
		if err != nil {
			t.Fatal(err)
		}
		status, err := ReadStatus(enc, ev.Object)
		if err != nil || ev.Type != "ERROR" || ev.Kind != "Status" || status.Code != 410 {
			t.Errorf("%s: got %+v %v %v", enc, ev, status, err)
		}
	}
}

func TestMetadataIsTheFirstFieldOfEveryKind(t *testing.T) {
	for _, gvk := range protoKinds() {
		typ := kinds().AllKnownTypes()[gvk]
		if sf, ok := typ.FieldByName("ObjectMeta"); ok && !strings.HasPrefix(sf.Tag.Get("protobuf"), "bytes,1,") {
			t.Errorf("%s: %s", gvk, sf.Tag)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	_, _, pod, err := ReadObject(Protobuf, recorded(t, "pod.pb"))
	if err != nil {
		t.Fatal(err)
	}
	want := recorded(t, "pod.json")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				got, err := ToJSON(nil, "v1", "Pod", pod, true)
				if err != nil || !bytes.Equal(append(got, '\n'), want) {
					t.Errorf("%v: %s", err, got)
				}
			}
		})
	}
	wg.Wait()
}

func TestToJSONKeepsDstOnError(t *testing.T) {
	dst := []byte("kept")
	out, err := ToJSON(dst, "v1", "Pod", []byte{0xff}, true)
	if !errors.Is(err, ErrMalformed) || string(out) != "kept" {
		t.Errorf("got %q, %v", out, err)
	}
}
