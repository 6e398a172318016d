package table_test

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/yaml"
)

// fill creates the objects of testdata.
func fill(t *testing.T, s *server) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "objects.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	paths := make(map[string]string)
	for _, r := range resources {
		paths[r.apiVersion+r.kind] = r.path
	}
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		var object struct {
			APIVersion, Kind string
			Metadata         struct{ Name, Namespace string }
		}
		var raw map[string]any
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			t.Fatalf("%v in %s", err, doc)
		}
		if err := yaml.Unmarshal([]byte(doc), &raw); err != nil {
			t.Fatalf("%v in %s", err, doc)
		}
		path, ok := paths[object.APIVersion+object.Kind]
		if !ok {
			t.Fatalf("no path of %s", object.Kind)
		}
		path = inNamespace(path, object.Metadata.Namespace)
		waitServed(t, s, path)
		s.create(t, path, raw)
	}
	// A pod with a finalizer stays, terminating.
	s.send(t, http.MethodDelete, "/api/v1/namespaces/default/pods/running", map[string]any{})
}

func inNamespace(path, namespace string) string {
	if namespace == "" {
		return path
	}
	at := strings.LastIndexByte(path, '/')
	return path[:at] + "/namespaces/" + namespace + path[at:]
}

// waitServed waits until a custom resource is established.
func waitServed(t *testing.T, s *server, path string) {
	t.Helper()
	err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, 30*time.Second, true, func(ctx context.Context) (bool, error) {
		resp, err := s.open(ctx, path, inJSON)
		if err != nil {
			return false, err
		}
		return resp.StatusCode == http.StatusOK, resp.Body.Close()
	})
	if err != nil {
		t.Fatalf("wait for %s: %v", path, err)
	}
}
