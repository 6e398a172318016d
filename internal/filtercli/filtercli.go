// Package filtercli is the command line for AccessFilters: it tries one on the
// objects of a cluster, before any node does. It reads with the operator's own
// rights, needs neither a hub nor yurt-manager, and writes nothing.
package filtercli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/kube-openapi/pkg/validation/spec"

	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/clusterschema"
)

// budget bounds each request.
const budget = time.Minute

// New returns the command "filter" with all commands below it.
func New() *cobra.Command {
	cmd := &cobra.Command{Use: "filter", Short: "AccessFilters: what components on nodes see of the cluster"}
	cmd.AddCommand(test())
	return cmd
}

func test() *cobra.Command {
	var t trial
	var kubeconfig string
	var files []string
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
			t.out, t.progress = cmd.OutOrStdout(), cmd.ErrOrStderr()
			var given []document
			for _, file := range files {
				more, err := read(cmd.InOrStdin(), file)
				if err != nil {
					return fmt.Errorf("read filters: %w", err)
				}
				given = append(given, more...)
			}
			if err := t.connect(kubeconfig); err != nil {
				return err
			}
			if err := t.compile(given); err != nil {
				return err
			}
			return t.run(cmd.Context())
		},
	}
	fs := cmd.Flags()
	fs.StringArrayVarP(&files, "filename", "f", nil, "file with AccessFilters in YAML or JSON, - for standard input; may be given several times")
	fs.StringVar(&t.node, "node", "", "the node on which they are seen")
	fs.StringVar(&t.component, "component", "", "only for this component (all that the filters name if not given)")
	fs.StringSliceVar(&t.resources, "resource", nil, "only these resources, as services or deployments.apps (all that the filters name if not given)")
	fs.StringVarP(&t.namespace, "namespace", "n", "", "of what is in namespaces, only objects of this one")
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
	if clientcmd.IsEmptyConfig(err) {
		return errors.New("there is no credential for the cluster: give one by --kubeconfig, KUBECONFIG or ~/.kube/config")
	}
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
	if t.groups, err = restmapper.GetAPIGroupResources(client); err != nil {
		return fmt.Errorf("ask the API server for its resources: %w", err)
	}
	t.schemas = clusterschema.New(client, restmapper.NewDiscoveryRESTMapper(t.groups))
	return nil
}

// served returns a resource as the cluster has it.
func (t *trial) served(gvr schema.GroupVersionResource) (metav1.APIResource, bool) {
	for _, g := range t.groups {
		for _, r := range g.VersionedResources[gvr.Version] {
			if g.Group.Name == gvr.Group && r.Name == gvr.Resource {
				return r, true
			}
		}
	}
	return metav1.APIResource{}, false
}

// compile checks filters against the cluster and compiles them, in the order
// in which they are applied.
func (t *trial) compile(given []document) error {
	var bad []string
	for _, d := range given {
		err := accessfilter.Check(d.filter, func(gvr schema.GroupVersionResource) (*spec.Schema, error) {
			s, err := t.schemas.Of(gvr)
			if errors.Is(err, resolver.ErrSchemaNotFound) {
				fmt.Fprintf(t.progress, "warning: %s: expressions are not checked against fields: %v\n", d.filter.Name, err)
				return nil, nil //nolint:nilnil // it is not checked
			}
			return s, err
		})
		if problems, ok := errors.AsType[accessfilter.Problems](err); ok {
			bad = append(bad, explain(d, problems))
			continue
		}
		if err != nil {
			return fmt.Errorf("check AccessFilter %s: %w", d.filter.Name, err)
		}
		compiled, err := accessfilter.Compile(d.filter)
		if err != nil {
			return fmt.Errorf("compile AccessFilter %s: %w", d.filter.Name, err)
		}
		t.filters = append(t.filters, compiled)
	}
	if len(bad) > 0 {
		return errors.New(strings.Join(bad, "\n"))
	}
	accessfilter.Order(t.filters)
	return nil
}

// explain tells what is wrong with a filter, with the place marked.
func explain(d document, problems accessfilter.Problems) string {
	lines := make([]string, 0, len(problems))
	for _, p := range problems {
		lines = append(lines, fmt.Sprintf("%s: AccessFilter %s: %v", d.file, d.filter.Name, p))
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
	t.filters = slices.DeleteFunc(t.filters, func(f *accessfilter.Filter) bool {
		selected := f.Selects(place.Pool, place.Labels)
		if !selected {
			fmt.Fprintf(t.progress, "warning: %s is not for node %s, which is %s: look at spec.pools and spec.nodeSelector\n", f.Name, place.Node, standing(place.Pool))
		}
		return !selected
	})
	if len(t.filters) == 0 {
		return nil, fmt.Errorf("no filter is for node %s", place.Node)
	}
	for _, f := range t.filters {
		components, resources := f.Uses()
		for _, r := range resources {
			if len(t.resources) > 0 && !slices.Contains(t.resources, r.Resource) && !slices.Contains(t.resources, r.GroupResource().String()) {
				continue
			}
			if _, ok := t.served(r); !ok {
				continue // one was warned of it
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
		return nil, errors.New("no filter is for that component and a resource that is there: look at spec.components and spec.resources, --component and --resource")
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
	groups  []*restmapper.APIGroupResources
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
