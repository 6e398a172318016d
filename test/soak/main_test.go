package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/test/bed"
)

const (
	namespace = "soak"
	objects   = 10000
	mapPath   = "/api/v1/namespaces/" + namespace + "/configmaps"
)

// fixture lets a ServiceAccount do anything that the soak asks of it.
const fixture = `
apiVersion: v1
kind: Namespace
metadata: {name: soak}
---
apiVersion: v1
kind: Node
metadata: {name: edge-1}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: pod, namespace: soak}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: soak-reader}
rules:
- {apiGroups: [""], resources: [configmaps], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: soak-reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: soak-reader}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:nodes"}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: soak-pod}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: ServiceAccount, name: pod, namespace: soak}]
`

// world is what the tests share. They run one after the other.
type world struct {
	*bed.Bed
	admin *kubernetes.Clientset
	least float64 // goroutines of the hub, when fewest were seen
}

var shared *world // set by TestMain

func TestMain(m *testing.M) {
	if os.Getenv(floodEnv) != "" {
		flood(os.Getenv(floodEnv))
		return
	}
	os.Exit(bed.Run(m, "soak", setUp))
}

func setUp(ctx context.Context, dir string) (tearDown func() error, err error) {
	b, err := bed.New(ctx, dir, bed.Config{CertificateLife: bed.Short})
	if err != nil {
		return nil, err
	}
	tearDown = func() error {
		b.Close()
		return nil
	}
	shared = &world{Bed: b}
	if shared.admin, err = b.Cloud.Client(); err != nil {
		return tearDown, err
	}
	if err := bed.Until(ctx, time.Minute, func(ctx context.Context) error { return b.Cloud.Apply(ctx, fixture) }); err != nil {
		return tearDown, err
	}
	return tearDown, shared.fill(ctx)
}

// fill makes as many objects as a large pool has pods.
func (w *world) fill(ctx context.Context) error {
	cfg := w.Cloud.RESTConfig()
	cfg.QPS = -1
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	text := strings.Repeat("a line of some configuration\n", 10)
	g, ctx := errgroup.WithContext(ctx)
	const writers = 16
	for n := range writers {
		g.Go(func() error {
			for i := n; i < objects; i += writers {
				_, err := client.CoreV1().ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{
					ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("object-%05d", i), Labels: map[string]string{"shard": strconv.Itoa(i % 100)}},
					Data:       map[string]string{"text": text},
				}, metav1.CreateOptions{})
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// token makes a new token of the pods' account.
func (w *world) token(ctx context.Context) (string, error) {
	made, err := w.admin.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, "pod", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return made.Status.Token, nil
}

// caller is one connection to the hub, or more if it asks for more at a time.
type caller struct {
	base, token string
	client      *http.Client
}

// caller returns a client with connections of its own; "" is the kubelet.
func (w *world) caller(token string) (*caller, error) {
	cfg, err := w.Hub.KubeletConfig()
	if token != "" {
		cfg, err = w.Hub.RESTConfig(&rest.Config{})
	}
	if err != nil {
		return nil, err
	}
	return newCaller(cfg, token)
}

func newCaller(cfg *rest.Config, token string) (*caller, error) {
	t, err := rest.TLSConfigFor(cfg)
	if err != nil {
		return nil, err
	}
	return &caller{base: cfg.Host, token: token, client: &http.Client{Transport: &http.Transport{
		TLSClientConfig: t, DisableCompression: true, MaxIdleConnsPerHost: 256,
	}}}, nil
}

func (c *caller) close() { c.client.CloseIdleConnections() }

func (c *caller) open(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/vnd.kubernetes.protobuf, application/json")
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	return c.client.Do(req)
}

// get reads an answer to its end and returns its code and size.
func (c *caller) get(ctx context.Context, path string) (int, int64, error) {
	resp, err := c.open(ctx, path)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, n, err
}

// want is get of what must be answered with 200.
func (c *caller) want(ctx context.Context, path string) error {
	code, _, err := c.get(ctx, path)
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("%s: %d", path, code)
	}
	return err
}

// holds waits until the hub itself can list all objects.
func (w *world) holds(ctx context.Context, c *caller) error {
	return bed.Until(ctx, 2*time.Minute, func(ctx context.Context) error {
		code, size, err := c.get(ctx, mapPath+"?resourceVersion=0")
		if err == nil && (code != http.StatusOK || size < objects*300) {
			err = fmt.Errorf("the list is %d, %d bytes", code, size)
		}
		return err
	})
}

// vitals are what must not grow.
type vitals struct {
	at                                                    time.Time
	goroutines, heap, descriptors, resident, scopes, disk float64
}

func (v vitals) values() map[string]float64 {
	return map[string]float64{
		"goroutines": v.goroutines, "live heap MB": v.heap, "descriptors": v.descriptors,
		"anonymous MB": v.resident, "scopes": v.scopes, "disk MB": v.disk,
	}
}

// measure looks at the hub's process. The heap is what a collection leaves,
// which the question itself asks for.
func (w *world) measure(ctx context.Context, token string) (vitals, error) {
	v := vitals{at: time.Now()}
	health, err := newHealth(w.Hub.Health, token)
	if err != nil {
		return v, err
	}
	text, err := health(ctx, "/debug/pprof/heap?gc=1&debug=1")
	if err != nil {
		return v, err
	}
	_, rest, _ := strings.Cut(text, "# HeapAlloc = ")
	if _, err := fmt.Sscan(rest, &v.heap); err != nil {
		return v, fmt.Errorf("find the heap's size in its profile: %w", err)
	}
	v.heap /= 1e6
	// What the work left behind ends within moments: goroutines that serve
	// connections just closed, on a busy machine. A leak does not end.
	deadline, tick := time.Now().Add(restBudget), time.NewTicker(100*time.Millisecond)
	defer tick.Stop()
	for {
		if text, err = health(ctx, "/metrics"); err != nil {
			return v, err
		}
		v.read(text)
		if w.least == 0 || v.goroutines < w.least {
			w.least = v.goroutines
		}
		if v.goroutines <= w.least*1.1 || time.Now().After(deadline) {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
	if text, err = health(ctx, "/v1/status"); err != nil {
		return v, err
	}
	var status struct {
		StoreBytes float64 `json:"storeBytes"`
	}
	if err := json.Unmarshal([]byte(text), &status); err != nil {
		return v, err
	}
	v.disk = status.StoreBytes / 1e6
	v.resident, err = anonymous(w.Hub.PID())
	return v, err
}

// restBudget is how long a measurement waits for the hub to come to rest.
const restBudget = 2 * time.Second

// read takes the figures that are in the hub's metrics.
func (v *vitals) read(metrics string) {
	for line := range strings.Lines(metrics) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, _ := strconv.ParseFloat(value, 64) // other lines are not numbers
		switch name {
		case "go_goroutines":
			v.goroutines = n
		case "process_open_fds":
			v.descriptors = n
		case "node_yurthub_replica_scopes":
			v.scopes = n
		}
	}
}

func newHealth(base, token string) (func(context.Context, string) (string, error), error) {
	return func(ctx context.Context, path string) (string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
		if err != nil {
			return "", err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s: %.200s", path, resp.Status, text)
		}
		return string(text), err
	}, nil
}

// anonymous is the memory of a process that is not a file's, in MB.
func anonymous(pid int) (float64, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "Anonymous:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb * 1024 / 1e6, err
		}
	}
	return 0, errors.New("the kernel tells nothing of anonymous memory")
}
