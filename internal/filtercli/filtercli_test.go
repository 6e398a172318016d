package filtercli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/sets"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/crds"
	"github.com/yurt-edge/yurt/playground"
)

const objects = `
apiVersion: v1
kind: Node
metadata: {name: edge-1, labels: {apps.openyurt.io/nodepool: hangzhou, site: north}}
---
apiVersion: v1
kind: Node
metadata: {name: edge-9, labels: {site: south}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80}], selector: {app: web}}
---
apiVersion: v1
kind: Service
metadata: {name: mail}
spec: {ports: [{port: 25}], type: LoadBalancer}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints:
- {addresses: [10.0.0.1], nodeName: edge-1}
- {addresses: [10.0.0.3], nodeName: cloud-1}
ports: [{port: 80}]
`

const example = `
apiVersion: network.openyurt.io/v1alpha1
kind: AccessFilter
metadata: {name: no-load-balancers}
spec:
  components: [kube-proxy]
  resources: [{version: v1, resource: services}]
  pools: [hangzhou]
  drop: object.spec.type == 'LoadBalancer'
---
apiVersion: network.openyurt.io/v1alpha1
kind: AccessFilter
metadata: {name: near-only}
spec:
  priority: -1
  components: [kube-proxy, coredns]
  resources: [{group: discovery.k8s.io, version: v1, resource: endpointslices}]
  set:
  - path: /endpoints
    value: object.endpoints.filter(e, has(e.nodeName) && e.nodeName in pool.nodes)
`

// run runs the command and returns what it wrote.
func run(t *testing.T, input string, args ...string) (out, progress string, err error) {
	t.Helper()
	cmd := New()
	var stdout, stderr bytes.Buffer
	cmd.SetIn(strings.NewReader(input))
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if input != "" {
		args = append(args, "-f=-")
	}
	cmd.SetArgs(append([]string{"test"}, args...))
	err = cmd.ExecuteContext(t.Context())
	return stdout.String(), stderr.String(), err
}

// TestFilterTest tries filters on a real API server, without a hub or the
// manager.
func TestFilterTest(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cloud, err := playground.StartControlPlane(ctx, playground.ControlPlaneConfig{Dir: filepath.Join(t.TempDir(), "cloud")})
	if err != nil {
		t.Fatal(err)
	}
	defer cloud.Stop()
	if err := cloud.Apply(ctx, string(crds.YAML()["apps.openyurt.io_nodepools.yaml"])); err != nil {
		t.Fatal(err)
	}
	if _, err := cloud.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=60s", "crd/nodepools.apps.openyurt.io"); err != nil {
		t.Fatal(err)
	}
	many := &strings.Builder{}
	for i := range page + 10 {
		fmt.Fprintf(many, "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: many-%d, labels: {of: many}}, data: {number: %q}}\n", i, fmt.Sprint(i))
	}
	pool := "---\n{apiVersion: apps.openyurt.io/v1beta2, kind: NodePool, metadata: {name: hangzhou}, spec: {type: Edge}}\n"
	if err := cloud.Apply(ctx, objects+pool+many.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := cloud.Kubectl(ctx, "patch", "nodepool", "hangzhou", "--subresource=status", "--type=merge", `-p={"status":{"nodes":["edge-1"]}}`); err != nil {
		t.Fatal(err)
	}
	cluster := "--kubeconfig=" + cloud.Kubeconfig

	t.Run("text", func(t *testing.T) {
		got, _, err := run(t, example, cluster, "--node=edge-1", "-n=default", "--component=kube-proxy", "--kept")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			"On node edge-1, in pool hangzhou:\n",
			"changed endpointslices.discovery.k8s.io default/web-1 for kube-proxy, by near-only spec.set[0]\n    --- cluster\n    +++ seen\n",
			"    -- addresses:\n    -  - 10.0.0.3\n    -  conditions: {}\n    -  nodeName: cloud-1\n",
			"dropped services default/mail for kube-proxy, by no-load-balancers spec.drop\n",
			"kept    services default/web for kube-proxy\n",
			" 1 dropped, 1 changed,",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("no %q in\n%s", want, got)
			}
		}
	})
	t.Run("json", func(t *testing.T) {
		got, _, err := run(t, example, cluster, "--node=edge-1", "-n=default", "--resource=endpointslices.discovery.k8s.io", "-o=json")
		if err != nil {
			t.Fatal(err)
		}
		seen := sets.New[string]()
		var end struct{ Sums Sums }
		for line := range strings.Lines(got) {
			var r Result
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatal(err)
			}
			if r.Name == "web-1" {
				seen.Insert(r.Component + " " + r.Result + " " + strings.Join(r.By, ""))
			}
			if err := json.Unmarshal([]byte(line), &end); err != nil {
				t.Fatal(err)
			}
		}
		if !seen.Equal(sets.New("kube-proxy changed near-only spec.set[0]", "coredns changed near-only spec.set[0]")) || end.Sums.Changed != 2 {
			t.Errorf("got %v, %+v in\n%s", seen, end, got)
		}
	})
	t.Run("pages", func(t *testing.T) {
		filter := strings.NewReplacer("services", "configmaps", "object.spec.type == 'LoadBalancer'", "int(object.data.number) % 2 == 0").Replace(example)
		got, _, err := run(t, filter, cluster, "--node=edge-1", "--resource=configmaps", "-l=of=many", "-o=json")
		if want := fmt.Sprintf(`{"sums":{"objects":%d,"kept":%d,"changed":0,"dropped":%d,"failed":0}}`, page+10, page/2+5, page/2+5); err != nil || !strings.Contains(got, want) {
			t.Errorf("got %v, want %s at the end of %.500s", err, want, got)
		}
	})
	for _, tc := range []struct {
		name, replace, with string
		args                []string
		want                []string
	}{
		{
			name: "field", replace: "object.spec.type", with: "object.spec.typ",
			want: []string{"standard input: AccessFilter no-load-balancers: spec.drop:1:12: undefined field 'typ' (for services v1)", "\n    object.spec.typ == 'LoadBalancer'\n               ^"},
		},
		{name: "syntax", replace: "== 'Load", with: "= 'Load", want: []string{"spec.drop:1:18: Syntax error"}},
		{name: "no node", args: []string{"--node=edge-7"}, want: []string{`read node edge-7: nodes "edge-7" not found`}},
		{name: "for no node", replace: "[hangzhou]", with: "[shanghai]", args: []string{"--resource=services"}, want: []string{"no filter is for that component and a resource", "--resource"}},
		{name: "component", args: []string{"--component=kubelet"}, want: []string{"spec.components", "--component"}},
		{name: "fails", replace: "object.spec.type == 'LoadBalancer'", with: "object.spec.externalName != ''", want: []string{"a filter failed on", "has(object.spec.field)"}},
		{name: "a type that does not fit", replace: "drop: object.spec.type == 'LoadBalancer'", with: "set: [{path: /spec/ports, value: dyn(3)}]", want: []string{"a filter failed on 3 objects"}, args: []string{"-n=default", "--resource=services"}},
		{name: "output", args: []string{"-o=yaml"}, want: []string{"--output"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := run(t, strings.Replace(example, tc.replace, tc.with, 1), append([]string{cluster, "--node=edge-1"}, tc.args...)...)
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v\nwant %q", err, want)
				}
			}
		})
	}
	t.Run("dropped by one where another fails", func(t *testing.T) {
		filter := strings.Replace(example, "object.spec.type == 'LoadBalancer'", "object.spec.externalName != ''", 1) +
			strings.Replace(example[:strings.LastIndex(example, "---")], "no-load-balancers", "nothing", 1)
		filter = strings.Replace(filter, "apiVersion", "---\napiVersion", 3)
		got, _, err := run(t, filter, cluster, "--node=edge-1", "-n=default", "--resource=services")
		if err == nil || !strings.Contains(got, "failed  services default/mail for kube-proxy, by nothing spec.drop: no-load-balancers: spec.drop: no such key") {
			t.Errorf("got %v in\n%s", err, got)
		}
	})
	t.Run("what is in no namespace", func(t *testing.T) {
		filter := strings.NewReplacer("services", "nodes", "object.spec.type == 'LoadBalancer'", "object.metadata.name == 'edge-9'").Replace(example)
		got, _, err := run(t, filter, cluster, "--node=edge-1", "-n=default", "--resource=nodes")
		if err != nil || !strings.Contains(got, "dropped nodes edge-9 for kube-proxy") {
			t.Errorf("got %v in\n%s", err, got)
		}
	})
	t.Run("resource that is not there", func(t *testing.T) {
		for name, want := range map[string]string{"gadgets": "the cluster has no gadgets", "service": "the cluster has no service, it calls them services"} {
			got, warned, err := run(t, strings.Replace(example, "resource: services", "resource: "+name, 1), cluster, "--node=edge-1")
			if err != nil || !strings.Contains(warned, "warning: no-load-balancers: expressions are not checked against fields: "+want) || !strings.Contains(got, "web-1") {
				t.Errorf("got %v, %q, %s", err, warned, got)
			}
		}
	})
	t.Run("guide", func(t *testing.T) {
		text, err := os.ReadFile("../../docs/guide/filters.md")
		if err != nil {
			t.Fatal(err)
		}
		tried := 0
		for block := range strings.SplitSeq(string(text), "```yaml\n") {
			block, _, _ = strings.Cut(block, "```")
			if strings.Contains(block, "kind: AccessFilter") {
				tried++
				if _, _, err := run(t, block, cluster, "--node=edge-1"); err != nil {
					t.Errorf("%v\n%s", err, block)
				}
			}
		}
		if tried == 0 {
			t.Error("the guide has no AccessFilter")
		}
	})
	t.Run("files", func(t *testing.T) {
		one, two, _ := strings.Cut(example, "---\n")
		list, err := yaml.YAMLToJSON([]byte(two))
		if err != nil {
			t.Fatal(err)
		}
		paths := []string{filepath.Join(t.TempDir(), "one.yaml"), filepath.Join(t.TempDir(), "two.json")}
		for i, text := range []string{one, fmt.Sprintf(`{"apiVersion":"v1","kind":"List","items":[%s]}`, list)} {
			if err := os.WriteFile(paths[i], []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, warned, err := run(t, "", cluster, "--node=edge-9", "-f="+paths[0], "-f="+paths[1])
		// It is in no pool, so it is alone.
		if err != nil || !strings.Contains(got, "On node edge-9, in no pool:") || strings.Contains(got, "services") || !strings.Contains(got, "nodeName: edge-1") {
			t.Errorf("got %q, %v", got, err)
		}
		if !strings.Contains(warned, "warning: no-load-balancers is not for node edge-9, which is in no pool") {
			t.Errorf("warned: %q", warned)
		}
	})
}

// TestBadFiles: without a cluster, one hears what is wrong in which field.
func TestBadFiles(t *testing.T) {
	for _, tc := range []struct{ name, replace, with, want string }{
		{"field that is not known", "drop:", "dorp:", `unknown field "spec.dorp"`},
		{"kind", "kind: AccessFilter", "kind: Filter", "document 1 of standard input: kind Filter of apiVersion network.openyurt.io/v1alpha1 is given, and AccessFilter"},
		{"version", "openyurt.io/v1alpha1", "openyurt.io/v1", "AccessFilter of network.openyurt.io/v1alpha1 is wanted"},
		{"no type", "apiVersion: network.openyurt.io/v1alpha1\nkind: AccessFilter\n", "", "document 1 of standard input: kind (none) of apiVersion (none) is given"},
		{"second document", "metadata: {name: near-only}", "- x", "document 2 of standard input: yaml: line 2"},
		{"no object", example, "hello", "document 1 of standard input: kind (none)"},
		{"no name", "{name: no-load-balancers}", "{}", "metadata.name: Required value"},
		{"no components", "  components: [kube-proxy]\n", "", "spec.components: Required value"},
		{"a component's name", "[kube-proxy]", "[Kube-Proxy]", `spec.components[0]: Invalid value: "Kube-Proxy"`},
		{"one component", "[kube-proxy]", "kube-proxy", "spec.components: Invalid value"},
		{"no resources", "  resources: [{version: v1, resource: services}]\n", "", "spec.resources: Required value"},
		{"no version", "version: v1, resource: services", "resource: services", "spec.resources[0].version: Required value"},
		{"a bool for an expression", "drop: object.spec.type == 'LoadBalancer'", "drop: true", `spec.drop: Invalid value: "boolean"`},
		{"a field twice", "spec:", "spec: {}\nspec:", `key "spec" already set in map`},
		{"nothing", example, "# nothing\n", "standard input has no AccessFilter"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "none"))
			_, _, err := run(t, strings.Replace(example, tc.replace, tc.with, 1), "--node=edge-1")
			if err == nil || !strings.HasPrefix(err.Error(), "read filters: ") || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v\nwant %q", err, tc.want)
			}
		})
	}
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "none"))
	t.Setenv("HOME", t.TempDir())
	if _, _, err := run(t, example, "--node=edge-1"); err == nil || !strings.Contains(err.Error(), "there is no credential for the cluster: give one by --kubeconfig") {
		t.Errorf("without a cluster: %v", err)
	}
}
