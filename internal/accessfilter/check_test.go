package accessfilter

import (
	"errors"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// serviceSchema is as an API server has it, shortened.
const serviceSchema = `
type: object
properties:
  apiVersion: {type: string}
  kind: {type: string}
  metadata:
    type: object
    properties:
      name: {type: string}
      namespace: {type: string}
      generateName: {type: string}
      creationTimestamp: {type: string, format: date-time}
      labels: {type: object, additionalProperties: {type: string}}
      annotations: {type: object, additionalProperties: {type: string}}
  spec:
    type: object
    properties:
      type: {type: string}
      clusterIPs: {type: array, items: {type: string}}
      publishNotReadyAddresses: {type: boolean}
      ports:
        type: array
        items:
          type: object
          properties:
            name: {type: string}
            port: {type: integer, format: int32}
            targetPort: {oneOf: [{type: integer}, {type: string}], format: int-or-string}
      anything: {type: object, x-kubernetes-preserve-unknown-fields: true}
`

func schemaOf(t *testing.T, text string) *spec.Schema {
	t.Helper()
	var s spec.Schema
	if err := yaml.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

// filterOf is an AccessFilter of that spec, which is for Services as
// kube-proxy sees them if it does not say otherwise.
func filterOf(t testing.TB, text string) *v1alpha1.AccessFilter {
	t.Helper()
	af := &v1alpha1.AccessFilter{ObjectMeta: metav1.ObjectMeta{Name: "test", Generation: 1, ResourceVersion: "7"}}
	if err := yaml.UnmarshalStrict([]byte(text), &af.Spec); err != nil {
		t.Fatal(err)
	}
	if af.Spec.Components == nil {
		af.Spec.Components = []string{"kube-proxy"}
	}
	if af.Spec.Resources == nil {
		af.Spec.Resources = []v1alpha1.AccessFilterResource{{Version: "v1", Resource: "services"}}
	}
	return af
}

// TestCheck: what is wrong is said with the line and column.
func TestCheck(t *testing.T) {
	services := schemaOf(t, serviceSchema)
	schemas := func(r schema.GroupVersionResource) (*spec.Schema, error) {
		if r.Resource == "services" {
			return services, nil
		}
		return nil, nil
	}
	for name, tc := range map[string]struct {
		spec string
		want string // empty: none
	}{
		"drop":     {`drop: object.metadata.?labels['tier'].orValue('') == 'cloud' && object.metadata.namespace != 'default'`, ""},
		"scene":    {`keep: node.name in pool.nodes || component == 'kube-proxy' || node.labels['a'] == pool.name`, ""},
		"set":      {"set: [{path: /metadata/labels/a~1b, value: object.spec.type, when: 'object.spec.ports.exists(p, p.port > 80)'}]", ""},
		"set list": {"set: [{path: /spec/ports/0/port, value: '8080'}]", ""},
		"dates and ports as in JSON": {
			`drop: object.metadata.creationTimestamp.startsWith('2026') && object.spec.ports.exists(p, string(p.targetPort) == 'http')`, "",
		},
		"what is not told":   {`drop: object.spec.anything.at.all == 3`, ""},
		"an unknown version": {"resources: [{group: example.com, version: v1, resource: things}]\ndrop: object.spec.what == 3", ""},
		"kubernetes library": {`drop: object.spec.clusterIPs.all(i, cidr('10.0.0.0/8').containsIP(i))`, ""},

		"no such field":     {`drop: object.spec.tipe == 'x'`, "spec.drop:1:12: undefined field 'tipe' (for services v1)"},
		"second line":       {"drop: |-\n  object.spec.type == 'x' &&\n    object.spec.tipe == 'y'", "spec.drop:2:14: undefined field 'tipe' (for services v1)"},
		"no such variable":  {`drop: obj.spec`, "spec.drop:1:1: undeclared reference to 'obj' (in container '')"},
		"syntax":            {`drop: object.spec ==`, "spec.drop:1:15: Syntax error: mismatched input '<EOF>' expecting"},
		"types":             {`drop: object.spec.ports[0].port == 'http'`, "spec.drop:1:27: found no matching overload for '_==_' applied to '(int, string)' (for services v1)"},
		"not a bool":        {`keep: object.spec.type`, "spec.keep:1:1: the expression is of type string, and bool is wanted (for services v1)"},
		"scene's fields":    {`keep: node.pool == 'a'`, "spec.keep:1:5: undefined field 'pool'"},
		"path":              {"set: [{path: /spec/tipe, value: \"'x'\"}]", `spec.set[0].path:1:7: there is no field "tipe" (for services v1)`},
		"path of a list":    {"remove: [{path: /spec/ports/http/port}]", `spec.remove[0].path:1:13: "http" is no index of a list (for services v1)`},
		"path of a scalar":  {"remove: [{path: /spec/type/x}]", `spec.remove[0].path:1:12: a string has no field "x" (for services v1)`},
		"path's tilde":      {"remove: [{path: /spec/a~2}]", "spec.remove[0].path:1:8: ~ is written ~0"},
		"value's type":      {"set: [{path: /spec/type, value: '3'}]", "spec.set[0].value:1:1: the expression is of type int, and string is wanted"},
		"identity":          {"set: [{path: /metadata/uid, value: \"'x'\"}]", "spec.set[0].path: metadata.uid says which object it is"},
		"all metadata":      {"remove: [{path: /metadata}]", "spec.remove[0].path: metadata as a whole"},
		"nothing":           {"{}", "spec: the filter does nothing"},
		"selector":          {"drop: 'true'\nnodeSelector: {matchExpressions: [{key: a, operator: Nope}]}", `spec.nodeSelector: "Nope" is not a valid label selector operator`},
		"kubelet's pods":    {"components: [kubelet]\nresources: [{version: v1, resource: pods}]\nset: [{path: /metadata/labels/a, value: \"'b'\"}]", "spec.resources[0]: what kubelet sees of pods"},
		"too long":          {"drop: \"" + strings.Repeat("true||", 1000) + "true\"", "spec.drop: the expression has 6004 bytes, more than 4096"},
		"a bad regexp":      {`drop: object.spec.type.matches('(')`, "spec.drop:1:26: invalid matches argument"},
		"several":           {"drop: a\nkeep: b", "spec.drop:1:1: undeclared reference to 'a' (in container '')\nspec.keep:1:1: undeclared reference to 'b'"},
		"not an authorizer": {`drop: authorizer.path('/x').check('get').allowed()`, "spec.drop:1:1: undeclared reference to 'authorizer'"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Check(filterOf(t, tc.spec), schemas)
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if _, ok := errors.AsType[Problems](err); !ok {
				t.Fatalf("no problems, but %v", err)
			}
			if !strings.HasPrefix(err.Error(), tc.want) {
				t.Errorf("said\n%s\nwant\n%s", err, tc.want)
			}
		})
	}
	failure := errors.New("no")
	if err := Check(filterOf(t, "drop: 'true'"), func(schema.GroupVersionResource) (*spec.Schema, error) { return nil, failure }); !errors.Is(err, failure) {
		t.Errorf("schemas fail: %v", err)
	}
}

func TestExcerpt(t *testing.T) {
	err := Check(filterOf(t, "drop: |-\n  true &&\n  \tobj.spec"), func(schema.GroupVersionResource) (*spec.Schema, error) { return nil, nil })
	var problems Problems
	if !errors.As(err, &problems) {
		t.Fatal(err)
	}
	if got, want := problems[0].Excerpt(), " obj.spec\n ^"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	long := Problem{Text: strings.Repeat("x", 1000), Line: 1, Column: 500}
	if got := long.Excerpt(); len(got) > 2*excerptMost || !strings.HasSuffix(got, " ^") {
		t.Errorf("%q", got)
	}
	if fields := problems.Fields(); len(fields) != 1 || !strings.Contains(fields[0].Error(), "2:2: undeclared reference") {
		t.Errorf("%v", fields)
	}
}
