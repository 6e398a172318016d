package pool

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// world is a pool whose hubs are machines and nothing else. Time is a number,
// and everything that happens follows from the seed.
type world struct {
	rand  *rand.Rand
	now   time.Time
	nodes []string
	hubs  map[string]*simulated
	cloud uint64 // the resource version that the cloud is at

	leaders []string
	deputy  map[string]string // as each hub knows it
	// cut are the ways that let nothing pass; a way to the cloud has no second
	// name.
	cut map[[2]string]bool
}

// simulated is a hub: its machine, and what it holds of the shared resources.
type simulated struct {
	machine  *member
	dead     bool
	version  uint64
	polled   time.Time
	wait     time.Duration // until the next poll
	switches int
}

func newWorld(seed uint64, nodes, leaders int) *world {
	w := &world{
		rand: rand.New(rand.NewPCG(seed, 2)), now: time.Unix(1e9, 0), hubs: map[string]*simulated{},
		cut: map[[2]string]bool{}, cloud: 1, deputy: map[string]string{},
	}
	for i := range nodes {
		node := fmt.Sprintf("n%d", i)
		w.nodes = append(w.nodes, node)
		w.hubs[node] = &simulated{machine: newMember(node, seed+uint64(i), defaults), polled: w.now.Add(-time.Duration(w.rand.Int64N(int64(pollEvery)))), wait: pollEvery}
	}
	w.elect(w.nodes[:leaders])
	return w
}

func (w *world) elect(leaders []string) {
	w.leaders = slices.Clone(leaders)
	for _, h := range w.hubs {
		h.machine.setPool(w.now, "pool", w.leaders, w.deputy[h.machine.self], slices.DeleteFunc(slices.Clone(w.nodes), func(n string) bool { return slices.Contains(w.leaders, n) }))
	}
}

// passes reports whether packets go from one to another, and back.
func (w *world) passes(a, b string) bool {
	return w.way(a, b) && (b == cloud || !w.hubs[b].dead)
}

func (w *world) way(a, b string) bool { return !w.cut[[2]string{a, b}] && !w.cut[[2]string{b, a}] }

var defaults = patience{DefaultGrace, DefaultReturn}

const tick = 250 * time.Millisecond

// step lets a tick pass: hubs ask each other, decide, and take what their
// upstream has.
func (w *world) step(t *testing.T) {
	t.Helper()
	w.now = w.now.Add(tick)
	w.cloud++
	for _, node := range w.nodes {
		h := w.hubs[node]
		if h.dead {
			continue
		}
		h.machine.setLink(w.passes(node, cloud))
		if w.now.Sub(h.polled) >= min(h.wait, pollEvery) {
			h.polled = w.now
			for _, other := range h.machine.asked(w.now) {
				if !w.passes(node, other) {
					h.machine.failedOf(w.now, other, w.hubs[other].dead && w.way(node, other))
					continue
				}
				s := State{Node: other}
				o := w.hubs[other].machine
				s.Link = w.passes(other, cloud)
				s.Live, s.Via = o.live(w.now)
				h.machine.heard(w.now, other, s)
				live, _ := h.machine.live(w.now)
				o.hint(w.now, node, h.machine.link, live)
			}
		}
		before, was := h.machine.current, h.machine.chosen
		upstream, ok, wait := h.machine.decide(w.now)
		if wait <= 0 {
			t.Fatalf("%s: %s waits for %s", w.now, node, wait)
		}
		h.wait = wait
		if was && upstream != before {
			h.switches++
		}
		if ok {
			w.take(t, node, upstream)
		}
	}
}

// take lets a stream run: from where the hub is to where the upstream is. That
// the version of a hub never falls, whatever the upstream, is what makes one
// version one truth.
func (w *world) take(t *testing.T, node, upstream string) {
	t.Helper()
	h := w.hubs[node]
	if !w.passes(node, upstream) {
		return
	}
	has := w.cloud
	if upstream != cloud {
		has = w.hubs[upstream].version
	}
	if has > w.cloud {
		t.Fatalf("%s: %s is told of version %d, the cloud is at %d", w.now, node, has, w.cloud)
	}
	h.version = max(h.version, has)
}

// reaches returns the hubs and the cloud from which there is a way to the
// cloud that the hub can take without going in a circle.
func (w *world) reachable(node string) bool {
	seen, todo := map[string]bool{node: true}, []string{node}
	for len(todo) > 0 {
		n := todo[0]
		todo = todo[1:]
		if w.passes(n, cloud) {
			return true
		}
		for _, o := range w.nodes {
			if !seen[o] && w.passes(n, o) {
				seen[o] = true
				todo = append(todo, o)
			}
		}
	}
	return false
}

// bound is how long a hub may be without news while there is a way to the
// cloud. Each hub on the way may take its grace, one after the other.
func bound(hops int) time.Duration {
	least, spread := defaults.ofMember()
	return time.Duration(hops) * (least + spread + silentFor + 2*pollEvery)
}

// TestNobodyIsStuck lets hubs die and ways break at random, and stops at some
// moment: then every hub that has a way to the cloud hears of what happens
// there, within its grace, and no hub has ever gone back.
func TestNobodyIsStuck(t *testing.T) {
	t.Parallel()
	for seed := range uint64(80) {
		w := newWorld(seed, 2+int(seed%5), 1+int(seed%2))
		for range 40 {
			w.disturb()
			for range 1 + w.rand.IntN(80) {
				w.step(t)
			}
		}
		at := w.cloud
		for range int(bound(4) / tick) {
			w.step(t)
		}
		for _, node := range w.nodes {
			h := w.hubs[node]
			if !h.dead && w.reachable(node) && h.version <= at {
				t.Fatalf("seed %d: %s is at version %d, the cloud was at %d %s ago; it follows %q (leaders %v, cut %v)",
					seed, node, h.version, at, bound(4), h.machine.current, w.leaders, w.cut)
			}
		}
	}
}

// disturb changes one thing: a link, a way between two, a hub, or the list of
// leaders.
func (w *world) disturb() {
	node := w.nodes[w.rand.IntN(len(w.nodes))]
	switch other := w.nodes[w.rand.IntN(len(w.nodes))]; w.rand.IntN(8) {
	case 0, 1, 2:
		w.cut[[2]string{node, cloud}] = !w.cut[[2]string{node, cloud}]
	case 3:
		if node != other {
			w.cut[[2]string{node, other}] = !w.cut[[2]string{node, other}]
		}
	case 4:
		for _, n := range w.nodes {
			w.cut[[2]string{n, cloud}] = true // the whole site
		}
	case 5:
		h := w.hubs[node]
		h.dead = !h.dead
		if !h.dead { // it starts anew, with what it had
			h.machine = newMember(node, w.rand.Uint64(), defaults)
			w.elect(w.leaders)
		}
	case 7: // a list of contacts on its way: hubs may differ
		for _, n := range w.nodes {
			if w.rand.IntN(3) > 0 {
				w.deputy[n] = other
			}
		}
		w.elect(w.leaders)
	case 6:
		w.rand.Shuffle(len(w.nodes), func(i, j int) { w.nodes[i], w.nodes[j] = w.nodes[j], w.nodes[i] })
		w.elect(w.nodes[:1+w.rand.IntN(2)])
	}
}

// TestDeputy kills the only leader of a pool: one other asks the cloud, and the
// others follow that one, until there is another leader.
func TestDeputy(t *testing.T) {
	t.Parallel()
	for seed := range uint64(5) {
		w := newWorld(seed, 20, 1)
		for _, node := range w.nodes {
			w.deputy[node] = "n7"
		}
		w.elect(w.leaders)
		direct := func() (n int) {
			for _, h := range w.hubs {
				if !h.dead && h.machine.current == cloud {
					n++
				}
			}
			return n
		}
		settle := func(what string, d time.Duration, follow string, most int) {
			t.Helper()
			for range int(d / tick) {
				w.step(t)
				if n := direct(); n > most {
					t.Fatalf("seed %d: %s: %d hubs ask the cloud at once", seed, what, n)
				}
			}
			for node, h := range w.hubs {
				want := follow
				if node == follow {
					want = cloud
				}
				if !h.dead && (h.machine.current != want || w.cloud-h.version > 8) {
					t.Fatalf("seed %d: %s: %s follows %q, is %d versions behind", seed, what, node, h.machine.current, w.cloud-h.version)
				}
			}
		}
		settle("all is well", 3*time.Minute, "n0", 20)
		for node, h := range w.hubs {
			if slices.Contains(h.machine.asked(w.now), "n7") {
				t.Fatalf("seed %d: %s asks a deputy that nobody needs", seed, node)
			}
		}
		for _, h := range w.hubs {
			h.switches = 0
		}
		w.hubs["n0"].dead = true
		settle("the leader is dead", bound(1), "n7", 1)
		for node, h := range w.hubs {
			if !h.dead && h.switches != 1 {
				t.Fatalf("seed %d: %s switched %d times", seed, node, h.switches)
			}
		}
		w.elect([]string{"n3"})
		settle("another leads", 5*time.Minute, "n3", 2)
		w.hubs["n3"].dead = true
		w.cut[[2]string{"n7", cloud}] = true
		for range int(bound(2) / tick) {
			w.step(t)
		}
		for node, h := range w.hubs {
			if !h.dead && w.cloud-h.version > 8 {
				t.Fatalf("seed %d: the deputy has no link: %s is %d versions behind", seed, node, w.cloud-h.version)
			}
		}
		delete(w.cut, [2]string{"n7", cloud})
		settle("the deputy has its link again", 5*time.Minute, "n7", 20)
	}
}

// TestPoolReturnsTogether cuts a whole pool off and lets its links return within
// two seconds, in any order: one hub asks the cloud, and all others hear that
// one. Where the first leader's link does not return, the second or the deputy
// does, or both.
func TestPoolReturnsTogether(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		w := newWorld(seed, 2+int(seed)*2, 1+int(seed)%2)
		lost := seed%4 >= 2 && len(w.nodes) > 2
		for _, node := range w.nodes {
			w.deputy[node] = w.nodes[len(w.nodes)-1]
		}
		w.elect(w.leaders)
		for range int(time.Minute / tick) {
			w.step(t)
		}
		for _, node := range w.nodes {
			w.cut[[2]string{node, cloud}] = true
		}
		for range int((5*time.Second + time.Duration(w.rand.Int64N(int64(30*time.Second)))) / tick) {
			w.step(t)
		}
		begun, back, asked := w.now, map[string]time.Duration{}, map[string]bool{}
		for _, node := range w.nodes {
			back[node] = time.Duration(w.rand.Int64N(int64(2 * time.Second)))
		}
		if lost {
			delete(back, "n0")
		}
		for range int(15 * time.Second / tick) {
			for node, after := range back {
				if w.now.Sub(begun) >= after {
					delete(w.cut, [2]string{node, cloud})
				}
			}
			w.step(t)
			for node, h := range w.hubs {
				if h.machine.current == cloud && w.passes(node, cloud) {
					asked[node] = true
				}
			}
		}
		want := w.leaders[:1]
		if lost {
			want = append(slices.Clone(w.leaders[1:]), w.deputy["n0"])
		}
		for node := range asked {
			if !slices.Contains(want, node) {
				t.Errorf("seed %d: %d hubs, the leader's link returns: %v; the cloud was asked by %v", seed, len(w.nodes), !lost, asked)
			}
		}
		if len(asked) == 0 {
			t.Errorf("seed %d: %d hubs, the leader's link returns: %v; nobody asked the cloud", seed, len(w.nodes), !lost)
		}
		for node, h := range w.hubs {
			if w.cloud-h.version > 8 {
				t.Errorf("seed %d: %s is %d versions behind, follows %q", seed, node, w.cloud-h.version, h.machine.current)
			}
		}
	}
}

// TestHiccupsMoveNobody breaks anything for less than the least grace.
func TestHiccupsMoveNobody(t *testing.T) {
	t.Parallel()
	for seed := range uint64(30) {
		w := newWorld(seed, 6, 2)
		for range int(time.Minute / tick) {
			w.step(t)
		}
		before := map[string]string{}
		for node, h := range w.hubs {
			before[node], h.switches = h.machine.current, 0
		}
		for range 30 {
			way := [2]string{w.nodes[w.rand.IntN(6)], cloud}
			if w.rand.IntN(2) == 0 {
				way[1] = w.nodes[w.rand.IntN(6)]
			}
			w.cut[way] = true
			// What a peer does not answer it is asked again two seconds later.
			least, _ := defaults.ofLeader()
			for range int((least - pollEvery) / tick) {
				w.step(t)
			}
			delete(w.cut, way)
			for range int(10 * time.Second / tick) {
				w.step(t)
			}
		}
		for node, h := range w.hubs {
			if h.switches > 0 || h.machine.current != before[node] {
				t.Fatalf("seed %d: %s switched %d times, from %q to %q", seed, node, h.switches, before[node], h.machine.current)
			}
		}
	}
}

// TestOneHubAsksTheCloud settles a pool: one hub asks the cloud, whoever of
// those that can, and all hear it.
func TestOneHubAsksTheCloud(t *testing.T) {
	t.Parallel()
	direct := func(w *world) (out []string) {
		for _, node := range w.nodes {
			if h := w.hubs[node]; !h.dead && h.machine.current == cloud && w.passes(node, cloud) {
				out = append(out, node)
			}
		}
		return out
	}
	for seed := range uint64(20) {
		w := newWorld(seed, 8, 2)
		check := func(what, want string) {
			t.Helper()
			for range int(3 * time.Minute / tick) {
				w.step(t)
			}
			if got := direct(w); len(got) != 1 || want != "" && got[0] != want {
				t.Fatalf("seed %d: %s: the cloud is asked by %v, want %s", seed, what, got, want)
			}
			for _, node := range w.nodes {
				if h := w.hubs[node]; !h.dead && w.cloud-h.version > 8 {
					t.Fatalf("seed %d: %s: %s is %d versions behind", seed, what, node, w.cloud-h.version)
				}
			}
		}
		check("all is well", "n0")
		w.cut[[2]string{"n0", cloud}] = true
		check("the first leader is cut off", "n1")
		w.cut[[2]string{"n1", cloud}] = true
		check("all leaders are cut off", "")
		clear(w.cut)
		check("all is well again", "n0")
		w.hubs["n0"].dead = true
		check("the first leader is dead", "n1")
	}
}

// TestCutPoolAsksLittle: where a whole pool is cut off, its leader asks all
// others once, and goes on to ask a few of them at a time, each again and again.
// The others leave that to it while it answers, and then to its deputy.
func TestCutPoolAsksLittle(t *testing.T) {
	t.Parallel()
	const nodes = 40
	w := newWorld(1, nodes, 1)
	for _, node := range w.nodes {
		w.deputy[node] = "n7"
	}
	w.elect(w.leaders)
	run := func(d time.Duration, each func()) {
		t.Helper()
		for range int(d / tick) {
			w.step(t)
			each()
		}
	}
	run(time.Minute, func() {})
	for _, node := range w.nodes {
		w.cut[[2]string{node, cloud}] = true
	}
	asksAll := func(node string, since time.Time) {
		t.Helper()
		for other, p := range w.hubs[node].machine.peers {
			if !p.heard.After(since) && !p.failed.After(since) {
				t.Errorf("%s has not asked %s in %s", node, other, w.now.Sub(since))
			}
		}
	}
	asked := map[string]map[string]bool{} // but for the leader
	begun := w.now
	run(30*time.Second, func() {})
	asksAll("n0", begun)
	since := w.now
	run(time.Minute, func() {
		for node, h := range w.hubs {
			for other, p := range h.machine.peers {
				if other != "n0" && other != "n7" && p.heard.After(since) {
					if asked[node] == nil {
						asked[node] = map[string]bool{}
					}
					asked[node][other] = true
				}
			}
			if n := len(h.machine.asked(w.now)); n > 2+nodes/20 {
				t.Fatalf("%s asks %d hubs at a time", node, n)
			}
		}
	})
	asksAll("n0", w.now.Add(-45*time.Second))
	for node := range w.hubs {
		if n := len(asked[node]); node != "n0" && n > int(time.Minute/seekEvery)+1 {
			t.Errorf("%s asked %d hubs in a minute, though its leader does", node, n)
		}
	}
	w.hubs["n0"].dead = true
	begun = w.now
	run(time.Minute, func() {})
	asksAll("n7", begun)
}

// TestHelpIsFound gives one hub of a pool that is cut off its link back: all
// others hear the cloud through it.
func TestHelpIsFound(t *testing.T) {
	t.Parallel()
	for seed := range uint64(10) {
		w := newWorld(seed, 30, 1)
		for range int(time.Minute / tick) {
			w.step(t)
		}
		for _, node := range w.nodes {
			w.cut[[2]string{node, cloud}] = true
		}
		for range int(time.Minute / tick) {
			w.step(t)
		}
		helper := w.nodes[1+w.rand.IntN(29)]
		delete(w.cut, [2]string{helper, cloud})
		took := time.Duration(0)
		for all := false; !all; took += tick {
			if w.step(t); took > 20*time.Second {
				t.Fatalf("seed %d: %s helps nobody", seed, helper)
			}
			all = true
			for _, h := range w.hubs {
				all = all && w.cloud-h.version <= 8*2
			}
		}
		m := w.hubs["n0"].machine
		if m.current != helper || !m.hasLink(w.now, helper) {
			t.Errorf("seed %d: the leader follows %q, %s has a link: %v", seed, m.current, helper, m.hasLink(w.now, helper))
		}
	}
}

// TestSwitchesAreSpread kills the leader of a large pool without another: those
// who leave it do so one by one.
func TestSwitchesAreSpread(t *testing.T) {
	t.Parallel()
	w := newWorld(7, 100, 1)
	for range int(time.Minute / tick) {
		w.step(t)
	}
	w.hubs["n0"].dead = true
	most, all := 0, 0
	for range int(bound(1) / tick) {
		before := 0
		for _, h := range w.hubs {
			before += h.switches
		}
		w.step(t)
		now := -before
		for _, h := range w.hubs {
			now += h.switches
		}
		most, all = max(most, now), all+now
	}
	if all != 99 || most > 15 {
		t.Errorf("%d hubs left the dead leader, up to %d in a quarter of a second", all, most)
	}
}

// TestFirstStartAsksTheCloudOnce starts all hubs of a pool within two seconds,
// in any order: one of them takes the cloud and all others wait for it, unless
// they cannot reach it.
func TestFirstStartAsksTheCloudOnce(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		w := newWorld(seed, 2+int(seed)%40, 1+int(seed%2))
		begin, apart := map[string]time.Time{}, w.nodes[len(w.nodes)-1]
		for _, h := range w.hubs {
			h.dead = true
		}
		for _, node := range w.nodes {
			begin[node] = w.now.Add(time.Duration(w.rand.Int64N(int64(2 * time.Second))))
		}
		if seed%4 == 0 && len(w.nodes) > 2 {
			w.cut[[2]string{apart, "n0"}], w.cut[[2]string{apart, "n1"}] = true, true
		}
		asked := map[string]time.Duration{}
		for range int(10 * time.Second / tick) {
			for _, node := range w.nodes {
				if h := w.hubs[node]; h.dead && !w.now.Before(begin[node]) {
					h.dead, h.machine = false, newMember(node, w.rand.Uint64(), defaults)
					w.elect(w.leaders)
				}
			}
			w.step(t)
			for _, node := range w.nodes {
				if h := w.hubs[node]; h.machine.chosen && h.machine.current == cloud && asked[node] == 0 {
					asked[node] = w.now.Sub(begin[node])
				}
			}
		}
		delete(asked, "n0")
		if w.cut[[2]string{apart, "n0"}] {
			if took, ok := asked[apart]; !ok || took > pollEvery {
				t.Errorf("seed %d: who cannot reach the leaders took the cloud after %s, %v", seed, took, ok)
			}
			delete(asked, apart)
		}
		if len(asked) > 0 {
			t.Errorf("seed %d: the cloud was asked by %v too", seed, asked)
		}
	}
}

// TestPoweredUpSiteAsksTheCloudOnce boots the machines of a site that hold
// nothing within half a minute, the leaders at any place among them: one hub
// takes the cloud. Where the leader never comes, all take it in the end, and one
// that holds something takes it at once.
func TestPoweredUpSiteAsksTheCloudOnce(t *testing.T) {
	t.Parallel()
	for seed := range uint64(60) {
		w := newWorld(seed, 2+int(seed)%49, 1+int(seed%2))
		begin, asked := map[string]time.Time{}, map[string]bool{}
		for node, h := range w.hubs {
			h.dead = true
			begin[node] = w.now.Add(time.Duration(w.rand.Int64N(int64(bareMemberStart))))
		}
		lost := seed%4 == 0
		if seed%2 == 1 { // the second leader is late
			begin["n1"] = begin["n0"].Add(bareLeaderStart / 2)
		}
		for range int(3 * bareMemberStart / tick) {
			for _, node := range w.nodes {
				h := w.hubs[node]
				if h.dead && !w.now.Before(begin[node]) && (node != "n0" || !lost) {
					h.dead, h.machine = false, newMember(node, w.rand.Uint64(), defaults)
					h.machine.setBare(true)
					w.elect(w.leaders)
				}
			}
			for _, a := range w.nodes { // a machine that boots answers nothing at all
				for _, b := range w.leaders {
					w.cut[[2]string{a, b}] = a != b && (w.hubs[a].dead || w.hubs[b].dead)
				}
			}
			w.step(t)
			for _, node := range w.nodes {
				if m := w.hubs[node].machine; m.chosen && m.current == cloud {
					asked[node] = true
				}
			}
		}
		if delete(asked, "n0"); len(asked) > 0 != lost {
			t.Errorf("seed %d: the leader comes: %v; the cloud was asked by %v too", seed, !lost, asked)
		}
	}
}

func TestJoiningWaitsForTheLeader(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	m := newMember("b", 1, defaults)
	m.setLink(true)
	if _, ok, _ := m.decide(now); ok {
		t.Error("decided before the pool was known")
	}
	m.setPool(now, "pool", []string{"a"}, "", nil)
	if _, ok, wait := m.decide(now); ok || wait > startPoll {
		t.Errorf("decided before the leader could answer: %v, %v", ok, wait)
	}
	m.heard(now, "a", State{Live: true})
	if got, ok, _ := m.decide(now); !ok || got != "a" {
		t.Errorf("follows %q, %v", got, ok)
	}
	m = newMember("b", 1, defaults)
	m.setLink(true)
	m.setPool(now, "pool", []string{"a"}, "", nil)
	m.failedOf(now, "a", true)
	if _, ok, _ := m.decide(now.Add(memberStart - time.Millisecond)); ok {
		t.Error("decided while the leader's hub could start")
	}
	if got, ok, _ := m.decide(now.Add(memberStart + startSpread)); !ok || got != cloud {
		t.Errorf("the leader's hub does not start: follows %q, %v", got, ok)
	}
	m = newMember("b", 1, defaults)
	m.setLink(true)
	m.setPool(now, "pool", []string{"a"}, "", nil)
	m.failedOf(now, "a", false)
	if got, ok, _ := m.decide(now); !ok || got != cloud {
		t.Errorf("the leader's machine does not answer: follows %q, %v", got, ok)
	}
	bare := newMember("b", 1, defaults)
	bare.setLink(true)
	bare.setBare(true)
	bare.setPool(now, "pool", []string{"a"}, "", nil)
	bare.failedOf(now, "a", false)
	if _, ok, wait := bare.decide(now.Add(bareMemberStart - time.Millisecond)); ok || wait > startPoll {
		t.Errorf("it holds nothing, and decided before the leader's machine could boot: %v, %v", ok, wait)
	}
	if got, ok, _ := bare.decide(now.Add(bareMemberStart * 3 / 2)); !ok || got != cloud {
		t.Errorf("it holds nothing, and the leader's machine does not boot: follows %q, %v", got, ok)
	}
	m.setPool(now.Add(time.Minute), "another", []string{"c"}, "", nil)
	m.heard(now.Add(time.Minute), "c", State{Live: true})
	if got, ok, _ := m.decide(now.Add(time.Minute)); !ok || got != "c" {
		t.Errorf("in another pool: follows %q, %v", got, ok)
	}
	m = newMember("b", 1, defaults)
	m.setLink(true)
	m.setPool(now, "", nil, "", nil)
	if got, ok, _ := m.decide(now); !ok || got != cloud {
		t.Errorf("without a pool: follows %q, %v", got, ok)
	}
}

// TestMembershipDeputy finds the same deputy on each hub.
func TestMembershipDeputy(t *testing.T) {
	leaders, contacts := []Leader{{"b", "192.0.2.2"}}, []Leader{{"a", "192.0.2.1"}, {"b", "192.0.2.2"}, {"c", "192.0.2.3"}}
	for name, tc := range map[string]struct {
		m    Membership
		want string
	}{
		"the first contact":      {Membership{Nodes: []string{"a", "b", "c"}, Leaders: leaders, Contacts: contacts}, "a"},
		"a leader is none":       {Membership{Nodes: []string{"b", "c"}, Leaders: leaders, Contacts: contacts[1:]}, "c"},
		"nor who left the pool":  {Membership{Nodes: []string{"b", "c"}, Leaders: leaders, Contacts: contacts}, "c"},
		"no contact but leaders": {Membership{Nodes: []string{"b"}, Leaders: leaders, Contacts: contacts[1:2]}, ""},
		"no leaders are wanted":  {Membership{Nodes: []string{"a", "b", "c"}, Contacts: contacts}, ""},
	} {
		if got := tc.m.deputy(); got != tc.want {
			t.Errorf("%s: got %q", name, got)
		}
	}
}
