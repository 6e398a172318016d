package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/internal/report"
	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/test/bed"
)

// TestRenewals lets the hub renew its certificates until the first has ended
// and the link has been cut in between. No request fails meanwhile.
func TestRenewals(t *testing.T) {
	t.Parallel()
	s := shared.newSite(t, "renewing")
	s.start(t)
	watchers := s.watch(t)
	first := s.certificate(t)
	begun, cuts := s.signer.Signed(s.Node), 0
	await(t, "end of the first certificate", func(ctx context.Context) error {
		s.write(t)
		if err := errors.Join(s.whoami(ctx), s.reads(ctx)); err != nil {
			t.Fatalf("after %d renewals: %v", s.signer.Signed(s.Node)-begun, err)
		}
		renewed := s.signer.Signed(s.Node) - begun
		// Streams from before a renewal and after it break off.
		if renewed > cuts && cuts < 2 {
			cuts++
			must(t, s.link.Cut(bed.Down))
			must(t, s.reads(ctx))
			must(t, s.link.Heal())
			await(t, "return", s.whoami)
		}
		if renewed < 2 || time.Now().Before(first.NotAfter) {
			return fmt.Errorf("%d renewals, and the first certificate ends at %s", renewed, first.NotAfter)
		}
		return nil
	})
	s.sees(t, watchers...)
	if now := s.certificate(t); !now.NotAfter.After(first.NotAfter) {
		t.Errorf("the certificate on disk still ends at %s", now.NotAfter)
	}
}

// TestCertificateThatEndsDuringACut is the return of a node whose certificate
// has ended: first without any credential, until an operator does as the hub
// says.
func TestCertificateThatEndsDuringACut(t *testing.T) {
	t.Parallel()
	s := shared.newSite(t, "away")
	s.start(t)
	watchers := s.watch(t)
	await(t, "reads", s.reads) // what is asked once is known during a cut
	boot := filepath.Join(s.Dir, "bootstrap.conf")
	joined, err := os.ReadFile(boot)
	must(t, err)
	token, err := s.cloud.BootstrapToken(t.Context())
	must(t, err)
	must(t, s.link.Cut(bed.Blackhole))
	must(t, os.WriteFile(boot, bytes.ReplaceAll(joined, []byte(token), []byte("abcdef.0123456789abcdef")), 0o600))
	s.write(t)
	await(t, "end of the certificate", func(ctx context.Context) error {
		must(t, s.reads(ctx))
		if ends := s.certificate(t).NotAfter; time.Now().Before(ends) {
			return fmt.Errorf("it ends at %s", ends)
		}
		return nil
	})
	must(t, s.link.Heal())
	await(t, "hint", func(ctx context.Context) error {
		must(t, s.reads(ctx)) // the node goes on
		r, err := report.Ask(ctx, s.Dir)
		if err != nil {
			return err
		}
		own := r.Certificates[0]
		if !strings.Contains(own.Problem, "expired on") || !strings.Contains(own.Hint, "kubeadm token create") || !strings.Contains(own.Hint, boot) {
			return fmt.Errorf("the hub says of its certificate: %+v", own)
		}
		return nil
	})
	s.write(t)
	must(t, os.WriteFile(boot, joined, 0o600))
	await(t, "return", s.whoami)
	s.sees(t, watchers...)
	s.write(t)
	s.sees(t, watchers...)
}

// publish makes what pods mount of the cluster's authorities.
func (w *world) publish(t *testing.T, admin *kubernetes.Clientset, authorities ...*playground.Authority) {
	t.Helper()
	roots := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kube-root-ca.crt", Namespace: "kube-system"}, Data: map[string]string{"ca.crt": string(bundle(authorities...))}}
	await(t, "kube-root-ca.crt", func(ctx context.Context) error {
		_, err := admin.CoreV1().ConfigMaps("kube-system").Update(ctx, roots, metav1.UpdateOptions{})
		if err != nil {
			_, err = admin.CoreV1().ConfigMaps("kube-system").Create(ctx, roots, metav1.CreateOptions{})
		}
		return err
	})
}

func bundle(authorities ...*playground.Authority) []byte {
	var out []byte
	for _, a := range authorities {
		out = append(out, a.CertPEM...)
	}
	return out
}

// TestRollover replaces the cluster's authority as Kubernetes describes it: for
// a while both are trusted, then the new one signs, then the old one is gone.
func TestRollover(t *testing.T) {
	t.Parallel()
	// Nobody writes kube-root-ca.crt but this test.
	w, err := newWorld(t.Context(), filepath.Join(shared.dir, "rollover"), "--controllers=-root-ca-certificate-publisher-controller")
	must(t, err)
	t.Cleanup(func() { must(t, w.close()) })
	old := *w.cloud.CA
	next, err := playground.NewAuthority(t.TempDir(), "next")
	must(t, err)
	// The API server's own trust is a file, which it reads again.
	trust := func(authorities ...*playground.Authority) {
		t.Helper()
		must(t, os.WriteFile(old.CertFile, bundle(authorities...), 0o600))
	}
	w.publish(t, w.admin, &old)
	s := w.newSite(t, "rolling")
	// By the rules of the Node authorizer a node reads it for a pod.
	await(t, "pod that mounts it", func(ctx context.Context) error {
		return w.cloud.Apply(ctx, `
apiVersion: v1
kind: Pod
metadata: {name: mounts, namespace: kube-system}
spec:
  nodeName: rolling
  serviceAccountName: kube-proxy
  tolerations: [{operator: Exists}]
  containers: [{name: main, image: example.invalid/x:1}]
`)
	})
	s.start(t)
	watchers := s.watch(t)
	knows := func(what string, authorities ...*playground.Authority) {
		t.Helper()
		want := bundle(authorities...)
		await(t, what, func(ctx context.Context) error {
			s.write(t)
			if err := s.whoami(ctx); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			got, err := os.ReadFile(filepath.Join(s.Dir, "pki", "ca.crt"))
			if err == nil && !bytes.Equal(got, want) {
				err = fmt.Errorf("the hub trusts\n%s", got)
			}
			return err
		})
	}
	knows("the old authority", &old)

	trust(&old, next)
	accepts(t, s, next)
	w.publish(t, w.admin, &old, next)
	must(t, w.signer.By(next))
	knows("both authorities", &old, next)
	await(t, "certificate of the new one", func(ctx context.Context) error {
		must(t, s.whoami(ctx))
		return s.certificate(t).CheckSignatureFrom(certificateOf(t, next))
	})

	// Now the new one vouches for the API server too.
	cert, key, err := next.Server("kube-apiserver", "127.0.0.1", "localhost")
	must(t, err)
	pki := filepath.Dir(old.CertFile)
	must(t, os.WriteFile(filepath.Join(pki, "apiserver.key"), key, 0o600))
	must(t, os.WriteFile(filepath.Join(pki, "apiserver.crt"), cert, 0o600))
	await(t, "the API server's new certificate", func(ctx context.Context) error { return vouchedBy(ctx, s, next) })
	must(t, s.link.Cut(bed.Down)) // all connections are new
	must(t, s.link.Heal())
	await(t, "return", s.whoami)

	// Whoever writes from now on is known by the new one.
	cfg := w.cloud.RESTConfig()
	cfg.CAData = bundle(next)
	cfg.CertData, cfg.KeyData, err = next.Client("admin", "system:masters")
	must(t, err)
	s.admin, err = kubernetes.NewForConfig(cfg)
	must(t, err)
	kubelet := &rest.Config{QPS: -1}
	kubelet.CertData, kubelet.KeyData, err = next.Client("system:node:"+s.Node, "system:nodes")
	must(t, err)
	kubelet, err = s.RESTConfig(kubelet)
	must(t, err)
	s.kubelet, err = kubernetes.NewForConfig(kubelet)
	must(t, err)
	w.publish(t, s.admin, next)
	knows("the new authority", next)
	trust(next)
	s.write(t)
	s.sees(t, watchers...)
	t.Logf("%d certificates, %d writes", w.signer.Signed(s.Node), s.seq)
}

func certificateOf(t *testing.T, a *playground.Authority) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(a.CertFile, a.KeyFile)
	must(t, err)
	return pair.Leaf
}

// accepts waits until the API server takes certificates of the authority.
func accepts(t *testing.T, s *site, by *playground.Authority) {
	t.Helper()
	cfg := s.cloud.RESTConfig()
	var err error
	cfg.CertData, cfg.KeyData, err = by.Client("admin", "system:masters")
	must(t, err)
	admin, err := kubernetes.NewForConfig(cfg)
	must(t, err)
	await(t, "trust of the API server", func(ctx context.Context) error {
		_, err := admin.CoreV1().Namespaces().Get(ctx, "certs", metav1.GetOptions{})
		return err
	})
}

// vouchedBy fails unless the authority vouches for the API server.
func vouchedBy(ctx context.Context, s *site, by *playground.Authority) error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(by.CertPEM)
	d := tls.Dialer{Config: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	conn, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(s.cloud.URL, "https://"))
	if err != nil {
		return err
	}
	return conn.Close()
}
