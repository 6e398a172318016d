package nameserver

import (
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// What a question was about.
const (
	kindCluster = "cluster"
	kindReverse = "reverse" // an address of the cluster
	kindNode    = "node"
	kindOther   = "other" // asked of other servers
)

type metrics struct {
	queries  *prometheus.CounterVec
	duration *prometheus.HistogramVec
	refused  *prometheus.CounterVec
	cache    *prometheus.CounterVec
	failures prometheus.Counter
	panics   prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, s *Server) *metrics {
	m := &metrics{
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_dns_queries_total", Help: "Questions answered, by what they were about and how.",
		}, []string{"kind", "rcode"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "node_yurthub_dns_duration_seconds", Help: "How long a question took.",
			Buckets: []float64{.0001, .0005, .001, .002, .005, .02, .1, .5, 2, 5},
		}, []string{"kind"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_dns_refused_total", Help: "Questions and connections that were refused, by reason.",
		}, []string{"reason"}),
		cache: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "node_yurthub_dns_cache_total", Help: "Questions for other servers, by what was kept of the answer: hit, stale or miss.",
		}, []string{"result"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_dns_upstream_failures_total", Help: "Attempts to ask another server that brought no answer.",
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_dns_panics_total", Help: "Questions that failed by a fault of the hub.",
		}),
	}
	reg.MustRegister(
		m.queries, m.duration, m.refused, m.cache, m.failures, m.panics,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "node_yurthub_dns_listening", Help: "Addresses at which DNS is answered."}, func() float64 { return float64(s.listening.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "node_yurthub_dns_synced", Help: "1 once the names of the cluster are known."}, func() float64 {
			if s.isSynced() {
				return 1
			}
			return 0
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "node_yurthub_dns_services", Help: "Services that can be found by name."}, func() float64 {
			n, _ := s.index.size()
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "node_yurthub_dns_cache_bytes", Help: "Size of what is kept of other servers' answers."}, func() float64 {
			_, n := s.forward.cache.size()
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "node_yurthub_dns_upstreams_down", Help: "Name servers of the node that do not answer."}, func() float64 {
			n := 0.0
			for _, u := range s.forward.list() {
				if u.down() {
					n++
				}
			}
			return n
		}),
	)
	return m
}

// count takes note of an answer.
func (m *metrics) count(kind string, rcode int, took time.Duration) {
	name := "other"
	switch rcode {
	case dns.RcodeSuccess, dns.RcodeNameError, dns.RcodeServerFailure, dns.RcodeRefused:
		name = dns.RcodeToString[rcode]
	}
	m.queries.WithLabelValues(kind, name).Inc()
	m.duration.WithLabelValues(kind).Observe(took.Seconds())
}
