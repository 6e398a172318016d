package hub

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/yurt-edge/yurt/internal/hub/cert"
	"github.com/yurt-edge/yurt/internal/report"
)

type hubMetrics struct {
	inFlight prometheus.Gauge
	panics   prometheus.Counter
	refused  *prometheus.CounterVec
}

func newHubMetrics(reg prometheus.Registerer) *hubMetrics {
	m := &hubMetrics{
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "node_yurthub_requests_in_flight", Help: "Local requests being served, watches included.",
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_panics_total", Help: "Requests that failed by a fault of the hub.",
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_refused_total", Help: "Requests that the hub itself refused, by reason.",
		}, []string{"reason"}),
	}
	reg.MustRegister(m.inFlight, m.panics, m.refused)
	return m
}

// validity shows until when certificates are valid, and how wrong the clock is
// that judges them.
type validity struct {
	certificates func() []cert.Status
	skew         func() (ahead time.Duration, known bool)
}

var (
	expiryDesc = prometheus.NewDesc("node_yurthub_certificate_expiry_timestamp_seconds",
		"When a certificate ends, in seconds since 1970.", []string{"certificate"}, nil)
	skewDesc = prometheus.NewDesc("node_yurthub_clock_skew_seconds",
		"How far the node's clock is ahead of the cloud's; absent until they were compared.", nil, nil)
)

// Describe is of prometheus.Collector.
func (validity) Describe(out chan<- *prometheus.Desc) {
	out <- expiryDesc
	out <- skewDesc
}

// Collect is of prometheus.Collector.
func (v validity) Collect(out chan<- prometheus.Metric) {
	// While the cluster's authority is replaced there are several.
	last := map[string]time.Time{}
	for _, s := range v.certificates() {
		if s.NotAfter.After(last[s.Name]) {
			last[s.Name] = s.NotAfter
		}
	}
	for name, end := range last {
		out <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(end.Unix()), name)
	}
	if ahead, known := v.skew(); known {
		out <- prometheus.MustNewConstMetric(skewDesc, prometheus.GaugeValue, ahead.Seconds())
	}
}

// poolInfo tells which pool the hub is in, so that its other metrics can be
// added up by pools.
type poolInfo struct{ h *Hub }

var poolDesc = prometheus.NewDesc("node_yurthub_pool_info",
	"1, for the pool that the hub is in and its role there: leader or member.", []string{"pool", "role"}, nil)

// Describe is of prometheus.Collector.
func (poolInfo) Describe(out chan<- *prometheus.Desc) { out <- poolDesc }

// Collect is of prometheus.Collector.
func (p poolInfo) Collect(out chan<- prometheus.Metric) {
	name, role := p.h.cfg.PoolName, report.RoleMember
	if m := p.h.pool.Membership(); m.Pool != "" {
		name = m.Pool
	}
	if p.h.pool.Leads() {
		role = report.RoleLeader
	}
	out <- prometheus.MustNewConstMetric(poolDesc, prometheus.GaugeValue, 1, name, role)
}
