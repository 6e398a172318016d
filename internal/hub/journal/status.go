package journal

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// statusEntry is the newest status of one object that the cloud has not got.
// Older ones are superseded: a status is a state, not a history.
type statusEntry struct {
	Resource  string    `json:"resource"` // pods or nodes
	Namespace string    `json:"namespace,omitempty"`
	Name      string    `json:"name"`
	UID       string    `json:"uid"` // of the object that it speaks of
	At        time.Time `json:"at"`  // of the first unsent write
	// Status is the message of the object's status field.
	Status []byte `json:"status"`
	// Version is the resource version at which the cloud took it; zero
	// while it waits. The overlay stays until the replica has that version.
	Version uint64 `json:"version,omitempty"`
}

func (e *statusEntry) delivered() bool { return e.Version != 0 }

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
	status, err := patchedStatus(r, patchType, patch, object)
	if err != nil {
		return nil, err
	}
	e := &statusEntry{
		Resource: r.Resource, Namespace: meta.Namespace, Name: meta.Name, UID: meta.UID,
		At: time.Now(), Status: status,
	}
	j.write.Lock()
	defer j.write.Unlock()
	t := e.target()
	j.mu.Lock()
	old, ok := j.status[t]
	j.mu.Unlock()
	if ok && !old.delivered() {
		e.At = old.At
	}
	if err := j.put(ctx, statusBucket, t.String(), e); err != nil {
		return nil, err
	}
	j.mu.Lock()
	j.status[t] = e
	j.mu.Unlock()
	j.notify()
	if err := j.cfg.Refresh(r, meta.Namespace, meta.Name); err != nil {
		j.cfg.Log.Warn("overlay not shown", "object", t.String(), "err", err)
	}
	return setField(object.Data, statusField, status), nil
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

func patchedStatus(r schema.GroupVersionResource, patchType types.PatchType, patch []byte, object *replica.Object) ([]byte, error) {
	if patchType != types.StrategicMergePatchType {
		return nil, apierrors.NewServiceUnavailable(fmt.Sprintf("while the cloud is away a status is patched by %s only", types.StrategicMergePatchType))
	}
	text, err := wire.ToJSON(nil, object.Kind.APIVersion, object.Kind.Kind, object.Data, true)
	if err != nil {
		return nil, fmt.Errorf("patch status: %w", err)
	}
	type message interface{ Marshal() ([]byte, error) }
	var (
		into   any
		status func() message
	)
	if r.Resource == "pods" {
		pod := &corev1.Pod{}
		into, status = pod, func() message { return &pod.Status }
	} else {
		node := &corev1.Node{}
		into, status = node, func() message { return &node.Status }
	}
	patched, err := strategicpatch.StrategicMergePatch(text, patch, into)
	if err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("patch does not apply: %v", err))
	}
	if err := json.Unmarshal(patched, into); err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("patched object is not valid: %v", err))
	}
	out, err := status().Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode status: %w", err)
	}
	return out, nil
}

// setField returns message with one length-delimited field replaced, and
// every other field, known or not, as it was.
func setField(message []byte, field protowire.Number, value []byte) []byte {
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
		if num != field {
			out = append(out, rest[:n+m]...)
		}
		rest = rest[n+m:]
	}
	out = protowire.AppendTag(out, field, protowire.BytesType)
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
	if err != nil || meta.UID != e.UID {
		return nil, false
	}
	if e.delivered() && meta.Version >= e.Version {
		delete(j.status, t) // the replica has caught up
		return nil, false
	}
	return setField(base, statusField, e.Status), true
}

// deliverStatus sends one status. The cloud's answer decides: taken, gone for
// good, or again later (an error).
func (j *Journal) deliverStatus(ctx context.Context, e *statusEntry) error {
	t := e.target()
	kind := "Pod"
	if e.Resource == "nodes" {
		kind = "Node"
	}
	text, err := wire.ToJSON(nil, "v1", kind, setField(nil, statusField, e.Status), false)
	if err != nil {
		return fmt.Errorf("encode status of %s: %w", t, err)
	}
	var object struct {
		Status json.RawMessage `json:"status"`
	}
	if err := json.Unmarshal(text, &object); err != nil {
		return fmt.Errorf("encode status of %s: %w", t, err)
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]string{"uid": e.UID},
		"status":   object.Status,
	})
	if err != nil {
		return fmt.Errorf("encode status of %s: %w", t, err)
	}
	code, body, err := j.send(ctx, http.MethodPatch, t.path()+"/status", string(types.StrategicMergePatchType), patch)
	if err != nil {
		return err
	}
	switch {
	case code == http.StatusOK:
		meta, err := wire.ReadMeta(wire.JSON, body, false)
		if err != nil {
			return fmt.Errorf("deliver status of %s: %w", t, err)
		}
		j.metrics.sent.WithLabelValues("status").Inc()
		return j.settle(ctx, e, meta.Version)
	case final(code):
		// Gone (404), another object by that name (409), or no longer
		// this node's (403): a status must not bring anything back.
		j.cfg.Log.Info("status dropped", "object", t.String(), "code", code)
		j.metrics.dropped.WithLabelValues("status", http.StatusText(code)).Inc()
		return j.settle(ctx, e, 0)
	}
	return fmt.Errorf("deliver status of %s: the cloud answered %d: %.200s", t, code, body)
}

// settle ends an entry, unless a newer status took its place meanwhile. With
// a version the overlay stays until the replica has caught up with it.
func (j *Journal) settle(ctx context.Context, e *statusEntry, version uint64) error {
	j.write.Lock()
	defer j.write.Unlock()
	t := e.target()
	j.mu.Lock()
	current := j.status[t] == e
	j.mu.Unlock()
	if !current {
		return nil
	}
	if err := j.remove(ctx, statusBucket, t.String()); err != nil {
		return err
	}
	j.mu.Lock()
	if version == 0 {
		delete(j.status, t)
	} else {
		taken := *e
		taken.Version = version
		j.status[t] = &taken
	}
	j.mu.Unlock()
	if err := j.cfg.Refresh(t.resource, t.namespace, t.name); err != nil {
		j.cfg.Log.Warn("overlay not removed", "object", t.String(), "err", err)
	}
	return nil
}
