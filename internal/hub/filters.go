package hub

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1alpha1"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/filter"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// FilterConfig says how programs on the node see the cluster.
type FilterConfig struct {
	filter.Config

	// Buckets takes the nodes of the pool from its NodeBuckets, which large
	// pools have, and not from the NodePool.
	Buckets bool
}

// filterFlags are the flags of a FilterConfig.
type filterFlags struct {
	FilterConfig

	on   bool
	mode string
}

func (f *filterFlags) add(fs *pflag.FlagSet) {
	fs.BoolVar(&f.on, "enable-resource-filter", true, "show components on the node what fits the edge")
	fs.StringSliceVar(&f.Disabled, "disabled-resource-filters", nil, "filters that are not applied, by name")
	fs.StringVar(&f.mode, "working-mode", "edge", "edge, or cloud for a node in the cloud, where filters that only an edge needs are not applied")
	fs.BoolVar(&f.Buckets, "enable-pool-service-topology", false, "take the nodes of the pool from its NodeBuckets and not from the NodePool")
}

func (f *filterFlags) config() (FilterConfig, error) {
	if f.mode != "edge" && f.mode != "cloud" {
		return f.FilterConfig, fmt.Errorf("--working-mode %q is not known: use edge or cloud", f.mode)
	}
	f.Off, f.Cloud = !f.on, f.mode == "cloud"
	if err := f.Check(); err != nil {
		return f.FilterConfig, fmt.Errorf("--disabled-resource-filters: %w", err)
	}
	return f.FilterConfig, nil
}

const (
	// filtersEvery is how often it is looked whether what filters go by is
	// known yet.
	filtersEvery = time.Second
	// filtersShare bounds the part of the time that is spent on changes of
	// what filters go by: the next is looked at after this many times what the
	// last one took.
	filtersShare = 10
	// accessAbsentEvery is how often it is looked whether the cluster has
	// AccessFilters after all.
	accessAbsentEvery = 10 * time.Second

	filterConfigNamespace = "kube-system"
	filterConfigName      = "yurt-hub-cfg"
	// poolOfBucket is the label of a NodeBucket that names its pool.
	poolOfBucket = "openyurt.io/pool-name"
)

var (
	servicesResource   = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	configMapsResource = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	bucketsResource    = schema.GroupVersionResource{
		Group: v1alpha1.GroupVersion.Group, Version: v1alpha1.GroupVersion.Version, Resource: "nodebuckets",
	}
	filterConfigScope = replica.Scope{
		Resource: configMapsResource, Namespace: filterConfigNamespace, Fields: "metadata.name=" + filterConfigName,
	}
)

// filters is what programs see by now. The table is read by requests; all else
// belongs to whoever makes the next one.
type filters struct {
	table atomic.Pointer[filter.Table]
	state filter.State
	extra map[string][]string
	pool  string // whose buckets are held
	// behind is set while some programs are not shown what the table says.
	behind bool
	access accessFilters
}

// filterOf is the replica's source of filters.
func (h *Hub) filterOf(component string) replica.Filter {
	return h.filters.table.Load().Reader(component)
}

// filterScopes are the scopes that filters need beside those that the hub
// holds anyway.
func (h *Hub) filterScopes() []replica.Scope {
	if h.cfg.Filters.Off {
		return nil
	}
	return []replica.Scope{{Resource: servicesResource}, filterConfigScope}
}

// keepFilters makes programs see the cluster by what is known of it now, at
// once when that changes.
func (h *Hub) keepFilters(ctx context.Context) error {
	if h.cfg.Filters.Off {
		return nil
	}
	services := true // they are many, and read when they have changed
	for {
		changed, whole := h.filterChanges()
		begun := time.Now()
		err := h.refilter(services) //nolint:contextcheck // a scope outlives whoever asked for it
		if err != nil {
			h.log.Warn("filters are not up to date", "err", err)
		}
		pause := time.NewTimer(filtersShare * time.Since(begun))
		var again <-chan time.Time
		switch {
		case err != nil || !whole || h.filters.access.waits:
			again = time.After(filtersEvery)
		case changed[accessChange] == nil: // a cluster may know no AccessFilters
			again = time.After(accessAbsentEvery)
		}
		select {
		case <-ctx.Done():
		case <-again:
		case <-changed[0]:
		case <-changed[1]:
		case <-changed[2]:
		case <-changed[3]:
		case <-changed[4]:
		case <-changed[5]:
		}
		services = err != nil || changed[servicesChange] == nil
		select {
		case <-changed[servicesChange]:
			services = true
		default:
		}
		select {
		case <-ctx.Done():
			pause.Stop()
			return nil
		case <-pause.C:
		}
	}
}

// The places of the Services, of the AccessFilters and of those that the cloud
// itself said in what filterChanges returns.
const (
	servicesChange  = 2
	accessChange    = 4
	accessOwnChange = 5
)

// filterChanges returns channels that are closed when what filters go by may
// have changed, and whether there is one for all that every cluster has.
func (h *Hub) filterChanges() (changed [6]<-chan struct{}, whole bool) {
	node, _ := h.ownNode()
	nodes := replica.Scope{Resource: poolsResource, Fields: "metadata.name=" + h.poolName(node)}
	if h.cfg.Filters.Buckets {
		nodes = bucketsOf(h.poolName(node))
	}
	whole = h.cfg.DummyIP == nil || h.certs.ServesPods()
	for i, scope := range []replica.Scope{
		{Resource: nodesResource, Fields: "metadata.name=" + h.cfg.NodeName},
		nodes,
		{Resource: servicesResource},
		filterConfigScope,
		accessFiltersScope,
		accessFiltersOwn,
	} {
		if i == accessOwnChange && !h.filters.access.asks {
			break
		}
		slice, ok := h.replica.Held(scope)
		if !ok {
			whole = whole && i == accessChange
			continue
		}
		changed[i] = slice.Changed()
	}
	return changed, whole
}

func bucketsOf(pool string) replica.Scope {
	return replica.Scope{Resource: bucketsResource, Labels: poolOfBucket + "=" + pool}
}

// refilter shows programs what they are to see now.
func (h *Hub) refilter(services bool) error {
	next, extra := h.filters.state, h.filters.extra
	var errs []error
	if err := h.readPlace(&next); err != nil {
		errs = append(errs, err)
	}
	if services {
		if err := h.readServices(&next); err != nil {
			errs = append(errs, err)
		}
	}
	if got, err := h.readFilterConfig(&next); err != nil {
		errs = append(errs, err)
	} else {
		extra = got
	}
	if err := h.readHub(&next); err != nil {
		errs = append(errs, err)
	}
	if err := h.readAccessFilters(&next); err != nil {
		errs = append(errs, err)
	}
	before := h.filters.table.Load()
	if before != nil && !h.filters.behind && next.Hub == h.filters.state.Hub && next.Place == h.filters.state.Place &&
		next.Services == h.filters.state.Services && slices.Equal(next.Programs, h.filters.state.Programs) && maps.EqualFunc(extra, h.filters.extra, slices.Equal) {
		return errors.Join(errs...)
	}
	h.filters.state, h.filters.extra = next, extra
	table := filter.New(h.cfg.Filters.Config, &next, extra)
	h.filters.table.Store(table)
	components := table.Components()
	if before != nil {
		components = append(components, before.Components()...)
	}
	slices.Sort(components)
	var late []error
	for _, c := range slices.Compact(components) {
		late = append(late, h.replica.Refilter(c))
	}
	err := errors.Join(late...)
	h.filters.behind = err != nil
	if before != nil {
		// Who watches as it is what it is to see filtered comes back.
		for _, resource := range table.Adds(before) {
			h.replica.Recall(resource)
		}
	}
	return errors.Join(append(errs, err)...)
}

// readHub finds out where pods of this node reach the hub.
func (h *Hub) readHub(s *filter.State) error {
	if !h.certs.ServesPods() {
		s.Hub = nil
		return nil
	}
	hub := filter.Hub{Host: h.cfg.DummyIP.String(), Port: int32(h.cfg.ProxyPort)} //nolint:gosec // a port
	held, err := h.replica.Get(request.Info{
		Verb: "get", IsResource: true, Resource: servicesResource, Namespace: "default", Name: "kubernetes",
	}, 0)
	if err == nil && held.Kind.Encoding == wire.Protobuf {
		var service corev1.Service
		if err := service.Unmarshal(held.Data); err != nil {
			return fmt.Errorf("read Service default/kubernetes: %w", err)
		}
		hub.Behind = len(service.Spec.ClusterIPs) > 0
		for _, ip := range service.Spec.ClusterIPs {
			hub.Behind = hub.Behind && h.certs.Names(ip)
		}
	}
	if s.Hub == nil || *s.Hub != hub {
		s.Hub = &hub
	}
	return nil
}

// readPlace reads where the node stands.
func (h *Hub) readPlace(s *filter.State) error {
	node, _ := h.ownNode() // nil: not known yet
	name := h.poolName(node)
	if node == nil && name == "" {
		return nil
	}
	place := &filter.Place{Node: h.cfg.NodeName, Pool: name}
	if node != nil {
		place.Labels = node.Labels
		s.Saw(node.ResourceVersion)
	}
	var err error
	switch {
	case name == "":
	case h.cfg.Filters.Buckets:
		err = h.readBuckets(name, place, s)
	default:
		err = h.readPool(name, place, s)
	}
	if err != nil {
		return err
	}
	old := s.Place
	if old == nil || old.Pool != place.Pool || (old.Nodes == nil) != (place.Nodes == nil) || !maps.Equal(old.Nodes, place.Nodes) ||
		!maps.Equal(old.Labels, place.Labels) {
		s.Place = place
	}
	return nil
}

func (h *Hub) readPool(name string, place *filter.Place, s *filter.State) error {
	held, err := h.replica.Get(request.Info{Verb: "get", IsResource: true, Resource: poolsResource, Name: name}, 0)
	if errors.Is(err, replica.ErrNotHeld) || errors.Is(err, replica.ErrAhead) {
		if s.Place != nil && s.Place.Pool == name {
			place.Nodes = s.Place.Nodes // the last word counts
		}
		return nil
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var np v1beta2.NodePool
	if err := json.Unmarshal(held.Data, &np); err != nil {
		return fmt.Errorf("read node pool %s: %w", name, err)
	}
	s.Saw(np.ResourceVersion)
	place.Nodes = map[string]struct{}{}
	for _, node := range np.Status.Nodes {
		place.Nodes[node] = struct{}{}
	}
	return nil
}

// readBuckets reads the nodes of a pool from its buckets, which it holds.
func (h *Hub) readBuckets(name string, place *filter.Place, s *filter.State) error {
	scope := bucketsOf(name)
	if h.filters.pool != name {
		if h.filters.pool != "" {
			h.replica.Unpin(bucketsOf(h.filters.pool))
		}
		if err := h.replica.Pin(scope); err != nil {
			return err
		}
		h.filters.pool = name
	}
	if _, ok := h.replica.Held(scope); !ok {
		if s.Place != nil && s.Place.Pool == name {
			place.Nodes = s.Place.Nodes
		}
		return nil
	}
	place.Nodes = map[string]struct{}{}
	return h.replica.Each(bucketsResource, "", func(_ string, _ replica.Kind, data []byte) error {
		var bucket v1alpha1.NodeBucket
		if err := json.Unmarshal(data, &bucket); err != nil {
			return fmt.Errorf("read node bucket: %w", err)
		}
		if bucket.Labels[poolOfBucket] != name {
			return nil
		}
		s.Saw(bucket.ResourceVersion)
		for _, node := range bucket.Nodes {
			place.Nodes[node.Name] = struct{}{}
		}
		return nil
	})
}

// readServices reads what the annotations of Services ask for. Several scopes
// may hold a Service; the newest counts.
func (h *Hub) readServices(s *filter.State) error {
	if _, ok := h.replica.Held(replica.Scope{Resource: servicesResource}); !ok {
		return nil // what is not known yet changes nothing
	}
	topology, newest := map[string]string{}, map[string]uint64{}
	err := h.replica.Each(servicesResource, "", func(key string, k replica.Kind, data []byte) error {
		meta, err := wire.ReadMeta(k.Encoding, data, false)
		if err != nil || newest[key] >= meta.Version {
			return err
		}
		value, err := filter.Object{Resource: servicesResource, Encoding: k.Encoding, Data: data}.Annotation(apps.TopologyKeys)
		if err != nil {
			return err
		}
		newest[key] = meta.Version
		if delete(topology, key); value != "" {
			topology[key] = value
		}
		s.Version = max(s.Version, meta.Version)
		return nil
	})
	if err != nil {
		return err
	}
	if s.Services == nil || !maps.Equal(s.Services.Topology, topology) {
		s.Services = &filter.Services{Topology: topology}
	}
	return nil
}

// readFilterConfig reads which components have which filters beside their own.
func (h *Hub) readFilterConfig(s *filter.State) (map[string][]string, error) {
	held, err := h.replica.Get(request.Info{
		Verb: "get", IsResource: true, Resource: configMapsResource, Namespace: filterConfigNamespace, Name: filterConfigName,
	}, 0)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil //nolint:nilnil // no components
	case errors.Is(err, replica.ErrNotHeld), errors.Is(err, replica.ErrAhead):
		return h.filters.extra, nil // the last word counts
	case err != nil:
		return nil, err
	}
	config := &corev1.ConfigMap{}
	if held.Kind.Encoding == wire.JSON {
		err = json.Unmarshal(held.Data, config)
	} else {
		err = config.Unmarshal(held.Data)
	}
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", filterConfigNamespace, filterConfigName, err)
	}
	s.Saw(config.ResourceVersion)
	return filter.Extra(config.Data), nil
}

// filtered takes note that the caller is one that is shown what it asks for
// otherwise than it is, or was, as long as it is informed of it.
func (q *query) filtered() {
	c := filter.Component(q.r.UserAgent())
	if q.hub.filters.table.Load().Filters(c, q.info.Resource) || q.info.Verb != "get" && q.hub.replica.Lensed(q.info.Resource, c) {
		q.component = c
	}
}

// through returns the slice as the caller is to see it.
func (q *query) through(held *replica.Slice) (*replica.Slice, error) {
	if q.component == "" {
		return held, nil
	}
	reader := append([]string{q.caller.Name}, q.caller.Extra["authentication.kubernetes.io/pod-uid"]...)
	return held.Through(q.component, strings.Join(reader, "/"))
}

// listFiltered answers a list of a caller that is shown it otherwise than the
// cloud has it. The cloud is not asked then: what the replica follows is as new
// as a watch would have it.
func (q *query) listFiltered() error {
	opts := q.info.Options
	if opts.Continue != "" {
		return fmt.Errorf("the continue token is the cloud's, and this list is the hub's own: %w", replica.ErrExpired)
	}
	v, err := q.version()
	if err != nil {
		return err
	}
	scope := replica.ScopeOf(q.info)
	held, ok := q.hub.replica.Held(scope)
	if !ok {
		if held, err = q.open(scope); err != nil {
			return err
		}
	}
	if err := q.may(q.r.Context(), !held.Borrowed()); err != nil {
		return err
	}
	seen, err := q.through(held)
	if err != nil {
		return err
	}
	q.use(held)
	latest := opts.ResourceVersion == ""
	if latest && q.hub.link.Online() {
		q.awaitCurrent(held)
	}
	if v > 0 {
		ctx, cancel := context.WithTimeout(q.r.Context(), awaitBudget)
		defer cancel()
		if err := seen.Await(ctx, v); err != nil {
			return err
		}
		if opts.ResourceVersionMatch == metav1.ResourceVersionMatchExact && seen.Version() != v {
			return fmt.Errorf("this list is the hub's own, which keeps no older states: %w", replica.ErrExpired)
		}
	}
	if latest && !held.Current() {
		q.warn(held.Contact())
	}
	return seen.List(q.w, q.r, q.formats)
}

// awaitCurrent waits until a slice follows the cloud, but not for long.
func (q *query) awaitCurrent(held *replica.Slice) {
	ctx, cancel := context.WithTimeout(q.r.Context(), q.hub.link.Patience(readBudget))
	defer cancel()
	for !held.Current() {
		select {
		case <-ctx.Done():
			return
		case <-held.Changed():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// getFiltered answers a get of a caller that is shown the object filtered. One
// without a version is the cloud's to answer, as it is for others.
func (q *query) getFiltered() error {
	v, err := q.version()
	if err != nil {
		return err
	}
	latest := q.info.Options.ResourceVersion == ""
	if latest && q.hub.link.Online() && !q.hub.link.Weak() && !q.caller.Local && q.formats[0].View == request.Whole {
		if q.getOfCloud() == nil {
			return nil
		}
	}
	obj, heldErr := q.hub.replica.Get(q.info, 0)
	if heldErr != nil && !apierrors.IsNotFound(heldErr) {
		return heldErr
	}
	if err := q.may(q.r.Context(), !obj.Borrowed()); err != nil {
		return err
	}
	if heldErr != nil {
		return heldErr
	}
	seen, ok, err := q.hub.replica.Through(obj, q.component)
	switch {
	case err != nil:
		return err
	case !ok:
		return apierrors.NewNotFound(q.info.Resource.GroupResource(), q.info.Name)
	case seen.Version < v:
		return replica.ErrAhead
	}
	if latest && !obj.Current() {
		q.warn(seen.Contact)
	}
	return seen.Write(q.w, q.r, q.formats)
}

// getOfCloud filters what the cloud answers. On error nothing was written.
func (q *query) getOfCloud() error {
	ask := q.r.Clone(q.r.Context())
	ask.Header.Set("Accept", "application/json")
	if q.formats[0].Encoding == wire.Protobuf {
		ask.Header.Set("Accept", "application/vnd.kubernetes.protobuf, application/json")
	}
	ask.Header.Del("Accept-Encoding")
	var got gathered
	if err := q.hub.link.Try(&got, ask, q.as, q.keep(false), readBudget); err != nil {
		return err
	}
	if got.code == http.StatusOK && !got.cut {
		enc := encodingOf(got.Header().Get("Content-Type"))
		apiVersion, kind, data, err := wire.ReadObject(enc, got.body.Bytes())
		if err != nil {
			return err
		}
		k := replica.Kind{APIVersion: apiVersion, Kind: kind, Encoding: enc}
		shown, ok := q.hub.filterOf(q.component).Show(q.info.Resource, k, data)
		if !ok {
			httpx.WriteStatus(q.w, q.r, apierrors.NewNotFound(q.info.Resource.GroupResource(), q.info.Name))
			return nil
		}
		return (&replica.Object{Kind: k, Data: shown}).Write(q.w, q.r, q.formats)
	}
	if got.cut {
		return fmt.Errorf("filter %s: %w", q.info, wire.ErrTooLarge)
	}
	maps.Copy(q.w.Header(), got.Header())
	q.w.WriteHeader(got.code)
	_, _ = q.w.Write(got.body.Bytes()) // the client may be gone
	return nil
}

// gathered is an answer that is looked at before the client gets it.
type gathered struct {
	header http.Header
	code   int
	body   bytes.Buffer
	cut    bool // there was more than may be
}

func (g *gathered) Header() http.Header {
	if g.header == nil {
		g.header = http.Header{}
	}
	return g.header
}

func (g *gathered) WriteHeader(code int) {
	if g.code == 0 {
		g.code = code
	}
}

func (g *gathered) Write(b []byte) (int, error) {
	g.WriteHeader(http.StatusOK)
	if g.cut = g.cut || g.body.Len()+len(b) > maxAnswer; g.cut {
		return 0, wire.ErrTooLarge
	}
	return g.body.Write(b)
}
