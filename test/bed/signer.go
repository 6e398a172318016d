package bed

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/yurt-edge/yurt/playground"
)

// Signer signs nodes' certificates in the place of the controller manager,
// which signs none that last less than minutes, and by one authority only. It
// approves the ones for servers too, as an operator does.
type Signer struct {
	client *kubernetes.Clientset
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu     sync.Mutex // guards the following
	by     *tls.Certificate
	life   time.Duration
	lives  map[string]time.Duration // of some nodes, by name
	signed map[string]int           // client certificates, by node
	errs   []error
}

// WithSigner makes a control plane leave signing to a Signer.
func WithSigner(cfg *playground.ControlPlaneConfig) {
	cfg.ControllerManagerFlags = append(cfg.ControllerManagerFlags, "--controllers=-certificatesigningrequest-signing-controller")
}

// Short is a life of certificates that is over soon. They are dated back, so
// that a hub renews one 3 to 16 seconds after it was made and 6 before it ends.
const (
	Short    = 22 * time.Second
	backdate = 40 * time.Second
)

// NewSigner begins to sign by the cluster's authority. Close ends it.
func NewSigner(cloud *playground.ControlPlane, life time.Duration) (*Signer, error) {
	client, err := cloud.Client()
	if err != nil {
		return nil, err
	}
	s := &Signer{client: client, life: life, lives: map[string]time.Duration{}, signed: map[string]int{}}
	if err := s.By(cloud.CA); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.done.Go(func() { s.run(ctx) })
	return s, nil
}

// By makes ca sign from now on.
func (s *Signer) By(ca *playground.Authority) error {
	pair, err := tls.LoadX509KeyPair(ca.CertFile, ca.KeyFile)
	if err != nil {
		return fmt.Errorf("sign by another authority: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.by = &pair
	return nil
}

// Life gives one node's certificates a life of their own.
func (s *Signer) Life(node string, life time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lives[node] = life
}

// Signed is how many client certificates a node was given.
func (s *Signer) Signed(node string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signed[node]
}

// Close ends the signer, and returns what went wrong.
func (s *Signer) Close() error {
	s.cancel()
	s.done.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.errs...)
}

func (s *Signer) run(ctx context.Context) {
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for ctx.Err() == nil {
		w, err := s.client.CertificatesV1().CertificateSigningRequests().Watch(ctx, metav1.ListOptions{})
		if err == nil {
			for ev := range w.ResultChan() {
				csr, ok := ev.Object.(*certificatesv1.CertificateSigningRequest)
				if !ok {
					break // it ends
				}
				s.handle(ctx, csr)
			}
			w.Stop()
		}
		select {
		case <-ctx.Done():
		case <-retry.C:
		}
	}
}

// handle takes a request one step further. Who lost a race comes again with
// the next event.
func (s *Signer) handle(ctx context.Context, csr *certificatesv1.CertificateSigningRequest) {
	var err error
	requests := s.client.CertificatesV1().CertificateSigningRequests()
	server := csr.Spec.SignerName == certificatesv1.KubeletServingSignerName
	approved := slices.ContainsFunc(csr.Status.Conditions, func(c certificatesv1.CertificateSigningRequestCondition) bool {
		return c.Type == certificatesv1.CertificateApproved
	})
	switch {
	case !server && csr.Spec.SignerName != certificatesv1.KubeAPIServerClientKubeletSignerName, len(csr.Status.Certificate) > 0:
		return
	case !approved && server:
		csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
			Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test",
		})
		_, err = requests.UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{})
	case approved:
		var node string
		if csr.Status.Certificate, node, err = s.sign(csr.Spec.Request, server); err == nil {
			_, err = requests.UpdateStatus(ctx, csr, metav1.UpdateOptions{})
		}
		if err == nil && !server {
			s.mu.Lock()
			s.signed[node]++
			s.mu.Unlock()
		}
	}
	// Who signs may lose the right to it, with the authority that it has it by.
	if err != nil && ctx.Err() == nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) && !apierrors.IsUnauthorized(err) {
		s.mu.Lock()
		s.errs = append(s.errs, fmt.Errorf("sign %s: %w", csr.Name, err))
		s.mu.Unlock()
	}
}

func (s *Signer) sign(text []byte, server bool) (cert []byte, node string, err error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, "", errors.New("the request is not PEM")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, "", err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, "", err
	}
	node = strings.TrimPrefix(request.Subject.CommonName, "system:node:")
	s.mu.Lock()
	by, life := s.by, s.life
	if own, ok := s.lives[node]; ok {
		life = own
	}
	s.mu.Unlock()
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial, Subject: request.Subject, DNSNames: request.DNSNames, IPAddresses: request.IPAddresses,
		NotBefore: now.Add(-backdate), NotAfter: now.Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if server {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.Leaf, request.PublicKey, by.PrivateKey)
	if err != nil {
		return nil, "", err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), node, nil
}
