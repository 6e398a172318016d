package link

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics of the link. Servers are those of the configuration, so that no
// label is unbounded.
type metrics struct {
	inFlight prometheus.Gauge
	turns    prometheus.Counter
	slowed   prometheus.Counter
	probes   *prometheus.CounterVec
}

// newMetrics registers the metrics of l, or keeps them to itself when reg is
// nil. server_healthy_status and in_flight_requests_total are OpenYurt's.
func newMetrics(reg prometheus.Registerer, l *Link) *metrics {
	const namespace, subsystem = "node", "yurthub"
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}
	}
	m := &metrics{
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts(opts("in_flight_requests_total",
			"Requests of clients that are being forwarded to the cloud."))),
		turns: prometheus.NewCounter(prometheus.CounterOpts(opts("link_changes_total",
			"How often the link went up or down."))),
		slowed: prometheus.NewCounter(prometheus.CounterOpts(opts("link_slowed_total",
			"How often the link turned too slow to wait for."))),
		probes: prometheus.NewCounterVec(prometheus.CounterOpts(opts("link_probes_total",
			"Probes on fresh connections, by what they found.")), []string{"verdict"}),
	}
	if reg == nil {
		return m
	}
	reg.MustRegister(m.inFlight, m.turns, m.slowed, m.probes)
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts("link_up",
		"Whether the cloud can be reached, 1 or 0.")), func() float64 { return number(l.Online()) }))
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts("link_weak",
		"Whether the link is up, but too slow to wait for, 1 or 0.")), func() float64 { return number(l.Weak()) }))
	for i := range l.servers {
		s := &l.servers[i]
		o := prometheus.GaugeOpts(opts("server_healthy_status", "Whether the API server is healthy, 1 or 0."))
		o.ConstLabels = prometheus.Labels{"server": s.addr}
		reg.MustRegister(prometheus.NewGaugeFunc(o, func() float64 { return number(s.healthy.Load()) }))
	}
	for cred, name := range map[credential]string{node: "node", bearer: "bearer"} {
		t := &l.traffic[cred]
		for direction, count := range map[string]func() int64{"in": t.Read, "out": t.Written} {
			o := prometheus.CounterOpts(opts("link_bytes_total", "Bytes on the wire to and from the cloud."))
			o.ConstLabels = prometheus.Labels{"credential": name, "direction": direction}
			reg.MustRegister(prometheus.NewCounterFunc(o, func() float64 { return float64(count()) }))
		}
	}
	return m
}

func (m *metrics) turned() { m.turns.Inc() }

func (m *metrics) probed(v verdict) {
	m.probes.WithLabelValues([...]string{alive: "alive", unready: "unready", unwell: "unwell", stranger: "stranger", silence: "silence"}[v]).Inc()
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
