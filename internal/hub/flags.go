package hub

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/cert"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/pool"
	"github.com/yurt-edge/yurt/internal/report"
)

// Flags are a hub's settings as they stand on the command line. Names and
// defaults are OpenYurt's where it has them.
type Flags struct {
	nodeName, poolName, rootDir, storeDir string
	servers, nodeIPs, serviceIPs, pinned  []string
	lbMode, mode, bootstrap               string
	caHashes                              []string
	bind, dummyIP, dummyName              string
	dummy, profiling, conditions          bool
	insecure                              bool
	runDir                                string
	healthPort, proxyPort, insecurePort   int
	poolPort                              int
	poolGrace, poolReturn                 time.Duration
	decisionAge                           time.Duration
	gentle                                GentleConfig
	filters                               filterFlags
	keys                                  keyFlags
	dns                                   dnsFlags
}

// Add registers the flags.
func (f *Flags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.nodeName, "node-name", "", "name of this node in the cluster (required)")
	fs.StringVar(&f.poolName, "nodepool-name", "", "node pool that this node belongs to")
	fs.StringSliceVar(&f.servers, "server-addr", nil, "URLs of the API servers, https only; from --bootstrap-file if empty")
	fs.StringVar(&f.lbMode, "lb-mode", string(link.RoundRobin), "how requests are spread over several servers: rr or priority")
	fs.StringVar(&f.rootDir, "root-dir", report.DefaultRootDir, "directory for keys, certificates and the store")
	fs.StringVar(&f.storeDir, "disk-cache-path", "", "directory of the replica's store (default <root-dir>/store)")
	fs.StringVar(&f.mode, "bootstrap-mode", string(cert.ModeToken), "where the hub's certificate comes from: token or kubeletcertificate")
	fs.StringVar(&f.bootstrap, "bootstrap-file", "", "kubeconfig that holds the bootstrap token and the cluster's CA")
	fs.StringSliceVar(&f.caHashes, "discovery-token-ca-cert-hash", nil, "pins of the cluster's CA (sha256:<hex>) where no file holds it")
	fs.StringVar(&f.bind, "bind-address", "127.0.0.1", "loopback address of the proxy and of health")
	fs.IntVar(&f.healthPort, "serve-port", 10267, "port of health, readiness and metrics")
	fs.IntVar(&f.proxyPort, "proxy-secure-port", 10268, "port of the HTTPS proxy")
	fs.BoolVar(&f.insecure, "insecure-loopback", false, "serve plain HTTP at --proxy-port to processes of root on this node")
	fs.IntVar(&f.insecurePort, "proxy-port", 10261, "port of the plain HTTP proxy, if --insecure-loopback is given")
	fs.IntVar(&f.poolPort, "multiplexer-port", pool.DefaultPort, "port on the node's address for hubs of the same pool; alike in all of a pool")
	fs.DurationVar(&f.poolGrace, "pool-grace", pool.DefaultGrace, "how long what this hub follows in its pool must be of no use before it is left, and up to as long again; leaders wait for less")
	fs.DurationVar(&f.poolReturn, "pool-return", pool.DefaultReturn, "how long a better one must have been good before the hub comes back to it, and up to twice as long again")
	fs.BoolVar(&f.dummy, "enable-dummy-if", true, "serve pods at --dummy-if-ip")
	fs.StringVar(&f.dummyIP, "dummy-if-ip", "169.254.2.1", "link-local address at which pods reach the hub")
	fs.StringVar(&f.dummyName, "dummy-if-name", "hub-dummy0", "interface of --dummy-if-ip; lo where the kernel has no dummy type")
	fs.StringSliceVar(&f.nodeIPs, "node-ip", nil, "addresses of this node, for its server certificate; the first is where hubs of the same pool reach it (default: the Node's InternalIP)")
	fs.StringSliceVar(&f.serviceIPs, "service-ip", nil, "addresses of the service default/kubernetes, for the server certificate")
	fs.StringSliceVar(&f.pinned, "pool-scope-resources", []string{"v1/services", "discovery.k8s.io/v1/endpointslices"},
		"resources that are always replicated, as [group/]version/resource")
	fs.DurationVar(&f.decisionAge, "max-decision-age", 90*24*time.Hour, "how old a remembered authorisation may be while the cloud is away")
	fs.DurationVar(&f.gentle.After, "gentle-after", time.Minute, "after an absence this long, pods that the cloud ended meanwhile end one after the other; 0: all at once")
	fs.Float64Var(&f.gentle.Rate, "gentle-rate", 30, "how many such pods of a node pool end in a minute; its nodes share them")
	fs.DurationVar(&f.gentle.Most, "gentle-most", 3*time.Minute, "how long any of them goes on at most")
	f.filters.add(fs)
	f.keys.add(fs)
	f.dns.add(fs)
	fs.StringVar(&f.runDir, "run-dir", report.DefaultRunDir, "directory of the socket on which yurtadm status asks; empty for none")
	fs.BoolVar(&f.conditions, "node-conditions", true, "keep conditions of the hub on this Node; false takes them away")
	fs.BoolVar(&f.profiling, "profiling", false, "serve /debug/pprof to callers who may get it")
}

// Config checks the flags. Errors name the flag and what it takes.
func (f *Flags) Config() (Config, error) {
	cfg := Config{
		NodeName: f.nodeName, PoolName: f.poolName, RootDir: f.rootDir, StoreDir: f.storeDir,
		LinkMode: link.Mode(f.lbMode), Mode: cert.Mode(f.mode), Bootstrap: f.bootstrap, CAHashes: f.caHashes,
		BindAddress: f.bind, HealthPort: f.healthPort, ProxyPort: f.proxyPort, DummyName: f.dummyName,
		DecisionAge: f.decisionAge, Profiling: f.profiling,
		RunDir: f.runDir, Conditions: f.conditions, Gentle: f.gentle,
	}
	if cfg.NodeName == "" {
		return cfg, errors.New("--node-name is empty: give the name of this node")
	}
	if err := f.listeners(&cfg); err != nil {
		return cfg, err
	}
	if err := f.gentle.check(); err != nil {
		return cfg, err
	}
	if len(f.servers) == 0 && f.bootstrap == "" {
		return cfg, errors.New("--server-addr is empty: give the URL of an API server, as https://10.0.0.1:6443")
	}
	for _, text := range f.servers {
		u, err := url.Parse(strings.TrimSpace(text))
		if err != nil || u.Scheme != "https" || u.Host == "" {
			return cfg, fmt.Errorf("--server-addr %q is not an https URL: give it as https://10.0.0.1:6443", text)
		}
		cfg.Servers = append(cfg.Servers, u)
	}
	if cfg.LinkMode != link.RoundRobin && cfg.LinkMode != link.Priority {
		return cfg, fmt.Errorf("--lb-mode %q is not known: use rr or priority", f.lbMode)
	}
	if err := f.others(&cfg); err != nil {
		return cfg, err
	}
	var err error
	if cfg.NodeIPs, err = parseIPs("--node-ip", f.nodeIPs); err != nil {
		return cfg, err
	}
	if cfg.ServiceIPs, err = parseIPs("--service-ip", f.serviceIPs); err != nil {
		return cfg, err
	}
	for _, text := range f.pinned {
		parts := strings.Split(strings.TrimPrefix(text, "/"), "/")
		switch len(parts) {
		case 2:
			cfg.Pinned = append(cfg.Pinned, schema.GroupVersionResource{Version: parts[0], Resource: parts[1]})
		case 3:
			cfg.Pinned = append(cfg.Pinned, schema.GroupVersionResource{Group: parts[0], Version: parts[1], Resource: parts[2]})
		default:
			return cfg, fmt.Errorf("--pool-scope-resources %q is not [group/]version/resource", text)
		}
	}
	return cfg, nil
}

// others checks the flags of parts that keep theirs themselves.
func (f *Flags) others(cfg *Config) (err error) {
	if cfg.Keys, err = f.keys.config(); err != nil {
		return err
	}
	if cfg.DNS, err = f.dns.config(cfg.DummyIP); err != nil {
		return err
	}
	cfg.Filters, err = f.filters.config()
	return err
}

// listeners checks where the hub listens: nowhere that other hosts are meant
// to reach.
func (f *Flags) listeners(cfg *Config) error {
	if ip := net.ParseIP(f.bind); ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("--bind-address %q is not a loopback address: the hub serves this node only, give 127.0.0.1 or ::1", f.bind)
	}
	if f.insecure {
		if f.insecurePort < 1 || f.insecurePort > 65535 {
			return fmt.Errorf("--proxy-port %d is not a port: give one between 1 and 65535", f.insecurePort)
		}
		cfg.InsecurePort = f.insecurePort
	}
	if f.poolPort < 1 || f.poolPort > 65535 {
		return fmt.Errorf("--multiplexer-port %d is not a port: give one between 1 and 65535", f.poolPort)
	}
	if f.poolGrace < time.Second || f.poolGrace > 10*time.Minute {
		return fmt.Errorf("--pool-grace %s is not within a second and ten minutes: give a time, as 8s", f.poolGrace)
	}
	if f.poolReturn < time.Second || f.poolReturn > time.Hour {
		return fmt.Errorf("--pool-return %s is not within a second and an hour: give a time, as 20s", f.poolReturn)
	}
	cfg.PoolPort, cfg.PoolGrace, cfg.PoolReturn = f.poolPort, f.poolGrace, f.poolReturn
	if !f.dummy || f.dummyIP == "" {
		return nil
	}
	var err error
	cfg.DummyIP, err = unroutable("--dummy-if-ip", f.dummyIP)
	return err
}

// unroutable reads an address that other hosts cannot reach.
func unroutable(flag, text string) (net.IP, error) {
	ip := net.ParseIP(text)
	switch {
	case ip == nil:
		return nil, fmt.Errorf("%s %q is not an IP address", flag, text)
	case ip.IsLinkLocalUnicast(), ip.IsLoopback(), ip.To4() == nil && ip.IsPrivate():
		return ip, nil
	}
	return nil, fmt.Errorf("%s %q could be reached from other hosts: give a link-local address, as 169.254.2.1, or for IPv6 a unique local one", flag, text)
}

func parseIPs(flag string, texts []string) ([]net.IP, error) {
	var out []net.IP
	for _, text := range texts {
		ip := net.ParseIP(strings.TrimSpace(text))
		if ip == nil {
			return nil, fmt.Errorf("%s %q is not an IP address", flag, text)
		}
		out = append(out, ip)
	}
	return out, nil
}
