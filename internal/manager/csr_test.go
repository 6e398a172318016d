package manager

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

func certificateRequest(t *testing.T, subject pkix.Name, dns []string, ips ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{Subject: subject, DNSNames: dns}
	for _, ip := range ips {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// TestCertificateRequests has the stock signer sign what the manager approves.
func TestCertificateRequests(t *testing.T) {
	c := theCluster(t)
	c.node(t, "asker", "", "10.9.7.1")
	// Anybody may ask here; the question is who gets it.
	err := c.cp.Apply(t.Context(), `
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: may-ask}, rules: [{apiGroups: [certificates.k8s.io], resources: [certificatesigningrequests], verbs: [create]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: may-ask}, roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: may-ask}, subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: may-ask}]}
`)
	if err != nil {
		t.Fatal(err)
	}
	hub := pkix.Name{CommonName: "system:node:asker", Organization: []string{"openyurt:yurthub", "system:nodes"}}
	server := pkix.Name{CommonName: "system:node:asker", Organization: []string{"system:nodes"}}
	clientUse := []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth}
	serverUse := []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}
	early := pkix.Name{CommonName: "system:node:early", Organization: []string{"system:nodes"}}
	kube := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	rsaUse := append(slices.Clone(serverUse), certificatesv1.UsageKeyEncipherment)
	self := []string{"system:node:asker", "system:nodes"}
	token := []string{"system:bootstrap:abcdef", "system:bootstrappers"}
	for _, tc := range []struct {
		name    string
		who     []string // user, groups
		signer  string
		usages  []certificatesv1.KeyUsage
		request []byte
		refused string // words of the event, empty if it is signed
	}{
		{"first", token, certificatesv1.KubeAPIServerClientSignerName, clientUse, certificateRequest(t, hub, nil), ""},
		{"renewal", self, certificatesv1.KubeAPIServerClientSignerName, clientUse, certificateRequest(t, hub, nil), ""},
		{"server", self, certificatesv1.KubeletServingSignerName, serverUse, certificateRequest(t, server, []string{"asker", "kubernetes"}, "10.9.7.1", "169.254.2.1", "10.96.0.1"), ""},
		// What hubs of OpenYurt ask for: from 1.7 on with the node's address, before
		// without it, and then before there is a Node, which they wait for.
		{"openyurt", self, certificatesv1.KubeletServingSignerName, rsaUse, certificateRequest(t, server, kube, "10.96.0.1", "169.254.2.1", "127.0.0.1", "10.9.7.1"), ""},
		{"openyurt-joins", []string{"system:node:early", "system:nodes"}, certificatesv1.KubeletServingSignerName, rsaUse, certificateRequest(t, early, kube, "10.96.0.1", "169.254.2.1", "127.0.0.1"), ""},
		{"stranger", []string{"mallory"}, certificatesv1.KubeAPIServerClientSignerName, clientUse, certificateRequest(t, hub, nil), "mallory may not create certificatesigningrequests/nodeclient"},
		{"other-node", []string{"system:node:other", "system:nodes"}, certificatesv1.KubeAPIServerClientSignerName, clientUse, certificateRequest(t, hub, nil), "system:node:other may not create certificatesigningrequests/nodeclient"},
		{"foreign-ip", self, certificatesv1.KubeletServingSignerName, serverUse, certificateRequest(t, server, nil, "10.9.7.1", "10.9.7.2"), `"10.9.7.2" is no address`},
		{"other-server", []string{"mallory", "system:nodes"}, certificatesv1.KubeletServingSignerName, serverUse, certificateRequest(t, server, nil, "10.9.7.1"), "mallory asks for the server certificate of asker: a node asks for its own only"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &certificatesv1.CertificateSigningRequest{
				ObjectMeta: metav1.ObjectMeta{Name: "csr-" + tc.name},
				Spec:       certificatesv1.CertificateSigningRequestSpec{Request: tc.request, SignerName: tc.signer, Usages: tc.usages},
			}
			asker := c.as(t, tc.who[0], append(tc.who[1:], "system:authenticated", "may-ask")...)
			if err := asker.Create(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			if tc.refused == "" {
				await(t, "it is signed", func() error {
					if err := c.Get(t.Context(), client.ObjectKeyFromObject(r), r); err != nil {
						return err
					}
					if len(r.Status.Certificate) == 0 {
						return fmt.Errorf("status %+v", r.Status)
					}
					return nil
				})
				return
			}
			await(t, "an event says why not", func() error {
				out, err := c.cp.Kubectl(t.Context(), "get", "events", "-n", "default", "--field-selector=reason=NotApproved,involvedObject.name="+r.Name)
				if err == nil && !strings.Contains(out, tc.refused) {
					err = errors.New(out)
				}
				return err
			})
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(r), r); err != nil || len(r.Status.Conditions) > 0 {
				t.Errorf("got %+v, %v, want it left alone", r.Status, err)
			}
		})
	}
}
