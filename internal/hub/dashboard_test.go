package hub

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"

	"github.com/yurt-edge/yurt/internal/grafanatest"
)

// TestDashboardShowsWhatHubsHave: each metric of hubs that the chart's dashboard
// asks for is one of a hub that runs.
func TestDashboardShowsWhatHubsHave(t *testing.T) {
	there, used := metricsOfAHub(t), 0
	for name, expr := range grafanatest.Metrics(t, "../../deploy/chart/dashboards/yurt.json") {
		if !strings.HasPrefix(name, "node_yurthub_") {
			continue // the manager's test looks for it
		}
		used++
		if !there[name] {
			t.Errorf("no hub has the metric %s: %s", name, expr)
		}
	}
	if used < 10 {
		t.Errorf("only %d metrics are used", used)
	}
}

func metricsOfAHub(t *testing.T) map[string]bool {
	t.Helper()
	var f Flags
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
	go func() { done <- Run(ctx, cfg) }()
	var out map[string]bool
	for end := time.Now().Add(time.Minute); !out["node_yurthub_condition"]; out = grafanatest.Names(t, registry) { // the last of all
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
	return out
}
