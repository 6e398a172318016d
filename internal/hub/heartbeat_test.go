package hub

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/hub/pool"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// TestCarryLosesNothing carries heartbeats in the renewal of a kubelet that is
// newer than the hub.
func TestCarryLosesNothing(t *testing.T) {
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: "n", Annotations: map[string]string{"mine": "1", apps.DelegateHeartbeat: "true"}},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: new("n")},
	}
	raw, err := lease.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	future := protowire.AppendString(protowire.AppendTag(nil, 99, protowire.BytesType), "of a newer kubelet")
	bodies := map[string][]byte{
		runtime.ContentTypeProtobuf: wire.AppendObject(nil, wire.Protobuf, "coordination.k8s.io/v1", "Lease", append(raw, future...)),
		runtime.ContentTypeJSON: []byte(`{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","future":"of a newer kubelet",
			"metadata":{"name":"n","annotations":{"mine":"1","openyurt.io/delegate-heartbeat":"true"}},"spec":{"holderIdentity":"n"}}`),
	}
	for media, body := range bodies {
		send := func(set map[string]*string) (*coordinationv1.Lease, []byte) {
			r := httptest.NewRequest(http.MethodPut, "/", bytes.NewReader(body))
			r.Header.Set("Content-Type", media)
			into := &coordinationv1.Lease{}
			if err := decode(body, into); err != nil {
				t.Fatal(err)
			}
			if err := carry(r, body, into, set, into.ResourceVersion); err != nil {
				t.Fatal(err)
			}
			sent, err := io.ReadAll(r.Body)
			if err != nil || int64(len(sent)) != r.ContentLength {
				t.Fatalf("%d bytes of %d, %v", len(sent), r.ContentLength, err)
			}
			read := &coordinationv1.Lease{}
			if err := decode(sent, read); err != nil {
				t.Fatal(err)
			}
			for _, l := range []*coordinationv1.Lease{into, read} {
				if l.Name != "n" || *l.Spec.HolderIdentity != "n" || l.Annotations["mine"] != "1" {
					t.Errorf("%s: got %+v", media, l)
				}
			}
			if !bytes.Contains(sent, []byte("of a newer kubelet")) {
				t.Errorf("%s: a field that is not known is lost", media)
			}
			return read, sent
		}
		got, _ := send(map[string]*string{apps.Heartbeats: new("[]"), apps.DelegateHeartbeat: nil})
		if _, has := got.Annotations[apps.DelegateHeartbeat]; has || got.Annotations[apps.Heartbeats] != "[]" {
			t.Errorf("%s: got %v", media, got.Annotations)
		}
		if _, sent := send(map[string]*string{apps.Heartbeats: nil}); !bytes.Equal(sent, body) {
			t.Errorf("%s: with nothing to say it sends something else", media)
		}
	}
	r := httptest.NewRequest(http.MethodPut, "/", http.NoBody)
	if err := carry(r, []byte("[]"), &coordinationv1.Lease{}, map[string]*string{"a": new("b")}, ""); err == nil || r.Body != http.NoBody {
		t.Errorf("what cannot be edited: %v", err)
	}
}

// TestKubeletGoesOnFromItsVersion: what the hub wrote between two renewals is no
// conflict for the kubelet, which knows nothing of it. What others wrote is.
func TestKubeletGoesOnFromItsVersion(t *testing.T) {
	b := newHeartbeat()
	b.set(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "10"}}, true)
	if got := b.version("10"); got != "10" {
		t.Errorf("nothing was written: got %s", got)
	}
	b.move("10", "12")
	b.move("12", "15")
	if got := b.version("10"); got != "15" || b.get().ResourceVersion != "15" {
		t.Errorf("got %s, the lease is at %s", got, b.get().ResourceVersion)
	}
	b.move("20", "21") // the manager wrote 20, which the kubelet did not see
	if got := b.version("10"); got != "10" {
		t.Errorf("over the manager's write: got %s", got)
	}
	if b.version("") != "" || b.version("20") != "21" || b.get().ResourceVersion != "15" {
		t.Errorf("got %q, %s", b.version(""), b.version("20"))
	}
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "n", ResourceVersion: "20"}}
	raw, err := lease.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for media, body := range map[string][]byte{
		runtime.ContentTypeProtobuf: wire.AppendObject(nil, wire.Protobuf, "coordination.k8s.io/v1", "Lease", raw),
		runtime.ContentTypeJSON:     []byte(`{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"n","resourceVersion":"20"}}`),
	} {
		r := httptest.NewRequest(http.MethodPut, "/", bytes.NewReader(body))
		r.Header.Set("Content-Type", media)
		into, sent := lease.DeepCopy(), &coordinationv1.Lease{}
		if err := carry(r, body, into, nil, b.version("20")); err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		if err := decode(text, sent); err != nil || sent.ResourceVersion != "21" || into.ResourceVersion != "21" || sent.Name != "n" {
			t.Errorf("%s: sent %+v, %v", media, sent.ObjectMeta, err)
		}
		if err := carry(r, body, into, nil, "x"); err == nil {
			t.Errorf("%s: a version that is none", media)
		}
	}
}

// TestInTurn asks those first who can help.
func TestInTurn(t *testing.T) {
	now := time.Now()
	peers := []pool.Peer{
		{Node: "gone", Seen: now.Add(-time.Minute)},
		{Node: "never"},
		{Node: "silent", Seen: now},
		{Node: "linked", Link: true},
		{Node: "other", Seen: now},
		{Node: "leader", Seen: now},
	}
	first := map[string]int{}
	for range 100 {
		got := inTurn(peers, "leader", now)
		if len(got) != 6 || got[0] != "linked" || got[1] != "leader" || slices.Contains(got[:4], "gone") || slices.Contains(got[:4], "never") {
			t.Fatalf("got %v", got)
		}
		first[got[2]]++
	}
	if len(first) != 2 {
		t.Errorf("always in the same order: %v", first)
	}
}
