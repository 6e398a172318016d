// Package manager is yurt-manager, the controllers and the webhooks in the
// cloud. It decides about pools of nodes; nothing that runs on an edge node
// waits for it.
//
// Each controller is a package below: a plan, which is pure, and a controller
// that reads by the shared cache and writes as a ServiceAccount of its own.
package manager

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/metrics/filters"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/manager/accessfilter"
	"github.com/yurt-edge/yurt/internal/manager/nodepool"
	"github.com/yurt-edge/yurt/internal/manager/podbinding"
	"github.com/yurt-edge/yurt/internal/manager/vouch"
	"github.com/yurt-edge/yurt/internal/manager/webhookcert"
)

// Config says how to run a manager. Flags make one.
type Config struct {
	// REST is the manager's own account, which reads, and writes as others.
	REST *rest.Config
	// Namespace has the ServiceAccounts, the lease and what hubs follow.
	Namespace string
	// Controllers are names as --controllers takes them.
	Controllers []string
	// LeaderElect lets one replica of several work. Each serves the webhooks.
	LeaderElect bool
	// LeaseDuration is after how long without a sign the leader is replaced.
	LeaseDuration time.Duration
	// HealthAddress, MetricsAddress and WebhookAddress are host:port.
	HealthAddress, MetricsAddress, WebhookAddress string
	// Workers is how many objects a controller works on at once.
	Workers int
	// MaxNodesPerBucket is the size of a NodeBucket.
	MaxNodesPerBucket int
	// Grace is after how long a node of an Edge pool that is silent is dead, if
	// others of its pool are heard for as long.
	Grace time.Duration
	// DummyIP is the address at which pods reach the hub of their node.
	DummyIP net.IP
	Log     *slog.Logger
}

func (c *Config) check() error {
	switch {
	case c.Namespace == "":
		return errors.New("--working-namespace is empty: give the namespace of the manager")
	case c.MaxNodesPerBucket < 1:
		return fmt.Errorf("--max-nodes-per-bucket is %d: want 1 or more", c.MaxNodesPerBucket)
	case c.Workers < 1 || c.Workers > 100:
		return fmt.Errorf("--concurrent-workers is %d: want 1 to 100", c.Workers)
	case c.LeaseDuration < time.Second:
		return fmt.Errorf("--leader-elect-lease-duration is %s: want 1s or more", c.LeaseDuration)
	case c.Grace < time.Second:
		return fmt.Errorf("--node-monitor-grace-period is %s: want 1s or more", c.Grace)
	case c.DummyIP == nil:
		return errors.New("--dummy-if-ip is no IP address: give that of the hubs")
	}
	return nil
}

// An object that could not be seen to is tried again after retryLeast, twice as
// long each time it fails again, and retryMost at most.
const retryLeast, retryMost = 50 * time.Millisecond, 5 * time.Minute

// Run serves until ctx ends and returns nil, or returns the first error that
// stops it, as when another replica has taken the lease.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	chosen, err := selected(cfg.Controllers)
	if err != nil {
		return err
	}
	holder, cloud := &webhookcert.Holder{}, &vouch.Cloud{}
	cfg.REST = rest.CopyConfig(cfg.REST)
	cfg.REST.Wrap(cloud.Wrap)
	mgr, err := newManager(cfg, holder)
	if err != nil {
		return fmt.Errorf("make manager: %w", err)
	}
	if err := mgr.GetFieldIndexer().IndexField(ctx, &corev1.Pod{}, podbinding.NodeNameIndex, nodeName); err != nil {
		return fmt.Errorf("index pods by node: %w", err)
	}
	if err := nodepool.IndexNodes(ctx, mgr.GetFieldIndexer()); err != nil {
		return fmt.Errorf("index nodes by pool: %w", err)
	}
	if err := setupConversion(mgr); err != nil {
		return err
	}
	if err := accessfilter.Serve(mgr); err != nil {
		return err
	}
	write, err := clientAs(mgr, mgr.GetConfig(), cfg.Namespace, webhookPart)
	if err != nil {
		return err
	}
	if err := webhookcert.Setup(mgr, write, cacheOptions(cfg.Namespace), cfg.Namespace, holder); err != nil {
		return err
	}
	for _, p := range chosen {
		if write, err = clientAs(mgr, mgr.GetConfig(), cfg.Namespace, p); err != nil {
			return err
		}
		s := &site{part: p, mgr: mgr, write: write, cloud: cloud, cfg: &cfg, options: controller.Options{
			MaxConcurrentReconciles: cfg.Workers,
			// Not the usual one, which lets all objects together be tried again ten
			// times a second: what meets a change of another controller's is tried
			// again, and with a thousand nodes at once most are. What the API server
			// is asked is bounded by the client.
			RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](retryLeast, retryMost),
		}}
		if err := p.setup(s); err != nil {
			return err
		}
		cfg.Log.Info("controller on", "controller", p.name)
	}
	if err := mgr.Start(ctx); err != nil {
		return fmt.Errorf("run manager: %w", err)
	}
	return nil
}

func newManager(cfg Config, holder *webhookcert.Holder) (ctrl.Manager, error) {
	host, portText, err := net.SplitHostPort(cfg.WebhookAddress)
	if err != nil {
		return nil, fmt.Errorf("address of the webhook: %w", err)
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return nil, fmt.Errorf("port of the webhook: %w", err)
	}
	serve := []func(*tls.Config){holder.Configure}
	log := daemon.Logr(cfg.Log)
	ctrl.SetLogger(log)
	renew, retry := cfg.LeaseDuration*2/3, cfg.LeaseDuration*2/15
	mgr, err := ctrl.NewManager(cfg.REST, ctrl.Options{
		Scheme: newScheme(), Logger: log, Cache: cacheOptions(cfg.Namespace),
		LeaderElection: cfg.LeaderElect, LeaderElectionID: "yurt-manager", LeaderElectionNamespace: cfg.Namespace,
		// The process ends with the manager, so nothing works without a lease.
		LeaderElectionReleaseOnCancel: true,
		LeaseDuration:                 &cfg.LeaseDuration, RenewDeadline: &renew, RetryPeriod: &retry,
		HealthProbeBindAddress: cfg.HealthAddress,
		Metrics: metricsserver.Options{
			BindAddress: cfg.MetricsAddress, SecureServing: true, TLSOpts: serve,
			FilterProvider: filters.WithAuthenticationAndAuthorization,
		},
		WebhookServer: webhook.NewServer(webhook.Options{Host: host, Port: port, TLSOpts: serve}),
	})
	if err != nil {
		return nil, err
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return nil, err
	}
	return mgr, mgr.AddReadyzCheck("webhook", holder.Check)
}

// clientAs writes as the account of a part. The audit log names it, and it can
// do what its rules say.
func clientAs(mgr ctrl.Manager, cfg *rest.Config, namespace string, p part) (client.Client, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + namespace + ":" + p.account()}
	c, err := client.New(cfg, client.Options{Scheme: mgr.GetScheme(), Mapper: mgr.GetRESTMapper()})
	if err != nil {
		return nil, fmt.Errorf("make client of %s: %w", p.account(), err)
	}
	return c, nil
}

func nodeName(obj client.Object) []string {
	if pod, ok := obj.(*corev1.Pod); ok && pod.Spec.NodeName != "" {
		return []string{pod.Spec.NodeName}
	}
	return nil
}
