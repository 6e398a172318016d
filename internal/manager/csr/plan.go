package csr

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
)

const (
	nodePrefix = "system:node:"
	nodesGroup = "system:nodes"
	hubGroup   = "openyurt:yurthub"
	tenant     = "openyurt:tenant:"
)

// kind is a request that may be approved, by what it asks for.
type kind struct {
	node   string // whose certificate it is
	server bool
	// subresource of certificatesigningrequests that the requester must be
	// allowed to create: nodeclient for a first certificate by a bootstrap
	// token, selfnodeclient for a node's own next one. Kubernetes binds them.
	subresource string
}

var (
	clientUsages = []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature}
	serverUsages = []certificatesv1.KeyUsage{certificatesv1.UsageServerAuth, certificatesv1.UsageDigitalSignature}
)

// recognise tells what a request asks for. Nil without an error: it is not a
// hub's, and is for others to decide. A refusal says why a hub's request is
// left to an administrator.
func recognise(r *certificatesv1.CertificateSigningRequest) (*kind, error) {
	block, rest := pem.Decode(r.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, nil //nolint:nilnil // not a hub's
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, nil //nolint:nilnil,nilerr // not a hub's
	}
	node, ok := strings.CutPrefix(req.Subject.CommonName, nodePrefix)
	orgs := req.Subject.Organization
	if !ok || node == "" || !slices.Contains(orgs, nodesGroup) {
		return nil, nil //nolint:nilnil // not a hub's
	}
	if err := req.CheckSignature(); err != nil {
		return nil, refuse("the request is not signed by its own key")
	}
	k := &kind{node: node, subresource: "nodeclient"}
	self := r.Spec.Username == nodePrefix+node
	if self {
		k.subresource = "selfnodeclient"
	}
	switch r.Spec.SignerName {
	case certificatesv1.KubeAPIServerClientSignerName:
		if !slices.Contains(orgs, hubGroup) {
			return nil, nil //nolint:nilnil // the kubelet's, which the controller manager approves
		}
		err = clientRefusal(r, req)
	case certificatesv1.KubeletServingSignerName:
		k.server = true
		err = serverRefusal(r, req)
		if !self {
			err = refuse("%s asks for the server certificate of %s: a node asks for its own only", r.Spec.Username, node)
		}
	default:
		return nil, nil //nolint:nilnil // another signer's
	}
	if err != nil {
		return nil, err
	}
	return k, nil
}

func clientRefusal(r *certificatesv1.CertificateSigningRequest, req *x509.CertificateRequest) error {
	for _, o := range req.Subject.Organization {
		switch {
		case o == nodesGroup, o == hubGroup:
		case !strings.HasPrefix(o, tenant):
			return refuse("organization %q is not a hub's", o)
		case !slices.Contains(r.Spec.Groups, o):
			// Rights may be bound to it, and nothing says who is whose.
			return refuse("%s is not in group %q", r.Spec.Username, o)
		}
	}
	if len(req.DNSNames)+len(req.IPAddresses)+len(req.EmailAddresses)+len(req.URIs) > 0 {
		return refuse("a client certificate has no alternative names")
	}
	if !usagesWithin(r.Spec.Usages, clientUsages) {
		return refuse("usages %v are not those of a client", r.Spec.Usages)
	}
	return nil
}

func serverRefusal(r *certificatesv1.CertificateSigningRequest, req *x509.CertificateRequest) error {
	if len(req.Subject.Organization) != 1 {
		return refuse("organizations %v: want %s alone", req.Subject.Organization, nodesGroup)
	}
	if !usagesWithin(r.Spec.Usages, serverUsages) {
		return refuse("usages %v are not those of a server", r.Spec.Usages)
	}
	if len(req.EmailAddresses)+len(req.URIs) > 0 || len(req.DNSNames)+len(req.IPAddresses) == 0 {
		return refuse("a server certificate has DNS names or addresses, and nothing else")
	}
	return nil
}

// usagesWithin allows key encipherment beside, which RSA keys ask for.
func usagesWithin(have, want []certificatesv1.KeyUsage) bool {
	for _, u := range have {
		if !slices.Contains(want, u) && u != certificatesv1.UsageKeyEncipherment {
			return false
		}
	}
	return !slices.ContainsFunc(want, func(u certificatesv1.KeyUsage) bool { return !slices.Contains(have, u) })
}

// names are the alternative names that a hub's server certificate may have
// beside those of its Node: they lead to the hub on the node that asks, and
// nowhere else.
type names struct {
	dns []string
	ips []net.IP
}

// foreignNames returns the first alternative name that is neither the Node's
// nor common, empty if there is none.
func foreignNames(request []byte, node *corev1.Node, common names) (string, error) {
	block, _ := pem.Decode(request)
	if block == nil {
		return "", errors.New("no PEM block")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("parse request: %w", err)
	}
	dns, ips := slices.Clone(common.dns), slices.Clone(common.ips)
	for _, a := range node.Status.Addresses {
		switch a.Type {
		case corev1.NodeHostName, corev1.NodeInternalDNS, corev1.NodeExternalDNS:
			dns = append(dns, a.Address)
		case corev1.NodeInternalIP, corev1.NodeExternalIP:
			if ip := net.ParseIP(a.Address); ip != nil {
				ips = append(ips, ip)
			}
		}
	}
	for _, name := range req.DNSNames {
		if !slices.Contains(dns, name) {
			return name, nil
		}
	}
	for _, ip := range req.IPAddresses {
		if !slices.ContainsFunc(ips, ip.Equal) {
			return ip.String(), nil
		}
	}
	return "", nil
}

// refusal is why a request is not approved.
type refusal struct{ why string }

func (r *refusal) Error() string { return r.why }

func refuse(format string, args ...any) error { return &refusal{fmt.Sprintf(format, args...)} }
