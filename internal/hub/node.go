package hub

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// typed are the few types that the hub itself reads and writes.
var typed = func() serializer.CodecFactory {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		authenticationv1.AddToScheme, authorizationv1.AddToScheme,
		coordinationv1.AddToScheme, corev1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			panic(err) // two types of one name: a programming error
		}
	}
	return serializer.NewCodecFactory(scheme)
}()

// readBody reads a body, which limit has bounded, and puts it back for
// forwarding.
func readBody(r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, bodyError(err)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	r.ContentLength = int64(len(body))
	return body, nil
}

func decode(body []byte, into runtime.Object) error {
	if _, _, err := typed.UniversalDeserializer().Decode(body, nil, into); err != nil {
		return apierrors.NewBadRequest(fmt.Sprintf("read body: %v", err))
	}
	return nil
}

// respond sends an object in the first form that the client accepts.
func respond(w http.ResponseWriter, r *http.Request, code int, gv schema.GroupVersion, obj runtime.Object) {
	media := runtime.ContentTypeJSON
	if formats := request.Formats(r.Header); len(formats) > 0 && formats[0].Encoding == wire.Protobuf {
		media = runtime.ContentTypeProtobuf
	}
	info, _ := runtime.SerializerInfoForMediaType(typed.SupportedMediaTypes(), media)
	text, err := runtime.Encode(typed.EncoderForVersion(info.Serializer, gv), obj)
	if err != nil {
		httpx.WriteStatus(w, r, apierrors.NewInternalError(fmt.Errorf("encode answer: %w", err)))
		return
	}
	w.Header().Set("Content-Type", media)
	w.WriteHeader(code)
	_, _ = w.Write(text) // a client that went away needs no answer
}

// lease answers the node's own heartbeat. It is relayed while the cloud
// answers in time; else the kubelet gets its renewal back at once, so that it
// does not take a cut link for its own trouble.
func (h *Hub) lease(w http.ResponseWriter, r *http.Request, as link.Credential) {
	body, err := readBody(r)
	if err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	written := r.Method == http.MethodPut || r.Method == http.MethodPost
	renewed := &coordinationv1.Lease{}
	if written {
		if err := h.renewal(r, body, renewed); err != nil {
			httpx.WriteStatus(w, r, statusOf(err))
			return
		}
	}
	if r.Method == http.MethodPut && h.prompt() && renewed.ResourceVersion == "" {
		// The kubelet made this lease while the cloud was away. Told of a
		// conflict it reads the cloud's and goes on with that.
		httpx.WriteStatus(w, r, apierrors.NewConflict(coordinationv1.Resource("leases"), h.cfg.NodeName,
			errors.New("the lease was made while the cloud was away")))
		return
	}
	keep := func(resp *http.Response) func([]byte) {
		if resp.StatusCode/100 != 2 {
			return nil
		}
		return func(answer []byte) { h.answered(answer, written) }
	}
	if r.Method != http.MethodPut || !h.link.Weak() {
		if err = h.link.Try(w, r, as, keep, leaseBudget); err == nil {
			return
		}
	}
	known := h.heartbeat.get()
	switch {
	case r.Method == http.MethodGet && known != nil:
		respond(w, r, http.StatusOK, coordinationv1.SchemeGroupVersion, known)
	case r.Method == http.MethodPost && known != nil:
		httpx.WriteStatus(w, r, apierrors.NewAlreadyExists(coordinationv1.Resource("leases"), known.Name))
	case written:
		h.heartbeat.renew(renewed)
		code := http.StatusOK
		if r.Method == http.MethodPost {
			code = http.StatusCreated
		}
		respond(w, r, code, coordinationv1.SchemeGroupVersion, renewed)
	case r.Method == http.MethodGet:
		// Never seen since this hub started: the kubelet then makes one.
		httpx.WriteStatus(w, r, apierrors.NewNotFound(coordinationv1.Resource("leases"), h.cfg.NodeName))
	default:
		link.Refuse(w, r, err)
	}
}

// csiNode relays what the kubelet writes about its storage drivers and keeps
// the answer: the kubelet asks for it when it boots alone, and is not ready
// before it knows. The node's rights do not allow to follow it.
func (h *Hub) csiNode(w http.ResponseWriter, r *http.Request, as link.Credential) {
	caller, info := callerFrom(r.Context()), request.From(r.Context())
	if !h.link.Online() {
		httpx.WriteStatus(w, r, h.away(info))
		return
	}
	if info.Verb == "create" {
		info.Path += "/" + h.cfg.NodeName
	}
	keep := h.answers.keep(objectBucket, objectKey(caller, info))
	h.link.Forward(w, r, as, func(resp *http.Response) func([]byte) {
		if resp.StatusCode == http.StatusCreated {
			created := *resp
			created.StatusCode = http.StatusOK // as a get would answer
			return keep(&created)
		}
		return keep(resp)
	})
}

// register answers the kubelet's registration while the cloud is away: the
// node that the replica holds is there already, as far as anybody knows.
func (h *Hub) register(w http.ResponseWriter, r *http.Request, as link.Credential) {
	if _, err := readBody(r); err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	err := h.link.Try(w, r, as, nil, writeBudget)
	if err == nil {
		return
	}
	info := request.From(r.Context())
	info.Name = h.cfg.NodeName
	if _, held := h.replica.Get(info, 0); held == nil && !h.link.Online() {
		httpx.WriteStatus(w, r, apierrors.NewAlreadyExists(corev1.Resource("nodes"), h.cfg.NodeName))
		return
	}
	link.Refuse(w, r, err)
}

// patchStatus journals a status write while the cloud is away or not worth
// waiting for, or while an older one still waits: the kubelet sends one after
// the other, and would come to the last much later.
func (h *Hub) patchStatus(w http.ResponseWriter, r *http.Request, as link.Credential) {
	info := request.From(r.Context())
	if h.prompt() && !h.journal.Pending(info.Resource, info.Namespace, info.Name) {
		h.link.Forward(w, r, as, h.wrotePod(info))
		return
	}
	body, err := readBody(r)
	if err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	object := info
	object.Subresource = ""
	current, err := h.replica.Get(object, 0)
	if err != nil {
		if !apierrors.IsNotFound(err) {
			err = h.away(info)
		}
		httpx.WriteStatus(w, r, err)
		return
	}
	patchType := types.PatchType(strings.TrimSpace(strings.Split(r.Header.Get("Content-Type"), ";")[0]))
	var data []byte
	if err = current.Persist(r.Context()); err == nil {
		data, err = h.journal.PatchStatus(r.Context(), info.Resource, patchType, body, current)
	}
	if err != nil {
		httpx.WriteStatus(w, r, statusOf(err))
		return
	}
	current.Data = data
	if info.Resource == podsResource {
		h.endpoints.Wrote(current.Kind.Encoding, data)
	}
	if err := current.Write(w, r, request.Formats(r.Header)); err != nil && !replica.Aborted(err) {
		httpx.WriteStatus(w, r, statusOf(err))
	}
}

// event journals an event while the cloud is away.
func (h *Hub) event(w http.ResponseWriter, r *http.Request, as link.Credential) {
	info := request.From(r.Context())
	if h.link.Online() {
		h.link.Forward(w, r, as, nil)
		return
	}
	body, err := readBody(r)
	if err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	kind := schema.GroupVersionKind{Group: info.Resource.Group, Version: info.Resource.Version, Kind: "Event"}
	apiVersion := kind.GroupVersion().String()
	var (
		out  []byte
		code = http.StatusOK
	)
	if info.Verb == "create" {
		code = http.StatusCreated
		object := body
		if strings.HasPrefix(r.Header.Get("Content-Type"), runtime.ContentTypeProtobuf) {
			var raw []byte
			if _, _, raw, err = wire.ReadObject(wire.Protobuf, body); err == nil {
				object, err = wire.ToJSON(nil, apiVersion, kind.Kind, raw, true)
			}
			if err != nil {
				httpx.WriteStatus(w, r, apierrors.NewBadRequest(fmt.Sprintf("read event: %v", err)))
				return
			}
		}
		out, err = h.journal.AddEvent(r.Context(), info.Path, info.Namespace, object)
	} else {
		collection, _, _ := strings.Cut(info.Path, "/events/")
		patchType := types.PatchType(strings.TrimSpace(strings.Split(r.Header.Get("Content-Type"), ";")[0]))
		out, err = h.journal.PatchEvent(r.Context(), collection+"/events", info.Name, patchType, body)
	}
	if err != nil {
		httpx.WriteStatus(w, r, statusOf(err))
		return
	}
	enc := wire.JSON
	if formats := request.Formats(r.Header); len(formats) > 0 && formats[0].Encoding == wire.Protobuf {
		enc = wire.Protobuf
		if out, err = wire.FromJSON(apiVersion, kind.Kind, out); err != nil {
			httpx.WriteStatus(w, r, apierrors.NewInternalError(err))
			return
		}
	}
	w.Header().Set("Content-Type", map[wire.Encoding]string{
		wire.JSON: runtime.ContentTypeJSON, wire.Protobuf: runtime.ContentTypeProtobuf,
	}[enc])
	w.WriteHeader(code)
	_, _ = w.Write(wire.AppendObject(nil, enc, apiVersion, kind.Kind, out))
}

// storedToken is a token that the cloud issued for a pod of this node.
type storedToken struct {
	Status authenticationv1.TokenRequestStatus `json:"status"`
}

// token relays a TokenRequest and keeps the answer; while the cloud is away
// it gives the kept token as long as that is good, and then one that only
// this hub accepts.
func (h *Hub) token(w http.ResponseWriter, r *http.Request, as link.Credential) {
	info := request.From(r.Context())
	body, err := readBody(r)
	if err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	wanted := &authenticationv1.TokenRequest{}
	if err := decode(body, wanted); err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	key := tokenKey(info, wanted)
	keep := func(resp *http.Response) func([]byte) { //nolint:contextcheck // kept even when the client has left
		if resp.StatusCode != http.StatusCreated {
			return nil
		}
		return func(answer []byte) { h.keepToken(key, answer) }
	}
	err = h.link.Try(w, r, as, keep, writeBudget)
	if err == nil {
		return
	}
	if h.link.Online() {
		link.Refuse(w, r, err) // slow, not away: the kubelet asks again
		return
	}
	if err := h.mayHaveToken(info, wanted); err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	var kept storedToken
	text, err := h.tokens.Load(key)
	if err == nil && text != nil {
		err = json.Unmarshal(text, &kept)
	}
	if err != nil {
		h.log.Warn("stored token unusable", "err", err)
	}
	life := time.Hour // what the API server gives who does not say
	if s := wanted.Spec.ExpirationSeconds; s != nil {
		life = time.Duration(*s) * time.Second
	}
	wanted.Status = kept.Status
	expiry := expiryOf(kept)
	if h.clock.Until(expiry) < minTokenLife {
		spec := identity.TokenSpec{
			Namespace: info.Namespace, ServiceAccount: info.Name,
			ServiceAccountUID: h.authn.AccountUID(info.Namespace, info.Name),
			NodeName:          h.cfg.NodeName, Audiences: wanted.Spec.Audiences, Life: life,
		}
		if ref := wanted.Spec.BoundObjectRef; ref != nil {
			spec.PodName, spec.PodUID = ref.Name, string(ref.UID)
		}
		wanted.Status = authenticationv1.TokenRequestStatus{}
		if wanted.Status.Token, expiry, err = h.signer.Sign(spec); err != nil {
			httpx.WriteStatus(w, r, apierrors.NewInternalError(err))
			return
		}
	}
	// The kubelet judges this by the machine's clock, which may be wrong and may
	// be set right at any time: a time that has surely come is always too early.
	now := h.clock.Machine()
	if wanted.Status.ExpirationTimestamp.Before(&metav1.Time{Time: now}) {
		if floor := h.clock.Floor(); floor.Before(now) {
			now = floor
		}
		soon := now.Add(renewalOf(life))
		if soon.After(expiry) {
			soon = expiry
		}
		wanted.Status.ExpirationTimestamp = metav1.NewTime(soon)
	}
	wanted.Name, wanted.Namespace = info.Name, info.Namespace
	respond(w, r, http.StatusCreated, authenticationv1.SchemeGroupVersion, wanted)
}

// expiryOf is how long a kept token is good. The API server tells kubelets an
// earlier time than the token itself has, so that they renew it in good time;
// while there is nobody to renew it, it goes on being good.
func expiryOf(kept storedToken) time.Time {
	if e := identity.Expiry(kept.Status.Token); !e.IsZero() {
		return e
	}
	return kept.Status.ExpirationTimestamp.Time
}

// renewalOf is after how long a token given while the cloud is away is said to
// expire. A kubelet renews a token in the last fifth of the life that it asked
// for: so it asks again each time that it looks after the pod, and has a new
// one from the cloud a minute or two after the link is back.
func renewalOf(life time.Duration) time.Duration {
	return max(minTokenLife, min(life/5, maxTokenRenewal))
}

func tokenKey(info request.Info, req *authenticationv1.TokenRequest) string {
	bound := ""
	if ref := req.Spec.BoundObjectRef; ref != nil {
		bound = ref.Kind + "/" + ref.Name + "/" + string(ref.UID)
	}
	sum := sha256.Sum256([]byte(strings.Join(append([]string{info.Namespace, info.Name, bound}, req.Spec.Audiences...), "\x00")))
	return hex.EncodeToString(sum[:16])
}

func (h *Hub) keepToken(key string, answer []byte) {
	got := &authenticationv1.TokenRequest{}
	if err := decode(answer, got); err != nil || got.Status.Token == "" {
		return
	}
	// Without audiences it is for the API, whose audiences it names.
	if err := h.authn.Learn(got.Status.Token, len(got.Spec.Audiences) == 0); err != nil {
		h.log.Debug("nothing learned from a token", "err", err)
	}
	text, err := json.Marshal(storedToken{Status: got.Status})
	if err == nil {
		err = h.tokens.Save(key, text)
	}
	if err != nil {
		h.log.Warn("token not stored", "err", err)
	}
}

// mayHaveToken is the API server's rule for nodes: only for a pod that runs
// here, and only for that pod's account.
func (h *Hub) mayHaveToken(info request.Info, req *authenticationv1.TokenRequest) error {
	refused := func(why string) error {
		return apierrors.NewForbidden(corev1.Resource("serviceaccounts/token"), info.Name, errors.New(why))
	}
	ref := req.Spec.BoundObjectRef
	if ref == nil || ref.Kind != "Pod" {
		return refused("a node gets tokens for its pods only")
	}
	got, err := h.localPod(info.Namespace, ref.Name)
	if err != nil {
		return refused("the pod is not known to run on this node")
	}
	if got.UID != ref.UID || got.Spec.NodeName != h.cfg.NodeName || got.Spec.ServiceAccountName != info.Name {
		return refused("the pod does not run on this node with this service account")
	}
	return nil
}

// localPod returns a pod as the replica has it.
func (h *Hub) localPod(namespace, name string) (*corev1.Pod, error) {
	held, err := h.replica.Get(request.Info{
		Verb: "get", IsResource: true, Resource: podsResource, Namespace: namespace, Name: name,
	}, 0)
	if err != nil {
		return nil, err
	}
	pod := &corev1.Pod{}
	if err := pod.Unmarshal(held.Data); err != nil {
		return nil, fmt.Errorf("read pod %s/%s: %w", namespace, name, err)
	}
	return pod, nil
}

// podLives reports whether a pod is on this node, as far as is known.
func (h *Hub) podLives(namespace, name, uid string) bool {
	pod, err := h.localPod(namespace, name)
	return err == nil && string(pod.UID) == uid && pod.Spec.NodeName == h.cfg.NodeName
}

// review relays the kubelet's own questions about who may talk to it, and
// repeats the last answers while the cloud is away. What was never asked gets no
// answer.
func (h *Hub) review(w http.ResponseWriter, r *http.Request, as link.Credential) {
	info := request.From(r.Context())
	body, err := readBody(r)
	if err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	tokens := info.Resource.Resource == "tokenreviews"
	access := &authorizationv1.SubjectAccessReview{}
	token := &authenticationv1.TokenReview{}
	var asked any
	if tokens {
		err, asked = decode(body, token), &token.Spec
	} else {
		err, asked = decode(body, access), &access.Spec
	}
	if err != nil {
		httpx.WriteStatus(w, r, err)
		return
	}
	key, err := reviewKey(info, asked)
	if err != nil {
		httpx.WriteStatus(w, r, apierrors.NewInternalError(err))
		return
	}
	keep := func(resp *http.Response) func([]byte) { //nolint:contextcheck // kept even when the client has left
		if resp.StatusCode != http.StatusCreated {
			return nil
		}
		return func(answer []byte) { h.keepReview(key, tokens, answer) }
	}
	tried := h.link.Try(w, r, as, keep, writeBudget)
	if tried == nil {
		return
	}
	text, err := h.reviews.Load(key)
	if err != nil {
		h.log.Warn("stored review unusable", "err", err)
	}
	if text == nil {
		// The kubelet keeps a denial for half a minute; after an error it
		// asks again.
		link.Refuse(w, r, tried)
		return
	}
	if tokens {
		if json.Unmarshal(text, &token.Status) != nil {
			token.Status = authenticationv1.TokenReviewStatus{Error: "what the cloud said of this token cannot be read"}
		}
		respond(w, r, http.StatusCreated, authenticationv1.SchemeGroupVersion, token)
		return
	}
	if json.Unmarshal(text, &access.Status) != nil {
		access.Status = authorizationv1.SubjectAccessReviewStatus{Reason: "what the cloud said of this cannot be read"}
	}
	respond(w, r, http.StatusCreated, authorizationv1.SchemeGroupVersion, access)
}

func reviewKey(info request.Info, spec any) (string, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return "", fmt.Errorf("name review: %w", err)
	}
	sum := sha256.Sum256(append([]byte(info.Resource.Resource+"\x00"), text...))
	return hex.EncodeToString(sum[:]), nil
}

func (h *Hub) keepReview(key string, tokens bool, answer []byte) {
	var (
		text []byte
		err  error
	)
	if tokens {
		got := &authenticationv1.TokenReview{}
		if decode(answer, got) != nil {
			return
		}
		text, err = json.Marshal(got.Status)
	} else {
		got := &authorizationv1.SubjectAccessReview{}
		if decode(answer, got) != nil {
			return
		}
		text, err = json.Marshal(got.Status)
	}
	if err != nil {
		return
	}
	if old, at, err := h.reviews.LoadAt(key); err == nil && bytes.Equal(old, text) && h.clock.Since(at) < h.cfg.DecisionAge/8 {
		return
	}
	if err := h.reviews.Save(key, text); err != nil {
		h.log.Warn("review not stored", "err", err)
	}
}

// briefly is how long a cut may be over in a moment: until then clients are
// told to try again. Later that would only keep a person waiting: client-go
// tries ten times, each second, before it says what it was told.
const briefly = 10 * time.Second

// away is the answer to what only the cloud can do while it is away.
func (h *Hub) away(info request.Info) error { return away(info, h.link.State()) }

func away(info request.Info, state link.State) error {
	err := apierrors.NewServiceUnavailable(fmt.Sprintf(
		"yurthub: %s needs the cloud, which cannot be reached since %s (%s)",
		info, time.Since(state.Since).Round(time.Second), state.Reason))
	if time.Since(state.Since) < briefly {
		err.ErrStatus.Details = &metav1.StatusDetails{RetryAfterSeconds: 1}
	}
	return err
}

// statusOf makes any error one that can be sent.
func statusOf(err error) error {
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return apierrors.NewTimeoutError(err.Error(), 1)
	}
	return apierrors.NewInternalError(err)
}
