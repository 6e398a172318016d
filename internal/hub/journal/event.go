package journal

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// eventEntry is one event that the cloud has not got.
type eventEntry struct {
	Sequence  uint64          `json:"sequence"`
	Path      string          `json:"path"` // of the collection
	Namespace string          `json:"namespace"`
	Name      string          `json:"name"`
	At        time.Time       `json:"at,omitzero"`
	Object    json.RawMessage `json:"object"`
}

func (e *eventEntry) key() string { return eventKey(e.Path, e.Name) }

func eventKey(path, name string) string { return path + "/" + name }

// AddEvent keeps an event, given as JSON, and returns it as the API server
// would have answered, but for a resource version. The write is durable then;
// it may still be dropped when more than MaxEvents newer ones follow.
func (j *Journal) AddEvent(ctx context.Context, path, namespace string, object []byte) ([]byte, error) {
	var meta struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        metav1.ObjectMeta `json:"metadata"`
	}
	if err := json.Unmarshal(object, &meta); err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("event is not JSON: %v", err))
	}
	name := meta.Metadata.Name
	if name == "" && meta.Metadata.GenerateName != "" {
		name = meta.Metadata.GenerateName + string(uuid.NewUUID())[:8]
	}
	if name == "" {
		return nil, apierrors.NewBadRequest("event has no metadata.name")
	}
	if meta.Metadata.Namespace != "" && meta.Metadata.Namespace != namespace {
		return nil, apierrors.NewBadRequest("the namespace of the event does not match the request's")
	}
	object, err := merge(object, map[string]any{"metadata": map[string]any{
		"name": name, "namespace": namespace,
		"uid":               string(uuid.NewUUID()),
		"creationTimestamp": j.cfg.Clock.Now().UTC().Format(time.RFC3339),
	}})
	if err != nil {
		return nil, err
	}
	j.write.Lock()
	defer j.write.Unlock()
	j.mu.Lock()
	_, taken := j.events[eventKey(path, name)]
	j.sequence++
	e := &eventEntry{Sequence: j.sequence, Path: path, Namespace: namespace, Name: name, At: j.cfg.Clock.Now(), Object: object}
	j.mu.Unlock()
	if taken {
		return nil, apierrors.NewAlreadyExists(corev1.Resource("events"), name)
	}
	return object, j.keepEvent(ctx, e)
}

// PatchEvent changes an event that still waits. It is NotFound for any other:
// recorders then make a new one.
func (j *Journal) PatchEvent(ctx context.Context, path, name string, patchType types.PatchType, patch []byte) ([]byte, error) {
	j.write.Lock()
	defer j.write.Unlock()
	j.mu.Lock()
	old, ok := j.events[eventKey(path, name)]
	j.mu.Unlock()
	if !ok || patchType != types.StrategicMergePatchType {
		return nil, apierrors.NewNotFound(corev1.Resource("events"), name)
	}
	var like any = corev1.Event{}
	var typ metav1.TypeMeta
	if json.Unmarshal(old.Object, &typ) == nil && typ.APIVersion == "events.k8s.io/v1" {
		like = eventsv1.Event{}
	}
	object, err := strategicpatch.StrategicMergePatch(old.Object, patch, like)
	if err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("patch does not apply: %v", err))
	}
	e := *old
	e.Object = object
	return object, j.keepEvent(ctx, &e)
}

// keepEvent makes an event durable, in place of the oldest ones if there are
// too many. It is called with write held.
func (j *Journal) keepEvent(ctx context.Context, e *eventEntry) error {
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	batch := store.NewBatch()
	batch.Put(eventBucket, e.key(), store.Record{Encoding: uint8(wire.JSON), Data: text})
	j.mu.Lock()
	count, size := len(j.events)+1, j.eventBytes+len(e.Object)
	if old, ok := j.events[e.key()]; ok {
		count, size = count-1, size-len(old.Object)
	}
	var gone []*eventEntry
	for count > j.cfg.MaxEvents || size > j.cfg.MaxEventBytes {
		oldest := j.oldestLocked(e, gone)
		if oldest == nil {
			break
		}
		gone = append(gone, oldest)
		count, size = count-1, size-len(oldest.Object)
		batch.Delete(eventBucket, oldest.key())
	}
	j.mu.Unlock()
	if err := j.commit(ctx, batch); err != nil {
		return fmt.Errorf("write event %s: %w", e.key(), err)
	}
	delete(j.lingering, stored{eventBucket, e.key()})
	for range gone {
		j.drop("event", displaced)
	}
	j.mu.Lock()
	for _, old := range gone {
		delete(j.events, old.key())
	}
	j.events[e.key()] = e
	j.eventBytes = size
	j.mu.Unlock()
	j.notify()
	return nil
}

func (j *Journal) oldestLocked(except *eventEntry, gone []*eventEntry) *eventEntry {
	var oldest *eventEntry
next:
	for _, e := range j.events {
		if e.key() == except.key() || (oldest != nil && e.Sequence > oldest.Sequence) {
			continue
		}
		for _, g := range gone {
			if g == e {
				continue next
			}
		}
		oldest = e
	}
	return oldest
}

func (j *Journal) deliverEvent(ctx context.Context, e *eventEntry) error {
	if j.older(e.At, j.cfg.EventAge) {
		j.drop("event", "age")
		return j.settleEvent(ctx, e)
	}
	object, err := merge(e.Object, map[string]any{"metadata": map[string]any{"uid": nil, "creationTimestamp": nil}})
	if err != nil {
		return err
	}
	code, body, err := j.send(ctx, http.MethodPost, e.Path, "application/json", object)
	if err == nil && code == http.StatusConflict {
		// It is there: the answer was lost, or it was patched since.
		code, body, err = j.send(ctx, http.MethodPatch, e.key(), string(types.MergePatchType), object)
	}
	switch {
	case err != nil:
		return err
	case code/100 == 2 && isKind(body, "Event"):
		j.sent("event")
	case j.final(e.key(), code, body):
		j.drop("event", http.StatusText(code))
	default:
		return refusal("event "+e.key(), code, body)
	}
	return j.settleEvent(ctx, e)
}

// settleEvent ends an entry, unless a newer form took its place meanwhile.
func (j *Journal) settleEvent(ctx context.Context, e *eventEntry) error {
	delete(j.denied, e.key())
	j.write.Lock()
	defer j.write.Unlock()
	j.mu.Lock()
	current := j.events[e.key()] == e
	j.mu.Unlock()
	if !current {
		return nil // patched meanwhile: the newer form follows
	}
	j.strike(ctx, stored{eventBucket, e.key()})
	j.mu.Lock()
	delete(j.events, e.key())
	j.eventBytes -= len(e.Object)
	if len(j.events) == 0 {
		j.displaced = 0
	}
	j.mu.Unlock()
	return nil
}

// merge applies changes by the rules of a JSON merge patch.
func merge(object []byte, changes map[string]any) ([]byte, error) {
	var tree map[string]any
	if err := json.Unmarshal(object, &tree); err != nil {
		return nil, fmt.Errorf("read object: %w", err)
	}
	mergeInto(tree, changes)
	out, err := json.Marshal(tree)
	if err != nil {
		return nil, fmt.Errorf("write object: %w", err)
	}
	return out, nil
}

func mergeInto(tree, changes map[string]any) {
	for key, value := range changes {
		inner, isMap := value.(map[string]any)
		switch {
		case value == nil:
			delete(tree, key)
		case isMap:
			sub, ok := tree[key].(map[string]any)
			if !ok {
				sub = map[string]any{}
				tree[key] = sub
			}
			mergeInto(sub, inner)
		default:
			tree[key] = value
		}
	}
}
