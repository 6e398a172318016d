package manager

import (
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/internal/grafanatest"
)

const dashboard = chartDir + "/dashboards/yurt.json"

// TestDashboardIsOneOfGrafana: the chart's dashboard is what Grafana takes.
func TestDashboardIsOneOfGrafana(t *testing.T) { grafanatest.Check(t, dashboard) }

// TestDashboardShowsWhatTheManagerHas: each metric that the chart's dashboard
// asks for, and hubs do not have, is one of the manager.
func TestDashboardShowsWhatTheManagerHas(t *testing.T) {
	registry, ok := metrics.Registry.(prometheus.Collector)
	if !ok {
		t.Fatalf("the manager's registry is a %T", metrics.Registry)
	}
	there, used := grafanatest.Names(t, registry), 0
	for name, expr := range grafanatest.Metrics(t, dashboard) {
		if strings.HasPrefix(name, "node_yurthub_") {
			continue // the hub's test looks for it
		}
		used++
		if !there[name] {
			t.Errorf("the manager has no metric %s: %s", name, expr)
		}
	}
	if used < 3 {
		t.Errorf("only %d metrics are used", used)
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
	text, err := os.ReadFile(dashboard)
	if err != nil {
		t.Fatal(err)
	}
	if m.Labels["grafana_dashboard"] != "1" || m.Namespace != "edge" || strings.TrimSpace(m.Data["yurt.json"]) != strings.TrimSpace(string(text)) {
		t.Errorf("%s in %s, labels %v: %.80s", m.Name, m.Namespace, m.Labels, m.Data["yurt.json"])
	}
}
