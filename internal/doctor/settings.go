package doctor

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/yurt-edge/yurt/internal/report"
)

// Settings say where the hub of a node is and what it was told.
type Settings struct {
	Servers []string // URLs of the API servers
	RootDir string
	RunDir  string
	Bind    string // of the hub's listeners
	Proxy   int    // its ports
	Health  int
	DummyIP string // empty: pods do not reach the hub
	DNS     bool   // it answers names
	DNSPort int
	Domain  string // the cluster's

	// Unit is the hub's, empty where systemd does not run it. State is what
	// systemd says of it.
	Unit  string
	State map[string]string
	// Kubeconfig is the kubelet's; empty: where kubelets have it.
	Kubeconfig string
	// Credential is a certificate with its key of the node's user; the hub's
	// own key rests sealed.
	Credential string

	// Source is where the settings were found.
	Source string
}

const (
	unitName     = "yurthub.service"
	defaultsFile = "/etc/default/yurthub"
	flagsName    = "YURTHUB_FLAGS="
)

// Discover finds the settings of this node's hub: those of the process that
// runs, else those that it would be started with.
func Discover(ctx context.Context) Settings {
	s := Settings{Unit: unitName, State: unitState(ctx, unitName)}
	if pid, err := strconv.Atoi(s.State["MainPID"]); err == nil && pid > 0 {
		if text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline")); err == nil {
			s.parse(strings.Split(string(bytes.Trim(text, "\x00")), "\x00")[1:])
			s.Source = fmt.Sprintf("process %d", pid)
			return s
		}
	}
	text, err := os.ReadFile(defaultsFile)
	s.parse(defaultFlags(text))
	s.Source = defaultsFile
	if err != nil {
		s.Source = "defaults: " + err.Error()
	}
	return s
}

// defaultFlags reads the file as systemd does.
func defaultFlags(text []byte) []string {
	var out []string
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(strings.TrimSpace(line), flagsName); found {
			out = strings.Fields(strings.Trim(value, `"'`))
		}
	}
	return out
}

// parse takes from a hub's command line what is of interest here.
func (s *Settings) parse(args []string) {
	fs := pflag.NewFlagSet("yurthub", pflag.ContinueOnError)
	fs.ParseErrorsAllowlist.UnknownFlags = true
	var bootstrap string
	var dummy bool
	fs.StringSliceVar(&s.Servers, "server-addr", nil, "")
	fs.StringVar(&s.RootDir, "root-dir", report.DefaultRootDir, "")
	fs.StringVar(&s.RunDir, "run-dir", report.DefaultRunDir, "")
	fs.StringVar(&s.Bind, "bind-address", "127.0.0.1", "")
	fs.IntVar(&s.Proxy, "proxy-secure-port", 10268, "")
	fs.IntVar(&s.Health, "serve-port", 10267, "")
	fs.StringVar(&s.DummyIP, "dummy-if-ip", "169.254.2.1", "")
	fs.BoolVar(&dummy, "enable-dummy-if", true, "")
	fs.StringVar(&bootstrap, "bootstrap-file", "", "")
	fs.BoolVar(&s.DNS, "enable-dns", true, "")
	fs.IntVar(&s.DNSPort, "dns-port", 53, "")
	fs.StringVar(&s.Domain, "cluster-domain", "cluster.local", "")
	_ = fs.Parse(args) // what cannot be read stays a default
	if !dummy {
		s.DummyIP = ""
	}
	if s.Credential == "" {
		s.Credential = "/var/lib/kubelet/pki/kubelet-client-current.pem"
	}
	if len(s.Servers) > 0 || bootstrap == "" {
		return
	}
	if config, err := clientcmd.LoadFromFile(bootstrap); err == nil {
		for _, c := range config.Clusters {
			s.Servers = append(s.Servers, c.Server)
		}
	}
}

// unitState returns systemd's properties of the unit, nil if it cannot be
// asked.
func unitState(ctx context.Context, unit string) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", "show", unit,
		"--property=LoadState,ActiveState,SubState,UnitFileState,NRestarts,MainPID,Result").Output()
	if err != nil {
		return nil
	}
	state := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		state[name] = value
	}
	return state
}

func (s *Settings) pki(name string) string { return filepath.Join(s.RootDir, "pki", name) }

func (s *Settings) hubURL() string {
	return "https://" + net.JoinHostPort(s.Bind, strconv.Itoa(s.Proxy))
}
