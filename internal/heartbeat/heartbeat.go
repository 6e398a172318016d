// Package heartbeat is the word of a hub without a link that its node lives,
// as it travels through another hub of the pool to the cloud.
//
// A heartbeat is signed with the key of the node's client certificate, which
// travels along. It is good for a short time from the moment at which it was
// signed, and each is signed later than the one before: so the time is its
// sequence too, which needs no disk and does not repeat after a restart.
package heartbeat

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// Good is how far the time of a heartbeat may be from the time of whoever
	// judges it, so that neither what somebody kept nor what was signed ahead
	// is worth anything.
	Good = 90 * time.Second
	// MaxCarried is how many heartbeats one renewal of a lease carries, and one
	// message between hubs.
	MaxCarried = 32
	// MaxKept is for how many nodes one node vouches. It carries them in turns.
	// Kubelets renew their lease four times in its life, and up to 4 % later
	// than that, so each of them is heard again after 3 * 0.26 = 0.78 of the
	// life: 31.2 s of 40.
	MaxKept = Turns * MaxCarried
	// Turns is in how many of them.
	Turns = 3
	// MaxSize bounds one heartbeat as JSON, certificates included.
	MaxSize = 6 << 10
	// MaxText bounds as many of them as one renewal carries. The API server
	// takes 256 KiB of annotations.
	MaxText = MaxCarried*(MaxSize+1) + 1
	// maxChain bounds the authorities between a node's certificate and a root.
	maxChain = 3
)

// Due reports whether the cloud should take a heartbeat to renew a lease with
// that life of which nothing was heard for so long. It is the middle between
// one turn of the carrier and two: so one of 32 nodes is renewed by every second
// renewal of the carrier and one of 96 by each that carries it, never by one
// less for a moment that a clock or a watch is off.
func Due(silence, life time.Duration) bool { return silence >= life*3/8 }

// purpose begins what is signed, so that nothing else that the key signs can
// be taken for a heartbeat.
const purpose = "openyurt.io node heartbeat v1\x00"

var (
	// ErrForged means that it is not the word of the node that it names.
	ErrForged = errors.New("not signed by the node")
	// ErrStale means that it is from another time.
	ErrStale = errors.New("not of this time")
)

// Beat is what a hub says of its node.
type Beat struct {
	Node string    `json:"node"`
	UID  types.UID `json:"uid"`
	// Time is when it was signed, by the cloud's time as the hub knows it.
	Time metav1.MicroTime `json:"time"`
	// Renewed is what the kubelet wrote into its lease, by the node's clock.
	Renewed metav1.MicroTime `json:"renewed"`
	// Ready is the kubelet's own word on its condition Ready.
	Ready corev1.ConditionStatus `json:"ready"`
	// To is the only node that may carry it: the one by whose time it was
	// signed, since the signer does not know the cloud's. Empty: any of the pool.
	To string `json:"to,omitempty"`
}

// For reports, as an error, that another node than by is to carry it.
func (b Beat) For(by string) error {
	if b.To != "" && b.To != by {
		return fmt.Errorf("heartbeat of %s was signed by the time of %s, and is for that node to carry", b.Node, b.To)
	}
	return nil
}

// Signed is a heartbeat on its way.
type Signed struct {
	Beat        []byte `json:"beat"` // JSON of a Beat
	Signature   []byte `json:"signature"`
	Certificate []byte `json:"certificate"` // DER
	// Chain are the authorities between the certificate and a root, as in TLS.
	Chain [][]byte `json:"chain,omitempty"`
}

// Sign signs b with the key of the first certificate of the chain, in DER.
func Sign(b Beat, chain [][]byte, key crypto.Signer) (Signed, error) {
	if len(chain) == 0 {
		return Signed{}, errors.New("sign heartbeat: no certificate")
	}
	text, err := json.Marshal(b)
	if err != nil {
		return Signed{}, fmt.Errorf("sign heartbeat: %w", err)
	}
	message, options := signedBytes(text), crypto.SignerOpts(crypto.Hash(0))
	if _, whole := key.Public().(ed25519.PublicKey); !whole {
		sum := sha256.Sum256(message)
		message, options = sum[:], crypto.SHA256
	}
	signature, err := key.Sign(rand.Reader, message, options)
	if err != nil {
		return Signed{}, fmt.Errorf("sign heartbeat: %w", err)
	}
	return Signed{Beat: text, Signature: signature, Certificate: chain[0], Chain: chain[1:]}, nil
}

func signedBytes(text []byte) []byte { return append([]byte(purpose), text...) }

// Open returns the heartbeat if the node that it names signed it, with a
// certificate of an authority of roots that is valid now.
func (s Signed) Open(roots *x509.CertPool, now time.Time) (Beat, error) {
	var b Beat
	leaf, err := x509.ParseCertificate(s.Certificate)
	if err != nil {
		return b, fmt.Errorf("%w: read certificate: %w", ErrForged, err)
	}
	if err := s.verify(leaf, roots, now); err != nil {
		return b, fmt.Errorf("%w: %w", ErrForged, err)
	}
	node, isNode := strings.CutPrefix(leaf.Subject.CommonName, "system:node:")
	if !isNode || node == "" || !slices.Contains(leaf.Subject.Organization, "system:nodes") {
		return b, fmt.Errorf("%w: the certificate of %q is not a node's", ErrForged, leaf.Subject.CommonName)
	}
	algorithm, err := algorithmOf(leaf)
	if err != nil {
		return b, fmt.Errorf("%w: %w", ErrForged, err)
	}
	if err := leaf.CheckSignature(algorithm, signedBytes(s.Beat), s.Signature); err != nil {
		return b, fmt.Errorf("%w: %w", ErrForged, err)
	}
	if err := json.Unmarshal(s.Beat, &b); err != nil {
		return b, fmt.Errorf("%w: read heartbeat: %w", ErrForged, err)
	}
	if b.Node != node {
		return b, fmt.Errorf("%w: node %q signed for %q", ErrForged, node, b.Node)
	}
	return b, nil
}

// verify checks that an authority of roots stands behind the certificate.
func (s Signed) verify(leaf *x509.Certificate, roots *x509.CertPool, now time.Time) error {
	if roots == nil { // would mean the system's
		return errors.New("the cluster's certificate authority is not known")
	}
	if len(s.Chain) > maxChain {
		return fmt.Errorf("%d certificates of authorities: want at most %d", len(s.Chain), maxChain)
	}
	options := x509.VerifyOptions{
		Roots: roots, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, der := range s.Chain {
		authority, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("read certificate of an authority: %w", err)
		}
		options.Intermediates.AddCert(authority)
	}
	if _, err := leaf.Verify(options); err != nil {
		return fmt.Errorf("verify certificate: %w", err)
	}
	return nil
}

// Claimed is what the heartbeat says, proved or not.
func (s Signed) Claimed() (b Beat) {
	if json.Unmarshal(s.Beat, &b) != nil {
		return Beat{}
	}
	return b
}

func algorithmOf(leaf *x509.Certificate) (x509.SignatureAlgorithm, error) {
	switch leaf.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return x509.ECDSAWithSHA256, nil
	case *rsa.PublicKey:
		return x509.SHA256WithRSA, nil
	case ed25519.PublicKey:
		return x509.PureEd25519, nil
	}
	return 0, fmt.Errorf("a key of type %T signs no heartbeats", leaf.PublicKey)
}

// Fresh reports, as an error, that the heartbeat is not of this time.
func (b Beat) Fresh(now time.Time) error {
	if d := now.Sub(b.Time.Time); d > Good || d < -Good {
		return fmt.Errorf("%w: it is %s old", ErrStale, d.Round(time.Second))
	}
	return nil
}

// Join makes an annotation of heartbeats; none make an empty one.
func Join(all []Signed) (string, error) {
	if len(all) == 0 {
		return "", nil
	}
	text, err := json.Marshal(all[:min(len(all), MaxCarried)])
	if err != nil {
		return "", fmt.Errorf("write heartbeats: %w", err)
	}
	return string(text), nil
}

// Split reads what Join wrote.
func Split(annotation string) ([]Signed, error) {
	if annotation == "" {
		return nil, nil
	}
	if len(annotation) > MaxText {
		return nil, fmt.Errorf("heartbeats of %d bytes: want at most %d", len(annotation), MaxText)
	}
	var texts []json.RawMessage
	if err := json.Unmarshal([]byte(annotation), &texts); err != nil {
		return nil, fmt.Errorf("read heartbeats: %w", err)
	}
	if len(texts) > MaxCarried {
		return nil, fmt.Errorf("%d heartbeats: want at most %d", len(texts), MaxCarried)
	}
	all := make([]Signed, len(texts))
	for i, text := range texts {
		if len(text) > MaxSize {
			return nil, fmt.Errorf("heartbeat of %d bytes: want at most %d", len(text), MaxSize)
		}
		if err := json.Unmarshal(text, &all[i]); err != nil {
			return nil, fmt.Errorf("read heartbeats: %w", err)
		}
	}
	return all, nil
}
