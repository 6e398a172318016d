package hub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/hub/pool"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/report"
)

const (
	// poolEvery is how often it is looked whether the node and its pool are
	// known yet, and how long changes of them are gathered.
	poolEvery = time.Second
	// shareBudget is how long a peer waits for a scope that this hub does not
	// hold yet.
	shareBudget = 10 * time.Second
	// poolPatience is how long the first word on a pool is waited for.
	poolPatience = 3 * time.Second
)

var poolsResource = schema.GroupVersionResource{
	Group: v1beta2.GroupVersion.Group, Version: v1beta2.GroupVersion.Version, Resource: "nodepools",
}

func (h *Hub) newPool() *pool.Pool {
	return pool.New(pool.Config{
		Node: h.cfg.NodeName, Port: h.cfg.PoolPort, Grace: h.cfg.PoolGrace, Return: h.cfg.PoolReturn,
		Certificate: h.certs.ClientCertificate, ClusterCAs: h.certs.ClusterCAs, Clock: h.clock,
		Link: func() (bool, <-chan struct{}) {
			changed := h.link.Changed()
			return h.link.Online(), changed
		},
		Ages:       h.ages,
		Serve:      h.servePeer,
		Heartbeats: h.vouch,
		Pods:       http.HandlerFunc(h.tellPods),
		Protect:    func(next http.Handler) http.Handler { return h.survive(h.observe(next)) },
		Refused:    h.unconnected,
		Log:        h.log.With("part", "pool"),
		Registerer: h.cfg.Registerer,
	})
}

// keepPool tells the pool what the cluster says of it, whenever that changes.
// Both objects come from the cloud and from nowhere else: who is a peer is not
// for peers to say. While the cloud is away the last word counts, from the
// disk if need be.
func (h *Hub) keepPool(ctx context.Context) error {
	own := replica.Scope{Resource: nodesResource, Fields: "metadata.name=" + h.cfg.NodeName}
	var followed replica.Scope
	for {
		var changes [2]<-chan struct{}
		if slice, ok := h.replica.Held(own); ok {
			changes[0] = slice.Changed()
		}
		node, _ := h.ownNode() // nil: not known yet
		name := h.poolName(node)
		followed = h.followPool(ctx, followed, name)
		member := h.pool.Membership() // the last word counts
		if member.Pool != name {
			member = pool.Membership{}
		}
		alone := false // as the pool says: its nodes do not reach each other
		slice, held := h.replica.Held(followed)
		if held {
			changes[1] = slice.Changed()
			switch got, err := h.membership(name); {
			case err == nil, apierrors.IsNotFound(err):
				member, alone = got, err == nil && got.Pool == ""
			default:
				h.log.Warn("the node's pool cannot be read", "pool", name, "err", err)
			}
		}
		// A node that has just joined is in no list yet, and a hub that has just
		// started has none.
		joining := name != "" && !alone && !member.Has(h.cfg.NodeName)
		h.pool.Set(member, h.address(node), !joining)
		h.sharePool() //nolint:contextcheck // a scope outlives whoever asked for it
		h.countPool(name)
		var again <-chan time.Time
		if changes[0] == nil || changes[1] == nil && name != "" {
			again = time.After(poolEvery)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again:
			continue
		case <-changes[0]:
		case <-changes[1]:
		}
		select { // a node's status changes often, its pool hardly ever
		case <-ctx.Done():
			return nil
		case <-time.After(poolEvery):
		}
	}
}

// followPool holds the named pool's object in place of the one held before, and
// waits for it, but not for long.
func (h *Hub) followPool(ctx context.Context, before replica.Scope, name string) replica.Scope {
	scope := replica.Scope{Resource: poolsResource, Fields: "metadata.name=" + name}
	if name == "" {
		scope = replica.Scope{}
	}
	if scope == before {
		return before
	}
	if before != (replica.Scope{}) {
		h.replica.Unpin(before)
	}
	if name == "" {
		return scope
	}
	if err := h.replica.Pin(scope); err != nil { //nolint:contextcheck // a scope outlives whoever asked for it
		h.log.Warn("the node's pool is not followed", "pool", name, "err", err)
		return replica.Scope{}
	}
	ctx, cancel := context.WithTimeout(ctx, poolPatience)
	defer cancel()
	if _, err := h.replica.Open(ctx, scope, replica.Credential{}, ""); err != nil {
		h.log.Debug("the node's pool is not known", "pool", name, "err", err)
	}
	return scope
}

// sharePool holds all that the pool shares while this hub leads it, and what
// peers have asked for as long as the pool shares it.
func (h *Hub) sharePool() {
	m, leads := h.pool.Membership(), h.pool.Leads()
	h.shares.Lock()
	defer h.shares.Unlock()
	for r := range h.shares.held {
		if !m.Shares(r) {
			h.replica.Unpin(replica.Scope{Resource: r})
			delete(h.shares.held, r)
		}
	}
	for _, r := range m.Shared {
		if leads {
			if err := h.holdLocked(r); err != nil {
				h.log.Warn("what the pool shares is not all held", "resource", r.String(), "err", err)
			}
		}
	}
}

// shares are the resources that are held for the pool.
type shares struct {
	sync.Mutex

	held map[schema.GroupVersionResource]bool
}

func (h *Hub) holdLocked(r schema.GroupVersionResource) error {
	if h.shares.held[r] || h.pins(r) {
		return nil
	}
	if err := h.replica.Pin(replica.Scope{Resource: r}); err != nil {
		return err
	}
	if h.shares.held == nil {
		h.shares.held = map[schema.GroupVersionResource]bool{}
	}
	h.shares.held[r] = true
	return nil
}

// pins reports whether the hub holds a resource whole, whatever its pool does.
func (h *Hub) pins(r schema.GroupVersionResource) bool {
	return slices.Contains(h.cfg.Pinned, r) || r == accessFiltersResource && !h.cfg.Filters.Off
}

// isShared tells what the pool shares; until it is known, what it would by
// default.
func (h *Hub) isShared(r schema.GroupVersionResource) bool {
	if m := h.pool.Membership(); m.Pool != "" {
		return m.Shares(r)
	}
	return h.pins(r)
}

// choose is the replica's router: what the pool shares comes from where the
// pool says, all else from the cloud.
func (h *Hub) choose(scope replica.Scope, avoid func(string) bool) (replica.Route, bool, <-chan struct{}) {
	cloud := replica.Route{Upstream: h.link, Kind: "cloud"}
	if !h.isShared(scope.Resource) || scope == accessFiltersOwn {
		return cloud, true, nil
	}
	cloud.Shared = true
	up, other, ok, changed := h.pool.Choose(avoid)
	switch {
	case !ok:
		return replica.Route{}, false, changed
	case up.Peer == "":
		return cloud, other, changed
	}
	id := scope.ID()
	return replica.Route{
		Upstream: peerUpstream{h.pool.Transport(up.Peer)}, Peer: up.Peer, Kind: up.Kind, Shared: true,
		Contact: func() time.Time {
			if at := h.pool.Proved(up.Peer, id); !at.IsZero() {
				return h.clock.Now().Add(-time.Since(at))
			}
			return time.Time{}
		},
		Live: func() bool { return h.pool.Live(up.Peer) },
	}, other, changed
}

// peerUpstream is another hub as a stream sees it. It is asked in the node's
// own name only.
type peerUpstream struct{ http.RoundTripper }

func (u peerUpstream) Node() http.RoundTripper    { return u }
func (peerUpstream) Bearer() http.RoundTripper    { return noTokens{} }
func (peerUpstream) WaitUp(context.Context) error { return nil } // whether it is there is for the pool to find out

type noTokens struct{}

func (noTokens) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, errors.New("a caller's token is shown to no other hub")
}

// ages are the times since the cloud last proved what is held of the shared
// resources by the node's own right.
func (h *Hub) ages() map[string]time.Duration {
	out := map[string]time.Duration{}
	for _, r := range h.pool.Membership().Shared {
		for scope, contact := range h.replica.Contacts(r) {
			out[scope] = h.clock.Since(contact)
		}
	}
	return out
}

// poolName is the pool that the node says it is in. Until the node is known it
// is what the hub was told; membership is the pool's to say in any case.
func (h *Hub) poolName(node *corev1.Node) string {
	if node == nil {
		return h.cfg.PoolName
	}
	return node.Labels[apps.NodePoolLabel]
}

// address is where peers reach this hub.
func (h *Hub) address(node *corev1.Node) net.IP {
	if len(h.cfg.NodeIPs) > 0 {
		return h.cfg.NodeIPs[0]
	}
	if node == nil {
		return nil
	}
	for _, a := range node.Status.Addresses {
		if ip := net.ParseIP(a.Address); a.Type == corev1.NodeInternalIP && ip != nil {
			return ip
		}
	}
	return nil
}

func (h *Hub) membership(name string) (pool.Membership, error) {
	held, err := h.replica.Get(request.Info{Verb: "get", IsResource: true, Resource: poolsResource, Name: name}, 0)
	if err != nil {
		return pool.Membership{}, err
	}
	var np v1beta2.NodePool
	if err := json.Unmarshal(held.Data, &np); err != nil {
		return pool.Membership{}, fmt.Errorf("read node pool %s: %w", name, err)
	}
	if !np.Spec.InterConnectivity || np.DeletionTimestamp != nil {
		return pool.Membership{}, nil
	}
	m := pool.Membership{Pool: name, Nodes: np.Status.Nodes}
	if np.Spec.EnableLeaderElection {
		for _, l := range np.Status.LeaderEndpoints {
			m.Leaders = append(m.Leaders, pool.Leader{Node: l.NodeName, Address: l.Address})
		}
	}
	for _, c := range np.Status.Contacts {
		m.Contacts = append(m.Contacts, pool.Leader{Node: c.NodeName, Address: c.Address})
	}
	for _, r := range np.Shared() {
		m.Shared = append(m.Shared, schema.GroupVersionResource(r))
	}
	// Hubs of OpenYurt, which are told what is shared by a ConfigMap, know no
	// AccessFilters.
	if !slices.Contains(m.Shared, accessFiltersResource) {
		m.Shared = append(m.Shared, accessFiltersResource)
	}
	return m, nil
}

// servePeer answers a list or watch of another hub of the pool, with what the
// cloud said and nothing that this node put over it.
func (h *Hub) servePeer(w http.ResponseWriter, r *http.Request, info request.Info, peer string) error {
	formats := slices.DeleteFunc(request.Formats(r.Header), func(f request.Format) bool { return f.View != request.Whole })
	opts := *info.Options
	opts.Watch = info.Verb == "watch"
	if errs := validation.ValidateListOptions(&opts, true); len(errs) > 0 {
		return apierrors.NewBadRequest(errs.ToAggregate().Error())
	}
	if complicated(info) || opts.Continue != "" || opts.ResourceVersionMatch == metav1.ResourceVersionMatchExact {
		return apierrors.NewBadRequest("yurthub: peers select simply, do not page, and ask for no exact version")
	}
	if h.memory.short() {
		return tooMany(5, "the hub is short of memory and begins no lists and watches but the node's")
	}
	r = r.WithContext(h.lanes.turns.With(r.Context(), "peer/"+peer))
	q := &query{hub: h, w: w, r: r, info: info, formats: formats}
	err := q.share() //nolint:contextcheck // it has r
	switch {
	case err == nil:
		return nil
	case replica.Aborted(err):
		panic(http.ErrAbortHandler) // the peer must not take what it has for the whole
	case errors.Is(err, replica.ErrExpired):
		q.expired(err)
		return nil
	case errors.Is(err, replica.ErrAhead):
		return tooLarge(err)
	case errors.Is(err, replica.ErrFormat):
		return notAcceptable(err)
	}
	if status := apierrors.APIStatus(nil); errors.As(err, &status) {
		return err
	}
	unavailable := apierrors.NewServiceUnavailable("yurthub: " + err.Error())
	if errors.Is(err, context.DeadlineExceeded) {
		// It is on its way. A peer that went to the cloud for it would only make
		// it come later.
		unavailable.ErrStatus.Details = &metav1.StatusDetails{RetryAfterSeconds: 1}
	}
	return unavailable
}

func (q *query) share() error {
	held, err := q.hub.shared(q.r.Context(), replica.ScopeOf(q.info))
	if err != nil {
		return err
	}
	held.Touch()
	held = held.Base()
	if q.info.Verb == "watch" {
		return held.Watch(q.w, q.r, q.info, q.formats)
	}
	v, err := q.version()
	if err != nil {
		return apierrors.NewBadRequest("the resource version is not a number")
	}
	if v > 0 {
		ctx, cancel := context.WithTimeout(q.r.Context(), awaitBudget)
		defer cancel()
		if err := held.Await(ctx, v); err != nil {
			return err
		}
	}
	return held.List(q.w, q.r, q.formats)
}

// shared returns a slice that the node reads by its own right. One that is not
// held is from then on, whole: another peer will ask for the rest.
func (h *Hub) shared(ctx context.Context, scope replica.Scope) (*replica.Slice, error) {
	own := func() (*replica.Slice, bool) {
		held, ok := h.replica.Held(scope)
		return held, ok && !held.Borrowed()
	}
	if held, ok := own(); ok {
		return held, nil
	}
	whole := replica.Scope{Resource: scope.Resource}
	h.shares.Lock()
	err := h.holdLocked(scope.Resource) //nolint:contextcheck // it outlives whoever asked for it
	h.shares.Unlock()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, shareBudget)
	defer cancel()
	if _, err := h.replica.Open(ctx, whole, replica.Credential{}, ""); err != nil {
		return nil, err
	}
	if held, ok := own(); ok {
		return held, nil
	}
	return nil, fmt.Errorf("%s: %w", scope.ID(), replica.ErrNotHeld)
}

// sharing is the hub's part in its pool, for people.
func (h *Hub) sharing() *report.Sharing {
	peer, live := h.pool.Following()
	out := &report.Sharing{Role: report.RoleMember, Upstream: peer, Live: live, Address: h.pool.Address()}
	if h.pool.Leads() {
		out.Role = report.RoleLeader
	}
	if peer == "" {
		out.Upstream = report.Cloud
	}
	for _, p := range h.pool.Peers() {
		out.Peers = append(out.Peers, report.Peer(p))
	}
	return out
}
