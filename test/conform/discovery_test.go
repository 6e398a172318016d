package conform

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/yurt-edge/yurt/test/bed"
)

// documents say the same to everybody.
var documents = []question{
	{path: "/version"},
	{path: "/api", accept: inJSON},
	{path: "/apis", accept: inJSON},
	{path: "/apis", accept: inProto},
	{path: "/api", accept: inJSON + ";g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"},
	{path: "/apis", accept: inJSON + ";g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"},
	{path: "/apis", accept: inJSON + ";g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList," + inJSON + ";g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList," + inJSON},
	{path: "/api/v1", accept: inJSON},
	{path: "/apis/apps", accept: inJSON},
	{path: "/apis/apps/v1", accept: inJSON},
	{path: "/apis/conform.example.com/v1", accept: inJSON},
	{path: "/openapi/v2", accept: inJSON},
	{path: "/openapi/v2", accept: "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"},
	{path: "/openapi/v3", accept: inJSON},
	{path: "/openapi/v3/api/v1", accept: inJSON},
	{path: "/openapi/v3/apis/conform.example.com/v1", accept: inJSON},
}

// TestDocuments compares discovery, OpenAPI and the version, online and as
// remembered.
func TestDocuments(t *testing.T) {
	t.Parallel()
	hub, link := calm.hub(t, "edge-documents")
	server, edge := calm.sides(t, hub, "reader")
	mustAwait(t, func(ctx context.Context) error { // the API server publishes new kinds in its own time
		a, err := server.ask(ctx, documents[len(documents)-1])
		if err == nil && (a.code != http.StatusOK || len(a.body) == 0) {
			err = fmt.Errorf("%s: %d, %d bytes", documents[len(documents)-1], a.code, len(a.body))
		}
		return err
	})
	wants := make([]answer, len(documents))
	for i, q := range documents {
		if err := same(t.Context(), server, edge, q); err != nil {
			t.Errorf("%s: %v", q, err)
		}
		wants[i] = server.mustAsk(t, q)
	}
	cut(t, link, edge, bed.Down)
	for i, q := range documents {
		mustAwait(t, func(ctx context.Context) error { // it is written behind the request
			a, err := edge.ask(ctx, q)
			if err == nil && a.code != http.StatusOK {
				err = fmt.Errorf("offline: %s: %d %s", q, a.code, a.body)
			}
			return err
		})
		got := edge.mustAsk(t, q)
		if got.code != http.StatusOK || !bytes.Equal(wants[i].body, got.body) || wants[i].media() != got.media() {
			t.Errorf("offline: %s: %d %s, %d bytes, want %s, %d bytes", q, got.code, got.media(), len(got.body), wants[i].media(), len(wants[i].body))
		}
		if !got.old() {
			t.Errorf("offline: %s: warning is %q", q, got.header.Get("Warning"))
		}
		if want := wants[i].header.Get("Etag"); got.header.Get("Etag") != want {
			t.Errorf("offline: %s: Etag %q, want %q", q, got.header.Get("Etag"), want)
		}
	}
	if a := edge.mustAsk(t, question{path: "/apis/batch/v1", accept: inJSON}); a.code != http.StatusServiceUnavailable {
		t.Errorf("what nobody asked before: %d %s", a.code, a.body)
	}
}

// kubectl is the command with a kubeconfig and a home of its own.
type kubectl struct{ binary, config, home string }

func newKubectl(t *testing.T, hub *bed.Hub, s *side, token string) kubectl {
	t.Helper()
	bundle, err := os.ReadFile(filepath.Join(hub.Dir, "pki", "ca-bundle.crt"))
	if err != nil {
		t.Fatal(err)
	}
	k := kubectl{binary: calm.Cloud.Binaries.Path("kubectl"), home: t.TempDir()}
	k.config = filepath.Join(k.home, "config")
	err = clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: s.base, CertificateAuthorityData: bundle}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: token}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u", Namespace: "conform-a"}},
		CurrentContext: "x",
	}, k.config)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (k kubectl) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, k.binary, append([]string{"--kubeconfig", k.config}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+k.home, "KUBECACHEDIR="+filepath.Join(k.home, "cache"))
	return cmd
}

func (k kubectl) run(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := k.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// TestKubectl compares what kubectl shows a person, through the hub and
// without it, online and offline.
func TestKubectl(t *testing.T) {
	t.Parallel()
	hub, link := calm.hub(t, "edge-kubectl")
	server, edge := calm.sides(t, hub, "reader")
	direct := newKubectl(t, hub, server, calm.tokens["reader"])
	through := newKubectl(t, hub, edge, calm.tokens["reader"])
	for _, path := range []string{"/api/v1/pods", "/api/v1/nodes", "/api/v1/namespaces", "/api/v1/services", "/apis/conform.example.com/v1/gadgets"} {
		warm(t, edge, path)
	}
	commands := []string{
		"get pods -o wide --all-namespaces",
		"get pods,services -l app=web",
		"get pod web-1 -o yaml",
		"get nodes -o json",
		"get services -o name",
		"describe pod web-2",
		"describe pod web-1",
		"describe node edge-1",
		"explain pods.spec.nodeName",
		"explain gadgets.spec",
		"api-resources",
		"version -o json",
	}
	wants := map[string]string{}
	compare := func(when, line, want string) {
		t.Helper()
		out, errs, err := through.run(t.Context(), strings.Fields(line)...)
		if err != nil {
			t.Errorf("%s: kubectl %s: %v: %s", when, line, err, errs)
			return
		}
		if got := still(out); got != want {
			t.Errorf("%s: kubectl %s:\n%s\nwant\n%s", when, line, got, want)
		}
		if strings.Contains(line, "get") && strings.Contains(errs, "the cloud cannot be reached") != (when == "offline") {
			t.Errorf("%s: kubectl %s: standard error is %q", when, line, errs)
		}
	}
	for _, line := range append(commands, "get gadgets -A", "get gd lamp -o wide", "get events") {
		out, errs, err := direct.run(t.Context(), strings.Fields(line)...)
		if err != nil {
			t.Fatalf("kubectl %s: %v: %s", line, err, errs)
		}
		wants[line] = still(out)
		compare("online", line, wants[line])
	}
	watching(t, through, edge)
	cut(t, link, edge, bed.Blackhole)
	for _, line := range commands {
		compare("offline", line, wants[line])
	}
	out, _, err := through.run(t.Context(), "get", "gadgets")
	if err != nil || !strings.Contains(out, "lamp") || !strings.Contains(out, "motor") {
		t.Errorf("offline: kubectl get gadgets: %v\n%s", err, out)
	}
}

// leases are what kubectl describe says of a node's lease, which is renewed all
// the time and not replicated.
var leases = regexp.MustCompile(`Lease:(?s:.*?)Conditions:`)

// still is output without what grows older, and a node's without its events,
// which controllers make when they like.
func still(out string) string {
	if lease := leases.FindString(out); lease != "" {
		out, _, _ = strings.Cut(strings.Replace(out, lease, "Conditions:", 1), "Events:")
	}
	fields := strings.Fields(out)
	for i, f := range fields {
		if ages.MatchString(`"` + f + `"`) {
			fields[i] = "AGE"
		}
	}
	return strings.Join(fields, " ")
}

// watching follows a kubectl get --watch through a change, and makes that
// change by kubectl as well. It is one of a kind that no other test compares.
func watching(t *testing.T, reader kubectl, edge *side) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	warm(t, edge, "/api/v1/serviceaccounts")
	token, err := writerToken(ctx)
	if err != nil {
		t.Fatal(err)
	}
	watch := reader.command(ctx, "get", "serviceaccounts", "--watch-only", "-o", "name")
	out, err := watch.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	writer := reader
	writer.config = filepath.Join(writer.home, "writer")
	cfg, err := clientcmd.LoadFromFile(reader.config)
	if err != nil {
		t.Fatal(err)
	}
	cfg.AuthInfos["u"].Token = token
	if err := clientcmd.WriteToFile(*cfg, writer.config); err != nil {
		t.Fatal(err)
	}
	// The watch may begin after the first change: there are more.
	seen := make(chan string, 1)
	go func() { // ends with the command
		buf := make([]byte, 4<<10)
		n, _ := out.Read(buf)
		seen <- string(buf[:n])
	}()
	manifest := filepath.Join(writer.home, "manifest.yaml")
	for i := 0; ; i++ {
		text := fmt.Sprintf("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: by-kubectl, namespace: conform-a, annotations: {i: \"%d\"}}\n", i)
		if err := os.WriteFile(manifest, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, errs, err := writer.run(ctx, "apply", "-f", manifest); err != nil {
			t.Fatalf("kubectl apply: %v: %s", err, errs)
		}
		select {
		case line := <-seen:
			if !strings.Contains(line, "serviceaccount/by-kubectl") {
				t.Errorf("kubectl get --watch said %q", line)
			}
			if _, errs, err := writer.run(ctx, "delete", "serviceaccount", "by-kubectl"); err != nil {
				t.Errorf("kubectl delete: %v: %s", err, errs)
			}
			cancel()
			_ = watch.Wait() // it was killed
			return
		case <-ctx.Done():
			t.Fatal("kubectl get --watch saw nothing")
		default:
		}
	}
}

// writerToken is that of an account that may make accounts.
func writerToken(ctx context.Context) (string, error) {
	err := calm.Cloud.Apply(ctx, `
apiVersion: v1
kind: ServiceAccount
metadata: {name: writer, namespace: conform-a}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: writer, namespace: conform-a}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit}
subjects: [{kind: ServiceAccount, name: writer, namespace: conform-a}]
`)
	if err != nil {
		return "", err
	}
	return calm.token(ctx, "conform-a", "writer", "")
}
