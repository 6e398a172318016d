package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.uber.org/goleak"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testIssuer   = "https://kubernetes.default.svc.cluster.local"
	testAudience = "https://kubernetes.default.svc"
)

// cloud is an API whose link can be cut.
type cloud struct {
	key *ecdsa.PrivateKey
	id  string

	mu       sync.Mutex
	cut      bool // every call fails
	hang     bool // every call lasts until its deadline
	users    map[string]authenticationv1.UserInfo
	allow    func(authorizationv1.SubjectAccessReviewSpec) bool
	reviews  int
	accesses int
	fetches  int
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

func newCloud(t testing.TB) *cloud {
	return &cloud{key: newKey(t), id: "key-1", users: make(map[string]authenticationv1.UserInfo)}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (c *cloud) enter(ctx context.Context, count *int) error {
	c.mu.Lock()
	*count++
	cut, hang := c.cut, c.hang
	c.mu.Unlock()
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	if cut {
		return errors.New("no route to host")
	}
	return nil
}

func (c *cloud) TokenReview(ctx context.Context, token string, _ []string) (*authenticationv1.TokenReview, error) {
	if err := c.enter(ctx, &c.reviews); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	user, ok := c.users[token]
	out := &authenticationv1.TokenReview{}
	if ok {
		out.Status = authenticationv1.TokenReviewStatus{Authenticated: true, User: user, Audiences: []string{testAudience}}
	}
	return out, nil
}

func (c *cloud) SubjectAccessReview(ctx context.Context, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error) {
	if err := c.enter(ctx, &c.accesses); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	out := &authorizationv1.SubjectAccessReview{}
	out.Status.Allowed = c.allow != nil && c.allow(review.Spec)
	return out, nil
}

func (c *cloud) Keys(ctx context.Context) ([]byte, string, error) {
	if err := c.enter(ctx, &c.fetches); err != nil {
		return nil, "", err
	}
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: c.key.Public(), KeyID: c.id, Algorithm: "ES256", Use: "sig"}}})
	return data, testIssuer, err
}

func (c *cloud) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

func (c *cloud) counts() (reviews, accesses, fetches int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reviews, c.accesses, c.fetches
}

// admit makes the cloud accept a token for a user, and returns the token.
func (c *cloud) admit(token, user string) string {
	c.set(func() {
		c.users[token] = authenticationv1.UserInfo{Username: user, Groups: []string{"g", groupAuthenticated}}
	})
	return token
}

// sign makes a ServiceAccount token of pod web in namespace shop.
func sign(t testing.TB, key any, algorithm jose.SignatureAlgorithm, keyID string, change func(*claims)) string {
	t.Helper()
	now := time.Now()
	cl := claims{
		Claims: jwt.Claims{
			Issuer: testIssuer, Subject: "system:serviceaccount:shop:web", Audience: jwt.Audience{testAudience},
			Expiry: jwt.NewNumericDate(now.Add(time.Hour)), NotBefore: jwt.NewNumericDate(now), IssuedAt: jwt.NewNumericDate(now), ID: "jti",
		},
		Kubernetes: kubernetesClaims{Namespace: "shop", ServiceAccount: object{"web", "sa-uid"}, Pod: &object{"web-0", "pod-uid"}, Node: &object{"edge-1", "node-uid"}},
	}
	if change != nil {
		change(&cl)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", keyID))
	must(t, err)
	token, err := jwt.Signed(s).Claims(cl).Serialize()
	must(t, err)
	return token
}

func (c *cloud) token(t testing.TB, change func(*claims)) string {
	return sign(t, c.key, jose.ES256, c.id, change)
}

const webUser = "system:serviceaccount:shop:web"

// authority signs client certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{cert, key}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func (a *authority) issue(t testing.TB, change func(*x509.Certificate)) *x509.Certificate {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "system:node:edge-1", Organization: []string{"system:nodes"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, newKey(t).Public(), a.key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert
}

func withCertificate(c *x509.Certificate) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/api", http.NoBody)
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}}
	return r
}

func withToken(token string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/api", http.NoBody)
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// elapse lets the virtual time of a synctest bubble pass.
func elapse(d time.Duration) { <-time.After(d) }
