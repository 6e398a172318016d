package doctor

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/report"
)

// TestStatusPool: the table and the JSON show the pool, and what waits and why.
func TestStatusPool(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	r := report.Report{
		Node: "edge-2", Pool: "hangzhou", Since: now.Add(-3 * time.Minute),
		Sharing: &report.Sharing{
			Role: report.RoleMember, Upstream: "edge-1", Live: true,
			Peers: []report.Peer{{Node: "edge-1", Address: "10.1.0.1", Leader: true, Link: true, Live: true, Seen: now}, {Node: "edge-3"}},
		},
		Vouching: &report.Vouching{By: "edge-1", For: []string{"edge-3"}},
		Endings:  []report.Ending{{Pod: "shop/web-0", Why: "deleted", Since: now, Due: now.Add(time.Hour), Announced: true}},
	}
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "unix", filepath.Join(dir, report.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	server := &httpx.Server{Listener: l, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(r); err != nil {
			t.Error(err)
		}
	})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	run := func(args ...string) string {
		t.Helper()
		var out strings.Builder
		cmd := NewStatus()
		cmd.SetArgs(append([]string{"pool", "--unit=", "--root-dir", dir, "--run-dir", dir}, args...))
		cmd.SetOut(&out)
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Error(err)
		}
		return out.String()
	}
	shows := func(out string, texts ...string) {
		t.Helper()
		out = strings.Join(strings.Fields(out), " ")
		for _, text := range texts {
			if !strings.Contains(out, text) {
				t.Errorf("no %q in\n%s", text, out)
			}
		}
	}
	shows(run(), "edge-2, pool hangzhou", "DOWN for 3 min", "vouched for by edge-1", "vouches for edge-3",
		"shared member; services and the like come from node edge-1, which hears the cloud",
		"edge-1 10.1.0.1 leader yes yes", "edge-3 member no no never",
		"shop/web-0", "deleted in the cloud while the node was away")
	var v poolView
	if err := json.Unmarshal([]byte(run("-o", "json")), &v); err != nil || v.Sharing.Upstream != "edge-1" || v.Endings[0].Why != "deleted" {
		t.Errorf("json: %+v, %v", v, err)
	}
	r = report.Report{Node: "edge-2", Online: true, Since: now}
	shows(run(), "edge-2, in no pool", "link up", "No pod waits to be stopped.")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
