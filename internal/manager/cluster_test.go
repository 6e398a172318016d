package manager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/chart"
	"github.com/yurt-edge/yurt/internal/manager/webhookcert"
	"github.com/yurt-edge/yurt/playground"
)

const namespace = "kube-system"

// cluster is a real control plane with its stock controllers, the chart, and
// two managers as the chart's accounts.
type cluster struct {
	client.Client // of a cluster admin
	kube          kubernetes.Interface
	cp            *playground.ControlPlane
	dir           string
	ports         []int // three for each manager
	managers      []*process
}

// process is a manager.
type process struct {
	binary, log              string
	args                     []string
	webhook, metrics, health string // addresses
	cmd                      *exec.Cmd
	ended                    chan struct{}
}

var (
	started sync.Once
	shared  *cluster
	failed  error
)

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard()) // of the tests' own clients
	code := m.Run()
	if shared != nil {
		shared.stop()
	}
	os.Exit(code)
}

// theCluster is one for all tests; the first that asks starts it.
func theCluster(t *testing.T) *cluster {
	t.Helper()
	started.Do(func() {
		if shared, failed = startCluster(context.Background(), t); failed == nil {
			failed = shared.startManagers(2)
		}
	})
	if failed != nil {
		t.Fatal(failed)
	}
	return shared
}

// startCluster starts all but the managers.
func startCluster(ctx context.Context, t testing.TB, controllerManagerFlags ...string) (*cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "yurt-manager-test")
	if err != nil {
		return nil, err
	}
	cp, err := playground.StartControlPlane(ctx, playground.ControlPlaneConfig{
		Dir: filepath.Join(dir, "cloud"), ControllerManager: true, ControllerManagerFlags: controllerManagerFlags,
	})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	c := &cluster{cp: cp, dir: dir}
	if err := c.fill(ctx, t); err != nil {
		c.stop()
		return nil, err
	}
	return c, nil
}

func (c *cluster) fill(ctx context.Context, t testing.TB) error {
	var err error
	if c.kube, err = c.cp.Client(); err != nil {
		return err
	}
	if c.Client, err = client.New(c.cp.RESTConfig(), client.Options{Scheme: newScheme()}); err != nil {
		return err
	}
	if c.ports, err = freePorts(6); err != nil {
		return err
	}
	if err := c.install(ctx, c.ports[0]); err != nil {
		return err
	}
	token, err := c.kube.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, "yurt-manager", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	if err := c.cp.WriteTokenKubeconfig(c.kubeconfig(), token.Status.Token); err != nil {
		return err
	}
	build := exec.CommandContext(ctx, "go", "build", "-o", c.binary(), "../../cmd/yurt-manager")
	if text, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build yurt-manager: %w: %s", err, text)
	}
	return nil
}

func (c *cluster) startManagers(n int, flags ...string) error {
	for i := range n {
		if err := c.startManager(c.ports[3*i:3*i+3], flags...); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) kubeconfig() string { return filepath.Join(c.dir, "manager.kubeconfig") }
func (c *cluster) binary() string     { return filepath.Join(c.dir, "yurt-manager") }

// install applies the chart but for the Deployment. The webhook is reached at
// loopback, for lack of a Service network.
func (c *cluster) install(ctx context.Context, webhookPort int) error {
	able, err := chart.Ask(c.kube.Discovery())
	if err != nil {
		return err
	}
	objects, err := chart.Render(chartDir, chart.Release{Name: "yurt", Namespace: namespace, Capabilities: able})
	if err != nil {
		return err
	}
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "Deployment" || o.GetKind() == "PodDisruptionBudget"
	})
	for _, o := range objects {
		var err error
		switch {
		case o.GetName() == webhookcert.Definition:
			url := fmt.Sprintf("https://localhost:%d/convert", webhookPort)
			err = unstructured.SetNestedMap(o.Object, map[string]any{"url": url}, "spec", "conversion", "webhook", "clientConfig")
		case o.GetKind() == "ValidatingWebhookConfiguration":
			webhooks, _, _ := unstructured.NestedSlice(o.Object, "webhooks")
			for _, w := range webhooks {
				w := w.(map[string]any)
				path, _, _ := unstructured.NestedString(w, "clientConfig", "service", "path")
				w["clientConfig"] = map[string]any{"url": fmt.Sprintf("https://localhost:%d%s", webhookPort, path)}
			}
			err = unstructured.SetNestedSlice(o.Object, webhooks, "webhooks")
		}
		if err != nil {
			return err
		}
	}
	text, err := chart.YAML(objects)
	if err != nil {
		return err
	}
	if err := c.cp.Apply(ctx, text); err != nil {
		return err
	}
	// A reflector that meets a type that is not served yet waits ever longer.
	_, err = c.cp.Kubectl(ctx, "wait", "--for=condition=Established", "--all", "--timeout=60s", "customresourcedefinitions")
	return err
}

func (c *cluster) startManager(ports []int, flags ...string) error {
	p := &process{
		log: filepath.Join(c.dir, fmt.Sprintf("manager-%d.log", len(c.managers))), binary: c.binary(),
		webhook: "localhost:" + strconv.Itoa(ports[0]), metrics: "localhost:" + strconv.Itoa(ports[1]), health: "localhost:" + strconv.Itoa(ports[2]),
		args: append([]string{
			"--kubeconfig=" + c.kubeconfig(), "--metrics-addr=127.0.0.1:" + strconv.Itoa(ports[1]),
			"--health-probe-addr=127.0.0.1:" + strconv.Itoa(ports[2]), "--webhook-port=" + strconv.Itoa(ports[0]),
			"--leader-elect-lease-duration=6s", "--max-nodes-per-bucket=2", "--log-level=debug",
		}, flags...),
	}
	c.managers = append(c.managers, p)
	return p.start()
}

func (p *process) start() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd, p.ended = exec.Command(p.binary, p.args...), make(chan struct{})
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		close(p.ended)
		return err
	}
	go func() { // ends with the process
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	return nil
}

// leads reports whether the process says that it has the lease.
func (p *process) leads(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile(p.log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(text), "uccessfully acquired lease")
}

func (p *process) kill() {
	_ = p.cmd.Process.Signal(syscall.SIGKILL)
	<-p.ended
}

func (c *cluster) stop() {
	for _, p := range c.managers {
		p.kill()
	}
	c.cp.Stop()
	if os.Getenv("KEEP") == "" {
		_ = os.RemoveAll(c.dir)
	}
}

func freePorts(n int) ([]int, error) {
	var out []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		out = append(out, l.Addr().(*net.TCPAddr).Port)
	}
	return out, nil
}

// await asks until check has nothing to complain of.
func await(t *testing.T, what string, check func() error) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(45 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// as is a client of another user.
func (c *cluster) as(t *testing.T, user string, groups ...string) client.Client {
	t.Helper()
	cfg := c.cp.RESTConfig()
	cfg.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: groups}
	out, err := client.New(cfg, client.Options{Scheme: newScheme()})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// pool makes a pool, which goes with the test, its nodes before it.
func (c *cluster) pool(t *testing.T, name string, spec v1beta2.NodePoolSpec) *v1beta2.NodePool {
	t.Helper()
	p := &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
	if err := c.Create(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		await(t, "delete pool", func() error { return client.IgnoreNotFound(c.Delete(context.Background(), p)) })
	})
	return p
}

// node makes a node that is ready, with its kubelet's lease.
func (c *cluster) node(t *testing.T, name, pool, ip string) {
	t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}}}
	if pool != "" {
		n.Labels[apps.NodePoolLabel] = pool
	}
	if err := c.Create(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.IgnoreNotFound(c.Delete(context.Background(), n)); err != nil {
			t.Error(err)
		}
	})
	now := metav1.NewMicroTime(time.Now().Add(time.Hour)) // nobody renews it
	seconds := int32(40)
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: name},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &name, LeaseDurationSeconds: &seconds, RenewTime: &now},
	}
	if err := c.Create(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.IgnoreNotFound(c.Delete(context.Background(), lease)); err != nil {
			t.Error(err)
		}
	})
	c.condition(t, name, corev1.NodeReady, corev1.ConditionTrue)
	was := c.get(t, name)
	is := was.DeepCopy()
	is.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}, {Type: corev1.NodeHostName, Address: name}}
	if err := c.Status().Patch(t.Context(), is, client.MergeFrom(was)); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) condition(t *testing.T, name string, kind corev1.NodeConditionType, status corev1.ConditionStatus) {
	t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	patch := fmt.Sprintf(`{"status":{"conditions":[{"type":%q,"status":%q,"reason":"Test","lastHeartbeatTime":%q}]}}`,
		kind, status, time.Now().UTC().Format(time.RFC3339))
	if err := c.Status().Patch(t.Context(), n, client.RawPatch("application/strategic-merge-patch+json", []byte(patch))); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) get(t *testing.T, name string) *corev1.Node {
	t.Helper()
	var n corev1.Node
	if err := c.Get(t.Context(), client.ObjectKey{Name: name}, &n); err != nil {
		t.Fatal(err)
	}
	return &n
}

// patch merges JSON into an object.
func (c *cluster) patch(t *testing.T, obj client.Object, text string) {
	t.Helper()
	if err := c.Patch(t.Context(), obj, client.RawPatch("application/merge-patch+json", []byte(text))); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) label(t *testing.T, node, key, value string) {
	t.Helper()
	text := fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, key, value)
	if value == "" {
		text = fmt.Sprintf(`{"metadata":{"labels":{%q:null}}}`, key)
	}
	c.patch(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, text)
}
