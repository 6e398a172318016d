package playground

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"strings"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
)

func TestServingCertificateRequests(t *testing.T) {
	top, err := DefaultTopology()
	if err != nil {
		t.Fatal(err)
	}
	a := &approver{topology: top}
	const user = "system:node:hangzhou-1"
	for _, tc := range []struct {
		name          string
		subject, from string
		groups        []string
		dns           []string
		ips           []string
		want          string // part of the refusal; empty when acceptable
	}{
		{"kubelet", user, user, []string{"system:nodes"}, []string{"hangzhou-1"}, []string{"10.90.11.11"}, ""},
		{"hub", user, user, []string{"system:nodes"}, []string{"localhost", "kubernetes.default.svc"}, []string{"127.0.0.1", "::1", "169.254.2.1", "10.96.0.1"}, ""},
		{"for another node", "system:node:hangzhou-2", user, []string{"system:nodes"}, nil, nil, "is not the requester"},
		{"address of another node", user, user, []string{"system:nodes"}, nil, []string{"10.90.11.12"}, `"10.90.11.12" is no name of node hangzhou-1`},
		{"foreign name", user, user, []string{"system:nodes"}, []string{"example.org"}, nil, `"example.org" is no name`},
		{"API server's address", user, user, []string{"system:nodes"}, nil, []string{"10.90.0.1"}, `"10.90.0.1" is no name`},
		{"not of the nodes' group", user, user, []string{"system:authenticated"}, nil, nil, "is not a node"},
		{"no machine", "system:node:x", "system:node:x", []string{"system:nodes"}, nil, nil, `there is no machine "x"`},
		{"no node", "alice", "alice", []string{"system:nodes"}, nil, nil, "is not a node"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: tc.subject}, DNSNames: tc.dns}
			for _, ip := range tc.ips {
				template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
			}
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
			if err != nil {
				t.Fatal(err)
			}
			csr := &certificatesv1.CertificateSigningRequest{Spec: certificatesv1.CertificateSigningRequestSpec{
				Request:  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
				Username: tc.from,
				Groups:   tc.groups,
			}}
			err = a.acceptable(csr)
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("want acceptance, got %v", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("want a refusal with %q, got %v", tc.want, err)
			}
		})
	}
	if err := a.acceptable(&certificatesv1.CertificateSigningRequest{}); err == nil {
		t.Error("a request that is not PEM is accepted")
	}
}
