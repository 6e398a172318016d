// Package chart renders a Helm chart of this repository as `helm install`
// does, for those who apply it without Helm.
package chart

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/discovery"
	"sigs.k8s.io/yaml"
)

// Release is what a chart is rendered for.
type Release struct {
	Name, Namespace string
	// Values overlay the chart's own.
	Values map[string]any
	// Capabilities are the cluster's, as [Ask] returns them; nil stands for
	// those that the Helm library was built for.
	Capabilities *chartutil.Capabilities
}

// Render returns the objects of the chart in dir, by the names of their files.
func Render(dir string, r Release) ([]*unstructured.Unstructured, error) {
	c, err := loader.Load(dir)
	if err != nil {
		return nil, fmt.Errorf("load chart %s: %w", dir, err)
	}
	options := chartutil.ReleaseOptions{Name: r.Name, Namespace: r.Namespace, IsInstall: true}
	values, err := chartutil.ToRenderValues(c, r.Values, options, r.Capabilities)
	if err != nil {
		return nil, fmt.Errorf("values of chart %s: %w", dir, err)
	}
	files, err := engine.Engine{Strict: true}.Render(c, values)
	if err != nil {
		return nil, fmt.Errorf("render chart %s: %w", dir, err)
	}
	var out []*unstructured.Unstructured
	for _, name := range slices.Sorted(maps.Keys(files)) {
		for doc := range strings.SplitSeq(files[name], "\n---\n") {
			o := &unstructured.Unstructured{}
			if err := yaml.UnmarshalStrict([]byte(doc), &o.Object); err != nil {
				return nil, fmt.Errorf("read %s: %w in\n%s", name, err, doc)
			}
			if len(o.Object) > 0 {
				out = append(out, o)
			}
		}
	}
	return out, nil
}

// YAML returns objects as one text.
func YAML(objects []*unstructured.Unstructured) (string, error) {
	var out strings.Builder
	for _, o := range objects {
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			return "", fmt.Errorf("write %s %s: %w", o.GetKind(), o.GetName(), err)
		}
		out.WriteString("---\n")
		out.Write(text)
	}
	return out.String(), nil
}

// Ask asks a cluster what it is able to do.
func Ask(client discovery.DiscoveryInterface) (*chartutil.Capabilities, error) {
	version, err := client.ServerVersion()
	if err != nil {
		return nil, fmt.Errorf("ask for the version of Kubernetes: %w", err)
	}
	_, lists, err := client.ServerGroupsAndResources()
	if err != nil {
		return nil, fmt.Errorf("ask for the resources of the cluster: %w", err)
	}
	c := &chartutil.Capabilities{
		KubeVersion: chartutil.KubeVersion{Version: version.GitVersion, Major: version.Major, Minor: version.Minor},
		HelmVersion: chartutil.DefaultCapabilities.HelmVersion,
	}
	for _, l := range lists {
		c.APIVersions = append(c.APIVersions, l.GroupVersion)
		for i := range l.APIResources {
			c.APIVersions = append(c.APIVersions, l.GroupVersion+"/"+l.APIResources[i].Kind)
		}
	}
	slices.Sort(c.APIVersions)
	c.APIVersions = slices.Compact(c.APIVersions)
	return c, nil
}
