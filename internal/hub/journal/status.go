package journal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// statusEntry is the newest status of one object that the cloud has not got.
// Older ones are superseded: a status is a state, not a history.
type statusEntry struct {
	Resource  string `json:"resource"` // pods or nodes
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	UID       string `json:"uid"`      // of the object that it speaks of
	Sequence  uint64 `json:"sequence"` // of the first unsent write
	// At is when that was made.
	At time.Time `json:"at,omitzero"`
	// Status is the message of the object's status field, and Base what it
	// was in the cloud's object when the first unsent write was made.
	Status []byte `json:"status"`
	Base   []byte `json:"base"`

	// version is the resource version at which the cloud took it; zero
	// while it waits. The overlay stays until the replica has that version.
	version uint64
	taken   time.Time // when the cloud took it
}

// untilGone is a version that the object will not have.
const untilGone = math.MaxUint64

func (e *statusEntry) delivered() bool { return e.version != 0 }

func (e *statusEntry) size() int { return len(e.Status) + len(e.Base) }

func (e *statusEntry) target() target {
	return target{schema.GroupVersionResource{Version: "v1", Resource: e.Resource}, e.Namespace, e.Name}
}

// statusField is the number of the status in the messages of Pod and Node.
const statusField = 3

// HasStatus reports whether the journal takes status writes of the resource.
func HasStatus(r schema.GroupVersionResource) bool {
	return r.Group == "" && r.Version == "v1" && (r.Resource == "pods" || r.Resource == "nodes")
}

// Pending reports whether a status of the object waits for the cloud. Newer
// ones must then go through the journal too, to arrive in order.
func (j *Journal) Pending(r schema.GroupVersionResource, namespace, name string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	e, ok := j.status[target{r, namespace, name}]
	return ok && !e.delivered()
}

// PatchStatus applies a patch of the status to the object as local readers
// see it, and returns the object after it. The write is durable then.
func (j *Journal) PatchStatus(ctx context.Context, r schema.GroupVersionResource, patchType types.PatchType, patch []byte, object *replica.Object) ([]byte, error) {
	if object.Kind.Encoding != wire.Protobuf {
		return nil, fmt.Errorf("patch status of %s: unexpected encoding", object.Kind.Kind)
	}
	meta, err := wire.ReadMeta(wire.Protobuf, object.Data, false)
	if err != nil {
		return nil, fmt.Errorf("patch status: %w", err)
	}
	if err := checkUID(r, meta, patch); err != nil {
		return nil, err
	}
	// What the patch applies to is the newest acknowledged status, so no
	// other may be written until this one is.
	j.write.Lock()
	defer j.write.Unlock()
	t := target{r, meta.Namespace, meta.Name}
	j.mu.Lock()
	old := j.status[t]
	j.mu.Unlock()
	e := &statusEntry{
		Resource: r.Resource, Namespace: meta.Namespace, Name: meta.Name, UID: meta.UID,
		Base: getStatus(object.Data),
	}
	current := e.Base
	if old != nil && old.covers(&meta) {
		current = old.Status
	}
	if e.Status, err = patchedStatus(r, patchType, patch, current); err != nil {
		return nil, err
	}
	if old != nil && !old.delivered() && old.UID == e.UID {
		e.Sequence, e.At, e.Base = old.Sequence, old.At, old.Base
	} else {
		e.Sequence, e.At = j.nextSequence(), j.cfg.Clock.Now()
	}
	if err := j.fits(t, e); err != nil {
		return nil, err
	}
	if err := j.put(ctx, statusBucket, t.String(), e); err != nil {
		return nil, err
	}
	j.mu.Lock()
	j.status[t] = e
	j.mu.Unlock()
	j.notify()
	j.refresh(t)
	return setStatus(object.Data, e.Status), nil
}

// fits refuses a status beyond the bounds. What is kept is never given up for
// another, so a newer status of the same object fits while it does not grow.
func (j *Journal) fits(t target, e *statusEntry) error {
	s := j.Stats()
	s.Status, s.StatusBytes = s.Status+1, s.StatusBytes+e.size()
	j.mu.Lock()
	old := j.status[t]
	j.mu.Unlock()
	if old != nil && !old.delivered() {
		s.Status, s.StatusBytes = s.Status-1, s.StatusBytes-old.size()
		if e.size() <= old.size() {
			return nil
		}
	}
	if s.Status <= j.cfg.MaxStatus && s.StatusBytes <= j.cfg.MaxStatusBytes {
		return nil
	}
	err := apierrors.NewServiceUnavailable(fmt.Sprintf(
		"yurthub: no place to keep the status of %s until the cloud is back: the journal holds as many as it may", t))
	err.ErrStatus.Details = &metav1.StatusDetails{RetryAfterSeconds: 10}
	return err
}

func (j *Journal) nextSequence() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.sequence++
	return j.sequence
}

// covers reports whether the entry is newer than the status of the cloud's
// object.
func (e *statusEntry) covers(object *wire.Meta) bool {
	return e.UID == object.UID && (!e.delivered() || object.Version < e.version)
}

// checkUID is the precondition that a kubelet puts into its patches: a pod of
// the same name may be another pod.
func checkUID(r schema.GroupVersionResource, meta wire.Meta, patch []byte) error {
	var p struct {
		Metadata metav1.ObjectMeta `json:"metadata"`
	}
	if err := json.Unmarshal(patch, &p); err != nil {
		return apierrors.NewBadRequest(fmt.Sprintf("patch is not JSON: %v", err))
	}
	if uid := string(p.Metadata.UID); uid != "" && uid != meta.UID {
		return apierrors.NewConflict(r.GroupResource(), meta.Name,
			fmt.Errorf("the UID in the precondition (%s) does not match the UID in record (%s)", uid, meta.UID))
	}
	return nil
}

// patchedStatus returns a status message after a patch of its object.
func patchedStatus(r schema.GroupVersionResource, patchType types.PatchType, patch, status []byte) ([]byte, error) {
	if patchType != types.StrategicMergePatchType {
		return nil, apierrors.NewServiceUnavailable(fmt.Sprintf("while the cloud is away a status is patched by %s only", types.StrategicMergePatchType))
	}
	text, err := wire.ToJSON(nil, "v1", kindOf(r.Resource), setStatus(nil, status), true)
	if err != nil {
		return nil, fmt.Errorf("patch status: %w", err)
	}
	type message interface{ Marshal() ([]byte, error) }
	var (
		into    any
		changed message
	)
	if r.Resource == "pods" {
		pod := &corev1.Pod{}
		into, changed = pod, &pod.Status
	} else {
		node := &corev1.Node{}
		into, changed = node, &node.Status
	}
	patched, err := strategicpatch.StrategicMergePatch(text, patch, into)
	if err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("patch does not apply: %v", err))
	}
	if err := json.Unmarshal(patched, into); err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("patched object is not valid: %v", err))
	}
	out, err := changed.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode status: %w", err)
	}
	return out, nil
}

func kindOf(resource string) string {
	if resource == "nodes" {
		return "Node"
	}
	return "Pod"
}

// getStatus returns the status of an object, nil if it has none.
func getStatus(message []byte) []byte {
	var out []byte
	for rest := message; len(rest) > 0; {
		num, typ, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return nil
		}
		m := protowire.ConsumeFieldValue(num, typ, rest[n:])
		if m < 0 {
			return nil
		}
		if num == statusField && typ == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(rest[n:])
			out = append(out, value...) // two parts of a message merge so
		}
		rest = rest[n+m:]
	}
	return out
}

// setStatus returns an object with another status, and every other field,
// known or not, as it was.
func setStatus(message, value []byte) []byte {
	out := make([]byte, 0, len(message)+len(value)+8)
	for rest := message; len(rest) > 0; {
		num, typ, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return message
		}
		m := protowire.ConsumeFieldValue(num, typ, rest[n:])
		if m < 0 {
			return message
		}
		if num != statusField {
			out = append(out, rest[:n+m]...)
		}
		rest = rest[n+m:]
	}
	out = protowire.AppendTag(out, statusField, protowire.BytesType)
	return protowire.AppendBytes(out, value)
}

// Overlay is the replica's OverlayFunc.
func (j *Journal) Overlay(r schema.GroupVersionResource, key string, k replica.Kind, base []byte) ([]byte, bool) {
	if !HasStatus(r) || k.Encoding != wire.Protobuf {
		return nil, false
	}
	t := target{resource: r}
	t.namespace, t.name = replica.SplitKey(key)
	j.mu.Lock()
	defer j.mu.Unlock()
	e, ok := j.status[t]
	if !ok {
		return nil, false
	}
	meta, err := wire.ReadMeta(wire.Protobuf, base, false)
	if err != nil {
		return nil, false
	}
	if !e.covers(&meta) {
		if e.delivered() {
			delete(j.status, t) // the replica has caught up
		}
		return nil, false
	}
	return setStatus(base, e.Status), true
}

// deliverStatus sends one status. The cloud's answer decides: taken, gone for
// good, or again later (an error).
func (j *Journal) deliverStatus(ctx context.Context, e *statusEntry) error {
	t := e.target()
	if j.older(e.At, j.cfg.StatusAge) {
		j.cfg.Log.Warn("status dropped", "object", t.String(), "made", e.At)
		j.drop("status", "age")
		return j.settle(ctx, e, 0)
	}
	patch, err := e.patch()
	if err != nil {
		// It cannot be sent by any later try either.
		j.cfg.Log.Error("status dropped", "object", t.String(), "err", err)
		j.drop("status", "unreadable")
		return j.settle(ctx, e, 0)
	}
	code, body, err := j.send(ctx, http.MethodPatch, t.path()+"/status", string(types.StrategicMergePatchType), patch)
	if err != nil {
		return err
	}
	switch {
	case code == http.StatusOK:
		meta, err := wire.ReadMeta(wire.JSON, body, false)
		if err == nil && meta.UID != e.UID {
			err = errors.New("the answer is of another object")
		}
		if err != nil {
			return fmt.Errorf("deliver status of %s: %w", t, err)
		}
		j.sent("status")
		return j.settle(ctx, e, meta.Version)
	case code == http.StatusConflict:
		// Another object by that name, or one that others write to at the
		// same time: look.
		gone, err := j.gone(ctx, e)
		if err != nil || !gone {
			return errors.Join(refusal("status of "+t.String(), code, body), err)
		}
		fallthrough
	case j.final(t.String(), code, body):
		// Gone (404, 409), or no longer this node's (403): a status must not
		// bring anything back.
		j.cfg.Log.Info("status dropped", "object", t.String(), "code", code)
		j.drop("status", http.StatusText(code))
		if code == http.StatusNotFound || code == http.StatusConflict {
			// Nobody shall see the cloud's last status of it between the
			// node's and its end.
			return j.settle(ctx, e, untilGone)
		}
		return j.settle(ctx, e, 0)
	}
	return refusal("status of "+t.String(), code, body)
}

// gone asks whether the object that the entry speaks of is there no more.
func (j *Journal) gone(ctx context.Context, e *statusEntry) (bool, error) {
	code, body, err := j.send(ctx, http.MethodGet, e.target().path(), "", nil)
	if err != nil || (code == http.StatusNotFound && isKind(body, "Status")) {
		return err == nil, err
	}
	if code != http.StatusOK {
		return false, nil
	}
	meta, err := wire.ReadMeta(wire.JSON, body, false)
	return err == nil && meta.UID != e.UID, err
}

// patch returns the strategic merge patch that brings the cloud's object to
// the entry's status.
func (e *statusEntry) patch() ([]byte, error) {
	status, err := e.tree(e.Status)
	if err != nil {
		return nil, err
	}
	base, err := e.tree(e.Base)
	if err != nil {
		return nil, err
	}
	// These are not the kubelet's to write.
	for _, name := range []string{"volumesAttached", "nominatedNodeName", "resourceClaimStatuses"} {
		delete(status, name)
		delete(base, name)
	}
	// These a strategic patch would merge where the kubelet means to replace.
	for _, name := range []string{"podIPs", "hostIPs", "addresses"} {
		if items, ok := status[name].([]any); ok {
			status[name] = append([]any{map[string]any{"$patch": "replace"}}, items...)
		}
	}
	clearRemoved(status, base)
	return json.Marshal(map[string]any{"metadata": map[string]string{"uid": e.UID}, "status": status})
}

// clearRemoved makes a patch delete the fields that are in base only.
func clearRemoved(patch, base map[string]any) {
	for name, old := range base {
		value, there := patch[name]
		if !there {
			patch[name] = nil
			continue
		}
		sub, ok := value.(map[string]any)
		if oldSub, both := old.(map[string]any); ok && both {
			clearRemoved(sub, oldSub)
		}
	}
}

// tree returns a status message as JSON has it.
func (e *statusEntry) tree(status []byte) (map[string]any, error) {
	text, err := wire.ToJSON(nil, "v1", kindOf(e.Resource), setStatus(nil, status), false)
	if err != nil {
		return nil, fmt.Errorf("encode status: %w", err)
	}
	var object struct {
		Status map[string]any `json:"status"`
	}
	if err := json.Unmarshal(text, &object); err != nil {
		return nil, fmt.Errorf("encode status: %w", err)
	}
	if object.Status == nil {
		object.Status = map[string]any{}
	}
	return object.Status, nil
}

// settle ends an entry, unless a newer status took its place meanwhile. With
// a version the overlay stays until the replica has caught up with it.
func (j *Journal) settle(ctx context.Context, e *statusEntry, version uint64) error {
	t := e.target()
	delete(j.denied, t.String())
	j.write.Lock()
	defer j.write.Unlock()
	j.mu.Lock()
	current := j.status[t] == e
	j.mu.Unlock()
	if !current {
		return nil
	}
	j.strike(ctx, stored{statusBucket, t.String()})
	j.mu.Lock()
	if version == 0 {
		delete(j.status, t)
	} else {
		taken := *e
		taken.version, taken.taken = version, time.Now()
		j.status[t] = &taken
	}
	j.mu.Unlock()
	j.refresh(t)
	return nil
}

// forgetLate ends overlays that waited for the replica long enough. The
// channel tells when to look again; it is nil when none is left.
func (j *Journal) forgetLate() <-chan time.Time {
	j.mu.Lock()
	var late []target
	left := false
	for t, e := range j.status {
		switch {
		case !e.delivered():
		case time.Since(e.taken) >= keepTaken:
			delete(j.status, t)
			late = append(late, t)
		default:
			left = true
		}
	}
	j.mu.Unlock()
	for _, t := range late {
		j.refresh(t)
	}
	if !left {
		return nil
	}
	return time.After(keepTaken)
}
