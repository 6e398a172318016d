package wire

import (
	"bytes"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// filled calls f with some objects of each kind, the first of each empty.
func filled(t *testing.T, rounds int, f func(gvk schema.GroupVersionKind, apiVersion, kind string, data []byte)) {
	t.Helper()
	fill := newFiller(2)
	for _, gvk := range protoKinds() {
		if strings.HasSuffix(gvk.Kind, "List") || gvk.Kind == "TableOptions" {
			continue
		}
		for i := range rounds + 1 {
			obj, err := kinds().New(gvk)
			if err != nil {
				t.Fatal(err)
			}
			if i > 0 {
				fill.Fill(obj)
			}
			data, err := obj.(protoMessage).Marshal()
			if err != nil {
				t.Fatalf("%s: %v", gvk, err)
			}
			apiVersion, kind := gvk.ToAPIVersionAndKind()
			f(gvk, apiVersion, kind, data)
		}
	}
}

// asJSON is what JSON makes of an object, and what a view's values are.
func asJSON(t *testing.T, apiVersion, kind string, data []byte) map[string]any {
	t.Helper()
	text, err := ToJSON(nil, apiVersion, kind, data, true)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return tree.(map[string]any)
}

func TestViewIsAsJSONForEveryKind(t *testing.T) {
	filled(t, 6, func(gvk schema.GroupVersionKind, apiVersion, kind string, data []byte) {
		v, err := NewView(apiVersion, kind, data)
		if err != nil {
			t.Fatalf("%s: %v", gvk, err)
		}
		text, err := json.Marshal(unviewed(v)) // mends names that are no text
		if err != nil {
			t.Fatalf("%s: %v", gvk, err)
		}
		got, err := parse(text)
		if err != nil {
			t.Fatalf("%s: %v", gvk, err)
		}
		if want := asJSON(t, apiVersion, kind, data); !reflect.DeepEqual(got, any(want)) {
			g, _ := json.MarshalIndent(got, "", " ")
			w, _ := json.MarshalIndent(want, "", " ")
			t.Fatalf("%s: view\n%s\nJSON\n%s", gvk, g, w)
		}
		for _, name := range v.Names() {
			if text, ok := v.Text(name); ok {
				if x, _ := v.Get(name); x != string(text) {
					t.Fatalf("%s: %s is %v, and as a text %q", gvk, name, x, text)
				}
			}
		}
		if _, ok := v.Get("no such field"); ok {
			t.Fatalf("%s has a field that it has not", gvk)
		}
	})
}

// without is a tree without what JSON may write or leave out: the zero of each
// type, and what holds nothing else.
func without(x any) any {
	switch x := x.(type) {
	case map[string]any:
		out := map[string]any{}
		for k, v := range x {
			if v := without(v); v != nil {
				out[k] = v
			}
		}
		if len(out) == 0 {
			return nil
		}
		return out
	case []any:
		if len(x) == 0 {
			return nil
		}
		out := make([]any, len(x))
		for i := range x {
			out[i] = without(x[i])
		}
		return out
	case string:
		if x == "" || x == "0" { // a quantity
			return nil
		}
	case int64:
		if x == 0 {
			return nil
		}
	case bool:
		if !x {
			return nil
		}
	}
	return x
}

// paths are those of all that a tree has, elements of lists and entries of
// maps included.
func paths(x any, at []string, f func(path []string, value any)) {
	switch x := x.(type) {
	case map[string]any:
		for k, v := range x {
			p := append(slices.Clip(at), k)
			f(p, v)
			paths(v, p, f)
		}
	case []any:
		for i, v := range x {
			p := append(slices.Clip(at), strconv.Itoa(i))
			f(p, v)
			paths(v, p, f)
		}
	}
}

// put sets a path of a tree, or removes it if value is nil.
func put(x any, path []string, value any) any {
	switch x := x.(type) {
	case nil:
		if value != nil { // what is missing above the field
			return put(map[string]any{}, path, value)
		}
	case map[string]any:
		out := map[string]any{}
		maps.Copy(out, x)
		if len(path) > 1 {
			out[path[0]] = put(out[path[0]], path[1:], value)
		} else if value == nil {
			delete(out, path[0])
		} else {
			out[path[0]] = value
		}
		return out
	case []any:
		out := slices.Clone(x)
		i, _ := strconv.Atoi(path[0])
		switch {
		case len(path) > 1:
			out[i] = put(out[i], path[1:], value)
		case value == nil:
			out = slices.Delete(out, i, i+1)
		default:
			out[i] = value
		}
		return out
	}
	return x
}

// TestEditIsAsJSONForEveryKind sets and removes fields of objects of every
// kind, in Protobuf and in JSON: the outcome is the same.
func TestEditIsAsJSONForEveryKind(t *testing.T) {
	pick := rand.New(rand.NewPCG(3, 3))
	edits := 0
	filled(t, 2, func(gvk schema.GroupVersionKind, apiVersion, kind string, data []byte) {
		before := slices.Clone(data)
		tree := asJSON(t, apiVersion, kind, data)
		check := func(path []string, value any) {
			got, err := Edit(apiVersion, kind, data, path, value)
			if err != nil && strings.Contains(err.Error(), "it has no field") {
				return // within JSON that the Go type only carries
			}
			if err != nil {
				t.Fatalf("%s %v: %v", gvk, path, err)
			}
			edits++
			want := without(put(tree, path, value))
			if have := without(asJSON(t, apiVersion, kind, got)); !reflect.DeepEqual(have, want) {
				g, _ := json.MarshalIndent(have, "", " ")
				w, _ := json.MarshalIndent(want, "", " ")
				t.Fatalf("%s %v: edited\n%s\nwant\n%s", gvk, path, g, w)
			}
			if !bytes.Equal(data, before) {
				t.Fatalf("%s %v: the object itself was changed", gvk, path)
			}
		}
		type at struct {
			path  []string
			value any
		}
		var all []at
		paths(tree, nil, func(path []string, value any) {
			last := path[len(path)-1]
			if last == "apiVersion" || last == "kind" || strings.Contains(strings.Join(path, ""), "\ufffd") {
				return // some have these not on the wire, where names are bytes
			}
			all = append(all, at{path, value})
		})
		pick.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, p := range all[:min(len(all), 10)] {
			if p.value != nil {
				check(p.path, p.value) // as it is
			}
			if _, err := strconv.Atoi(p.path[len(p.path)-1]); err != nil {
				check(p.path, nil)
			}
		}
	})
	if edits < 5000 {
		t.Errorf("only %d edits", edits)
	}
}

func TestEdit(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"x": "1", "y": "2"}},
		Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "c", Image: "old"}, {Name: "d"}},
			Volumes:    []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
		},
	}
	data, err := pod.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		path  string
		value any
		want  string // of what is at the path then, or the error's end
	}{
		{"metadata/labels/x", "3", `"3"`},
		{"metadata/labels/z", "3", `"3"`},
		{"metadata/labels/z", nil, `null`},
		{"metadata/annotations/a", "b", `"b"`},
		{"spec/containers/1/image", "new", `"new"`},
		{"spec/containers/0", map[string]any{"name": "e", "ports": []any{map[string]any{"containerPort": int64(80)}}}, `{"name":"e","ports":[{"containerPort":80}],"resources":{}}`},
		{"spec/containers/0/resources/limits/cpu", "1500m", `"1500m"`},
		{"spec/containers/0/livenessProbe/httpGet/port", int64(80), `80`},
		{"spec/volumes/0/emptyDir/sizeLimit", "1Gi", `"1Gi"`},
		{"spec/volumes/0/hostPath/path", "/x", `"/x"`},
		{"spec/terminationGracePeriodSeconds", 30.0, `30`},
		{"spec/hostNetwork", true, `true`},
		{"status/startTime", "2026-01-02T03:04:05Z", `"2026-01-02T03:04:05Z"`},

		{"spec/containers/2/image", "new", "the list has no element 2"},
		{"spec/containers/first/image", "new", `"first" is no index of a list`},
		{"spec/boxes", []any{}, `there is no field "boxes"`},
		{"spec/hostNetwork", "yes", "it is a bool, and a string is given"},
		{"spec/terminationGracePeriodSeconds", 1.5, "it is a whole number, and a number is given"},
		{"spec/containers/0/livenessProbe/periodSeconds", int64(1) << 40, "1099511627776 does not fit into 32 bits"},
		{"metadata/labels/x/y", "z", `it has no field "y"`},
		{"spec/hostNetwork/x", "z", `it has no field "x"`},
		{"spec/containers", map[string]any{}, "it is a list, and an object is given"},
		{"spec/containers/0", map[string]any{"nam": "x"}, `there is no field "nam"`},
		{"metadata/labels", map[string]any{"a": int64(1)}, "a: it is a string, and a number is given"},
		{"spec/containers/0/resources/limits/cpu", "many", "quantities must match the regular expression"},
	} {
		path := strings.Split(tc.path, "/")
		out, err := Edit("v1", "Pod", data, path, tc.value)
		if err != nil {
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v, want %s", tc.path, err, tc.want)
			}
			continue
		}
		v, err := NewView("v1", "Pod", out)
		if err != nil {
			t.Fatal(err)
		}
		var got any = v
		for _, name := range path {
			if list, ok := got.([]any); ok {
				i, _ := strconv.Atoi(name)
				got = list[i]
			} else if _, get, ok := object(got); ok {
				got, _ = get(name)
			}
		}
		text, _ := json.Marshal(unviewed(got))
		if string(text) != tc.want {
			t.Errorf("%s: %s, want %s", tc.path, text, tc.want)
		}
	}
	if same, err := Edit("v1", "Pod", data, []string{"spec", "dnsConfig", "nameservers"}, nil); err != nil || !bytes.Equal(same, data) {
		t.Errorf("what is not there is removed: %v", err)
	}
}

// TestEditKeepsWhatIsNotKnown: fields of the future survive, around what is
// changed and within what is moved.
func TestEditKeepsWhatIsNotKnown(t *testing.T) {
	strange := appendStringField(nil, 900, "from the future")
	meta := appendBytesField(appendStringField(slices.Clone(strange), 1, "a"), 11, appendStringField(appendStringField(slices.Clone(strange), 1, "x"), 2, "1"))
	container := func(name string) []byte { return appendStringField(slices.Clone(strange), 1, name) }
	spec := appendBytesField(appendBytesField(slices.Clone(strange), 2, container("c")), 2, container("d"))
	data := appendBytesField(appendBytesField(slices.Clone(strange), 1, meta), 2, spec)
	count := func(b []byte) int { return bytes.Count(b, strange) }

	out, err := Edit("v1", "Pod", data, []string{"metadata", "labels", "y"}, "2")
	if err != nil || count(out) != count(data) {
		t.Errorf("a label: %d of %d are left: %v", count(out), count(data), err)
	}
	if out, err = Edit("v1", "Pod", data, []string{"spec", "containers", "1", "image"}, "i"); err != nil || count(out) != count(data) {
		t.Errorf("an image: %d of %d are left: %v", count(out), count(data), err)
	}
	v, err := NewView("v1", "Pod", data)
	if err != nil {
		t.Fatal(err)
	}
	in, _ := v.Get("spec")
	containers, _ := in.(*View).Get("containers")
	list := containers.([]any)
	out, err = Edit("v1", "Pod", data, []string{"spec", "containers"}, []any{list[1]})
	if err != nil || count(out) != count(data)-1 {
		t.Errorf("a container less: %d of %d are left: %v", count(out), count(data), err)
	}
}

// TestViewOfALargeObject: what an expression asks for once per element is not
// read from all bytes each time.
func TestViewOfALargeObject(t *testing.T) {
	cm := &corev1.ConfigMap{Data: map[string]string{}}
	for i := range 60_000 {
		cm.Data["k"+strconv.Itoa(i)] = ""
	}
	data, err := cm.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	v, err := NewView("v1", "ConfigMap", data)
	if err != nil {
		t.Fatal(err)
	}
	first, _ := v.Get("data")
	if again, ok := v.Get("data"); !ok || again != first {
		t.Error("the same map is read once more")
	}
	m := first.(*ViewMap)
	names := m.Names()
	if len(names) != len(cm.Data) || !slices.IsSorted(names) {
		t.Fatalf("%d names, sorted: %v", len(names), slices.IsSorted(names))
	}
	deadline := time.Now().Add(20 * time.Second) // a hundredth of a second does
	for i, name := range names {
		if x, ok := m.Get(name); !ok || x != "" {
			t.Fatalf("%s: %v %v", name, x, ok)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d keys were found", i, len(names))
		}
	}

	// A message in many parts is put together once.
	parts := bytes.Repeat(appendBytesField(nil, 1, []byte{7 << 3, 1}), 50_000)
	var meta any
	if allocations := testing.AllocsPerRun(1, func() {
		v, err := NewView("v1", "ConfigMap", parts)
		if err != nil {
			t.Fatal(err)
		}
		meta, _ = v.Get("metadata")
	}); allocations > 1000 {
		t.Errorf("%.0f allocations", allocations)
	}
	if generation, _ := meta.(*View).Get("generation"); generation != int64(1) {
		t.Errorf("generation %v", generation)
	}
}

// TestViewOfADamagedObject: what typed decoders refuse is an error, not a zero.
func TestViewOfADamagedObject(t *testing.T) {
	group := protowire.AppendTag(protowire.AppendTag(nil, 7, protowire.StartGroupType), 7, protowire.EndGroupType)
	for name, meta := range map[string][]byte{
		"a group for a number":     group,
		"64 bits for a number":     protowire.AppendFixed64(protowire.AppendTag(nil, 7, protowire.Fixed64Type), 1),
		"a string for a number":    appendStringField(nil, 7, "1"),
		"a number that ends early": protowire.AppendVarint(protowire.AppendTag(nil, 7, protowire.VarintType), 1<<63)[:3],
		"more than there is":       {7 << 3, 1, 0x5a, 0xff, 0xff, 0xff, 0xff, 0x0f},
		"a length beyond all":      {7 << 3, 1, 0x5a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f},
		"a group that never ends":  group[:1],
		"a field of number 0":      {0, 0},
	} {
		v, err := NewView("v1", "Pod", appendBytesField(nil, 1, meta))
		if err != nil {
			t.Fatal(err)
		}
		m, ok := v.Get("metadata")
		if view, isView := m.(*View); isView {
			m, ok = view.Get("generation")
		}
		if _, isError := m.(error); !isError {
			t.Errorf("%s: %v, %v", name, m, ok)
		}
	}

	// Deeper than JSON may be.
	var text []byte // from its end
	for range maxDepth {
		head := protowire.AppendVarint(protowire.AppendTag(nil, 28, protowire.BytesType), uint64(len(text)))
		slices.Reverse(head)
		text = append(text, head...)
	}
	slices.Reverse(text)
	v, err := NewView("apiextensions.k8s.io/v1", "CustomResourceDefinition", appendBytesField(nil, 2, appendBytesField(nil, 7, appendBytesField(nil, 4, appendBytesField(nil, 1, text)))))
	if err != nil {
		t.Fatal(err)
	}
	var x any = v
	for _, name := range []string{"spec", "versions", "schema", "openAPIV3Schema"} {
		if x, _ = x.(*View).Get(name); name == "versions" {
			x = x.([]any)[0]
		}
	}
	depth := 0
	for view, ok := x.(*View); ok; view, ok = x.(*View) {
		x, _ = view.Get("not")
		depth++
	}
	if _, isError := x.(error); !isError || depth > maxDepth {
		t.Errorf("it ends after %d levels with %v", depth, x)
	}
}

// TestEditOfAnEntryKeepsItsPlace: what is set to what it is looks the same.
func TestEditOfAnEntryKeepsItsPlace(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "1", "b": "2", "c": "3"}}}
	data, err := pod.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	out, err := Edit("v1", "Pod", data, []string{"metadata", "labels", "b"}, "2")
	if err != nil || !bytes.Equal(out, data) {
		t.Errorf("%q became %q: %v", data, out, err)
	}
}
