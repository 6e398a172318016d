package lifecycle

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	testclock "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/heartbeat"
	"github.com/yurt-edge/yurt/internal/manager/vouch"
)

// TestCarry: of a silent node another that is heard carries a heartbeat that is
// later than the last one that was believed.
func TestCarry(t *testing.T) {
	now := epoch.Add(time.Hour)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	lease := func(node, annotation, text string) *coordinationv1.Lease {
		return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{
			Namespace: corev1.NamespaceNodeLease, Name: node, Annotations: map[string]string{annotation: text},
		}}
	}
	of := func(node string, at time.Time) string {
		s, err := heartbeat.Sign(heartbeat.Beat{Node: node, Time: metav1.NewMicroTime(at)}, [][]byte{{}}, key)
		if err != nil {
			t.Fatal(err)
		}
		text, err := heartbeat.Join([]heartbeat.Signed{s})
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	believed := func(at time.Time) *coordinationv1.Lease {
		text, err := json.Marshal(vouch.Memory{Time: metav1.NewMicroTime(at)})
		if err != nil {
			t.Fatal(err)
		}
		return lease("a", apps.VouchedFor, string(text))
	}
	for name, tc := range map[string]struct {
		own, carrier *coordinationv1.Lease
		heard        time.Time // the carrier
		want         bool
	}{
		"none was believed yet":     {nil, lease("r", apps.Heartbeats, of("a", now)), now, true},
		"an earlier was":            {believed(now.Add(-1)), lease("r", apps.Heartbeats, of("a", now.Add(time.Second))), now, true},
		"that one was":              {believed(now), lease("r", apps.Heartbeats, of("a", now)), now, false},
		"the carrier is silent too": {nil, lease("r", apps.Heartbeats, of("a", now)), now.Add(-grace - 1), false},
		"it is of another":          {nil, lease("r", apps.Heartbeats, of("b", now)), now, false},
		"its own proves nothing":    {lease("a", apps.Heartbeats, of("a", now)), nil, now, false},
		"nonsense is none":          {nil, lease("r", apps.Heartbeats, "{"), now, false},
	} {
		t.Run(name, func(t *testing.T) {
			api := fake.NewClientBuilder().WithScheme(scheme.Scheme)
			for _, l := range []*coordinationv1.Lease{tc.own, tc.carrier} {
				if l != nil {
					api = api.WithObjects(l)
				}
			}
			members := []member{
				{node: silent("a", epoch)},
				{node: silent("r", epoch), Heard: vouch.Heard{Own: tc.heard}},
			}
			c := &watcher{read: api.Build(), clock: testclock.NewFakePassiveClock(now), grace: grace}
			if err := c.carry(t.Context(), members); err != nil {
				t.Fatal(err)
			}
			if members[0].carried != tc.want || members[1].carried {
				t.Errorf("got %v, want %v", members[0].carried, tc.want)
			}
		})
	}
}
