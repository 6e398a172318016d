package journal

import (
	"encoding/json"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// FuzzEntries decodes journal records as they may stand in a store that was
// written by another release, and does with them all that a journal does.
func FuzzEntries(f *testing.F) {
	f.Add([]byte(`{"resource":"pods","namespace":"a","name":"b","uid":"c","sequence":7,"status":"CgdSdW5uaW5n","base":""}`))
	f.Add([]byte(`{"resource":"nodes","name":"b","status":"","base":"CgA="}`))
	f.Add([]byte(`{"sequence":1,"path":"/api/v1/namespaces/a/events","namespace":"a","name":"e","object":{"metadata":{"name":"e"}}}`))
	f.Add([]byte(`{"object":[]}`))
	f.Fuzz(func(t *testing.T, record []byte) {
		var status statusEntry
		if json.Unmarshal(record, &status) == nil {
			if _, err := json.Marshal(&status); err != nil {
				t.Errorf("written again: %v", err)
			}
			_ = status.target().path()
			if patch, err := status.patch(); err == nil && !json.Valid(patch) {
				t.Errorf("patch is not JSON: %q", patch)
			}
		}
		var event eventEntry
		if json.Unmarshal(record, &event) != nil {
			return
		}
		object, err := merge(event.Object, map[string]any{"metadata": map[string]any{"uid": nil}})
		if err == nil && !json.Valid(object) {
			t.Errorf("event is not JSON: %q", object)
		}
	})
}

// FuzzStatusField takes apart messages that are none.
func FuzzStatusField(f *testing.F) {
	f.Add([]byte{0x1a, 2, 8, 1, 0x0a, 1, 'x'}, []byte{8, 2})
	f.Add([]byte{0x1a, 0xff, 0xff, 0xff, 0xff, 0x0f}, []byte{})
	f.Fuzz(func(t *testing.T, message, status []byte) {
		_ = getStatus(message)
		out := setStatus(message, status)
		if len(out) > len(message)+len(status)+16 {
			t.Errorf("%d bytes of %d and %d", len(out), len(message), len(status))
		}
		if sound := setStatus(nil, status); string(getStatus(sound)) != string(status) {
			t.Errorf("status %x came back as %x", status, getStatus(sound))
		}
	})
}

// FuzzPatch applies what a kubelet may send to what the hub may hold.
func FuzzPatch(f *testing.F) {
	status, err := (&corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady}}}).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"metadata":{"uid":"u"},"status":{"podIPs":[{"ip":"10.0.0.1"},{"$patch":"replace"}],"$setElementOrder/conditions":[{"type":"Ready"}],"conditions":[{"type":"Ready","status":"True"}]}}`), status)
	f.Add([]byte(`{"status":{"$patch":"delete","$retainKeys":["phase"],"$deleteFromPrimitiveList/addresses":["a"]}}`), status)
	f.Add([]byte(`{"status":null,"metadata":{"managedFields":[{}]}}`), []byte{})
	f.Add([]byte(`[{"op":"remove"}]`), []byte{8, 1})
	f.Fuzz(func(t *testing.T, patch, status []byte) {
		for _, r := range []schema.GroupVersionResource{corev1.SchemeGroupVersion.WithResource("pods"), corev1.SchemeGroupVersion.WithResource("nodes")} {
			if checkUID(r, wire.Meta{Name: "a", UID: "u"}, patch) != nil {
				continue
			}
			out, err := patchedStatus(r, types.StrategicMergePatchType, patch, status)
			if err != nil {
				continue
			}
			// What is kept can be sent.
			e := &statusEntry{Resource: r.Resource, Name: "a", UID: "u", Status: out, Base: status}
			if patch, err := e.patch(); err == nil && !json.Valid(patch) {
				t.Errorf("patch is not JSON: %q", patch)
			}
		}
	})
}
