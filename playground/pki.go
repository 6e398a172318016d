package playground

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// certLife is far above the life of any playground. Rotation is tested with
// the certificates that the controller manager signs, not with these.
const certLife = 365 * 24 * time.Hour

// Authority is a certificate authority whose certificate and key are files.
type Authority struct {
	// CertFile and KeyFile are PEM files.
	CertFile, KeyFile string
	// CertPEM is the content of CertFile.
	CertPEM []byte

	cert *x509.Certificate
	key  crypto.Signer
}

// NewAuthority makes a self-signed authority and writes dir/name.crt and
// dir/name.key.
func NewAuthority(dir, name string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := newTemplate(pkix.Name{CommonName: name})
	if err != nil {
		return nil, err
	}
	template.IsCA = true
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign authority %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	a := &Authority{
		CertFile: filepath.Join(dir, name+".crt"),
		KeyFile:  filepath.Join(dir, name+".key"),
		CertPEM:  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		cert:     cert,
		key:      key,
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return a, writePair(a.CertFile, a.CertPEM, a.KeyFile, keyPEM)
}

// Client issues a client certificate for a user, as PEM.
func (a *Authority) Client(user string, groups ...string) (cert, key []byte, err error) {
	return a.issue(pkix.Name{CommonName: user, Organization: groups}, nil, x509.ExtKeyUsageClientAuth)
}

// Server issues a certificate for a server with the given names and IP
// addresses, as PEM. It serves as a client certificate too, as etcd wants it.
func (a *Authority) Server(name string, sans ...string) (cert, key []byte, err error) {
	return a.issue(pkix.Name{CommonName: name}, sans, x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)
}

func (a *Authority) issue(subject pkix.Name, sans []string, usage ...x509.ExtKeyUsage) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template, err := newTemplate(subject)
	if err != nil {
		return nil, nil, err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = usage
	for _, san := range sans {
		if ip := net.ParseIP(san); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, san)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign certificate of %s: %w", subject.CommonName, err)
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), keyPEM, nil
}

func newTemplate(subject pkix.Name) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      subject,
		NotBefore:    now.Add(-5 * time.Minute), // for clocks of machines that lag
		NotAfter:     now.Add(certLife),
	}, nil
}

// pki is everything secret of one cluster, as files in dir.
type pki struct {
	dir        string
	ca         *Authority // signs the API server, its clients and the nodes
	frontProxy *Authority // signs who may speak for others to aggregated APIs
	etcd       *Authority // signs etcd and its only client
}

func newPKI(dir string, serverSANs []string) (*pki, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	p := &pki{dir: dir}
	for name, into := range map[string]**Authority{"ca": &p.ca, "front-proxy-ca": &p.frontProxy, "etcd-ca": &p.etcd} {
		authority, err := NewAuthority(dir, name)
		if err != nil {
			return nil, err
		}
		*into = authority
	}
	pairs := []struct {
		name  string
		issue func() (cert, key []byte, err error)
	}{
		{"apiserver", func() ([]byte, []byte, error) { return p.ca.Server("kube-apiserver", serverSANs...) }},
		{"kubelet-client", func() ([]byte, []byte, error) { return p.ca.Client(kubeletClient) }},
		{"front-proxy-client", func() ([]byte, []byte, error) { return p.frontProxy.Client("front-proxy-client") }},
		{"etcd", func() ([]byte, []byte, error) { return p.etcd.Server("etcd", "127.0.0.1", "localhost") }},
		{"etcd-client", func() ([]byte, []byte, error) { return p.etcd.Client("kube-apiserver") }},
	}
	for _, pair := range pairs {
		cert, key, err := pair.issue()
		if err != nil {
			return nil, err
		}
		if err := writePair(p.file(pair.name+".crt"), cert, p.file(pair.name+".key"), key); err != nil {
			return nil, err
		}
	}
	return p, p.serviceAccountKeys()
}

// serviceAccountKeys makes the pair that signs tokens. It is RSA as kubeadm
// makes it, so that what reads our tokens has met what users have.
func (p *pki) serviceAccountKeys() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	private, err := encodeKey(key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return writePair(p.file("sa.pub"), public, p.file("sa.key"), private)
}

func (p *pki) file(name string) string { return filepath.Join(p.dir, name) }

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func writePair(certFile string, cert []byte, keyFile string, key []byte) error {
	if err := os.WriteFile(certFile, cert, 0o644); err != nil {
		return err
	}
	return os.WriteFile(keyFile, key, 0o600)
}

// kubeconfig returns a kubeconfig with one cluster, one user and one context.
func kubeconfig(server string, cluster clientcmdapi.Cluster, user clientcmdapi.AuthInfo) ([]byte, error) {
	const name = "playground"
	cluster.Server = server
	config := clientcmdapi.NewConfig()
	config.Clusters[name] = &cluster
	config.AuthInfos[name] = &user
	config.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name}
	config.CurrentContext = name
	return clientcmd.Write(*config)
}
