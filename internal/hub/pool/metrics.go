package pool

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of a hub as a client of its pool. No label names a peer: whoever
// reads them knows the pool by its nodes.
type metrics struct {
	in, out  atomic.Int64
	switches *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{switches: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "node_yurthub_upstream_switches_total",
		Help: "How often what the pool shares was taken from another upstream, by the new one: cloud, leader or peer.",
	}, []string{"to"})}
	if reg == nil {
		return m
	}
	reg.MustRegister(m.switches)
	for direction, n := range map[string]*atomic.Int64{"in": &m.in, "out": &m.out} {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "node_yurthub_peer_bytes_total", Help: "Bytes on the wire to and from the hubs that this one asks.",
			ConstLabels: prometheus.Labels{"direction": direction},
		}, func() float64 { return float64(n.Load()) }))
	}
	return m
}
