package repo

import (
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// parts never import one another: they meet in api and on the wire.
var parts = []string{"hub", "manager", "gateway", "dock", "tunnel", "image", "dashboard", "node", "doctor"}

// leaves are the hub's packages that import no other package of the hub but
// those named. Arrows inside the hub point down only.
var leaves = map[string][]string{
	"internal/hub/store":   {},
	"internal/hub/clock":   {},
	"internal/hub/wire":    {},
	"internal/hub/request": {"internal/hub/wire"},
}

// pure code decides and does nothing else, so that its tests need no world:
// every plan.go, and these files and folders.
var pure = []string{"internal/hub/wire", "internal/gateway/topology", "internal/dock/sync"}

// notPure lists what pure code does not import, by prefix. The scheme of
// client-go is types only.
var notPure = []string{"k8s.io/client-go", "net/http", "os", "log"}

// notInHub lists what the hub's binary must not link: it runs in little memory
// and knows no cloud.
var notInHub = []string{
	"sigs.k8s.io/controller-runtime", "k8s.io/kubernetes", "helm.sh", "github.com/aws",
	"github.com/Azure", "cloud.google.com", "github.com/aliyun", "github.com/containerd",
}

// nobody lists imports that no package has, with the reason.
var nobody = map[string]string{
	"github.com/pkg/errors": "package errors and %w do the same",
	"math/rand":             "math/rand/v2 needs no seed",
	"io/ioutil":             "io and os have its functions",
	"k8s.io/kubernetes":     "only playground/controlplane builds Kubernetes",
}

// partOf returns the part that a folder of this module belongs to, or "".
func partOf(dir string) string {
	for _, p := range parts {
		if under(dir, "internal/"+p) {
			return p
		}
	}
	return ""
}

// importViolations applies every rule on imports to our packages in pkgs.
func importViolations(pkgs []*pkg) []string {
	var bad []string
	standard := map[string]bool{"C": true}
	for _, p := range pkgs {
		standard[p.ImportPath] = p.Standard
	}
	for _, p := range pkgs {
		if !p.ours() {
			continue
		}
		from := rel(p.ImportPath)
		deny := func(to, why string) { bad = append(bad, from+" imports "+to+": "+why) }
		for _, importPath := range p.all() {
			if reason, ok := nobody[importPath]; ok {
				deny(importPath, reason)
			}
			if under(importPath, "k8s.io/klog") && from != "internal/daemon" {
				deny(importPath, "klog is bridged to slog once, in internal/daemon")
			}
			to := rel(importPath)
			if to == "" {
				continue
			}
			switch {
			case under(to, "cmd"):
				deny(to, "nothing imports a command")
			case under(to, "playground/controlplane"):
				deny(to, "it is built, never imported")
			case partOf(to) == "":
			case under(from, "internal") && partOf(from) == "":
				deny(to, "a shared package imports no part")
			case under(from, "internal") && partOf(from) != partOf(to):
				deny(to, "parts meet in api and on the wire only")
			case from == "test/bench" && to == "internal/hub":
				// Its workers are many hubs in one process, by their front door.
			case from == "test/certs" && to == "internal/hub":
				// Its hubs have clocks of their own, by their front door.
			case under(from, "playground"), under(from, "test"), under(from, "api"):
				deny(to, "it sees parts from outside, as a user does")
			}
			// A leaf's own test helpers lie below it.
			helper := strings.HasSuffix(path.Base(to), "test") && under(to, from)
			if allowed, ok := leaves[from]; ok && under(to, "internal/hub") && to != from && !helper && !slices.Contains(allowed, to) {
				deny(to, "arrows inside the hub point down only")
			}
		}
		for _, importPath := range p.Imports {
			if to := rel(importPath); strings.HasSuffix(path.Base(to), "test") && !strings.HasSuffix(path.Base(from), "test") {
				deny(to, "a test helper belongs to tests")
			}
			if under(from, "api") && !standard[importPath] && !under(rel(importPath), "api") &&
				!under(importPath, "k8s.io/api") && !under(importPath, "k8s.io/apimachinery") {
				deny(importPath, "api has types only")
			}
		}
		if under(from, "internal/hub") || from == "cmd/yurthub" {
			for _, dep := range p.Deps {
				for _, no := range notInHub {
					if under(dep, no) {
						deny(dep, "the hub stays small and knows no cloud")
					}
				}
			}
		}
	}
	return bad
}

func TestImports(t *testing.T) {
	report(t, importViolations(packages(t)))
}

func TestImportRulesBite(t *testing.T) {
	for _, tc := range []struct{ name, from, to, want string }{
		{"part to part", "internal/hub/store", "internal/manager", "parts meet"},
		{"same part", "internal/hub", "internal/hub/store", ""},
		{"shared to part", "internal/daemon", "internal/hub", "shared package"},
		{"part to shared", "internal/hub", "internal/daemon", ""},
		{"command to part", "cmd/yurthub", "internal/hub", ""},
		{"anything to a command", "internal/hub", "cmd/yurthub", "nothing imports a command"},
		{"playground to part", "playground", "internal/hub", "from outside"},
		{"playground to shared", "playground", "internal/kube", ""},
		{"tests to part", "test/e2e", "internal/hub/store", "from outside"},
		{"bench to the hub's front door", "test/bench", "internal/hub", ""},
		{"wrong clocks to the hub's front door", "test/certs", "internal/hub", ""},
		{"bench to the hub's inside", "test/bench", "internal/hub/store", "from outside"},
		{"up inside the hub", "internal/hub/store", "internal/hub/replica", "point down"},
		{"helper outside tests", "internal/hub/replica", "internal/hub/store/storetest", "belongs to tests"},
		{"api to shared", "api/apps/v1", "internal/kube", "types only"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := importViolations([]*pkg{{ImportPath: module + "/" + tc.from, Imports: []string{module + "/" + tc.to}}})
			if tc.want == "" && len(got) > 0 || tc.want != "" && (len(got) == 0 || !strings.Contains(got[0], tc.want)) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
	hub := &pkg{ImportPath: module + "/cmd/yurthub", Deps: []string{"sigs.k8s.io/controller-runtime/pkg/client"}}
	if got := importViolations([]*pkg{hub}); len(got) != 1 {
		t.Errorf("a hub with controller-runtime: got %q, want one violation", got)
	}
}

// pureViolations returns what the pure file s imports and must not.
func pureViolations(s *source) []string {
	isPure := path.Base(s.name) == "plan.go" || s.name == "internal/hub/link/state.go"
	for _, dir := range pure {
		isPure = isPure || under(s.dir(), dir)
	}
	if !isPure || s.test() {
		return nil
	}
	var bad []string
	for _, spec := range s.file.Imports {
		importPath, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue // The parser has checked it.
		}
		for _, no := range notPure {
			if under(importPath, no) && importPath != "k8s.io/client-go/kubernetes/scheme" {
				bad = append(bad, s.at(spec)+": pure code imports "+importPath)
			}
		}
	}
	return bad
}

func TestPureCodeStaysPure(t *testing.T) {
	for _, s := range sources(t) {
		report(t, pureViolations(s))
	}
}

func TestPureRuleBites(t *testing.T) {
	const code = "package x\nimport (\n\"fmt\"\n\"net/http\"\n)\n"
	for name, want := range map[string]int{
		"internal/gateway/plan.go": 1, "internal/hub/link/state.go": 1, "internal/hub/wire/list.go": 1, "internal/hub/hub.go": 0,
	} {
		s, err := parse(name, code)
		if err != nil {
			t.Fatal(err)
		}
		if got := pureViolations(s); len(got) != want {
			t.Errorf("%s: got %q, want %d violations", name, got, want)
		}
	}
}

func TestKubernetesIsBuiltInPlaygroundOnly(t *testing.T) {
	for _, name := range files(t, "go.mod") {
		if strings.Contains(read(t, name), "k8s.io/kubernetes ") && !under(name, "playground") {
			t.Errorf("%s requires k8s.io/kubernetes: only a nested module of the playground may", name)
		}
	}
	for _, s := range sources(t) {
		for _, spec := range s.file.Imports {
			to := rel(strings.Trim(spec.Path.Value, `"`))
			if under(s.dir(), "playground/controlplane") && to != "" && !under(to, "playground/controlplane") {
				t.Errorf("%s: the nested module imports %s, which is ours", s.at(spec), to)
			}
		}
	}
}

// TestHubDependencies compares the modules that the hub imports directly with
// a reviewed list: a new dependency is a decision.
func TestHubDependencies(t *testing.T) {
	const name = "testdata/yurthub-deps.txt"
	pkgs := packages(t)
	moduleOf := map[string]string{}
	for _, p := range pkgs {
		if p.Module != nil && !p.Standard {
			moduleOf[p.ImportPath] = p.Module.Path
		}
	}
	linked := map[string]bool{}
	for _, p := range pkgs {
		if from := rel(p.ImportPath); from == "cmd/yurthub" {
			linked[p.ImportPath] = true
			for _, dep := range p.Deps {
				linked[dep] = true
			}
		}
	}
	var direct []string
	for _, p := range pkgs {
		if !p.ours() || !linked[p.ImportPath] {
			continue
		}
		for _, importPath := range p.Imports {
			if m := moduleOf[importPath]; m != "" && m != module {
				direct = append(direct, m)
			}
		}
	}
	slices.Sort(direct)
	compareFile(t, name, strings.Join(slices.Compact(direct), "\n")+"\n")
}
