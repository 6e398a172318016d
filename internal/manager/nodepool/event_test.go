package nodepool

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// TestNodesOfAPoolAreGathered has all nodes of three pools change in three
// seconds, and two controllers write the pools' status, each of which sees what
// the other writes.
func TestNodesOfAPoolAreGathered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pools, nodes, took = 3, 100, 3 * time.Second
		every := []time.Duration{Gather, Gather / 2}
		queues := make([]priorityqueue.PriorityQueue[reconcile.Request], len(every))
		var mu sync.Mutex                                  // guards seen
		seen := make([]map[string][]time.Time, len(every)) // by pool, when a controller saw to it
		times := func(i int, pool string) []time.Time {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(seen[i][pool])
		}
		for i := range queues {
			queues[i], seen[i] = priorityqueue.New[reconcile.Request](fmt.Sprintf("gathered-%d", i)), map[string][]time.Time{}
		}
		wrote := func(pool string, generation int64) {
			was := &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: pool, Generation: 1}}
			is := was.DeepCopy()
			is.Generation = generation
			for i, q := range queues {
				Pools(every[i]).Update(t.Context(), event.UpdateEvent{ObjectOld: was, ObjectNew: is}, q)
			}
		}
		for i, q := range queues {
			go func() { // ends with the queue
				for {
					req, down := q.Get()
					if down {
						return
					}
					mu.Lock()
					seen[i][req.Name] = append(seen[i][req.Name], time.Now())
					mu.Unlock()
					if len(times(i, req.Name)) < nodes { // else it would never end
						wrote(req.Name, 1)
					}
					q.Done(req)
				}
			}()
		}
		for n := range nodes {
			for p := range pools {
				node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
					Name: fmt.Sprintf("n-%d-%d", p, n), Labels: map[string]string{apps.NodePoolLabel: fmt.Sprintf("p-%d", p)},
				}}
				for i, q := range queues {
					PoolsOfNode{every[i]}.Update(t.Context(), event.UpdateEvent{ObjectOld: node, ObjectNew: node}, q)
				}
			}
			time.Sleep(took / nodes)
		}
		last := time.Now()
		synctest.Wait()
		for i, gather := range every {
			for p := range pools {
				if at, most := times(i, fmt.Sprintf("p-%d", p)), int(took/gather)+1; len(at) > most {
					t.Errorf("controller %d saw to pool %d %d times, want at most %d", i, p, len(at), most)
				}
			}
		}
		time.Sleep(Gather)
		synctest.Wait()
		for i := range every {
			for p := range pools {
				at := times(i, fmt.Sprintf("p-%d", p))
				if len(at) == 0 || at[len(at)-1].Before(last.Add(-took/nodes)) {
					t.Errorf("controller %d did not see the last node of pool %d: seen to at %v", i, p, at)
				}
			}
		}
		before := len(times(0, "p-0"))
		wrote("p-0", 2)
		synctest.Wait()
		if got := times(0, "p-0"); len(got) != before+1 || got[before] != time.Now() {
			t.Errorf("a new spec was seen to at %v, now is %v", got[before:], time.Now())
		}
		for _, q := range queues {
			q.ShutDown()
		}
	})
}
