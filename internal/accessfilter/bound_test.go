package accessfilter

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// both runs a filter on an object as it does when nothing is counted, and with
// all counted. ok is false if it is always counted.
func both(t *testing.T, f *Filter, object []byte) (free, counted Verdict, freeErr, countedErr error, ok bool) {
	t.Helper()
	s := NewScene("kube-proxy", here)
	parsed, err := ParseJSON(object)
	if err != nil {
		t.Fatal(err)
	}
	if f.uncounted > 0 {
		r := newRun(s, parsed)
		r.vars.work.longest = f.uncounted
		free, freeErr = f.run(r)
		ok = !r.vars.work.over
	}
	r := newRun(s, parsed)
	r.counted = true
	counted, countedErr = f.run(r)
	if ok && r.cost > mostCost {
		t.Errorf("what was to cost at most %d costs %d", mostCost, r.cost)
	}
	return free, counted, freeErr, countedErr, ok
}

// TestUncountedIsCounted: a filter does the same whether CEL counts what it
// costs or not, and what is not counted costs no more than it may.
func TestUncountedIsCounted(t *testing.T) {
	slice := `{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"a","namespace":"n","labels":{"a":"b","tier":"edge"}},"addressType":"IPv4",
"endpoints":[{"addresses":["10.0.0.1","10.0.0.2"],"nodeName":"edge-1","conditions":{"ready":true}},{"addresses":["10.0.0.3"],"nodeName":"edge-9","conditions":{"ready":false}},{"addresses":[],"weight":1.5,"none":null}],"ports":[{"port":80}]}`
	long := strings.Replace(slice, `"ports":[`, `"ports":[`+strings.Repeat(`{"port":1},`, 5_000), 1)
	for _, tc := range []struct {
		text string
		free bool // whether it needs no counting
	}{
		{"object.metadata.name == 'a'", true},
		{"object.metadata.name != 'a'", true},
		{"'a' == object.metadata.name", true},
		{"object.addressType == object.metadata.name", true},
		{"object.nothing == 'a'", true},
		{"object.metadata.name.nothing == 'a'", true},
		{"object.endpoints == 'a'", true},
		{"object.endpoints[1].nodeName == 'edge-9'", true},
		{"object.endpoints[7].nodeName == 'edge-9'", true},
		{"object.endpoints.exists(e, e.nodeName == 'edge-9')", true},
		{"object.endpoints.exists(e, e.nodeName == 'edge-8')", true},
		{"object.endpoints.exists(e, e.conditions.ready)", true},
		{"object.endpoints.all(e, has(e.nodeName))", true},
		{"object.endpoints.all(e, !has(e.nothing))", true},
		{"object.endpoints.all(e, has(e.nodeName.x))", true},
		{"object.endpoints.all(e, has(e.nothing.x))", true},
		{"object.endpoints.all(e, e.nodeName in pool.nodes)", true},
		{"object.endpoints.exists_one(e, e.?nodeName.orValue('') in pool.nodes)", true},
		{"object.endpoints.exists(e, e.conditions.ready && e.addresses.exists(a, a.startsWith('10.')))", true},
		{"object.endpoints.filter(e, has(e.nodeName) && e.nodeName in pool.nodes)", true},
		{"object.endpoints.filter(e, e.addresses.size() > 0).map(e, e.addresses[0])", true},
		{"object.endpoints.map(e, has(e.nodeName), e.nodeName)", true},
		{"object.endpoints.map(e, e)", true},
		{"object.endpoints.filter(e, true)", true},
		{"object.metadata.labels.exists(k, k == 'tier')", true},
		{"object.metadata.labels.all(k, object.metadata.labels[k] != '')", true},
		{"'tier' in object.metadata.labels && object.metadata.labels['tier'] in ['edge', 'cloud']", true},
		{"object.metadata.?labels['tier'].orValue('') == 'edge'", true},
		{"object.metadata.?annotations['x'].orValue('y') == 'y'", true},
		{"object.endpoints[0].addresses == ['10.0.0.1', '10.0.0.2']", true},
		{"object == object", true},
		{"object.ports.all(p, p.port == 80 || p.port == 1)", true},
		{"object.ports[0].port in [80, 443]", true},
		{"80 in object.ports.map(p, p.port)", true},
		{"node.name == 'edge-1' && node.labels.zone == 'z1' && component in ['kube-proxy'] && pool.name == 'p'", true},
		{"size(object.endpoints) > 2 ? object.addressType : 'none'", true},
		{"object.metadata.name.contains('a') && object.metadata.name.endsWith('a')", true},
		{"pool.nodes.all(n, n.startsWith('edge'))", false},
		{"object.metadata.name.matches('^a$')", false},
		{"object.metadata.name + '-x'", false},
		{"object.endpoints.map(e, e.addresses.map(a, object.endpoints.map(f, f.addresses.map(b, [a, b]))))", false},
		{"{'a': object.metadata.name}", false},
		{"object.endpoints.transformList(i, e, e.addresses)", false},
		{"object.endpoints.map(e, object.endpoints.filter(f, f == e)).flatten()", false},
		{"lists.range(3).map(i, object.endpoints[i].addresses)", false},
		{"optional.of(object.metadata).optMap(m, m.name).value()", false},
		{"object.endpoints.sortBy(e, e.?nodeName.orValue('')).map(e, e.addresses.size())", false},
	} {
		f, err := Compile(filterOf(t, fmt.Sprintf("set: [{path: /metadata/labels/out, value: %q}]", tc.text)))
		if err != nil {
			t.Errorf("%s: %v", tc.text, err)
			continue
		}
		for name, object := range map[string]string{"slice": slice, "long": long, "service": object} {
			free, counted, freeErr, countedErr, ok := both(t, f, []byte(object))
			if name != "long" && ok != tc.free {
				t.Errorf("%s on %s needs no counting: %v (lists up to %d)", tc.text, name, ok, f.uncounted)
			}
			if !ok {
				continue
			}
			if kindOf(freeErr) != kindOf(countedErr) || !reflect.DeepEqual(free, counted) {
				t.Errorf("%s on %s: %+v %v, counted %+v %v", tc.text, name, free, freeErr, counted, countedErr)
			}
		}
	}
}

func kindOf(err error) string {
	if failed, ok := errors.AsType[*RunError](err); ok {
		return failed.Kind
	}
	return fmt.Sprint(err)
}

// TestNoFilterStallsTheHub: whatever passes the check ends soon, and takes
// little, on objects as large as the cluster has them.
func TestNoFilterStallsTheHub(t *testing.T) {
	words, keys, objects := []string{}, map[string]string{}, []map[string]any{}
	for i := range 15_000 {
		words = append(words, fmt.Sprintf("word-%d", i))
		keys[fmt.Sprintf("k%d", i)] = "v"
	}
	for i := range 5_000 {
		objects = append(objects, map[string]any{"n": i, "in": map[string]any{"a": "b"}})
	}
	large := map[string]Members{}
	for name, data := range map[string]any{
		"words": words, "keys": keys, "objects": objects, "text": strings.Repeat("a", 1<<18),
	} {
		object := map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "a"}, "data": data, "few": words[:300]}
		text, err := json.Marshal(object)
		if err == nil {
			large[name], err = ParseJSON(text)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	doubled := "optional.of([object.data, object.data])"
	for i := range 60 {
		doubled += fmt.Sprintf(".optMap(x%d, [x%d, x%d])", i, i, i)
	}
	refused := "optional.of([1, 1])" + strings.TrimPrefix(doubled, "optional.of([object.data, object.data])")
	for _, text := range []string{
		"size(lists.range(2000000000)) > 0",
		"lists.range(100000).all(a, lists.range(100000).all(b, a != b + 1))",
		"object.data.all(a, a in object.data)",
		"object.data.all(a, object == object)",
		"object.data.all(a, object.data == object.data)",
		"object.data.all(a, object.data.all(b, a == b || a != b))",
		"object.data.all(k, object.data[k] != 'x')",
		"object.data.all(a, object.data.sort().size() > 0)",
		"object.data.distinct().size() > 0",
		"object.data.map(a, a).distinct().size() > 0",
		"sets.contains(object.data, object.data)",
		"sets.equivalent(object.data, object.data)",
		"object.data.map(a, object.data).flatten().size() > 0",
		"object.few.map(a, object.data).flatten().size() > 0",
		"object.few.map(a, object.data).flatten(2).size() > 0",
		"object.few.map(a, string(object.data)).join().size() > 0",
		"object.data.replace('a', object.data).size() > 0",
		"object.data.replace('', object.data).size() > 0",
		"object.data.matches('(a*)*(b|a)+c$')",
		"'" + strings.Repeat("a", 1000) + "'.matches('^(" + strings.Repeat("a{900}", 300) + ")b$')",
		"object.few.all(w, object.data.matches(w) == false)",
		"object.data.split('').all(a, object.data.split('').size() > 0)",
		"'%.1000000000f'.format([1.5]) == ''",
		"'%s'.format([object.data]).size() > 0",
		"object.few.map(a, '%s %s %s'.format([object.data, object.data, object])).size() > 0",
		"quantity('1e2000000000').compareTo(quantity('1')) > 0",
		"quantity('1e-2000000000').add(quantity('1e2000000000')).isInteger()",
		"object.few.all(w, pool.nodes.all(n, object.data.size() >= 0))",
		doubled + ".value() == " + doubled + ".value()",
		refused + ".value() == " + refused + ".value()",
		"object.data.map(a, object)",
		"object.few.map(a, object)",
		"object.few.map(a, object.few.map(b, [object, object]))",
		"object.data.map(a, [a, a]).map(a, [a, a]).map(a, [a, a]).map(a, [a, a]) == []",
		"object.few.all(a, object.few.all(b, object.few.all(c, a + b + c != '')))",
		"object.data.all(i, object.few.exists(w, object.metadata.name == w) || object.kind == 'ConfigMap')",
	} {
		f, err := Compile(filterOf(t, fmt.Sprintf("set: [{path: /metadata/labels/out, value: %q}]", text)))
		if err != nil {
			continue // it is refused, which is as well
		}
		// The loops over strings are of those; all others take most of lists.
		names := []string{"words"}
		if strings.Contains(text, "matches") || strings.Contains(text, "replace") || strings.Contains(text, "split") || strings.Contains(text, "format") {
			names = []string{"text"}
		} else if strings.Contains(text, "object.data[k]") || strings.Contains(text, "object == object") {
			names = []string{"keys", "objects"}
		}
		for _, name := range names {
			object := large[name]
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			begun := processorTime(t)
			if v, err := f.Run(NewScene("kube-proxy", here), object); err == nil { // that it ends is asked
				if _, err := EditJSON(object, v); err != nil {
					t.Errorf("%.80s on %s: %v", text, name, err)
				}
			}
			took := processorTime(t) - begun
			runtime.ReadMemStats(&after)
			if took > 10*time.Second {
				t.Errorf("%.80s on %s takes %s", text, name, took)
			}
			if got := (after.TotalAlloc - before.TotalAlloc) >> 20; got > 512 {
				t.Errorf("%.80s on %s takes %d MB", text, name, got)
			}
		}
	}
}

// processorTime is what this process has used.
func processorTime(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// FuzzExpression: whatever an expression says of whatever object, it ends, and
// says the same whether its costs are counted or not.
func FuzzExpression(f *testing.F) {
	for _, text := range []string{
		"object.metadata.name == 'a'", "object.a.filter(e, has(e.b) && e.b in pool.nodes)", "object.a.exists(x, x.all(y, y > 1))",
		"object.?a[0].orValue('x') + 'b'", "object.a.map(x, [x, object])", "object.a == object.b || object.a[1].c < 3", "node.labels.zone in object.a",
	} {
		f.Add(text, []byte(`{"metadata":{"name":"a"},"a":[{"b":"edge-1","c":2},[1,2],"z1",1.5,null,true],"b":{"x":{"y":"z"}}}`))
	}
	f.Fuzz(func(t *testing.T, text string, object []byte) {
		if _, err := ParseJSON(object); err != nil {
			return
		}
		filter, err := Compile(&v1alpha1.AccessFilter{Spec: v1alpha1.AccessFilterSpec{
			Components: []string{"kube-proxy"}, Set: []v1alpha1.AccessFilterSet{{Path: "/spec/x", Value: text}},
		}})
		if err != nil {
			return
		}
		free, counted, freeErr, countedErr, ok := both(t, filter, object)
		if tooMuch := "the expression costs too much"; !ok || kindOf(freeErr) == tooMuch || kindOf(countedErr) == tooMuch {
			return // only then the two may differ, in when they see it
		}
		if kindOf(freeErr) != kindOf(countedErr) || fmt.Sprint(free) != fmt.Sprint(counted) {
			t.Errorf("%s: %+v %v, counted %+v %v", text, free, freeErr, counted, countedErr)
		}
		shown, v, err := filter.ShowJSON(NewScene("kube-proxy", here), object)
		if err == nil && v.Dropped == nil && !json.Valid(shown) {
			t.Errorf("%s makes %q of it", text, shown)
		}
	})
}
