package cert

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/yurt-edge/yurt/internal/atomicfile"
)

const (
	blockCertificate = "CERTIFICATE"
	blockKey         = "EC PRIVATE KEY"
	blockSealed      = "YURTHUB SEALED KEY" // an EC PRIVATE KEY
)

// Sealer keeps what is on disk from being read. What is sealed under one name
// does not open under another.
type Sealer interface {
	Seal(name string, plain []byte) []byte
	Unseal(name string, sealed []byte) ([]byte, error)
}

// loadPair reads a certificate and its key from one file, as the kubelet
// stores them. A key that should be sealed and is not, as it was in the first
// version, is sealed at once.
func loadPair(path string, keys Sealer) (*tls.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	plain, bare, err := unsealKey(filepath.Base(path), data, keys)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	pair, err := tls.X509KeyPair(plain, plain)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	if key, ok := pair.PrivateKey.(*ecdsa.PrivateKey); ok && keys != nil && bare {
		return storePair(path, data, key, keys)
	}
	return &pair, nil
}

// unsealKey returns PEM data with its sealed key, if it has one, in the clear,
// and whether a key was not sealed.
func unsealKey(name string, data []byte, keys Sealer) (plain []byte, bare bool, err error) {
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return plain, bare, nil
		}
		bare = bare || strings.HasSuffix(block.Type, "PRIVATE KEY")
		if block.Type == blockSealed {
			if keys == nil {
				return nil, false, errors.New("its key is sealed")
			}
			if block.Bytes, err = keys.Unseal(name, block.Bytes); err != nil {
				return nil, false, err
			}
			block.Type = blockKey
		}
		plain = append(plain, pem.EncodeToMemory(block)...)
	}
}

// storePair writes the certificates of a bundle and a key to one file, and
// returns them as they will be read.
func storePair(path string, certificates []byte, key *ecdsa.PrivateKey, keys Sealer) (*tls.Certificate, error) {
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(certificates, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("use certificate for %s: %w", path, err)
	}
	var data []byte
	for _, der := range pair.Certificate {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: der})...)
	}
	if keys != nil {
		block, _ := pem.Decode(keyPEM)
		keyPEM = pem.EncodeToMemory(&pem.Block{Type: blockSealed, Bytes: keys.Seal(filepath.Base(path), block.Bytes)})
	}
	if err := atomicfile.WriteFile(path, append(data, keyPEM...), 0o600); err != nil {
		return nil, fmt.Errorf("store certificate: %w", err)
	}
	return &pair, nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: der}), nil
}

// parseAuthority reads the certificates of a PEM bundle.
func parseAuthority(data []byte) (*authority, error) {
	a := &authority{pool: x509.NewCertPool()}
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != blockCertificate {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate authority: %w", err)
		}
		if len(a.certs) == maxAuthorities {
			return nil, fmt.Errorf("parse certificate authority: more than %d certificates", maxAuthorities)
		}
		a.pool.AddCert(cert)
		a.certs = append(a.certs, cert)
		a.pem = append(a.pem, pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: block.Bytes})...)
	}
	if len(a.pem) == 0 {
		return nil, errors.New("parse certificate authority: no certificate found")
	}
	return a, nil
}

// givenPEM returns the authority that an operator gives, nil if there is none.
func (c *Certificates) givenPEM() ([]byte, error) {
	if c.cfg.ClusterCAFile != "" {
		data, err := os.ReadFile(c.cfg.ClusterCAFile)
		if !errors.Is(err, os.ErrNotExist) {
			return data, err
		}
	}
	if c.cfg.Mode != ModeToken || c.cfg.BootstrapKubeconfig == "" {
		return nil, nil
	}
	boot, err := loadBootstrap(c.cfg.BootstrapKubeconfig)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(c.Servers()) == 0 && boot.server != "" {
		c.servers.Store(&[]string{boot.server})
	}
	return boot.ca, nil
}

// setCluster makes data the cluster's authority, here and on disk.
func (c *Certificates) setCluster(data []byte) error {
	next, err := parseAuthority(data)
	if err != nil {
		return err
	}
	c.files.Lock()
	defer c.files.Unlock()
	if old := c.cluster.Load(); old != nil && bytes.Equal(old.pem, next.pem) {
		return nil
	}
	if err := writeIfChanged(c.path(clusterCAFile), next.pem); err != nil {
		return err
	}
	if c.cluster.Swap(next) != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changedLocked()
	}
	return nil
}

// writeBundle brings the bundle file up to date.
func (c *Certificates) writeBundle() error {
	c.files.Lock()
	defer c.files.Unlock()
	bundle := c.local.authorityPEM()
	if a := c.cluster.Load(); a != nil {
		bundle = append(bytes.Clone(a.pem), bundle...)
	}
	return writeIfChanged(c.path(BundleFile), bundle)
}

// writeIfChanged spares the flash, and readers that watch the file.
func writeIfChanged(path string, data []byte) error {
	old, err := os.ReadFile(path)
	if err == nil && bytes.Equal(old, data) {
		return nil
	}
	return atomicfile.WriteFile(path, data, 0o644)
}
