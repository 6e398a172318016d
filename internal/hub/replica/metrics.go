package replica

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	events      prometheus.Counter
	relists     prometheus.Counter
	storeErrors prometheus.Counter
	scopes      prometheus.Gauge
	watchers    prometheus.Gauge
	streams     *prometheus.GaugeVec
	shared      *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		events: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_replica_events_total",
			Help: "Watch events received from upstream streams.",
		}),
		relists: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_replica_relists_total",
			Help: "Full lists made by upstream streams.",
		}),
		storeErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "node_yurthub_replica_store_errors_total",
			Help: "Writes of the replica to its store that failed and will be repeated.",
		}),
		scopes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "node_yurthub_replica_scopes",
			Help: "Scopes that the replica holds.",
		}),
		watchers: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "node_yurthub_replica_watchers",
			Help: "Local watches that the replica serves.",
		}),
	}
	m.streams = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "node_yurthub_replica_streams",
		Help: "Open streams, by upstream: cloud, leader or peer.",
	}, []string{"upstream"})
	m.shared = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "node_yurthub_shared_bytes_total",
		Help: "Bytes of lists and watches of what the pool shares, as they came, by upstream: cloud, leader or peer.",
	}, []string{"upstream"})
	reg.MustRegister(m.streams, m.shared)
	reg.MustRegister(m.events, m.relists, m.storeErrors, m.scopes, m.watchers)
	return m
}
