package secrets

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/test/bed"
	"github.com/yurt-edge/yurt/test/swtpm"
)

// patience is how long a test waits for what must happen soon.
const patience = 30 * time.Second

// Set by TestMain and read by tests.
var (
	cloud   *playground.ControlPlane
	yurthub string // the program
	base    string // holds everything
	systemd *listener
)

func TestMain(m *testing.M) { os.Exit(bed.Run(m, "secrets", setUp)) }

func setUp(ctx context.Context, dir string) (tearDown func() error, err error) {
	base = dir
	if cloud, err = playground.StartControlPlane(ctx, playground.ControlPlaneConfig{
		Dir: filepath.Join(base, "cloud"), ControllerManager: true,
	}); err != nil {
		return nil, err
	}
	tearDown = func() error {
		cloud.Stop()
		return nil
	}
	if yurthub, err = bed.Build(ctx); err != nil {
		return tearDown, err
	}
	if systemd, err = listen(filepath.Join(base, "notify")); err != nil {
		return tearDown, err
	}
	// For the hubs: where temporary files go, and where systemd would listen.
	tmp := filepath.Join(base, "tmp")
	return tearDown, errors.Join(os.Mkdir(tmp, 0o700), os.Setenv("TMPDIR", tmp), os.Setenv("NOTIFY_SOCKET", filepath.Join(base, "notify")))
}

// listener is systemd's end of the socket to which a service reports.
type listener struct {
	conn *net.UnixConn

	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func listen(path string) (*listener, error) {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	l := &listener{conn: conn}
	go func() { // ends when the socket is closed
		buf := make([]byte, 64<<10)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			l.mu.Lock()
			l.text.Write(buf[:n])
			l.text.WriteByte('\n')
			l.mu.Unlock()
		}
	}()
	return l, nil
}

func (l *listener) said() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.text.Bytes())
}

// edge is a node with its hub, and what is secret there.
type edge struct {
	*testing.T
	*finder
	node, space string
	hub         *bed.Hub
	link        *bed.Link
	admin       *kubernetes.Clientset
	inCloud     []string // names of secrets that the cloud's disk has
}

func (e *edge) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

func (e *edge) await(try func(context.Context) error) {
	e.Helper()
	e.must(bed.Until(e.Context(), patience, try))
}

// stored plants a secret that is sent to the cloud as well.
func (e *edge) stored(name string) string {
	e.inCloud = append(e.inCloud, name)
	return e.plant(name)
}

// token makes e find a token, by the part without which it is worthless.
func (e *edge) token(name, token string) {
	e.Helper()
	signature := token[strings.LastIndex(token, ".")+1:]
	if len(signature) < 40 {
		e.Fatalf("%s is no signed token", name)
	}
	e.know(name, signature)
}

// TestNothingSecretIsLeft is the promise: whatever goes through a hub, its
// disk, its log and its status line show none of it.
func TestNothingSecretIsLeft(t *testing.T) {
	t.Parallel()
	for i, source := range []string{"tpm", "file", "passphrase"} {
		t.Run(source, func(t *testing.T) {
			t.Parallel()
			e := &edge{T: t, finder: newFinder(), node: fmt.Sprintf("edge-%d", i+1), space: "secrets-" + source}
			e.start(source)
			e.traffic()
			e.look(source)
		})
	}
}

// start makes a node whose key comes from the source, with a pod on it.
func (e *edge) start(source string) {
	var err error
	e.admin, err = cloud.Client()
	e.must(err)
	e.await(func(ctx context.Context) error {
		return cloud.Apply(ctx, strings.NewReplacer("NODE", e.node, "SPACE", e.space).Replace(fixture))
	})
	e.link, err = bed.NewLink(cloud.RESTConfig().Host)
	e.must(err)
	e.Cleanup(e.link.Close)
	e.hub, err = bed.NewHub(e.Context(), cloud, yurthub, e.node, filepath.Join(base, e.node), e.link.URL())
	e.must(err)
	e.Cleanup(e.hub.Kill)
	e.hub.Args = append([]string{"--store-key-source", source}, e.places(source)...)
	e.know("private key", "PRIVATE KEY-----")
	// How an EC key begins in PEM, and what ends it in DER.
	e.add("EC key in PEM", "MHcCAQEEI")
	e.add("EC key in DER", "\xa0\x0a\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07")

	// The operator's bootstrap file is gone before anybody looks.
	boot := filepath.Join(e.hub.Dir, "bootstrap.conf")
	text, err := os.ReadFile(boot)
	e.must(err)
	_, rest, _ := strings.Cut(string(text), "token: ")
	secret, _, _ := strings.Cut(rest, "\n")
	if len(secret) != 23 {
		e.Fatalf("no bootstrap token in %s", text)
	}
	e.know("bootstrap token", secret[7:])
	e.must(e.hub.Start(e.Context()))
	e.must(os.Remove(boot))
}

// places are the flags that say where the key is.
func (e *edge) places(source string) []string {
	switch source {
	case "tpm":
		chip, err := swtpm.New(e.Context())
		e.must(err)
		e.Cleanup(func() { e.must(chip.Close()) })
		return []string{"--tpm-device", chip.Socket}
	case "passphrase":
		file := filepath.Join(base, "passphrase-of-"+e.node)
		e.must(os.WriteFile(file, []byte(e.plant("passphrase")), 0o600))
		return []string{"--store-key-passphrase-file", file}
	}
	return nil
}

const fixture = `
apiVersion: v1
kind: Namespace
metadata: {name: SPACE}
---
apiVersion: v1
kind: Node
metadata: {name: NODE}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: app, namespace: SPACE}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: app, namespace: SPACE}
rules:
- {apiGroups: [""], resources: [secrets, configmaps, pods, events], verbs: ["*"]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: app, namespace: SPACE}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: app}
subjects:
- {kind: ServiceAccount, name: app, namespace: SPACE}
`

// client is a client of the hub.
func (e *edge) client(cfg *rest.Config, contentType string) *kubernetes.Clientset {
	e.Helper()
	cfg.ContentType, cfg.AcceptContentTypes = contentType, contentType
	client, err := kubernetes.NewForConfig(cfg)
	e.must(err)
	return client
}

func (e *edge) kubelet(contentType string) *kubernetes.Clientset {
	e.Helper()
	cfg, err := e.hub.KubeletConfig()
	e.must(err)
	return e.client(cfg, contentType)
}

// pod is a client with a ServiceAccount's token.
func (e *edge) pod(token, contentType string) *kubernetes.Clientset {
	e.Helper()
	cfg, err := e.hub.RESTConfig(&rest.Config{QPS: -1, BearerToken: token})
	e.must(err)
	return e.client(cfg, contentType)
}

// ask sends a request as it is and returns the code of the answer.
func (e *edge) ask(method, path, token, contentType, body string) int {
	e.Helper()
	cfg, err := e.hub.KubeletConfig()
	e.must(err)
	if token != "" {
		cfg, err = e.hub.RESTConfig(&rest.Config{BearerToken: token})
		e.must(err)
	}
	client, err := rest.HTTPClientFor(cfg)
	e.must(err)
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(e.Context(), method, e.hub.URL+path, strings.NewReader(body))
	e.must(err)
	req.Header.Set("Content-Type", contentType)
	resp, err := client.Do(req)
	e.must(err)
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	e.must(err)
	return resp.StatusCode
}

const (
	inJSON  = "application/json"
	inProto = "application/vnd.kubernetes.protobuf"
)

var fromReplica = metav1.ListOptions{ResourceVersion: "0"}

// traffic sends secrets through the hub online, offline, through a crash, a
// rotation of the key and damage of the disk.
func (e *edge) traffic() {
	ctx := e.Context()
	e.objects()
	pod := e.online()
	e.offline(pod)

	e.hub.Kill() // with the journal full
	e.rotate()
	e.must(e.hub.Start(ctx))
	e.rotate() // while it runs
	e.must(e.link.Heal())
	e.await(func(ctx context.Context) error {
		_, err := e.admin.CoreV1().Events(e.space).Get(ctx, "offline", metav1.GetOptions{})
		return err
	})
	e.damage()
	// Changed once more, so that old pages are free pages.
	for _, name := range []string{"text", "large", "binary"} {
		data := map[string][]byte{"changed": []byte(e.stored("changed " + name))}
		patch, err := json.Marshal(map[string]any{"data": data})
		e.must(err)
		_, err = e.admin.CoreV1().Secrets(e.space).Patch(ctx, name, "application/merge-patch+json", patch, metav1.PatchOptions{})
		e.must(err)
	}
	e.await(func(ctx context.Context) error {
		held, err := e.kubelet(inProto).CoreV1().Secrets(e.space).List(ctx, metav1.ListOptions{ResourceVersion: "0", FieldSelector: "metadata.name=text"})
		if err == nil && (len(held.Items) != 1 || held.Items[0].Data["changed"] == nil) {
			err = errors.New("the hub has not seen the change")
		}
		return err
	})
	e.hub.Stop()
}

// objects makes Secrets, and a pod that uses them, so that its node may read
// them.
func (e *edge) objects() {
	ctx := e.Context()
	spec := corev1.PodSpec{
		NodeName: e.node, ServiceAccountName: "app", Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Containers: []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
	}
	for name, data := range map[string]string{
		"text":    e.stored("secret text"),
		"escaped": e.stored("secret escaped") + "\"<&>\\\n\u00fc",
		"large":   strings.Repeat("well compressed ", 500) + e.stored("secret large"),
		"binary":  "\x00\x01\xff" + e.stored("secret binary") + "\xfe",
	} {
		_, err := e.admin.CoreV1().Secrets(e.space).Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string][]byte{"value": []byte(data)},
		}, metav1.CreateOptions{})
		e.must(err)
		spec.Volumes = append(spec.Volumes, corev1.Volume{
			Name: name, VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: name}},
		})
	}
	_, err := e.admin.CoreV1().Pods(e.space).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "app"}, Spec: spec,
	}, metav1.CreateOptions{})
	e.must(err)
}

func (e *edge) request(pod *corev1.Pod, audiences ...string) *authenticationv1.TokenRequest {
	return &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:      audiences,
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
}

func (e *edge) online() *corev1.Pod {
	ctx := e.Context()
	var pod *corev1.Pod
	e.await(func(ctx context.Context) error {
		mine, err := e.kubelet(inProto).CoreV1().Pods("").List(ctx, metav1.ListOptions{ResourceVersion: "0", FieldSelector: "spec.nodeName=" + e.node})
		if err == nil && len(mine.Items) != 1 {
			err = fmt.Errorf("%d pods on the node", len(mine.Items))
		}
		if err == nil {
			pod = &mine.Items[0]
		}
		return err
	})
	_, err := e.kubelet(inProto).CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0", FieldSelector: "metadata.name=" + e.node})
	e.must(err)
	for _, form := range []string{inProto, inJSON} {
		secrets := e.kubelet(form).CoreV1().Secrets(e.space)
		for _, name := range []string{"text", "escaped", "large", "binary"} {
			_, err := secrets.Get(ctx, name, metav1.GetOptions{})
			e.must(err)
			held, err := secrets.List(ctx, metav1.ListOptions{ResourceVersion: "0", FieldSelector: "metadata.name=" + name})
			e.must(err)
			if len(held.Items) != 1 || len(held.Items[0].Data["value"]) < 40 {
				e.Fatalf("the node sees %d secrets of the name %s", len(held.Items), name)
			}
		}
	}
	// The kubelet gets a token for the pod, and the pod reads with it.
	made, err := e.kubelet(inProto).CoreV1().ServiceAccounts(e.space).CreateToken(ctx, "app", e.request(pod), metav1.CreateOptions{})
	e.must(err)
	token := made.Status.Token
	e.token("token", token)
	for _, form := range []string{inProto, inJSON} {
		secrets := e.pod(token, form).CoreV1().Secrets(e.space)
		_, err := secrets.List(ctx, fromReplica)
		e.must(err)
		_, err = secrets.Get(ctx, "large", metav1.GetOptions{})
		e.must(err)
		_, err = secrets.Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: "made-" + strings.ToLower(random(6))},
			StringData: map[string]string{"value": e.stored("forwarded " + form)},
		}, metav1.CreateOptions{})
		e.must(err)
	}
	// Others' tokens are reviewed for the kubelet, and opaque ones refused.
	_, err = e.kubelet(inJSON).AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token},
	}, metav1.CreateOptions{})
	e.must(err)
	e.refusals(token)
	return pod
}

// refusals sends secrets in requests that the hub cannot or must not take.
func (e *edge) refusals(token string) {
	e.Helper()
	path := "/api/v1/namespaces/" + e.space
	broken := strings.Split(token, ".")
	for what, bad := range map[string]string{
		"opaque":        e.plant("opaque token"),
		"forged":        broken[0] + "." + broken[1] + "." + e.plant("forged token"),
		"half":          broken[0] + "." + e.plant("half a token"),
		"not a header":  e.plant("token with spaces") + " " + e.plant("more of it"),
		"very long one": strings.Repeat(e.plant("long token"), 500),
	} {
		if code := e.ask(http.MethodGet, path+"/secrets", bad, inJSON, ""); code != http.StatusUnauthorized {
			e.Errorf("%s token: %d", what, code)
		}
	}
	for _, form := range []string{inJSON, inProto, "application/merge-patch+json", "application/strategic-merge-patch+json", "text/plain"} {
		for _, body := range []string{
			`{"kind":"Secret","data":"` + e.plant("body") + `"}`,
			`{"metadata":{"name":1},"status":{"phase":{"a":"` + e.plant("body of wrong type") + `"}},"spec":"` + e.plant("spec of wrong type") + `","message":["` + e.plant("message of wrong type") + `"]}`,
			e.plant("no body at all"),
			"k8s\x00" + e.plant("protobuf that is none"),
			"\x1f\x8b\x08" + e.plant("gzip that is none"),
		} {
			for method, paths := range map[string][]string{
				http.MethodPost:  {"/events", "/serviceaccounts/app/token", "/secrets", "/pods"},
				http.MethodPatch: {"/pods/app/status", "/pods/app", "/events/offline", "/secrets/text"},
				http.MethodPut:   {"/pods/app/status", "/secrets/text"},
			} {
				for _, p := range paths {
					for _, as := range []string{"", token} {
						if code := e.ask(method, path+p, as, form, body); code < 400 && method != http.MethodPatch {
							// A patch of fields that nobody knows changes nothing.
							e.Errorf("%s %s in %s: %d", method, p, form, code)
						}
					}
				}
			}
			for _, p := range []string{
				"/apis/authentication.k8s.io/v1/tokenreviews", "/apis/authorization.k8s.io/v1/subjectaccessreviews",
				"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", "/api/v1/nodes",
			} {
				e.ask(http.MethodPost, p, "", form, body)
			}
		}
	}
	// In the query, as an exec has its command.
	e.ask(http.MethodPost, path+"/pods/app/exec?command="+e.plant("command"), "", inJSON, "")
	e.ask(http.MethodGet, path+"/pods?labelSelector=(("+e.plant("selector"), "", inJSON, "")
}

func (e *edge) offline(pod *corev1.Pod) {
	ctx := e.Context()
	e.must(e.link.Cut(bed.Down))
	e.await(func(ctx context.Context) error {
		if code := e.ask(http.MethodGet, "/readyz", "", inJSON, ""); code != http.StatusServiceUnavailable {
			return fmt.Errorf("/readyz: %d", code)
		}
		return ctx.Err()
	})
	node := e.kubelet(inProto)
	for audience, name := range map[string]string{"": "kept token", "vault": "token of the node"} {
		request := e.request(pod)
		if audience != "" {
			request = e.request(pod, audience)
		}
		made, err := node.CoreV1().ServiceAccounts(e.space).CreateToken(ctx, "app", request, metav1.CreateOptions{})
		e.must(err)
		e.token(name, made.Status.Token)
		if audience == "" {
			held, err := e.pod(made.Status.Token, inJSON).CoreV1().Secrets(e.space).List(ctx, fromReplica)
			e.must(err)
			if len(held.Items) < 4 {
				e.Errorf("offline the pod sees %d secrets", len(held.Items))
			}
		}
		e.refusals(made.Status.Token)
	}
	_, err := node.CoreV1().Events(e.space).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: "offline", Namespace: e.space},
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: e.space, Name: pod.Name, UID: pod.UID},
		Reason:         "Failed", Type: corev1.EventTypeWarning, Count: 1, Message: e.stored("event"),
		Source: corev1.EventSource{Component: "kubelet", Host: e.node},
	}, metav1.CreateOptions{})
	e.must(err)
	for _, status := range []map[string]any{
		{"phase": "Running", "message": e.stored("status")},
		// Kept here, and refused by the cloud: what it says of it is not
		// for the log either.
		{"conditions": []map[string]any{{"type": "Ready", "status": e.plant("status that the cloud refuses")}}},
	} {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": pod.UID}, "status": status})
		e.must(err)
		e.ask(http.MethodPatch, "/api/v1/namespaces/"+e.space+"/pods/app/status", "", "application/strategic-merge-patch+json", string(patch))
	}
}

// rotate replaces the node key by a new one of the same source.
func (e *edge) rotate() {
	e.Helper()
	args := append([]string{"key", "rotate", "--root-dir", e.hub.Dir}, e.hub.Args[2:]...)
	out, err := exec.CommandContext(e.Context(), yurthub, args...).CombinedOutput()
	if err != nil {
		e.Fatalf("rotate: %v: %s", err, out)
	}
	if found := e.find(out); len(found) > 0 {
		e.Errorf("rotate said %v", found)
	}
}

// damage spoils objects in the store, and then its structure.
func (e *edge) damage() {
	e.hub.Stop()
	path := filepath.Join(e.hub.Dir, "store", "hub.db")
	data, err := os.ReadFile(path)
	e.must(err)
	// A byte of each page in which values lie.
	for at := 4096 + 3000; at < len(data); at += 4096 {
		data[at] ^= 1
	}
	e.must(os.WriteFile(path, data, 0o600))
	e.must(e.hub.Start(e.Context()))
	e.online()
	e.hub.Stop()
	if data, err = os.ReadFile(path); err == nil {
		for at := range 8192 {
			data[at] = 0xff
		}
		err = os.WriteFile(path, data, 0o600)
	}
	e.must(err)
	e.must(e.hub.Start(e.Context()))
	e.online()
	if _, err := os.Stat(path + ".damaged"); err != nil {
		e.Errorf("no store was set aside: %v", err)
	}
}

// look searches everything.
func (e *edge) look(source string) {
	// That they would be found, were they there: the cloud seals nothing.
	there, _ := e.tree(e.T, filepath.Join(base, "cloud"), nil)
	for _, name := range e.inCloud {
		if !slices.ContainsFunc([]string{" plain", " base64"}, func(form string) bool { return len(there[name+form]) > 0 }) {
			e.Errorf("%s is not even found in the cloud", name)
		}
	}
	keys := 0
	found, size := e.tree(e.T, e.hub.Dir, func(name string) bool {
		isKey := strings.HasPrefix(name, "node-")
		if isKey {
			keys++
		}
		return isKey
	})
	for name, files := range found {
		e.Errorf("%s is in %q", name, files)
	}
	if want := map[string]int{"file": 2}[source]; keys != want {
		e.Errorf("%d copies of a key file are on the disk, want %d", keys, want)
	}
	log, err := os.ReadFile(filepath.Join(e.hub.Dir, "hub.log"))
	e.must(err)
	for _, want := range []string{"level=DEBUG", "level=WARN", "level=ERROR", "link is down", "damaged"} {
		if !bytes.Contains(log, []byte(want)) {
			e.Errorf("the log lacks %q: this test provokes too little", want)
		}
	}
	temporary, _ := e.tree(e.T, filepath.Join(base, "tmp"), nil)
	for name, files := range temporary {
		e.Errorf("%s is in %q", name, files)
	}
	said := systemd.said()
	if !bytes.Contains(said, []byte("STATUS=offline")) {
		e.Errorf("systemd was told %q", said)
	}
	for name := range e.find(said) {
		e.Errorf("%s was told to systemd", name)
	}
	e.Logf("%d secrets and tokens in %d pieces, none in %d bytes of disk and %d of log", len(e.inCloud), len(e.pieces), size, len(log))
}
