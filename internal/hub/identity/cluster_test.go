package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/fields"

	"github.com/yurt-edge/yurt/internal/hub/cert"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/playground"
)

const manifests = `
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: mounted, namespace: shop}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: other, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop}
spec:
  nodeName: edge-1
  serviceAccountName: web
  containers: [{name: web, image: web, volumeMounts: [{name: c, mountPath: /c}]}]
  volumes: [{name: c, configMap: {name: mounted}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: web, namespace: shop}
rules: [{apiGroups: [""], resources: [pods], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: web, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: web}
subjects: [{kind: ServiceAccount, name: web, namespace: shop}]
`

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("no %s", what)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// node is a hub's view of a real cluster.
type node struct {
	t       *testing.T
	cp      *playground.ControlPlane
	certs   *cert.Certificates
	api     identity.API
	memory  identity.MapMemory
	offline atomic.Bool

	authenticator *identity.Authenticator
	authorizer    *identity.Authorizer
}

func (n *node) kubectl(args ...string) string {
	n.t.Helper()
	out, err := n.cp.Kubectl(n.t.Context(), args...)
	check(n.t, err)
	return strings.TrimSpace(out)
}

// restart forgets all but the memory.
func (n *node) restart() {
	online := func() bool { return !n.offline.Load() }
	log := slog.New(slog.DiscardHandler)
	n.authenticator = identity.NewAuthenticator(identity.AuthenticatorConfig{API: n.api, Memory: &n.memory, ClusterCAs: n.certs.ClusterCAs, Online: online, Log: log})
	n.authorizer = identity.NewAuthorizer(identity.AuthorizerConfig{API: n.api, Memory: &n.memory, Online: online, Log: log})
}

func bearerRequest(token string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

// who authenticates a token; it returns nil for a 401.
func (n *node) who(token string) *identity.Caller {
	n.t.Helper()
	c, err := n.authenticator.Authenticate(bearerRequest(token))
	if err != nil && !strings.Contains(err.Error(), "token") {
		n.t.Fatal(err)
	}
	return c
}

// TestRealCluster takes a node from its bootstrap token to deciding about
// callers, against kube-apiserver and kube-controller-manager.
func TestRealCluster(t *testing.T) {
	dir := t.TempDir()
	cp, err := playground.StartControlPlane(t.Context(), playground.ControlPlaneConfig{Dir: filepath.Join(dir, "cp"), ControllerManager: true})
	check(t, err)
	defer cp.Stop()
	n := &node{t: t, cp: cp}
	n.bootstrap(dir)
	check(t, cp.Apply(t.Context(), manifests))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: n.certs.ClusterCAs(), Certificates: []tls.Certificate{*n.certs.ClientCertificate()}}}
	defer transport.CloseIdleConnections()
	n.api = identity.NewAPI(&http.Client{Transport: transport}, cp.URL)
	n.restart()
	n.learnKeys()

	bound := []string{"create", "token", "web", "--namespace=shop", "--bound-object-kind=Pod", "--bound-object-name=web-0"}
	pod := n.kubectl(bound...)
	other := n.kubectl(append(bound, "--duration=20m")...)
	vault := n.kubectl(append(bound, "--audience=vault")...)
	unseen := n.kubectl(append(bound, "--duration=30m")...)
	bootstrap, err := cp.BootstrapToken(t.Context())
	check(t, err)

	online := n.who(pod)
	if online == nil || online.Name != "system:serviceaccount:shop:web" || n.who(vault) != nil || n.who(pod+"x") != nil {
		t.Fatalf("the pod is %v", online)
	}
	seen := n.who(bootstrap)
	if seen == nil || !strings.HasPrefix(seen.Name, "system:bootstrap:") {
		t.Errorf("the bootstrap token is %v", seen)
	}

	kubelet := &http.Request{TLS: &tls.ConnectionState{PeerCertificates: []*x509.Certificate{n.certs.ClientCertificate().Leaf}}, Header: http.Header{}}
	self, err := n.authenticator.Authenticate(kubelet)
	check(t, err)
	questions := n.questions(self, online)
	for _, q := range questions {
		q.ask(n)
	}

	// The pod of this token is gone, which its signature does not tell.
	n.kubectl("delete", "pod", "web-0", "--namespace=shop", "--force", "--grace-period=0")
	eventually(t, "refusal of the token of a deleted pod", func() bool {
		n.restart()
		return n.who(other) == nil
	})

	cp.StopAPIServer()
	for _, link := range []string{"failing", "offline"} {
		n.offline.Store(link == "offline")
		n.restart()
		again := n.who(pod)
		if again == nil || again.Name != online.Name || again.UID != online.UID || !slices.Equal(again.Groups, online.Groups) ||
			!maps.EqualFunc(again.Extra, online.Extra, slices.Equal) {
			t.Errorf("%s: the pod is %v %v, was %v %v", link, again, again.Extra, online, online.Extra)
		}
		if c := n.who(unseen); c == nil {
			t.Errorf("%s: a token that the cloud made is refused", link)
		}
		if c := n.who(bootstrap); c == nil || c.Name != seen.Name {
			t.Errorf("%s: the bootstrap token is %v", link, c)
		}
		for _, token := range []string{vault, other, pod + "x", "opaque"} {
			if c := n.who(token); c != nil {
				t.Errorf("%s: %v is let in", link, c)
			}
		}
		for _, q := range questions {
			q.ask(n)
		}
	}
}

// bootstrap gets the node its certificates.
func (n *node) bootstrap(dir string) {
	t := n.t
	token, err := n.cp.BootstrapToken(t.Context())
	check(t, err)
	file := filepath.Join(dir, "bootstrap.conf")
	check(t, n.cp.WriteTokenKubeconfig(file, token))
	n.certs, err = cert.New(cert.Config{
		Dir: filepath.Join(dir, "pki"), NodeName: "edge-1", BootstrapKubeconfig: file,
		DummyIP: net.IPv4(169, 254, 2, 1), Log: slog.New(slog.DiscardHandler),
	})
	check(t, err)
	done := make(chan error, 1)
	go func() { done <- n.certs.Run(t.Context()) }()
	t.Cleanup(func() { check(t, <-done) })
	select {
	case <-n.certs.Ready():
	case <-time.After(time.Minute):
		t.Fatal("no client certificate")
	}

	var pending string
	eventually(t, "server certificate request", func() bool {
		pending = n.kubectl("get", "csr", "--field-selector=spec.signerName=kubernetes.io/kubelet-serving", "--output=name")
		return pending != ""
	})
	n.kubectl("certificate", "approve", strings.TrimPrefix(pending, "certificatesigningrequest.certificates.k8s.io/"))
	eventually(t, "server certificate", func() bool {
		pair, err := n.certs.GetCertificate(&tls.ClientHelloInfo{ServerName: "kubernetes"})
		check(t, err)
		_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: n.certs.ClusterCAs(), DNSName: "169.254.2.1"})
		return err == nil
	})
	bundle, err := os.ReadFile(n.certs.BundlePath())
	check(t, err)
	if !strings.HasPrefix(string(bundle), string(n.cp.CA.CertPEM)) || strings.Count(string(bundle), "BEGIN CERTIFICATE") != 2 {
		t.Errorf("bundle is\n%s", bundle)
	}
}

// learnKeys lets the authenticator fetch the signing keys, as Run does.
func (n *node) learnKeys() {
	keys, issuer, err := n.api.Keys(n.t.Context())
	check(n.t, err)
	if !strings.Contains(string(keys), `"kid"`) || issuer != "https://kubernetes.default.svc.cluster.local" {
		n.t.Fatalf("keys %s of %s", keys, issuer)
	}
	check(n.t, n.authenticator.RefreshKeys(n.t.Context()))
}

type question struct {
	who  *identity.Caller
	what identity.Attributes
	want bool
}

func (q question) ask(n *node) {
	n.t.Helper()
	d, err := n.authorizer.Authorize(n.t.Context(), q.who, q.what)
	check(n.t, err)
	if d.Allowed != q.want {
		n.t.Errorf("offline=%t: %s %+v: %+v", n.offline.Load(), q.who, q.what, d)
	}
}

func (n *node) questions(kubelet, pod *identity.Caller) []question {
	on := func(name string) fields.Requirements {
		return fields.OneTermEqualSelector("spec.nodeName", name).Requirements()
	}
	config := func(name string) identity.Attributes {
		return identity.Attributes{Verb: "get", Version: "v1", Resource: "configmaps", Namespace: "shop", Name: name}
	}
	pods := identity.Attributes{Verb: "list", Version: "v1", Resource: "pods"}
	mine, theirs, all, shop, system := pods, pods, pods, pods, pods
	mine.FieldSelector, theirs.FieldSelector = on("edge-1"), on("edge-2")
	shop.Namespace, system.Namespace = "shop", "kube-system"
	// The Node authorizer follows the pods by a watch of its own.
	eventually(n.t, "permission for a mounted ConfigMap", func() bool {
		d, err := n.authorizer.Authorize(n.t.Context(), kubelet, config("mounted"))
		check(n.t, err)
		if !d.Allowed {
			n.restart()
		}
		return d.Allowed
	})
	return []question{
		{kubelet, mine, true},
		{kubelet, theirs, false},
		{kubelet, all, false},
		{kubelet, config("mounted"), true},
		{kubelet, config("other"), false},
		{kubelet, identity.Attributes{Verb: "watch", Version: "v1", Resource: "services"}, true},
		{pod, shop, true},
		{pod, system, false},
		{pod, all, false},
		{pod, mine, false},
		{pod, identity.Attributes{Verb: "get", Path: "/version"}, true},
		{pod, identity.Attributes{Verb: "get", Path: "/metrics"}, false},
	}
}
