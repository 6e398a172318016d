package vouch

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	testclock "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/heartbeat"
)

func TestCloud(t *testing.T) {
	c := &Cloud{}
	for _, tc := range []struct {
		what       string
		date, took float64 // since it was asked
		want       time.Duration
	}{
		{"the same", 0, 0.1, 0},
		{"the same, in whole seconds", -1, 0.1, 0},
		{"an hour ahead", 3600, 0, 3600*time.Second + 500*time.Millisecond},
		{"who knows when", 0, 2.1, 3600*time.Second + 500*time.Millisecond},
		{"a minute behind", -60, 1, -60 * time.Second},
		{"put right", 1, 1, 0},
	} {
		c.Hear(at(tc.date), at(0), time.Duration(tc.took*float64(time.Second)))
		if got := c.Ahead(); got != tc.want {
			t.Errorf("%s: got %s", tc.what, got)
		}
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(-24*time.Hour).UTC().Format(http.TimeFormat))
	}))
	defer server.Close()
	web := &http.Client{Transport: c.Wrap(http.DefaultTransport)}
	resp, err := web.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if got := c.Ahead() + 24*time.Hour; got.Abs() > 2*agree {
		t.Errorf("off by %s", got)
	}
}

// TestManagersClock has a manager whose clock is wrong by a day: it takes what
// hubs sign by the API server's, and refuses what is stale by that.
func TestManagersClock(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "system:node:a", Organization: []string{"system:nodes"}},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(cert)
	node := func(name string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "u", Labels: map[string]string{apps.NodePoolLabel: "p"}}}
	}
	for _, ahead := range []time.Duration{0, 24 * time.Hour, -24 * time.Hour} {
		for age, want := range map[time.Duration]verdict{time.Second: renewed, 2 * heartbeat.Good: stale, 30 * time.Second: superseded} {
			lease := &coordinationv1.Lease{
				ObjectMeta: metav1.ObjectMeta{Name: "a", Namespace: corev1.NamespaceNodeLease, UID: "l"},
				Spec:       coordinationv1.LeaseSpec{RenewTime: new(metav1.NewMicroTime(now.Add(-time.Hour)))},
			}
			api := fake.NewClientBuilder().WithScheme(scheme.Scheme).WithObjects(node("a"), node("b"), lease).Build()
			clock := testclock.NewFakePassiveClock(now.Add(-ahead))
			c := &listener{read: api, leases: api, clock: clock, ear: NewEar(time.Hour), cloud: &Cloud{}}
			c.cloud.Hear(now.Add(-500*time.Millisecond), now.Add(-ahead), 0)
			if want == superseded { // it spoke since
				c.ear.Hear(lease, now.Add(-ahead-time.Minute))
				lease.Spec.RenewTime = new(metav1.NowMicro())
				c.ear.Hear(lease, now.Add(-ahead-20*time.Second))
			}
			s, err := heartbeat.Sign(heartbeat.Beat{Node: "a", UID: "u", Time: metav1.NewMicroTime(now.Add(-age)), Ready: corev1.ConditionTrue}, [][]byte{der}, key)
			if err != nil {
				t.Fatal(err)
			}
			var next time.Duration
			got, why, err := c.take(t.Context(), node("b"), s, roots, &next)
			if err != nil || got != want {
				t.Errorf("ahead by %s, signed %s ago: got %s (%v), %v", ahead, age, got, why, err)
			}
		}
	}
}
