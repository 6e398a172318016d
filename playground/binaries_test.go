package playground

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestChosenVersions(t *testing.T) {
	t.Setenv("YURT_KUBERNETES", "")
	t.Setenv("YURT_KUBELET", "1.34")
	v, err := ChosenVersions()
	if err != nil || v.ControlPlane != KubernetesVersion || v.Node != "v1.34.4" {
		t.Errorf("kubelet 1.34: %+v, %v", v, err)
	}
	t.Setenv("YURT_KUBELET", "1.2")
	if _, err := ChosenVersions(); err == nil || !strings.Contains(err.Error(), `YURT_KUBELET="1.2" is not one of 1.34, 1.35, 1.36`) {
		t.Errorf("kubelet 1.2: %v", err)
	}
}

// TestEveryReleaseHasItsModuleFile keeps the table of releases and the module
// files of gen.sh together.
func TestEveryReleaseHasItsModuleFile(t *testing.T) {
	root, err := checkout()
	if err != nil {
		t.Fatal(err)
	}
	for minor, version := range releases() {
		p := kubernetesPart(version)
		for _, input := range p.inputs {
			if found, err := filepath.Glob(filepath.Join(root, p.dir, input)); err != nil || len(found) == 0 {
				t.Errorf("%s: no %s: run gen.sh (%v)", minor, input, err)
			}
		}
		text, err := os.ReadFile(filepath.Join(root, p.dir, p.inputs[0]))
		if err != nil || !strings.Contains(string(text), "k8s.io/kubernetes "+version+"\n") {
			t.Errorf("%s does not require Kubernetes %s (%v)", p.inputs[0], version, err)
		}
	}
}
