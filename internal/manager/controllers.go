package manager

import (
	"fmt"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/yurt-edge/yurt/internal/manager/accessfilter"
	"github.com/yurt-edge/yurt/internal/manager/csr"
	"github.com/yurt-edge/yurt/internal/manager/hubleader"
	"github.com/yurt-edge/yurt/internal/manager/lifecycle"
	"github.com/yurt-edge/yurt/internal/manager/loadbalancerset"
	"github.com/yurt-edge/yurt/internal/manager/nodebucket"
	"github.com/yurt-edge/yurt/internal/manager/nodepool"
	"github.com/yurt-edge/yurt/internal/manager/podbinding"
	"github.com/yurt-edge/yurt/internal/manager/servicetopology"
	"github.com/yurt-edge/yurt/internal/manager/vouch"
	"github.com/yurt-edge/yurt/internal/manager/webhookcert"
)

// part is one controller: what it is called, what it writes and how it is
// made.
type part struct {
	// name is OpenYurt's. The controller writes as the ServiceAccount
	// yurt-manager-<name>.
	name string
	// alias is the short form that --controllers takes too.
	alias string
	// rules are what it writes anywhere, namespaced in the working namespace.
	rules, namespaced []rbacv1.PolicyRule
	// leases are what it writes among the leases of nodes.
	leases []rbacv1.PolicyRule
	setup  func(s *site) error
}

// account is the name of the ServiceAccount as which the part writes.
func (p part) account() string { return accountPrefix + p.name }

const accountPrefix = "yurt-manager-"

// site is what a part is made with.
type site struct {
	part    part
	mgr     ctrl.Manager
	write   client.Client // as the part's account
	options controller.Options
	cloud   *vouch.Cloud
	cfg     *Config
}

// unlimited writes as the part's account too, as fast as the part's workers can
// and the API server lets them.
func (s *site) unlimited() (client.Client, error) {
	cfg := rest.CopyConfig(s.mgr.GetConfig())
	cfg.QPS = -1
	return clientAs(s.mgr, cfg, s.cfg.Namespace, s.part)
}

// parts are the controllers that --controllers selects from.
var parts = []part{
	{
		name: "access-filter-controller", alias: "accessfilter", rules: accessfilter.Rules,
		setup: func(s *site) error { return accessfilter.Setup(s.mgr, s.write, s.options) },
	},
	{
		name: "csr-approver-controller", alias: "csrapprover", rules: csr.Rules,
		setup: func(s *site) error { return csr.Setup(s.mgr, s.write, s.cfg.DummyIP, s.options) },
	},
	{
		name: "delegate-lease-controller", alias: "delegatelease", rules: vouch.Rules, leases: vouch.LeaseRules,
		setup: func(s *site) error {
			leases, err := s.unlimited()
			if err != nil {
				return err
			}
			return vouch.Setup(s.mgr, s.write, leases, s.cloud, metrics.Registry, s.options)
		},
	},
	{
		name: "hubleader-controller", alias: "hubleader", rules: hubleader.Rules,
		setup: func(s *site) error { return hubleader.Setup(s.mgr, s.write, s.options) },
	},
	{
		name: "hubleaderconfig-controller", alias: "hubleaderconfig", namespaced: hubleader.ConfigRules,
		setup: func(s *site) error { return hubleader.SetupConfig(s.mgr, s.write, s.cfg.Namespace, s.options) },
	},
	{
		name: "hubleaderrbac-controller", alias: "hubleaderrbac", rules: hubleader.PermitRules,
		setup: func(s *site) error { return hubleader.SetupPermit(s.mgr, s.write, s.options) },
	},
	{
		name: "load-balancer-set-controller", alias: "loadbalancerset", rules: loadbalancerset.Rules,
		setup: func(s *site) error { return loadbalancerset.Setup(s.mgr, s.write, s.options) },
	},
	{
		name: "node-bucket-controller", alias: "nodebucket", rules: nodebucket.Rules,
		setup: func(s *site) error { return nodebucket.Setup(s.mgr, s.write, s.cfg.MaxNodesPerBucket, s.options) },
	},
	{
		name: "node-life-cycle-controller", alias: "nodelifecycle", rules: lifecycle.Rules,
		setup: func(s *site) error {
			return lifecycle.Setup(s.mgr, s.write, s.cfg.Grace, metrics.Registry, s.options)
		},
	},
	{
		name: "nodepool-controller", alias: "nodepool", rules: nodepool.Rules,
		setup: func(s *site) error { return nodepool.Setup(s.mgr, s.write, s.options) },
	},
	{
		name: "pod-binding-controller", alias: "podbinding", rules: podbinding.Rules,
		setup: func(s *site) error { return podbinding.Setup(s.mgr, s.write, s.options) },
	},
	{
		name: "service-topology-endpointslice-controller", alias: "servicetopologyendpointslices", rules: servicetopology.Rules,
		setup: func(s *site) error { return servicetopology.Setup(s.mgr, s.write, s.options) },
	},
}

// webhookPart keeps the webhooks' certificate, in each replica, whatever
// --controllers says.
var webhookPart = part{
	name: "webhook-controller", rules: webhookcert.Rules, namespaced: webhookcert.NamespacedRules,
}

// selected returns the parts that names select: "*" is all of them, a name or
// alias is one, and with a minus it is left out, wherever it stands.
func selected(names []string) ([]part, error) {
	on := make([]bool, len(parts))
	off := make([]bool, len(parts))
	for _, name := range names {
		bare, minus := strings.CutPrefix(name, "-")
		if name == "*" {
			for i := range on {
				on[i] = true
			}
			continue
		}
		i := slices.IndexFunc(parts, func(p part) bool { return bare == p.name || bare == p.alias })
		if i < 0 {
			return nil, fmt.Errorf("--controllers: there is no controller %q; there are %s", bare, strings.Join(aliases(), ", "))
		}
		if minus {
			off[i] = true
		} else {
			on[i] = true
		}
	}
	var out []part
	for i, p := range parts {
		if on[i] && !off[i] {
			out = append(out, p)
		}
	}
	return out, nil
}

func aliases() []string {
	var out []string
	for _, p := range parts {
		out = append(out, p.alias)
	}
	return out
}
