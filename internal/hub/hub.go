// Package hub is the agent that makes an edge node independent of its link:
// an API server's stand-in on the node that forwards while it can, answers
// from a replica while it cannot, and lends its rights to nobody.
//
// Config and Run are its front door; pipeline.go shows the way of a request.
package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/cert"
	"github.com/yurt-edge/yurt/internal/hub/clock"
	"github.com/yurt-edge/yurt/internal/hub/condition"
	"github.com/yurt-edge/yurt/internal/hub/endpoint"
	"github.com/yurt-edge/yurt/internal/hub/gentle"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/journal"
	"github.com/yurt-edge/yurt/internal/hub/keyring"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/nameserver"
	"github.com/yurt-edge/yurt/internal/hub/pool"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/vouch"
)

const (
	// readBudget is how long a read waits for the cloud, at most, when the
	// replica could answer it. Over a weak link nobody waits.
	readBudget = 2 * time.Second
	// writeBudget is the same for writes that have an answer on the node.
	writeBudget = 5 * time.Second
	// leaseBudget is short: the kubelet's own time-out is ten seconds.
	leaseBudget = 3 * time.Second
	// syncBudget is how long an informer waits for a new scope to sync
	// before it is sent to the cloud.
	syncBudget = 20 * time.Second
	// awaitBudget is how long a read waits for the replica to reach a
	// resource version before the cloud is asked.
	awaitBudget = time.Second

	// settleBudget is how long a start waits to learn whether the link is up.
	settleBudget = 100 * time.Millisecond

	// maxKept bounds the tokens and the reviews that are kept for an outage.
	maxKept = 2000

	gcPercent = 200 // of the live heap, before it is collected

	// prefetchAfter is how long after the link came up the hub fetches what
	// nobody has asked for.
	prefetchAfter = time.Second
	// prefetchSpread is within which it does so again after a later return: other
	// nodes have the cloud back at the same moment.
	prefetchSpread = 10 * time.Second
	// eventSpread is within which events go to the cloud then.
	eventSpread = 10 * time.Second

	minTokenLife = 2 * time.Minute
	// maxTokenRenewal bounds the life that a token is said to have that was
	// given while the cloud was away.
	maxTokenRenewal = 10 * time.Minute
	stopGrace       = 3 * time.Second
)

var (
	podsResource  = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	nodesResource = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
)

// Config is what a hub needs. Defaults are set by the command's flags.
type Config struct {
	NodeName   string
	PoolName   string
	NodeIPs    []net.IP
	Servers    []*url.URL
	LinkMode   link.Mode
	RootDir    string
	StoreDir   string // the replica's; RootDir/store if empty
	Keys       KeyConfig
	Mode       cert.Mode
	Bootstrap  string   // kubeconfig with the bootstrap token
	CAHashes   []string // pins of the cluster's CA
	ServiceIPs []net.IP // of the kubernetes service, for the server certificate

	BindAddress string // of the proxy and of health, 127.0.0.1
	ProxyPort   int    // 10268
	HealthPort  int    // 10267
	// InsecurePort is that of the plain HTTP proxy for root's processes on
	// this node; 0: there is none.
	InsecurePort int
	PoolPort     int           // for hubs of the same pool, on the node's address: 10269
	PoolGrace    time.Duration // see pool.Config
	PoolReturn   time.Duration
	DummyIP      net.IP // where pods reach the hub; nil: nowhere
	DummyName    string // interface that holds it, where the kernel has the type

	// Pinned are resources that the hub replicates without being asked.
	Pinned []schema.GroupVersionResource
	// DecisionAge bounds how old a remembered authorisation may be.
	DecisionAge time.Duration
	Profiling   bool
	// RunDir holds the socket on which the hub answers root; empty: none.
	RunDir string
	// Conditions are kept on the Node; if not, those that are there go.
	Conditions bool
	Gentle     GentleConfig
	Filters    FilterConfig
	DNS        DNSConfig

	// Time reads the machine's clocks; nil but in tests.
	Time clock.Source

	Log        *slog.Logger
	Registerer prometheus.Registerer
	Gatherer   prometheus.Gatherer
}

// Hub is a running hub.
type Hub struct {
	cfg     Config
	log     *slog.Logger
	keys    *keyring.Ring
	clock   *clock.Clock
	store   *store.Store
	certs   *cert.Certificates
	link    *link.Link
	replica *replica.Replica
	journal *journal.Journal
	// endpoints lets Services follow the node's pods while the cloud is away.
	endpoints *endpoint.Tracker
	peersPods peersPods
	answers   *answers
	authn     *identity.Authenticator
	authz     *identity.Authorizer
	signer    *identity.LocalSigner
	tokens    memory
	reviews   memory
	lanes     *lanes
	memory    *ceiling
	metrics   *hubMetrics
	pinned    []replica.Scope

	pool   *pool.Pool
	shares shares

	filters filters

	gate     *gentle.Gate
	poolSize atomic.Int64 // nodes of the pool

	dns *nameserver.Server // nil: no DNS is answered
	api *inside            // by which it asks the hub

	about      self
	conditions *condition.Writer

	disk    error  // why RootDir is a copy in memory; nil when it is not
	rootDir string // what it is a copy of

	heartbeat *heartbeat
	vouch     *vouch.Vouch
	watches   watches
	self      *identity.Caller // the node's user, which the hub's streams are
}

// Run serves until ctx ends and returns nil, or returns the first error that
// stops it.
func Run(ctx context.Context, cfg Config) error {
	if os.Getenv("GOGC") == "" {
		// The heap is small, since objects live in the store's pages: a
		// little of it buys a tenth of the time per request.
		debug.SetGCPercent(gcPercent)
	}
	if err := daemon.HideMemory(); err != nil {
		cfg.Log.Warn("a core dump could show secrets", "err", err)
	}
	setCeiling()
	h, err := open(ctx, cfg)
	if err != nil {
		return err
	}
	defer h.leaveDisk()
	defer func() {
		if err := h.store.Close(); err != nil {
			h.log.Error("store not closed", "err", err)
		}
	}()
	servers, err := h.listen(ctx)
	if err != nil {
		return err
	}
	runs := []func(context.Context) error{
		h.clock.Run, h.certs.Run, h.link.Run, h.answers.run, h.announce, h.keepAddress, h.runEndpoints, h.keepNeeds,
		h.reask, h.awaitDisk, h.beat, h.carrySoon, h.keepFilters, h.reportAccessFilters,
		h.certified(h.replica.Run), h.certified(h.journal.Run), h.certified(h.authn.Run), h.certified(h.follow),
		h.certified(h.prefetch), h.certified(h.conditions.Run), h.certified(h.pool.Run), h.certified(h.keepPool), h.certified(h.vouch.Run), h.certified(h.hearPods),
		h.gate.Run, h.runDNS,
		daemon.Watchdog(h.log, h.alive),
	}
	for _, s := range servers {
		runs = append(runs, func(ctx context.Context) error {
			h.settle(ctx)
			return s.Run(ctx)
		})
	}
	return daemon.Group(ctx, runs...)
}

// open builds the hub's parts from what is on disk. It asks nothing of the
// cloud, so it takes the same time with the link cut.
func open(ctx context.Context, cfg Config) (*Hub, error) {
	if cfg.NodeName == "" {
		return nil, errors.New("no node name given: set --node-name")
	}
	h := &Hub{
		cfg: cfg, log: cfg.Log, lanes: newLanes(), memory: newCeiling(), metrics: newHubMetrics(cfg.Registerer),
		heartbeat: newHeartbeat(),
	}
	h.about = self{started: time.Now(), held: map[string]bool{}}
	h.self = &identity.Caller{
		Name: "system:node:" + cfg.NodeName, Groups: []string{"system:nodes", "system:authenticated"}, Certificate: true,
	}
	err := h.settleDisk()
	if err != nil {
		return nil, err
	}
	h.clock = clock.Open(clock.Config{Path: filepath.Join(h.cfg.RootDir, "clock"), Source: cfg.Time, Log: h.log})
	keys := h.cfg.keyring()
	if h.disk != nil {
		keys.Sealed = nil // the store cannot be renamed; it will not open
	}
	if h.keys, err = keyring.Open(ctx, keys); err != nil {
		return nil, err
	}
	if h.store, err = h.openStore(ctx); err != nil {
		return nil, err
	}
	h.countStore(cfg.Registerer)
	if err := h.build(); err != nil { //nolint:contextcheck // it reads what is open by now
		return nil, errors.Join(err, h.store.Close())
	}
	return h, nil
}

func (h *Hub) build() error {
	cfg := h.cfg
	var err error
	servers := make([]string, len(cfg.Servers))
	for i, u := range cfg.Servers {
		servers[i] = u.String()
	}
	h.certs, err = cert.New(cert.Config{
		Dir: filepath.Join(cfg.RootDir, "pki"), NodeName: cfg.NodeName, Mode: cfg.Mode, Servers: servers,
		BootstrapKubeconfig: cfg.Bootstrap, CAHashes: cfg.CAHashes,
		DummyIP: cfg.DummyIP, NodeIPs: cfg.NodeIPs, ServerIPs: cfg.ServiceIPs, Clock: h.clock, Keys: h.keys, Log: h.log,
	})
	if err != nil {
		return err
	}
	cfg.Registerer.MustRegister(validity{h.certs.Status, h.clock.Skew})
	if len(cfg.Servers) == 0 {
		for _, s := range h.certs.Servers() {
			u, err := url.Parse(s)
			if err != nil {
				return fmt.Errorf("server %q in %s: %w", s, cfg.Bootstrap, err)
			}
			cfg.Servers = append(cfg.Servers, u)
		}
	}
	if len(cfg.Servers) == 0 {
		return errors.New("no API server given: set --server-addr")
	}
	h.link, err = link.New(link.Config{
		Servers: cfg.Servers, Mode: cfg.LinkMode, ClusterCAs: h.certs.ClusterCAs,
		ClientCertificate: func() (*tls.Certificate, error) {
			if c := h.certs.ClientCertificate(); c != nil {
				return c, nil
			}
			return nil, errors.New("the hub has no client certificate yet")
		},
		Clock: h.clock, Log: h.log, Registerer: cfg.Registerer,
	})
	if err != nil {
		return err
	}
	h.certs.Over(h.link)
	h.tokens = memory{store: h.store, clock: h.clock, bucket: "tokens", limit: maxKept}
	h.reviews = memory{store: h.store, clock: h.clock, bucket: "reviews", limit: maxKept, maxAge: cfg.DecisionAge}
	remembered := memory{store: h.store, clock: h.clock, bucket: "identity"}
	if h.signer, err = identity.NewLocalSigner(cfg.NodeName, remembered, h.clock); err != nil {
		return err
	}
	api := identity.NewAPI(&http.Client{Transport: h.link.Questions()}, "https://upstream")
	contact := func() time.Time { return h.link.State().Since }
	h.authn = identity.NewAuthenticator(identity.AuthenticatorConfig{
		API: api, Memory: remembered, ClusterCAs: h.certs.ClusterCAs, Local: h.signer, Lives: h.podLives, Own: h.certs.Own,
		Clock: h.clock, Online: h.link.Online, Weak: h.link.Weak, Contact: contact, MaxAge: cfg.DecisionAge, Log: h.log,
	})
	h.authz = identity.NewAuthorizer(identity.AuthorizerConfig{
		API: api, Memory: remembered, Online: h.link.Online, Weak: h.link.Weak, Contact: contact, MaxAge: cfg.DecisionAge,
		Self: h.self, Clock: h.clock, Log: h.log,
	})
	h.answers = newAnswers(h.store, h.clock, h.log)
	h.journal, err = journal.Open(journal.Config{
		Store: h.store, Cloud: h.link.Node(), WaitUp: h.link.WaitUp, Spread: eventSpread, Clock: h.clock, Log: h.log, Registerer: cfg.Registerer,
		Refresh: func(r schema.GroupVersionResource, namespace, name string) error {
			return h.replica.Refresh(r, namespace, name)
		},
	})
	if err != nil {
		return err
	}
	h.trackEndpoints()
	h.vouch = h.newVouch()
	h.pool = h.newPool()
	cfg.Registerer.MustRegister(poolInfo{h})
	h.gate = h.newGate()
	h.replica, err = replica.New(replica.Config{
		Store: h.store, Upstream: h.link, Router: h.choose, Online: h.link.Online, Overlay: h.overlay, Filter: h.filterOf, Hold: h.gentleHold(),
		Clock: h.clock, Log: h.log, Registerer: cfg.Registerer,
	})
	if err != nil {
		return err
	}
	h.show()
	h.filters.access.failures = newAccessFailures(cfg.Registerer)
	if err := h.refilter(true); err != nil {
		h.log.Warn("filters are not up to date", "err", err)
	}
	// What this node needs to run its pods is fetched without being asked,
	// so that a hub that lost its store has it again before anybody asks.
	h.pinned = []replica.Scope{
		h.ownPods(),
		{Resource: nodesResource, Fields: "metadata.name=" + cfg.NodeName},
		// The kubelet starts no container before it has seen the first.
		{Resource: schema.GroupVersionResource{Version: "v1", Resource: "services"}, Fields: "spec.clusterIP!=None"},
		{Resource: schema.GroupVersionResource{Group: "node.k8s.io", Version: "v1", Resource: "runtimeclasses"}},
		{Resource: schema.GroupVersionResource{Group: "storage.k8s.io", Version: "v1", Resource: "csidrivers"}},
	}
	for _, r := range cfg.Pinned {
		h.pinned = append(h.pinned, replica.Scope{Resource: r})
	}
	for _, scope := range h.filterScopes() {
		if !slices.Contains(h.pinned, scope) {
			h.pinned = append(h.pinned, scope)
		}
	}
	for _, scope := range h.pinned {
		if err := h.replica.Pin(scope); err != nil {
			return err
		}
	}
	if !cfg.Filters.Off {
		// Not one that a node cannot do without: a cluster may not have it.
		if err := h.replica.Pin(accessFiltersScope); err != nil {
			return err
		}
	}
	h.about.link = h.link.State()
	h.about.born = h.about.link.Since
	h.conditions = h.newConditions()
	h.newDNS()
	return nil
}

// openStore opens the store under the data key.
func (h *Hub) openStore(ctx context.Context) (*store.Store, error) {
	path := h.cfg.storePath()
	s, err := store.Open(ctx, store.Config{
		Path: path, Key: h.keys.DataKey(), Fallback: true, Log: h.log,
		OnDamage: func(bucket, object string) {
			h.log.Error("stored object damaged", "scope", bucket, "object", object)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("open store in %s: %w", filepath.Dir(path), err)
	}
	if s.Rebuilt() {
		h.log.Error("store was unusable and is set aside; everything is fetched anew", "path", path)
	}
	return s, nil
}

// listen opens all listeners before anything is served, so that a port that
// is taken stops the start and nothing else.
func (h *Hub) listen(ctx context.Context) ([]*httpx.Server, error) {
	if err := h.ensureAddress(); err != nil {
		return nil, err
	}
	hosts := []string{h.cfg.BindAddress}
	if h.cfg.DummyIP != nil {
		hosts = append(hosts, h.cfg.DummyIP.String())
	}
	var (
		servers  []*httpx.Server
		open     []net.Listener
		handler  = h.handler(ctx, h.authn.Authenticate)
		tlsOfHub = &tls.Config{
			MinVersion:     tls.VersionTLS12,
			GetCertificate: h.certs.GetCertificate,
			// Certificates are verified by the authenticator, which can
			// then say what is wrong with one.
			ClientAuth: tls.RequestClientCert,
		}
	)
	fail := func(err error) ([]*httpx.Server, error) {
		for _, l := range open {
			err = errors.Join(err, l.Close())
		}
		return nil, err
	}
	var lc net.ListenConfig
	bind := func(host string, port int) (net.Listener, error) {
		l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		open = append(open, l)
		return l, nil
	}
	for _, host := range hosts {
		l, err := bind(host, h.cfg.ProxyPort)
		if err != nil {
			return fail(err)
		}
		servers = append(servers, &httpx.Server{
			Listener: l, Handler: handler, TLS: tlsOfHub, Grace: stopGrace, Log: h.log, Refused: h.unconnected,
		})
	}
	if h.cfg.InsecurePort > 0 {
		l, err := bind(h.cfg.BindAddress, h.cfg.InsecurePort)
		if err != nil {
			return fail(err)
		}
		h.log.Warn("plain HTTP is served to root's processes on this node", "address", l.Addr().String())
		servers = append(servers, &httpx.Server{
			Listener: l, Handler: h.handler(ctx, h.local), ConnContext: withPeer, Grace: stopGrace, Log: h.log,
		})
	}
	l, err := bind(h.cfg.BindAddress, h.cfg.HealthPort)
	if err != nil {
		return fail(err)
	}
	servers = append(servers, &httpx.Server{Listener: l, Handler: h.health(), Grace: stopGrace, Log: h.log, Refused: h.unconnected})
	if s := h.socket(ctx); s != nil {
		servers = append(servers, s)
	}
	return servers, nil
}

// settle waits for the first verdict on the link, but not for long: a hub that
// has just started would otherwise refuse what the cloud could answer. Clients
// that come meanwhile wait in the listener's queue.
func (h *Hub) settle(ctx context.Context) {
	changed := h.link.Changed()
	if h.link.Online() {
		return
	}
	timer := time.NewTimer(settleBudget)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-changed:
	case <-timer.C:
	}
}

// certified starts a run once the hub has a certificate: before, the cloud
// would answer nothing that it asks.
func (h *Hub) certified(run func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case <-h.certs.Ready():
			return run(ctx)
		}
	}
}

// alive is the watchdog's question. It passes through the locks of every part
// and hangs if one of them does. A full disk or a cut link are no reason to
// restart.
func (h *Hub) alive(context.Context) error {
	h.report()
	return nil
}

// announce tells systemd once the hub can do its work.
func (h *Hub) announce(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-h.certs.Ready():
	}
	h.log.Info("hub is ready", "node", h.cfg.NodeName, "pool", h.cfg.PoolName)
	if err := daemon.Ready(); err != nil {
		h.log.Warn("systemd not told", "err", err)
	}
	<-ctx.Done()
	if err := daemon.Stopping(); err != nil {
		h.log.Warn("systemd not told", "err", err)
	}
	return nil
}

// follow does what a change of the link or of the certificate asks for.
func (h *Hub) follow(ctx context.Context) error {
	for {
		changed, renewed := h.link.Changed(), h.certs.ClientChanged()
		state := h.link.State()
		h.about.see(state)
		line := "online"
		if !state.Up {
			line = "offline: " + state.Reason
		}
		if err := daemon.Status(line); err != nil {
			h.log.Debug("systemd not told", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-renewed:
			h.link.ClientChanged()
		}
	}
}

// prefetch fetches what nobody asks for before the link goes down: some time
// after it came up, for the first moments belong to those who wait.
func (h *Hub) prefetch(ctx context.Context) error {
	wait, again := prefetchAfter, false
	for {
		changed := h.link.Changed()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			wait = prefetchAfter
			if again {
				wait += rand.N(prefetchSpread)
			}
			continue
		case <-time.After(wait):
		}
		wait = prefetchEvery
		if !h.link.Online() {
			continue
		}
		again = true
		if err := h.answers.prefetch(ctx, h.link.Questions()); err != nil && ctx.Err() == nil {
			h.log.Debug("discovery not fetched", "err", err)
		}
		if err := h.prefetchCSINode(ctx); err != nil && ctx.Err() == nil {
			h.log.Debug("storage drivers not fetched", "err", err)
		}
	}
}
