package hub

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

type callerKey struct{}

func withCaller(ctx context.Context, c *identity.Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

func callerFrom(ctx context.Context) *identity.Caller {
	c, _ := ctx.Value(callerKey{}).(*identity.Caller)
	return c
}

// isLocal reports whether the caller lives on this node: its kubelet, or a
// pod whose token is bound to the node.
func (h *Hub) isLocal(c *identity.Caller) bool {
	if h.isNode(c) || c.Local {
		return true
	}
	node := c.Extra["authentication.kubernetes.io/node-name"]
	return len(node) == 1 && node[0] == h.cfg.NodeName
}

// read answers a get, list or watch.
func (h *Hub) read(w http.ResponseWriter, r *http.Request, c *identity.Caller, as link.Credential) {
	q := &query{
		hub: h, w: w, r: r, caller: c, as: as,
		info: request.From(r.Context()), formats: request.Formats(r.Header), began: time.Now(),
	}
	q.filtered()
	var err error
	switch {
	case len(q.formats) == 0:
		err = replica.ErrFormat
	case q.info.Verb == "get" && q.component != "":
		err = q.getFiltered() //nolint:contextcheck // it has r
	case q.info.Verb == "get":
		err = q.get() //nolint:contextcheck // it has r
	default:
		err = q.many() //nolint:contextcheck // it has r
	}
	if err == nil {
		return
	}
	if replica.Aborted(err) {
		// The client must not take what it has for the whole.
		panic(http.ErrAbortHandler)
	}
	q.fallBack(err)
}

// query is one read under way.
type query struct {
	hub     *Hub
	w       http.ResponseWriter
	r       *http.Request
	caller  *identity.Caller
	as      link.Credential
	info    request.Info
	formats []request.Format
	began   time.Time
	// component is set for a caller that is shown this resource filtered.
	component string
	// holds is set for a caller from whom the replica holds back what the cloud
	// would tell, or may have to; see [replica.Hold].
	holds bool
}

// errCloud sends a read to the cloud: the replica is not asked.
var errCloud = errors.New("only the cloud can answer")

// fallBack asks the cloud for what the replica could not give. While the
// cloud is away it says what the API server would say.
func (q *query) fallBack(cause error) {
	var status apierrors.APIStatus
	if errors.As(cause, &status) {
		httpx.WriteStatus(q.w, q.r, cause)
		return
	}
	// What is filtered has the replica's own versions, and where there is no
	// place for one more scope nobody else can filter it.
	ours := (q.component != "" || q.holds) && (errors.Is(cause, replica.ErrExpired) || errors.Is(cause, replica.ErrAhead) || errors.Is(cause, replica.ErrFull))
	if q.hub.link.Online() && !q.caller.Local && !ours {
		q.hub.link.Forward(q.w, q.r, q.as, q.keep(true))
		return
	}
	switch {
	case errors.Is(cause, replica.ErrFull) && ours:
		httpx.WriteStatus(q.w, q.r, tooMany(5, "yurthub: %s is filtered, and there is no place for it: %s", q.info, cause))
	case errors.Is(cause, replica.ErrExpired):
		q.expired(cause)
	case errors.Is(cause, replica.ErrAhead):
		httpx.WriteStatus(q.w, q.r, tooLarge(cause))
	case errors.Is(cause, replica.ErrFormat):
		httpx.WriteStatus(q.w, q.r, notAcceptable(cause))
	default:
		httpx.WriteStatus(q.w, q.r, q.hub.away(q.info))
	}
}

func tooLarge(cause error) error {
	err := apierrors.NewTimeoutError("Too large resource version: "+cause.Error(), 1)
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{
		Type: metav1.CauseTypeResourceVersionTooLarge, Message: "Too large resource version",
	}}
	return err
}

func notAcceptable(cause error) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusNotAcceptable, Reason: metav1.StatusReasonNotAcceptable,
		Message: "while the cloud is away this answer cannot be given in an accepted form: " + cause.Error(),
	}}
}

// expired says that a client must list again: as an event to a watch.
func (q *query) expired(cause error) {
	err := apierrors.NewResourceExpired(cause.Error())
	if q.info.Verb != "watch" {
		httpx.WriteStatus(q.w, q.r, err)
		return
	}
	enc, contentType := wire.JSON, "application/json"
	if len(q.formats) > 0 && q.formats[0].Encoding == wire.Protobuf {
		enc, contentType = wire.Protobuf, "application/vnd.kubernetes.protobuf;stream=watch"
	}
	q.w.Header().Set("Content-Type", contentType)
	q.w.WriteHeader(http.StatusOK)
	_, _ = q.w.Write(wire.AppendStatusEvent(nil, enc, &err.ErrStatus)) // the client may be gone
}

// keep learns from what the cloud answers: whether the caller may read this,
// and, where no scope holds it, the object that a caller on this node got.
func (q *query) keep(object bool) link.Keep {
	var remember link.Keep
	if object && q.info.Verb == "get" && q.hub.isLocal(q.caller) {
		remember = q.hub.answers.keep(objectBucket, objectKey(q.caller, q.info))
	}
	doubt := q.hub.doubt(q.caller)
	return func(resp *http.Response) func([]byte) {
		doubt(resp)
		if !q.hub.isNode(q.caller) {
			switch resp.StatusCode {
			case http.StatusOK, http.StatusNotFound:
				// Who may not read is not told what there is.
				q.hub.authz.Learn(q.caller, attributes(q.info), true)
			case http.StatusForbidden:
				q.hub.authz.Learn(q.caller, attributes(q.info), false)
			}
		}
		if remember == nil {
			return nil
		}
		return remember(resp)
	}
}

// may returns nil if the caller may read this, by what the cloud says or last
// said. What the hub's own streams carry the node's user may read: it is the
// same user.
func (q *query) may(ctx context.Context, own bool) error {
	if own && q.hub.isNode(q.caller) {
		return nil
	}
	return q.hub.authorize(ctx, q.caller, q.info)
}

func attributes(info request.Info) identity.Attributes {
	a := identity.Attributes{
		Verb: info.Verb, Group: info.Resource.Group, Version: info.Resource.Version,
		Resource: info.Resource.Resource, Subresource: info.Subresource,
		Namespace: info.Namespace, Name: info.Name,
	}
	if !info.IsResource {
		a.Path = info.Path
		return a
	}
	if o := info.Options; o != nil && info.Verb != "get" {
		if o.FieldSelector != nil {
			a.FieldSelector = o.FieldSelector.Requirements()
			if name, ok := o.FieldSelector.RequiresExactMatch("metadata.name"); ok && a.Name == "" {
				a.Name = name // as the API server's own authorisers see it
			}
		}
		if o.LabelSelector != nil {
			a.LabelSelector, _ = o.LabelSelector.Requirements()
		}
	}
	return a
}

func (h *Hub) authorize(ctx context.Context, c *identity.Caller, info request.Info) error {
	d, err := h.authz.Authorize(ctx, c, attributes(info))
	if err != nil {
		return statusOf(err)
	}
	if d.Allowed {
		return nil
	}
	h.metrics.refused.WithLabelValues("forbidden").Inc()
	name := info.Name
	return apierrors.NewForbidden(info.Resource.GroupResource(), name,
		fmt.Errorf("user %q may not %s: %s", c.Name, info, d.Reason))
}

// many answers a list or a watch.
func (q *query) many() error {
	if err := q.validate(); err != nil {
		return err
	}
	if complicated(q.info) {
		return errCloud
	}
	if q.info.Verb == "list" && q.component != "" {
		return q.listFiltered()
	}
	if q.info.Verb == "list" {
		return q.list()
	}
	return q.watch()
}

// validate is the API server's check of the options of a list or watch. While
// there is an API server it has the say, and says no to strangers first.
func (q *query) validate() error {
	opts := *q.info.Options
	opts.Watch = q.info.Verb == "watch"
	errs := validation.ValidateListOptions(&opts, true)
	switch {
	case len(errs) == 0:
		return nil
	case q.hub.link.Online():
		return errCloud
	}
	if err := q.may(q.r.Context(), true); err != nil {
		return err
	}
	return apierrors.NewInvalid(schema.GroupKind{Group: metav1.GroupName, Kind: "ListOptions"}, "", errs)
}

// cloudPrints reports whether the client wants a table that only the cloud
// can print well: its columns are in the definition of a custom resource.
// While the cloud is away the replica's table shows names and ages.
func (q *query) cloudPrints(custom bool) bool {
	return custom && q.formats[0].View == request.Table && q.hub.link.Online() && !q.caller.Local
}

// The replica looks at each object with each requirement of a selector, and
// compares selectors with those of its scopes. What is more complicated than
// any client's is left to the cloud.
const (
	maxSelector     = 4 << 10
	maxRequirements = 32
)

func complicated(info request.Info) bool {
	requirements, size := 0, 0
	if s := info.Options.LabelSelector; s != nil {
		all, _ := s.Requirements()
		requirements, size = len(all), len(s.String())
	}
	if s := info.Options.FieldSelector; s != nil {
		requirements, size = requirements+len(s.Requirements()), size+len(s.String())
	}
	return requirements > maxRequirements || size > maxSelector
}

func (q *query) version() (uint64, error) {
	text := q.info.Options.ResourceVersion
	if text == "" || text == "0" {
		return 0, nil
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil || v == 0 {
		return 0, errCloud // whose refusal is the right one
	}
	return v, nil
}

// tryCloud answers from the cloud when it answers in time. Over a weak link
// nobody waits to see whether it does: what is late for one is late for all.
func (q *query) tryCloud(object bool) error {
	if q.caller.Local {
		return link.ErrDown
	}
	if q.hub.link.Weak() {
		q.hub.link.Sample(q.r, q.as, q.keep(object), q.hub.link.Patience(readBudget))
		return link.ErrSlow
	}
	return q.awaitCloud(object)
}

// awaitCloud is tryCloud whatever the link is like.
func (q *query) awaitCloud(object bool) error {
	if q.caller.Local {
		return link.ErrDown
	}
	return q.hub.link.Try(q.w, q.r, q.as, q.keep(object), readBudget)
}

// warn tells the client how old the answer is.
func (q *query) warn(contact time.Time) {
	httpx.AddWarning(q.w.Header(), fmt.Sprintf(
		"yurthub: the cloud %s; this is the state of %s, %s ago", q.hub.silence(),
		contact.UTC().Format(time.RFC3339), q.hub.clock.Since(contact).Round(time.Second)))
}

func (q *query) get() error { //nolint:gocyclo // the rules for a get, one after the other
	v, err := q.version()
	if err != nil {
		return err
	}
	obj, heldErr := q.hub.replica.Get(q.info, v)
	latest := q.info.Options.ResourceVersion == ""
	if latest && q.hub.link.Online() {
		if heldErr != nil && !apierrors.IsNotFound(heldErr) {
			if _, err := q.remembered(); err != nil {
				return errCloud // there is nothing to fall back on: no hurry
			}
			if q.tryCloud(true) == nil {
				return nil
			}
		} else if q.tryCloud(false) == nil {
			return nil
		}
	}
	switch {
	case obj != nil && !latest && !obj.Current() && q.hub.link.Online() && q.tryCloud(false) == nil:
		return nil
	case heldErr == nil:
		if err := q.may(q.r.Context(), !obj.Borrowed()); err != nil {
			return err
		}
		if q.cloudPrints(obj.Custom()) {
			return errCloud
		}
		if latest {
			q.warn(obj.Contact)
		}
		return obj.Write(q.w, q.r, q.formats)
	case apierrors.IsNotFound(heldErr):
		if err := q.may(q.r.Context(), !obj.Borrowed()); err != nil {
			return err
		}
		return heldErr
	case v == 0 && !q.hub.link.Online(): // nobody knows how new a remembered one is
		a, err := q.remembered()
		if err != nil {
			return heldErr
		}
		if err := q.may(q.r.Context(), true); err != nil {
			return err
		}
		q.warn(a.At)
		return a.writeObject(q.w, q.formats)
	}
	return heldErr
}

// remembered returns what the cloud last said to this very get. Only the
// identity that got it gets it again.
func (q *query) remembered() (answer, error) {
	if !q.hub.isLocal(q.caller) {
		return answer{}, store.ErrNotFound
	}
	return q.hub.answers.object(q.caller, q.info)
}

func (q *query) list() error { //nolint:gocyclo // the API's rules for a list, one after the other
	opts := q.info.Options
	scope := replica.ScopeOf(q.info)
	held, ok := q.hub.replica.Held(scope)
	if q.holds = ok && held.Holds(); q.holds {
		return q.listFiltered()
	}
	latest := opts.ResourceVersion == "" && opts.Continue == ""
	switch {
	case opts.Continue != "":
		if q.hub.link.Online() {
			return errCloud
		}
		return fmt.Errorf("the continue token is the cloud's: %w", replica.ErrExpired)
	case latest && opts.ResourceVersionMatch == "":
		if !ok {
			return errCloud
		}
		try := q.tryCloud
		if opts.Limit > 0 && int64(held.Len()) > opts.Limit {
			try = q.awaitCloud // the replica does not page
		}
		if q.hub.link.Online() && try(false) == nil {
			return nil
		}
	case opts.ResourceVersionMatch == metav1.ResourceVersionMatchExact, latest:
		return q.exact(held, ok)
	case opts.Limit > 0 && opts.ResourceVersion != "0" && q.hub.link.Online():
		return errCloud // the replica does not page
	case opts.Limit > 0 && opts.ResourceVersion != "0" && opts.ResourceVersionMatch == "":
		return q.exact(held, ok) // a limit makes a version exact, by the API's rules
	}
	v, err := q.version()
	if err != nil {
		return err
	}
	if !ok && opts.ResourceVersion == "0" {
		held, err = q.open(scope)
		ok = err == nil
	}
	if !ok || q.cloudPrints(held.Custom()) {
		return errCloud
	}
	if err := q.may(q.r.Context(), !held.Borrowed()); err != nil {
		return err
	}
	if v > 0 {
		ctx, cancel := context.WithTimeout(q.r.Context(), awaitBudget)
		defer cancel()
		if err := held.Await(ctx, v); err != nil {
			return err
		}
	}
	q.use(held)
	if !latest && !held.Current() && q.hub.link.Online() && q.tryCloud(false) == nil {
		return nil // it was paused, or catches up just now
	}
	if latest {
		q.warn(held.Contact())
	}
	return held.List(q.w, q.r, q.formats)
}

// exact answers a list at one resource version: the cloud's business, but for
// a replica that stands at just that version.
func (q *query) exact(held *replica.Slice, ok bool) error {
	if q.hub.link.Online() {
		return errCloud
	}
	v, err := q.version()
	if err != nil {
		return err
	}
	switch {
	case !ok:
		return errCloud
	case held.Version() < v:
		return replica.ErrAhead
	case held.Version() > v:
		return replica.ErrExpired
	}
	if err := q.may(q.r.Context(), !held.Borrowed()); err != nil {
		return err
	}
	return held.List(q.w, q.r, q.formats)
}

func (q *query) watch() error {
	opts := q.info.Options
	scope := replica.ScopeOf(q.info)
	held, ok := q.hub.replica.Held(scope)
	fresh := opts.ResourceVersion == "" || opts.ResourceVersion == "0" ||
		(opts.SendInitialEvents != nil && *opts.SendInitialEvents)
	q.holds = ok && held.Holds()
	if !ok {
		if !fresh && !q.hub.isLocal(q.caller) && q.component == "" {
			return errCloud
		}
		// A caller on this node that resumes what the hub does not hold was
		// served by a hub that has lost its store since. The cloud has the
		// history for it; the replica is filled for the next outage.
		var err error
		if held, err = q.open(scope); err != nil {
			return err
		}
	}
	_, err := q.version()
	if (err != nil && q.hub.link.Online()) || q.cloudPrints(held.Custom()) {
		return errCloud
	}
	own := !held.Borrowed()
	if err := q.may(q.r.Context(), own); err != nil {
		return err
	}
	q.use(held)
	if held, err = q.through(held); err != nil {
		return err
	}
	if own && q.hub.isNode(q.caller) {
		return held.Watch(q.w, q.r, q.info, q.formats)
	}
	r, done := q.hub.watches.add(q.r, q.caller, q.info, q.began)
	defer done()
	return held.Watch(q.w, r, q.info, q.formats)
}

// use takes note of a caller that wants the slice. One whose right it came by
// lends its newer token to the stream.
func (q *query) use(held *replica.Slice) {
	held.Touch()
	if held.Borrowed() && !q.caller.Certificate && !q.caller.Local {
		held.Offer(replica.Credential{Token: q.caller.Token})
	}
}

// open starts to replicate what a caller on this node asked to be informed
// of: by the hub's own right where it has it, else by the caller's.
func (q *query) open(scope replica.Scope) (*replica.Slice, error) {
	if q.caller.Local || isEvent(q.info) || !q.hub.link.Online() {
		return nil, errCloud
	}
	ctx, cancel := context.WithTimeout(q.r.Context(), syncBudget)
	defer cancel()
	if q.hub.isNode(q.caller) {
		// What this user may read the stream will show.
		return q.hub.replica.Open(ctx, scope, replica.Credential{}, "")
	}
	// Whoever is informed of this will want to read it in other ways while
	// the cloud is away; what they may is asked while there is somebody to
	// ask, all at once: each question is a round trip.
	var allowed, own [len(informing)]bool
	questions, asking := errgroup.WithContext(ctx)
	for i, verb := range informing {
		info := q.info
		info.Verb = verb
		for who, answers := range map[*identity.Caller]*[len(informing)]bool{q.caller: &allowed, q.hub.self: &own} {
			questions.Go(func() error {
				d, err := q.hub.authz.Authorize(asking, who, attributes(info))
				answers[i] = d.Allowed
				return err
			})
		}
	}
	if err := questions.Wait(); err != nil {
		return nil, statusOf(err)
	}
	switch list, watch := 0, 1; {
	case !allowed[list] || !allowed[watch]:
		return nil, errCloud // whose refusal is the right one
	case own[list] && own[watch]:
		return q.hub.replica.Open(ctx, scope, replica.Credential{}, laneOf(q.caller))
	case q.caller.Certificate:
		return nil, errCloud // a certificate cannot be passed on
	}
	return q.hub.replica.Open(ctx, scope, replica.Credential{Token: q.caller.Token}, laneOf(q.caller))
}

// informing are the verbs of a caller that is informed of something: the
// first two it needs, the third it will want.
var informing = [...]string{"list", "watch", "get"}

// document answers discovery and the like, which say the same to everybody
// who is authenticated.
func (h *Hub) document(w http.ResponseWriter, r *http.Request, c *identity.Caller, as link.Credential) {
	a, err := h.answers.document(r.URL, r.Header)
	if !c.Local && (err != nil || !h.link.Weak()) {
		keep := h.answers.keep(documentBucket, documentKey(r.URL))
		tried := h.link.Try(w, r, as, keep, writeBudget)
		if tried == nil {
			return
		}
		if err != nil && h.link.Online() {
			link.Refuse(w, r, tried)
			return
		}
	}
	if err != nil {
		httpx.WriteStatus(w, r, h.away(request.From(r.Context())))
		return
	}
	httpx.AddWarning(w.Header(), fmt.Sprintf("yurthub: the cloud %s; this is what it said %s ago", h.silence(),
		h.clock.Since(a.At).Round(time.Second)))
	a.write(w)
}
