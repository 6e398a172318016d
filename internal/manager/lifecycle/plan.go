package lifecycle

import (
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/heartbeat"
	"github.com/yurt-edge/yurt/internal/manager/vouch"
)

// judged is within how many times the patience with a silent node a heartbeat
// that another brought of it has been judged at the latest. What is left then is
// none: nobody keeps a dead node alive with words that prove nothing.
const judged = 3

// pool is what the manager remembers of a pool.
type pool struct {
	buried time.Time            // when it last took a node of it for dead
	joined map[string]time.Time // when its nodes came; zero: before it looked first
}

// meet takes who is in the pool now.
func (p *pool) meet(members []member, now time.Time) {
	first := p.joined == nil
	joined := make(map[string]time.Time, len(members))
	for i := range members {
		m := &members[i]
		at, known := p.joined[m.node.Name]
		if !known && !first {
			at = now
		}
		joined[m.node.Name], m.joined = at, at
	}
	p.joined = joined
}

// member is a node of a pool.
type member struct {
	node *corev1.Node
	vouch.Heard
	// joined is when it came into the pool; zero: before the manager looked.
	joined time.Time
	// silent is since when nothing was heard of it, by itself or by another;
	// since when the manager listens if it was never heard.
	silent time.Time
	// carried tells that another brought a heartbeat of it that nobody has judged
	// yet, or that is none.
	carried bool
}

// knew reports whether the hub of the node, when it last spoke to the cloud, can
// have heard that other is in its pool. The manager may have begun later: then
// what counts is what the one before wrote down, or when Kubernetes lost sight
// of the node, less the time after which it does.
func (m *member) knew(other *member, grace time.Duration) bool {
	at := m.Own
	switch {
	case !at.IsZero():
	case !m.Spoke.IsZero():
		at = m.Spoke
	default:
		at = goneAt(m.node).Add(-grace * 5 / 4) // Kubernetes waits longer
		if at.After(m.silent) {
			at = m.silent
		}
	}
	return !later(other.joined, other.node.CreationTimestamp.Time).After(at)
}

// goneAt is since when Kubernetes knows nothing of the node; zero while it does.
func goneAt(node *corev1.Node) time.Time {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionUnknown {
			return c.LastTransitionTime.Time
		}
	}
	return time.Time{}
}

// gone is the same as the mark has it.
func gone(node *corev1.Node) string {
	if at := goneAt(node); !at.IsZero() {
		return at.UTC().Format(time.RFC3339)
	}
	return ""
}

// isDead reports whether the node is marked for this time that it is gone. A
// mark of an earlier time means nothing.
func isDead(node *corev1.Node) bool {
	mark := node.Annotations[apps.Dead]
	return mark != "" && mark == gone(node)
}

// dying returns which node of the pool to take for dead now, nil for none: it
// is gone, nobody vouches for it, and for grace another of the pool, which its
// hub knew, has been heard without a gap: that one would have vouched for it, and
// the pool is not cut. Of several it is the one that is silent longest. One at a
// time, as Kubernetes does it, since many at once are more often a broken network
// than dead machines.
func (p *pool) dying(members []member, grace time.Duration, now time.Time) *corev1.Node {
	wait, ok := patience(members, grace)
	if !ok || now.Sub(p.buried) < grace/lookEvery {
		return nil
	}
	var first *member
	for i := range members {
		m := &members[i]
		if gone(m.node) == "" || isDead(m.node) || m.node.DeletionTimestamp != nil {
			continue
		}
		if m.carried && now.Sub(m.silent) < judged*wait {
			continue
		}
		// Who comes silent from another pool knows nobody of this one.
		if m.Own.Before(m.joined) || missed(members, m, grace) < wait {
			continue
		}
		if first == nil || m.silent.Before(first.silent) || m.silent.Equal(first.silent) && m.node.Name < first.node.Name {
			first = m
		}
	}
	if first == nil {
		return nil
	}
	p.buried = now
	return first.node
}

// missed is for how long, at most, one other node was heard without a gap while
// this one was not.
func missed(members []member, m *member, grace time.Duration) (longest time.Duration) {
	for i := range members {
		other := &members[i]
		if both := other.Own.Sub(later(other.Since, m.silent)); both > longest && m.knew(other, grace) {
			longest = both
		}
	}
	return longest
}

// patience is how long a node must be silent to be dead: as many times grace as
// those that are heard need turns to vouch for those that are not. If these are
// more than they can vouch for, that nobody vouches for one proves nothing.
func patience(members []member, grace time.Duration) (wait time.Duration, ok bool) {
	var last time.Time
	for i := range members {
		last = later(last, members[i].Own)
	}
	speaking := 0
	for i := range members {
		if own := members[i].Own; !own.IsZero() && last.Sub(own) < grace {
			speaking++
		}
	}
	silent, turn := len(members)-speaking, speaking*heartbeat.MaxCarried
	turns := 1
	for silent > turns*turn {
		if turns++; turns > heartbeat.Turns {
			return 0, false
		}
	}
	return time.Duration(turns) * grace, true
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// bury marks the node as dead and lets Kubernetes evict its pods, each after
// the time that it tolerates.
func bury(node *corev1.Node, now time.Time) {
	if node.Annotations == nil {
		node.Annotations = map[string]string{}
	}
	node.Annotations[apps.Dead] = gone(node)
	evict := corev1.Taint{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}
	if !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.MatchTaint(&evict) }) {
		evict.TimeAdded = new(metav1.NewTime(now))
		node.Spec.Taints = append(node.Spec.Taints, evict)
	}
}

// tend returns whether the node changed: a mark that no longer holds goes, and
// so do the taints that evict for silence from a node that is not dead. A node
// that is dead has them.
func tend(node *corev1.Node, now time.Time) bool {
	taints := len(node.Spec.Taints)
	_, marked := node.Annotations[apps.Dead]
	if isDead(node) {
		bury(node, now)
		return len(node.Spec.Taints) != taints
	}
	delete(node.Annotations, apps.Dead)
	node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool {
		return t.Effect == corev1.TaintEffectNoExecute &&
			(t.Key == corev1.TaintNodeUnreachable || t.Key == corev1.TaintNodeNotReady && gone(node) != "")
	})
	return marked || len(node.Spec.Taints) != taints
}

// heardOf names some of the nodes that were heard since a moment, for people.
func heardOf(members []member, since time.Time) string {
	var names []string
	for _, m := range members {
		if m.Own.After(since) {
			names = append(names, m.node.Name)
		}
	}
	slices.Sort(names)
	if len(names) > 3 {
		names = append(names[:3], "others")
	}
	return strings.Join(names, ", ")
}
