package playground

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/chart"
)

const (
	// ManagerImage is on cloud machines.
	ManagerImage = "yurt.local/yurt-manager:1"

	// chartDir is the chart of yurt-manager in a checkout.
	chartDir         = "deploy/chart"
	managerNamespace = metav1.NamespaceSystem
	managerName      = "yurt-manager"
)

// installManager installs yurt-manager as its users do, by the chart, and
// makes a NodePool of every pool of the topology. The manager's pods start
// with the cloud machine.
func (p *Playground) installManager(ctx context.Context) error {
	client, err := p.cp.Client()
	if err != nil {
		return err
	}
	able, err := chart.Ask(client.Discovery())
	if err != nil {
		return err
	}
	registry, rest, _ := strings.Cut(ManagerImage, "/")
	repository, tag, _ := strings.Cut(rest, ":")
	values := map[string]any{"image": map[string]any{"registry": registry, "repository": repository, "tag": tag}}
	maps.Copy(values, p.managerValues)
	objects, err := chart.Render(filepath.Join(p.bin.Root, chartDir), chart.Release{
		Name: "yurt", Namespace: managerNamespace, Values: values, Capabilities: able,
	})
	if err != nil {
		return err
	}
	text, err := chart.YAML(objects)
	if err != nil {
		return err
	}
	if err := p.cp.Apply(ctx, text); err != nil {
		return err
	}
	return p.makePools(ctx)
}

// makePools waits until the API server knows what a NodePool is.
func (p *Playground) makePools(ctx context.Context) error {
	text, err := manifestFiles.ReadFile("manifests/nodepools.yaml")
	if err != nil {
		return err
	}
	type pool struct{ Name, Type string }
	var pools []pool
	for _, of := range p.topology.Pools {
		pools = append(pools, pool{of.Name, p.topology.poolType(of.Name)})
	}
	manifest, err := renderText("nodepools.yaml", string(text), pools)
	if err != nil {
		return err
	}
	var last error
	err = poll(ctx, waitPoll, func() (bool, error) {
		if err := p.broken(); err != nil {
			return false, err
		}
		last = p.cp.Apply(ctx, string(manifest))
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("make node pools: %w", errors.Join(err, last))
	}
	return nil
}

// WaitManager waits until every replica of yurt-manager is ready.
func (p *Playground) WaitManager(ctx context.Context) error {
	return p.waitManager(ctx, func(string) {})
}

func (p *Playground) waitManager(ctx context.Context, update func(string)) error {
	client, err := p.Client()
	if err != nil {
		return err
	}
	state := "not seen"
	err = poll(ctx, waitPoll, func() (bool, error) {
		if err := p.broken(); err != nil {
			return false, err
		}
		d, err := client.AppsV1().Deployments(managerNamespace).Get(ctx, managerName, metav1.GetOptions{})
		if err != nil || d.Spec.Replicas == nil {
			return false, nil //nolint:nilerr // the API server may be away for a moment
		}
		state = fmt.Sprintf("%d of %d replicas of yurt-manager ready", d.Status.ReadyReplicas, *d.Spec.Replicas)
		update(state)
		return d.Status.ObservedGeneration == d.Generation && d.Status.ReadyReplicas == *d.Spec.Replicas, nil
	})
	if err != nil {
		return fmt.Errorf("wait for yurt-manager (%s): %w", state, err)
	}
	return nil
}

// ManagerStatus is yurt-manager as the API server knows it.
type ManagerStatus struct {
	// Ready counts the replicas that are ready, Replicas those that are
	// wanted.
	Ready    int32 `json:"ready"`
	Replicas int32 `json:"replicas"`
	// Leader is the pod that works, as its Lease says; empty while none does.
	Leader string `json:"leader"`
}

// managerStatus asks the API server.
func (p *Playground) managerStatus(ctx context.Context) (ManagerStatus, error) {
	var s ManagerStatus
	client, err := p.cp.Client()
	if err != nil {
		return s, err
	}
	d, err := client.AppsV1().Deployments(managerNamespace).Get(ctx, managerName, metav1.GetOptions{})
	if err != nil {
		return s, err
	}
	s.Ready = d.Status.ReadyReplicas
	if d.Spec.Replicas != nil {
		s.Replicas = *d.Spec.Replicas
	}
	lease, err := client.CoordinationV1().Leases(managerNamespace).Get(ctx, managerName, metav1.GetOptions{})
	if err == nil && lease.Spec.HolderIdentity != nil && lease.Spec.RenewTime != nil && lease.Spec.LeaseDurationSeconds != nil {
		life := time.Duration(*lease.Spec.LeaseDurationSeconds) * time.Second
		if time.Since(lease.Spec.RenewTime.Time) < life {
			s.Leader, _, _ = strings.Cut(*lease.Spec.HolderIdentity, "_")
		}
	}
	return s, nil
}

// nodePools asks the API server.
func (p *Playground) nodePools(ctx context.Context) (map[string]v1beta2.NodePool, error) {
	client, err := p.cp.Client()
	if err != nil {
		return nil, err
	}
	text, err := client.RESTClient().Get().AbsPath("/apis", v1beta2.GroupVersion.String(), "nodepools").DoRaw(ctx)
	if err != nil {
		return nil, fmt.Errorf("list node pools: %w", err)
	}
	var list v1beta2.NodePoolList
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("read node pools: %w", err)
	}
	pools := map[string]v1beta2.NodePool{}
	for _, pool := range list.Items {
		pools[pool.Name] = pool
	}
	return pools, nil
}
