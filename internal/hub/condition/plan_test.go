package condition

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/yurt-edge/yurt/internal/report"
)

var noon = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

// well is a hub with nothing to complain of.
func well() Facts {
	return Facts{
		Link:        LinkFacts{Up: true, Since: noon.Add(-time.Hour)},
		Store:       StoreFacts{Dir: "/var/lib/yurthub/store"},
		Certificate: CertificateFacts{NotBefore: noon.AddDate(0, -1, 0), NotAfter: noon.AddDate(0, 11, 0)},
		Clock:       ClockFacts{Known: true},
	}
}

func of(typ string, in []report.Condition) report.Condition {
	for _, c := range in {
		if c.Type == typ {
			return c
		}
	}
	return report.Condition{}
}

func TestPlan(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Facts)
		typ    string
		status string
		reason string
		says   string
	}{
		{"link up", func(*Facts) {}, Link, "True", "LinkUp", "the cloud answers"},
		{"link refused", func(f *Facts) {
			f.Link.Up, f.Link.Reason = false, "10.0.0.1:6443: dial tcp 10.0.0.1:6443: connect: connection refused"
		}, Link, "False", "Refused", "since 2026-11-26T11:00:00Z: 10.0.0.1:6443: dial tcp 10.0.0.1:6443: connect: connection refused; `yurtadm doctor`"},
		{"black hole", func(f *Facts) {
			f.Link.Up, f.Link.Reason = false, "10.0.0.1:6443: dial tcp 10.0.0.1:6443: i/o timeout"
		}, Link, "False", "Silent", "yurtadm doctor"},
		{"link back", func(f *Facts) {
			f.Link.Last = &report.Cut{From: noon.Add(-2 * time.Hour), To: noon.Add(-time.Hour), How: "Silent"}
		}, Link, "True", "LinkUp", "again since 2026-11-26T11:00:00Z, after 1h0m0s without (Silent)"},
		{"disk full", func(f *Facts) { f.Store.Err, f.Store.Full = "no space left on device", true }, Store, "False", "DiskFull", "free some space"},
		{"disk broken", func(f *Facts) { f.Store.Err = "input/output error" }, Store, "False", "WriteFailed", "input/output error"},
		{"key in memory", func(f *Facts) { f.Store.Key = "the TPM is gone" }, Store, "False", "KeyNotKept", "lost with the next start: the TPM is gone"},
		{"key lost, empty", func(f *Facts) { f.Store.KeyLost, f.Missing = true, []string{"/v1/pods"} }, Store, "False", "KeyLost", "keep the node powered"},
		{"key lost, filled", func(f *Facts) { f.Store.KeyLost = true }, Store, "True", "KeyLost", "/var/lib/yurthub/store as *.lost"},
		{"key locked beats lost", func(f *Facts) { f.Store.Key, f.Store.KeyLost = "the TPM is gone", true }, Store, "False", "KeyNotKept", ""},
		{"store rebuilt, empty", func(f *Facts) { f.Store.Rebuilt, f.Missing = true, []string{"/v1/pods"} }, Store, "False", "Rebuilt", "keep the node powered"},
		{"store rebuilt, filled", func(f *Facts) { f.Store.Rebuilt = true }, Store, "True", "Rebuilt", "filled again"},
		{"damage while cut", func(f *Facts) { f.Store.Damaged, f.Link.Up = 1, false }, Store, "False", "Damaged", "until the cloud is in reach"},
		{"damage mended", func(f *Facts) { f.Store.Damaged = 1 }, Store, "True", "Mended", "fetched again"},
		{"no certificate", func(f *Facts) { f.Certificate = CertificateFacts{} }, Certificate, "False", "Missing", "no client certificate"},
		{"expired", func(f *Facts) {
			f.Certificate.NotAfter, f.Certificate.Remedy = noon.Add(-time.Hour), "run `this`"
		}, Certificate, "False", "Expired", "2026-11-26T11:00:00Z; run `this`"},
		{"of the future", func(f *Facts) { f.Certificate.NotBefore = noon.Add(time.Hour) }, Certificate, "False", "NotYetValid", "timedatectl"},
		{"cannot renew", func(f *Facts) { f.Certificate.Stuck, f.Certificate.Remedy = "denied", "run `this`" }, Certificate, "False", "CannotRenew", "2027-10-26T12:00:00Z and cannot be renewed: denied; run `this`"},
		{"expires soon", func(f *Facts) { f.Certificate.NotAfter = noon.Add(24 * time.Hour) }, Certificate, "True", "ExpiresSoon", "2026-11-27"},
		{"clock not compared", func(f *Facts) { f.Clock.Known = false }, Clock, "Unknown", "NotCompared", "not compared"},
		{"clock behind", func(f *Facts) { f.Clock.Skew = -3 * time.Hour }, Clock, "False", "Skewed", "3h0m0s behind"},
		{"clock a little ahead", func(f *Facts) { f.Clock.Skew = time.Minute }, Clock, "True", "Agrees", ""},
		{"journal empty", func(*Facts) {}, Journal, "True", "Empty", ""},
		{"journal waits", func(f *Facts) {
			f.Link.Up = false
			f.Journal.Status, f.Journal.Events, f.Journal.Oldest = 1, 250, noon.Add(-time.Minute)
		}, Journal, "True", "Waiting", "1 status write and more than 99 events wait for the cloud, the oldest since 2026-11-26T11:59:00Z; they are"},
		{"journal just got the link back", func(f *Facts) {
			f.Link.Since, f.Journal.Status = noon.Add(-time.Minute), 1
		}, Journal, "True", "Waiting", ""},
		{"journal stuck", func(f *Facts) { f.Journal.Status = 1 }, Journal, "False", "Stuck", "journalctl"},
		{"journal drops", func(f *Facts) {
			f.Link.Up = false
			f.Journal.Events, f.Journal.Dropped = 1000, 5
		}, Journal, "False", "Dropping", "until the link is back: `yurtadm doctor`"},
		{"autonomous", func(*Facts) {}, Autonomy, "True", "Held", ""},
		{"not yet autonomous", func(f *Facts) { f.Missing = []string{"/v1/pods", "/v1/nodes"} }, Autonomy, "False", "NotHeld", "/v1/pods, /v1/nodes;"},
		{"store fails", func(f *Facts) { f.Store.Err = "x" }, Autonomy, "Unknown", "StoreFailed", Store},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := well()
			tc.change(&f)
			got := of(tc.typ, Plan(f, noon))
			if got.Status != tc.status || got.Reason != tc.reason || !strings.Contains(got.Message, tc.says) {
				t.Errorf("got %+v, want %s %s %q", got, tc.status, tc.reason, tc.says)
			}
			if got.Status != report.True && len(got.Message) < 20 {
				t.Errorf("message %q is no help", got.Message)
			}
		})
	}
}

func TestHowCut(t *testing.T) {
	for reason, want := range map[string]string{
		"a:6443: tls: failed to verify certificate: x509: certificate signed by unknown authority": "NotTheCloud",
		"a:6443: tls: first record does not look like a TLS handshake":                             "NotTheCloud",
		"a:6443: answers, but not like an API server":                                              "NotTheCloud",
		"a:6443: not ready: 500 Internal Server Error":                                             "CloudNotReady",
		"a:6443: dial tcp: lookup api.example: no such host":                                       "NameNotFound",
		"a:6443: dial tcp 10.0.0.1:6443: connect: network is unreachable":                          "Unreachable",
		"a:6443: dial tcp 10.0.0.1:6443: connect: no route to host":                                "Unreachable",
		"a:6443: read tcp: connection reset by peer":                                               "Reset",
		"a:6443: no answer within 3s of connecting":                                                "Silent",
		"not probed yet": "LinkDown",
	} {
		if got := HowCut(reason); got != want {
			t.Errorf("%s: got %s, want %s", reason, got, want)
		}
	}
}

// apply patches a Node as the API server would.
func apply(t *testing.T, node *corev1.Node, want []report.Condition, now time.Time) (*corev1.Node, int) {
	t.Helper()
	changes, gone := differ(want, node.Status.Conditions)
	text, err := patch(changes, gone, now)
	if err != nil {
		t.Fatal(err)
	}
	before, err := json.Marshal(node)
	if err != nil {
		t.Fatal(err)
	}
	after, err := strategicpatch.StrategicMergePatch(before, text, corev1.Node{})
	if err != nil {
		t.Fatal(err)
	}
	out := &corev1.Node{}
	if err := json.Unmarshal(after, out); err != nil {
		t.Fatal(err)
	}
	return out, len(changes) + len(gone)
}

func conditionOf(node *corev1.Node, typ string) *corev1.NodeCondition {
	for i := range node.Status.Conditions {
		if string(node.Status.Conditions[i].Type) == typ {
			return &node.Status.Conditions[i]
		}
	}
	return nil
}

// TestPatchLeavesOthersAlone follows a Node through a cut.
func TestPatchLeavesOthersAlone(t *testing.T) {
	kubelets := corev1.NodeCondition{
		Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady",
		LastHeartbeatTime: metav1.NewTime(noon), LastTransitionTime: metav1.NewTime(noon),
	}
	node := &corev1.Node{}
	node.Status.Conditions = []corev1.NodeCondition{kubelets, {Type: "YurtHubOfAnOlderVersion", Status: corev1.ConditionTrue}}
	f := well()
	node, n := apply(t, node, Plan(f, noon), noon)
	if n != 7 || len(node.Status.Conditions) != 7 || conditionOf(node, "YurtHubOfAnOlderVersion") != nil {
		t.Fatalf("%d changes, conditions %+v", n, node.Status.Conditions)
	}
	if got := conditionOf(node, Link); !got.LastTransitionTime.Time.Equal(f.Link.Since) {
		t.Errorf("link up since %s, want when it came up, %s", got.LastTransitionTime, f.Link.Since)
	}
	if node, n = apply(t, node, Plan(f, noon.Add(time.Minute)), noon.Add(time.Minute)); n != 0 {
		t.Errorf("%d changes with nothing changed", n)
	}

	// Cut; the reason becomes another; healed by a hub that has restarted.
	cut := noon.Add(10 * time.Minute)
	f.Link = LinkFacts{Since: cut, Reason: "connection refused"}
	node, _ = apply(t, node, Plan(f, cut.Add(10*time.Second)), cut.Add(10*time.Second))
	f.Link.Reason = "i/o timeout"
	node, n = apply(t, node, Plan(f, cut.Add(time.Minute)), cut.Add(time.Minute))
	got := conditionOf(node, Link)
	if n != 1 || got.Reason != "Silent" || !got.LastTransitionTime.Time.Equal(cut) || !got.LastHeartbeatTime.After(cut) {
		t.Errorf("%d changes, %+v, want one since %s", n, got, cut)
	}
	f.Link = LinkFacts{Up: true, Since: cut.Add(time.Hour)}
	node, _ = apply(t, node, Plan(f, cut.Add(2*time.Hour)), cut.Add(2*time.Hour))
	got = conditionOf(node, Link)
	if want := "after 1h0m0s without (Silent)"; !strings.Contains(got.Message, want) || !got.LastTransitionTime.Time.Equal(f.Link.Since) {
		t.Errorf("got %+v, want %q", got, want)
	}

	// The feature goes.
	node, _ = apply(t, node, nil, noon.Add(3*time.Hour))
	if len(node.Status.Conditions) != 1 || node.Status.Conditions[0].Reason != kubelets.Reason ||
		!node.Status.Conditions[0].LastTransitionTime.Equal(&kubelets.LastTransitionTime) {
		t.Errorf("left %+v, want the kubelet's alone, as it was", node.Status.Conditions)
	}
}
