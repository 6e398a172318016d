package crds_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/crds"
)

// TestEveryFieldIsExplained keeps `kubectl explain` complete.
func TestEveryFieldIsExplained(t *testing.T) {
	for file, text := range crds.YAML() {
		var d struct {
			Spec struct {
				Versions []struct {
					Name   string
					Schema struct{ OpenAPIV3Schema map[string]any }
				}
			}
		}
		if err := yaml.Unmarshal(text, &d); err != nil {
			t.Fatal(err)
		}
		for _, v := range d.Spec.Versions {
			if len(v.Schema.OpenAPIV3Schema) == 0 {
				t.Errorf("%s: %s has no schema", file, v.Name)
			}
			for _, path := range mute(v.Schema.OpenAPIV3Schema) {
				t.Errorf("%s: %s%s says nothing of itself", file, v.Name, path)
			}
		}
	}
}

// mute returns the fields below a schema that have no description.
func mute(schema map[string]any) []string {
	var out []string
	properties, _ := schema["properties"].(map[string]any)
	for _, name := range slices.Sorted(maps.Keys(properties)) {
		field, ok := properties[name].(map[string]any)
		if !ok {
			continue
		}
		// The API server explains metadata itself.
		if text, _ := field["description"].(string); strings.TrimSpace(text) == "" && name != "metadata" {
			out = append(out, "."+name)
		}
		if name == "poolScopeMetadata" {
			continue // its elements are Kubernetes' own, and say nothing
		}
		for _, path := range mute(field) {
			out = append(out, fmt.Sprintf(".%s%s", name, path))
		}
	}
	if items, ok := schema["items"].(map[string]any); ok {
		out = append(out, mute(items)...)
	}
	return out
}
