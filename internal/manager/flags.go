package manager

import (
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/client-go/tools/clientcmd"
)

// Flags are a manager's settings as they stand on the command line. Names and
// defaults are OpenYurt's where it has them.
type Flags struct {
	cfg        Config
	kubeconfig string
	dummyIP    string
	port       int
	qps        float32
	burst      int
}

// Add registers the flags.
func (f *Flags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.kubeconfig, "kubeconfig", "", "file with the manager's credential; empty in a pod")
	fs.StringVar(&f.cfg.Namespace, "working-namespace", "kube-system", "namespace of the manager, its ServiceAccounts and what hubs follow")
	fs.StringSliceVar(&f.cfg.Controllers, "controllers", []string{"*"}, "controllers to run: * for all, a name for one, -name for all but it")
	fs.BoolVar(&f.cfg.LeaderElect, "leader-elect", true, "let one replica of several work")
	fs.DurationVar(&f.cfg.LeaseDuration, "leader-elect-lease-duration", 15*time.Second, "after how long without a sign the leader is replaced")
	fs.StringVar(&f.cfg.MetricsAddress, "metrics-addr", ":10271", "address of metrics, HTTPS for callers who may get /metrics; 0 for none")
	fs.StringVar(&f.cfg.HealthAddress, "health-probe-addr", ":10272", "address of /healthz and /readyz; 0 for none")
	fs.IntVar(&f.port, "webhook-port", 10273, "port of the webhooks")
	fs.Float32Var(&f.qps, "rest-config-qps", 50, "requests a second to the API server, per controller")
	fs.IntVar(&f.burst, "rest-config-burst", 100, "requests at once to the API server, per controller")
	fs.IntVar(&f.cfg.Workers, "concurrent-workers", 3, "objects that a controller works on at once")
	fs.IntVar(&f.cfg.MaxNodesPerBucket, "max-nodes-per-bucket", 100, "nodes in a NodeBucket")
	fs.DurationVar(&f.cfg.Grace, "node-monitor-grace-period", 40*time.Second, "after how long a silent node of an Edge pool is dead, if others of its pool are heard for as long")
	fs.StringVar(&f.dummyIP, "dummy-if-ip", "169.254.2.1", "address at which pods reach the hub of their node, as the hubs' flag")
}

// Config reads the credential. Errors name the flag and what it takes.
func (f *Flags) Config() (Config, error) {
	cfg := f.cfg
	cfg.DummyIP = net.ParseIP(f.dummyIP)
	cfg.WebhookAddress = ":" + strconv.Itoa(f.port)
	var err error
	if cfg.REST, err = clientcmd.BuildConfigFromFlags("", f.kubeconfig); err != nil {
		return cfg, fmt.Errorf("read the manager's credential, of --kubeconfig or of the pod: %w", err)
	}
	cfg.REST.QPS, cfg.REST.Burst = f.qps, f.burst
	cfg.REST.UserAgent = "yurt-manager"
	return cfg, cfg.check()
}
