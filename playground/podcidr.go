package playground

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// podCIDRs writes to nodes which addresses their pods have. The controller
// manager would choose them by itself, but here they follow from the topology:
// routers know them before there is a node.
type podCIDRs struct {
	client   kubernetes.Interface
	topology Topology
	log      *slog.Logger
}

// run writes to new nodes until ctx ends.
func (c *podCIDRs) run(ctx context.Context) {
	err := poll(ctx, 500*time.Millisecond, func() (bool, error) {
		if err := c.sweep(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("sweep of nodes", "err", err)
		}
		return false, nil
	})
	c.log.Debug("nodes get no pod CIDRs any more", "err", err)
}

func (c *podCIDRs) sweep(ctx context.Context) error {
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	for _, n := range nodes.Items {
		m, ok := c.topology.Machine(n.Name)
		if !ok || n.Spec.PodCIDR != "" {
			continue
		}
		patch := fmt.Sprintf(`{"spec":{"podCIDR":%[1]q,"podCIDRs":[%[1]q]}}`, m.PodCIDR)
		if _, err := c.client.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("set pod CIDR of %s: %w", n.Name, err)
		}
	}
	return nil
}
