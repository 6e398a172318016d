package vouch

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/heartbeat"
)

// Memory is what the manager knows of the last heartbeat that it believed. It
// stands on the lease, so that it outlives the manager.
type Memory struct {
	By    string      `json:"by"`
	Since metav1.Time `json:"since"`
	// Spoke is when the node last spoke for itself, or a while before that.
	Spoke metav1.Time `json:"spoke"`
	// Time is that of the heartbeat: none that is not later counts.
	Time metav1.MicroTime `json:"time"`
	// Renewed is the renewTime that the manager wrote for it: while it stands
	// there, the node has not spoken for itself since.
	Renewed metav1.MicroTime       `json:"renewed"`
	Ready   corev1.ConditionStatus `json:"ready"`
}

// Remembered returns the memory of a lease; zero if there is none.
func Remembered(lease *coordinationv1.Lease) (m Memory) {
	if json.Unmarshal([]byte(lease.Annotations[apps.VouchedFor]), &m) != nil {
		return Memory{} // what is unreadable was not written by the manager
	}
	return m
}

// ByAnother reports whether the lease was last renewed on the word of another
// node.
func ByAnother(lease *coordinationv1.Lease) bool {
	m := Remembered(lease)
	return m.By != "" && lease.Spec.RenewTime != nil && m.Renewed.Equal(lease.Spec.RenewTime)
}

const defaultLease = 40 * time.Second

func durationOf(lease *coordinationv1.Lease) time.Duration {
	if s := lease.Spec.LeaseDurationSeconds; s != nil && *s > 0 {
		return time.Duration(*s) * time.Second
	}
	return defaultLease
}

// verdict is what becomes of a heartbeat.
type verdict string

const (
	renewed    verdict = "renewed"
	notYet     verdict = "not-yet"    // the lease is good for a while
	superseded verdict = "superseded" // the node was heard later than that, or it is one that was seen
	forged     verdict = "forged"     // not signed by the node
	stale      verdict = "stale"      // from another time
	foreign    verdict = "other-pool" // carried by a node that may not, of this pool or another
	unknown    verdict = "unknown"    // there is no such node, or no longer
	unreadable verdict = "unreadable" // no heartbeats at all
)

// refused tells the verdicts on which somebody should look.
var refused = []verdict{forged, stale, foreign, unreadable}

// worth reports what would become of a heartbeat if it were proved. Most are
// not needed, and to prove one costs more than all else. The clock by which it
// was signed is ahead of that by which the node was heard.
func worth(lease *coordinationv1.Lease, b heartbeat.Beat, heard Heard, ahead time.Duration, now time.Time) verdict {
	switch {
	case !b.Time.After(Remembered(lease).Time.Time) || !b.Time.After(heard.Own.Add(ahead)):
		return superseded
	case !heartbeat.Due(now.Sub(heard.Any), durationOf(lease)):
		return notYet
	}
	return renewed
}

// again returns after how long a heartbeat that came too early is worth
// something, if that is sooner than the carrier's next renewal brings another;
// else 0. It is when the node has just fallen silent, and when it was last
// renewed out of step with the carrier.
func again(lease *coordinationv1.Lease, heard Heard, now time.Time) time.Duration {
	silence, life := now.Sub(heard.Any), durationOf(lease)
	// In step it is one interval of renewals, at most 0.26 of the life.
	if ByAnother(lease) && silence < life*27/100 {
		return 0
	}
	return life*3/8 - silence
}

// renew renews the lease of a node on a heartbeat that is proved, and returns
// what became of that.
//
// The lease gets what the kubelet would have written: its own clock may be
// wrong, and when it speaks for itself again Kubernetes takes only what is
// later than the last. Spoke is when the node last spoke for itself.
func renew(lease *coordinationv1.Lease, b heartbeat.Beat, by string, heard Heard, ahead time.Duration, spoke, now time.Time) verdict {
	if v := worth(lease, b, heard, ahead, now); v != renewed {
		return v
	}
	m := Remembered(lease)
	if !ByAnother(lease) {
		m.By, m.Spoke = "", metav1.NewTime(spoke)
	}
	if m.By != by {
		m.By, m.Since = by, metav1.NewTime(now)
	}
	m.Time, m.Renewed, m.Ready = b.Time, b.Renewed, b.Ready
	if was := lease.Spec.RenewTime; was != nil && !m.Renewed.After(was.Time) {
		m.Renewed = metav1.NewMicroTime(was.Add(time.Microsecond))
	}
	m.Renewed = metav1.NewMicroTime(m.Renewed.Truncate(time.Microsecond))
	text, err := json.Marshal(m)
	if err != nil {
		return unreadable // a struct of strings and times always is
	}
	if lease.Annotations == nil {
		lease.Annotations = map[string]string{}
	}
	lease.Annotations[apps.VouchedFor] = string(text)
	lease.Annotations[apps.DelegateHeartbeat] = "true"
	renewTime := m.Renewed
	lease.Spec.RenewTime = &renewTime
	return renewed
}

// SpokeAt is when a node last spoke for itself. A manager that has not heard that
// goes by what Kubernetes saw, at the latest, within its grace period.
func SpokeAt(node *corev1.Node, heard Heard, now time.Time) time.Time {
	const stockGrace = 50 * time.Second
	if !heard.Own.IsZero() {
		return heard.Own
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionUnknown {
			now = c.LastTransitionTime.Time
		}
	}
	return now.Add(-stockGrace)
}

// settle takes the sign of delegation from the lease of a node that speaks for
// itself. The memory stays: an old heartbeat stays old.
func settle(lease *coordinationv1.Lease) bool {
	if ByAnother(lease) || lease.Annotations[apps.DelegateHeartbeat] == "" {
		return false
	}
	delete(lease.Annotations, apps.DelegateHeartbeat)
	return true
}

// standing is whether a node is vouched for, and by whom.
type standing struct {
	vouched bool
	memory  Memory
	until   time.Duration // from now, when it ends if nobody says more
}

// standingOf tells it from the lease and from when that was heard.
func standingOf(lease *coordinationv1.Lease, heard Heard, began, now time.Time) standing {
	s := standing{memory: Remembered(lease)}
	if ByAnother(lease) {
		last := heard.Any
		if last.IsZero() {
			last = began
		}
		s.until = last.Add(durationOf(lease) * 3 / 2).Sub(now)
		s.vouched = s.until > 0
	}
	return s
}

// tell writes the standing into the conditions of a node, and reports whether
// they changed. If Kubernetes lost sight of the node it gets back the word of
// its kubelet, which came with the heartbeat.
func tell(node *corev1.Node, s standing, now time.Time) bool {
	is := func(kind corev1.NodeConditionType) func(corev1.NodeCondition) bool {
		return func(c corev1.NodeCondition) bool { return c.Type == kind }
	}
	at := slices.IndexFunc(node.Status.Conditions, is(apps.VouchedForCondition))
	if !s.vouched {
		node.Status.Conditions = slices.DeleteFunc(node.Status.Conditions, is(apps.VouchedForCondition))
		return at >= 0
	}
	changed := false
	want := corev1.NodeCondition{
		Type: apps.VouchedForCondition, Status: corev1.ConditionTrue, Reason: "NoLink",
		Message:            fmt.Sprintf("the node has no link to the cloud; %s vouches for it", s.memory.By),
		LastTransitionTime: s.memory.Since, LastHeartbeatTime: s.memory.Since,
	}
	switch {
	case at < 0:
		node.Status.Conditions = append(node.Status.Conditions, want)
		changed = true
	case node.Status.Conditions[at].Message != want.Message:
		node.Status.Conditions[at] = want
		changed = true
	}
	for i := range node.Status.Conditions {
		c := &node.Status.Conditions[i]
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionUnknown && (s.memory.Ready == corev1.ConditionTrue || s.memory.Ready == corev1.ConditionFalse) {
			c.Status, c.Reason = s.memory.Ready, "VouchedFor"
			c.Message = "the kubelet's word, brought by " + s.memory.By
			c.LastHeartbeatTime, c.LastTransitionTime = metav1.NewTime(now), metav1.NewTime(now)
			changed = true
		}
	}
	return changed
}

// closeTo keeps new pods from a node that cannot hear of them, and opens it
// again. It reports whether the node changed.
func closeTo(node *corev1.Node, vouched bool, now time.Time) bool {
	taint := corev1.Taint{Key: apps.UnschedulableTaint, Effect: corev1.TaintEffectNoSchedule}
	ours := func(t corev1.Taint) bool { return t.MatchTaint(&taint) }
	has := slices.ContainsFunc(node.Spec.Taints, ours)
	switch {
	case vouched && !has:
		taint.TimeAdded = new(metav1.NewTime(now))
		node.Spec.Taints = append(node.Spec.Taints, taint)
	case !vouched && has:
		node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, ours)
	}
	return vouched != has
}
