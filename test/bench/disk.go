package main

import (
	"context"
	"fmt"
	"net/http"
	"time"
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
	return b.diskOfStatus(ctx, h, through)
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
		if _, err := c.send(ctx, http.MethodPatch, path, protobuf, patch, "application/strategic-merge-patch+json"); err != nil {
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
