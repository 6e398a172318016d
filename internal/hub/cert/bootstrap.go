package cert

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// bootstrap is what a kubeconfig gives a node to start with.
type bootstrap struct {
	server string
	ca     []byte
	token  string
}

// kubeconfig has the fields of a kubeconfig that a bootstrap file uses.
type kubeconfig struct {
	CurrentContext string `json:"current-context"`
	Contexts       []struct {
		Name    string `json:"name"`
		Context struct {
			Cluster string `json:"cluster"`
			User    string `json:"user"`
		} `json:"context"`
	} `json:"contexts"`
	Clusters []struct {
		Name    string `json:"name"`
		Cluster struct {
			Server string `json:"server"`
			CAFile string `json:"certificate-authority"`
			CAData []byte `json:"certificate-authority-data"`
		} `json:"cluster"`
	} `json:"clusters"`
	Users []struct {
		Name string `json:"name"`
		User struct {
			Token     string `json:"token"`
			TokenFile string `json:"tokenFile"`
		} `json:"user"`
	} `json:"users"`
}

var line = regexp.MustCompile(`line \d+`)

// loadBootstrap reads a kubeconfig. Without a current context, as in kubeadm's
// cluster-info, the only cluster and user are meant.
func loadBootstrap(path string) (*bootstrap, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read bootstrap file: %w", err)
	}
	b, err := parseBootstrap(data, filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("read bootstrap file %s: %w", path, err)
	}
	return b, nil
}

// parseBootstrap reads a kubeconfig whose relative paths start at dir; with an
// empty dir it must not refer to files.
func parseBootstrap(data []byte, dir string) (*bootstrap, error) {
	var k kubeconfig
	if err := yaml.Unmarshal(data, &k); err != nil {
		// The parser's own words may quote a token.
		return nil, errors.New(strings.TrimSpace("it is not a kubeconfig " + line.FindString(err.Error())))
	}
	var cluster, user string
	for _, c := range k.Contexts {
		if c.Name == k.CurrentContext {
			cluster, user = c.Context.Cluster, c.Context.User
		}
	}
	file := func(path string) ([]byte, error) {
		if dir == "" {
			return nil, errors.New("files are not allowed here")
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		return os.ReadFile(path)
	}
	b := &bootstrap{}
	for _, c := range k.Clusters {
		if cluster != "" && c.Name != cluster {
			continue
		}
		b.server, b.ca = c.Cluster.Server, c.Cluster.CAData
		if len(b.ca) == 0 && c.Cluster.CAFile != "" {
			ca, err := file(c.Cluster.CAFile)
			if err != nil {
				return nil, err
			}
			b.ca = ca
		}
		break
	}
	for _, u := range k.Users {
		if user != "" && u.Name != user {
			continue
		}
		b.token = u.User.Token
		if b.token == "" && u.User.TokenFile != "" {
			token, err := file(u.User.TokenFile)
			if err != nil {
				return nil, err
			}
			b.token = strings.TrimSpace(string(token))
		}
		break
	}
	return b, nil
}

var errNoAuthority = errors.New("the cluster's certificate authority is not known: give it in the bootstrap file, or give its hash")

// discover asks the servers for the cluster's authority and believes what the
// pinned hashes confirm. The answer itself comes over a connection that proves
// nothing, which is sound because the pin covers all that is taken from it.
func (c *Certificates) discover(ctx context.Context) error {
	if len(c.cfg.CAHashes) == 0 {
		return errNoAuthority
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // see above
	}
	client := &http.Client{Transport: transport, Timeout: requestTimeout}
	var errs []error
	for _, server := range c.Servers() {
		ca, err := fetchAuthority(ctx, client, server)
		if err == nil {
			ca, err = pinned(ca, c.cfg.CAHashes)
		}
		if err == nil {
			return c.setCluster(ca)
		}
		errs = append(errs, fmt.Errorf("discover certificate authority from %s: %w", server, err))
	}
	return errors.Join(errs...)
}

func fetchAuthority(ctx context.Context, client *http.Client, server string) ([]byte, error) {
	url := strings.TrimSuffix(server, "/") + infoPath
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("cluster-info: %s", resp.Status)
	}
	var info struct {
		Data struct {
			Kubeconfig string `json:"kubeconfig"`
		} `json:"data"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&info); err != nil {
		return nil, fmt.Errorf("cluster-info: %w", err)
	}
	b, err := parseBootstrap([]byte(info.Data.Kubeconfig), "")
	if err != nil {
		return nil, fmt.Errorf("cluster-info: %w", err)
	}
	return b.ca, nil
}

// pinned returns those certificates of a bundle whose public key has one of the
// hashes, in kubeadm's notation.
func pinned(bundle []byte, hashes []string) ([]byte, error) {
	var out []byte
	for rest := bundle; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		if slices.ContainsFunc(hashes, func(h string) bool { return strings.EqualFold(h, "sha256:"+hex.EncodeToString(sum[:])) }) {
			out = append(out, pem.EncodeToMemory(block)...)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no certificate authority has the pinned hash")
	}
	return out, nil
}
