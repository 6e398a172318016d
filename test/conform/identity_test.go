package conform

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/test/bed"
)

// caller is somebody with a credential, or none.
type caller struct {
	name  string
	token string
	cfg   *rest.Config // of a client certificate; nil: the token alone
}

func (w *world) callers(t *testing.T) []caller {
	t.Helper()
	unbound, err := w.token(t.Context(), "conform-a", "reader", "")
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(w.tokens["reader"], ".")
	forged := parts[0] + "." + parts[1] + "." + strings.Split(w.tokens["narrow"], ".")[2]
	node, err := w.Cloud.ClientConfig("system:node:edge-1", "system:nodes")
	if err != nil {
		t.Fatal(err)
	}
	return []caller{
		{name: "bound", token: w.tokens["reader"]},
		{name: "unbound", token: unbound},
		{name: "narrow", token: w.tokens["narrow"]},
		{name: "forged", token: forged},
		{name: "garbage", token: "garbage"},
		{name: "nobody"},
		{name: "node", cfg: node},
	}
}

// pair returns both sides for a caller.
func (w *world) pair(t *testing.T, hub *bed.Hub, c caller) (server, edge *side) {
	t.Helper()
	cfg := c.cfg
	if cfg == nil {
		cfg = w.config(c.token)
	}
	through, err := hub.RESTConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return newSide(t, "API server", cfg), newSide(t, "hub", through)
}

// sameVerdict compares answers as far as rights go: all of an answer that is
// given, code and reason of one that is refused. Messages differ.
func sameVerdict(want, got answer) error {
	if want.code == http.StatusOK {
		return differ(want.timeless(), got.timeless())
	}
	w, err := want.status()
	if err != nil {
		return err
	}
	g, err := got.status()
	if err != nil {
		return fmt.Errorf("no Status: %w: %s", err, got.body)
	}
	if anonymous := strings.Contains(w.Message, `"system:anonymous"`); anonymous {
		// The hub serves nobody unknown, the API server an anonymous user
		// who may nothing.
		want.code, w.Reason = http.StatusUnauthorized, metav1.StatusReasonUnauthorized
	}
	if want.code != got.code || w.Reason != g.Reason || w.Status != g.Status || want.media() != got.media() {
		return fmt.Errorf("API server: %d %s, hub: %d %s: %s", want.code, w.Reason, got.code, g.Reason, g.Message)
	}
	return nil
}

var verdictQuestions = []question{
	{"/api/v1/namespaces/conform-a/configmaps", "resourceVersion=0", inJSON},
	{"/api/v1/namespaces/conform-a/configmaps", "", inJSON},
	{"/api/v1/namespaces/conform-a/configmaps/settings", "resourceVersion=0", inJSON},
	{"/api/v1/namespaces/conform-a/secrets", "resourceVersion=0", inJSON},
	{"/api/v1/namespaces/conform-a/secrets", "", inProto},
	{"/api/v1/secrets", "resourceVersion=0", inJSON},
	{"/api/v1/secrets", "resourceVersion=0&labelSelector=app%3Dweb", inJSON},
	{"/api/v1/namespaces/conform-a/secrets/password", "resourceVersion=0", inJSON},
	{"/api/v1/namespaces/conform-a/secrets/password", "", inJSON},
	{"/api/v1/namespaces/conform-a/secrets/nobody", "resourceVersion=0", inJSON},
	{"/api/v1/secrets", "watch=true&timeoutSeconds=1&resourceVersion=0", inJSON},
	{"/api/v1/namespaces/conform-a/secrets", "watch=true&timeoutSeconds=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true", inProto},
	{"/api/v1/pods", "resourceVersion=0&fieldSelector=spec.nodeName%3Dedge-1", inJSON},
}

// TestVerdicts compares who may read what, with every kind of credential. The
// replica holds all that is asked for, because the reader was informed of it:
// its rights are not lent to the others. While the cloud is away everybody
// may do what they could before.
func TestVerdicts(t *testing.T) {
	t.Parallel()
	_, reader := calm.sides(t, calm.Hub, "reader")
	for _, path := range []string{"/api/v1/configmaps", "/api/v1/secrets", "/api/v1/pods"} {
		warm(t, reader, path)
	}
	type asked struct {
		caller string
		q      question
	}
	verdicts, edges := map[asked]answer{}, map[string]*side{}
	for _, c := range calm.callers(t) {
		server, edge := calm.pair(t, calm.Hub, c)
		edges[c.name] = edge
		for _, q := range verdictQuestions {
			want, got := server.mustAsk(t, q), edge.mustAsk(t, q)
			if err := sameVerdict(want, got); err != nil {
				t.Errorf("%s: %s: %v", c.name, q, err)
			}
			verdicts[asked{c.name, q}] = want
		}
	}
	cut(t, calm.Link, reader, bed.Down)
	for a, want := range verdicts {
		got := edges[a.caller].mustAsk(t, a.q)
		if err := sameVerdict(want, got); err != nil {
			t.Errorf("offline: %s: %s: %v", a.caller, a.q, err)
		}
	}
}

// TestImpersonation is about callers for whom the API server must be told who
// they are, and those who say that they are somebody else.
// Its caller is in no other test: the rights it gains here others must not see.
func TestImpersonation(t *testing.T) {
	t.Parallel()
	hub, _ := busy.hub(t, "edge-rose")
	rose, err := busy.Cloud.ClientConfig("rose", "florists")
	if err != nil {
		t.Fatal(err)
	}
	_, edge := busy.pair(t, hub, caller{name: "rose", cfg: rose})
	q := question{"/api/v1/namespaces/conform-a/configmaps", "", inJSON}
	if a := edge.mustAsk(t, q); a.code != http.StatusForbidden {
		t.Errorf("rose, whom the hub may not stand for: %d %s", a.code, a.body)
	}
	err = busy.Cloud.Apply(t.Context(), `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: conform-impersonator}
rules:
- {apiGroups: [""], resources: [users, groups], verbs: [impersonate]}
- {apiGroups: [authentication.k8s.io], resources: ["*"], verbs: [impersonate]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: conform-impersonator}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: conform-impersonator}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: "system:node:edge-rose"}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: conform-florists}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: conform-narrow}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: florists}]
`)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if _, err := busy.Cloud.Kubectl(ctx, "delete", "clusterrolebinding", "conform-impersonator", "conform-florists"); err != nil {
			t.Error(err)
		}
	})
	mustAwait(t, func(ctx context.Context) error {
		a, err := edge.ask(ctx, q)
		if err == nil && a.code != http.StatusOK {
			err = fmt.Errorf("rose, whom the hub may stand for: %d %s", a.code, a.body)
		}
		return err
	})
	// Her rights count, not the node's.
	if a := edge.mustAsk(t, question{"/api/v1/nodes/edge-1", "", inJSON}); a.code != http.StatusForbidden {
		t.Errorf("rose may read a node: %d %s", a.code, a.body)
	}

	for _, c := range []caller{{name: "rose", cfg: rose}, {name: "reader", token: busy.tokens["reader"]}} {
		_, edge := busy.pair(t, hub, c)
		for _, header := range []string{"Impersonate-User", "Impersonate-Group", "Impersonate-Uid", "Impersonate-Extra-Scopes"} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, edge.base+q.path+"?resourceVersion=0", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Impersonate-User", "system:admin")
			req.Header.Set(header, "system:masters")
			resp, err := edge.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != http.StatusForbidden {
				t.Errorf("%s with %s: %s %s", c.name, header, resp.Status, body)
			}
		}
	}
}
