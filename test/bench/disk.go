package main

import (
	"context"
	"fmt"
	"net/http"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// disk measures what a node writes in its daily work, which flash pays for,
// and the memory of a hub that does little.
func (b *bench) disk(ctx context.Context) error {
	h, err := b.startHub(ctx, false)
	if err != nil {
		return err
	}
	defer h.close()
	const pods = 3
	if err := b.pods(ctx, "pods", h.Node, pods); err != nil {
		return err
	}
	direct, through, err := h.kubelet()
	if err != nil {
		return err
	}
	// What a kubelet and a kube-proxy keep open.
	own := "?watch=1&resourceVersion=0&fieldSelector="
	for _, path := range []string{
		"/api/v1/pods" + own + "spec.nodeName%3D" + h.Node, "/api/v1/nodes" + own + "metadata.name%3D" + h.Node,
		"/api/v1/services?watch=1&resourceVersion=0", "/apis/discovery.k8s.io/v1/endpointslices?watch=1&resourceVersion=0",
	} {
		c := through.connect()
		defer c.close()
		resp, err := c.open(ctx, http.MethodGet, path, protobuf+";stream=watch", nil, "")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
	}
	if err := h.quiet(ctx); err != nil {
		return err
	}
	if err := b.memory(h, fmt.Sprintf("idle node with %d pods", pods), atMost(40)); err != nil {
		return err
	}
	if err := b.diskOfReads(ctx, h, direct, through); err != nil {
		return err
	}
	if err := b.diskOfStatus(ctx, h, through); err != nil {
		return err
	}
	if err := b.diskOfMix(ctx, h, through); err != nil {
		return err
	}
	return b.diskOfHour(ctx, h, through)
}

// wrote returns what the hub gives to the disk while work runs and until it
// is at rest again.
func (h *hub) wrote(ctx context.Context, work func() error) (float64, error) {
	if err := h.quiet(ctx); err != nil {
		return 0, err
	}
	before, err := readProcess(h.PID())
	if err != nil {
		return 0, err
	}
	if err := work(); err != nil {
		return 0, err
	}
	if err := h.quiet(ctx); err != nil {
		return 0, err
	}
	after, err := readProcess(h.PID())
	return after.written - before.written, err
}

const strategicPatch = "application/strategic-merge-patch+json"

// diskOfMix measures a busy node: statuses of twenty pods at 50/s and changes
// of EndpointSlices of 50 endpoints at 5/s, against the bytes of the objects
// that changed.
func (b *bench) diskOfMix(ctx context.Context, h *hub, through target) error {
	const (
		pods, slices       = 20, 10
		perSecond, oneIn   = 55, 11
		podSpace, sliceSet = "mix-pods", "mix-slices"
	)
	if err := b.morePods(ctx, podSpace, h.Node, pods); err != nil {
		return err
	}
	if err := b.slices(ctx, sliceSet, slices); err != nil {
		return err
	}
	kubelet, cloud := through.connect(), b.direct().connect()
	defer kubelet.close()
	defer cloud.close()
	changes, changed := perSecond*pick(b, 20, 6), 0
	written, err := h.wrote(ctx, func() error {
		start := time.Now()
		for i := range changes {
			if err := pause(ctx, time.Until(start.Add(time.Duration(i)*time.Second/perSecond))); err != nil {
				return err
			}
			c, path := kubelet, fmt.Sprintf(podPath, podSpace)+fmt.Sprintf("/object-%05d/status", i%pods)
			patch := fmt.Appendf(nil, `{"status":{"phase":"Running","message":"%s"}}`, update(i))
			if i%oneIn == 0 {
				c, path = cloud, fmt.Sprintf(slicePath, sliceSet)+fmt.Sprintf("/object-%05d", i/oneIn%slices)
				patch = fmt.Appendf(nil, `{"metadata":{"annotations":{"bench":"%s"}}}`, update(i))
			}
			n, err := c.send(ctx, http.MethodPatch, path, protobuf, patch, strategicPatch)
			if err != nil {
				return err
			}
			changed += n
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.hub("disk written per byte of changed objects, busy node", "bytes", written/float64(changed), atMost(2),
		fmt.Sprintf("%d changes, %d KB", changes, changed/1000))
	return nil
}

// diskOfHour measures what an idle kubelet does in an hour: a lease every ten
// seconds, and the node's status with nothing but new times every five
// minutes, each of which is far enough from the last to be written by itself.
// What the streams' progress costs comes on top: TestBookmarksDoNotWearTheFlash
// bounds it by 300 KB.
func (b *bench) diskOfHour(ctx context.Context, h *hub, through target) error {
	const beats, statuses = 360, 12
	c := through.connect()
	defer c.close()
	cfg, err := h.KubeletConfig()
	if err != nil {
		return err
	}
	kubelet, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("be the kubelet: %w", err)
	}
	leases := kubelet.CoordinationV1().Leases("kube-node-lease")
	seconds := int32(40)
	lease, err := leases.Create(ctx, &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: h.Node},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &h.Node, LeaseDurationSeconds: &seconds},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("make lease: %w", err)
	}
	written, err := h.wrote(ctx, func() error {
		for i := range beats {
			now := metav1.NowMicro()
			lease.Spec.RenewTime = &now
			if lease, err = leases.Update(ctx, lease, metav1.UpdateOptions{}); err != nil {
				return fmt.Errorf("renew lease: %w", err)
			}
			if i%(beats/statuses) != 0 {
				continue
			}
			beat := time.Now().Add(time.Duration(i) * 10 * time.Second).UTC().Format(time.RFC3339)
			status := fmt.Appendf(nil, `{"status":{"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":"%s"}]}}`, beat)
			if _, err := c.send(ctx, http.MethodPatch, "/api/v1/nodes/"+h.Node+"/status", jsonType, status, strategicPatch); err != nil {
				return err
			}
			if err := h.quiet(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.hub("disk written in an hour of an idle node, but for progress", "KB", written/1000, atMost(700),
		fmt.Sprintf("%d leases, %d unchanged statuses, in quick succession", beats, statuses))
	return nil
}

// diskOfReads measures reads by the node's own user, whose answers the hub
// keeps for the time when the cloud is away.
func (b *bench) diskOfReads(ctx context.Context, h *hub, direct, through target) error {
	s := connect(direct, through, 8)
	defer s.close()
	l := load{path: "/api/v1/nodes/" + h.Node, accept: protobuf}
	c, err := s.compare(ctx, h, l, pick(b, 5, 3), pick(b, 2*time.Second, time.Second))
	if err != nil {
		return err
	}
	b.compared("GET by the kubelet of what the hub keeps, 8 connections", c, bar{})
	if err := h.quiet(ctx); err != nil {
		return err
	}
	before, err := readProcess(h.PID())
	if err != nil {
		return err
	}
	const reads = 1000
	one := s[1][0]
	for range reads {
		if _, err := one.get(ctx, l.path, l.accept); err != nil {
			return err
		}
	}
	if err := h.quiet(ctx); err != nil {
		return err
	}
	after, err := readProcess(h.PID())
	if err != nil {
		return err
	}
	b.hub("disk written per forwarded, cached GET", "bytes", (after.written-before.written)/reads, atMost(0), fmt.Sprintf("over %d reads", reads))
	return nil
}

// diskOfStatus measures a kubelet's patches of a pod's status.
func (b *bench) diskOfStatus(ctx context.Context, h *hub, through target) error {
	const perSecond = 50
	updates := perSecond * pick(b, 10, 4)
	before, err := readProcess(h.PID())
	if err != nil {
		return err
	}
	start := time.Now()
	c := through.connect()
	defer c.close()
	path := fmt.Sprintf(podPath, "pods") + "/object-00000/status"
	for i := range updates {
		if err := pause(ctx, time.Until(start.Add(time.Duration(i)*time.Second/perSecond))); err != nil {
			return err
		}
		patch := fmt.Appendf(nil, `{"status":{"phase":"Running","message":"%s"}}`, update(i))
		if _, err := c.send(ctx, http.MethodPatch, path, protobuf, patch, strategicPatch); err != nil {
			return err
		}
	}
	pace := float64(updates) / time.Since(start).Seconds()
	if err := h.quiet(ctx); err != nil {
		return err
	}
	after, err := readProcess(h.PID())
	if err != nil {
		return err
	}
	b.hub("disk written per status update of a 2 KB pod", "bytes", (after.written-before.written)/float64(updates), atMost(2048),
		fmt.Sprintf("%d updates at %.0f/s, link up", updates, pace))
	return nil
}
