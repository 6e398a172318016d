package conform

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/api/crds"
	"github.com/yurt-edge/yurt/test/bed"
)

//go:embed testdata
var testdata embed.FS

// patience is how long a test waits for what must happen soon.
const patience = 30 * time.Second

// world is a control plane with the fixture in it, which tests share. A test
// that cuts or restarts a hub, or holds it to its limits, has one of its own.
type world struct {
	*bed.Bed
	admin  *kubernetes.Clientset
	tokens map[string]string // by service account
}

// The worlds, set by TestMain and read by tests. In the calm one tests change
// nothing that is compared, so that two servers can be asked about it one after
// the other. In the busy one they do as they like with what they have made. So
// all tests run side by side.
var calm, busy *world

// sideBySide is how many tests run at once: they wait more than they work.
const sideBySide = 8

func TestMain(m *testing.M) { os.Exit(bed.Run(m, "conform", setUp)) }

func setUp(ctx context.Context, dir string) (tearDown func() error, err error) {
	if err := flag.Set("test.parallel", strconv.Itoa(sideBySide)); err != nil {
		return nil, err
	}
	audit, err := auditFlags(dir)
	if err != nil {
		return nil, err
	}
	alive, end := context.WithCancel(context.Background()) //nolint:gosec // tearDown ends it
	var beating sync.WaitGroup
	tearDown = func() error {
		end()
		beating.Wait()
		for _, w := range []*world{calm, busy} {
			if w != nil {
				w.Close()
			}
		}
		return nil
	}
	var starting errgroup.Group
	start := func(w **world, name string, flags ...string) {
		starting.Go(func() error {
			b, err := bed.New(ctx, filepath.Join(dir, name), bed.Config{APIServerFlags: flags})
			if err != nil {
				return err
			}
			if *w, err = newWorld(ctx, b); err != nil {
				b.Close()
			}
			return err
		})
	}
	start(&calm, "calm")
	start(&busy, "busy", audit...)
	if err := starting.Wait(); err != nil {
		return tearDown, err
	}
	for _, text := range crds.YAML() {
		if err := await(ctx, func(ctx context.Context) error { return busy.Cloud.Apply(ctx, string(text)) }); err != nil {
			return tearDown, err
		}
	}
	beating.Go(func() { calm.heartbeats(alive) })
	beating.Go(func() { busy.heartbeats(alive) })
	return tearDown, nil
}

func newWorld(ctx context.Context, b *bed.Bed) (*world, error) {
	w := &world{Bed: b, tokens: map[string]string{}}
	for _, file := range []string{"fixture.yaml", "gadgets.yaml"} {
		text, err := testdata.ReadFile("testdata/" + file)
		if err != nil {
			return nil, err
		}
		if err := await(ctx, func(ctx context.Context) error { return b.Cloud.Apply(ctx, string(text)) }); err != nil {
			return nil, err
		}
	}
	var err error
	if w.admin, err = b.Cloud.Client(); err != nil {
		return nil, err
	}
	for account, pod := range map[string]string{"reader": "web-1", "narrow": "narrow-1"} {
		if w.tokens[account], err = w.token(ctx, "conform-a", account, pod); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// heartbeats keeps the nodes alive for the controllers, which else would write
// to them while tests compare them. A beat that fails is made up for by the
// next: the controllers wait longer than that.
func (w *world) heartbeats(ctx context.Context) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		if err := w.heartbeatAll(ctx); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "heartbeat:", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (w *world) heartbeatAll(ctx context.Context) error {
	nodes, err := w.admin.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var errs []error
	for i := range nodes.Items {
		errs = append(errs, w.heartbeat(ctx, nodes.Items[i].Name))
	}
	return errors.Join(errs...)
}

// node makes a node that is ready, and that pods may be on.
func (w *world) node(t *testing.T, name string) {
	t.Helper()
	if _, err := w.admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	mustAwait(t, func(ctx context.Context) error { return w.heartbeat(ctx, name) })
}

// hub starts a hub, with a link of its own, for the time of a test.
func (w *world) hub(t *testing.T, node string, flags ...string) (*bed.Hub, *bed.Link) {
	t.Helper()
	hub, link, err := w.AddHub(t.Context(), node, flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(link.Close)
	t.Cleanup(hub.Kill)
	return hub, link
}

// heartbeat renews the node's lease, and makes the node ready if it is not.
func (w *world) heartbeat(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	leases := w.admin.CoordinationV1().Leases("kube-node-lease")
	spec := coordinationv1.LeaseSpec{HolderIdentity: &name, LeaseDurationSeconds: new(int32(40)), RenewTime: new(metav1.NowMicro())}
	patch, err := json.Marshal(map[string]any{"spec": spec})
	if err != nil {
		return err
	}
	_, err = leases.Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}, metav1.CreateOptions{})
	}
	if err != nil {
		return err
	}
	nodes := w.admin.CoreV1().Nodes()
	node, err := nodes.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	ready := []byte(`{"status":{"conditions":[{"type":"Ready","status":"True","reason":"Test"}]}}`)
	_, err = nodes.Patch(ctx, name, types.StrategicMergePatchType, ready, metav1.PatchOptions{}, "status")
	return err
}

// token makes a ServiceAccount token, bound to the pod unless that is "".
func (w *world) token(ctx context.Context, namespace, account, pod string) (string, error) {
	request := &authenticationv1.TokenRequest{}
	if pod != "" {
		p, err := w.admin.CoreV1().Pods(namespace).Get(ctx, pod, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{
			Kind: "Pod", APIVersion: "v1", Name: pod, UID: p.UID,
		}
	}
	made, err := w.admin.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, request, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return made.Status.Token, nil
}

// config is that of a client of the cloud with a bearer token.
func (w *world) config(token string) *rest.Config {
	admin := w.Cloud.RESTConfig()
	return &rest.Config{
		Host: admin.Host, QPS: -1, BearerToken: token,
		TLSClientConfig: rest.TLSClientConfig{CAData: admin.CAData},
	}
}

// await repeats try until it succeeds or patience is over.
func await(ctx context.Context, try func(context.Context) error) error {
	return bed.Until(ctx, patience, try)
}

func mustAwait(t *testing.T, try func(context.Context) error) {
	t.Helper()
	if err := await(t.Context(), try); err != nil {
		t.Fatal(err)
	}
}

// side is one of the two that are asked the same.
type side struct {
	name, base string
	http       *http.Client
}

func newSide(t *testing.T, name string, cfg *rest.Config) *side {
	t.Helper()
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.CloseIdleConnections)
	return &side{name: name, base: cfg.Host, http: client}
}

// sides returns the API server and the hub for the same caller.
func (w *world) sides(t *testing.T, hub *bed.Hub, account string) (server, edge *side) {
	t.Helper()
	token := w.tokens[account]
	return newSide(t, "API server", w.config(token)), newSide(t, "hub", w.through(t, hub, token))
}

// through is the configuration of a client of the hub.
func (w *world) through(t *testing.T, hub *bed.Hub, token string) *rest.Config {
	t.Helper()
	cfg, err := hub.RESTConfig(w.config(token))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}
