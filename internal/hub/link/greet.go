package link

import (
	"context"
	"net/http"
	"time"
)

// greeting marks the context of a dial to a server that is not known to be
// healthy yet.
type greeting struct{}

// greet is the first probe of server i after the start, on the connection that
// questions will use: one that only looks costs as much as ten questions. It
// reports false when it has found out nothing and a probe must.
func (l *Link) greet(ctx context.Context, i int, p probing) bool {
	if _, err := l.cfg.ClientCertificate(); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, greeting{}, true), l.cfg.Budgets.Stall)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+l.servers[i].addr+readyPath(l.servers[i].url), nil)
	if err != nil {
		return false
	}
	req.Host = l.servers[i].url.Host
	s := l.lanes.Load()
	lane := &s.by[node]
	resp, err := lane.gates[question].roundTrip(lane.by[question], req, i, s.registry)
	if err != nil {
		return false
	}
	v, reason := judgeAnswer(resp)
	_ = resp.Body.Close()
	if v == silence {
		return false
	}
	if v == alive {
		l.told.Store(0)
		l.tell(resp.Header, p.started)
	}
	l.report(i, p.started, finding{verdict: v, answer: time.Since(p.started), reason: reason})
	return true
}
