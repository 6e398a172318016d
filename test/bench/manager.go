package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/chart"
	"github.com/yurt-edge/yurt/playground"
)

const (
	managerSpace = metav1.NamespaceSystem
	stopBudget   = 20 * time.Second
	poolsPath    = "/apis/apps.openyurt.io/v1beta2/nodepools"
)

// manager is a yurt-manager, with the rights that the chart gives it. It is
// started again when it ends, as its Deployment would.
type manager struct {
	log     string
	stopped chan struct{} // closed when it shall end
	ended   chan struct{} // closed when it has ended for good

	mu      sync.Mutex // guards the following
	process *os.Process
	lives   int
}

// startManager installs the chart, but for the Deployment, and starts the
// manager on this machine. The flags are added to its own.
func (b *bench) startManager(ctx context.Context, flags ...string) (*manager, error) {
	ports, err := playground.FreePorts(ctx, "127.0.0.1", 3)
	if err != nil {
		return nil, err
	}
	binary, root, err := b.buildManager(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.installChart(ctx, filepath.Join(root, "deploy", "chart"), ports[2]); err != nil {
		return nil, fmt.Errorf("install the chart: %w", err)
	}
	day := int64(24 * 3600)
	token, err := b.admin.CoreV1().ServiceAccounts(managerSpace).CreateToken(ctx, "yurt-manager",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &day}}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("be the manager: %w", err)
	}
	kubeconfig := filepath.Join(b.dir, "manager.kubeconfig")
	if err := b.cloud.WriteTokenKubeconfig(kubeconfig, token.Status.Token); err != nil {
		return nil, err
	}
	m := &manager{log: filepath.Join(b.dir, "manager.log"), stopped: make(chan struct{}), ended: make(chan struct{})}
	log, err := os.Create(m.log)
	if err != nil {
		return nil, err
	}
	loopback := func(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
	args := append([]string{
		"--kubeconfig=" + kubeconfig, "--metrics-addr=" + loopback(ports[0]), "--health-probe-addr=" + loopback(ports[1]),
		"--webhook-port=" + strconv.Itoa(ports[2]),
	}, flags...)
	begun := make(chan error, 1)
	go m.run(func() *exec.Cmd { // ends with stop, or when it cannot start
		cmd := exec.Command(binary, args...) //nolint:noctx // stop ends it
		cmd.Stdout, cmd.Stderr = log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd
	}, log, begun)
	if err := <-begun; err != nil {
		return nil, fmt.Errorf("start yurt-manager: %w", err)
	}
	return m, nil
}

// run starts the manager again and again, and says how the first start went.
func (m *manager) run(next func() *exec.Cmd, log io.Closer, begun chan<- error) {
	// The death signal is tied to the thread that forks.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(m.ended)
	defer log.Close()
	for {
		cmd := next()
		err := cmd.Start()
		if err == nil {
			m.mu.Lock()
			m.process = cmd.Process
			m.lives++
			m.mu.Unlock()
		}
		select {
		case begun <- err: // has room for the first
		default:
		}
		if err != nil {
			return
		}
		_ = cmd.Wait()
		select {
		case <-m.stopped:
			return
		case <-time.After(time.Second):
		}
	}
}

func (m *manager) now() (p *os.Process, lives int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.process, m.lives
}

// cost is what the manager takes of this machine.
func (m *manager) cost() (process, error) {
	p, _ := m.now()
	return readProcess(p.Pid)
}

// stop ends the manager in good order, so that another need not wait for its
// lease to lapse.
func (m *manager) stop() {
	close(m.stopped)
	p, _ := m.now()
	_ = p.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-m.ended:
	case <-time.After(stopBudget):
		p, _ := m.now()
		_ = p.Kill()
		<-m.ended
	}
}

// buildManager builds the manager from this checkout.
func (b *bench) buildManager(ctx context.Context) (binary, root string, err error) {
	dir, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", "", fmt.Errorf("find module: %w", err)
	}
	root = strings.TrimSpace(string(dir))
	binary = filepath.Join(b.dir, "yurt-manager")
	if _, err := os.Stat(binary); err == nil {
		return binary, root, nil
	}
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "./cmd/yurt-manager")
	build.Dir = root
	if text, err := build.CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("build yurt-manager: %w: %s", err, text)
	}
	return binary, root, nil
}

// installChart applies the chart. The webhook is reached at loopback, for lack
// of a Service network.
func (b *bench) installChart(ctx context.Context, dir string, webhookPort int) error {
	able, err := chart.Ask(b.admin.Discovery())
	if err != nil {
		return err
	}
	objects, err := chart.Render(dir, chart.Release{Name: "yurt", Namespace: managerSpace, Capabilities: able})
	if err != nil {
		return err
	}
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "Deployment" || o.GetKind() == "PodDisruptionBudget"
	})
	for _, o := range objects {
		where := []string{"spec", "conversion", "webhook", "clientConfig"}
		if _, found, _ := unstructured.NestedMap(o.Object, where...); !found {
			continue
		}
		url := fmt.Sprintf("https://localhost:%d/convert", webhookPort)
		if err := unstructured.SetNestedMap(o.Object, map[string]any{"url": url}, where...); err != nil {
			return err
		}
	}
	text, err := chart.YAML(objects)
	if err != nil {
		return err
	}
	if err := b.cloud.Apply(ctx, text); err != nil {
		return err
	}
	_, err = b.cloud.Kubectl(ctx, "wait", "--for=condition=Established", "--all", "--timeout=60s", "customresourcedefinitions")
	return err
}

// sharing is the part of a pool's spec that lets its hubs share, or not.
func sharing(on bool) map[string]any {
	shared := []map[string]string{}
	if on {
		shared = []map[string]string{
			{"group": "", "version": "v1", "resource": "services"},
			{"group": "discovery.k8s.io", "version": "v1", "resource": "endpointslices"},
		}
	}
	return map[string]any{"enableLeaderElection": on, "poolScopeMetadata": shared}
}

func (b *bench) makePools(ctx context.Context, names []string, shared bool) error {
	for _, name := range names {
		spec := sharing(shared)
		spec["interConnectivity"] = shared
		body, err := json.Marshal(map[string]any{
			"apiVersion": v1beta2.GroupVersion.String(), "kind": "NodePool", "metadata": map[string]any{"name": name}, "spec": spec,
		})
		if err != nil {
			return fmt.Errorf("make pool: %w", err)
		}
		// Admission learns of a new kind a while after it is established.
		var last error
		err = until(ctx, time.Minute, 200*time.Millisecond, func() (bool, error) {
			last = b.admin.RESTClient().Post().AbsPath(poolsPath).Body(body).Do(ctx).Error()
			return last == nil || apierrors.IsAlreadyExists(last), nil
		})
		if err != nil {
			return fmt.Errorf("make pool %s: %w: %w", name, err, last)
		}
	}
	return nil
}

// forget takes pools and their nodes away.
func (b *bench) forget(ctx context.Context, names []string) error {
	for _, name := range names {
		err := b.admin.CoreV1().Nodes().DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: apps.NodePoolLabel + "=" + name})
		if err != nil {
			return fmt.Errorf("delete nodes: %w", err)
		}
		// Until the manager has seen it, the pool still has nodes.
		var last error
		err = until(ctx, time.Minute, 100*time.Millisecond, func() (bool, error) {
			last = b.admin.RESTClient().Delete().AbsPath(poolsPath, name).Do(ctx).Error()
			return last == nil || apierrors.IsNotFound(last), nil
		})
		if err != nil {
			return fmt.Errorf("delete pool %s: %w: %w", name, err, last)
		}
	}
	return nil
}

// poolsKnow waits until the manager has counted the pools' nodes and, where
// they share, chosen their leaders.
func (b *bench) poolsKnow(ctx context.Context, names []string, nodes int, shared bool) error {
	wanting := ""
	err := until(ctx, 2*time.Minute, 200*time.Millisecond, func() (bool, error) {
		all, err := b.listPools(ctx)
		if err != nil {
			return false, err
		}
		for _, name := range names {
			i := slices.IndexFunc(all, func(p v1beta2.NodePool) bool { return p.Name == name })
			if i < 0 {
				return false, errors.New("pool " + name + " is gone")
			}
			if s := all[i].Status; len(s.Nodes) != nodes || shared != (len(s.LeaderEndpoints) > 0) {
				wanting = fmt.Sprintf("%s has %d of %d nodes and %d leaders", name, len(s.Nodes), nodes, len(s.LeaderEndpoints))
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("wait for yurt-manager: %s: %w (log: %s)", wanting, err, b.manager.lastWords())
	}
	return nil
}

func (b *bench) listPools(ctx context.Context) ([]v1beta2.NodePool, error) {
	text, err := b.admin.RESTClient().Get().AbsPath(poolsPath).DoRaw(ctx)
	if err != nil {
		return nil, fmt.Errorf("list pools: %w", err)
	}
	var all v1beta2.NodePoolList
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, fmt.Errorf("list pools: %w", err)
	}
	return all.Items, nil
}

func (m *manager) lastWords() string {
	text, err := os.ReadFile(m.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-1000):])
}
