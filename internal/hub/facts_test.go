package hub

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/yurt-edge/yurt/internal/hub/cert"
	"github.com/yurt-edge/yurt/internal/hub/condition"
)

func TestCertificateFacts(t *testing.T) {
	from, to := time.Unix(1000, 0), time.Unix(2000, 0)
	client := cert.Status{Name: cert.Client, NotBefore: from, NotAfter: to}
	stuck := cert.Status{Name: cert.Client, NotBefore: from, NotAfter: to, Problem: "denied", Hint: "ask"}
	authority := cert.Status{Name: cert.Authority, NotBefore: from, NotAfter: to.Add(time.Hour)}
	strange := cert.Status{Name: cert.Authority, Problem: "replaced", Hint: "fetch it"}
	pods := cert.Status{Name: cert.ServerPods, Problem: "waits", Hint: "approve"}
	for name, tc := range map[string]struct {
		in   []cert.Status
		want condition.CertificateFacts
	}{
		"nothing":              {nil, condition.CertificateFacts{}},
		"well":                 {[]cert.Status{client, authority}, condition.CertificateFacts{NotBefore: from, NotAfter: to}},
		"another's":            {[]cert.Status{client, pods, authority}, condition.CertificateFacts{NotBefore: from, NotAfter: to}},
		"denied":               {[]cert.Status{stuck, authority}, condition.CertificateFacts{NotBefore: from, NotAfter: to, Stuck: "denied", Remedy: "ask"}},
		"of another authority": {[]cert.Status{client, strange}, condition.CertificateFacts{NotBefore: from, NotAfter: to, Stuck: "replaced", Remedy: "fetch it"}},
		"both":                 {[]cert.Status{stuck, strange}, condition.CertificateFacts{NotBefore: from, NotAfter: to, Stuck: "denied", Remedy: "ask"}},
		"none yet, and refused": {
			[]cert.Status{{Name: cert.Client, Problem: "refused", Hint: "make a token"}},
			condition.CertificateFacts{Stuck: "refused", Remedy: "make a token"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := certificateFacts(tc.in); got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestValidityMetrics(t *testing.T) {
	var ahead time.Duration
	var known bool
	v := validity{
		func() []cert.Status {
			return []cert.Status{
				{Name: cert.Client, NotAfter: time.Unix(2000, 0)},
				{Name: cert.ServerPods},
				{Name: cert.Authority, NotAfter: time.Unix(4000, 0)},
				{Name: cert.Authority, NotAfter: time.Unix(3000, 0)},
			}
		},
		func() (time.Duration, bool) { return ahead, known },
	}
	const expiry = `
# HELP node_yurthub_certificate_expiry_timestamp_seconds When a certificate ends, in seconds since 1970.
# TYPE node_yurthub_certificate_expiry_timestamp_seconds gauge
node_yurthub_certificate_expiry_timestamp_seconds{certificate="authority"} 4000
node_yurthub_certificate_expiry_timestamp_seconds{certificate="client"} 2000
`
	if err := testutil.CollectAndCompare(v, strings.NewReader(expiry)); err != nil {
		t.Error(err)
	}
	ahead, known = -90*time.Second, true
	err := testutil.CollectAndCompare(v, strings.NewReader(expiry+`
# HELP node_yurthub_clock_skew_seconds How far the node's clock is ahead of the cloud's; absent until they were compared.
# TYPE node_yurthub_clock_skew_seconds gauge
node_yurthub_clock_skew_seconds -90
`))
	if err != nil {
		t.Error(err)
	}
}
