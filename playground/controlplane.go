package playground

import (
	"bytes"
	"context"
	"crypto/rand"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const (
	// kubeletClient is the user as which the API server calls kubelets.
	kubeletClient = "kube-apiserver-kubelet-client"
	// adminGroup may do anything; its binding is made by the API server.
	adminGroup = "system:masters"

	defaultServiceCIDR = "10.96.0.0/16"
	defaultClusterCIDR = "10.244.0.0/16"
	serverStartBudget  = 2 * time.Minute
)

//go:embed manifests
var manifestFiles embed.FS

// ControlPlaneConfig says how to run a control plane. Only Dir must be set.
type ControlPlaneConfig struct {
	// Dir takes all files of the control plane and is made when missing. It
	// must not hold an earlier control plane.
	Dir string
	// Binaries are the programs. The zero value means [EnsureControlPlane].
	Binaries Binaries
	// Address is the IP address that the API server listens on and advertises.
	// Empty means 127.0.0.1; then there are no endpoints of the Service
	// "kubernetes", because loopback addresses are not allowed there.
	Address string
	// Port is the API server's port; 0 takes a free one.
	Port int
	// SANs are further names and addresses in the API server's certificate.
	SANs []string
	// ServiceCIDR and ClusterCIDR default to 10.96.0.0/16 and 10.244.0.0/16.
	ServiceCIDR, ClusterCIDR string
	// ControllerManager and Scheduler say whether these run too.
	ControllerManager, Scheduler bool
	// APIServerFlags are appended to the API server's flags.
	APIServerFlags []string
	// ControllerManagerFlags are appended to the controller manager's.
	ControllerManagerFlags []string
	// Progress tells of builds. The zero value is silent.
	Progress Progress
}

// ControlPlane is a running control plane. Its processes die with the process
// that started it.
type ControlPlane struct {
	// URL is the API server's address, https://IP:PORT.
	URL string
	// CA signs the API server's certificate and all clients that it trusts.
	CA *Authority
	// Kubeconfig is a file with the credentials of a cluster admin.
	Kubeconfig string
	// Binaries are the programs in use.
	Binaries Binaries

	cfg   ControlPlaneConfig
	pki   *pki
	admin *rest.Config

	tokenMu sync.Mutex // guards token
	token   string     // the bootstrap token, once there is one

	mu        sync.Mutex // guards processes
	processes []*process // in order of start
	apiserver component
}

// StartControlPlane starts etcd, kube-apiserver and what cfg asks for, waits
// until the API server is ready and applies the RBAC rules that nodes and hubs
// need. When it returns an error nothing is left running.
func StartControlPlane(ctx context.Context, cfg ControlPlaneConfig) (*ControlPlane, error) {
	cp, err := newControlPlane(ctx, cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, serverStartBudget,
		fmt.Errorf("control plane not ready after %s", serverStartBudget))
	defer cancel()
	if err := cp.start(ctx); err != nil {
		cp.Stop()
		return nil, err
	}
	return cp, nil
}

func newControlPlane(ctx context.Context, cfg ControlPlaneConfig) (*ControlPlane, error) {
	if cfg.Dir == "" {
		return nil, errors.New("control plane needs a folder")
	}
	if cfg.Binaries.Dir == "" {
		bin, err := EnsureControlPlane(ctx, cfg.Progress)
		if err != nil {
			return nil, err
		}
		cfg.Binaries = bin
	}
	cfg.Address = orDefault(cfg.Address, "127.0.0.1")
	cfg.ServiceCIDR = orDefault(cfg.ServiceCIDR, defaultServiceCIDR)
	cfg.ClusterCIDR = orDefault(cfg.ClusterCIDR, defaultClusterCIDR)
	if cfg.Port == 0 {
		ports, err := FreePorts(ctx, cfg.Address, 1)
		if err != nil {
			return nil, err
		}
		cfg.Port = ports[0]
	}
	firstIP, err := firstServiceIP(cfg.ServiceCIDR)
	if err != nil {
		return nil, err
	}
	sans := append([]string{
		cfg.Address, "127.0.0.1", firstIP, "localhost", "kubernetes", "kubernetes.default",
		"kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}, cfg.SANs...)
	slices.Sort(sans)
	secrets, err := newPKI(filepath.Join(cfg.Dir, "pki"), slices.Compact(sans))
	if err != nil {
		return nil, fmt.Errorf("make certificates: %w", err)
	}
	cp := &ControlPlane{
		URL:        "https://" + net.JoinHostPort(cfg.Address, strconv.Itoa(cfg.Port)),
		CA:         secrets.ca,
		Kubeconfig: filepath.Join(cfg.Dir, "admin.kubeconfig"),
		Binaries:   cfg.Binaries,
		cfg:        cfg,
		pki:        secrets,
	}
	if err := cp.WriteKubeconfig(cp.Kubeconfig, "playground-admin", adminGroup); err != nil {
		return nil, err
	}
	cp.admin, err = cp.ClientConfig("playground-admin", adminGroup)
	return cp, err
}

func (cp *ControlPlane) start(ctx context.Context) error {
	ports, err := FreePorts(ctx, "127.0.0.1", 4)
	if err != nil {
		return err
	}
	etcd, etcdURL := cp.etcd(ports[0], ports[1])
	if _, err := cp.run(etcd); err != nil {
		return err
	}
	// The API server waits for etcd by itself.
	cp.apiserver = cp.kubeAPIServer(etcdURL)
	if err := cp.StartAPIServer(ctx); err != nil {
		return err
	}
	rbac, err := manifestFiles.ReadFile("manifests/rbac.yaml")
	if err != nil {
		return err
	}
	hubs, err := os.ReadFile(filepath.Join(cp.Binaries.Root, chartDir, "templates/hub.yaml"))
	if err != nil {
		return err
	}
	if err := cp.Apply(ctx, string(rbac)+"---\n"+string(hubs)); err != nil {
		return err
	}
	if cp.cfg.ControllerManager {
		if err := cp.runClient(ctx, "kube-controller-manager", cp.controllerManagerFlags(ports[2]), ports[2]); err != nil {
			return err
		}
		if err := cp.awaitControllers(ctx); err != nil {
			return err
		}
	}
	if cp.cfg.Scheduler {
		if err := cp.runClient(ctx, "kube-scheduler", cp.schedulerFlags(ports[3]), ports[3]); err != nil {
			return err
		}
	}
	return nil
}

func (cp *ControlPlane) etcd(clientPort, peerPort int) (component, string) {
	client := "https://127.0.0.1:" + strconv.Itoa(clientPort)
	peer := "https://127.0.0.1:" + strconv.Itoa(peerPort)
	return component{
		name: "etcd",
		path: cp.Binaries.Path("etcd"),
		args: []string{
			"--name=playground",
			"--data-dir=" + filepath.Join(cp.cfg.Dir, "etcd"),
			"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
			"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer,
			"--initial-cluster=playground=" + peer,
			"--client-cert-auth", "--trusted-ca-file=" + cp.pki.etcd.CertFile,
			"--cert-file=" + cp.pki.file("etcd.crt"), "--key-file=" + cp.pki.file("etcd.key"),
			"--peer-client-cert-auth", "--peer-trusted-ca-file=" + cp.pki.etcd.CertFile,
			"--peer-cert-file=" + cp.pki.file("etcd.crt"), "--peer-key-file=" + cp.pki.file("etcd.key"),
			// The data does not outlive the playground.
			"--unsafe-no-fsync",
			"--log-level=warn",
		},
	}, client
}

func (cp *ControlPlane) kubeAPIServer(etcdURL string) component {
	args := []string{
		"--etcd-servers=" + etcdURL,
		"--etcd-cafile=" + cp.pki.etcd.CertFile,
		"--etcd-certfile=" + cp.pki.file("etcd-client.crt"),
		"--etcd-keyfile=" + cp.pki.file("etcd-client.key"),
		"--bind-address=" + cp.cfg.Address,
		"--advertise-address=" + cp.cfg.Address,
		"--secure-port=" + strconv.Itoa(cp.cfg.Port),
		"--service-cluster-ip-range=" + cp.cfg.ServiceCIDR,
		"--client-ca-file=" + cp.pki.ca.CertFile,
		"--tls-cert-file=" + cp.pki.file("apiserver.crt"),
		"--tls-private-key-file=" + cp.pki.file("apiserver.key"),
		"--kubelet-certificate-authority=" + cp.pki.ca.CertFile,
		"--kubelet-client-certificate=" + cp.pki.file("kubelet-client.crt"),
		"--kubelet-client-key=" + cp.pki.file("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-signing-key-file=" + cp.pki.file("sa.key"),
		"--service-account-key-file=" + cp.pki.file("sa.pub"),
		"--requestheader-client-ca-file=" + cp.pki.frontProxy.CertFile,
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + cp.pki.file("front-proxy-client.crt"),
		"--proxy-client-key-file=" + cp.pki.file("front-proxy-client.key"),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--enable-bootstrap-token-auth",
		"--allow-privileged",
		// A stop must not wait for watchers that never go away.
		"--shutdown-delay-duration=0s",
		"--shutdown-watch-termination-grace-period=1s",
	}
	if ip := net.ParseIP(cp.cfg.Address); ip.IsLoopback() {
		args = append(args, "--endpoint-reconciler-type=none")
	}
	return component{
		name: "kube-apiserver",
		path: cp.Binaries.Path("kube-apiserver"),
		args: append(args, cp.cfg.APIServerFlags...),
	}
}

func (cp *ControlPlane) controllerManagerFlags(port int) []string {
	return append([]string{
		"--bind-address=127.0.0.1", "--secure-port=" + strconv.Itoa(port),
		"--leader-elect=false",
		"--controllers=*,bootstrapsigner,tokencleaner",
		"--use-service-account-credentials",
		"--service-account-private-key-file=" + cp.pki.file("sa.key"),
		"--root-ca-file=" + cp.pki.ca.CertFile,
		"--cluster-signing-cert-file=" + cp.pki.ca.CertFile,
		"--cluster-signing-key-file=" + cp.pki.ca.KeyFile,
		"--service-cluster-ip-range=" + cp.cfg.ServiceCIDR,
		"--cluster-cidr=" + cp.cfg.ClusterCIDR,
		// A node's pod CIDR follows from the topology, because the routers
		// must know it before the node exists.
		"--allocate-node-cidrs=false",
	}, cp.cfg.ControllerManagerFlags...)
}

func (cp *ControlPlane) schedulerFlags(port int) []string {
	return []string{
		"--bind-address=127.0.0.1", "--secure-port=" + strconv.Itoa(port),
		"--leader-elect=false",
	}
}

// awaitControllers waits for the default ServiceAccount: without it no pod can
// be made, and once a controller has made it all controllers are built. Before
// that, the controller manager ends itself when the API server goes away.
func (cp *ControlPlane) awaitControllers(ctx context.Context) error {
	client, err := cp.Client()
	if err != nil {
		return err
	}
	return poll(ctx, 50*time.Millisecond, func() (bool, error) {
		if err := cp.Err(); err != nil {
			return false, err
		}
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err == nil, nil
	})
}

// runClient starts a component that is a client of the API server and waits
// until it says that it is healthy.
func (cp *ControlPlane) runClient(ctx context.Context, name string, flags []string, port int) error {
	file := filepath.Join(cp.cfg.Dir, name+".kubeconfig")
	if err := cp.WriteKubeconfig(file, "system:"+name); err != nil {
		return err
	}
	flags = append(flags, "--kubeconfig="+file, "--authentication-kubeconfig="+file, "--authorization-kubeconfig="+file)
	p, err := cp.run(component{name: name, path: cp.Binaries.Path(name), args: flags})
	if err != nil {
		return err
	}
	// The component makes its serving certificate itself; it is only asked
	// whether it is alive.
	client := insecureClient()
	defer client.CloseIdleConnections()
	return p.await(ctx, func(ctx context.Context) error {
		return getOK(ctx, client, "https://127.0.0.1:"+strconv.Itoa(port)+"/healthz")
	})
}

func (cp *ControlPlane) run(c component) (*process, error) {
	p, err := c.start(cp.cfg.Dir)
	if err != nil {
		return nil, err
	}
	cp.mu.Lock()
	defer cp.mu.Unlock()
	cp.processes = append(cp.processes, p)
	return p, nil
}

// Stop ends all processes in the reverse order of their start and waits for
// them. It may be called more than once.
func (cp *ControlPlane) Stop() {
	cp.mu.Lock()
	processes := cp.processes
	cp.processes = nil
	cp.mu.Unlock()
	for _, p := range slices.Backward(processes) {
		p.stop()
	}
}

// StopAPIServer ends the API server alone, so that its clients see refused
// connections. [ControlPlane.StartAPIServer] starts it again at the same URL.
func (cp *ControlPlane) StopAPIServer() {
	cp.mu.Lock()
	i := slices.IndexFunc(cp.processes, func(p *process) bool { return p.name == "kube-apiserver" })
	if i < 0 {
		cp.mu.Unlock()
		return
	}
	p := cp.processes[i]
	cp.processes = slices.Delete(cp.processes, i, i+1)
	cp.mu.Unlock()
	p.stop()
}

// StartAPIServer starts the API server and waits until it is ready.
func (cp *ControlPlane) StartAPIServer(ctx context.Context) error {
	p, err := cp.run(cp.apiserver)
	if err != nil {
		return err
	}
	transport, err := rest.HTTPClientFor(cp.admin)
	if err != nil {
		return err
	}
	defer transport.CloseIdleConnections()
	return p.await(ctx, func(ctx context.Context) error {
		return getOK(ctx, transport, cp.URL+"/readyz")
	})
}

// Err returns why the first of the processes ended by itself, or nil while all
// of them run.
func (cp *ControlPlane) Err() error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	for _, p := range cp.processes {
		if err := p.ended(); err != nil {
			return err
		}
	}
	return nil
}

// RESTConfig returns the configuration of a cluster admin's client without a
// rate limit.
func (cp *ControlPlane) RESTConfig() *rest.Config { return rest.CopyConfig(cp.admin) }

// ClientConfig issues a certificate for a user and returns the configuration
// of a client that uses it.
func (cp *ControlPlane) ClientConfig(user string, groups ...string) (*rest.Config, error) {
	cert, key, err := cp.CA.Client(user, groups...)
	if err != nil {
		return nil, err
	}
	return &rest.Config{
		Host:            cp.URL,
		TLSClientConfig: rest.TLSClientConfig{CAData: cp.CA.CertPEM, CertData: cert, KeyData: key},
		QPS:             -1,
	}, nil
}

// Client returns a client of a cluster admin.
func (cp *ControlPlane) Client() (*kubernetes.Clientset, error) {
	return kubernetes.NewForConfig(cp.admin)
}

// WriteKubeconfig issues a certificate for a user and writes a kubeconfig that
// holds all it needs.
func (cp *ControlPlane) WriteKubeconfig(path, user string, groups ...string) error {
	cert, key, err := cp.CA.Client(user, groups...)
	if err != nil {
		return err
	}
	return cp.writeKubeconfig(path, clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key})
}

// WriteTokenKubeconfig writes a kubeconfig for a bearer token.
func (cp *ControlPlane) WriteTokenKubeconfig(path, token string) error {
	return cp.writeKubeconfig(path, clientcmdapi.AuthInfo{Token: token})
}

func (cp *ControlPlane) writeKubeconfig(path string, user clientcmdapi.AuthInfo) error {
	content, err := kubeconfig(cp.URL, clientcmdapi.Cluster{CertificateAuthorityData: cp.CA.CertPEM}, user)
	if err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o600)
}

// BootstrapToken returns the bootstrap token with which nodes may ask for their
// first certificate. The first call makes it.
func (cp *ControlPlane) BootstrapToken(ctx context.Context) (string, error) {
	cp.tokenMu.Lock()
	defer cp.tokenMu.Unlock()
	if cp.token != "" {
		return cp.token, nil
	}
	var random [11]byte
	if _, err := rand.Read(random[:]); err != nil {
		return "", err
	}
	id, secret := hex.EncodeToString(random[:3]), hex.EncodeToString(random[3:])
	err := cp.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata:
  name: bootstrap-token-%[1]s
  namespace: kube-system
type: bootstrap.kubernetes.io/token
stringData:
  token-id: %[1]q
  token-secret: %[2]q
  usage-bootstrap-authentication: "true"
  usage-bootstrap-signing: "true"
  auth-extra-groups: system:bootstrappers:playground
`, id, secret))
	if err == nil {
		cp.token = id + "." + secret
	}
	return cp.token, err
}

// Kubectl runs kubectl as a cluster admin and returns its standard output. The
// error quotes its standard error.
func (cp *ControlPlane) Kubectl(ctx context.Context, args ...string) (string, error) {
	return kubectl(ctx, cp.Binaries, cp.Kubeconfig, "", args...)
}

// Apply applies manifests in YAML.
func (cp *ControlPlane) Apply(ctx context.Context, manifests string) error {
	_, err := kubectl(ctx, cp.Binaries, cp.Kubeconfig, manifests, "apply", "--server-side", "--filename=-")
	return err
}

func kubectl(ctx context.Context, bin Binaries, kubeconfig, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, bin.Path("kubectl"), append([]string{"--kubeconfig=" + kubeconfig}, args...)...)
	// kubectl keeps discovery in HOME; a playground must not leave it there.
	cmd.Env = append(os.Environ(), "HOME="+filepath.Dir(kubeconfig))
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

func getOK(ctx context.Context, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return nil
}
