package identity

import (
	"crypto/x509"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const day = 24 * time.Hour

// wrongClock is one whose machine is off by the value of the returned pointer.
// The clock's floor is the bubble's beginning.
func wrongClock(t testing.TB, off time.Duration) (*clock.Clock, *time.Duration) {
	begun := time.Now()
	c := clock.Open(clock.Config{
		Path: filepath.Join(t.TempDir(), "clock"), Built: begun, Log: quiet(),
		Source: func() (time.Time, time.Duration) { return time.Now().Add(off), time.Since(begun) },
	})
	return c, &off
}

// TestTokensByAWrongClock shows tokens of the cloud, made lately, to a node that
// boots alone.
func TestTokensByAWrongClock(t *testing.T) {
	for name, off := range map[string]time.Duration{"1970": -30 * 365 * day, "behind": -2 * 365 * day, "right": 0} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				b.clock, _ = wrongClock(t, off)
				b.restart()
				must(t, b.refreshKeys(t.Context()))
				b.learnAudiences([]string{testAudience})
				b.offline.Store(true)
				now := time.Now()
				span := func(from, to time.Duration) *http.Request {
					return withToken(b.cloud.token(t, func(c *claims) {
						c.NotBefore, c.Expiry = jwt.NewNumericDate(now.Add(from)), jwt.NewNumericDate(now.Add(to))
					}))
				}
				b.want(t, span(-time.Minute, time.Hour), webUser)
				b.want(t, span(3*time.Hour, 5*time.Hour), webUser) // after the floor was saved
				b.want(t, span(-2*time.Hour, -time.Hour), "")
			})
		})
	}
}

// TestLocalTokensSurviveSteps sets the machine's clock while pods use tokens
// that this hub made.
func TestLocalTokensSurviveSteps(t *testing.T) {
	for name, off := range map[string]time.Duration{"behind": -2 * 365 * day, "ahead": 2 * 365 * day} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				var now *time.Duration
				b.clock, now = wrongClock(t, off)
				var err error
				b.local, err = NewLocalSigner("edge-1", b.memory, b.clock)
				must(t, err)
				b.restart()
				b.offline.Store(true)
				token, _, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", PodName: "web-0"})
				must(t, err)
				r := withToken(token)
				b.want(t, r, webUser)
				*now = 0 // set right
				elapse(2 * certificateTTL)
				b.want(t, r, webUser)
				*now = -off // and wrong the other way
				elapse(2 * certificateTTL)
				b.want(t, r, webUser)
				elapse(time.Hour)
				b.want(t, r, "")
			})
		})
	}
}

// TestNodesOwnCertificateOutlivesItself keeps a node running that was cut off
// for longer than its certificate lasts.
func TestNodesOwnCertificateOutlivesItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		own, other := b.ca.issue(t, nil), b.ca.issue(t, nil)
		stranger := newAuthority(t).issue(t, nil)
		b.own = own.Raw
		from := func(c *x509.Certificate, host string) *http.Request {
			r := withCertificate(c)
			r.RemoteAddr = net.JoinHostPort(host, "1234")
			return r
		}
		const node = "system:node:edge-1"
		b.want(t, from(own, "127.0.0.1"), node)
		elapse(100 * day)
		b.offline.Store(true)
		b.want(t, from(own, "127.0.0.1"), node)
		b.want(t, from(own, "::1"), node)
		b.want(t, from(own, "10.244.1.7"), "") // a pod, right after
		b.want(t, from(own, "169.254.2.1"), "")
		b.want(t, from(other, "127.0.0.1"), "") // of the same user, replaced long ago
		b.own = stranger.Raw
		b.want(t, from(stranger, "127.0.0.1"), "")
		b.want(t, from(own, "127.0.0.1"), "")
	})
}

// TestCertificatesByAWrongClock shows what was valid when the cloud was last
// heard to a node whose clock jumped.
func TestCertificatesByAWrongClock(t *testing.T) {
	for _, off := range []time.Duration{-2 * 365 * day, 2 * 365 * day} {
		b := newBed(t)
		b.clock, _ = wrongClock(t, off)
		b.restart()
		b.want(t, withCertificate(b.ca.issue(t, nil)), "system:node:edge-1")
		b.want(t, withCertificate(b.ca.issue(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })), "")
		b.clock.Hear(time.Now().Add(2*time.Hour), 0)
		b.want(t, withCertificate(b.ca.issue(t, nil)), "")
	}
}

// TestTheNodesOwnDecisionsDoNotAge lets a long outage pass.
func TestTheNodesOwnDecisionsDoNotAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		self := &Caller{Name: "system:node:edge-1", Groups: []string{"system:nodes", groupAuthenticated}, Certificate: true}
		c.cfg.Self = self
		c.Authorizer = NewAuthorizer(c.cfg)
		c.allow(always(true))
		kubelet := &Caller{ // as a certificate names it
			Name: self.Name, Groups: self.Groups, Certificate: true,
			Extra: map[string][]string{extraCredentialID: {"X509SHA256=ab"}},
		}
		c.want(t, kubelet, list("shop"), true)
		c.want(t, web(), list("shop"), true)
		synctest.Wait()
		c.offline.Store(true)
		elapse(400 * day)
		c.Authorizer = NewAuthorizer(c.cfg)
		c.want(t, kubelet, list("shop"), true)
		c.want(t, kubelet, list("other"), false) // never asked
		c.want(t, web(), list("shop"), false)    // too old
	})
}

// TestDecisionsOfTheFutureDoNotCount has the cloud's own clock run two years
// ahead while it answers, and be set right then. What was said meanwhile must
// not outlive --max-decision-age by two years.
func TestDecisionsOfTheFutureDoNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		by, _ := wrongClock(t, 0)
		self := &Caller{Name: "system:node:edge-1", Groups: []string{"system:nodes", groupAuthenticated}, Certificate: true}
		c.cfg.Clock, c.cfg.Self = by, self
		c.Authorizer = NewAuthorizer(c.cfg)
		c.allow(always(true))
		by.Hear(time.Now().Add(2*365*day), 0)
		c.want(t, web(), list("shop"), true)
		c.want(t, self, list("shop"), true)
		by.Hear(time.Now(), 0)
		c.want(t, web(), list("other"), true)
		synctest.Wait()
		c.offline.Store(true)
		c.Authorizer = NewAuthorizer(c.cfg) // restarted
		c.want(t, web(), list("shop"), false)
		c.want(t, web(), list("other"), true)
		c.want(t, self, list("shop"), true) // the node's own do not age
	})
}

// TestDecisionsAfterTheFloorCount boots alone with a clock that stands at the
// floor, which is some hours older than the last decisions.
func TestDecisionsAfterTheFloorCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCourt(t)
		c.cfg.Clock, _ = wrongClock(t, 0)
		c.Authorizer = NewAuthorizer(c.cfg)
		c.allow(always(true))
		elapse(5 * time.Hour)
		c.want(t, web(), list("shop"), true)
		elapse(20 * time.Hour)
		c.want(t, web(), list("other"), true) // a day after the floor: no clock of ours is that late
		synctest.Wait()
		c.offline.Store(true)
		behind := time.Now().Add(-25 * time.Hour)
		c.cfg.Clock = clock.Open(clock.Config{
			Path: filepath.Join(t.TempDir(), "clock"), Built: behind, Log: quiet(),
			Source: func() (time.Time, time.Duration) { return behind, 0 },
		})
		c.Authorizer = NewAuthorizer(c.cfg)
		c.want(t, web(), list("shop"), true)
		c.want(t, web(), list("other"), false)
	})
}
