package conform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/test/bed"
)

// TestConditionsOfTheHub: what the hub says of itself on its Node, through a
// cut and until the feature is turned off.
func TestConditionsOfTheHub(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	const node = "edge-self"
	busy.node(t, node)
	hub, link := busy.hub(t, node)
	restart := func(args ...string) {
		t.Helper()
		hub.Stop()
		hub.Args = args
		if err := hub.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	restart("--node-conditions=true")
	config, err := hub.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	local, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	// says waits until the Node has the condition with the status and reason.
	says := func(from kubernetes.Interface, typ, status, reason string) (found corev1.NodeCondition) {
		t.Helper()
		// A turn settles, and writes keep their distance.
		err := bed.Until(t.Context(), 2*patience, func(ctx context.Context) error {
			node, err := from.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{ResourceVersion: "0"})
			if err != nil {
				return err
			}
			for _, c := range node.Status.Conditions {
				if string(c.Type) == typ && string(c.Status) == status && c.Reason == reason {
					found = c
					return nil
				}
			}
			return fmt.Errorf("conditions are %v, want %s %s %s", node.Status.Conditions, typ, status, reason)
		})
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	for typ, reason := range map[string]string{
		"YurtHubLinkReady": "LinkUp", "YurtHubStoreReady": "Healthy", "YurtHubCertificateReady": "Valid",
		"YurtHubJournalReady": "Empty", "Autonomy": "Held",
	} {
		says(busy.admin, typ, "True", reason)
	}

	if err := link.Cut(bed.Down); err != nil {
		t.Fatal(err)
	}
	// The socket shows it at once and needs no cloud to know who asks.
	mustAwait(t, func(ctx context.Context) error {
		report, err := askSocket(ctx, hub)
		if err != nil {
			return err
		}
		if report.Online || !slices.ContainsFunc(report.Conditions, func(c condition) bool {
			return c.Type == "YurtHubLinkReady" && c.Status == "False"
		}) {
			return fmt.Errorf("the socket says %+v", report)
		}
		return nil
	})
	down := says(local, "YurtHubLinkReady", "False", "Refused")
	if !strings.Contains(down.Message, "yurtadm doctor") {
		t.Errorf("message %q names no remedy", down.Message)
	}
	says(local, "Ready", "True", "Test")

	if err := link.Heal(); err != nil {
		t.Fatal(err)
	}
	// What was journalled reaches the cloud, whether the link's return, which
	// settles first, is told by then or not. Its timing is in the unit tests.
	mustAwait(t, func(ctx context.Context) error {
		node, err := busy.admin.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == "YurtHubLinkReady" && (c.Reason == "Refused" || strings.Contains(c.Message, "without (Refused)")) {
				return nil
			}
		}
		return fmt.Errorf("the cloud was not told of the cut: %v", node.Status.Conditions)
	})
	mustAwait(t, func(ctx context.Context) error {
		events, err := busy.admin.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + node})
		if err != nil {
			return err
		}
		var reasons []string
		for _, e := range events.Items {
			if e.Source.Component == "yurthub" && e.Reason != "YurtHubLinkRestored" {
				reasons = append(reasons, e.Reason)
			}
		}
		if got := strings.Join(reasons, " "); got != "YurtHubLinkRefused" {
			return fmt.Errorf("events %q", got)
		}
		return nil
	})

	restart("--node-conditions=false")
	mustAwait(t, func(ctx context.Context) error {
		node, err := busy.admin.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if strings.HasPrefix(string(c.Type), "YurtHub") || c.Type == "Autonomy" {
				return fmt.Errorf("%s is still there", c.Type)
			}
		}
		if len(node.Status.Conditions) == 0 {
			return errors.New("the conditions of others are gone")
		}
		return nil
	})
}

type condition struct{ Type, Status string }

type hubReport struct {
	Online     bool
	Conditions []condition
}

// askSocket asks as root on the node would.
func askSocket(ctx context.Context, hub *bed.Hub) (out hubReport, err error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(hub.Dir, "hub.sock"))
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://hub/v1/status", nil)
	if err != nil {
		return out, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return out, fmt.Errorf("the hub answered %s", resp.Status)
	}
	return out, json.NewDecoder(resp.Body).Decode(&out)
}

// TestDoctorOnRealServer: what the server says of the node's rights, and of a
// certificate that it does not know.
func TestDoctorOnRealServer(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := t.TempDir()
	doctor := filepath.Join(dir, "yurtadm")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", doctor, "github.com/yurt-edge/yurt/cmd/yurtadm").CombinedOutput(); err != nil {
		t.Fatalf("build yurtadm: %v: %s", err, out)
	}
	elsewhere, err := playground.NewAuthority(dir, "elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		by     *playground.Authority
		groups []string
		check  string
		result string
		says   string
	}{
		{"rights", busy.Cloud.CA, []string{"system:nodes"}, "rbac", "ok", "rights that the hub needs"},
		{"no rights", busy.Cloud.CA, nil, "rbac", "fail", "may not list services, watch services, list endpointslices"},
		{"unknown", elsewhere, []string{"system:nodes"}, "answer", "fail", "does not accept the certificate"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cert, key, err := tc.by.Client("system:node:edge-1", tc.groups...)
			if err != nil {
				t.Fatal(err)
			}
			pair := filepath.Join(t.TempDir(), "node.pem")
			if err := os.WriteFile(pair, slices.Concat(cert, key), 0o600); err != nil {
				t.Fatal(err)
			}
			// Its exit code is of the whole; the ports are those of no hub.
			out, _ := exec.CommandContext(ctx, doctor, "doctor", "--unit=", "-o", "json", "--credential", pair,
				"--root-dir", busy.Hub.Dir, "--run-dir", busy.Hub.Dir, "--server-addr", busy.Cloud.RESTConfig().Host).Output()
			var got struct {
				Checks []struct{ Check, Outcome, Text string }
			}
			if err := json.Unmarshal(out, &got); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, c := range got.Checks {
				if c.Check == tc.check {
					if c.Outcome != tc.result || !strings.Contains(c.Text, tc.says) {
						t.Errorf("got %+v, want %s %q", c, tc.result, tc.says)
					}
					return
				}
			}
			t.Errorf("no check %s in %s", tc.check, out)
		})
	}
}
