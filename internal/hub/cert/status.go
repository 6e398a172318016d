package cert

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Names of a [Status]: certificates of the hub, and the cluster's authority.
const (
	Client      = "client"
	ServerPods  = "server-pods"
	ServerLocal = "server-local"
	Authority   = "authority"
)

// Status tells of one certificate, for people.
type Status struct {
	Name                string
	NotBefore, NotAfter time.Time // zero: there is none
	Issuer              string
	// Problem is why it cannot be obtained or renewed, and Hint what an
	// operator must do. Empty: nothing is in the way but perhaps the link.
	Problem, Hint string
}

// trouble is what is in the way of a certificate.
type trouble struct{ problem, hint string }

// Status returns what is known of all certificates. The first is the client's.
func (c *Certificates) Status() []Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	of := func(name, file string, pair *tls.Certificate) Status {
		s := Status{Name: name, Problem: c.trouble[file].problem, Hint: c.trouble[file].hint}
		if pair != nil {
			s.NotBefore, s.NotAfter, s.Issuer = pair.Leaf.NotBefore, pair.Leaf.NotAfter, pair.Leaf.Issuer.CommonName
		}
		return s
	}
	out := []Status{of(Client, clientFile, c.client.Load()), of(ServerPods, clusterServerFile, c.clusterServer.Load())}
	if local, err := c.local.certificate(); err == nil {
		out = append(out, of(ServerLocal, localServerFile, local))
	}
	if a := c.cluster.Load(); a != nil {
		for _, ca := range a.certs {
			s := of(Authority, clusterCAFile, nil)
			s.NotBefore, s.NotAfter, s.Issuer = ca.NotBefore, ca.NotAfter, ca.Issuer.CommonName
			out = append(out, s)
		}
	}
	return out
}

// note remembers what is in the way of the certificate in file, and says so
// once. An error of the link is nothing that an operator can mend here, and
// changes nothing.
func (c *Certificates) note(file string, err error) {
	t := c.explain(err)
	if err != nil && t == (trouble{}) {
		c.cfg.Log.Debug("certificate is not obtained", "file", file, "err", err)
		return
	}
	c.mu.Lock()
	old := c.trouble[file]
	c.trouble[file] = t
	c.mu.Unlock()
	if old.hint != t.hint && err != nil {
		c.cfg.Log.Warn("certificate is not obtained", "file", file, "problem", t.problem, "hint", t.hint, "err", err)
	}
}

// waits remembers a request that somebody must approve.
func (c *Certificates) waits(file, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trouble[file] = trouble{
		"the request " + name + " waits for approval",
		"look at it with `kubectl describe csr " + name + "`, then `kubectl certificate approve " + name + "`",
	}
}

func (c *Certificates) explain(err error) trouble {
	denied, isDenied := errors.AsType[*deniedError](err)
	switch {
	case err == nil:
		return trouble{}
	case isDenied:
		return trouble{err.Error(), fmt.Sprintf("see `kubectl get csr %s -o yaml`; the hub asks again within the hour", denied.name)}
	case isStranger(err), errors.Is(err, errNoAuthority):
		return trouble{
			"the API server's certificate is signed by an authority that this node does not trust",
			"if the cluster's authority was replaced, run `kubectl get configmap kube-root-ca.crt -n kube-system -o jsonpath='{.data.ca\\.crt}'` " +
				"where that works and put the output into " + c.path(clusterCAFile) + " on this node; the hub reads it within a minute",
		}
	case errors.Is(err, errNoCredential), isRefusal(err):
		return c.unproved()
	}
	return trouble{}
}

// unproved is what to do when the cluster takes no credential of this node.
func (c *Certificates) unproved() trouble {
	t := trouble{problem: "the cluster takes no credential of this node"}
	if pair := c.client.Load(); pair != nil && c.cfg.Clock.Now().After(pair.Leaf.NotAfter) {
		t.problem = fmt.Sprintf("the certificate of %s expired on %s, and the cluster takes no other credential",
			c.userName(), pair.Leaf.NotAfter.UTC().Format(time.DateOnly))
	}
	const token = "run `kubeadm token create --ttl 1h` on a control plane node and put the token "
	switch {
	case c.cfg.Mode == ModeKubelet:
		t.hint = token + "into the kubelet's bootstrap kubeconfig, then `systemctl restart kubelet`; the hub uses the kubelet's new certificate within a minute"
	case c.cfg.BootstrapKubeconfig == "":
		t.hint = token + "into a kubeconfig, and start the hub with --bootstrap-file naming it"
	default:
		t.hint = token + "into " + c.cfg.BootstrapKubeconfig + " as the user's token; the hub reads it within a minute"
	}
	return t
}

// isRefusal tells whether the API server knew what was asked and said no.
func isRefusal(err error) bool {
	status, ok := errors.AsType[*apierrors.StatusError](err)
	if !ok {
		return false
	}
	code := status.ErrStatus.Code
	return code == http.StatusUnauthorized || code == http.StatusForbidden || code == http.StatusNotFound
}
