package lifecycle

import (
	"encoding/json"
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
	"github.com/yurt-edge/yurt/internal/manager/vouch"
)

const (
	grace      = 40 * time.Second
	stockGrace = 50 * time.Second // Kubernetes' own, as it is by default
	interval   = 10 * time.Second // of heartbeats
	notices    = 15 * time.Second // by when a hub has found that its link is down, and told a peer
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func silent(name string, since time.Time) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, LastTransitionTime: metav1.NewTime(since)},
	}}}
}

func TestDying(t *testing.T) {
	now := epoch.Add(time.Hour)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	lost := func(name string, at time.Time) member {
		return member{node: silent(name, later(epoch, at.Add(stockGrace))), Heard: vouch.Heard{Own: at, Any: at}, silent: at}
	}
	heard := func(name string, since, own time.Time) member {
		n := silent(name, now)
		n.Status.Conditions[0].Status = corev1.ConditionTrue
		return member{node: n, Heard: vouch.Heard{Since: since, Own: own, Any: own}, silent: own}
	}
	created := func(m member, at time.Time) member {
		m.node.CreationTimestamp = metav1.NewTime(at)
		return m
	}
	joined := func(m member, at time.Time) member {
		m.joined = at
		return m
	}
	unheard := func(m member) member {
		m.Own, m.Any, m.silent = time.Time{}, time.Time{}, ago(30*time.Minute) // since when the manager listens
		return m
	}
	after := func(m member, own, alone time.Time) member {
		m.Own, m.Spoke = own, alone
		return m
	}
	carried := func(m member) member {
		m.carried = true
		return m
	}
	buried := lost("b", ago(time.Hour))
	bury(buried.node, now)
	speaks := heard("r", epoch, now)
	crowd := []member{speaks}
	for i := range heartbeat.MaxKept + 1 {
		crowd = append(crowd, lost(fmt.Sprintf("c%02d", i), ago(time.Hour)))
	}
	since := func(at time.Time, n int) []member {
		return append([]member{heard("r", at, now)}, crowd[1:n]...)
	}
	for name, tc := range map[string]struct {
		members []member
		want    string
	}{
		"nobody is heard":       {[]member{lost("a", ago(time.Hour))}, ""},
		"another is heard":      {[]member{speaks, lost("a", ago(time.Minute))}, "a"},
		"not for long enough":   {[]member{speaks, lost("a", ago(grace-1))}, ""},
		"the pool is just back": {[]member{heard("r", ago(grace-1), now), lost("a", epoch)}, ""},
		"one after the other, none of them for long": {[]member{
			heard("q", epoch, ago(50*time.Second)), heard("r", ago(30*time.Second), now), lost("a", ago(time.Minute)),
		}, ""},
		"cut at about the same":      {[]member{heard("r", epoch, ago(50*time.Second)), lost("a", ago(time.Minute))}, ""},
		"Kubernetes sees it":         {[]member{speaks, heard("a", epoch, ago(time.Hour))}, ""},
		"it is dead already":         {[]member{speaks, buried}, ""},
		"the longest silent first":   {[]member{lost("a", ago(time.Minute)), speaks, lost("b", ago(30*time.Minute))}, "b"},
		"as many as are vouched for": {crowd[:len(crowd)-1], "c00"},
		"more than can be":           {crowd, ""},
		"in two turns, too early":    {since(ago(2*grace-1), heartbeat.MaxCarried+2), ""},
		"in two turns":               {since(ago(2*grace), heartbeat.MaxCarried+2), "c00"},
		"in one turn":                {since(ago(grace), heartbeat.MaxCarried+1), "c00"},

		"its heartbeat is not judged yet":   {[]member{speaks, carried(lost("a", ago(judged*grace-1)))}, ""},
		"its heartbeat is none":             {[]member{speaks, carried(lost("a", ago(judged*grace)))}, "a"},
		"the heartbeat of one, not another": {[]member{speaks, carried(lost("a", ago(2*grace))), lost("b", ago(grace))}, "b"},

		// Who came after it fell silent is not known to its hub, and cannot vouch.
		"a new node is heard":                       {[]member{created(heard("r", ago(20*time.Minute), now), ago(30*time.Minute)), lost("a", ago(40*time.Minute))}, ""},
		"a new node, by a new manager":              {[]member{created(heard("r", ago(20*time.Minute), now), ago(50*time.Minute)), unheard(lost("a", ago(55*time.Minute)))}, ""},
		"an old node, by a new manager":             {[]member{created(heard("r", ago(20*time.Minute), now), ago(2*time.Hour)), unheard(lost("a", ago(55*time.Minute)))}, "a"},
		"a new node, after one that vouched":        {[]member{created(heard("r", ago(20*time.Minute), now), ago(50*time.Minute)), after(lost("a", ago(time.Minute)), ago(time.Hour), time.Time{})}, ""},
		"the same, by a new manager":                {[]member{created(heard("r", ago(20*time.Minute), now), ago(50*time.Minute)), after(lost("a", ago(time.Minute)), time.Time{}, ago(time.Hour))}, ""},
		"an old node, after one that vouched":       {[]member{created(heard("r", ago(20*time.Minute), now), ago(2*time.Hour)), after(lost("a", ago(time.Minute)), time.Time{}, ago(time.Hour))}, "a"},
		"one of another pool is heard":              {[]member{joined(speaks, ago(30*time.Minute)), lost("a", ago(40*time.Minute))}, ""},
		"one of another pool, before that":          {[]member{joined(speaks, ago(41*time.Minute)), lost("a", ago(40*time.Minute))}, "a"},
		"it came silent from another pool":          {[]member{speaks, joined(lost("a", ago(40*time.Minute)), ago(30*time.Minute))}, ""},
		"it came from another pool, and then died":  {[]member{speaks, joined(lost("a", ago(40*time.Minute)), ago(41*time.Minute))}, "a"},
		"a new node beside one that was there then": {[]member{created(heard("r", ago(time.Minute), now), ago(time.Minute)), speaks, lost("a", ago(40*time.Minute))}, "a"},
	} {
		got := ""
		if n := new(pool).dying(tc.members, grace, now); n != nil {
			got = n.Name
		}
		if got != tc.want {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
	}
	// One at a time, however often it is looked.
	p, members := &pool{}, []member{speaks, lost("a", ago(time.Minute)), lost("b", ago(time.Minute))}
	if n := p.dying(members, grace, now); n == nil || n.Name != "a" {
		t.Fatalf("got %v", n)
	}
	bury(members[1].node, now)
	if n := p.dying(members, grace, now.Add(grace/lookEvery-1)); n != nil {
		t.Errorf("at once after that: got %s", n.Name)
	}
	if n := p.dying(members, grace, now.Add(grace/lookEvery)); n == nil || n.Name != "b" {
		t.Errorf("then: got %v", n)
	}
}

func TestMeet(t *testing.T) {
	p := &pool{}
	meet := func(at int, names ...string) string {
		var members []member
		for _, name := range names {
			members = append(members, member{node: silent(name, epoch)})
		}
		p.meet(members, epoch.Add(time.Duration(at)*time.Second))
		var out []string
		for _, m := range members {
			s := "-"
			if !m.joined.IsZero() {
				s = fmt.Sprint(m.joined.Sub(epoch).Seconds())
			}
			out = append(out, s)
		}
		return strings.Join(out, " ")
	}
	for i, tc := range []struct {
		names []string
		want  string
	}{
		{[]string{"a", "b"}, "- -"}, // were there before
		{[]string{"a", "b", "c"}, "- - 1"},
		{[]string{"a", "c"}, "- 1"},
		{[]string{"a", "b", "c"}, "- 3 1"}, // it was away
		{nil, ""},
		{[]string{"a"}, "5"},
	} {
		if got := meet(i, tc.names...); got != tc.want {
			t.Errorf("%d: got %q, want %q", i, got, tc.want)
		}
	}
}

func TestBuryAndTend(t *testing.T) {
	taints := func(n *corev1.Node) string {
		var out []string
		for _, taint := range n.Spec.Taints {
			out = append(out, taint.ToString())
		}
		return strings.Join(out, " ")
	}
	n := silent("a", epoch)
	n.Spec.Taints = []corev1.Taint{{Key: "mine", Effect: corev1.TaintEffectNoExecute}}
	bury(n, epoch)
	const dead = "mine:NoExecute node.kubernetes.io/unreachable:NoExecute"
	if taints(n) != dead || n.Annotations[apps.Dead] != "2026-01-01T00:00:00Z" || !isDead(n) {
		t.Fatalf("buried: %s %v", taints(n), n.Annotations)
	}
	if tend(n, epoch) {
		t.Error("a dead node was changed")
	}
	n.Spec.Taints = n.Spec.Taints[:1]
	if !tend(n, epoch) || taints(n) != dead {
		t.Errorf("a taint that was lost: %s", taints(n))
	}
	// It came and went again: what was said before means nothing.
	n.Status.Conditions[0].LastTransitionTime = metav1.NewTime(epoch.Add(time.Minute))
	n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute})
	if isDead(n) || !tend(n, epoch) || taints(n) != "mine:NoExecute" || n.Annotations[apps.Dead] != "" {
		t.Errorf("silent anew: %s %v", taints(n), n.Annotations)
	}
	if tend(n, epoch) {
		t.Error("changed twice")
	}
	// A node that says itself that it is not ready is Kubernetes' affair.
	n.Status.Conditions[0].Status = corev1.ConditionFalse
	n.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute}}
	if tend(n, epoch) {
		t.Errorf("not ready: %s", taints(n))
	}
}

// site is a pool in which links are cut and machines die, with the stock
// controller and the manager as they see it from the cloud.
type site struct {
	rng   *rand.Rand
	now   time.Time
	nodes []*simulated

	// The manager, nil while it is down.
	ear  *vouch.Ear
	pool pool
	tick time.Time

	heal  time.Time // when the cut of the pool ends, if it is a short one
	grows bool      // nodes join
}

type simulated struct {
	node  *corev1.Node
	lease *coordinationv1.Lease
	alive bool
	died  time.Time
	up    bool // its own link
	since time.Time
	spoke time.Time       // when it last renewed its lease, or tried to
	knows map[string]bool // who is in the pool, as it last heard from the cloud
	// seen is when the stock controller last saw the lease renewed.
	seen time.Time
}

// step is a second.
func (s *site) step() {
	s.now = s.now.Add(time.Second)
	if !s.heal.IsZero() && !s.now.Before(s.heal) {
		s.heal = time.Time{}
		for _, n := range s.nodes {
			s.set(n, true)
		}
	}
	for _, n := range s.nodes {
		for _, other := range s.nodes {
			if n.up {
				n.knows[other.node.Name] = true
			}
		}
		if n.alive && s.now.Sub(n.spoke) >= interval {
			n.spoke = s.now.Add(time.Duration(s.rng.IntN(2000)) * time.Millisecond)
			if n.up {
				s.renew(n, "")
				s.carry(n, true)
			}
		}
		if n.alive && n.up {
			s.carry(n, false)
		}
	}
	for _, n := range s.nodes {
		ready := &n.node.Status.Conditions[0]
		if s.now.Sub(n.seen) > stockGrace && ready.Status != corev1.ConditionUnknown {
			ready.Status, ready.LastTransitionTime = corev1.ConditionUnknown, metav1.NewTime(s.now)
		}
	}
	if s.ear != nil && !s.now.Before(s.tick) {
		s.tick = s.now.Add(grace/lookEvery + time.Duration(s.rng.IntN(2000))*time.Millisecond)
		s.manage()
	}
}

func (s *site) renew(n *simulated, by string) {
	vouched := vouch.ByAnother(n.lease)
	n.lease.Spec.RenewTime = new(metav1.NewMicroTime(s.now))
	if by != "" {
		m := vouch.Memory{By: by, Renewed: *n.lease.Spec.RenewTime, Spoke: metav1.NewTime(vouch.SpokeAt(n.node, s.ear.Last(n.node.Name), s.now))}
		if vouched {
			m.Spoke = vouch.Remembered(n.lease).Spoke
		}
		text, err := json.Marshal(m)
		if err != nil {
			panic(err)
		}
		n.lease.Annotations = map[string]string{apps.VouchedFor: string(text)}
	}
	n.seen = s.now
	n.node.Status.Conditions[0].Status = corev1.ConditionTrue
	if s.ear != nil {
		s.ear.Hear(n.lease, s.now)
	}
}

// carry has the manager renew, on the word of n, the leases of those who have
// been without a link for long enough to know it: of those that are carried
// already when n renews its own, of the others at once.
func (s *site) carry(n *simulated, renews bool) {
	if s.ear == nil {
		return
	}
	for _, other := range s.nodes {
		if other != n && other.alive && !other.up && other.knows[n.node.Name] && (renews || !vouch.ByAnother(other.lease)) &&
			s.now.Sub(other.since) >= notices && heartbeat.Due(s.now.Sub(s.ear.Last(other.node.Name).Any), 4*interval) {
			s.renew(other, n.node.Name)
		}
	}
}

func (s *site) manage() {
	members := make([]member, len(s.nodes))
	for i, n := range s.nodes {
		h := s.ear.Last(n.node.Name)
		members[i] = member{node: n.node, Heard: h, silent: later(h.Any, s.ear.Began(s.now))}
	}
	s.pool.meet(members, s.now)
	dead := s.pool.dying(members, grace, s.now)
	for _, n := range s.nodes {
		if n.node == dead {
			bury(n.node, s.now)
		} else {
			tend(n.node, s.now)
		}
	}
}

// TestRandomSchedules cuts links, one or all, lets machines die and come back
// and the manager go down. Whatever happens, a node that lives is not dead to
// the cloud, and a node that died is, in time, if somebody was there to tell.
func TestRandomSchedules(t *testing.T) {
	deaths := 0
	for seed := range uint64(800) {
		rng := rand.New(rand.NewPCG(seed, 4))
		s := &site{rng: rng, now: epoch, ear: vouch.NewEar(grace), grows: seed%4 == 0}
		for range 1 + rng.IntN(5) {
			s.join(epoch.Add(-time.Hour))
		}
		var told time.Time // since when the manager is up and some node has had its link without a pause
		var witness *simulated
		for range 1200 {
			s.step()
			s.mishap()
			if witness == nil || !witness.alive || !witness.up || s.ear == nil {
				witness, told = nil, s.now
				for _, n := range s.nodes {
					if s.ear != nil && n.alive && n.up {
						witness = n
					}
				}
			}
			for i, n := range s.nodes {
				if n.alive && isDead(n.node) {
					t.Fatalf("seed %d, %s: %s lives and is taken for dead", seed, s.now.Sub(epoch), n.node.Name)
				}
				// Those before it in the queue take one look each.
				bound := stockGrace + grace + 2*interval + time.Duration(len(s.nodes)+1)*(grace/lookEvery+2*time.Second)
				if !n.alive && witness != nil && !s.grows && s.now.Sub(later(n.died, told)) > bound {
					if !isDead(n.node) {
						for _, x := range s.nodes {
							h := vouch.Heard{}
							if s.ear != nil {
								h = s.ear.Last(x.node.Name)
							}
							sec := func(at time.Time) float64 { return at.Sub(epoch).Seconds() }
							t.Logf("%s alive %v up %v since %v created %v own %v any %v since %v alone %v gone %v knows %v died %v", x.node.Name, x.alive, x.up, sec(x.since), sec(x.node.CreationTimestamp.Time), sec(h.Own), sec(h.Any), sec(h.Since), sec(h.Spoke), sec(goneAt(x.node)), x.knows, sec(x.died))
						}
						t.Logf("began %v", s.ear.Began(s.now).Sub(epoch))
						t.Fatalf("seed %d, %s: n%d died %s ago and is not found", seed, s.now.Sub(epoch), i, s.now.Sub(n.died))
					}
					deaths++
				}
			}
		}
	}
	if deaths == 0 {
		t.Error("no schedule in which a death had to be found")
	}
}

// join brings a new node, whose own link is up.
func (s *site) join(created time.Time) {
	name := fmt.Sprint("n", len(s.nodes))
	n := &simulated{
		node: silent(name, s.now), alive: true, up: true, seen: s.now, knows: map[string]bool{},
		lease: &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}},
	}
	n.node.CreationTimestamp = metav1.NewTime(created)
	s.nodes = append(s.nodes, n)
	s.renew(n, "")
}

func (s *site) set(n *simulated, up bool) {
	if n.up != up {
		n.up, n.since = up, s.now
	}
}

// mishap changes the world now and then.
func (s *site) mishap() {
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	switch s.rng.IntN(400) {
	case 0, 1:
		s.set(n, !n.up)
	case 2, 9: // the whole pool, at one stroke
		for _, n := range s.nodes {
			s.set(n, false)
		}
		if s.rng.IntN(2) == 0 { // and not for long
			s.heal = s.now.Add(time.Duration(10+s.rng.IntN(40)) * time.Second)
		}
	case 10:
		if s.grows && len(s.nodes) < 8 {
			s.join(s.now)
		}
	case 3:
		for _, n := range s.nodes {
			s.set(n, true)
		}
	case 4:
		if n.alive {
			n.alive, n.died = false, s.now
		}
	case 5:
		if !n.alive && n.up {
			n.alive = true
			s.renew(n, "")
		}
	case 6:
		s.ear = nil
	case 7, 8:
		if s.ear == nil {
			s.ear, s.pool, s.tick = vouch.NewEar(grace), pool{}, s.now
			for _, n := range s.nodes {
				s.ear.Hear(n.lease, s.now)
			}
		}
	}
}
