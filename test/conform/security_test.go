package conform

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/test/bed"
)

var update = flag.Bool("update", false, "rewrite the tables of docs/security.md")

// guarded is the cluster of this test: who may what in the namespace of the
// same name.
const guarded = `
apiVersion: v1
kind: Namespace
metadata: {name: guarded}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: guarded}
data: {a: "1"}
---
apiVersion: v1
kind: Secret
metadata: {name: password, namespace: guarded}
stringData: {a: "1"}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: settings, namespace: guarded}
rules:
- {apiGroups: [""], resources: [configmaps], verbs: [get, list, watch, create]}
- {apiGroups: [""], resources: [secrets], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: guarded-metrics}
rules: [{nonResourceURLs: [/metrics, /v1/status], verbs: [get]}]
`

const guardedAccount = `
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[1]s, namespace: guarded}
---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: guarded}
spec:
  nodeName: %[2]s
  serviceAccountName: %[1]s
  tolerations: [{operator: Exists}]
  containers: [{name: main, image: example.invalid/x:1}]
`

const guardedRights = `
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: %[1]s, namespace: guarded}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: settings}
subjects: [{kind: ServiceAccount, name: %[1]s, namespace: guarded}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: guarded-%[1]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: guarded-metrics}
subjects: [{kind: ServiceAccount, name: %[1]s, namespace: guarded}]
`

// guard makes the accounts, each with a pod on the node, those of the second
// list with the rights, and returns a token of each.
func guard(t *testing.T, node string, without, with []string) map[string]string {
	t.Helper()
	busy.node(t, node)
	manifest := guarded
	for _, account := range slices.Concat(without, with) {
		manifest += fmt.Sprintf(guardedAccount, account, node)
	}
	for _, account := range with {
		manifest += fmt.Sprintf(guardedRights, account)
	}
	mustAwait(t, func(ctx context.Context) error { return busy.Cloud.Apply(ctx, manifest) })
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		for _, account := range slices.Concat(without, with) {
			grace := int64(0)
			_ = busy.admin.CoreV1().Pods("guarded").Delete(ctx, account, metav1.DeleteOptions{GracePeriodSeconds: &grace}) // it may be gone
		}
	})
	tokens := map[string]string{}
	for _, account := range slices.Concat(without, with) {
		var err error
		if tokens[account], err = busy.token(t.Context(), "guarded", account, account); err != nil {
			t.Fatal(err)
		}
	}
	return tokens
}

func deleteAccount(t *testing.T, account string) {
	t.Helper()
	if err := busy.admin.CoreV1().ServiceAccounts("guarded").Delete(t.Context(), account, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// credential is one row of the tables: what a client shows of itself.
type credential struct {
	name   string
	cert   *tls.Certificate
	token  string
	header http.Header
	uid    int    // of the client's socket, for the plain listener
	host   string // Host header, if not the address
	// offlineToken is shown while the link is cut, if it is another.
	offlineToken string
	// after says that the online answers are taken when the link is back.
	after bool
}

// column is one kind of request.
type column struct {
	name, method, path, query, body string
}

var apiColumns = []column{
	{name: "list (replica)", method: http.MethodGet, path: "/api/v1/namespaces/guarded/configmaps", query: "resourceVersion=0"},
	{name: "watch", method: http.MethodGet, path: "/api/v1/namespaces/guarded/configmaps", query: "watch=true&resourceVersion=0"},
	{name: "list of services", method: http.MethodGet, path: "/api/v1/services", query: "resourceVersion=0"},
	{name: "get (latest)", method: http.MethodGet, path: "/api/v1/namespaces/guarded/configmaps/settings"},
	{
		name: "create", method: http.MethodPost, path: "/api/v1/namespaces/guarded/configmaps", query: "dryRun=All",
		body: `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"new"}}`,
	},
	{name: "discovery", method: http.MethodGet, path: "/apis"},
}

var healthColumns = []column{
	{name: "/healthz", method: http.MethodGet, path: "/healthz"},
	{name: "/readyz", method: http.MethodGet, path: "/readyz"},
	{name: "/metrics", method: http.MethodGet, path: "/metrics"},
	{name: "/v1/status", method: http.MethodGet, path: "/v1/status"},
	{name: "/debug/pprof/", method: http.MethodGet, path: "/debug/pprof/"},
	{name: "any other", method: http.MethodGet, path: "/api/v1/pods"},
}

var peerColumns = []column{
	{name: "list of services", method: http.MethodGet, path: "/api/v1/services", query: "resourceVersion=0"},
	{name: "watch", method: http.MethodGet, path: "/api/v1/services", query: "watch=true&resourceVersion=0"},
	{name: "one service", method: http.MethodGet, path: "/api/v1/namespaces/default/services/kubernetes", query: "resourceVersion=0"},
	{name: "list of secrets", method: http.MethodGet, path: "/api/v1/secrets", query: "resourceVersion=0"},
	{name: "create", method: http.MethodPost, path: "/api/v1/namespaces/default/services", query: "dryRun=All", body: `{}`},
	{name: "/pool/v1/state", method: http.MethodGet, path: "/pool/v1/state"},
	{name: "/pool/v1/heartbeats", method: http.MethodPost, path: "/pool/v1/heartbeats", body: `[]`},
	{name: "any other", method: http.MethodGet, path: "/metrics"},
}

// surface is a listener and who comes to it.
type surface struct {
	name, base string
	columns    []column
	rows       []credential
	roots      *x509.CertPool
	// peer is the node whose certificate the listener must show, where hubs
	// know each other by name. It may then refuse who calls while the
	// connection is secured.
	peer string

	online, offline map[string]int // by row and column
}

// noTLS stands for a status where there is no answer, because the connection
// was refused while it was secured.
const noTLS = 0

func statusText(code int) string {
	if code == noTLS {
		return "TLS"
	}
	return strconv.Itoa(code)
}

func cellOf(row credential, c column) string { return row.name + "\x00" + c.name }

// client is that of one row.
func (s *surface) client(row credential) *http.Client {
	cfg := &tls.Config{RootCAs: s.roots, MinVersion: tls.VersionTLS12}
	if row.cert != nil {
		// Shown whatever authorities the server names.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return row.cert, nil }
	}
	if s.peer != "" {
		// Nodes' certificates name no address: the name is what counts.
		cfg.InsecureSkipVerify = true
		cfg.VerifyConnection = func(state tls.ConnectionState) error {
			leaf := state.PeerCertificates[0]
			_, err := leaf.Verify(x509.VerifyOptions{Roots: s.roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
			if want := "system:node:" + s.peer; err == nil && leaf.Subject.CommonName != want {
				err = fmt.Errorf("%s answers, want %s", leaf.Subject.CommonName, want)
			}
			return err
		}
	}
	return &http.Client{Timeout: patience, Transport: &http.Transport{
		// Peers may not come as often as this table has cells.
		TLSClientConfig: cfg, DisableKeepAlives: s.peer == "",
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return dialAs(ctx, row.uid, network, address)
		},
	}}
}

// dialAs connects as a process of the given user does: a socket belongs to
// the file system's user of the thread that makes it.
func dialAs(ctx context.Context, uid int, network, address string) (net.Conn, error) {
	if uid == 0 {
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() { // ends with the dial; its thread, which has another user now, with it
		runtime.LockOSThread()
		if _, err := unix.SetfsuidRetUid(uid); err != nil {
			done <- result{err: err}
			return
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// status asks once.
func (s *surface) status(ctx context.Context, client *http.Client, row credential, c column, token string) (int, error) {
	target := s.base + c.path
	if c.query != "" {
		target += "?" + c.query
	}
	ctx, cancel := context.WithCancel(ctx) // ends a watch after its first bytes
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, c.method, target, strings.NewReader(c.body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", marker+row.name)
	if s.peer != "" {
		req.Header.Set("User-Agent", marker+asPeer+row.name)
	}
	maps.Copy(req.Header, row.header)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if row.host != "" {
		req.Host = row.host
	}
	resp, err := client.Do(req)
	if s.peer != "" && refusedInHandshake(err) {
		return noTLS, nil
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %s: %s: %w", s.name, row.name, c.name, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 == 2 {
		return resp.StatusCode, nil
	}
	// A refusal says why, in the API's terms, and shows no secret.
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, fmt.Errorf("%s: %s: %s: %w", s.name, row.name, c.name, err)
	}
	if token != "" && bytes.Contains(body, []byte(token)) {
		return 0, fmt.Errorf("%s: %s: %s: the refusal shows the token", s.name, row.name, c.name)
	}
	var status metav1.Status
	if resp.StatusCode != http.StatusNotFound && (json.Unmarshal(body, &status) != nil || status.Message == "" || int(status.Code) != resp.StatusCode) {
		return 0, fmt.Errorf("%s: %s: %s: no Status: %s", s.name, row.name, c.name, body)
	}
	return resp.StatusCode, nil
}

// refusedInHandshake tells the alert that refuses a certificate, which the end
// of the connection may overtake.
func refusedInHandshake(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error" || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// observe fills in the answers of all rows that take pick.
func (s *surface) observe(t *testing.T, cells map[string]int, offline bool, pick func(credential) bool) {
	t.Helper()
	var (
		mu  sync.Mutex // guards cells
		ask errgroup.Group
	)
	ask.SetLimit(6)
	for _, row := range s.rows {
		if !pick(row) {
			continue
		}
		ask.Go(func() error {
			client, token := s.client(row), row.token
			defer client.CloseIdleConnections()
			if offline && row.offlineToken != "" {
				token = row.offlineToken
			}
			code := -1
			for _, c := range s.columns { // in order: what was refused once is known
				// Who is refused in the handshake does not come to ask.
				if code != noTLS {
					var err error
					if code, err = s.status(t.Context(), client, row, c, token); err != nil {
						return err
					}
				}
				mu.Lock()
				cells[cellOf(row, c)] = code
				mu.Unlock()
			}
			return nil
		})
	}
	if err := ask.Wait(); err != nil {
		t.Fatal(err)
	}
}

// table is the section of the page.
func (s *surface) table() string {
	var b strings.Builder
	b.WriteString("| credential |")
	for _, c := range s.columns {
		b.WriteString(" " + c.name + " |")
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(s.columns)) + "\n")
	for _, row := range s.rows {
		b.WriteString("| " + row.name + " |")
		for _, c := range s.columns {
			online, offline := s.online[cellOf(row, c)], s.offline[cellOf(row, c)]
			if online == offline {
				b.WriteString(" " + statusText(online) + " |")
			} else {
				b.WriteString(" " + statusText(online) + " / " + statusText(offline) + " |")
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// issue signs a client certificate that no authority of the tests would.
func issue(t *testing.T, caCert *x509.Certificate, caKey any, name string, expired bool, groups ...string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name, Organization: groups},
		NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if expired {
		template.NotAfter = now.Add(-time.Hour)
	}
	if caCert == nil { // an authority of its own
		template.IsCA, template.BasicConstraintsValid = true, true
		caCert, caKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, caCert, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// clusterCA reads the cluster's authority, as only a test can.
func clusterCA(t *testing.T) (*x509.Certificate, any) {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(busy.Cloud.CA.CertFile, busy.Cloud.CA.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf, pair.PrivateKey
}

// clusterSigner reads the key that signs ServiceAccount tokens.
func clusterSigner(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(filepath.Dir(busy.Cloud.CA.KeyFile), "sa.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*rsa.PrivateKey)
}

// resign returns the token with changed claims, signed by the given key.
func resign(t *testing.T, token string, key *rsa.PrivateKey, change func(claims map[string]any)) string {
	t.Helper()
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := parsed.UnsafeClaimsWithoutVerification(&claims); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(claims)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: key},
		(&jose.SignerOptions{}).WithHeader("kid", parsed.Headers[0].KeyID))
	if err != nil {
		t.Fatal(err)
	}
	out, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func headers(pairs ...string) http.Header {
	h := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		h.Add(pairs[i], pairs[i+1])
	}
	return h
}

var impersonating = headers("Impersonate-User", "system:admin", "Impersonate-Group", "system:masters")

// strangers are those whom no listener may serve, and tokens, good and bad.
func (h *fullHub) credentials(t *testing.T, tokens map[string]string) []credential {
	t.Helper()
	caCert, caKey := clusterCA(t)
	foreignKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := busy.admin.CoreV1().ServiceAccounts("guarded").CreateToken(t.Context(), "allowed",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{"elsewhere"}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hourAgo := func(c map[string]any) {
		c["iat"], c["nbf"], c["exp"] = time.Now().Add(-2*time.Hour).Unix(), time.Now().Add(-2*time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()
	}
	certificate := func(name string, groups ...string) *tls.Certificate {
		return issue(t, caCert, caKey, name, false, groups...)
	}
	kubelet, err := h.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	node, err := tls.X509KeyPair(kubelet.CertData, kubelet.KeyData)
	if err != nil {
		t.Fatal(err)
	}
	return []credential{
		{name: "none"},
		{name: "none, as the kubelet by User-Agent", header: headers("User-Agent", "kubelet/v1.36.0")},
		{name: "none, as administrator by X-Remote-User", header: headers("X-Remote-User", "system:admin", "X-Remote-Group", "system:masters")},
		{name: "none, as administrator by Impersonate-User", header: impersonating},
		{name: "node's name, certificate of another CA", cert: issue(t, nil, nil, "system:node:edge-3", false, "system:nodes")},
		{name: "node's certificate, expired", cert: issue(t, caCert, caKey, "system:node:edge-3", true, "system:nodes")},
		{name: "node's name without its group, certificate", cert: certificate("system:node:edge-3")},
		{name: "node's certificate", cert: &node},
		{name: "node's certificate, Impersonate-User", cert: &node, header: impersonating},
		{name: "certificate of a node of the pool", cert: certificate("system:node:edge-1", "system:nodes")},
		{name: "certificate of a node of another pool", cert: certificate("system:node:edge-2", "system:nodes")},
		{name: "certificate of a user", cert: certificate("alice", "gardeners")},
		{name: "certificate of an administrator", cert: certificate("admin", "system:masters")},
		{name: "token of a pod", token: tokens["allowed"]},
		{name: "token of a pod, Impersonate-User", token: tokens["allowed"], header: impersonating},
		{name: "token of a pod without rights", token: tokens["powerless"]},
		{name: "token of a pod without rights, as the kubelet by User-Agent", token: tokens["powerless"], header: headers("User-Agent", "kubelet/v1.36.0")},
		{name: "token, expired", token: resign(t, tokens["allowed"], clusterSigner(t), hourAgo)},
		{name: "token, signed by another cluster", token: resign(t, tokens["allowed"], foreignKey, nil)},
		{name: "token, for another audience", token: elsewhere.Status.Token},
		{name: "token, garbage", token: "garbage"},
		{name: "token of a deleted account", token: tokens["deleted"]},
		{name: "token of a deleted account, never seen before", token: tokens["unseen"], offlineToken: tokens["unseen-too"]},
		{name: "token of an account deleted during the cut", token: tokens["leaving"], after: true},
		{name: "token that the hub made during the cut", token: "set below", after: true},
	}
}

// TestStatusTables shows every credential to every listener, online and
// offline, and compares what comes back with the tables of docs/security.md.
// It then looks at what arrived at the API server, and as whom.
func TestStatusTables(t *testing.T) {
	t.Parallel()
	hub := newFullHub(t, "edge-3")
	tokens := guard(t, hub.Node, []string{"powerless", "unseen", "unseen-too"}, []string{"allowed", "deleted", "leaving"})
	rows := hub.credentials(t, tokens)
	bundle := x509.NewCertPool()
	text, err := os.ReadFile(filepath.Join(hub.Dir, "pki", "ca-bundle.crt"))
	if err != nil {
		t.Fatal(err)
	}
	bundle.AppendCertsFromPEM(text)
	named := func(names ...string) []credential {
		var out []credential
		for _, row := range rows {
			if slices.Contains(names, row.name) {
				out = append(out, row)
			}
		}
		return out
	}
	withoutCertificates := slices.DeleteFunc(slices.Clone(rows), func(c credential) bool { return c.cert != nil })
	const nobody = 65534
	plainRows := []credential{
		{name: "process of another user", uid: nobody},
		{name: "process of another user, token of a pod", uid: nobody, token: tokens["allowed"]},
		{name: "process of root"},
		{name: "process of root, Impersonate-User", header: impersonating},
		{name: "process of root, Host of another name", host: "rebound.example:10261"},
		{name: "process of root, with Origin", header: headers("Origin", "https://rebound.example")},
		{name: "process of root, with Sec-Fetch-Site", header: headers("Sec-Fetch-Site", "none")},
		{name: "process of root, Authorization: Basic", header: headers("Authorization", "Basic YWRtaW46YWRtaW4=")},
	}
	for _, row := range named("token of a pod", "token of a pod without rights", "token, expired", "token, signed by another cluster", "token of a deleted account") {
		row.name = "process of root, " + row.name
		plainRows = append(plainRows, row)
	}
	caCert, caKey := clusterCA(t)
	const peer = "certificate of a node of the pool"
	member := named(peer)[0].cert
	peerRows := append(slices.Clone(rows),
		credential{name: peer + ", expired", cert: issue(t, caCert, caKey, "system:node:edge-1", true, "system:nodes")},
		credential{name: peer + ", of another CA", cert: issue(t, nil, nil, "system:node:edge-1", false, "system:nodes")},
		credential{name: peer + ", token of a pod", cert: member, token: tokens["allowed"]},
		credential{name: peer + ", Impersonate-User", cert: member, header: impersonating},
		credential{name: peer + ", X-Remote-User", cert: member, header: headers("X-Remote-User", "system:admin")},
	)
	hub.join(t, "guarded", "edge-1")
	cluster := x509.NewCertPool()
	cluster.AddCert(caCert)
	node := &surface{name: "node", base: hub.URL, columns: apiColumns, rows: rows, roots: bundle}
	pods := &surface{name: "pods", base: hub.pods, columns: apiColumns, rows: rows, roots: bundle}
	health := &surface{name: "health", base: hub.Health, columns: healthColumns, rows: withoutCertificates}
	plain := &surface{name: "plain", base: hub.plain, columns: apiColumns, rows: plainRows}
	peers := &surface{name: "peers", base: hub.peers, columns: peerColumns, rows: peerRows, roots: cluster, peer: hub.Node}
	all := []*surface{node, pods, health, plain, peers}
	for _, s := range all {
		s.online, s.offline = map[string]int{}, map[string]int{}
	}

	edge := newSide(t, "hub", busy.through(t, hub.Hub, tokens["allowed"]))
	warm(t, edge, "/api/v1/namespaces/guarded/configmaps")
	warm(t, newSide(t, "hub", busy.through(t, hub.Hub, tokens["deleted"])), "/api/v1/namespaces/guarded/configmaps")
	for _, account := range []string{"deleted", "unseen", "unseen-too"} {
		deleteAccount(t, account)
		refusedByCloud(t, tokens[account])
	}
	refusedPromptly(t, hub, tokens["deleted"])
	for _, s := range all {
		s.observe(t, s.online, false, func(c credential) bool { return !c.after })
	}
	// Those who are asked about later must have been seen before.
	for _, s := range all {
		s.observe(t, map[string]int{}, false, func(c credential) bool { return c.name == "token of an account deleted during the cut" })
	}

	cut(t, hub.link, edge, bed.Down)
	deleteAccount(t, "leaving")
	refusedByCloud(t, tokens["leaving"])
	made := hub.madeToken(t, "allowed")
	for _, s := range all {
		for i := range s.rows {
			if s.rows[i].token == "set below" {
				s.rows[i].token = made
			}
		}
		s.observe(t, s.offline, true, func(credential) bool { return true })
	}
	heal(t, hub.link, edge)
	for _, s := range all {
		s.observe(t, s.online, false, func(c credential) bool { return c.after })
	}

	for cell, code := range node.online {
		if pods.online[cell] != code || pods.offline[cell] != node.offline[cell] {
			t.Errorf("%q: %d / %d to programs on the node, %d / %d to pods", cell, code, node.offline[cell], pods.online[cell], pods.offline[cell])
		}
	}
	compareTables(t, map[string]string{"api": node.table(), "health": health.table(), "plain": plain.table(), "peers": peers.table()})
	hub.whoTheCloudSees(t, all)
	hub.whoseRequests(t)
}

// refusedByCloud waits until the API server itself refuses a token: it too
// remembers for ten seconds.
func refusedByCloud(t *testing.T, token string) {
	t.Helper()
	server := newSide(t, "API server", busy.config(token))
	mustAwait(t, func(ctx context.Context) error {
		a, err := server.ask(ctx, question{"/api/v1/namespaces/guarded/configmaps", "", inJSON})
		if err == nil && a.code != http.StatusUnauthorized {
			err = fmt.Errorf("the API server still accepts the token: %d", a.code)
		}
		return err
	})
}

// refusedPromptly is about a token that the hub knows and the API server no
// longer accepts: what the API server says to one request counts for all.
func refusedPromptly(t *testing.T, hub *fullHub, token string) {
	t.Helper()
	edge := newSide(t, "hub", busy.through(t, hub.Hub, token))
	path := "/api/v1/namespaces/guarded/configmaps"
	if a := edge.mustAsk(t, question{path, "", inJSON}); a.code != http.StatusUnauthorized {
		t.Errorf("forwarded with a token of a deleted account: %d %s", a.code, a.body)
	}
	if a := edge.mustAsk(t, question{path, "resourceVersion=0", inJSON}); a.code != http.StatusUnauthorized {
		t.Errorf("from the replica, right after the API server refused the token: %d", a.code)
	}
}

// madeToken has the kubelet ask for a token while the cloud is away.
func (h *fullHub) madeToken(t *testing.T, account string) string {
	t.Helper()
	cfg, err := h.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	kubelet, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := busy.admin.CoreV1().Pods("guarded").Get(t.Context(), account, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	made, err := kubelet.CoreV1().ServiceAccounts("guarded").CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return made.Status.Token
}

// compareTables compares the tables with the page, or puts them there.
func compareTables(t *testing.T, tables map[string]string) {
	t.Helper()
	page := filepath.Join("..", "..", "docs", "security.md")
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for name, table := range tables {
		begin, end := "<!-- begin table "+name+": written by TestStatusTables -->\n", "<!-- end table "+name+" -->\n"
		before, rest, ok1 := strings.Cut(string(text), begin)
		have, after, ok2 := strings.Cut(rest, end)
		if !ok1 || !ok2 {
			t.Fatalf("docs/security.md has no place for table %s", name)
		}
		if have == table {
			continue
		}
		if !*update {
			t.Errorf("table %s of docs/security.md is not what was observed; review it, then run\n  go test ./test/conform -run TestStatusTables -update\nobserved:\n%s\nthe page has:\n%s", name, table, have)
			continue
		}
		text = []byte(before + begin + table + end + after)
	}
	if *update {
		if err := os.WriteFile(page, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// marker begins the User-Agent of what these tests send through a hub, so that
// it can be told at the API server from what the hub sends by itself.
const marker = "through-the-hub "

// asPeer follows it in what is sent to the listener for peers.
const asPeer = "as a peer, "

// auditFlags makes the API server write down every request.
func auditFlags(dir string) ([]string, error) {
	policy := filepath.Join(dir, "audit.yaml")
	text := `{"apiVersion":"audit.k8s.io/v1","kind":"Policy","omitStages":["RequestReceived"],"rules":[
		{"level":"Metadata","userGroups":["system:nodes","system:serviceaccounts:guarded"]},{"level":"None"}]}`
	if err := os.WriteFile(policy, []byte(text), 0o600); err != nil {
		return nil, err
	}
	auditLog = filepath.Join(dir, "audit.log")
	return []string{"--audit-policy-file=" + policy, "--audit-log-path=" + auditLog}, nil
}

// auditLog is set by TestMain and read by tests.
var auditLog string

type auditEvent struct {
	Verb, RequestURI, UserAgent string

	User             authenticationv1.UserInfo
	ImpersonatedUser *authenticationv1.UserInfo
	ObjectRef        *struct{ Resource, Subresource string }
	ResponseStatus   *struct{ Code int }
}

func auditEvents(t *testing.T) []auditEvent {
	t.Helper()
	text, err := os.ReadFile(auditLog)
	if err != nil {
		t.Fatal(err)
	}
	var out []auditEvent
	for line := range bytes.Lines(text) {
		var e auditEvent
		if err := json.Unmarshal(line, &e); err != nil {
			if !bytes.HasSuffix(line, []byte("\n")) {
				break // being written just now
			}
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

// whoTheCloudSees lets the hub impersonate, as a cluster's administrator can,
// and then asks through it who one is, with each credential that is served.
func (h *fullHub) whoTheCloudSees(t *testing.T, all []*surface) {
	t.Helper()
	mustAwait(t, func(ctx context.Context) error {
		return busy.Cloud.Apply(ctx, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: guarded-impersonator}
rules:
- {apiGroups: [""], resources: [users, groups], verbs: [impersonate]}
- {apiGroups: [authentication.k8s.io], resources: ["*"], verbs: [impersonate]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: guarded-impersonator}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: guarded-impersonator}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: "system:node:edge-3"}]
`)
	})
	t.Cleanup(func() {
		if err := busy.admin.RbacV1().ClusterRoleBindings().Delete(context.WithoutCancel(t.Context()), "guarded-impersonator", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	me := "system:node:" + h.Node
	want := map[string]string{
		"node's name without its group, certificate":                  me,
		"node's certificate":                                          me,
		"certificate of a node of the pool":                           "system:node:edge-1",
		"certificate of a node of another pool":                       "system:node:edge-2",
		"certificate of a user":                                       "alice",
		"certificate of an administrator":                             "admin",
		"token of a pod":                                              "system:serviceaccount:guarded:allowed",
		"token of a pod without rights":                               "system:serviceaccount:guarded:powerless",
		"token of a pod without rights, as the kubelet by User-Agent": "system:serviceaccount:guarded:powerless",
		"process of root":                                             me,
		"process of root, token of a pod":                             "system:serviceaccount:guarded:allowed",
		"process of root, token of a pod without rights":              "system:serviceaccount:guarded:powerless",
	}
	for _, s := range all {
		if s.name == "health" || s.peer != "" {
			continue // they pass nothing on; see whoseRequests
		}
		for _, row := range s.rows {
			var got whoami
			ask := func(ctx context.Context) error { return got.ask(ctx, s, row) }
			if strings.HasPrefix(row.name, "certificate") {
				// The API server takes note of the rule in its own time.
				mustAwait(t, func(ctx context.Context) error {
					if err := ask(ctx); err != nil || got.code == http.StatusCreated {
						return err
					}
					return fmt.Errorf("%s: %d", row.name, got.code)
				})
			} else if err := ask(t.Context()); err != nil {
				t.Fatal(err)
			}
			name, served := want[row.name]
			switch {
			case !served && got.code/100 == 2:
				t.Errorf("%s: %q is %s to the cloud", s.name, row.name, got.user.Username)
			case served && (got.code != http.StatusCreated || got.user.Username != name):
				t.Errorf("%s: %q is %q to the cloud (%d), want %q", s.name, row.name, got.user.Username, got.code, name)
			case served && name == me && slices.Contains(got.user.Groups, "system:nodes") == strings.Contains(row.name, "without its group"):
				t.Errorf("%s: %q has the groups %q", s.name, row.name, got.user.Groups)
			}
		}
	}
}

// whoami is what the API server says of the one who asks.
type whoami struct {
	code int
	user authenticationv1.UserInfo
}

func (w *whoami) ask(ctx context.Context, s *surface, row credential) error {
	*w = whoami{}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base+"/apis/authentication.k8s.io/v1/selfsubjectreviews",
		strings.NewReader(`{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`))
	if err != nil {
		return err
	}
	req.Header = headers("Content-Type", "application/json", "User-Agent", marker+row.name)
	maps.Copy(req.Header, row.header)
	if row.token != "" {
		req.Header.Set("Authorization", "Bearer "+row.token)
	}
	req.Host = row.host
	resp, err := s.client(row).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	w.code = resp.StatusCode
	if resp.StatusCode != http.StatusCreated {
		return nil
	}
	var review authenticationv1.SelfSubjectReview
	if err := json.NewDecoder(resp.Body).Decode(&review); err != nil {
		return err
	}
	w.user = review.Status.UserInfo
	return nil
}

// whoseRequests reads the API server's audit log: the node's identity, which
// the hub's certificate gives, was used for the kubelet's requests, for root's
// at the plain listener, and for what the hub asks by itself.
func (h *fullHub) whoseRequests(t *testing.T) {
	t.Helper()
	me := "system:node:" + h.Node
	seen := map[string]int{}
	for _, e := range auditEvents(t) {
		if strings.HasPrefix(e.UserAgent, marker+asPeer) {
			t.Errorf("a request of a peer was passed on: %s %s", e.Verb, e.RequestURI)
		}
		if e.User.Username != me {
			if row, ok := strings.CutPrefix(e.UserAgent, marker); ok {
				seen[row]++
				if !strings.HasPrefix(row, "token of") && !strings.HasPrefix(row, "process of root, token of") {
					t.Errorf("%q arrived as %s: %s %s", row, e.User.Username, e.Verb, e.RequestURI)
				}
				if !strings.HasPrefix(e.User.Username, "system:serviceaccount:guarded:") {
					t.Errorf("%q arrived as %s", row, e.User.Username)
				}
			}
			continue
		}
		row, through := strings.CutPrefix(e.UserAgent, marker)
		switch {
		case !through:
			if err := ownRequest(e); err != nil {
				t.Error(err)
			}
		case e.ImpersonatedUser != nil:
			seen["impersonated: "+e.ImpersonatedUser.Username]++
		case strings.Contains(row, "certificate") && e.ResponseStatus != nil && e.ResponseStatus.Code == http.StatusForbidden:
			// To impersonate was refused, or the node would have been served.
			seen["refused: "+row]++
		case row == "node's certificate" || row == "process of root":
			seen[row]++
		default:
			t.Errorf("%q arrived with the hub's certificate: %s %s", row, e.Verb, e.RequestURI)
		}
	}
	for _, want := range []string{
		"node's certificate", "process of root", "token of a pod", "process of root, token of a pod",
		"impersonated: alice", "impersonated: admin", "impersonated: system:node:edge-1", "impersonated: system:node:edge-2",
		"refused: certificate of a user", "refused: certificate of an administrator",
	} {
		if seen[want] == 0 {
			t.Errorf("nothing of %q arrived: %v", want, seen)
		}
	}
}

// ownRequest returns an error for what the hub has no reason to ask by itself.
func ownRequest(e auditEvent) error {
	resource := ""
	if e.ObjectRef != nil {
		resource = e.ObjectRef.Resource
	}
	asks := e.Verb + " " + resource
	if resource == "" {
		asks = e.Verb + " " + strings.Split(e.RequestURI, "?")[0]
	}
	switch {
	case slices.Contains([]string{
		"create subjectaccessreviews", "create tokenreviews", // about callers
		"list pods", "watch pods", "list nodes", "watch nodes", // its own scopes
		"patch nodes", "create events", "patch events", // its conditions
		"list services", "watch services", "list endpointslices", "watch endpointslices",
		"list runtimeclasses", "watch runtimeclasses", "list csidrivers", "watch csidrivers", "get csinodes", // for the kubelet
		"list configmaps", "watch configmaps", // of the node's pods
		"list nodepools", "watch nodepools", // of its own pool
		"list accessfilters", "watch accessfilters",
		"create certificatesigningrequests", "get certificatesigningrequests",
		"list certificatesigningrequests", "watch certificatesigningrequests",
	}, asks):
		return nil
	case asks == "get configmaps" && e.RequestURI == "/api/v1/namespaces/kube-system/configmaps/kube-root-ca.crt":
		return nil // the cluster's authorities
	case resource == "" && e.Verb == "get":
		return nil // discovery, signing keys, probes
	}
	return fmt.Errorf("the hub by itself: %s %s (%s)", e.Verb, e.RequestURI, e.UserAgent)
}

// TestRevokedDuringCut takes a pod's rights away while its node is cut off.
// They are known there until the link is back; then the first request is
// refused, and watches that are open end.
func TestRevokedDuringCut(t *testing.T) {
	t.Parallel()
	hub := newFullHub(t, "edge-4")
	tokens := guard(t, hub.Node, []string{"witness"}, []string{"revoked", "removed", "staying"})
	const settings, password = "/api/v1/namespaces/guarded/configmaps", "/api/v1/namespaces/guarded/secrets/password"
	list := question{settings, "resourceVersion=0", inJSON}
	sides, streams := map[string]*side{}, map[string]*openWatch{}
	for _, account := range []string{"revoked", "removed", "staying"} {
		sides[account] = newSide(t, "hub", busy.through(t, hub.Hub, tokens[account]))
		warm(t, sides[account], settings)
		if a := sides[account].mustAsk(t, question{password, "", inJSON}); a.code != http.StatusOK {
			t.Fatalf("%s reads the secret: %d %s", account, a.code, a.body)
		}
		streams[account] = watchAll(t, sides[account], settings)
		streams[account].until(t, "ADDED")
	}
	witness := newSide(t, "hub", busy.through(t, hub.Hub, tokens["witness"]))
	expect := func(account string, q question, want int) {
		t.Helper()
		if a := sides[account].mustAsk(t, q); a.code != want {
			t.Errorf("%s: %s: %d, want %d: %s", account, q, a.code, want, a.body)
		}
	}

	// To be told that there is none is to be allowed to ask.
	absent := settings + "/nobody"
	expect("staying", question{absent, "", inJSON}, http.StatusNotFound)

	cut(t, hub.link, witness, bed.Down)
	expect("staying", question{absent, "resourceVersion=0", inJSON}, http.StatusNotFound)
	if err := busy.admin.RbacV1().RoleBindings("guarded").Delete(t.Context(), "revoked", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	deleteAccount(t, "removed")
	refusedByCloud(t, tokens["removed"])
	server := newSide(t, "API server", busy.config(tokens["revoked"]))
	mustAwait(t, func(ctx context.Context) error {
		a, err := server.ask(ctx, question{settings, "", inJSON})
		if err == nil && a.code != http.StatusForbidden {
			err = fmt.Errorf("the API server still allows it: %d", a.code)
		}
		return err
	})
	for account := range sides { // as last known
		expect(account, list, http.StatusOK)
		expect(account, question{password, "", inJSON}, http.StatusOK)
	}

	heal(t, hub.link, witness)
	expect("revoked", list, http.StatusForbidden)
	expect("removed", list, http.StatusUnauthorized)
	expect("staying", list, http.StatusOK)
	streams["revoked"].ended(t)
	streams["removed"].ended(t)
	expect("revoked", question{password, "", inJSON}, http.StatusForbidden)
	// The third goes on: it sees what happens next.
	_, err := busy.admin.CoreV1().ConfigMaps("guarded").Patch(t.Context(), "settings", types.MergePatchType,
		[]byte(`{"data":{"b":"`+strconv.FormatInt(time.Now().UnixNano(), 36)+`"}}`), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	streams["staying"].until(t, "MODIFIED")

	// What was revoked stays so in the next cut, and the answer that was kept
	// is no more.
	cut(t, hub.link, witness, bed.Down)
	expect("revoked", list, http.StatusForbidden)
	expect("revoked", question{password, "", inJSON}, http.StatusServiceUnavailable)
	expect("removed", list, http.StatusUnauthorized)
	expect("staying", list, http.StatusOK)
	expect("staying", question{password, "", inJSON}, http.StatusOK)
}

// openWatch is a watch that a test keeps open.
type openWatch struct {
	edge    *side
	path    string
	version string      // of the last event; read after lines is closed
	lines   chan string // closed at its end
	last    error       // why it ended; read after lines is closed
}

func watchAll(t *testing.T, edge *side, path string) *openWatch {
	t.Helper()
	w := &openWatch{edge: edge, path: path, version: "0"}
	w.open(t)
	return w
}

// open watches from the version on.
func (w *openWatch) open(t *testing.T) {
	t.Helper()
	resp, err := w.edge.open(t.Context(), question{w.path, "watch=true&resourceVersion=" + w.version, inJSON})
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("watch %s: %s", w.path, resp.Status)
	}
	t.Cleanup(func() { resp.Body.Close() })
	lines := make(chan string, 100)
	w.lines = lines
	go func() { // ends with the body
		defer close(lines)
		decoder := json.NewDecoder(resp.Body)
		for {
			var event struct {
				Type   string
				Object metav1.PartialObjectMetadata
			}
			if w.last = decoder.Decode(&event); w.last != nil {
				return
			}
			w.version = event.Object.ResourceVersion
			lines <- event.Type
		}
	}()
}

// until waits for an event of the type. As a client does it comes back when
// the watch has ended in good order: a stream that goes by a token which the
// cloud refuses looks for another one that way.
func (w *openWatch) until(t *testing.T, typ string) {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case got, ok := <-w.lines:
			switch {
			case ok && got == typ:
				return
			case ok:
			case errors.Is(w.last, io.EOF):
				w.open(t)
			default:
				t.Fatalf("the watch ended without %s: %v", typ, w.last)
			}
		case <-deadline:
			t.Fatalf("the watch shows no %s", typ)
		}
	}
}

// ended waits for the end, which is an orderly one.
func (w *openWatch) ended(t *testing.T) {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case _, ok := <-w.lines:
			if !ok {
				if !errors.Is(w.last, io.EOF) {
					t.Errorf("the watch ended with %v", w.last)
				}
				return
			}
		case <-deadline:
			t.Fatal("the watch goes on")
		}
	}
}
