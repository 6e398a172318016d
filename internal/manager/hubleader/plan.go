package hubleader

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// candidate is a node as the election sees it.
type candidate struct {
	name    string
	address string // internal IP, empty if it has none
	labels  map[string]string
	// fit says that the node is ready, its hub is sound and its link is up.
	fit bool
	// never says that it cannot lead however it does: it goes, or has no hub.
	never bool
	// foreign says that its hub is OpenYurt's. Neither kind takes anything from
	// a hub of the other.
	foreign bool
}

// elect returns the leaders of a pool, in the order in which hubs try them.
// Leaders that still qualify stay, at their place, so that nothing moves that
// need not; free places go to the candidates in an order that is random but
// always the same, so that replicas of the manager agree, those first whose hub
// is of the kind that most nodes have. While nobody qualifies, who led last still
// does: a site that is cut off, or without power, returns to the leaders that its
// hubs know, and not each hub to the cloud. It then reports that these are the
// last.
func elect(pool *v1beta2.NodePool, candidates []candidate) (leaders []v1beta2.Leader, last bool) {
	if !pool.Spec.EnableLeaderElection {
		return nil, false
	}
	may := map[string]candidate{}
	for _, c := range candidates {
		if c.fit && c.address != "" && qualifies(pool, c) {
			may[c.name] = c
		}
	}
	if last = len(may) == 0; last {
		for _, c := range candidates {
			if led := slices.ContainsFunc(pool.Status.LeaderEndpoints, func(l v1beta2.Leader) bool { return l.NodeName == c.name }); led && !c.never &&
				c.address != "" && qualifies(pool, c) {
				may[c.name] = c
			}
		}
	}
	places := int(max(pool.Spec.LeaderReplicas, 1))
	for _, l := range pool.Status.LeaderEndpoints {
		if c, ok := may[l.NodeName]; ok && len(leaders) < places {
			leaders = append(leaders, v1beta2.Leader{NodeName: c.name, Address: c.address})
			delete(may, c.name)
		}
	}
	rest := make([]candidate, 0, len(may))
	for _, c := range may {
		rest = append(rest, c)
	}
	most := mostAreForeign(candidates)
	slices.SortFunc(rest, func(a, b candidate) int {
		return cmp.Or(first(a.foreign == most, b.foreign == most), byLot(pool.Name)(a, b))
	})
	for _, c := range rest[:min(len(rest), places-len(leaders))] {
		leaders = append(leaders, v1beta2.Leader{NodeName: c.name, Address: c.address})
	}
	return leaders, last
}

// contacts returns nodes by which hubs of the pool find each other, leaders or
// not, by name. Those that are fit come before those that are not, and who was
// one before who was none.
func contacts(pool *v1beta2.NodePool, candidates []candidate) []v1beta2.Leader {
	if !pool.Spec.InterConnectivity {
		return nil
	}
	was := map[string]bool{}
	for _, c := range pool.Status.Contacts {
		was[c.NodeName] = true
	}
	may := slices.DeleteFunc(slices.Clone(candidates), func(c candidate) bool { return c.never || c.foreign || c.address == "" })
	slices.SortFunc(may, func(a, b candidate) int {
		return cmp.Or(first(a.fit, b.fit), first(was[a.name], was[b.name]), byLot(pool.Name)(a, b))
	})
	var out []v1beta2.Leader
	for _, c := range may[:min(len(may), v1beta2.MaxContacts)] {
		out = append(out, v1beta2.Leader{NodeName: c.name, Address: c.address})
	}
	slices.SortFunc(out, func(a, b v1beta2.Leader) int { return strings.Compare(a.NodeName, b.NodeName) })
	return out
}

// mostAreForeign tells which kind of hubs a new leader is of use to.
func mostAreForeign(candidates []candidate) bool {
	n := 0
	for _, c := range candidates {
		if c.foreign {
			n++
		}
	}
	return 2*n > len(candidates)
}

// told are the leaders that the ConfigMap names. Hubs of OpenYurt go by it, and
// ours do not: where there are any, leaders of ours are left out, at which they
// would fail and not go to the cloud.
func told(leaders []v1beta2.Leader, candidates []candidate) []v1beta2.Leader {
	foreign := map[string]bool{}
	for _, c := range candidates {
		if c.foreign {
			foreign[c.name] = true
		}
	}
	if len(foreign) == 0 {
		return leaders
	}
	return slices.DeleteFunc(slices.Clone(leaders), func(l v1beta2.Leader) bool { return !foreign[l.NodeName] })
}

// first puts who is before who is not.
func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

func byLot(pool string) func(a, b candidate) int {
	return func(a, b candidate) int {
		return cmp.Or(cmp.Compare(lot(pool, a.name), lot(pool, b.name)), strings.Compare(a.name, b.name))
	}
}

func qualifies(pool *v1beta2.NodePool, c candidate) bool {
	return pool.Spec.LeaderElectionStrategy != v1beta2.ElectMark ||
		labels.SelectorFromSet(pool.Spec.LeaderNodeLabelSelector).Matches(labels.Set(c.labels))
}

// lot is what a node draws in its pool.
func lot(pool, node string) uint64 {
	h := fnv.New128a()
	h.Write([]byte(pool + "/" + node))
	return binary.BigEndian.Uint64(h.Sum(nil)[8:])
}

// ready is the pool's condition LeaderReady, nil where no leaders are wanted.
func ready(pool *v1beta2.NodePool, leaders []v1beta2.Leader, last bool, now metav1.Time) *v1beta2.NodePoolCondition {
	if !pool.Spec.EnableLeaderElection {
		return nil
	}
	c := v1beta2.NodePoolCondition{Type: v1beta2.LeaderReady, Status: corev1.ConditionTrue, Reason: "Elected"}
	switch want := int(max(pool.Spec.LeaderReplicas, 1)); {
	case len(leaders) == 0:
		c.Status, c.Reason = corev1.ConditionFalse, "NoCandidate"
		c.Message = "no node is ready with its link up and an internal IP"
		if pool.Spec.LeaderElectionStrategy == v1beta2.ElectMark {
			c.Message += ", and matches leaderNodeLabelSelector"
		}
		c.Message += "; nodes follow the cloud themselves"
	case last:
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, "NoneHeard", "no node is ready with its link up; who led last still does"
	case len(leaders) < want:
		c.Reason, c.Message = "FewCandidates", "fewer nodes can lead than leaderReplicas asks for"
	}
	c.LastTransitionTime = now
	for _, old := range pool.Status.Conditions {
		if old.Type == c.Type && old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
	}
	return &c
}
