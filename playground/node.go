package playground

import (
	"context"
	"embed"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/yurt-edge/yurt/playground/machine"
)

//go:embed units
var unitFiles embed.FS

const (
	hubURL      = "https://127.0.0.1:10268"
	hubIP       = "169.254.2.1" // where pods reach it
	hubCAFile   = "/var/lib/yurthub/pki/ca-bundle.crt"
	nodeCAFile  = "/etc/kubernetes/ca.crt"
	imagesMount = "/opt/images"
)

// node is what the templates of a machine's files see.
type node struct {
	Machine
	Edge         bool
	PoolType     string
	DNS, HubIP   string
	ClusterCIDR  string
	CAFile       string // appears once the API can be trusted
	CgroupDriver string
	RestrictOOM  bool
	PauseImage   string
}

// credentials are the tokens that all machines start with.
type credentials struct {
	bootstrap string
	proxy     string
}

func newCredentials(ctx context.Context, cp *ControlPlane) (credentials, error) {
	var c credentials
	var err error
	if c.bootstrap, err = cp.BootstrapToken(ctx); err != nil {
		return c, fmt.Errorf("make bootstrap token: %w", err)
	}
	client, err := cp.Client()
	if err != nil {
		return c, err
	}
	// Longer than any cut: nothing renews it.
	seconds := int64(certLife.Seconds())
	token, err := client.CoreV1().ServiceAccounts("kube-system").CreateToken(ctx, "kube-proxy",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
	if err != nil {
		return c, fmt.Errorf("make token of kube-proxy: %w", err)
	}
	c.proxy = token.Status.Token
	return c, nil
}

// spec says how a machine of the topology boots.
func (p *Playground) spec(m Machine, base string, c credentials) (machine.Spec, error) {
	files, err := p.files(m, c)
	if err != nil {
		return machine.Spec{}, fmt.Errorf("files of %s: %w", m.Name, err)
	}
	spec := machine.Spec{
		Name:  m.Name,
		Base:  base,
		Dir:   p.machineDir(m.Name),
		Netns: p.topology.plan().MachineNamespacePath(m.Name),
		Files: files,
		Disks: []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/lib/yurthub"},
		Binds: []machine.Bind{{Source: p.imagesDir(), Target: imagesMount, ReadOnly: true}},
	}
	programs := []string{"containerd", "containerd-shim-runc-v2", "ctr", "kubelet", "kube-proxy", "kubectl"}
	if m.Hub {
		programs = append(programs, "yurthub", "yurtadm")
	}
	for _, program := range programs {
		source, err := filepath.EvalSymlinks(p.bin.Path(program))
		if err != nil {
			return machine.Spec{}, err
		}
		spec.Binds = append(spec.Binds, machine.Bind{Source: source, Target: "/usr/local/bin/" + program, ReadOnly: true})
	}
	return spec, nil
}

// files are what makes a Debian machine a node.
func (p *Playground) files(m Machine, c credentials) (map[string]machine.File, error) {
	n := node{
		Machine:      m,
		Edge:         m.Role == RoleEdge,
		PoolType:     p.topology.poolType(m.Pool),
		DNS:          p.topology.DNS,
		HubIP:        hubIP,
		ClusterCIDR:  p.topology.ClusterCIDR,
		CAFile:       nodeCAFile,
		CgroupDriver: machine.CgroupDriver(),
		RestrictOOM:  !hasCapability(capSysResource),
		PauseImage:   PauseImage,
	}
	server := p.cp.URL
	if m.Hub {
		server, n.CAFile = hubURL, hubCAFile
	}
	files := machine.Files()
	put := func(path string, mode os.FileMode, data []byte) {
		files[path] = machine.File{Mode: mode, Data: data}
	}
	put(nodeCAFile, 0o644, p.cp.CA.CertPEM)
	const unitDir = "/etc/systemd/system/"
	for name, path := range map[string]string{
		"containerd.service":        unitDir,
		"playground-images.service": unitDir,
		"kubelet.service":           unitDir,
		"kube-proxy.service":        unitDir,
		"node.path":                 unitDir,
		"node.target":               unitDir,
		"kubelet.yaml":              "/etc/kubernetes/",
		"kube-proxy.yaml":           "/etc/kubernetes/",
		"playground.conflist":       "/etc/cni/net.d/",
	} {
		text, err := render("units/"+name, n)
		if err != nil {
			return nil, err
		}
		put(path+name, 0o644, text)
	}
	config, err := render("units/containerd.toml", n)
	if err != nil {
		return nil, err
	}
	put("/etc/containerd/config.toml", 0o644, config)

	for path, token := range map[string]string{
		"/etc/kubernetes/bootstrap.kubeconfig":  c.bootstrap,
		"/etc/kubernetes/kube-proxy.kubeconfig": c.proxy,
	} {
		content, err := kubeconfig(server, clientcmdapi.Cluster{CertificateAuthority: n.CAFile}, clientcmdapi.AuthInfo{Token: token})
		if err != nil {
			return nil, err
		}
		put(path, 0o600, content)
	}
	enabled := []string{"containerd.service", "playground-images.service", "node.path"}
	if m.Hub {
		hub, err := p.hubFiles(m, c)
		if err != nil {
			return nil, err
		}
		maps.Copy(files, hub)
		enabled = append(enabled, "yurthub.service")
	}
	for _, unit := range enabled {
		files[unitDir+"multi-user.target.wants/"+unit] = machine.File{Link: unitDir + unit}
	}
	return files, nil
}

// hubFiles install the hub as its users do: its own unit, flags in
// /etc/default and a bootstrap token.
func (p *Playground) hubFiles(m Machine, c credentials) (map[string]machine.File, error) {
	unit, err := os.ReadFile(filepath.Join(p.bin.Root, "deploy/systemd/yurthub.service"))
	if err != nil {
		return nil, err
	}
	bootstrap, err := kubeconfig(p.cp.URL, clientcmdapi.Cluster{CertificateAuthorityData: p.cp.CA.CertPEM}, clientcmdapi.AuthInfo{Token: c.bootstrap})
	if err != nil {
		return nil, err
	}
	firstIP, err := firstServiceIP(p.topology.ServiceCIDR)
	if err != nil {
		return nil, err
	}
	flags := strings.Join([]string{
		"--node-name=" + m.Name,
		"--nodepool-name=" + m.Pool,
		"--server-addr=" + p.cp.URL,
		"--bootstrap-mode=token",
		"--bootstrap-file=/etc/kubernetes/hub-bootstrap.kubeconfig",
		"--node-ip=" + m.Address,
		"--service-ip=" + firstIP,
	}, " ")
	return map[string]machine.File{
		"/etc/systemd/system/yurthub.service":      {Data: unit},
		"/etc/default/yurthub":                     {Data: []byte("YURTHUB_FLAGS=" + flags + "\n")},
		"/etc/kubernetes/hub-bootstrap.kubeconfig": {Mode: 0o600, Data: bootstrap},
	}, nil
}

func render(name string, data any) ([]byte, error) {
	text, err := unitFiles.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return renderText(name, string(text), data)
}

func renderText(name, text string, data any) ([]byte, error) {
	tmpl, err := template.New(name).Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, err
	}
	var out strings.Builder
	if err := tmpl.Execute(&out, data); err != nil {
		return nil, err
	}
	return []byte(out.String()), nil
}
