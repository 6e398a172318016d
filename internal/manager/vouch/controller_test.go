package vouch

import (
	"fmt"
	"testing"
	"testing/synctest"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
)

// TestRenewalsComeFirst has many nodes that are vouched for wait to be told of,
// and then a lease that carries heartbeats, by which other leases are renewed.
func TestRenewalsComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := priorityqueue.New[reconcile.Request]("urgent")
		h := byUrgency()
		change := func(name, annotation string) {
			lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{annotation: "x"}}}
			h.Update(t.Context(), event.UpdateEvent{ObjectOld: lease, ObjectNew: lease}, q)
		}
		next := func(want string) {
			t.Helper()
			req, _ := q.Get()
			if req.Name != want {
				t.Errorf("got %s, want %s", req.Name, want)
			}
			q.Done(req)
		}
		for i := range 100 {
			change(fmt.Sprintf("vouched-%d", i), apps.VouchedFor)
		}
		synctest.Wait()
		next("vouched-0")
		change("carrier", apps.Heartbeats)
		synctest.Wait()
		next("carrier")
		next("vouched-1")
		q.ShutDown()
	})
}
