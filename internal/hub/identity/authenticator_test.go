package identity

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

// bed is an Authenticator that can be taken offline.
type bed struct {
	*Authenticator
	cloud  *cloud
	memory *MapMemory
	ca     *authority
	local  *LocalSigner
	dead   map[string]bool // pods that are no more
	clock  *clock.Clock    // nil: the machine's
	own    []byte          // the node's certificate
	line
}

// line is a link that can be cut.
type line struct {
	offline atomic.Bool
	since   atomic.Pointer[time.Time]
}

func (l *line) up() bool { return !l.offline.Load() }

func (l *line) healed() time.Time {
	if at := l.since.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// heal makes the link whole. Call it in a synctest bubble, where what was done
// before is at most as late.
func (l *line) heal() {
	now := time.Now().Add(time.Nanosecond)
	l.since.Store(&now)
	l.offline.Store(false)
	elapse(2 * time.Nanosecond)
}

func newBed(t testing.TB) *bed {
	b := &bed{cloud: newCloud(t), memory: &MapMemory{}, ca: newAuthority(t)}
	var err error
	b.local, err = NewLocalSigner("edge-1", b.memory, b.clock)
	must(t, err)
	b.restart()
	return b
}

// restart makes a new Authenticator over what the last one remembered.
func (b *bed) restart() {
	pool := b.ca.pool()
	b.Authenticator = NewAuthenticator(AuthenticatorConfig{
		API: b.cloud, Memory: b.memory, Local: b.local, Log: quiet(),
		Lives:      func(_, name, _ string) bool { return !b.dead[name] },
		ClusterCAs: func() *x509.CertPool { return pool },
		Clock:      b.clock,
		Own:        func(der []byte) bool { return bytes.Equal(der, b.own) },
		Online:     b.up, Contact: b.healed,
	})
}

// want checks the name that a request authenticates as, "" for 401.
func (b *bed) want(t testing.TB, r *http.Request, name string) *Caller {
	t.Helper()
	c, err := b.Authenticate(r)
	switch {
	case name == "" && !apierrors.IsUnauthorized(err):
		t.Fatalf("got %v, %v, want 401", c, err)
	case name != "" && err != nil:
		t.Fatalf("got %v, want %s", err, name)
	case name != "" && c.Name != name:
		t.Fatalf("got %v, want %s", c, name)
	}
	return c
}

func TestAuthenticate(t *testing.T) {
	t.Parallel()
	other := newKey(t)
	tests := []struct {
		name string
		// request prepares the cloud and returns the request.
		request func(t *testing.T, b *bed) *http.Request
		seen    bool   // the request was made once before
		online  string // the user; "" is 401
		offline string
	}{
		{name: "no credential", request: func(*testing.T, *bed) *http.Request { return withToken("") }},
		{name: "certificate", online: "system:node:edge-1", offline: "system:node:edge-1", request: func(t *testing.T, b *bed) *http.Request {
			return withCertificate(b.ca.issue(t, nil))
		}},
		{name: "certificate of another authority", request: func(t *testing.T, _ *bed) *http.Request {
			return withCertificate(newAuthority(t).issue(t, nil))
		}},
		{name: "expired certificate", request: func(t *testing.T, b *bed) *http.Request {
			return withCertificate(b.ca.issue(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }))
		}},
		{name: "server certificate", request: func(t *testing.T, b *bed) *http.Request {
			return withCertificate(b.ca.issue(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }))
		}},
		{name: "certificate of nobody", request: func(t *testing.T, b *bed) *http.Request {
			return withCertificate(b.ca.issue(t, func(c *x509.Certificate) { c.Subject.CommonName = "" }))
		}},
		{name: "bad certificate and good token", online: webUser, offline: webUser, request: func(t *testing.T, b *bed) *http.Request {
			r := withToken(b.cloud.admit(b.cloud.token(t, nil), webUser))
			r.TLS = withCertificate(newAuthority(t).issue(t, nil)).TLS
			return r
		}},
		{name: "token", online: webUser, offline: webUser, request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.admit(b.cloud.token(t, nil), webUser))
		}},
		{name: "token in the WebSocket protocol", online: webUser, offline: webUser, request: func(t *testing.T, b *bed) *http.Request {
			r := withToken("")
			r.Header.Set("Upgrade", "websocket")
			token := b.cloud.admit(b.cloud.token(t, nil), webUser)
			r.Header.Set(protocolHeader, "v5.channel.k8s.io, "+protocolPrefix+base64.RawURLEncoding.EncodeToString([]byte(token)))
			return r
		}},
		{name: "token that the cloud rejects, new", offline: webUser, request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, nil))
		}},
		{name: "token that the cloud rejected", seen: true, request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, nil))
		}},
		{name: "expired token", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, func(c *claims) { c.Expiry = jwt.NewNumericDate(time.Now().Add(-2 * leeway)) }))
		}},
		{name: "token just expired by the node's clock", online: webUser, offline: webUser, request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.admit(b.cloud.token(t, func(c *claims) { c.Expiry = jwt.NewNumericDate(time.Now().Add(-leeway / 2)) }), webUser))
		}},
		{name: "token from the future", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, func(c *claims) { c.NotBefore = jwt.NewNumericDate(time.Now().Add(2 * leeway)) }))
		}},
		{name: "token without end", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, func(c *claims) { c.Expiry = nil }))
		}},
		{name: "token of another issuer", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, func(c *claims) { c.Issuer = "https://elsewhere" }))
		}},
		{name: "forged signature", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(sign(t, other, jose.ES256, b.cloud.id, nil))
		}},
		{name: "unknown key", request: func(t *testing.T, _ *bed) *http.Request {
			return withToken(sign(t, other, jose.ES256, "key-2", nil))
		}},
		{name: "symmetric signature with the public key", request: func(t *testing.T, b *bed) *http.Request {
			public, err := x509.MarshalPKIXPublicKey(b.cloud.key.Public())
			must(t, err)
			return withToken(sign(t, public, jose.HS256, b.cloud.id, nil))
		}},
		{name: "no signature", request: func(t *testing.T, b *bed) *http.Request {
			parts := strings.Split(b.cloud.token(t, nil), ".")
			return withToken(base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".")
		}},
		{name: "changed claims", request: func(t *testing.T, b *bed) *http.Request {
			a := strings.Split(b.cloud.token(t, nil), ".")
			z := strings.Split(b.cloud.token(t, func(c *claims) { c.Subject = "system:serviceaccount:kube-system:admin" }), ".")
			return withToken(a[0] + "." + z[1] + "." + a[2])
		}},
		{name: "subject is not the service account", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, func(c *claims) { c.Subject = "system:admin" }))
		}},
		{name: "other audience", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, func(c *claims) { c.Audience = jwt.Audience{"vault"} }))
		}},
		{name: "bootstrap token, new", online: "system:bootstrap:abcdef", request: func(_ *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.admit("abcdef.0123456789abcdef", "system:bootstrap:abcdef"))
		}},
		{name: "bootstrap token, seen", seen: true, online: "system:bootstrap:abcdef", offline: "system:bootstrap:abcdef", request: func(_ *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.admit("abcdef.0123456789abcdef", "system:bootstrap:abcdef"))
		}},
		{name: "bootstrap token, wrong", seen: true, request: func(*testing.T, *bed) *http.Request { return withToken("abcdef.wrong") }},
		{name: "person of another issuer, seen", seen: true, online: "jane", offline: "jane", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.admit(sign(t, other, jose.ES256, "oidc", func(c *claims) { c.Issuer, c.Subject = "https://login", "jane" }), "jane"))
		}},
		{name: "local token", online: webUser, offline: webUser, request: func(t *testing.T, b *bed) *http.Request {
			token, _, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", PodName: "web-0"})
			must(t, err)
			return withToken(token)
		}},
		{name: "local token for the API's audience", online: webUser, offline: webUser, request: func(t *testing.T, b *bed) *http.Request {
			token, _, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", PodName: "web-0", Audiences: []string{testAudience}})
			must(t, err)
			return withToken(token)
		}},
		{name: "local token for another audience", request: func(t *testing.T, b *bed) *http.Request {
			token, _, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", PodName: "web-0", Audiences: []string{"vault"}})
			must(t, err)
			return withToken(token)
		}},
		{name: "local token of another hub", request: func(t *testing.T, _ *bed) *http.Request {
			signer, err := NewLocalSigner("edge-2", &MapMemory{}, nil)
			must(t, err)
			token, _, err := signer.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", PodName: "web-0"})
			must(t, err)
			return withToken(token)
		}},
		{name: "local token of another hub with this hub's name", request: func(t *testing.T, _ *bed) *http.Request {
			signer, err := NewLocalSigner("edge-1", &MapMemory{}, nil)
			must(t, err)
			token, _, err := signer.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", PodName: "web-0"})
			must(t, err)
			return withToken(token)
		}},
		{name: "cluster's token with this hub as issuer", request: func(t *testing.T, b *bed) *http.Request {
			return withToken(b.cloud.token(t, func(c *claims) { c.Issuer = b.local.Issuer() }))
		}},
		{name: "garbage", request: func(*testing.T, *bed) *http.Request { return withToken("a.b.c") }},
		{name: "too long", request: func(*testing.T, *bed) *http.Request { return withToken(strings.Repeat("x", maxToken+1)) }},
	}
	links := map[string]func(*bed){
		"online":  func(*bed) {},
		"offline": func(b *bed) { b.offline.Store(true); b.cloud.set(func() { b.cloud.cut = true }) },
		"failing": func(b *bed) { b.cloud.set(func() { b.cloud.cut = true }) },
	}
	for _, tt := range tests {
		for link, change := range links {
			t.Run(tt.name+"/"+link, func(t *testing.T) {
				t.Parallel()
				b := newBed(t)
				must(t, b.refreshKeys(t.Context()))
				b.want(t, withToken(b.cloud.admit(b.cloud.token(t, func(c *claims) { c.ID = "teacher" }), webUser)), webUser)
				r := tt.request(t, b)
				if tt.seen {
					b.want(t, r, tt.online)
				}
				b.restart()
				change(b)
				want := tt.online
				if link != "online" {
					want = tt.offline
				}
				first := b.want(t, r, want)
				again := b.want(t, r, want)
				if want != "" && (first.Name != again.Name || first.Token != bearer(r)) {
					t.Errorf("first answer %#v, then %#v", first, again)
				}
				if want == webUser && !slices.Contains(first.Groups, groupAuthenticated) {
					t.Errorf("groups are %q", first.Groups)
				}
			})
		}
	}
}

func TestOfflineTokenGivesWhatKubernetesGives(t *testing.T) {
	b := newBed(t)
	must(t, b.refreshKeys(t.Context()))
	b.learnAudiences([]string{testAudience})
	b.offline.Store(true)
	c := b.want(t, withToken(b.cloud.token(t, nil)), webUser)
	want := &Caller{
		Name: webUser, UID: "sa-uid",
		Groups: []string{"system:serviceaccounts", "system:serviceaccounts:shop", "system:authenticated"},
		Extra: map[string][]string{
			"authentication.kubernetes.io/credential-id": {"JTI=jti"},
			"authentication.kubernetes.io/pod-name":      {"web-0"},
			"authentication.kubernetes.io/pod-uid":       {"pod-uid"},
			"authentication.kubernetes.io/node-name":     {"edge-1"},
			"authentication.kubernetes.io/node-uid":      {"node-uid"},
		},
	}
	if !sameUser(c, want) {
		t.Errorf("got %#v %v, want %#v", c, c.Extra, want)
	}
}

func TestLearn(t *testing.T) {
	b := newBed(t)
	must(t, b.refreshKeys(t.Context()))
	b.offline.Store(true)
	b.want(t, withToken(b.cloud.token(t, func(c *claims) { c.ID = "early" })), "")
	if b.Learn("opaque", true) == nil || b.Learn(sign(t, newKey(t), jose.ES256, b.cloud.id, nil), true) == nil || len(b.Audiences()) > 0 {
		t.Errorf("learned %q from strangers", b.Audiences())
	}
	must(t, b.Learn(b.cloud.token(t, nil), true))
	b.restart()
	b.want(t, withToken(b.cloud.token(t, func(c *claims) { c.ID = "late" })), webUser)
}

func TestTokenIsReviewedOncePerTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		must(t, b.refreshKeys(t.Context()))
		r := withToken(b.cloud.admit(b.cloud.token(t, nil), webUser))
		asked := func(want int) {
			t.Helper()
			synctest.Wait()
			if got, _, _ := b.cloud.counts(); got != want {
				t.Fatalf("%d reviews, want %d", got, want)
			}
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { b.want(t, r, webUser) })
		}
		wg.Wait()
		asked(1) // one flight for all
		elapse(tokenRefresh - time.Second)
		b.want(t, r, webUser)
		asked(1)
		elapse(2 * time.Second)
		b.want(t, r, webUser) // from the cache, and refreshed behind
		asked(2)
		b.want(t, r, webUser)
		asked(2)
		elapse(tokenTTL + time.Second)
		b.want(t, r, webUser)
		asked(3)

		// A revoked token is noticed: at once when it was idle.
		b.cloud.set(func() { clear(b.cloud.users) })
		elapse(tokenTTL + time.Second)
		b.want(t, r, "")
		b.want(t, r, "")
		asked(4)
		elapse(negativeTTL + time.Second)
		b.want(t, r, "")
		asked(5)
		// And it stays revoked without the cloud, although its signature is good.
		b.offline.Store(true)
		b.restart()
		b.want(t, r, "")
		// Until the cloud says otherwise.
		b.offline.Store(false)
		elapse(fallbackTTL + time.Second)
		b.cloud.admit(bearer(r), webUser)
		b.want(t, r, webUser)
		b.offline.Store(true)
		b.restart()
		b.want(t, r, webUser)
	})
}

func TestHangingCloudCostsOneWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		must(t, b.refreshKeys(t.Context()))
		b.learnAudiences([]string{testAudience})
		b.cloud.set(func() { b.cloud.hang = true })
		r := withToken(b.cloud.token(t, nil))
		start := time.Now()
		b.want(t, r, webUser)
		if waited := time.Since(start); waited != DefaultBudget {
			t.Errorf("waited %s", waited)
		}
		for range 30 {
			elapse(time.Second)
			start := time.Now()
			b.want(t, r, webUser)
			if waited := time.Since(start); waited > 0 {
				t.Errorf("waited %s again", waited)
			}
		}
		// A caller that goes away does not take the review with it.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := b.Authenticate(withToken("opaque").WithContext(ctx)); !apierrors.IsUnauthorized(err) {
			t.Errorf("got %v", err)
		}
		elapse(DefaultBudget)
		synctest.Wait()
	})
}

func TestTokenEndsInCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		must(t, b.refreshKeys(t.Context()))
		b.learnAudiences([]string{testAudience})
		b.offline.Store(true)
		r := withToken(b.cloud.token(t, func(c *claims) { c.Expiry = jwt.NewNumericDate(time.Now().Add(time.Minute)) }))
		b.want(t, r, webUser)
		elapse(time.Minute + leeway + time.Second)
		b.want(t, r, "")
	})
}

func TestUnknownTokensAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		must(t, b.refreshKeys(t.Context()))
		b.learnAudiences([]string{testAudience})
		good := withToken(b.cloud.admit(b.cloud.token(t, nil), webUser))
		limited := 0
		for i := range 200 {
			if _, err := b.Authenticate(withToken(fmt.Sprintf("guess-%d", i))); apierrors.IsTooManyRequests(err) {
				limited++
			}
		}
		if reviews, _, _ := b.cloud.counts(); reviews != reviewBurst || limited != 200-reviewBurst {
			t.Errorf("%d reviews, %d limited", reviews, limited)
		}
		b.want(t, good, webUser) // the signature vouches for it
		elsewhere := withToken("guess")
		elsewhere.RemoteAddr = "10.0.0.7:1234"
		b.want(t, elsewhere, "")
		if keys := b.memory.Keys(); len(keys) != 2 { // signer and trust
			t.Errorf("guesses are remembered: %q", keys)
		}
	})
}

func TestRunFollowsKeyRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		b.offline.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { must(t, b.Run(ctx)) })
		fetched := func(want int) {
			t.Helper()
			synctest.Wait()
			if _, _, got := b.cloud.counts(); got != want {
				t.Fatalf("%d fetches, want %d", got, want)
			}
		}
		elapse(time.Hour)
		fetched(0)
		b.offline.Store(false)
		elapse(keysPoll)
		fetched(1)
		saves := b.memory.Saves()
		elapse(keysInterval + time.Second)
		fetched(2)
		if b.memory.Saves() != saves {
			t.Error("unchanged keys were saved again")
		}

		b.cloud.set(func() { b.cloud.key, b.cloud.id = newKey(t), "key-2" })
		r := withToken(b.cloud.admit(b.cloud.token(t, nil), webUser))
		b.want(t, r, webUser)
		elapse(keysRetry)
		fetched(3)
		b.offline.Store(true)
		b.restart()
		b.want(t, withToken(b.cloud.token(t, func(c *claims) { c.ID = "fresh" })), webUser)
		cancel()
		wg.Wait()
	})
}

// TestRestartsDoNotFetchKeys restarts more often than keys are due.
func TestRestartsDoNotFetchKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		must(t, b.refreshKeys(t.Context()))
		live := func(d time.Duration) (fetches int) {
			b.restart()
			ctx, cancel := context.WithTimeout(t.Context(), d)
			defer cancel()
			must(t, b.Run(ctx))
			_, _, fetches = b.cloud.counts()
			return fetches
		}
		if n := live(time.Second); n > 2 { // it may happen to be due
			t.Errorf("%d fetches after a restart, want none", n-1)
		}
		before := live(time.Millisecond)
		if n := live(keysInterval + time.Second); n == before {
			t.Error("keys are never fetched again")
		}
		// A token of a key that is not known does not wait for that.
		b.cloud.set(func() { b.cloud.key, b.cloud.id = newKey(t), "key-2" })
		b.restart()
		b.want(t, withToken(b.cloud.admit(b.cloud.token(t, nil), webUser)), webUser)
		_, _, before = b.cloud.counts()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		must(t, b.Run(ctx))
		if _, _, n := b.cloud.counts(); n != before+1 {
			t.Errorf("%d fetches for an unknown key", n-before)
		}
	})
}

func TestDamagedMemoryDenies(t *testing.T) {
	b := newBed(t)
	b.want(t, withToken(b.cloud.admit("opaque", "jane")), "jane")
	for _, key := range b.memory.Keys() {
		must(t, b.memory.Save(key, []byte("{")))
	}
	b.offline.Store(true)
	b.restart()
	b.want(t, withToken("opaque"), "")
}

func TestMemoryIsBounded(t *testing.T) {
	b := newBed(t)
	for i := range 2000 {
		token := b.cloud.admit(fmt.Sprintf("opaque-%d", i), "jane")
		r := withToken(token)
		r.RemoteAddr = fmt.Sprintf("10.0.%d.%d:1", i/250, i%250)
		b.want(t, r, "jane")
	}
	size := 0
	for _, key := range b.memory.Keys() {
		value, err := b.memory.Load(key)
		must(t, err)
		size += len(value)
	}
	if n := len(b.memory.Keys()); n > 66 || size > 128<<10 {
		t.Errorf("%d records of %d bytes", n, size)
	}
}

func TestLocalSigner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		b.offline.Store(true)
		sign := func(life time.Duration) (*http.Request, time.Duration) {
			token, expiry, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "u", PodName: "p", PodUID: "q", NodeName: "edge-1", Life: life})
			must(t, err)
			return withToken(token), time.Until(expiry)
		}
		for want, lives := range map[time.Duration][]time.Duration{
			time.Hour:        {0, 24 * time.Hour, time.Hour},
			10 * time.Minute: {time.Second, 10 * time.Minute},
			20 * time.Minute: {20 * time.Minute},
		} {
			for _, life := range lives {
				if _, got := sign(life); got != want {
					t.Errorf("asked for %s, got %s, want %s", life, got, want)
				}
			}
		}
		r, _ := sign(0)
		c := b.want(t, r, webUser)
		if !c.Local || c.UID != "u" || c.Extra[extraPodUID][0] != "q" {
			t.Errorf("got %#v", c)
		}
		b.dead = map[string]bool{"p": true}
		b.want(t, r, "") // at once, though the verdict is kept for a minute
		b.dead = nil
		unbound, _, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web"})
		must(t, err)
		b.want(t, withToken(unbound), "")
		other, _, err := b.local.Sign(TokenSpec{Namespace: "shop", ServiceAccount: "web", PodName: "p", PodUID: "q", Audiences: []string{"vault"}})
		must(t, err)
		b.want(t, withToken(other), "")
		// The key outlives the process, the token does not outlive its hour.
		again, err := NewLocalSigner("edge-1", b.memory, b.clock)
		must(t, err)
		b.local = again
		b.restart()
		b.want(t, r, webUser)
		elapse(time.Hour + leeway + time.Second)
		b.want(t, r, "")
		if _, _, err := b.local.Sign(TokenSpec{Namespace: "shop"}); err == nil {
			t.Error("signed for nobody")
		}
	})
}

func TestCallerHidesItsToken(t *testing.T) {
	c := &Caller{Name: "jane", Groups: []string{"g"}, Token: "s3cret"}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "caller", c, "value", *c)
	for _, s := range []string{log.String(), fmt.Sprint(c), fmt.Sprintf("%v %+v %#v %s", *c, *c, *c, c), fmt.Sprintf("%#v", c)} {
		if strings.Contains(s, "s3cret") || !strings.Contains(s, "jane") {
			t.Errorf("got %s", s)
		}
	}
}

func TestReloadedAuthority(t *testing.T) {
	b := newBed(t)
	cert := withCertificate(b.ca.issue(t, nil))
	b.want(t, cert, "system:node:edge-1")
	pool := newAuthority(t).pool()
	b.cfg.ClusterCAs = func() *x509.CertPool { return pool }
	b.want(t, cert, "")
	b.cfg.ClusterCAs = func() *x509.CertPool { return nil }
	b.want(t, cert, "")
}

func FuzzToken(f *testing.F) {
	c := newCloud(f)
	jwks, issuer, err := c.Keys(context.Background())
	must(f, err)
	tr := &trust{JWKS: jwks, Issuer: issuer, Audiences: []string{testAudience}}
	must(f, tr.parse())
	good := c.token(f, nil)
	for _, s := range []string{good, good[:len(good)-1], "a.b.c", "..", "eyJhbGciOiJub25lIn0.e30.", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if len(s) > maxToken {
			return
		}
		r := withToken("")
		r.Header["Authorization"] = []string{"Bearer " + s}
		r.Header.Set("Upgrade", "websocket")
		r.Header[protocolHeader] = []string{s, protocolPrefix + s}
		_ = bearer(r)
		w := parseToken(s)
		if w == nil {
			return
		}
		if caller, err := tr.verify(w, nil); err == nil && caller.Name != webUser {
			t.Errorf("%q verified as %v", s, caller)
		}
	})
}
