// Package filtercli is the command line for AccessFilters: it tries one on the
// objects of a cluster, before any node does. It reads with the operator's own
// rights, needs neither a hub nor yurt-manager, and writes nothing.
package filtercli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/kube-openapi/pkg/validation/spec"
	sigsjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/clusterschema"
)

const (
	// fileMost bounds what is read of a file.
	fileMost = 8 << 20
	// budget bounds each request.
	budget = time.Minute
)

// New returns the command "filter" with all commands below it.
func New() *cobra.Command {
	cmd := &cobra.Command{Use: "filter", Short: "AccessFilters: what components on nodes see of the cluster"}
	cmd.AddCommand(test())
	return cmd
}

func test() *cobra.Command {
	var t trial
	var kubeconfig, file string
	cmd := &cobra.Command{
		Use:   "test -f FILE --node NODE",
		Short: "Show what AccessFilters would make of the objects of a cluster",
		Long: `Show what the AccessFilters of a file would make of the objects of a cluster, as
components on a node would see them. What is dropped and what is changed is
shown, with the difference. Only the filters of the file are applied. Nothing is
written to the cluster, and nothing but the API server is needed.`,
		Example: "  yurtadm filter test -f filter.yaml --node edge-1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if t.output != "" && t.output != "json" {
				return fmt.Errorf("--output %q is not known: give json, or nothing for text", t.output)
			}
			filters, err := read(cmd.InOrStdin(), file)
			if err != nil {
				return err
			}
			if err := t.connect(kubeconfig); err != nil {
				return err
			}
			if t.filters, err = t.compile(cmd.ErrOrStderr(), file, filters); err != nil {
				return err
			}
			t.out, t.progress = cmd.OutOrStdout(), cmd.ErrOrStderr()
			return t.run(cmd.Context())
		},
	}
	fs := cmd.Flags()
	fs.StringVarP(&file, "filename", "f", "", "file with AccessFilters in YAML or JSON, - for standard input")
	fs.StringVar(&t.node, "node", "", "the node on which they are seen")
	fs.StringVar(&t.component, "component", "", "only for this component (all that the filters name if not given)")
	fs.StringSliceVar(&t.resources, "resource", nil, "only these resources, as services or deployments.apps (all that the filters name if not given)")
	fs.StringVarP(&t.namespace, "namespace", "n", "", "only objects of this namespace")
	fs.StringVarP(&t.selector, "selector", "l", "", "only objects with these labels")
	fs.BoolVar(&t.kept, "kept", false, "name the objects that stay as they are, too")
	fs.StringVarP(&t.output, "output", "o", "", "json, for programs: an object of JSON on each line, the last with the sums")
	fs.StringVar(&kubeconfig, "kubeconfig", "", "credential for the cluster (KUBECONFIG, or ~/.kube/config, if not given)")
	for _, name := range []string{"filename", "node"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // it was added above
		}
	}
	return cmd
}

// connect makes the clients.
func (t *trial) connect(kubeconfig string) error {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return fmt.Errorf("read the credential for the cluster, of --kubeconfig, KUBECONFIG or ~/.kube/config: %w", err)
	}
	cfg.Timeout, cfg.UserAgent = budget, "yurtadm"
	cfg.QPS, cfg.Burst = 50, 50
	return t.use(cfg)
}

func (t *trial) use(cfg *rest.Config) error {
	client, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		return fmt.Errorf("make client: %w", err)
	}
	if t.client, err = dynamic.NewForConfig(cfg); err != nil {
		return fmt.Errorf("make client: %w", err)
	}
	groups, err := restmapper.GetAPIGroupResources(client)
	if err != nil {
		return fmt.Errorf("ask the API server for its resources: %w", err)
	}
	t.mapper = restmapper.NewDiscoveryRESTMapper(groups)
	t.schemas = clusterschema.New(client, t.mapper)
	return nil
}

// read reads AccessFilters. A field that is not known is an error: it would be
// left out without a word.
func read(stdin io.Reader, file string) ([]*v1alpha1.AccessFilter, error) {
	in := stdin
	if file != "-" {
		f, err := os.Open(filepath.Clean(file))
		if err != nil {
			return nil, fmt.Errorf("read filters: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, fileMost+1))
	if err != nil {
		return nil, fmt.Errorf("read filters: %w", err)
	}
	if len(text) > fileMost {
		return nil, fmt.Errorf("read filters: %s has more than %d MiB", file, fileMost>>20)
	}
	var out []*v1alpha1.AccessFilter
	docs := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	defer docs.Close()
	buffer := make([]byte, len(text)+1)
	for n := 1; ; n++ {
		size, err := docs.Read(buffer)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read filters: document %d of %s: %w", n, file, err)
		}
		doc := buffer[:size]
		var head struct {
			APIVersion string `json:"apiVersion"`
			Kind       string `json:"kind"`
		}
		if err := yaml.Unmarshal(doc, &head); err != nil {
			return nil, fmt.Errorf("read filters: document %d of %s: %w", n, file, err)
		}
		if head.Kind == "" && head.APIVersion == "" {
			continue // comments
		}
		if head.Kind != "AccessFilter" || head.APIVersion != v1alpha1.GroupVersion.String() {
			return nil, fmt.Errorf("read filters: document %d of %s is a %s of %s, and an AccessFilter of %s is wanted",
				n, file, head.Kind, head.APIVersion, v1alpha1.GroupVersion)
		}
		f := &v1alpha1.AccessFilter{}
		object, err := yaml.YAMLToJSONStrict(doc)
		if err == nil {
			var strict []error
			if strict, err = sigsjson.UnmarshalStrict(object, f); err == nil {
				err = errors.Join(strict...)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("read filters: document %d of %s: %w", n, file, err)
		}
		out = append(out, f)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("read filters: %s has none", file)
	}
	return out, nil
}

// compile checks filters against the cluster and compiles them, in the order
// in which they are applied.
func (t *trial) compile(warn io.Writer, file string, filters []*v1alpha1.AccessFilter) ([]*accessfilter.Filter, error) {
	var out []*accessfilter.Filter
	var bad []string
	for _, f := range filters {
		err := accessfilter.Check(f, func(gvr schema.GroupVersionResource) (*spec.Schema, error) {
			s, err := t.schemas.Of(gvr)
			if errors.Is(err, resolver.ErrSchemaNotFound) {
				fmt.Fprintf(warn, "warning: %s: expressions are not checked against fields: %v\n", f.Name, err)
				return nil, nil //nolint:nilnil // it is not checked
			}
			return s, err
		})
		if problems, ok := errors.AsType[accessfilter.Problems](err); ok {
			bad = append(bad, explain(file, f.Name, problems))
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("check AccessFilter %s: %w", f.Name, err)
		}
		compiled, err := accessfilter.Compile(f)
		if err != nil {
			return nil, fmt.Errorf("compile AccessFilter %s: %w", f.Name, err)
		}
		out = append(out, compiled)
	}
	if len(bad) > 0 {
		return nil, errors.New(strings.Join(bad, "\n"))
	}
	accessfilter.Order(out)
	return out, nil
}

// explain tells what is wrong with a filter, with the place marked.
func explain(file, name string, problems accessfilter.Problems) string {
	lines := make([]string, 0, len(problems))
	for _, p := range problems {
		lines = append(lines, fmt.Sprintf("%s: AccessFilter %s: %v", file, name, p))
		for line := range strings.Lines(p.Excerpt()) {
			lines = append(lines, "    "+strings.TrimSuffix(line, "\n"))
		}
	}
	return strings.Join(lines, "\n")
}

// target is a resource and the components that see it by filters.
type target struct {
	resource   schema.GroupVersionResource
	components []string
}

// targets are what is to be looked at on a node of that pool and labels.
func (t *trial) targets(place *accessfilter.Place) ([]target, error) {
	var out []target
	selected := slices.DeleteFunc(slices.Clone(t.filters), func(f *accessfilter.Filter) bool { return !f.Selects(place.Pool, place.Labels) })
	if len(selected) == 0 {
		return nil, fmt.Errorf("no filter of the file selects node %s, which is %s: look at spec.pools and spec.nodeSelector", place.Node, standing(place.Pool))
	}
	t.filters = selected
	for _, f := range selected {
		components, resources := f.Uses()
		for _, r := range resources {
			if len(t.resources) > 0 && !slices.Contains(t.resources, r.Resource) && !slices.Contains(t.resources, r.GroupResource().String()) {
				continue
			}
			i := slices.IndexFunc(out, func(o target) bool { return o.resource == r })
			if i < 0 {
				i, out = len(out), append(out, target{resource: r})
			}
			for _, c := range components {
				if (t.component == "" || t.component == c) && !slices.Contains(out[i].components, c) {
					out[i].components = append(out[i].components, c)
				}
			}
		}
	}
	out = slices.DeleteFunc(out, func(o target) bool { return len(o.components) == 0 })
	if len(out) == 0 {
		return nil, errors.New("no filter of the file is for that component and resource: look at spec.components and spec.resources")
	}
	slices.SortFunc(out, func(a, b target) int { return strings.Compare(a.resource.String(), b.resource.String()) })
	return out, nil
}

func standing(pool string) string {
	if pool == "" {
		return "in no pool"
	}
	return "in pool " + pool
}

// trial is one run of the command.
type trial struct {
	node, component, namespace, selector, output string

	resources []string
	kept      bool
	filters   []*accessfilter.Filter

	client  dynamic.Interface
	mapper  meta.RESTMapper
	schemas *clusterschema.Source

	out, progress io.Writer
	told          time.Time // when progress was last told
	sums          Sums
}

func (t *trial) run(ctx context.Context) error {
	place, err := t.place(ctx)
	if err != nil {
		return err
	}
	targets, err := t.targets(place)
	if err != nil {
		return err
	}
	if t.output == "" {
		fmt.Fprintf(t.out, "On node %s, %s:\n", place.Node, standing(place.Pool))
	}
	for _, target := range targets {
		if err := t.try(ctx, place, target); err != nil {
			return err
		}
	}
	return t.end()
}
