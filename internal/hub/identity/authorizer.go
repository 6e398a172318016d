package identity

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	utilcache "k8s.io/apimachinery/pkg/util/cache"

	"github.com/yurt-edge/yurt/internal/hub/clock"
)

const (
	// An allowed answer is used for allowedTTL; from allowedRefresh on, using
	// it asks again in the background.
	allowedTTL     = time.Minute
	allowedRefresh = 30 * time.Second
	deniedTTL      = 10 * time.Second

	// DefaultMaxAge is how long a decision counts while the cloud is away.
	DefaultMaxAge = 90 * 24 * time.Hour
)

// Attributes are a question to the Authorizer: the parts of a request as
// Kubernetes' own authorizers see them. A non-empty Path makes it a question
// about a non-resource URL, for which only Verb counts besides.
type Attributes struct {
	Verb, Group, Version, Resource, Subresource, Namespace, Name string

	// FieldSelector and LabelSelector narrow a list or watch, and let the Node
	// authorizer see that a node asks for its own objects only.
	FieldSelector fields.Requirements
	LabelSelector labels.Requirements

	Path string
}

// Decision is an answer of the Authorizer.
type Decision struct {
	Allowed bool
	// Reason is for people and may be empty.
	Reason string
	// Remembered says that the cloud could not be asked just now.
	Remembered bool
}

// AuthorizerConfig is what an Authorizer works with. API and Memory are
// required.
type AuthorizerConfig struct {
	API    API
	Memory Memory
	// Online tells the state of the link; nil means that it is always tried.
	Online func() bool
	// Contact returns when the link last came up: decisions from before are
	// asked for again. Nil means that it was never cut.
	Contact func() time.Time
	// Weak tells that the link is up but slow, so that a review needs more
	// time; nil means never.
	Weak func() bool
	// Budget is how long a request waits for a review; DefaultBudget if zero.
	Budget time.Duration
	// MaxAge is how old a remembered decision may be; DefaultMaxAge if zero.
	MaxAge time.Duration
	// Self is the node's own user, for whom decisions do not age: a node that
	// is cut off for longer must still run its pods. Nil: there is none.
	Self *Caller
	// Clock is what ages are judged by; the machine's if nil.
	Clock *clock.Clock
	Log   *slog.Logger // slog.Default() if nil
}

// Authorizer tells what a Caller may do. It is safe for concurrent use.
type Authorizer struct {
	cfg      AuthorizerConfig
	cache    *utilcache.LRUExpireCache // digest -> ruling
	flights  singleflight.Group
	remember table[bool]
	self     digest      // of Self
	own      table[bool] // what is remembered of Self
	contact  contact
}

// ruling is a Decision in the cache.
type ruling struct {
	Decision
	asked   time.Time // when it began to be found out
	refresh time.Time // ask again from then on; zero: never
}

// NewAuthorizer returns an Authorizer that knows the decisions in Memory.
func NewAuthorizer(cfg AuthorizerConfig) *Authorizer {
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
	z := &Authorizer{
		cfg:      cfg,
		cache:    utilcache.NewLRUExpireCache(8192),
		remember: table[bool]{memory: cfg.Memory, prefix: "access", ways: 16, maxAge: cfg.MaxAge, clock: cfg.Clock},
		own:      table[bool]{memory: cfg.Memory, prefix: "own", ways: 16, clock: cfg.Clock},
		contact:  newContact(cfg.Online, cfg.Contact),
	}
	if cfg.Self != nil {
		z.self = userDigest(cfg.Self)
	}
	return z
}

// memoryOf returns what is remembered of a user.
func (z *Authorizer) memoryOf(user digest) *table[bool] {
	if z.cfg.Self != nil && user == z.self {
		return &z.own
	}
	return &z.remember
}

// Authorize tells whether c may do what a says. It asks the cloud, or recalls
// what the cloud said when it was last asked. The error is that of an ended
// ctx; a question that nobody can answer is denied.
func (z *Authorizer) Authorize(ctx context.Context, c *Caller, a Attributes) (Decision, error) {
	// The API server does not ask its authorizers about this group either, and
	// no configuration can change that.
	if slices.Contains(c.Groups, groupMasters) {
		return Decision{Allowed: true, Reason: "member of " + groupMasters}, nil
	}
	user := userDigest(c)
	q := questionDigest(user, a)
	if r, ok := z.cached(q, user, a); ok {
		if !r.refresh.IsZero() && time.Now().After(r.refresh) && z.contact.online() {
			z.decide(ctx, c, user, q, a) // not waited for
		}
		return r.Decision, nil
	}
	if !z.contact.online() {
		return z.fallback(time.Now(), user, q, a).Decision, nil
	}
	for first := true; ; first = false {
		select {
		case result := <-z.decide(ctx, c, user, q, a):
			r := result.Val.(ruling) //nolint:errcheck // see decide
			if first && z.contact.outdated(r.asked) {
				continue // somebody else's question, from before the link came up
			}
			return r.Decision, nil
		case <-ctx.Done():
			return Decision{}, context.Cause(ctx)
		}
	}
}

// cached answers from the cache: by the question itself, or by a wider one that
// was allowed.
func (z *Authorizer) cached(q, user digest, a Attributes) (ruling, bool) {
	if v, ok := z.cache.Get(q); ok {
		if r := v.(ruling); !z.contact.outdated(r.asked) { //nolint:errcheck // only rulings go in
			return r, true
		}
	}
	for _, w := range wider(a) {
		if v, ok := z.cache.Get(questionDigest(user, w)); ok {
			if r := v.(ruling); r.Allowed && !z.contact.outdated(r.asked) { //nolint:errcheck // see above
				r.refresh = time.Time{} // that is for those who ask the wider one
				return r, true
			}
		}
	}
	return ruling{}, false
}

// decide asks the cloud, once for all who wait for the same answer, and falls
// back to what is remembered. It outlives ctx, by no more than the budget.
func (z *Authorizer) decide(ctx context.Context, c *Caller, user, q digest, a Attributes) <-chan singleflight.Result {
	ctx = context.WithoutCancel(ctx)
	return z.flights.DoChan(string(q[:]), func() (any, error) {
		asked, budget := time.Now(), z.cfg.Budget
		if cached, ok := z.cache.Get(q); ok {
			// Found out since the caller looked, by the flight before.
			r := cached.(ruling) //nolint:errcheck // only rulings go in
			if !z.contact.outdated(r.asked) && (r.refresh.IsZero() || asked.Before(r.refresh)) {
				return r, nil
			}
		}
		if z.cfg.Weak() {
			if best, err := z.lookup(user, q, a); err == nil && !best.found {
				budget *= weakPatience // nothing can answer in its place
			}
		}
		reviewCtx, cancel := context.WithTimeout(ctx, budget)
		defer cancel()
		review, err := z.cfg.API.SubjectAccessReview(reviewCtx, newReview(c, a))
		if err != nil {
			z.cfg.Log.Debug("access review failed, using what is known", "err", err)
			return z.fallback(asked, user, q, a), nil
		}
		r := ruling{asked: asked, Decision: Decision{
			Allowed: review.Status.Allowed && !review.Status.Denied, Reason: review.Status.Reason,
		}}
		z.settle(r, user, q, a)
		return r, nil
	})
}

// settle takes over the cloud's answer.
func (z *Authorizer) settle(r ruling, user, q digest, a Attributes) {
	ttl := deniedTTL
	if r.Allowed {
		r.refresh, ttl = time.Now().Add(allowedRefresh), allowedTTL
	} else {
		z.withdraw(user, a)
	}
	z.cache.Add(q, r, ttl)
	z.learn(user, q, a, r.Allowed)
}

// withdraw forgets every wider answer that allowed a, which the cloud just
// denied: it would not be given today.
func (z *Authorizer) withdraw(user digest, a Attributes) {
	for _, w := range wider(a) {
		q := questionDigest(user, w)
		z.cache.Remove(q)
		allowed, _, found, err := z.remember.get(accessSet(user, q), q)
		if err == nil && found && allowed {
			err = z.remember.put(accessSet(user, q), q, nil)
		}
		if err != nil {
			z.cfg.Log.Warn("revoked decision is not forgotten", "err", err)
		}
	}
}

// fallback answers in the cloud's place. The answer is cached, or every request
// would wait for a bad link, or search the memory.
func (z *Authorizer) fallback(asked time.Time, user, q digest, a Attributes) ruling {
	r, ttl := ruling{Decision: z.recall(user, q, a), asked: asked}, fallbackTTL
	if r.Allowed {
		r.refresh, ttl = time.Now().Add(fallbackTTL), allowedTTL
	}
	z.cache.Add(q, r, ttl)
	return r
}

// recalled is the remembered answer that fits a question best.
type recalled struct {
	allowed, found bool
	at             time.Time
}

// lookup returns the latest remembered answer to the question itself or, if
// allowed, to a wider one.
func (z *Authorizer) lookup(user, q digest, a Attributes) (best recalled, err error) {
	allowed, at, found, err := z.memoryOf(user).get(accessSet(user, q), q)
	if err != nil {
		return recalled{}, err
	}
	if found {
		best = recalled{allowed: allowed, found: true, at: at}
	}
	for _, w := range wider(a) {
		wq := questionDigest(user, w)
		allowed, at, found, err := z.memoryOf(user).get(accessSet(user, wq), wq)
		if err != nil {
			return recalled{}, err
		}
		if found && allowed && (!best.found || at.After(best.at)) {
			best = recalled{allowed: true, found: true, at: at}
		}
	}
	return best, nil
}

func (z *Authorizer) recall(user, q digest, a Attributes) Decision {
	best, err := z.lookup(user, q, a)
	switch {
	case err != nil:
		z.cfg.Log.Warn("remembered decisions are unreadable", "err", err)
		return Decision{Reason: "the API server is not reachable and the remembered decisions are unreadable", Remembered: true}
	case !best.found:
		return Decision{Remembered: true, Reason: fmt.Sprintf(
			"the API server is not reachable and was not asked this in the last %d days; what is asked once while the link is up is known when it is down",
			z.cfg.MaxAge/(24*time.Hour))}
	}
	verb := "denied"
	if best.allowed {
		verb = "allowed"
	}
	return Decision{
		Allowed:    best.allowed,
		Remembered: true,
		Reason:     fmt.Sprintf("the API server is not reachable; it %s this on %s", verb, best.at.UTC().Format(time.DateOnly)),
	}
}

// learn remembers an answer unless memory would give the same one for long
// enough. A denial is only remembered against an allowance, so that a caller
// without rights cannot fill the memory.
func (z *Authorizer) learn(user, q digest, a Attributes, allowed bool) {
	best, err := z.lookup(user, q, a)
	if err != nil {
		z.cfg.Log.Warn("remembered decisions are unreadable", "err", err)
		return
	}
	age := z.cfg.Clock.Since(best.at)
	fresh := age < z.cfg.MaxAge/8 && age > -leeway
	if best.allowed == allowed && (!allowed || fresh) {
		return
	}
	if err := z.memoryOf(user).put(accessSet(user, q), q, &allowed); err != nil {
		z.cfg.Log.Warn("decision is not remembered", "err", err)
	}
}

// accessSet gives each user 64 of 4096 records, so that no caller can push out
// what is remembered of most others.
func accessSet(user, q digest) string {
	return hex.EncodeToString([]byte{user[0] & 63, q[0] & 63})
}

// wider returns the questions whose "yes" answers a as well, nearest first.
func wider(a Attributes) []Attributes {
	if a.Path != "" {
		return nil
	}
	out := make([]Attributes, 0, 7)
	widen := func(applies bool, change func(*Attributes)) {
		if !applies {
			return
		}
		for _, w := range append([]Attributes{a}, out...) {
			change(&w)
			out = append(out, w)
		}
	}
	widen(len(a.FieldSelector)+len(a.LabelSelector) > 0, func(w *Attributes) { w.FieldSelector, w.LabelSelector = nil, nil })
	widen(a.Name != "", func(w *Attributes) { w.Name = "" })
	widen(a.Namespace != "", func(w *Attributes) { w.Namespace = "" })
	return out
}

// userDigest stands for everything about a caller that authorizers may look at,
// except for what differs between two tokens of one ServiceAccount on one node.
// The UID is part of it: who is made anew under an old name inherits nothing.
func userDigest(c *Caller) digest {
	if c.user != nil {
		return *c.user
	}
	b := appendList(make([]byte, 0, 256), c.Name, c.UID)
	b = appendList(b, slices.Sorted(slices.Values(c.Groups))...)
	for _, k := range slices.Sorted(maps.Keys(c.Extra)) {
		if k == extraNodeName || !strings.HasPrefix(k, extraPrefix) {
			b = appendList(b, k)
			b = appendList(b, c.Extra[k]...)
		}
	}
	return sha256.Sum256(b)
}

func questionDigest(user digest, a Attributes) digest {
	b := append(make([]byte, 0, 256), user[:]...)
	b = appendList(b, a.Verb, a.Group, a.Resource, a.Subresource, a.Namespace, a.Name, a.Path)
	for _, s := range fieldRequirements(a.FieldSelector) {
		b = appendList(b, s.Key, string(s.Operator))
		b = appendList(b, s.Values...)
	}
	b = appendList(b) // fields end here
	for _, s := range labelRequirements(a.LabelSelector) {
		b = appendList(b, s.Key, string(s.Operator))
		b = appendList(b, s.Values...)
	}
	return sha256.Sum256(b)
}

// appendList encodes a list of strings in a way that no other list equals.
func appendList(b []byte, list ...string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(list))) //nolint:gosec // small
	for _, s := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s))) //nolint:gosec // bounded by the request
		b = append(b, s...)
	}
	return b
}

func newReview(c *Caller, a Attributes) *authorizationv1.SubjectAccessReview {
	spec := authorizationv1.SubjectAccessReviewSpec{User: c.Name, UID: c.UID, Groups: c.Groups}
	if len(c.Extra) > 0 {
		spec.Extra = make(map[string]authorizationv1.ExtraValue, len(c.Extra))
		for k, v := range c.Extra {
			spec.Extra[k] = v
		}
	}
	if a.Path != "" {
		spec.NonResourceAttributes = &authorizationv1.NonResourceAttributes{Path: a.Path, Verb: a.Verb}
		return &authorizationv1.SubjectAccessReview{Spec: spec}
	}
	r := &authorizationv1.ResourceAttributes{
		Verb: a.Verb, Group: a.Group, Version: a.Version, Resource: a.Resource, Subresource: a.Subresource,
		Namespace: a.Namespace, Name: a.Name,
	}
	if list := fieldRequirements(a.FieldSelector); len(list) > 0 {
		r.FieldSelector = &authorizationv1.FieldSelectorAttributes{Requirements: list}
	}
	if list := labelRequirements(a.LabelSelector); len(list) > 0 {
		r.LabelSelector = &authorizationv1.LabelSelectorAttributes{Requirements: list}
	}
	spec.ResourceAttributes = r
	return &authorizationv1.SubjectAccessReview{Spec: spec}
}

// fieldRequirements translates a selector as kube-apiserver does for its own
// authorization webhook. What cannot be expressed is left out: all must hold,
// so the question only gets wider.
func fieldRequirements(in fields.Requirements) []metav1.FieldSelectorRequirement {
	var out []metav1.FieldSelectorRequirement
	for _, r := range in {
		s := metav1.FieldSelectorRequirement{Key: r.Field, Values: []string{r.Value}}
		switch r.Operator {
		case selection.Equals, selection.DoubleEquals, selection.In:
			s.Operator = metav1.FieldSelectorOpIn
		case selection.NotEquals, selection.NotIn:
			s.Operator = metav1.FieldSelectorOpNotIn
		default:
			continue
		}
		out = append(out, s)
	}
	return out
}

// labelRequirements does the same for labels.
func labelRequirements(in labels.Requirements) []metav1.LabelSelectorRequirement {
	var out []metav1.LabelSelectorRequirement
	for _, r := range in {
		s := metav1.LabelSelectorRequirement{Key: r.Key(), Values: r.ValuesUnsorted()}
		switch r.Operator() {
		case selection.Equals, selection.DoubleEquals, selection.In:
			s.Operator = metav1.LabelSelectorOpIn
		case selection.NotEquals, selection.NotIn:
			s.Operator = metav1.LabelSelectorOpNotIn
		case selection.Exists:
			s.Operator = metav1.LabelSelectorOpExists
		case selection.DoesNotExist:
			s.Operator = metav1.LabelSelectorOpDoesNotExist
		default:
			continue
		}
		out = append(out, s)
	}
	return out
}
