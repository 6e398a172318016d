package hub

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/api/apps"
	beats "github.com/yurt-edge/yurt/internal/heartbeat"
	"github.com/yurt-edge/yurt/internal/hub/pool"
	"github.com/yurt-edge/yurt/internal/hub/vouch"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	// beatBudget is how long a renewal may take on its way to the cloud: as
	// long as it keeps the node alive there, by the kubelet's default.
	beatBudget = 40 * time.Second
	// beatRetry is the pause after one that failed.
	beatRetry = time.Second
	// A node that waits to be carried for the first time waits for others that
	// fell silent with it, and no longer: carryGather at most. Between two such
	// writes is carryPause at least.
	carryGather = time.Second
	carryPause  = 2 * time.Second
	// recently is how long a peer that was heard counts as one that answers.
	recently = 10 * time.Second
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
	owed  chan struct{} // holds a token when the cloud is owed a renewal
	hurry chan struct{} // holds a token when a node waits to be carried

	mu    sync.Mutex // guards the following
	lease *coordinationv1.Lease
	spoke time.Time         // when the kubelet last renewed it here
	wrote *metav1.MicroTime // and what it wrote
	taken time.Time         // when the cloud last took a renewal
	moved [2]string         // from and to which version this hub last brought it
}

func newHeartbeat() *heartbeat {
	return &heartbeat{owed: make(chan struct{}, 1), hurry: make(chan struct{}, 1)}
}

func (b *heartbeat) get() *coordinationv1.Lease {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lease
}

// set takes the lease as the cloud has it, and that it took a renewal.
func (b *heartbeat) set(l *coordinationv1.Lease, renewed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lease = l
	if renewed {
		b.taken = time.Now()
	}
}

// heard takes note that the kubelet lives.
func (b *heartbeat) heard(l *coordinationv1.Lease) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spoke, b.wrote = time.Now(), l.Spec.RenewTime
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
	b.taken = time.Now()
	if b.lease != nil {
		l := b.lease.DeepCopy()
		l.ResourceVersion = version
		b.lease = l
	}
}

// move notes that this hub has written its annotations, and nothing else, over
// the version from.
func (b *heartbeat) move(from, to string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lease != nil && b.lease.ResourceVersion == from {
		l := b.lease.DeepCopy()
		l.ResourceVersion = to
		b.lease = l
	}
	if b.moved[1] == from {
		from = b.moved[0]
	}
	b.moved = [2]string{from, to}
}

// version is what a version has become by what this hub wrote: the kubelet
// knows of none of that, and need not.
func (b *heartbeat) version(known string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if known != "" && known == b.moved[0] {
		return b.moved[1]
	}
	return known
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
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"annotations": h.leaseAnnotations()},
		"spec": map[string]any{
			"holderIdentity": l.Spec.HolderIdentity, "leaseDurationSeconds": l.Spec.LeaseDurationSeconds, "renewTime": l.Spec.RenewTime,
		},
	})
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	renewed, err := h.patchLease(ctx, patch)
	if renewed == nil {
		return err
	}
	h.heartbeat.took(renewed.ResourceVersion)
	h.vouch.Took(renewed.Annotations[apps.Heartbeats])
	return nil
}

// patchLease returns nil without an error when the cloud refuses the patch.
func (h *Hub) patchLease(ctx context.Context, patch []byte) (*metav1.PartialObjectMetadata, error) {
	const path = "https://upstream/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/"
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, path+h.cfg.NodeName, bytes.NewReader(patch))
	if err != nil {
		return nil, fmt.Errorf("renew lease: %w", err)
	}
	req.Header.Set("Content-Type", string(types.MergePatchType))
	req.Header.Set("Accept", runtime.ContentTypeJSON)
	req.Header.Set("User-Agent", "yurthub")
	resp, err := h.link.Node().RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("renew lease: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("renew lease: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		if resp.StatusCode/100 == 4 && resp.StatusCode != http.StatusTooManyRequests {
			h.log.Debug("lease not renewed in the cloud", "status", resp.Status)
			return nil, nil //nolint:nilnil // it is refused
		}
		return nil, fmt.Errorf("renew lease: the cloud answered %s", resp.Status)
	}
	renewed := &metav1.PartialObjectMetadata{}
	if err := json.Unmarshal(body, renewed); err != nil {
		return nil, fmt.Errorf("renew lease: read answer: %w", err)
	}
	return renewed, nil
}

// carrySoon takes to the cloud, between two renewals, the heartbeats of nodes of
// which it has not heard from here: a node that falls silent need not wait for
// this one's kubelet. After that they go with its renewals.
func (h *Hub) carrySoon(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.heartbeat.hurry:
		}
		for pause := carryGather/2 + rand.N(carryGather/2); ; pause = carryPause {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
			if !h.vouch.Waits() {
				break
			}
			if err := h.carryNow(ctx); err != nil {
				h.log.Debug("heartbeats of peers not carried at once", "err", err)
			}
		}
	}
}

// carryNow writes what this hub carries, if nobody has written the lease since.
// Whoever has, the kubelet as a rule, has carried it.
func (h *Hub) carryNow(ctx context.Context) error {
	l := h.heartbeat.get()
	if l == nil || l.ResourceVersion == "" {
		return nil
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": l.ResourceVersion, "annotations": h.leaseAnnotations()},
	})
	if err != nil {
		return fmt.Errorf("carry heartbeats: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, leaseBudget)
	defer cancel()
	written, err := h.patchLease(ctx, patch)
	if written == nil {
		return err
	}
	h.heartbeat.move(l.ResourceVersion, written.ResourceVersion)
	h.vouch.Took(written.Annotations[apps.Heartbeats])
	return nil
}

func (h *Hub) newVouch() *vouch.Vouch {
	return vouch.New(vouch.Config{
		Node: h.cfg.NodeName, Certificate: h.certs.ClientCertificate, ClusterCAs: h.certs.ClusterCAs, Clock: h.clock,
		Online: h.link.Online, Changed: h.link.Changed, Own: h.ownHeartbeat,
		From: pool.PeerFrom, Member: func(node string) bool { return h.pool.Membership().Has(node) },
		Peers: func() []string {
			followed, _ := h.pool.Following()
			return inTurn(h.pool.Peers(), followed, time.Now())
		},
		Helped: func() <-chan struct{} { return h.pool.Helped() },
		Hurry: func() {
			select {
			case h.heartbeat.hurry <- struct{}{}:
			default:
			}
		},
		Transport: func(node string) http.RoundTripper { return h.pool.Transport(node) }, Path: pool.HeartbeatsPath,
		Log: h.log.With("part", "vouch"), Registerer: h.cfg.Registerer,
	})
}

// inTurn is the order in which peers are asked to vouch: those that have a link,
// whom this hub follows, which looks for one too, then the others that were heard
// lately. It is not the same for every hub.
func inTurn(peers []pool.Peer, followed string, now time.Time) []string {
	var turns [4][]string
	for _, i := range rand.Perm(len(peers)) {
		p, turn := peers[i], 3
		switch {
		case p.Link:
			turn = 0
		case p.Node == followed:
			turn = 1
		case now.Sub(p.Seen) < recently:
			turn = 2
		}
		turns[turn] = append(turns[turn], p.Node)
	}
	return slices.Concat(turns[:]...)
}

// ownHeartbeat is what others may carry to the cloud for this node.
func (h *Hub) ownHeartbeat() (vouch.Own, error) {
	h.heartbeat.mu.Lock()
	spoke, wrote, taken, lease := h.heartbeat.spoke, h.heartbeat.wrote, h.heartbeat.taken, h.heartbeat.lease
	h.heartbeat.mu.Unlock()
	own := vouch.Own{Spoke: spoke, Taken: taken, Life: beatBudget}
	if wrote == nil {
		return vouch.Own{}, nil // not since this hub started
	}
	if lease != nil && lease.Spec.LeaseDurationSeconds != nil {
		own.Life = time.Duration(*lease.Spec.LeaseDurationSeconds) * time.Second
	}
	own.Renewed = *wrote
	node, err := h.ownNode()
	if err != nil {
		return own, err
	}
	own.UID = node.UID
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			own.Ready = c.Status
		}
	}
	return own, nil
}

// leaseAnnotations is what this hub has to say on the node's lease; nil takes
// an annotation away.
func (h *Hub) leaseAnnotations() map[string]*string {
	all := map[string]*string{apps.Heartbeats: nil, apps.DelegateHeartbeat: nil}
	text, err := beats.Join(h.vouch.Turn())
	if err != nil {
		h.log.Warn("the heartbeats of peers are not carried", "err", err)
	} else if text != "" {
		all[apps.Heartbeats] = &text
	}
	return all
}

// answered takes the lease as the cloud has it, and what it took with a renewal.
func (h *Hub) answered(answer []byte, renewed bool) {
	l := &coordinationv1.Lease{}
	if decode(answer, l) != nil {
		return
	}
	h.heartbeat.set(l, renewed)
	if renewed {
		h.vouch.Took(l.Annotations[apps.Heartbeats])
	}
}

// renewal reads what the kubelet writes, and adds to it what the hub has to
// say.
func (h *Hub) renewal(r *http.Request, body []byte, into *coordinationv1.Lease) error {
	if err := decode(body, into); err != nil {
		return err
	}
	if into.Name != h.cfg.NodeName {
		return nil
	}
	h.heartbeat.heard(into)
	if err := carry(r, body, into, h.leaseAnnotations(), h.heartbeat.version(into.ResourceVersion)); err != nil {
		h.log.Warn("the heartbeats of peers are not carried", "err", err)
	}
	return nil
}

// carry puts annotations into the kubelet's own renewal, so that they cost no
// write of their own and cannot be in its way, and takes away those that it
// repeats from the answer before. The kubelet may be newer than this hub: the
// fields of its lease that are not known here stay. The renewal is of the given
// version then.
func carry(r *http.Request, body []byte, l *coordinationv1.Lease, set map[string]*string, version string) error {
	moved := version != l.ResourceVersion
	changed := moved
	annotations := maps.Clone(l.Annotations)
	for key, text := range set {
		had, has := annotations[key]
		switch {
		case text == nil && has:
			delete(annotations, key)
			changed = true
		case text != nil && had != *text:
			if annotations == nil {
				annotations = map[string]string{}
			}
			annotations[key] = *text
			changed = true
		}
	}
	if !changed {
		return nil
	}
	enc := wire.JSON
	if strings.HasPrefix(r.Header.Get("Content-Type"), runtime.ContentTypeProtobuf) {
		enc = wire.Protobuf
	}
	apiVersion, kind, object, err := wire.ReadObject(enc, body)
	if err == nil {
		object, err = wire.Annotate(enc, object, set)
	}
	if err == nil && moved {
		object, err = setVersion(enc, object, version)
	}
	if err != nil {
		return err //nolint:wrapcheck // it names the object
	}
	text := wire.AppendObject(nil, enc, apiVersion, kind, object)
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(text)), int64(len(text))
	l.Annotations, l.ResourceVersion = annotations, version
	return nil
}

func setVersion(enc wire.Encoding, object []byte, version string) ([]byte, error) {
	v, err := strconv.ParseUint(version, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("version of the lease: %w", err)
	}
	return wire.SetVersion(enc, object, v)
}
