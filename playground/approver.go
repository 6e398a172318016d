package playground

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// approver does what an operator or a cloud does in a real cluster: it approves
// the serving certificates of nodes, which Kubernetes never does by itself.
type approver struct {
	client   kubernetes.Interface
	topology Topology
	log      *slog.Logger
}

// run approves requests and sets the pod CIDR of new nodes until ctx ends.
func (a *approver) run(ctx context.Context) {
	err := poll(ctx, 500*time.Millisecond, func() (bool, error) {
		if err := a.sweep(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("sweep of requests and nodes", "err", err)
		}
		return false, nil
	})
	a.log.Debug("approver ends", "err", err)
}

func (a *approver) sweep(ctx context.Context) error {
	requests, err := a.client.CertificatesV1().CertificateSigningRequests().List(ctx, metav1.ListOptions{
		FieldSelector: "spec.signerName=" + certificatesv1.KubeletServingSignerName,
	})
	if err != nil {
		return fmt.Errorf("list certificate requests: %w", err)
	}
	for i := range requests.Items {
		if err := a.review(ctx, &requests.Items[i]); err != nil {
			return err
		}
	}
	return a.setPodCIDRs(ctx)
}

func (a *approver) review(ctx context.Context, csr *certificatesv1.CertificateSigningRequest) error {
	if len(csr.Status.Conditions) > 0 {
		return nil
	}
	condition := certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue,
		Reason: "Playground", Message: "the names are the node's own",
	}
	if err := a.acceptable(csr); err != nil {
		condition.Type, condition.Message = certificatesv1.CertificateDenied, err.Error()
	}
	a.log.Info("certificate request reviewed", "node", csr.Spec.Username, "decision", condition.Type, "reason", condition.Message)
	csr.Status.Conditions = append(csr.Status.Conditions, condition)
	_, err := a.client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{})
	if err != nil {
		return fmt.Errorf("approve %s: %w", csr.Name, err)
	}
	return nil
}

// acceptable returns why a serving certificate must not be signed: a node may
// speak for itself, and its hub for the API server towards the node's pods.
func (a *approver) acceptable(csr *certificatesv1.CertificateSigningRequest) error {
	block, _ := pem.Decode(csr.Spec.Request)
	if block == nil {
		return errors.New("request is not PEM")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return fmt.Errorf("parse request: %w", err)
	}
	if request.Subject.CommonName != csr.Spec.Username {
		return fmt.Errorf("subject %q is not the requester %q", request.Subject.CommonName, csr.Spec.Username)
	}
	name, ok := strings.CutPrefix(csr.Spec.Username, "system:node:")
	if !ok || !slices.Contains(csr.Spec.Groups, "system:nodes") {
		return fmt.Errorf("requester %q is not a node", csr.Spec.Username)
	}
	m, ok := a.topology.Machine(name)
	if !ok {
		return fmt.Errorf("there is no machine %q", name)
	}
	firstIP, err := firstServiceIP(a.topology.ServiceCIDR)
	if err != nil {
		return err
	}
	allowed := []string{
		m.Name, m.Address, "127.0.0.1", "::1", "169.254.2.1", "localhost", firstIP,
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}
	sans := slices.Clone(request.DNSNames)
	for _, ip := range request.IPAddresses {
		sans = append(sans, ip.String())
	}
	for _, san := range sans {
		if !slices.Contains(allowed, san) {
			return fmt.Errorf("%q is no name of node %s", san, name)
		}
	}
	if len(request.EmailAddresses)+len(request.URIs) > 0 {
		return errors.New("only names and addresses are signed")
	}
	return nil
}

// setPodCIDRs writes to nodes what the topology says. The kubelet may not do
// that itself.
func (a *approver) setPodCIDRs(ctx context.Context) error {
	nodes, err := a.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	for _, n := range nodes.Items {
		m, ok := a.topology.Machine(n.Name)
		if !ok || n.Spec.PodCIDR != "" {
			continue
		}
		patch := fmt.Sprintf(`{"spec":{"podCIDR":%[1]q,"podCIDRs":[%[1]q]}}`, m.PodCIDR)
		if _, err := a.client.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("set pod CIDR of %s: %w", n.Name, err)
		}
	}
	return nil
}
