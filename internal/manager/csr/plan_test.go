package csr

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/url"
	"strings"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
)

// ask makes a request of node-1's hub for a client certificate, by itself, or
// what change makes of it.
func ask(t testing.TB, change func(*x509.CertificateRequest, *certificatesv1.CertificateSigningRequestSpec)) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:node-1", Organization: []string{"openyurt:yurthub", "system:nodes"}}}
	spec := certificatesv1.CertificateSigningRequestSpec{
		SignerName: certificatesv1.KubeAPIServerClientSignerName, Username: "system:node:node-1", Groups: []string{"system:nodes"},
		Usages: []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth},
	}
	if change != nil {
		change(template, &spec)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	if spec.Request == nil {
		spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	}
	return &certificatesv1.CertificateSigningRequest{Spec: spec}
}

func serving(c *x509.CertificateRequest, s *certificatesv1.CertificateSigningRequestSpec) {
	c.Subject.Organization = []string{"system:nodes"}
	c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)}
	s.SignerName = certificatesv1.KubeletServingSignerName
	s.Usages = []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}
}

func TestRecognise(t *testing.T) {
	type req = x509.CertificateRequest
	type spec = certificatesv1.CertificateSigningRequestSpec
	for name, tc := range map[string]struct {
		change func(*req, *spec)
		want   string // subresource, "server", "other" or the words of a refusal
	}{
		"renewal":        {nil, "selfnodeclient"},
		"first":          {func(_ *req, s *spec) { s.Username = "system:bootstrap:abcdef" }, "nodeclient"},
		"for another":    {func(_ *req, s *spec) { s.Username = "system:node:node-2" }, "nodeclient"},
		"server":         {serving, "server"},
		"RSA":            {func(_ *req, s *spec) { s.Usages = append(s.Usages, certificatesv1.UsageKeyEncipherment) }, "selfnodeclient"},
		"kubelet":        {func(c *req, _ *spec) { c.Subject.Organization = []string{"system:nodes"} }, "other"},
		"other signer":   {func(_ *req, s *spec) { s.SignerName = "example.com/x" }, "other"},
		"kubelet signer": {func(_ *req, s *spec) { s.SignerName = certificatesv1.KubeAPIServerClientKubeletSignerName }, "other"},
		"no node":        {func(c *req, _ *spec) { c.Subject.CommonName = "system:node:" }, "other"},
		"user":           {func(c *req, _ *spec) { c.Subject.CommonName = "admin" }, "other"},
		"not PEM":        {func(_ *req, s *spec) { s.Request = []byte("x") }, "other"},
		"masters":        {func(c *req, _ *spec) { c.Subject.Organization = append(c.Subject.Organization, "system:masters") }, `organization "system:masters" is not a hub's`},
		"tenant":         {func(c *req, _ *spec) { c.Subject.Organization = append(c.Subject.Organization, "openyurt:tenant:a") }, `is not in group "openyurt:tenant:a"`},
		"own tenant": {func(c *req, s *spec) {
			c.Subject.Organization = append(c.Subject.Organization, "openyurt:tenant:a")
			s.Groups = append(s.Groups, "openyurt:tenant:a")
		}, "selfnodeclient"},
		"client with SAN":  {func(c *req, _ *spec) { c.DNSNames = []string{"a"} }, "no alternative names"},
		"client as server": {func(_ *req, s *spec) { s.Usages = append(s.Usages, certificatesv1.UsageServerAuth) }, "are not those of a client"},
		"client as CA":     {func(_ *req, s *spec) { s.Usages = append(s.Usages, certificatesv1.UsageCertSign) }, "are not those of a client"},
		"too few usages":   {func(_ *req, s *spec) { s.Usages = s.Usages[:1] }, "are not those of a client"},
		"another's server": {func(c *req, s *spec) { serving(c, s); s.Username = "system:node:node-2" }, "asks for its own only"},
		"server by token":  {func(c *req, s *spec) { serving(c, s); s.Username = "system:bootstrap:abcdef" }, "asks for its own only"},
		"server as hub": {func(c *req, s *spec) {
			serving(c, s)
			c.Subject.Organization = []string{"system:nodes", "openyurt:yurthub"}
		}, "want system:nodes alone"},
		"server as client": {func(c *req, s *spec) { serving(c, s); s.Usages = append(s.Usages, certificatesv1.UsageClientAuth) }, "are not those of a server"},
		"server of none":   {func(c *req, s *spec) { serving(c, s); c.IPAddresses = nil }, "has DNS names or addresses"},
		"server with URI":  {func(c *req, s *spec) { serving(c, s); c.URIs = []*url.URL{{Scheme: "spiffe", Host: "a"}} }, "has DNS names or addresses"},
	} {
		k, err := recognise(ask(t, tc.change))
		got := "other"
		switch {
		case err != nil:
			got = err.Error()
		case k != nil && k.server:
			got = "server"
		case k != nil:
			got = k.subresource
		}
		if got != tc.want && (err == nil || !strings.Contains(got, tc.want)) {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
		if k != nil && k.node != "node-1" {
			t.Errorf("%s: got node %q", name, k.node)
		}
	}
	// A signature that does not fit.
	r := ask(t, nil)
	block, _ := pem.Decode(r.Spec.Request)
	block.Bytes[len(block.Bytes)-1] ^= 1
	r.Spec.Request = pem.EncodeToMemory(block)
	if k, err := recognise(r); k != nil || err == nil {
		t.Errorf("forged: got %+v, %v", k, err)
	}
	// A second block, which another reader may take for the request.
	r = ask(t, nil)
	r.Spec.Request = append(r.Spec.Request, r.Spec.Request...)
	if k, _ := recognise(r); k != nil {
		t.Errorf("two requests in one: got %+v", k)
	}
}

func TestForeignNames(t *testing.T) {
	node := &corev1.Node{Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
		{Type: corev1.NodeInternalIP, Address: "10.0.0.1"},
		{Type: corev1.NodeExternalIP, Address: "2001:db8::1"},
		{Type: corev1.NodeHostName, Address: "node-1"},
		{Type: corev1.NodeInternalDNS, Address: "node-1.internal"},
	}}}
	common := names{dns: []string{"kubernetes"}, ips: []net.IP{net.ParseIP("169.254.2.1")}}
	for _, tc := range []struct{ dns, ips, want string }{
		{"node-1 node-1.internal kubernetes", "10.0.0.1 2001:db8::1 169.254.2.1", ""},
		{"", "10.0.0.2", "10.0.0.2"},
		{"*.internal", "", "*.internal"},
		{"NODE-1", "", "NODE-1"},
		{"10.0.0.1", "", "10.0.0.1"}, // an address as a name is none
		{"node-1.", "", "node-1."},
		{"kubernetes.evil", "", "kubernetes.evil"},
		{"", "::ffff:10.0.0.1", ""},
	} {
		r := ask(t, func(c *x509.CertificateRequest, s *certificatesv1.CertificateSigningRequestSpec) {
			serving(c, s)
			c.DNSNames, c.IPAddresses = strings.Fields(tc.dns), nil
			for ip := range strings.FieldsSeq(tc.ips) {
				c.IPAddresses = append(c.IPAddresses, net.ParseIP(ip))
			}
		})
		if got, err := foreignNames(r.Spec.Request, node, common); got != tc.want || err != nil {
			t.Errorf("%q %q: got %q, %v, want %q", tc.dns, tc.ips, got, err, tc.want)
		}
	}
}

// FuzzRecognise: whatever is asked, nothing panics, and what is recognised is
// a node's, with nothing but a hub's groups.
func FuzzRecognise(f *testing.F) {
	f.Add(ask(f, nil).Spec.Request, "system:node:node-1", true)
	f.Add(ask(f, serving).Spec.Request, "system:node:node-1", false)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n"), "", true)
	f.Fuzz(func(t *testing.T, request []byte, user string, client bool) {
		r := ask(t, func(_ *x509.CertificateRequest, s *certificatesv1.CertificateSigningRequestSpec) {
			s.Request, s.Username = request, user
			if !client {
				s.SignerName = certificatesv1.KubeletServingSignerName
				s.Usages = []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}
			}
		})
		k, err := recognise(r)
		if k == nil {
			return
		}
		if err != nil || k.node == "" || k.server == client {
			t.Errorf("got %+v and %v", k, err)
		}
		block, _ := pem.Decode(request)
		parsed, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range parsed.Subject.Organization {
			if o != "system:nodes" && o != "openyurt:yurthub" && !strings.HasPrefix(o, "openyurt:tenant:") {
				t.Errorf("recognised with organization %q", o)
			}
		}
		if k.server && user != "system:node:"+k.node {
			t.Errorf("%q got the server certificate of %q", user, k.node)
		}
		if _, err := foreignNames(request, &corev1.Node{}, names{}); err != nil {
			t.Error(err)
		}
	})
}
