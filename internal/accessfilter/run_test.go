package accessfilter

import (
	"errors"
	"strings"
	"testing"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

const object = `{"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop","labels":{"tier":"cloud"},"future":{"a":1}},
"spec":{"type":"LoadBalancer","clusterIPs":["10.0.0.1"],"big":12345678901234567890,"ports":[{"port":80,"name":"http"},{"port":443,"name":"https"}]}}`

var here = &Place{Node: "edge-1", Labels: map[string]string{"zone": "z1"}, Pool: "p", Nodes: map[string]struct{}{"edge-1": {}, "edge-2": {}}}

func TestRun(t *testing.T) {
	for name, tc := range map[string]struct {
		spec  string
		place *Place
		want  string // of what is seen, "gone", or an error's beginning
	}{
		"drop":            {"drop: object.metadata.labels.tier == 'cloud'", here, "gone"},
		"not dropped":     {"drop: object.metadata.labels.tier == 'edge'", here, object},
		"keep":            {"keep: object.metadata.namespace == 'kube-system'", here, "gone"},
		"kept":            {"keep: object.kind == 'Service'", here, object},
		"drop, then keep": {"drop: 'false'\nkeep: 'false'", here, "gone"},
		"scene":           {"drop: node.name == 'edge-1' && node.labels.zone == 'z1' && 'edge-2' in pool.nodes && !('edge-3' in pool.nodes) && pool.name == 'p' && component == 'kube-proxy' && size(pool.nodes) == 2", here, "gone"},
		"in no pool":      {"drop: pool.name == '' && pool.nodes.all(n, n == node.name)", &Place{Node: "edge-1"}, "gone"},
		"no place yet":    {"drop: node.name != 'x'", nil, object},
		"no nodes yet":    {"keep: \"'edge-1' in pool.nodes\"", &Place{Node: "edge-1", Pool: "p"}, object},
		"no place needed": {"drop: 'true'", nil, "gone"},
		"set": {
			"set: [{path: /metadata/annotations/a~1b, value: object.metadata.name + '-x'}, {path: /spec/ports/1/port, value: '8443'}, {path: /spec/type, value: \"'ClusterIP'\", when: 'false'}]\nremove: [{path: /spec/clusterIPs}, {path: /spec/not/there}, {path: /metadata/labels/tier, when: 'true'}]",
			here,
			`{"apiVersion":"v1","kind":"Service","metadata":{"annotations":{"a/b":"web-x"},"future":{"a":1},"labels":{},"name":"web","namespace":"shop"},"spec":{"big":12345678901234567890,"ports":[{"name":"http","port":80},{"name":"https","port":8443}],"type":"LoadBalancer"}}`,
		},
		"set of parts": {
			"set: [{path: /spec/ports, value: 'object.spec.ports.filter(p, p.port > 80)'}, {path: /spec/first, value: 'object.spec.ports[0]'}, {path: /spec/first/port, value: '81'}]\nremove: [{path: /spec/ports/5}, {path: /spec/clusterIPs/0}]",
			here,
			`{"apiVersion":"v1","kind":"Service","metadata":{"future":{"a":1},"labels":{"tier":"cloud"},"name":"web","namespace":"shop"},"spec":{"big":12345678901234567890,"clusterIPs":[],"first":{"name":"http","port":81},"ports":[{"name":"https","port":443}],"type":"LoadBalancer"}}`,
		},
		"values": {
			`set: [{path: /spec, value: "{'a': dyn(1), 'b': dyn([true, false]), 'c': dyn('x'), 'd': dyn({'e': 1.5}), 'f': dyn(null), 'g': dyn(b'x'), 'h': dyn(duration('90s')), 'i': dyn(timestamp('2026-01-02T03:04:05Z')), 'j': dyn(3u), 'k': dyn(pool.nodes)}"}, {path: /metadata/labels, value: "object.metadata.?nothing"}]`,
			here,
			`{"apiVersion":"v1","kind":"Service","metadata":{"future":{"a":1},"name":"web","namespace":"shop"},"spec":{"a":1,"b":[true,false],"c":"x","d":{"e":1.5},"f":null,"g":"eA==","h":"1m30s","i":"2026-01-02T03:04:05Z","j":3,"k":{"edge-1":true,"edge-2":true}}}`,
		},
		"all see the object as it came": {
			"set: [{path: /metadata/labels/tier, value: \"'edge'\"}, {path: /metadata/labels/was, value: object.metadata.labels.tier}]", here,
			`{"apiVersion":"v1","kind":"Service","metadata":{"future":{"a":1},"labels":{"tier":"edge","was":"cloud"},"name":"web","namespace":"shop"},"spec":{"big":12345678901234567890,"clusterIPs":["10.0.0.1"],"ports":[{"name":"http","port":80},{"name":"https","port":443}],"type":"LoadBalancer"}}`,
		},

		"no such key":         {"drop: object.spec.nothing == 'x'", here, "spec.drop: no such key"},
		"no such overload":    {"drop: object.spec.type < 3", here, "spec.drop: no such overload"},
		"no bool":             {"drop: object.spec.type", here, "spec.drop: the expression is no bool"},
		"what objects hold":   {"drop: int(object.metadata.name) > 3", here, "spec.drop: type conversion error"},
		"costs too much":      {"drop: \"'" + strings.Repeat("x", 1000) + "'.matches('(x+)+y') || [1,2,3,4,5,6,7,8,9,10].all(a, [1,2,3,4,5,6,7,8,9,10].all(b, [1,2,3,4,5,6,7,8,9,10].all(c, [1,2,3,4,5,6,7,8,9,10].all(d, [1,2,3,4,5,6,7,8,9,10].all(e, a + b + c + d + e > 0)))))\"", here, "spec.drop: the expression costs too much"},
		"not an element":      {"set: [{path: /spec/ports/7/port, value: '1'}]", here, "spec.set[0]: the object has no place for the value"},
		"not an object":       {"set: [{path: /spec/type/x, value: '1'}]", here, "spec.set[0]: the object has no place for the value"},
		"not a number":        {"set: [{path: /spec/x, value: '0.0/0.0'}]", here, "spec.set[0].value: the expression fails"},
		"not a name":          {"set: [{path: /spec/x, value: '{1: 2}'}]", here, "spec.set[0].value: the expression fails"},
		"one fails, all fail": {"set: [{path: /spec/x, value: '1'}, {path: /spec/y, value: object.spec.z}]", here, "spec.set[1].value: no such key"},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := Compile(filterOf(t, tc.spec))
			if err != nil {
				t.Fatal(err)
			}
			got, v, err := f.ShowJSON(NewScene("kube-proxy", tc.place), []byte(object))
			if err != nil {
				var failed *RunError
				if !errors.As(err, &failed) {
					t.Fatalf("%v is no RunError", err)
				}
				if string(got) != object || v.Dropped != nil || v.Edits != nil {
					t.Error("the object was not left as it was")
				}
				if failed.Brief() != tc.want {
					t.Errorf("failed: %s (%v), want %s", failed.Brief(), err, tc.want)
				}
				return
			}
			seen := string(got)
			if got == nil && v.Dropped != nil {
				seen = "gone"
			}
			if seen != tc.want {
				t.Errorf("seen\n%s\nwant\n%s", seen, tc.want)
			}
		})
	}
}

// TestCostOfAllExpressions: many that are cheap are not.
func TestCostOfAllExpressions(t *testing.T) {
	text := "set:\n"
	for range changesMost {
		text += "- {path: /spec/x, value: '[1,2,3,4,5,6,7,8,9,10].map(a, [1,2,3,4,5,6,7,8,9,10].map(b, [1,2,3,4,5,6,7,8,9,10].map(c, a+b+c)))'}\n"
	}
	f, err := Compile(filterOf(t, text))
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = f.ShowJSON(NewScene("kube-proxy", here), []byte(object))
	var failed *RunError
	if !errors.As(err, &failed) || failed.Kind != "the expression costs too much" || failed.Field.String() == "spec.set[0].value" {
		t.Errorf("%v", err)
	}
}

// TestNoObject: what is no object at all is an error.
func TestNoObject(t *testing.T) {
	f, err := Compile(filterOf(t, "set: [{path: /spec/x, value: '1'}]"))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"null", "[]", "", "{"} {
		if got, _, err := f.ShowJSON(NewScene("kube-proxy", here), []byte(text)); err == nil || string(got) != text {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
}

func TestOrderAndSelection(t *testing.T) {
	low, high := filterOf(t, "priority: -1\ndrop: 'true'"), filterOf(t, "priority: 5\ndrop: 'true'\npools: [p]\nnodeSelector: {matchLabels: {zone: z1}}")
	low.Name, high.Name = "z", "a"
	same := filterOf(t, "priority: 5\ndrop: 'true'")
	same.Name = "b"
	var fs []*Filter
	for _, af := range []*v1alpha1.AccessFilter{same, high, low} {
		f, err := Compile(af)
		if err != nil {
			t.Fatal(err)
		}
		fs = append(fs, f)
	}
	Order(fs)
	if fs[0].Name != "z" || fs[1].Name != "a" || fs[2].Name != "b" {
		t.Errorf("order: %s %s %s", fs[0].Name, fs[1].Name, fs[2].Name)
	}
	for _, tc := range []struct {
		pool, zone string
		want       bool
	}{{"p", "z1", true}, {"p", "z2", false}, {"q", "z1", false}, {"", "z1", false}} {
		if got := fs[1].Selects(tc.pool, map[string]string{"zone": tc.zone}); got != tc.want {
			t.Errorf("%+v: %v", tc, got)
		}
	}
	if ok, err := Selects(&same.Spec, "", nil); !ok || err != nil {
		t.Errorf("a filter for all nodes: %v %v", ok, err)
	}
}
