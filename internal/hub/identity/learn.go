package identity

import (
	"time"
)

// Learn takes note of what the cloud decided about a request that was
// forwarded to it: that is an answer as good as a review's. It must only be
// called with the API server's own verdict.
func (z *Authorizer) Learn(c *Caller, a Attributes, allowed bool) {
	user := userDigest(c)
	q := questionDigest(user, a)
	if v, ok := z.cache.Get(q); ok {
		if r := v.(ruling); r.Allowed == allowed && !r.Remembered { //nolint:errcheck // only rulings go in
			return
		}
	}
	r, ttl := ruling{Decision: Decision{Allowed: allowed}}, deniedTTL
	if allowed {
		r.refresh, ttl = time.Now().Add(allowedRefresh), allowedTTL
	} else {
		r.Reason = "the API server refused it just now"
	}
	z.cache.Add(q, r, ttl)
	z.learn(user, q, a, allowed)
}
