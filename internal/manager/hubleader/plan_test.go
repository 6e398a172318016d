package hubleader

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

func candidates(names ...string) []candidate {
	var out []candidate
	for _, n := range names {
		c := candidate{name: strings.TrimRight(n, "!-*"), address: "10.0.0." + n[:1], fit: !strings.HasSuffix(n, "!")}
		if strings.HasSuffix(n, "-") {
			c.address = ""
		}
		if strings.HasSuffix(n, "*") {
			c.labels = map[string]string{"lead": "yes"}
		}
		out = append(out, c)
	}
	return out
}

func led(strategy v1beta2.LeaderElectionStrategy, replicas int32, leaders ...string) *v1beta2.NodePool {
	p := &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: v1beta2.NodePoolSpec{
		EnableLeaderElection: true, LeaderElectionStrategy: strategy, LeaderReplicas: replicas,
		LeaderNodeLabelSelector: map[string]string{"lead": "yes"},
	}}
	for _, l := range leaders {
		p.Status.LeaderEndpoints = append(p.Status.LeaderEndpoints, v1beta2.Leader{NodeName: l, Address: "10.0.0." + l})
	}
	return p
}

func names(leaders []v1beta2.Leader) string {
	var out []string
	for _, l := range leaders {
		out = append(out, l.NodeName)
	}
	return strings.Join(out, " ")
}

func TestElect(t *testing.T) {
	const random, mark = v1beta2.ElectRandom, v1beta2.ElectMark
	off := led(random, 1, "1")
	off.Spec.EnableLeaderElection = false
	for name, tc := range map[string]struct {
		pool *v1beta2.NodePool
		all  []candidate
		want string
	}{
		"off":                               {off, candidates("1"), ""},
		"nobody":                            {led(random, 1), nil, ""},
		"only one can":                      {led(random, 2), candidates("1!", "2-", "3"), "3"},
		"leaders stay at their place":       {led(random, 2, "3", "1"), candidates("1", "2", "3"), "3 1"},
		"a leader that is unfit goes":       {led(random, 2, "3", "1"), candidates("1", "2", "3!"), "1 2"},
		"a leader that left the pool goes":  {led(random, 1, "9"), candidates("2"), "2"},
		"fewer wanted":                      {led(random, 1, "3", "1"), candidates("1", "2", "3"), "3"},
		"strategy mark drops the unmarked":  {led(mark, 2, "1", "2"), candidates("1", "2*", "3*"), "2 3"},
		"nobody is marked":                  {led(mark, 2, "1"), candidates("1", "2"), ""},
		"nobody is heard: the last stay":    {led(random, 2, "3", "1"), candidates("1!", "2!", "3!"), "3 1"},
		"nobody is heard, and one has left": {led(random, 2, "3", "1"), candidates("1!", "2!"), "1"},
		"nobody is heard or marked":         {led(mark, 1, "1"), candidates("1!", "2!"), ""},
		"the last leader is going":          {led(random, 1, "1"), []candidate{{name: "1", address: "10.0.0.1", never: true}}, ""},
		"no replicas said is one":           {led(random, 0), candidates("1"), "1"},
	} {
		got, last := elect(tc.pool, tc.all)
		if names(got) != tc.want {
			t.Errorf("%s: got %q, want %q", name, names(got), tc.want)
		}
		if last && slices.ContainsFunc(got, func(l v1beta2.Leader) bool { return candidateNamed(tc.all, l.NodeName).fit }) {
			t.Errorf("%s: %q are said to be the last, and fit", name, names(got))
		}
	}
	moved := candidates("1")
	moved[0].address = "10.9.9.9"
	if got, _ := elect(led(random, 1, "1"), moved); len(got) != 1 || got[0].Address != "10.9.9.9" {
		t.Errorf("a leader with a new address: got %v", got)
	}
}

func candidateNamed(all []candidate, name string) candidate {
	return all[slices.IndexFunc(all, func(c candidate) bool { return c.name == name })]
}

// TestForeignHubs has pools with hubs of both kinds: those that most nodes have
// lead, the ConfigMap names no leader at which hubs of OpenYurt would fail, and
// ours do not look for each other at theirs.
func TestForeignHubs(t *testing.T) {
	for _, tc := range []struct {
		name, foreign string
		leads         string // before
		leaders, told string
		contacts      string
	}{
		{"none", "", "", "1 2", "1 2", "1 2 3 4"},
		{"some", "1 2", "", "3 4", "", "3 4"},
		{"most", "1 2 3", "", "1 2", "1 2", "4"},
		{"all", "1 2 3 4", "", "1 2", "1 2", ""},
		{"one leads, and stays", "1", "1", "1 2", "1", "2 3 4"},
		{"the leaders were the first to get ours", "3 4", "1 2", "1 2", "", "1 2"},
	} {
		pool := led(v1beta2.ElectRandom, 2, strings.Fields(tc.leads)...)
		pool.Spec.InterConnectivity = true
		all := candidates("1", "2", "3", "4")
		for i := range all {
			all[i].foreign = slices.Contains(strings.Fields(tc.foreign), all[i].name)
		}
		leaders, _ := elect(pool, all)
		sorted := strings.Fields(names(leaders))
		slices.Sort(sorted)
		if got := strings.Join(sorted, " "); got != tc.leaders {
			t.Errorf("%s: %q lead, want %q", tc.name, got, tc.leaders)
		}
		sorted = strings.Fields(names(told(leaders, all)))
		slices.Sort(sorted)
		if got := strings.Join(sorted, " "); got != tc.told {
			t.Errorf("%s: hubs of OpenYurt are told of %q, want %q", tc.name, got, tc.told)
		}
		if got := names(contacts(pool, all)); got != tc.contacts {
			t.Errorf("%s: contacts %q, want %q", tc.name, got, tc.contacts)
		}
	}
}

// TestContactsOfAPool: all of a small pool, leaders elected or not; of a large one as
// many as are allowed, and no other ones as long as these do.
func TestContactsOfAPool(t *testing.T) {
	pool := led(v1beta2.ElectRandom, 1)
	pool.Spec.EnableLeaderElection = false
	if got := contacts(pool, candidates("1")); got != nil {
		t.Errorf("of a pool whose nodes do not reach each other: %v", got)
	}
	pool.Spec.InterConnectivity = true
	if got := names(contacts(pool, candidates("3", "2!", "1-", "4"))); got != "2 3 4" {
		t.Errorf("of a small pool: %s", got)
	}
	var all []candidate
	for i := range 20 {
		all = append(all, candidate{name: fmt.Sprintf("n%02d", i), address: fmt.Sprintf("10.0.0.%d", i), fit: i != 3})
	}
	pool.Status.Contacts = contacts(pool, all)
	before := names(pool.Status.Contacts)
	if len(pool.Status.Contacts) != v1beta2.MaxContacts || strings.Contains(before, "n03") {
		t.Fatalf("of a large pool: %s", before)
	}
	all[3].fit = true
	slices.Reverse(all)
	if got := names(contacts(pool, all)); got != before {
		t.Errorf("one more is fit: %s, and before %s", got, before)
	}
	gone := pool.Status.Contacts[0].NodeName
	all = slices.DeleteFunc(all, func(c candidate) bool { return c.name == gone })
	if got := contacts(pool, all); len(got) != v1beta2.MaxContacts || names(got[:1]) == gone {
		t.Errorf("without %s: %s", gone, names(got))
	}
	for i := range all {
		all[i].fit = false
	}
	if got := names(contacts(pool, all)); !strings.Contains(got, strings.Fields(before)[1]) {
		t.Errorf("nobody is heard: %s, and before %s", got, before)
	}
}

// TestElectIsRandomAndTheSameForAll: replicas agree whatever the order, and
// not every pool takes the same node.
func TestElectIsRandomAndTheSameForAll(t *testing.T) {
	chosen := map[string]int{}
	for i := range 100 {
		pool := led(v1beta2.ElectRandom, 1)
		pool.Name = fmt.Sprintf("pool-%d", i)
		all := candidates("1", "2", "3", "4")
		first, _ := elect(pool, all)
		slices.Reverse(all)
		if second, _ := elect(pool, all); names(second) != names(first) {
			t.Fatalf("%s: got %s, then %s", pool.Name, names(first), names(second))
		}
		chosen[names(first)]++
	}
	for _, n := range []string{"1", "2", "3", "4"} {
		if chosen[n] < 10 {
			t.Errorf("of 100 pools node %s leads %d", n, chosen[n])
		}
	}
}

func TestCandidateOf(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*corev1.Node)
		fit    bool
	}{
		"ready":         {func(*corev1.Node) {}, true},
		"not ready":     {func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionUnknown }, false},
		"no hub":        {func(n *corev1.Node) { n.Labels = map[string]string{apps.EdgeWorkerLabel: "false"} }, false},
		"being removed": {func(n *corev1.Node) { n.DeletionTimestamp = &metav1.Time{Time: time.Now()} }, false},
		"link is down":  {func(n *corev1.Node) { n.Status.Conditions[1].Status = corev1.ConditionFalse }, false},
		"store is bad":  {func(n *corev1.Node) { n.Status.Conditions[2].Status = corev1.ConditionFalse }, false},
		"hub unknown":   {func(n *corev1.Node) { n.Status.Conditions = n.Status.Conditions[:1] }, true},
	} {
		n := &corev1.Node{Status: corev1.NodeStatus{
			Conditions: []corev1.NodeCondition{
				{Type: corev1.NodeReady, Status: corev1.ConditionTrue},
				{Type: "YurtHubLinkReady", Status: corev1.ConditionTrue},
				{Type: "YurtHubStoreReady", Status: corev1.ConditionTrue},
			},
			Addresses: []corev1.NodeAddress{{Type: corev1.NodeExternalIP, Address: "1.1.1.1"}, {Type: corev1.NodeInternalIP, Address: "10.0.0.1"}},
		}}
		tc.change(n)
		if got := candidateOf(n); got.fit != tc.fit || got.address != "10.0.0.1" {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

func TestLeaderReady(t *testing.T) {
	before, now := metav1.Unix(1000, 0), metav1.Unix(2000, 0)
	pool := led(v1beta2.ElectRandom, 2)
	pool.Status.Conditions = []v1beta2.NodePoolCondition{{Type: v1beta2.LeaderReady, Status: corev1.ConditionTrue, LastTransitionTime: before}}
	for _, tc := range []struct {
		leaders int
		last    bool
		status  corev1.ConditionStatus
		reason  string
		since   metav1.Time
	}{
		{2, false, "True", "Elected", before},
		{1, false, "True", "FewCandidates", before},
		{0, true, "False", "NoCandidate", now},
		{2, true, "False", "NoneHeard", now},
	} {
		got := ready(pool, make([]v1beta2.Leader, tc.leaders), tc.last, now)
		if got.Status != tc.status || got.Reason != tc.reason || got.LastTransitionTime != tc.since {
			t.Errorf("%d leaders: got %+v", tc.leaders, got)
		}
	}
	pool.Spec.EnableLeaderElection = false
	if got := ready(pool, nil, false, now); got != nil {
		t.Errorf("off: got %+v", got)
	}
}
