package hub

import "github.com/prometheus/client_golang/prometheus"

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
