package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/heartbeat"
)

const (
	sitePool     = 20               // nodes of a pool, of which one has a link
	beatEvery    = 10 * time.Second // as kubelets do
	leaseSeconds = 40               // as kubelets have it
	wantLeases   = 10000
	// makeBudget is how long nodes are made: with as many as there are then it is
	// measured. vouchBudget is how long it is waited until all are vouched for.
	makeBudget  = 100 * time.Second
	vouchBudget = 4 * time.Minute
	// fallWithin is in what time all pools lose their links, one after the other.
	fallWithin = time.Minute
)

// vouchedNode is a node without a link.
type vouchedNode struct {
	name string
	uid  types.UID
	cert []byte // DER
	key  crypto.Signer
}

// vouched measures what the manager writes for nodes that others vouch for.
// Of each pool all nodes but one have lost their link: their heartbeats are
// signed here and laid on the lease of the one that has it, as its hub would.
func (b *bench) vouched(ctx context.Context) error {
	if b.manager != nil {
		b.manager.stop()
		b.manager = nil
	}
	// At its defaults the manager limits itself to 50 requests a second.
	if err := b.startPools(ctx, "--rest-config-qps=1000", "--rest-config-burst=1000", "--concurrent-workers=10"); err != nil {
		return err
	}
	pools := max(1, b.scale.leases/sitePool)
	var names []string
	for p := range pools {
		names = append(names, fmt.Sprintf("site-%03d", p))
	}
	if err := b.makePools(ctx, names, true); err != nil {
		return err
	}
	sites := make([][]vouchedNode, pools)
	g, making := errgroup.WithContext(ctx)
	g.SetLimit(makers)
	end := time.Now().Add(makeBudget)
	for p, name := range names {
		g.Go(func() (err error) {
			if time.Now().Before(end) {
				sites[p], err = b.makeSite(making, name)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	sites = slices.DeleteFunc(sites, func(site []vouchedNode) bool { return site == nil })
	pools = len(sites)
	// What the manager still has to say of new nodes is not measured. If it does
	// not come to its end, what follows says so.
	_ = until(ctx, time.Minute, 2*time.Second, func() (bool, error) {
		known, err := b.countSites(ctx, func(s *v1beta2.NodePoolStatus) int { return len(s.Nodes) })
		return known >= pools*sitePool, err
	})
	beating, stop := context.WithCancel(ctx)
	g, beating = errgroup.WithContext(beating)
	for p := range sites {
		g.Go(func() error { return b.carry(beating, sites[p], time.Duration(p)*fallWithin/time.Duration(pools)) })
	}
	measured := b.profileServer(beating, "leases", 30*time.Second, func() error { return b.measureVouched(beating, pools) })
	stop()
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return measured
}

func (b *bench) makeSite(ctx context.Context, pool string) ([]vouchedNode, error) {
	var site []vouchedNode
	for i := range sitePool {
		n := vouchedNode{name: fmt.Sprintf("%s-%02d", pool, i)}
		node, err := b.makeNode(ctx, n.name, pool, "127.0.0.1")
		if err != nil {
			return nil, err
		}
		n.uid = node.UID
		cert, key, err := b.cloud.CA.Client("system:node:"+n.name, "system:nodes")
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("load the node's certificate: %w", err)
		}
		signer, ok := pair.PrivateKey.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a key of type %T does not sign", pair.PrivateKey)
		}
		n.cert, n.key = pair.Certificate[0], signer
		seconds, now := int32(leaseSeconds), metav1.NowMicro()
		_, err = b.admin.CoordinationV1().Leases(corev1.NamespaceNodeLease).Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: n.name},
			Spec:       coordinationv1.LeaseSpec{HolderIdentity: &n.name, LeaseDurationSeconds: &seconds, RenewTime: &now},
		}, metav1.CreateOptions{})
		if err != nil {
			return nil, fmt.Errorf("make lease: %w", err)
		}
		site = append(site, n)
	}
	return site, nil
}

// carry renews the lease of the site's first node with the heartbeats of all
// others on it, until ctx ends.
func (b *bench) carry(ctx context.Context, site []vouchedNode, after time.Duration) error {
	if pause(ctx, after) != nil {
		return nil
	}
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		now := metav1.NowMicro()
		var all []heartbeat.Signed
		for _, n := range site[1:] {
			s, err := heartbeat.Sign(heartbeat.Beat{Node: n.name, UID: n.uid, Time: now, Renewed: now, Ready: corev1.ConditionTrue}, [][]byte{n.cert}, n.key)
			if err != nil {
				return err
			}
			all = append(all, s)
		}
		text, err := heartbeat.Join(all)
		if err != nil {
			return err
		}
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"annotations": map[string]string{apps.Heartbeats: text}},
			"spec":     map[string]any{"renewTime": now},
		})
		if err != nil {
			return fmt.Errorf("carry heartbeats: %w", err)
		}
		_, err = b.admin.CoordinationV1().Leases(corev1.NamespaceNodeLease).Patch(ctx, site[0].name, types.MergePatchType, patch, metav1.PatchOptions{})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("carry heartbeats: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (b *bench) measureVouched(ctx context.Context, pools int) error {
	others := pools * (sitePool - 1)
	begun, err := b.apiServer(ctx)
	if err != nil {
		return err
	}
	begin, said := time.Now(), time.Now()
	count, lapsed := 0, 0
	err = until(ctx, vouchBudget, 2*time.Second, func() (bool, error) { // to list all pools costs the server something
		var err error
		count, err = b.countSites(ctx, func(s *v1beta2.NodePoolStatus) int { return int(s.VouchedNodeNum) })
		if err == nil && time.Since(said) > 10*time.Second {
			var now int
			if now, err = b.lapsed(ctx); err == nil {
				fmt.Fprintf(b.log, "nodes that are vouched for: %d of %d, lapsed: %d\n", count, others, now)
			}
			lapsed, said = max(lapsed, now), time.Now()
		}
		return count == others, err
	})
	if count == 0 || ctx.Err() != nil {
		return fmt.Errorf("%d of %d nodes are vouched for: %w (log: %s)", count, others, err, b.manager.lastWords())
	}
	before, err := b.apiServer(ctx)
	if err != nil {
		return err
	}
	b.hub("until all nodes without a link are vouched for", "s", time.Since(begin).Seconds(), bar{},
		fmt.Sprintf("%d of %d nodes, as the pools' status counts them; %d pools lose their links within %.0f s; asked for most: %s",
			count, others, pools, fallWithin.Seconds(), before.mostSince(begun)))
	p0, err := b.manager.cost()
	if err != nil {
		return err
	}
	// Each lease is renewed two or three times in it.
	if err := pause(ctx, 4*b.scale.quiet); err != nil {
		return err
	}
	after, err := b.apiServer(ctx)
	if err != nil {
		return err
	}
	p1, err := b.manager.cost()
	if err != nil {
		return err
	}
	took := after.at.Sub(before.at).Seconds()
	got := (after.writes - before.writes) / took
	kubelets := float64(pools*sitePool) / beatEvery.Seconds()
	note := fmt.Sprintf("measured with %d nodes, all but one of each 20 without a link; asked for most: %s", pools*sitePool, after.mostSince(before))
	b.pair("API writes for the leases of nodes", "1/s", rounds{{kubelets, got}}, ratioAtMost(0.6), note+"; off is what their kubelets would write, each every 10 s")
	if many := wantLeases / float64(pools*sitePool); many > 1 {
		b.pair(fmt.Sprintf("API writes for the leases of %d nodes", wantLeases), "1/s", rounds{{kubelets * many, got * many}}, bar{}, "computed from the row above")
	}
	atEnd, err := b.lapsed(ctx)
	if err != nil {
		return err
	}
	b.hub("leases that lapsed while they were vouched for", "", float64(max(lapsed, atEnd)), atMost(0),
		fmt.Sprintf("of %d, at the worst moment of those at which it was counted, each 10 s at first and once after %.0f s more; at the end %d", others, took, atEnd))
	b.hub("processor time of yurt-manager", "%", 100*(p1.busy-p0.busy).Seconds()/took, bar{}, "of one processor, with --rest-config-qps=1000; "+note)
	b.hub("resident memory of yurt-manager", "MB", p1.resident, bar{}, fmt.Sprintf("%d nodes with a lease", pools*sitePool))
	return nil
}

// countSites adds up something of the sites' pools, by the manager's own word.
func (b *bench) countSites(ctx context.Context, of func(*v1beta2.NodePoolStatus) int) (n int, err error) {
	all, err := b.listPools(ctx)
	for i := range all {
		if strings.HasPrefix(all[i].Name, "site-") {
			n += of(&all[i].Status)
		}
	}
	return n, err
}

// lapsed counts the sites' leases that were renewed on another's word and then
// not in time.
func (b *bench) lapsed(ctx context.Context) (n int, err error) {
	leases, err := b.admin.CoordinationV1().Leases(corev1.NamespaceNodeLease).List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return 0, fmt.Errorf("list leases: %w", err)
	}
	for i := range leases.Items {
		l := &leases.Items[i]
		if strings.HasPrefix(l.Name, "site-") && l.Annotations[apps.VouchedFor] != "" && time.Since(l.Spec.RenewTime.Time) > leaseSeconds*time.Second {
			n++
		}
	}
	return n, nil
}
