package identity

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const (
	// maxToken bounds a bearer token. Real ones are below 2 KiB.
	maxToken = 16 << 10
	// leeway is how far clocks may differ.
	leeway = time.Minute

	protocolHeader = "Sec-WebSocket-Protocol"
	protocolPrefix = "base64url.bearer.authorization.k8s.io."
)

// signatureAlgorithms are those that kube-apiserver and LocalSigner sign with.
// Symmetric ones and "none" are absent on purpose.
var signatureAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512,
}

// bearer returns the bearer token of a request: from the Authorization header,
// or, for a WebSocket handshake, from the subprotocol that browsers use because
// they cannot set headers. It returns "" when there is none.
func bearer(r *http.Request) string {
	scheme, rest, ok := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " ")
	if ok && strings.EqualFold(scheme, "bearer") {
		token, _, _ := strings.Cut(rest, " ")
		if token != "" {
			return token
		}
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return ""
	}
	for _, line := range r.Header.Values(protocolHeader) {
		for protocol := range strings.SplitSeq(line, ",") {
			encoded, ok := strings.CutPrefix(strings.TrimSpace(protocol), protocolPrefix)
			if !ok {
				continue
			}
			token, err := base64.RawURLEncoding.DecodeString(encoded)
			if err == nil {
				return string(token)
			}
		}
	}
	return ""
}

// claims are those of a ServiceAccount token.
type claims struct {
	jwt.Claims

	Kubernetes kubernetesClaims `json:"kubernetes.io,omitzero"`
}

type kubernetesClaims struct {
	Namespace      string  `json:"namespace,omitempty"`
	Node           *object `json:"node,omitempty"`
	Pod            *object `json:"pod,omitempty"`
	ServiceAccount object  `json:"serviceaccount,omitzero"`
}

type object struct {
	Name string `json:"name"`
	UID  string `json:"uid,omitempty"`
}

// webToken is a parsed and not yet verified JWT.
type webToken struct {
	jwt        *jwt.JSONWebToken
	unverified claims
}

// parseToken returns nil when the token is not a signed JWT in compact form.
func parseToken(token string) *webToken {
	if strings.Count(token, ".") != 2 {
		return nil
	}
	parsed, err := jwt.ParseSigned(token, signatureAlgorithms)
	if err != nil || len(parsed.Headers) != 1 {
		return nil
	}
	w := &webToken{jwt: parsed}
	if err := parsed.UnsafeClaimsWithoutVerification(&w.unverified); err != nil {
		return nil
	}
	return w
}

func (w *webToken) keyID() string  { return w.jwt.Headers[0].KeyID }
func (w *webToken) issuer() string { return w.unverified.Issuer }

// expiry returns when the token says that it ends, or the zero time. It is safe
// to use unverified: an attacker can only shorten what is remembered.
func (w *webToken) expiry() time.Time {
	if w == nil || w.unverified.Expiry == nil {
		return time.Time{}
	}
	return w.unverified.Expiry.Time()
}

// Expiry returns when a token says that it ends; the zero time if it does not
// say. Whether it is genuine is not looked at.
func Expiry(token string) time.Time { return parseToken(token).expiry() }

// left returns for how long the token may be used, without end if it has none.
func (w *webToken) left(by *clock.Clock) time.Duration {
	if e := w.expiry(); !e.IsZero() {
		return max(0, by.Until(e)+leeway)
	}
	return math.MaxInt64
}

// trust is what is known of the cluster's tokens. A value is never changed.
type trust struct {
	JWKS   json.RawMessage `json:"jwks,omitempty"`
	Issuer string          `json:"issuer,omitempty"`
	// Audiences are those that the API server accepts, learned from its
	// reviews.
	Audiences []string `json:"audiences,omitempty"`
	keys      jose.JSONWebKeySet
}

// parse fills keys from JWKS.
func (t *trust) parse() error {
	if len(t.JWKS) == 0 {
		return nil
	}
	if err := json.Unmarshal(t.JWKS, &t.keys); err != nil {
		return fmt.Errorf("parse signing keys: %w", err)
	}
	if len(t.keys.Keys) == 0 {
		return errors.New("parse signing keys: no key")
	}
	return nil
}

// errUnknownKey says that a token was signed by a key that is not known.
var errUnknownKey = errors.New("the token is signed by an unknown key")

// verify checks a token as the API server would, by the known keys.
func (t *trust) verify(w *webToken, by *clock.Clock) (*Caller, error) {
	if t.Issuer == "" || w.issuer() != t.Issuer {
		return nil, errors.New("the token is from another issuer")
	}
	err := errUnknownKey
	for _, key := range t.keys.Key(w.keyID()) {
		var c claims
		if !key.IsPublic() || w.jwt.Claims(key.Key, &c) != nil {
			err = errors.New("the token's signature is wrong")
			continue
		}
		// While the clock is a guess it may be behind, and would find every
		// recent token not yet valid. The cloud signs none for later.
		return c.caller(by.Now(), by.Sound(), t.Audiences)
	}
	return nil, err
}

// caller validates claims whose signature is good and returns whom they name.
func (c *claims) caller(now time.Time, sound bool, audiences []string) (*Caller, error) {
	if c.Expiry == nil {
		return nil, errors.New("the token has no expiry")
	}
	if now.Add(-leeway).After(c.Expiry.Time()) {
		return nil, errors.New("the token has expired")
	}
	if sound && c.NotBefore != nil && now.Add(leeway).Before(c.NotBefore.Time()) {
		return nil, errors.New("the token is not valid yet")
	}
	if !slices.ContainsFunc(c.Audience, func(a string) bool { return slices.Contains(audiences, a) }) {
		return nil, errors.New("the token is for another audience")
	}
	k := &c.Kubernetes
	name := serviceAccountName(k.Namespace, k.ServiceAccount.Name)
	if k.Namespace == "" || k.ServiceAccount.Name == "" || c.Subject != name {
		return nil, errors.New("the token does not name a service account")
	}
	caller := &Caller{
		Name:   name,
		UID:    k.ServiceAccount.UID,
		Groups: []string{groupServiceAccounts, groupServiceAccounts + ":" + k.Namespace, groupAuthenticated},
	}
	extra := make(map[string][]string)
	if c.ID != "" {
		extra[extraCredentialID] = []string{"JTI=" + c.ID}
	}
	if k.Pod != nil {
		extra[extraPodName] = []string{k.Pod.Name}
		extra[extraPodUID] = []string{k.Pod.UID}
	}
	if k.Node != nil {
		extra[extraNodeName] = []string{k.Node.Name}
		if k.Node.UID != "" {
			extra[extraNodeUID] = []string{k.Node.UID}
		}
	}
	if len(extra) > 0 {
		caller.Extra = extra
	}
	return caller, nil
}

func serviceAccountName(namespace, name string) string {
	return serviceAccountPrefix + namespace + ":" + name
}

// Presents reports whether a request says who sent it, in whatever way and
// whether or not that can be believed.
func Presents(r *http.Request) bool {
	_, authorization := r.Header["Authorization"]
	return authorization || bearer(r) != "" || (r.TLS != nil && len(r.TLS.PeerCertificates) > 0)
}
