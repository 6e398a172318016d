package playground

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestControlPlaneServesAndStops(t *testing.T) {
	versions, err := ChosenVersions()
	if err != nil {
		t.Fatal(err)
	}
	cp, err := StartControlPlane(t.Context(), ControlPlaneConfig{
		Dir:               t.TempDir(),
		ControllerManager: true,
		Scheduler:         true,
		Progress:          NewProgress(os.Stderr),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cp.Stop)

	out, err := cp.Kubectl(t.Context(), "version", "--output=json")
	if err != nil {
		t.Fatal(err)
	}
	var version struct {
		ClientVersion, ServerVersion struct{ Major, Minor, GitVersion string }
	}
	if err := json.Unmarshal([]byte(out), &version); err != nil {
		t.Fatal(err)
	}
	for who, got := range map[string]string{
		"client": version.ClientVersion.GitVersion,
		"server": version.ServerVersion.GitVersion,
	} {
		if got != versions.ControlPlane {
			t.Errorf("version of %s: want %s, got %s", who, versions.ControlPlane, got)
		}
	}
	if got := "v" + version.ServerVersion.Major + "." + version.ServerVersion.Minor; !strings.HasPrefix(versions.ControlPlane, got+".") {
		t.Errorf("server's major.minor: want that of %s, got %s", versions.ControlPlane, got)
	}

	token, err := cp.BootstrapToken(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if id, secret, ok := strings.Cut(token, "."); !ok || len(id) != 6 || len(secret) != 16 {
		t.Errorf("bootstrap token: want 6 and 16 characters, got %q", token)
	}

	cp.StopAPIServer()
	client, err := cp.Client()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{}); err == nil {
		t.Error("list with the API server stopped: want an error, got none")
	}
	if err := cp.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{}); err != nil {
		t.Errorf("list after the API server's restart: %v", err)
	}
	if err := cp.Err(); err != nil {
		t.Error(err)
	}
	cp.Stop()
	cp.Stop()
}
