package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const (
	localKey = "local-signer"
	// maxLocalLife bounds a local token: it bridges an outage in steps, and
	// nobody but this hub can revoke it.
	maxLocalLife = time.Hour
	minLocalLife = 10 * time.Minute // as the TokenRequest API has it
)

// LocalSigner makes ServiceAccount tokens while the cloud cannot. They are
// signed by the node's own key, so only the hub of this node accepts them.
type LocalSigner struct {
	issuer string
	clock  *clock.Clock
	key    *ecdsa.PrivateKey
	signer jose.Signer
}

// localClaims are those of a local token. Age is told by the time since boot,
// which no step of a clock changes; the other claims count after a reboot.
type localClaims struct {
	claims

	Boot string        `json:"boot,omitempty"`
	Up   time.Duration `json:"up,omitempty"`
}

// TokenSpec says for whom a local token is.
type TokenSpec struct {
	Namespace         string
	ServiceAccount    string
	ServiceAccountUID string
	PodName, PodUID   string // both empty: not bound to a pod
	NodeName          string
	// Audiences are the requested ones; none means this cluster's API.
	Audiences []string
	// Life is how long the token is wanted; it is brought between 10 minutes
	// and an hour, which is also the default.
	Life time.Duration
}

// NewLocalSigner returns the signer of the named node, with the key that memory
// holds or else a new one that it will hold from now on. By is the clock of its
// tokens; the machine's if nil.
func NewLocalSigner(node string, memory Memory, by *clock.Clock) (*LocalSigner, error) {
	der, err := memory.Load(localKey)
	if err != nil {
		return nil, fmt.Errorf("load local signing key: %w", err)
	}
	key, err := x509.ParseECPrivateKey(der)
	if err != nil {
		// Absent or damaged. A new key only costs the local tokens out there,
		// which their owners replace within the hour.
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, fmt.Errorf("make local signing key: %w", err)
		}
		if der, err = x509.MarshalECPrivateKey(key); err != nil {
			return nil, fmt.Errorf("encode local signing key: %w", err)
		}
		if err := memory.Save(localKey, der); err != nil {
			return nil, fmt.Errorf("save local signing key: %w", err)
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("use local signing key: %w", err)
	}
	return &LocalSigner{issuer: "https://" + node + ".yurthub.local", clock: by, key: key, signer: signer}, nil
}

// Issuer returns the issuer of the signer's tokens. It is also the audience of
// tokens for which none is requested.
func (s *LocalSigner) Issuer() string { return s.issuer }

// Sign returns a token as the spec says, and when it expires.
func (s *LocalSigner) Sign(spec TokenSpec) (token string, expiry time.Time, err error) {
	if spec.Namespace == "" || spec.ServiceAccount == "" {
		return "", time.Time{}, errors.New("sign local token: no service account given")
	}
	life := spec.Life
	if life <= 0 || life > maxLocalLife {
		life = maxLocalLife
	}
	now := s.clock.Now().Truncate(time.Second)
	expiry = now.Add(max(life, minLocalLife))
	c := localClaims{}
	c.Boot, c.Up = s.clock.Uptime()
	c.claims = claims{
		Claims: jwt.Claims{
			Issuer:    s.issuer,
			Subject:   serviceAccountName(spec.Namespace, spec.ServiceAccount),
			Audience:  spec.Audiences,
			Expiry:    jwt.NewNumericDate(expiry),
			NotBefore: jwt.NewNumericDate(now),
			IssuedAt:  jwt.NewNumericDate(now),
			ID:        string(uuid.NewUUID()),
		},
		Kubernetes: kubernetesClaims{
			Namespace:      spec.Namespace,
			ServiceAccount: object{Name: spec.ServiceAccount, UID: spec.ServiceAccountUID},
		},
	}
	if len(c.Audience) == 0 {
		c.Audience = jwt.Audience{s.issuer}
	}
	if spec.PodName != "" {
		c.Kubernetes.Pod = &object{Name: spec.PodName, UID: spec.PodUID}
	}
	if spec.NodeName != "" {
		c.Kubernetes.Node = &object{Name: spec.NodeName}
	}
	token, err = jwt.Signed(s.signer).Claims(c).Serialize()
	if err != nil {
		return "", time.Time{}, fmt.Errorf("sign local token: %w", err)
	}
	return token, expiry, nil
}

// verify returns whom a token of this signer names. The signer's issuer and the
// given audiences are accepted.
func (s *LocalSigner) verify(w *webToken, audiences []string) (*Caller, error) {
	var c localClaims
	if err := w.jwt.Claims(&s.key.PublicKey, &c); err != nil {
		return nil, errors.New("the token's signature is wrong")
	}
	if c.Issuer != s.issuer {
		return nil, errors.New("the token is from another issuer")
	}
	now := s.clock.Now()
	if boot, up := s.clock.Uptime(); boot != "" && boot == c.Boot && c.IssuedAt != nil {
		now = c.IssuedAt.Time().Add(up - c.Up)
	}
	caller, err := c.caller(now, true, append([]string{s.issuer}, audiences...))
	if err != nil {
		return nil, err
	}
	caller.Local = true
	return caller, nil
}
