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
		//nolint:errcheck // only rulings go in
		if r := v.(ruling); r.Allowed == allowed && !r.Remembered && !z.contact.outdated(r.asked) {
			return
		}
	}
	r := ruling{Decision: Decision{Allowed: allowed}, asked: time.Now()}
	if !allowed {
		r.Reason = "the API server refused it just now"
	}
	z.settle(r, user, q, a)
}
