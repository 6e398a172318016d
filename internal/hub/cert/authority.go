package cert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/yurt-edge/yurt/internal/atomicfile"
)

// The cluster's authority is replaced by stages: for a while both the old and
// the new one are trusted, then the new one alone signs. A node that is in
// contact learns the new one from the cluster, over a connection that the old
// one vouches for. A node that was away meanwhile cannot: it needs a pin, or a
// file from an operator.

const (
	authorityInterval = time.Hour // between looks at what the cluster trusts
	maxAuthorities    = 64

	// givenFile holds the hash of the operator's authority when it was last
	// taken over.
	givenFile = "ca.given"

	rootsPath = "/api/v1/namespaces/kube-system/configmaps/kube-root-ca.crt"
	infoPath  = "/api/v1/namespaces/kube-public/configmaps/cluster-info"
)

// keepAuthority learns of the cluster's new authorities until ctx ends.
func (c *Certificates) keepAuthority(ctx context.Context) {
	select {
	case <-c.ready:
	case <-ctx.Done():
		return
	}
	retry := backoff{min: retryMin, max: retryMax}
	if c.vouched(ctx) && !c.awaitNews(ctx, jitter(authorityInterval)) {
		return
	}
	for {
		wait := authorityInterval/2 + jitter(authorityInterval)
		err := errNoAuthority
		if c.cluster.Load() != nil {
			err = c.learnAuthority(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		c.note(clusterCAFile, err)
		if err == nil {
			retry.reset()
		} else {
			wait = retry.next()
		}
		if !c.awaitNews(ctx, wait) {
			return
		}
	}
}

// awaitNews is sleep that ends early when there may be news.
func (c *Certificates) awaitNews(ctx context.Context, wait time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(wait):
	case <-c.news:
	}
	return true
}

// look has the cluster's authorities asked for soon. A certificate that was
// just issued may be the first of a new one, and what is asked for hourly may
// be late for it.
func (c *Certificates) look() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// vouchWait is how long a start waits to see whether what is trusted will do.
const vouchWait = 10 * time.Second

// vouched reports whether the link comes up, so that what was trusted before
// the start still vouches for the cloud: there is no hurry to ask for news.
func (c *Certificates) vouched(ctx context.Context) bool {
	over := c.over.Load()
	if over == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, vouchWait)
	defer cancel()
	return (*over).WaitUp(ctx) == nil
}

// learnAuthority asks the cluster which authorities it trusts, and follows.
func (c *Certificates) learnAuthority(ctx context.Context) error {
	data, from, err := c.askAuthority(ctx, c.ClusterCAs())
	if isStranger(err) && len(c.cfg.CAHashes) > 0 {
		// What is trusted may have gone while the node was away. A pin is
		// trust enough to begin anew.
		if err := c.discover(ctx); err != nil {
			return err
		}
		data, from, err = c.askAuthority(ctx, c.ClusterCAs())
	}
	if err != nil || data == nil {
		return err
	}
	next, err := parseAuthority(data)
	if err != nil {
		return fmt.Errorf("learn certificate authority from %s: %w", from, err)
	}
	if old := c.cluster.Load(); bytes.Equal(old.pem, next.pem) {
		return nil
	}
	// One that does not vouch for the server that told it would cut us off.
	again, _, err := c.askAuthority(ctx, next.pool)
	if err != nil {
		return fmt.Errorf("learn certificate authority from %s: it does not vouch for the API server: %w", from, err)
	}
	if !bytes.Equal(again, data) {
		return fmt.Errorf("learn certificate authority from %s: it changes", from)
	}
	if err := c.setCluster(data); err != nil {
		return err
	}
	c.cfg.Log.Info("the cluster's certificate authorities changed", "from", from, "count", len(next.certs))
	return c.writeBundle()
}

// askAuthority returns the cluster's authorities and where they stand; nil when
// the cluster does not let this node see them. A node may read kube-root-ca.crt
// of kube-system when one of its pods mounts it, or by a rule; everybody may
// read cluster-info where kubeadm made it.
func (c *Certificates) askAuthority(ctx context.Context, roots *x509.CertPool) (data []byte, from string, err error) {
	var config struct {
		Data map[string]string `json:"data"`
	}
	if pair := c.client.Load(); pair != nil {
		err := c.doAs(ctx, roots, credential{certificate: pair}, http.MethodGet, rootsPath, nil, &config)
		if err == nil {
			return []byte(config.Data["ca.crt"]), rootsPath, nil
		}
		if !isRefusal(err) {
			return nil, "", err
		}
	}
	err = c.doAs(ctx, roots, credential{}, http.MethodGet, infoPath, nil, &config)
	if isRefusal(err) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	boot, err := parseBootstrap([]byte(config.Data["kubeconfig"]), "")
	if err != nil {
		return nil, "", fmt.Errorf("read cluster-info: %w", err)
	}
	return boot.ca, infoPath, nil
}

// isStranger tells whether the server's certificate is signed by nobody whom we
// trust.
func isStranger(err error) bool {
	_, ok := errors.AsType[x509.UnknownAuthorityError](err)
	return ok
}

// loadCluster takes over the authority that an operator gives, once whenever
// that is new, and otherwise reads again what is in effect. That there is none
// is no error.
func (c *Certificates) loadCluster() error {
	given, err := c.givenPEM()
	if err != nil {
		return errors.Join(err, c.loadStored())
	}
	if len(given) == 0 {
		return c.loadStored()
	}
	sum := sha256.Sum256(given)
	hash := hex.EncodeToString(sum[:])
	known, err := os.ReadFile(c.path(givenFile))
	if err == nil && strings.TrimSpace(string(known)) == hash {
		if err := c.loadStored(); err != nil || c.cluster.Load() != nil {
			return err
		}
	}
	if err := c.setCluster(given); err != nil {
		return errors.Join(err, c.loadStored())
	}
	return atomicfile.WriteFile(c.path(givenFile), []byte(hash+"\n"), 0o644)
}

// loadStored reads what is in effect; an operator may have put it there.
func (c *Certificates) loadStored() error {
	data, err := os.ReadFile(c.path(clusterCAFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.setCluster(data)
}

// signed tells whether one of the authorities signed a certificate, and whether
// the newest of them did. Dates do not count.
func (a *authority) signed(leaf *x509.Certificate) (known, newest bool) {
	var latest *x509.Certificate
	for _, ca := range a.certs {
		if latest == nil || ca.NotBefore.After(latest.NotBefore) {
			latest = ca
		}
	}
	for _, ca := range a.certs {
		if leaf.CheckSignatureFrom(ca) == nil {
			known, newest = true, newest || ca == latest
		}
	}
	return known, newest
}
