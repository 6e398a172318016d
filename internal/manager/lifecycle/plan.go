package lifecycle

import (
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/heartbeat"
)

// voice is since when the nodes of a pool have been heard without a gap, and
// when one was heard last. What counts is what nodes say for themselves.
type voice struct{ since, last time.Time }

// next takes the last moment at which any node of the pool was heard. A gap
// longer than grace is a cut of the pool: then it begins anew.
func (v voice) next(heard time.Time, grace time.Duration) voice {
	switch {
	case !heard.After(v.last):
	case heard.Sub(v.last) > grace:
		v = voice{heard, heard}
	default:
		v.last = heard
	}
	return v
}

// member is a node of a pool.
type member struct {
	node *corev1.Node
	// own is when it last spoke for itself, any when it did or was vouched
	// for; since when the manager listens if it was not heard.
	own, any time.Time
}

// gone is since when Kubernetes knows nothing of the node; zero while it does.
func gone(node *corev1.Node) string {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionUnknown {
			return c.LastTransitionTime.UTC().Format(time.RFC3339)
		}
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
// is gone, nobody vouches for it, and for grace others of the pool have been
// heard without a gap, so the pool is not cut. Of several it is the one that is
// silent longest. One at a time, as Kubernetes does it, since many at once are
// more often a broken network than dead machines.
func dying(members []member, v voice, grace time.Duration) *corev1.Node {
	wait, ok := patience(members, v, grace)
	if !ok {
		return nil
	}
	var first *member
	for i := range members {
		m := &members[i]
		if gone(m.node) == "" || isDead(m.node) || m.node.DeletionTimestamp != nil {
			continue
		}
		others := v.last.Sub(later(v.since, m.any)) // for how long they were heard while it was not
		if others < wait {
			continue
		}
		if first == nil || m.any.Before(first.any) || m.any.Equal(first.any) && m.node.Name < first.node.Name {
			first = m
		}
	}
	if first == nil {
		return nil
	}
	return first.node
}

// patience is how long a node must be silent to be dead: as many times grace as
// those that are heard need turns to vouch for those that are not. If these are
// more than they can vouch for, that nobody vouches for one proves nothing.
func patience(members []member, v voice, grace time.Duration) (wait time.Duration, ok bool) {
	speaking := 0
	for i := range members {
		if own := members[i].own; !own.IsZero() && v.last.Sub(own) < grace {
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
		if m.own.After(since) {
			names = append(names, m.node.Name)
		}
	}
	slices.Sort(names)
	if len(names) > 3 {
		names = append(names[:3], "others")
	}
	return strings.Join(names, ", ")
}
