package vouch

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/heartbeat"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func at(s float64) time.Time { return epoch.Add(time.Duration(s * float64(time.Second))) }

func leaseAt(t time.Time) *coordinationv1.Lease {
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: "a", UID: "l"},
		Spec:       coordinationv1.LeaseSpec{LeaseDurationSeconds: new(int32(40)), RenewTime: new(metav1.NewMicroTime(t))},
	}
}

func beatAt(signed, renewed time.Time) heartbeat.Beat {
	return heartbeat.Beat{Node: "a", Time: metav1.NewMicroTime(signed), Renewed: metav1.NewMicroTime(renewed), Ready: corev1.ConditionTrue}
}

func TestRenew(t *testing.T) {
	lease := leaseAt(at(0))
	heard := Heard{Own: at(0), Any: at(0)}
	for _, tc := range []struct {
		what                 string
		now, signed, renewed float64
		by                   string
		want                 verdict
		since, lease         float64 // afterwards
	}{
		{"just heard", 14, 10, 9, "b", notYet, -1, 0},
		{"from before it spoke", 25, -1, -2, "b", superseded, -1, 0},
		{"in time", 25, 20, 18, "b", renewed, 25, 18},
		{"the same again", 46, 20, 18, "b", superseded, 25, 18},
		{"too soon", 39, 35, 33, "b", notYet, 25, 18},
		{"the next", 46, 41, 38, "b", renewed, 25, 38},
		{"by another", 70, 65, 61, "c", renewed, 70, 61},
		{"the clock of the node was set back", 100, 95, -5000, "c", renewed, 70, 61.000001},
		{"and forward", 130, 125, 9000, "c", renewed, 70, 9000},
	} {
		got := renew(lease, beatAt(at(tc.signed), at(tc.renewed)), tc.by, heard, 0, at(0), at(tc.now))
		if got != tc.want || !lease.Spec.RenewTime.Time.Equal(at(tc.lease)) {
			t.Fatalf("%s: got %s, renewed at %s", tc.what, got, lease.Spec.RenewTime.Sub(epoch))
		}
		if got == renewed {
			heard.Any = at(tc.now)
		}
		m := Remembered(lease)
		if tc.since >= 0 && !m.Since.Time.Equal(at(tc.since)) || ByAnother(lease) != (tc.since >= 0) || tc.since >= 0 && m.By != tc.by {
			t.Errorf("%s: remembered %+v", tc.what, m)
		}
	}
	if lease.Annotations[apps.DelegateHeartbeat] != "true" {
		t.Errorf("annotations %v", lease.Annotations)
	}
	if settle(lease) {
		t.Error("settled while it is vouched for")
	}
	lease.Spec.RenewTime = new(metav1.NewMicroTime(at(9001)))
	if !settle(lease) || settle(lease) || lease.Annotations[apps.DelegateHeartbeat] != "" || ByAnother(lease) {
		t.Errorf("not settled: %v", lease.Annotations)
	}
	if got := renew(lease, beatAt(at(125), at(9002)), "c", Heard{Own: at(140), Any: at(140)}, 0, at(0), at(200)); got != superseded {
		t.Errorf("an old heartbeat after the node spoke: got %s", got)
	}
	// The manager was replaced, and has heard nothing yet.
	if got := renew(lease, beatAt(at(125), at(9002)), "c", Heard{}, 0, at(0), at(200)); got != superseded {
		t.Errorf("an old heartbeat for a new manager: got %s", got)
	}
}

// TestAgain: a heartbeat that came too early is looked at again where waiting
// for the next one would make the silence long.
func TestAgain(t *testing.T) {
	own, vouched := leaseAt(at(0)), leaseAt(at(0))
	if renew(vouched, beatAt(at(20), at(19)), "b", Heard{}, 0, at(0), at(20)) != renewed {
		t.Fatal("not renewed")
	}
	for _, tc := range []struct {
		lease   *coordinationv1.Lease
		silence float64
		want    time.Duration
	}{
		{own, 5, 10 * time.Second}, // it has just fallen silent
		{own, 14.5, 500 * time.Millisecond},
		{vouched, 10.4, 0}, // in step: the next one comes at 20.8 at the latest
		{vouched, 12, 3 * time.Second},
	} {
		if got := again(tc.lease, Heard{Any: at(100)}, at(100+tc.silence)); got != tc.want {
			t.Errorf("silent for %vs: got %s, want %s", tc.silence, got, tc.want)
		}
	}
	for _, tc := range [][3]time.Duration{{0, 0, 0}, {0, -1, 0}, {2, 0, 2}, {2, -1, 2}, {0, 3, 3}, {2, 3, 2}, {3, 2, 2}} {
		if got := sooner(tc[0], tc[1]); got != tc[2] {
			t.Errorf("of %d and %d: got %d", tc[0], tc[1], got)
		}
	}
}

// TestRenewNeverGoesBack sends heartbeats with any times in any order.
func TestRenewNeverGoesBack(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 5))
		lease, heard, last := leaseAt(at(0)), Heard{}, time.Time{}
		var writes int
		now := at(0)
		for range 200 {
			now = now.Add(time.Duration(rng.IntN(5000)) * time.Millisecond)
			signed := now.Add(time.Duration(rng.IntN(60)-50) * time.Second)
			was := *lease.Spec.RenewTime
			if renew(lease, beatAt(signed, at(float64(rng.IntN(1000)-500))), fmt.Sprint(rng.IntN(3)), heard, 0, at(0), now) != renewed {
				if !lease.Spec.RenewTime.Equal(&was) {
					t.Fatalf("seed %d: changed without a word", seed)
				}
				continue
			}
			if !lease.Spec.RenewTime.After(was.Time) || !signed.After(last) || !ByAnother(lease) {
				t.Fatalf("seed %d: from %s to %s, signed %s after %s", seed, was, lease.Spec.RenewTime, signed, last)
			}
			last, heard.Any = signed, now
			writes++
		}
		if limit := int(now.Sub(epoch)/(15*time.Second)) + 1; writes > limit || writes == 0 {
			t.Errorf("seed %d: %d writes in %s", seed, writes, now.Sub(epoch))
		}
	}
}

func TestEar(t *testing.T) {
	e := NewEar(time.Hour)
	lease := leaseAt(at(0))
	hear := func(s float64, want Heard) {
		t.Helper()
		e.Hear(lease, at(s))
		if got := e.Last("a"); !got.Own.Equal(want.Own) || !got.Any.Equal(want.Any) {
			t.Errorf("at %v: got %v %v", s, got.Own, got.Any)
		}
	}
	hear(5, Heard{}) // the first proves nothing
	hear(6, Heard{}) // nor the same again
	lease.Spec.RenewTime = new(metav1.NewMicroTime(at(-900)))
	hear(7, Heard{Own: at(7), Any: at(7)}) // whatever the node's clock says
	if renew(lease, beatAt(at(30), at(25)), "b", e.Last("a"), 0, at(0), at(31)) != renewed {
		t.Fatal("not renewed")
	}
	hear(31, Heard{Own: at(7), Any: at(31)})
	lease.Spec.RenewTime = new(metav1.NewMicroTime(at(40)))
	hear(41, Heard{Own: at(41), Any: at(41)})
	lease.UID = "made anew"
	lease.Spec.RenewTime = new(metav1.NewMicroTime(at(50)))
	hear(51, Heard{Own: at(41), Any: at(41)})
	// Without a gap means that no renewal was overdue.
	for _, tc := range []struct{ heard, since float64 }{{60, 60}, {74.9, 60}, {89.9, 89.9}, {100, 89.9}} {
		lease.Spec.RenewTime = new(metav1.NewMicroTime(at(tc.heard)))
		e.Hear(lease, at(tc.heard))
		if got := e.Last("a").Since; !got.Equal(at(tc.since)) {
			t.Errorf("heard at %v: without a gap since %v", tc.heard, got)
		}
	}
	e.Forget("a")
	if got := e.Last("a"); got != (Heard{}) {
		t.Errorf("forgotten: got %+v", got)
	}
}

func TestSpokeAt(t *testing.T) {
	node := &corev1.Node{Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(at(0))},
	}}}
	spoke := func(want float64, heard Heard) {
		t.Helper()
		if got := SpokeAt(node, heard, at(1000)); !got.Equal(at(want)) {
			t.Errorf("got %s, want %vs", got.Sub(epoch), want)
		}
	}
	spoke(980, Heard{Own: at(980)})
	spoke(950, Heard{})
	node.Status.Conditions[0] = corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, LastTransitionTime: metav1.NewTime(at(500))}
	spoke(450, Heard{})
	// It is kept while the node is vouched for, by whomever.
	lease, e := leaseAt(at(0)), NewEar(time.Hour)
	for i, by := range []string{"b", "c"} {
		if renew(lease, beatAt(at(float64(30+40*i)), at(float64(25+40*i))), by, Heard{}, 0, at(float64(10*i)), at(float64(31+40*i))) != renewed {
			t.Fatal("not renewed")
		}
		e.Hear(lease, at(31))
		if got := e.Last("a").Spoke; !got.Equal(at(0)) || Remembered(lease).By != by {
			t.Errorf("got %v, %+v", got, Remembered(lease))
		}
	}
	lease.Spec.RenewTime = new(metav1.NewMicroTime(at(100)))
	if e.Hear(lease, at(100)); !e.Last("a").Spoke.IsZero() {
		t.Errorf("it speaks: got %v", e.Last("a").Spoke)
	}
}

func TestStanding(t *testing.T) {
	lease := leaseAt(at(0))
	node := &corev1.Node{Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, LastTransitionTime: metav1.NewTime(at(0))},
		{Type: "Other", Status: corev1.ConditionTrue},
	}}}
	kinds := func() string {
		var out []string
		for _, c := range node.Status.Conditions {
			out = append(out, string(c.Type)+"="+string(c.Status))
		}
		return strings.Join(out, " ")
	}
	if tell(node, standingOf(lease, Heard{}, at(0), at(0)), at(0)) || closeTo(node, false, at(0)) {
		t.Errorf("nobody vouches: %s", kinds())
	}
	if renew(lease, beatAt(at(30), at(25)), "b", Heard{}, 0, at(0), at(31)) != renewed {
		t.Fatal("not renewed")
	}
	heard := Heard{Any: at(31)}
	s := standingOf(lease, heard, at(0), at(32))
	if !s.vouched || s.until != 59*time.Second || !tell(node, s, at(32)) || !closeTo(node, true, at(32)) {
		t.Fatalf("vouched for: %+v %s", s, kinds())
	}
	if got := kinds(); got != "Ready=True Other=True YurtNodeVouchedFor=True" {
		t.Errorf("got %s", got)
	}
	if c := node.Status.Conditions[0]; !c.LastTransitionTime.Time.Equal(at(32)) || !strings.Contains(c.Message, "brought by b") {
		t.Errorf("Ready: %+v", c)
	}
	if c := node.Status.Conditions[2]; !c.LastTransitionTime.Time.Equal(at(31)) || !strings.Contains(c.Message, "b vouches for it") {
		t.Errorf("vouched for: %+v", c)
	}
	if tell(node, s, at(33)) || closeTo(node, true, at(33)) {
		t.Error("said twice")
	}
	// The voucher falls silent too.
	s = standingOf(lease, heard, at(0), at(92))
	if s.vouched || !tell(node, s, at(92)) || !closeTo(node, false, at(92)) || kinds() != "Ready=True Other=True" || len(node.Spec.Taints) > 0 {
		t.Errorf("nobody vouches any more: %+v %s %v", s, kinds(), node.Spec.Taints)
	}
	// A new manager gives it the time that the old one would have.
	if s = standingOf(lease, Heard{}, at(90), at(92)); !s.vouched {
		t.Errorf("a new manager: %+v", s)
	}
}
