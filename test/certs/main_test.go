package certs

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/test/bed"
)

// patience is how long a test waits for what must happen soon. Nothing waits
// that long when all is well.
const patience = 90 * time.Second

// world is a control plane whose certificates a Signer signs.
type world struct {
	cloud  *playground.ControlPlane
	signer *bed.Signer
	admin  *kubernetes.Clientset
	dir    string
}

// shared is set by TestMain and read by tests.
var shared *world

func TestMain(m *testing.M) {
	os.Exit(bed.Run(m, "certs", func(ctx context.Context, dir string) (func() error, error) {
		// The tests wait more than they work.
		if err := flag.Set("test.parallel", "8"); err != nil {
			return nil, err
		}
		var err error
		if shared, err = newWorld(ctx, filepath.Join(dir, "shared")); err != nil {
			return nil, err
		}
		return shared.close, nil
	}))
}

func newWorld(ctx context.Context, dir string, flags ...string) (*world, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	cfg := playground.ControlPlaneConfig{Dir: filepath.Join(dir, "cloud"), ControllerManager: true, ControllerManagerFlags: flags}
	bed.WithSigner(&cfg)
	cloud, err := playground.StartControlPlane(ctx, cfg)
	if err != nil {
		return nil, err
	}
	w := &world{cloud: cloud, dir: dir}
	w.signer, err = bed.NewSigner(cloud, bed.Short)
	if err == nil {
		w.admin, err = cloud.Client()
	}
	if err == nil {
		err = cloud.Apply(ctx, "apiVersion: v1\nkind: Namespace\nmetadata: {name: certs}\n")
	}
	if err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *world) close() error {
	defer w.cloud.Stop()
	if w.signer == nil {
		return nil
	}
	return w.signer.Close()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await repeats try until it gives no error or patience is over.
func await(t *testing.T, what string, try func(context.Context) error) {
	t.Helper()
	if err := bed.Until(t.Context(), patience, try); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// node is what a test knows of one: an account with a pod on it, a ConfigMap
// that the account reads and a Service that every node reads.
const node = `
apiVersion: v1
kind: Node
metadata: {name: NODE}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: NODE, namespace: certs}
---
apiVersion: v1
kind: Pod
metadata: {name: NODE, namespace: certs}
spec:
  nodeName: NODE
  serviceAccountName: NODE
  tolerations: [{operator: Exists}]
  containers: [{name: main, image: example.invalid/x:1}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: NODE, namespace: certs}
---
apiVersion: v1
kind: Service
metadata: {name: NODE, namespace: certs}
spec: {ports: [{port: 80}]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: NODE, namespace: certs}
rules: [{apiGroups: [""], resources: [configmaps], resourceNames: [NODE], verbs: [get, list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: NODE, namespace: certs}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: NODE}
subjects: [{kind: ServiceAccount, name: NODE, namespace: certs}]
`

// site is a node with its hub, behind a link, and two clients there: the
// kubelet and a pod.
type site struct {
	*world
	*bed.Hub

	link         *bed.Link
	kubelet, pod *kubernetes.Clientset
	admin        *kubernetes.Clientset // who writes
	seq          int                   // of the last write
}

// newSite makes the node and prepares its hub, which start starts.
func (w *world) newSite(t *testing.T, name string) *site {
	t.Helper()
	await(t, "node", func(ctx context.Context) error {
		return w.cloud.Apply(ctx, strings.ReplaceAll(node, "NODE", name))
	})
	link, err := bed.NewLink(w.cloud.RESTConfig().Host)
	must(t, err)
	t.Cleanup(link.Close)
	binary, err := bed.Build(t.Context())
	must(t, err)
	hub, err := bed.NewHub(t.Context(), w.cloud, binary, name, filepath.Join(w.dir, name), link.URL())
	must(t, err)
	return &site{world: w, Hub: hub, link: link, admin: w.admin}
}

// start starts the hub's process, and its clients.
func (s *site) start(t *testing.T) {
	t.Helper()
	t.Cleanup(s.Kill)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must(t, s.Start(ctx))
	s.connect(t)
}

// connect makes the clients.
func (s *site) connect(t *testing.T) {
	t.Helper()
	pod, err := s.admin.CoreV1().Pods("certs").Get(t.Context(), s.Node, metav1.GetOptions{})
	must(t, err)
	token, err := s.admin.CoreV1().ServiceAccounts("certs").CreateToken(t.Context(), s.Node, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{
			BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
		},
	}, metav1.CreateOptions{})
	must(t, err)
	cfg, err := s.KubeletConfig()
	must(t, err)
	s.kubelet, err = kubernetes.NewForConfig(cfg)
	must(t, err)
	cfg, err = s.RESTConfig(&rest.Config{QPS: -1, BearerToken: token.Status.Token})
	must(t, err)
	s.pod, err = kubernetes.NewForConfig(cfg)
	must(t, err)
}

const seqKey = "certs.test/seq"

// write changes the ConfigMap and the Service in the cloud, with the next
// number.
func (s *site) write(t *testing.T) {
	t.Helper()
	s.seq++
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:"%d"}}}`, seqKey, s.seq)
	_, err := s.admin.CoreV1().ConfigMaps("certs").Patch(t.Context(), s.Node, types.MergePatchType, patch, metav1.PatchOptions{})
	must(t, err)
	_, err = s.admin.CoreV1().Services("certs").Patch(t.Context(), s.Node, types.MergePatchType, patch, metav1.PatchOptions{})
	must(t, err)
}

// watcher has one watch, which must not end and must show each write once and
// in order.
type watcher struct {
	name string
	end  func() // ends the watch

	mu   sync.Mutex // guards the following
	seen int
	err  error
}

// watch begins the watches of both clients: the kubelet's of the Service, which
// the hub follows by its own right, the pod's of the ConfigMap, which it follows
// by the pod's. They have seen all writes until now.
func (s *site) watch(t *testing.T) []*watcher {
	t.Helper()
	options := metav1.ListOptions{FieldSelector: "metadata.name=" + s.Node, TimeoutSeconds: new(int64(3600))}
	s.write(t)
	return []*watcher{
		s.watchBy(t, s.Node+"'s kubelet", func(ctx context.Context) (watch.Interface, error) {
			return s.kubelet.CoreV1().Services("certs").Watch(ctx, options)
		}),
		s.watchBy(t, s.Node+"'s pod", func(ctx context.Context) (watch.Interface, error) {
			return s.pod.CoreV1().ConfigMaps("certs").Watch(ctx, options)
		}),
	}
}

func (s *site) watchBy(t *testing.T, name string, open func(context.Context) (watch.Interface, error)) *watcher {
	t.Helper()
	// It must outlive the test's own context, whose end it would show.
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var stream watch.Interface
	await(t, "watch of "+name, func(context.Context) (err error) {
		stream, err = open(ctx)
		return err
	})
	w := &watcher{name: name}
	var running sync.WaitGroup
	running.Go(func() {
		for ev := range stream.ResultChan() {
			w.take(ev)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if ctx.Err() == nil && w.err == nil {
			w.err = fmt.Errorf("the watch ended after write %d", w.seen)
		}
	})
	w.end = sync.OnceFunc(func() {
		w.mu.Lock()
		if w.err != nil {
			t.Errorf("%s: %v", w.name, w.err)
		}
		w.mu.Unlock()
		cancel()
		stream.Stop()
		running.Wait()
	})
	t.Cleanup(w.end)
	s.sees(t, w)
	return w
}

// take takes an event. The first shows what there was.
func (w *watcher) take(ev watch.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	object, ok := ev.Object.(metav1.Object)
	if !ok {
		w.err = fmt.Errorf("the watch showed %v after write %d", ev, w.seen)
		return
	}
	n, err := strconv.Atoi(object.GetAnnotations()[seqKey])
	if w.seen > 0 && n != w.seen+1 {
		w.err = errors.Join(fmt.Errorf("after write %d the watch showed %s of write %d", w.seen, ev.Type, n), err)
	}
	w.seen = n
}

// sees waits until the watchers have seen all writes.
func (s *site) sees(t *testing.T, all ...*watcher) {
	t.Helper()
	for _, w := range all {
		await(t, w.name, func(context.Context) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.err != nil {
				t.Fatalf("%s: %v", w.name, w.err)
			}
			if w.seen < s.seq {
				return fmt.Errorf("it has seen write %d of %d", w.seen, s.seq)
			}
			return nil
		})
	}
}

// whoami asks the cloud through the hub who the kubelet is: the hub's own
// certificate is what the cloud goes by.
func (s *site) whoami(ctx context.Context) error {
	review, err := s.kubelet.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	if name := review.Status.UserInfo.Username; name != "system:node:"+s.Node {
		return fmt.Errorf("to the cloud the node is %s", name)
	}
	return nil
}

// reads reads from the replica, as the kubelet and as the pod.
func (s *site) reads(ctx context.Context) error {
	options := metav1.GetOptions{ResourceVersion: "0"}
	_, err := s.kubelet.CoreV1().Services("certs").Get(ctx, s.Node, options)
	if err != nil {
		return fmt.Errorf("the kubelet: %w", err)
	}
	if _, err = s.pod.CoreV1().ConfigMaps("certs").Get(ctx, s.Node, options); err != nil {
		return fmt.Errorf("the pod: %w", err)
	}
	return nil
}

// certificate is the hub's client certificate as it is on disk.
func (s *site) certificate(t *testing.T) *x509.Certificate {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.Dir, "pki", "hub-client.pem"))
	must(t, err)
	block, _ := pem.Decode(text)
	leaf, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	return leaf
}
