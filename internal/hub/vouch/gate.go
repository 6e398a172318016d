package vouch

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// What hubs may deliver, since each delivery holds signatures, which cost time
// to verify. A hub that keeps heartbeats of others, too, makes four deliveries
// each time that it speaks, at most eight if its clock is wrong.
const (
	perPeer, burstOfPeer = 1, 10 // in a second and at once
	perSecond, burst     = 50, 100
	// underWay is how many bodies are read at once, of which one peer has one.
	underWay = 64
	// maxSenders bounds the peers that are remembered: those that delivered
	// within the time that a burst takes to come back.
	maxSenders = 1024
	recovery   = burstOfPeer * time.Second / perPeer
)

// gate lets deliveries in, each peer by its own account: one that delivers too
// much is refused before it takes from what is there for all.
type gate struct {
	all *rate.Limiter

	mu      sync.Mutex // guards the following
	busy    int
	senders map[string]*sender
}

type sender struct {
	limit *rate.Limiter
	busy  bool
	last  time.Time
}

func newGate() *gate {
	return &gate{all: rate.NewLimiter(perSecond, burst), senders: map[string]*sender{}}
}

// enter admits a delivery of a peer; leave ends it.
func (g *gate) enter(peer string) (leave func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s, known := g.senders[peer]
	if !known {
		if len(g.senders) >= maxSenders {
			for name, other := range g.senders {
				if !other.busy && time.Since(other.last) >= recovery {
					delete(g.senders, name)
				}
			}
		}
		if len(g.senders) >= maxSenders {
			return nil, tooMany("of so many peers")
		}
		s = &sender{limit: rate.NewLimiter(perPeer, burstOfPeer)}
		g.senders[peer] = s
	}
	s.last = time.Now()
	switch {
	case s.busy || !s.limit.Allow():
		return nil, tooMany("of this peer")
	case g.busy >= underWay || !g.all.Allow():
		return nil, tooMany("of its peers")
	}
	s.busy = true
	g.busy++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		s.busy = false
		g.busy--
	}, nil
}

func tooMany(whose string) error {
	return apierrors.NewTooManyRequests("this hub takes no more heartbeats "+whose+" in this second", 1)
}
