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
	notices    = 20 * time.Second // by when a hub has found that its link is down
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestVoice(t *testing.T) {
	at := func(s int) time.Time { return epoch.Add(time.Duration(s) * time.Second) }
	v := voice{}
	for _, tc := range []struct{ heard, since, last int }{
		{10, 10, 10},
		{20, 10, 20},
		{20, 10, 20},    // nothing new
		{15, 10, 20},    // nor this
		{60, 10, 60},    // just within grace
		{101, 101, 101}, // a cut of the pool
		{110, 101, 110},
	} {
		if v = v.next(at(tc.heard), grace); v != (voice{at(tc.since), at(tc.last)}) {
			t.Errorf("heard at %d: since %s, last %s", tc.heard, v.since.Sub(epoch), v.last.Sub(epoch))
		}
	}
}

func silent(name string, since time.Time) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, LastTransitionTime: metav1.NewTime(since)},
	}}}
}

func TestDying(t *testing.T) {
	now := epoch.Add(time.Hour)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	ready := silent("r", now)
	ready.Status.Conditions[0].Status = corev1.ConditionTrue
	buried := silent("b", ago(time.Minute))
	bury(buried, now)
	speaks := member{node: ready, own: now, any: now}
	crowd := []member{speaks}
	for i := range heartbeat.MaxKept + 1 {
		crowd = append(crowd, member{node: silent(fmt.Sprintf("c%02d", i), now), any: ago(time.Hour)})
	}
	for name, tc := range map[string]struct {
		members []member
		v       voice
		want    string
	}{
		"nobody is heard":            {[]member{{node: silent("a", now), any: ago(time.Hour)}}, voice{}, ""},
		"others are heard":           {[]member{speaks, {node: silent("a", now), any: ago(time.Minute)}}, voice{epoch, now}, "a"},
		"not for long enough":        {[]member{{node: silent("a", now), any: ago(grace - 1)}}, voice{epoch, now}, ""},
		"the pool is just back":      {[]member{{node: silent("a", now), any: epoch}}, voice{ago(grace - 1), now}, ""},
		"cut at about the same":      {[]member{{node: silent("a", now), any: ago(time.Minute)}}, voice{epoch, ago(50 * time.Second)}, ""},
		"Kubernetes sees it":         {[]member{{node: ready, any: ago(time.Hour)}}, voice{epoch, now}, ""},
		"it is dead already":         {[]member{{node: buried, any: ago(time.Hour)}}, voice{epoch, now}, ""},
		"the longest silent first":   {[]member{{node: silent("a", now), any: ago(time.Minute)}, speaks, {node: silent("b", now), any: ago(time.Hour)}}, voice{epoch, now}, "b"},
		"as many as are vouched for": {crowd[:len(crowd)-1], voice{epoch, now}, "c00"},
		"more than can be":           {crowd, voice{epoch, now}, ""},
		"in two turns, too early":    {crowd[:heartbeat.MaxCarried+2], voice{ago(2*grace - 1), now}, ""},
		"in two turns":               {crowd[:heartbeat.MaxCarried+2], voice{ago(2 * grace), now}, "c00"},
		"in one turn":                {crowd[:heartbeat.MaxCarried+1], voice{ago(grace), now}, "c00"},
	} {
		got := ""
		if n := dying(tc.members, tc.v, grace); n != nil {
			got = n.Name
		}
		if got != tc.want {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
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
	ear   *vouch.Ear
	voice voice
	tick  time.Time
}

type simulated struct {
	node  *corev1.Node
	lease *coordinationv1.Lease
	alive bool
	died  time.Time
	up    bool // its own link
	since time.Time
	spoke time.Time // when it last renewed its lease, or tried to
	// seen is when the stock controller last saw the lease renewed.
	seen time.Time
}

// step is a second.
func (s *site) step() {
	s.now = s.now.Add(time.Second)
	for _, n := range s.nodes {
		if n.alive && s.now.Sub(n.spoke) >= interval {
			n.spoke = s.now.Add(time.Duration(s.rng.IntN(2000)) * time.Millisecond)
			if n.up {
				s.renew(n, "")
				s.carry(n)
			}
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
	n.lease.Spec.RenewTime = new(metav1.NewMicroTime(s.now))
	if by != "" {
		text, err := json.Marshal(vouch.Memory{By: by, Renewed: *n.lease.Spec.RenewTime})
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
// been without a link for long enough to know it.
func (s *site) carry(n *simulated) {
	if s.ear == nil {
		return
	}
	for _, other := range s.nodes {
		if other != n && other.alive && !other.up && s.now.Sub(other.since) > notices && s.now.Sub(s.ear.Last(other.node.Name).Any) >= grace/2 {
			s.renew(other, n.node.Name)
		}
	}
}

func (s *site) manage() {
	members := make([]member, len(s.nodes))
	var last time.Time
	for i, n := range s.nodes {
		h := s.ear.Last(n.node.Name)
		members[i] = member{n.node, h.Own, later(h.Any, s.ear.Began(s.now))}
		last = later(last, h.Own)
	}
	s.voice = s.voice.next(last, grace)
	dead := dying(members, s.voice, grace)
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
	for seed := range uint64(400) {
		rng := rand.New(rand.NewPCG(seed, 4))
		s := &site{rng: rng, now: epoch, ear: vouch.NewEar()}
		for i := range 1 + rng.IntN(5) {
			name := fmt.Sprint("n", i)
			n := &simulated{
				node: silent(name, epoch), alive: true, up: true, seen: epoch,
				lease: &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}},
			}
			s.nodes = append(s.nodes, n)
			s.renew(n, "")
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
				if !n.alive && witness != nil && s.now.Sub(later(n.died, told)) > bound {
					if !isDead(n.node) {
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

// mishap changes the world now and then.
func (s *site) mishap() {
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	set := func(n *simulated, up bool) {
		if n.up != up {
			n.up, n.since = up, s.now
		}
	}
	switch s.rng.IntN(400) {
	case 0, 1:
		set(n, !n.up)
	case 2: // the whole pool, at one stroke
		for _, n := range s.nodes {
			set(n, false)
		}
	case 3:
		for _, n := range s.nodes {
			set(n, true)
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
			s.ear, s.voice, s.tick = vouch.NewEar(), voice{}, s.now
			for _, n := range s.nodes {
				s.ear.Hear(n.lease, s.now)
			}
		}
	}
}
