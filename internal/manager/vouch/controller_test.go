package vouch

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
)

// TestRenewalsComeFirst has leases that carry heartbeats, by which other leases
// are renewed, come without an end, beside a hundred of nodes that are vouched
// for. The former wait for few of the latter, and none of these waits for ever.
func TestRenewalsComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes, carriers = 100, 50
		q := priorityqueue.New[reconcile.Request]("urgent")
		defer q.ShutDown()
		h := byUrgency()
		change := func(name, annotation string) {
			lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{annotation: "x"}}}
			h.Update(t.Context(), event.UpdateEvent{ObjectOld: lease, ObjectNew: lease}, q)
		}
		told := map[string]bool{}
		others := 0
		round := 0
		for ; len(told) < nodes && round < 300; round++ {
			for i := range nodes {
				change(fmt.Sprintf("vouched-%d", i), apps.VouchedFor)
			}
			for i := range carriers {
				change(fmt.Sprintf("carrier-%d", i), apps.Heartbeats)
			}
			synctest.Wait()
			for renewed := 0; renewed < carriers; { // and what is left waits
				req, _ := q.Get()
				if strings.HasPrefix(req.Name, "carrier") {
					renewed++
				} else {
					told[req.Name] = true
					others++
				}
				q.Done(req)
			}
		}
		if len(told) < nodes {
			t.Errorf("only %d of %d nodes were told of in %d rounds", len(told), nodes, round)
		}
		if most := round * nodes / 4; others > most {
			t.Errorf("%d rounds of renewals waited for %d others, want at most %d", round, others, most)
		}
	})
}
