package dashboard

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/internal/hub"
	_ "github.com/yurt-edge/yurt/internal/manager" // with its metrics
)

const (
	chartDir = "../../deploy/chart"
	file     = "dashboards/yurt.json"
)

// dashboard is what Grafana needs of one, as of schema 41.
type dashboard struct {
	UID, Title    string
	SchemaVersion int
	Panels        []panel
	Templating    struct {
		List []struct {
			Name, Type string
			Definition string
			Datasource *datasource
		}
	}
}

type datasource struct{ Type, UID string }

type panel struct {
	ID          int
	Type, Title string
	Datasource  datasource
	GridPos     struct{ H, W, X, Y int }
	Targets     []struct {
		RefID      string
		Expr       string
		Datasource datasource
	}
}

func read(t *testing.T) dashboard {
	t.Helper()
	text, err := os.ReadFile(chartDir + "/" + file)
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestDashboardIsOneOfGrafana checks what Grafana takes amiss: places, numbers,
// kinds of panels, data sources and variables.
func TestDashboardIsOneOfGrafana(t *testing.T) {
	d := read(t)
	if d.UID == "" || len(d.UID) > 40 || d.Title == "" || d.SchemaVersion < 36 {
		t.Errorf("uid %q, title %q, schema %d", d.UID, d.Title, d.SchemaVersion)
	}
	variables := map[string]bool{"__rate_interval": true}
	for _, v := range d.Templating.List {
		variables[v.Name] = true
	}
	if v := d.Templating.List[0]; v.Name != "datasource" || v.Type != "datasource" {
		t.Errorf("the first variable is %+v: all data come from it", v)
	}
	ours := datasource{"prometheus", "${datasource}"}
	ids, cells := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if p.ID == 0 || ids[p.ID] {
			t.Errorf("panel %q has the number %d", p.Title, p.ID)
		}
		ids[p.ID] = true
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("panel %q is at %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, taken := cells[[2]int{x, y}]; taken {
					t.Fatalf("panel %q covers %q", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Type != "timeseries" || p.Title == "" || p.Datasource != ours || len(p.Targets) == 0 {
			t.Errorf("panel %q: type %s, from %+v, %d targets", p.Title, p.Type, p.Datasource, len(p.Targets))
		}
		refs := map[string]bool{}
		for _, q := range p.Targets {
			if q.RefID == "" || refs[q.RefID] || q.Datasource != ours {
				t.Errorf("panel %q: target %q from %+v", p.Title, q.RefID, q.Datasource)
			}
			refs[q.RefID] = true
			if strings.Count(q.Expr, "(") != strings.Count(q.Expr, ")") {
				t.Errorf("panel %q: %s", p.Title, q.Expr)
			}
			for _, m := range regexp.MustCompile(`\$\{?(\w+)`).FindAllStringSubmatch(q.Expr, -1) {
				if !variables[m[1]] {
					t.Errorf("panel %q: variable %s is not there", p.Title, m[1])
				}
			}
		}
	}
}

// words are those of PromQL, and labels, that the dashboard uses.
var words = []string{
	"sum", "max", "by", "on", "group_left", "rate", "increase", "histogram_quantile", "label_values",
	"pool", "job", "instance", "kind", "upstream", "to", "le", "name", "controller", "h",
}

// TestDashboardShowsWhatThereIs: each metric that it asks for is one of ours.
func TestDashboardShowsWhatThereIs(t *testing.T) {
	there := known(t)
	var exprs []string
	d := read(t)
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			exprs = append(exprs, q.Expr)
		}
	}
	for _, v := range d.Templating.List {
		exprs = append(exprs, v.Definition)
	}
	selector := regexp.MustCompile(`([a-z_:]+)\{[^}]*\}`)
	used := map[string]bool{}
	for _, e := range exprs {
		for _, m := range selector.FindAllStringSubmatch(e, -1) {
			name := strings.TrimSuffix(m[1], "_bucket")
			used[name] = true
			if !there[name] {
				t.Errorf("nobody has the metric %s: %s", name, e)
			}
		}
		rest := regexp.MustCompile(`\$\w+`).ReplaceAllString(selector.ReplaceAllString(e, ""), "")
		for _, word := range regexp.MustCompile(`[a-z_]+`).FindAllString(rest, -1) {
			if !slices.Contains(words, word) {
				t.Errorf("%q is no word of PromQL that is known here, nor a metric with a selector: %s", word, e)
			}
		}
	}
	if len(used) < 10 {
		t.Errorf("only %v are used", slices.Sorted(maps.Keys(used)))
	}
}

// known are the names of all metrics of a hub that runs and of the manager.
func known(t *testing.T) map[string]bool {
	t.Helper()
	var f hub.Flags
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.Add(fs)
	dir := t.TempDir()
	err := fs.Parse([]string{
		"--node-name=edge-1", "--server-addr=https://127.0.0.1:1", "--root-dir=" + dir, "--run-dir=", "--enable-dummy-if=false",
		"--proxy-secure-port=0", "--serve-port=0", "--store-key-source=file",
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := f.Config()
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	cfg.Log, cfg.Registerer, cfg.Gatherer = slog.New(slog.DiscardHandler), registry, registry
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- hub.Run(ctx, cfg) }()
	out := map[string]bool{}
	for end := time.Now().Add(time.Minute); !out["node_yurthub_condition"]; describe(t, out, registry) { // the last of all
		select {
		case err := <-done:
			t.Fatalf("the hub has ended: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(end) {
			t.Fatal("the hub has no metrics")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	managers, ok := metrics.Registry.(prometheus.Collector)
	if !ok {
		t.Fatalf("the manager's registry is a %T", metrics.Registry)
	}
	describe(t, out, managers)
	return out
}

func describe(t *testing.T, out map[string]bool, c prometheus.Collector) {
	t.Helper()
	all := make(chan *prometheus.Desc)
	go func() {
		defer close(all)
		c.Describe(all)
	}()
	for d := range all {
		_, rest, ok := strings.Cut(d.String(), `fqName: "`)
		name, _, _ := strings.Cut(rest, `"`)
		if !ok || name == "" {
			t.Fatalf("what is the name of %s?", d)
		}
		out[name] = true
	}
}

// TestDashboardInTheChart: it is there if asked for, and Grafana's sidecar
// finds it.
func TestDashboardInTheChart(t *testing.T) {
	chart, err := loader.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	render := func(values map[string]any) string {
		t.Helper()
		all, err := chartutil.ToRenderValues(chart, values, chartutil.ReleaseOptions{Name: "yurt", Namespace: "edge"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		files, err := engine.Engine{Strict: true}.Render(chart, all)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(files[chart.Name()+"/templates/dashboards.yaml"])
	}
	if text := render(nil); text != "" {
		t.Errorf("without being asked for:\n%s", text)
	}
	var m corev1.ConfigMap
	if err := yaml.UnmarshalStrict([]byte(render(map[string]any{"dashboards": map[string]any{"enabled": true}})), &m); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(chartDir + "/" + file)
	if err != nil {
		t.Fatal(err)
	}
	if m.Labels["grafana_dashboard"] != "1" || m.Namespace != "edge" || strings.TrimSpace(m.Data["yurt.json"]) != strings.TrimSpace(string(text)) {
		t.Errorf("%s in %s, labels %v: %s", m.Name, m.Namespace, m.Labels, fmt.Sprintf("%.80s", m.Data["yurt.json"]))
	}
}
