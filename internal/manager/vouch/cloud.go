package vouch

import (
	"net/http"
	"sync/atomic"
	"time"
)

const (
	// prompt is how fast an answer is that tells the time.
	prompt = 2 * time.Second
	// agree is how far apart two clocks may be and be taken for the same: the
	// API server tells whole seconds.
	agree = 2 * time.Second
)

// Cloud is how far the API server's clock is ahead of the manager's. Hubs sign
// by that clock: a manager that went by its own, if it is wrong, would take the
// nodes of a site that is cut for dead, each heartbeat being stale. The zero
// value takes them for the same. It is safe for concurrent use.
type Cloud struct{ ahead atomic.Int64 }

// Ahead is by how much it is ahead.
func (c *Cloud) Ahead() time.Duration { return time.Duration(c.ahead.Load()) }

// Hear takes the time that an answer gave, which was asked for at a moment by
// the manager's clock and took so long.
func (c *Cloud) Hear(date, asked time.Time, took time.Duration) {
	if took < 0 || took > prompt {
		return
	}
	ahead := date.Add(time.Second / 2).Sub(asked.Add(took / 2))
	if ahead.Abs() <= agree {
		ahead = 0
	}
	c.ahead.Store(int64(ahead))
}

// Wrap hears what all answers say that pass through next.
func (c *Cloud) Wrap(next http.RoundTripper) http.RoundTripper { return hearing{c, next} }

type hearing struct {
	cloud *Cloud
	next  http.RoundTripper
}

// RoundTrip implements [http.RoundTripper].
func (h hearing) RoundTrip(req *http.Request) (*http.Response, error) {
	asked := time.Now()
	resp, err := h.next.RoundTrip(req)
	if err != nil {
		return nil, err //nolint:wrapcheck // it is the client's
	}
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		h.cloud.Hear(date, asked.Round(0), time.Since(asked))
	}
	return resp, nil
}
