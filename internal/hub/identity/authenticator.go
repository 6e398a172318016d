package identity

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	utilcache "k8s.io/apimachinery/pkg/util/cache"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const (
	// DefaultBudget is how long a request waits for a review by the cloud.
	DefaultBudget = 2 * time.Second
	// weakPatience is how many budgets a review may take while the link is
	// weak and nothing can answer in its place.
	weakPatience = 5

	// A positive answer is used for tokenTTL; from tokenRefresh on, using it
	// asks again in the background, so that a busy caller never waits. A token
	// that was revoked is used no longer than tokenTTL.
	tokenTTL     = time.Minute
	tokenRefresh = 30 * time.Second
	// negativeTTL is how long a "no" of the cloud is used.
	negativeTTL = 10 * time.Second
	// fallbackTTL is after how long the cloud is asked again when an answer had
	// to be given in its place. A "yes" is used meanwhile, so that a weak link
	// costs a caller no more than one wait.
	fallbackTTL = 5 * time.Second
	// certificateTTL is how long a verified certificate is not verified again.
	certificateTTL = time.Minute

	// Tokens that nothing vouches for are reviewed at this rate per host.
	reviewRate  = 1
	reviewBurst = 20

	keysInterval = time.Hour        // between refreshes of the signing keys
	keysRetry    = 30 * time.Second // after a failed one, and at least between two
	keysPoll     = 5 * time.Second  // of the link's state while it is down

	maxAudiences = 16
	trustKey     = "trust"
)

// AuthenticatorConfig is what an Authenticator works with. API, Memory and
// ClusterCAs are required.
type AuthenticatorConfig struct {
	API    API
	Memory Memory
	// ClusterCAs returns the pool that client certificates are verified
	// against: the cluster's client CA and nothing else. It is called for each
	// request and should return the same pointer until the pool changes.
	ClusterCAs func() *x509.CertPool
	// Local verifies the tokens that this hub made; nil if it makes none.
	Local *LocalSigner
	// Lives reports whether a pod is known to be on this node: a token that
	// this hub made dies with its pod. Nil means that none does.
	Lives func(namespace, name, uid string) bool
	// Own tells whether a certificate, in DER, is the one that the node uses
	// now. It does not stop to count on loopback because it has expired: a node
	// that was cut off for longer must still run. Nil: none is.
	Own func(der []byte) bool
	// Clock is what expiry is judged by; the machine's if nil.
	Clock *clock.Clock
	// Online tells the state of the link; nil means that it is always tried.
	Online func() bool
	// Contact returns when the link last came up: answers from before are
	// asked for again. Nil means that it was never cut.
	Contact func() time.Time
	// Weak tells that the link is up but slow, so that a review needs more
	// time; nil means never.
	Weak func() bool
	// Budget is how long a request waits for a review; DefaultBudget if zero.
	Budget time.Duration
	// MaxAge is how long a review counts while the cloud is away, for tokens
	// that the signing keys do not decide; DefaultMaxAge if zero.
	MaxAge time.Duration
	Log    *slog.Logger // slog.Default() if nil
}

// Authenticator tells who sent a request. It is safe for concurrent use.
type Authenticator struct {
	cfg AuthenticatorConfig

	certificates *utilcache.LRUExpireCache // certificateKey -> *Caller
	tokens       *utilcache.LRUExpireCache // digest -> verdict
	limiters     *utilcache.LRUExpireCache // host -> *rate.Limiter
	limitersMu   sync.Mutex                // guards adding to limiters
	flights      singleflight.Group
	reviewed     table[reviewed]
	accounts     accounts
	contact      contact

	trust   atomic.Pointer[trust]
	trustMu sync.Mutex // guards replacing trust
	wake    chan struct{}
}

// verdict is what is known of a token. Its Caller has no Token.
type verdict struct {
	caller  *Caller
	err     error
	asked   time.Time // when it began to be found out
	refresh time.Time // ask again from then on; zero: never
}

// reviewed is what is remembered of a token that the signing keys cannot, or
// must not, decide alone.
type reviewed struct {
	Caller *Caller `json:"u,omitempty"` // nil: the cloud rejected it
	Expiry int64   `json:"e,omitempty"` // Unix seconds; 0: unknown
}

// NewAuthenticator returns an Authenticator that knows what Memory holds. Its
// Run method keeps the signing keys current.
func NewAuthenticator(cfg AuthenticatorConfig) *Authenticator {
	if cfg.Weak == nil {
		cfg.Weak = func() bool { return false }
	}
	if cfg.Budget == 0 {
		cfg.Budget = DefaultBudget
	}
	if cfg.MaxAge == 0 {
		cfg.MaxAge = DefaultMaxAge
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	a := &Authenticator{
		cfg:          cfg,
		certificates: utilcache.NewLRUExpireCache(256),
		tokens:       utilcache.NewLRUExpireCache(2048),
		limiters:     utilcache.NewLRUExpireCache(512),
		reviewed:     table[reviewed]{memory: cfg.Memory, prefix: "token", ways: 8, maxAge: cfg.MaxAge, clock: cfg.Clock},
		accounts:     newAccounts(cfg.Memory, cfg.MaxAge, cfg.Clock),
		contact:      newContact(cfg.Online, cfg.Contact),
		wake:         make(chan struct{}, 1),
	}
	t, err := loadTrust(cfg.Memory)
	if err != nil {
		cfg.Log.Warn("remembered signing keys are unusable", "err", err)
	}
	a.trust.Store(t)
	return a
}

// loadTrust always returns a usable value, empty with an error.
func loadTrust(memory Memory) (*trust, error) {
	data, err := memory.Load(trustKey)
	if err != nil || len(data) == 0 {
		return &trust{}, err
	}
	t := &trust{}
	if err := json.Unmarshal(data, t); err != nil {
		return &trust{}, err
	}
	if err := t.parse(); err != nil {
		return &trust{}, err
	}
	return t, nil
}

// Audiences returns the audiences that the API server is known to accept.
func (a *Authenticator) Audiences() []string { return slices.Clone(a.trust.Load().Audiences) }

// Learn takes note of a token that the API server just made in answer to a
// TokenRequest: of its account and, when it was made for the API itself, of the
// API's audiences. A node whose pods never called before the cloud went away
// needs this to know them.
func (a *Authenticator) Learn(token string, forAPI bool) error {
	w := parseToken(token)
	if w == nil {
		return errors.New("learn from token: not a signed token")
	}
	c := &w.unverified // the cloud's own word: its signature is not in question
	if err := a.accounts.note(c.Subject, c.Kubernetes.ServiceAccount.UID); err != nil {
		return fmt.Errorf("learn account: %w", err)
	}
	if !forAPI {
		return nil
	}
	t := *a.trust.Load()
	t.Audiences = c.Audience
	if _, err := t.verify(w, a.cfg.Clock); err != nil {
		return fmt.Errorf("learn audiences: %w", err)
	}
	a.learnAudiences(t.Audiences)
	return nil
}

// AccountUID returns the UID of a ServiceAccount as the cloud last stated it,
// or "" when it is not known.
func (a *Authenticator) AccountUID(namespace, name string) string {
	uid, err := a.accounts.uid(serviceAccountName(namespace, name))
	if err != nil {
		a.cfg.Log.Warn("remembered accounts are unreadable", "err", err)
	}
	return uid
}

// Doubt is told that the API server just refused a token that was forwarded to
// it. What is known of the token is asked for again before it is used.
func (a *Authenticator) Doubt(token string) {
	a.tokens.Remove(digest(sha256.Sum256([]byte(token))))
}

// Authenticate returns who sent r. The error is an *apierrors.StatusError that
// can be sent as it is: 401, or 429 for a host that tries too many tokens.
func (a *Authenticator) Authenticate(r *http.Request) (*Caller, error) {
	token := bearer(r)
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		caller, err := a.certificate(r.TLS, remoteHost(r))
		if err == nil || token == "" {
			return caller, err
		}
	}
	if token == "" {
		return nil, unauthorized("no client certificate and no bearer token given")
	}
	if len(token) > maxToken {
		return nil, unauthorized("the bearer token is too long")
	}
	v, err := a.token(r.Context(), token, remoteHost(r))
	if err != nil {
		return nil, err
	}
	if v.err != nil {
		return nil, v.err
	}
	if v.caller.Local && !a.podLives(v.caller) {
		return nil, unauthorized("the pod that the token was made for is no more on this node")
	}
	return v.caller.withToken(token), nil
}

// podLives is asked for each request: a verdict is kept for longer than a pod
// may be gone.
func (a *Authenticator) podLives(c *Caller) bool {
	name, uid := c.Extra[extraPodName], c.Extra[extraPodUID]
	account, ok := strings.CutPrefix(c.Name, "system:serviceaccount:")
	namespace, _, _ := strings.Cut(account, ":")
	return ok && len(name) == 1 && len(uid) == 1 && a.cfg.Lives != nil && a.cfg.Lives(namespace, name[0], uid[0])
}

func unauthorized(message string) error { return apierrors.NewUnauthorized(message) }

func remoteHost(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

type certificateKey struct {
	leaf digest
	pool *x509.CertPool
}

func (a *Authenticator) certificate(state *tls.ConnectionState, host string) (*Caller, error) {
	leaf := state.PeerCertificates[0]
	key := certificateKey{leaf: sha256.Sum256(leaf.Raw), pool: a.cfg.ClusterCAs()}
	if c, ok := a.certificates.Get(key); ok {
		return c.(*Caller), nil //nolint:errcheck // only callers go in
	}
	if key.pool == nil {
		// A nil pool would mean the system's roots.
		return nil, unauthorized("the cluster's certificate authority is not known yet")
	}
	options := x509.VerifyOptions{
		Roots:         key.pool,
		Intermediates: x509.NewCertPool(),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, c := range state.PeerCertificates[1:] {
		options.Intermediates.AddCert(c)
	}
	chains, err := a.cfg.Clock.Verify(leaf, options)
	lapsed := err != nil && a.isOwn(leaf, host)
	if lapsed {
		options.CurrentTime = leaf.NotAfter
		chains, err = leaf.Verify(options)
	}
	if err != nil {
		return nil, unauthorized(certificateMessage(err))
	}
	if leaf.Subject.CommonName == "" {
		return nil, unauthorized("the client certificate names nobody")
	}
	caller := &Caller{
		Name:        leaf.Subject.CommonName,
		Groups:      append(slices.Clone(leaf.Subject.Organization), groupAuthenticated),
		Extra:       map[string][]string{extraCredentialID: {"X509SHA256=" + hex.EncodeToString(key.leaf[:])}},
		Certificate: true,
	}
	if lapsed {
		return caller, nil // not cached: it counts from this host only
	}
	ttl := certificateTTL
	for _, c := range chains[0] {
		// By a clock that is a guess it may have ended already.
		if left := a.cfg.Clock.Until(c.NotAfter); left > 0 {
			ttl = min(ttl, left)
		}
	}
	caller.remember()
	a.certificates.Add(key, caller, ttl)
	return caller, nil
}

// isOwn tells whether the node itself shows its current certificate.
func (a *Authenticator) isOwn(leaf *x509.Certificate, host string) bool {
	return a.cfg.Own != nil && net.ParseIP(host).IsLoopback() && a.cfg.Own(leaf.Raw)
}

func certificateMessage(err error) string {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return "the client certificate has expired or is not valid yet"
	}
	if errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage {
		return "the certificate is not for clients"
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "the client certificate is signed by an unknown authority"
	}
	return "the client certificate is not valid"
}

// token returns the verdict on a bearer token. An error means that there is
// none.
func (a *Authenticator) token(ctx context.Context, token, host string) (verdict, error) {
	d := digest(sha256.Sum256([]byte(token)))
	if cached, ok := a.tokens.Get(d); ok {
		v := cached.(verdict) //nolint:errcheck // only verdicts go in
		if !a.contact.outdated(v.asked) {
			if !v.refresh.IsZero() && time.Now().After(v.refresh) && a.contact.online() {
				a.decide(ctx, token, d, nil) // not waited for
			}
			return v, nil
		}
	}
	var admit func() bool
	if host != "" {
		admit = func() bool { return a.limiter(host).Allow() }
	}
	for first := true; ; first = false {
		select {
		case result := <-a.decide(ctx, token, d, admit):
			if result.Err != nil {
				return verdict{}, result.Err
			}
			v := result.Val.(verdict) //nolint:errcheck // see decide
			if first && a.contact.outdated(v.asked) {
				continue // somebody else's question, from before the link came up
			}
			return v, nil
		case <-ctx.Done():
			return verdict{}, unauthorized("the request ended before its token was checked")
		}
	}
}

// decide finds the verdict on a token, once for all who wait for it, and puts
// it in the cache. It outlives ctx, by no more than the budget.
func (a *Authenticator) decide(ctx context.Context, token string, d digest, admit func() bool) <-chan singleflight.Result {
	ctx = context.WithoutCancel(ctx)
	return a.flights.DoChan(string(d[:]), func() (any, error) {
		asked := time.Now()
		if cached, ok := a.tokens.Get(d); ok {
			// Found out since the caller looked, by the flight before.
			v := cached.(verdict) //nolint:errcheck // only verdicts go in
			if !a.contact.outdated(v.asked) && (v.refresh.IsZero() || asked.Before(v.refresh)) {
				return v, nil
			}
		}
		v, ttl, err := a.judge(ctx, token, d, admit)
		if err != nil {
			return nil, err
		}
		v.asked = asked
		if v.caller != nil {
			v.caller.remember()
		}
		a.tokens.Add(d, v, ttl)
		return v, nil
	})
}

//nolint:gocyclo // who vouches for a token, in the order of their word
func (a *Authenticator) judge(ctx context.Context, token string, d digest, admit func() bool) (verdict, time.Duration, error) {
	t := a.trust.Load()
	w := parseToken(token)
	if w != nil && a.cfg.Local != nil && w.issuer() == a.cfg.Local.Issuer() {
		caller, err := a.cfg.Local.verify(w, t.Audiences)
		if err == nil {
			err = a.accounts.check(caller)
		}
		if err != nil {
			return verdict{err: unauthorized(err.Error())}, negativeTTL, nil
		}
		return verdict{caller: caller}, min(certificateTTL, max(negativeTTL, w.left(a.cfg.Clock))), nil
	}

	var genuine *Caller
	reason := errors.New("it is not signed by this cluster and was never checked before")
	if w != nil {
		genuine, reason = t.verify(w, a.cfg.Clock)
		if errors.Is(reason, errUnknownKey) {
			a.wakeUp()
		}
	}
	known, at, isKnown, err := a.reviewed.get(tokenSet(d), d)
	if err != nil {
		a.cfg.Log.Warn("remembered tokens are unreadable", "err", err)
	}
	isKnown = isKnown && (known.Expiry == 0 || a.cfg.Clock.Now().Before(time.Unix(known.Expiry, 0).Add(leeway)))

	vouched := genuine != nil || isKnown && known.Caller != nil
	budget := a.cfg.Budget
	if !vouched && a.cfg.Weak() {
		budget *= weakPatience
	}
	if a.contact.online() {
		if !vouched && admit != nil && !admit() {
			return verdict{}, 0, apierrors.NewTooManyRequests("too many unknown tokens from this address", 1)
		}
		reviewCtx, cancel := context.WithTimeout(ctx, budget)
		review, err := a.cfg.API.TokenReview(reviewCtx, token, nil)
		cancel()
		if err == nil {
			v, ttl, value := a.learn(review, w)
			switch {
			case value == nil && !isKnown:
			case value != nil && isKnown && sameUser(value.Caller, known.Caller) && a.cfg.Clock.Since(at) < a.cfg.MaxAge/8:
			default:
				if err := a.reviewed.put(tokenSet(d), d, value); err != nil {
					a.cfg.Log.Warn("token review is not remembered", "err", err)
				}
			}
			return v, ttl, nil
		}
		a.cfg.Log.Debug("token review failed, using what is known", "err", err)
	}

	if isKnown && known.Caller == nil {
		return verdict{err: unauthorized("the API server rejected the token when it last saw it")}, fallbackTTL, nil
	}
	caller := genuine
	if caller == nil && isKnown {
		caller = known.Caller
	}
	if caller != nil {
		if reason = a.accounts.check(caller); reason == nil {
			out := *caller
			out.Remembered = true
			return verdict{caller: &out, refresh: time.Now().Add(fallbackTTL)}, min(tokenTTL, w.left(a.cfg.Clock)), nil
		}
	}
	return verdict{err: unauthorized(fmt.Sprintf(
		"the API server is not reachable to check the token, and this node cannot: %v; use a token of this cluster that is valid, or try again when the link is back",
		reason))}, fallbackTTL, nil
}

// learn turns the cloud's answer into a verdict, and returns what the signing
// keys will not tell of it while the cloud is away: nil if they tell all.
func (a *Authenticator) learn(review *authenticationv1.TokenReview, w *webToken) (verdict, time.Duration, *reviewed) {
	v, ttl := verdict{err: unauthorized("the API server does not accept the token")}, negativeTTL
	if review.Status.Authenticated {
		a.learnAudiences(review.Status.Audiences)
		v = verdict{caller: callerFromUserInfo(review.Status.User), refresh: time.Now().Add(tokenRefresh)}
		if err := a.accounts.note(v.caller.Name, v.caller.UID); err != nil {
			a.cfg.Log.Warn("account is not remembered", "err", err)
		}
		// With a clock that runs ahead, every token seems to have ended.
		ttl = max(min(tokenTTL, w.left(a.cfg.Clock)), negativeTTL)
	}
	genuine := false
	if w != nil {
		_, err := a.trust.Load().verify(w, a.cfg.Clock)
		genuine = err == nil
	}
	// The keys' word is enough exactly when it agrees with the cloud's.
	if review.Status.Authenticated == genuine {
		return v, ttl, nil
	}
	value := &reviewed{Caller: v.caller}
	if e := w.expiry(); !e.IsZero() {
		value.Expiry = e.Unix()
	}
	return v, ttl, value
}

// tokenSet spreads tokens over 64 records.
func tokenSet(d digest) string { return hex.EncodeToString([]byte{d[0] & 63}) }

func (a *Authenticator) limiter(host string) *rate.Limiter {
	a.limitersMu.Lock()
	defer a.limitersMu.Unlock()
	if l, ok := a.limiters.Get(host); ok {
		return l.(*rate.Limiter) //nolint:errcheck // only limiters go in
	}
	l := rate.NewLimiter(reviewRate, reviewBurst)
	a.limiters.Add(host, l, 10*time.Minute)
	return l
}

func (a *Authenticator) wakeUp() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Run keeps the cluster's signing keys current until ctx ends, and returns nil.
func (a *Authenticator) Run(ctx context.Context) error {
	if len(a.trust.Load().JWKS) > 0 {
		// A restart is no reason to ask sooner than without one.
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
		case <-time.After(rand.N(keysInterval)):
		}
	}
	for {
		wait := keysPoll
		if a.contact.online() {
			wait = keysInterval
			if err := a.refreshKeys(ctx); err != nil {
				a.cfg.Log.Warn("signing keys are not refreshed", "err", err)
				wait = keysRetry
			}
		}
		if !a.pause(ctx, wait) {
			return nil
		}
	}
}

// pause waits, or after a while until a token with an unknown key comes, and
// tells whether ctx is still alive.
func (a *Authenticator) pause(ctx context.Context, wait time.Duration) bool {
	first := min(wait, keysRetry)
	select {
	case <-ctx.Done():
		return false
	case <-time.After(first):
	}
	select {
	case <-ctx.Done():
		return false
	case <-a.wake:
	case <-time.After(wait - first):
	}
	return true
}

func (a *Authenticator) refreshKeys(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*a.cfg.Budget)
	defer cancel()
	jwks, issuer, err := a.cfg.API.Keys(ctx)
	if err != nil {
		return err
	}
	next := trust{JWKS: jwks, Issuer: issuer}
	if err := next.parse(); err != nil {
		return err
	}
	return a.updateTrust(func(t *trust) { t.JWKS, t.Issuer, t.keys = next.JWKS, next.Issuer, next.keys })
}

func (a *Authenticator) learnAudiences(audiences []string) {
	known := a.trust.Load().Audiences
	if !slices.ContainsFunc(audiences, func(s string) bool { return !slices.Contains(known, s) }) {
		return
	}
	err := a.updateTrust(func(t *trust) {
		t.Audiences = slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(t.Audiences), audiences...))))
		t.Audiences = t.Audiences[:min(len(t.Audiences), maxAudiences)]
	})
	if err != nil {
		a.cfg.Log.Warn("audiences are not remembered", "err", err)
	}
}

// updateTrust replaces the trust by a changed copy, and saves it if something
// changed that is worth it.
func (a *Authenticator) updateTrust(change func(*trust)) error {
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	old := a.trust.Load()
	next := *old
	change(&next)
	same := string(old.JWKS) == string(next.JWKS) && old.Issuer == next.Issuer && slices.Equal(old.Audiences, next.Audiences)
	if same {
		return nil
	}
	a.trust.Store(&next)
	data, err := json.Marshal(&next)
	if err != nil {
		return fmt.Errorf("encode signing keys: %w", err)
	}
	if err := a.cfg.Memory.Save(trustKey, data); err != nil {
		return fmt.Errorf("save signing keys: %w", err)
	}
	return nil
}
