package replica

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/request"
)

// TestOwnBeforeBorrowed has a pod on the node list its namespace by a right of
// its own, which makes a scope that is fresher than the node's. What the node
// asks is still answered from what is the node's: offline its kubelet may not
// read the other.
func TestOwnBeforeBorrowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("pods", "ns", "a", "edge-1", nil)
		mine := Scope{Resource: pods.Resource, Fields: "spec.nodeName=edge-1"}
		if err := b.Pin(mine); err != nil {
			t.Fatal(err)
		}
		pass(time.Second) // it is listed
		if _, err := b.Open(t.Context(), Scope{Resource: pods.Resource, Namespace: "ns"}, Credential{Token: "pod"}, "pod"); err != nil {
			t.Fatal(err)
		}
		b.cloud.put("pods", "ns", "b", "edge-2", nil)
		pass(2 * time.Second)
		b.cloud.cut()
		pass(time.Minute)
		if own, other := b.held(mine).Version(), b.held(Scope{Resource: pods.Resource, Namespace: "ns"}).Version(); own >= other {
			t.Fatalf("the node's scope is at %d, the pod's at %d", own, other)
		}
		get := request.Info{Verb: "get", IsResource: true, Resource: pods.Resource, Namespace: "ns", Name: "a"}
		if o, err := b.Get(get, 0); err != nil || o.Borrowed() {
			t.Errorf("the node's own pod comes by another's right: %v", err)
		}
		// The pod's stream has not noticed yet that the link is cut.
		other := b.held(Scope{Resource: pods.Resource, Namespace: "ns"})
		other.stream.set.mu.Lock()
		other.stream.set.followed = true
		other.stream.set.mu.Unlock()
		if o, err := b.Get(get, 0); !other.Current() || b.held(mine).Current() || err != nil || o.Borrowed() {
			t.Errorf("in the moment of a cut the node's own pod comes by another's right: %v", err)
		}
		if b.held(Scope{Resource: pods.Resource, Namespace: "ns", Fields: "spec.nodeName=edge-1"}).Borrowed() {
			t.Error("a list of the node's own pods comes by another's right")
		}
	})
}
