package hub

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// beatBudget is how long a renewal may take on its way to the cloud: as
	// long as it keeps the node alive there, by the kubelet's default.
	beatBudget = 40 * time.Second
	// beatRetry is the pause after one that failed.
	beatRetry = time.Second
)

// prompt reports whether the link is up and worth waiting for.
func (h *Hub) prompt() bool { return h.link.Online() && !h.link.Weak() }

// silence says why the cloud was not asked.
func (h *Hub) silence() string {
	if h.link.Online() {
		return "answers too slowly"
	}
	return "cannot be reached"
}

// heartbeat is the node's lease as last seen, and the kubelet's renewals that
// the cloud has not seen. It is not kept on disk: it would be one write every
// ten seconds for a value that a restart renews.
type heartbeat struct {
	owed chan struct{} // holds a token when the cloud is owed a renewal

	mu    sync.Mutex // guards lease
	lease *coordinationv1.Lease
}

func newHeartbeat() *heartbeat { return &heartbeat{owed: make(chan struct{}, 1)} }

func (b *heartbeat) get() *coordinationv1.Lease {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lease
}

// set takes the lease as the cloud has it.
func (b *heartbeat) set(l *coordinationv1.Lease) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lease = l
}

// renew takes a renewal that was answered here. It gets the version that the
// cloud last gave the lease, so that the kubelet can go on from the answer.
func (b *heartbeat) renew(l *coordinationv1.Lease) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lease != nil && b.lease.ResourceVersion != "" {
		l.ResourceVersion = b.lease.ResourceVersion
	}
	b.lease = l
	select {
	case b.owed <- struct{}{}:
	default:
	}
}

// took notes the version at which the cloud took a renewal.
func (b *heartbeat) took(version string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lease != nil {
		l := b.lease.DeepCopy()
		l.ResourceVersion = version
		b.lease = l
	}
}

// beat passes on the renewals that were answered here because the link is
// weak, always the latest, one at a time. A renewal that is older than it is
// good for is not news: the kubelet may be dead.
func (h *Hub) beat(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.heartbeat.owed:
		}
		for h.link.WaitUp(ctx) == nil {
			l := h.heartbeat.get()
			if l == nil || l.Spec.RenewTime == nil || time.Since(l.Spec.RenewTime.Time) > beatBudget {
				break
			}
			err := h.link.Sampled(h.link.Patience(readBudget), func() error { return h.passOn(ctx, l) })
			if err == nil || ctx.Err() != nil {
				break
			}
			h.log.Debug("lease not renewed in the cloud", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(beatRetry):
			}
		}
	}
}

// passOn renews the lease in the cloud. It needs no version: nobody but this
// node renews it. A lease that is gone is left to the kubelet to make.
func (h *Hub) passOn(ctx context.Context, l *coordinationv1.Lease) error {
	ctx, cancel := context.WithTimeout(ctx, beatBudget)
	defer cancel()
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{
		"holderIdentity": l.Spec.HolderIdentity, "leaseDurationSeconds": l.Spec.LeaseDurationSeconds, "renewTime": l.Spec.RenewTime,
	}})
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	const path = "https://upstream/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/"
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, path+h.cfg.NodeName, bytes.NewReader(patch))
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	req.Header.Set("Content-Type", string(types.MergePatchType))
	req.Header.Set("Accept", runtime.ContentTypeJSON)
	req.Header.Set("User-Agent", "yurthub")
	resp, err := h.link.Node().RoundTrip(req)
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		if resp.StatusCode/100 == 4 && resp.StatusCode != http.StatusTooManyRequests {
			h.log.Debug("lease not renewed in the cloud", "status", resp.Status)
			return nil
		}
		return fmt.Errorf("renew lease: the cloud answered %s", resp.Status)
	}
	var renewed metav1.PartialObjectMetadata
	if err := json.Unmarshal(body, &renewed); err != nil {
		return fmt.Errorf("renew lease: read answer: %w", err)
	}
	h.heartbeat.took(renewed.ResourceVersion)
	return nil
}
