package pool

import (
	"math/rand/v2"
	"slices"
	"time"
)

// What a hub waits for before it moves its shared streams.
const (
	// silentFor is how long a peer counts as alive after it was last heard.
	silentFor = 6 * time.Second

	// DefaultGrace is how long an upstream must be of no use before a hub
	// leaves it. A hiccup that is shorter than what leaders wait moves nobody.
	DefaultGrace = 8 * time.Second
	// DefaultReturn is how long a better upstream must have been good before a
	// hub that has a good one comes back to it.
	DefaultReturn = 20 * time.Second

	// A hub that follows nobody yet waits so long for those it would rather
	// follow than the cloud: all hubs of a site may start in one moment. Leaders
	// wait for less, so that the others find one that has decided. A hub whose
	// machine does not answer is not waited for.
	leaderStart = 3 * time.Second
	memberStart = 4 * time.Second
	startSpread = 2 * time.Second
	// The links of a site return within seconds, too: who has been without news for
	// its grace waits so long, from when another upstream is good, for those before
	// it that answer.
	leaderSettle = 3 * time.Second
	memberSettle = 6 * time.Second
	// One that holds nothing yet would fetch all, and waits longer, whether the
	// machine of a leader answers or not: machines of a site that is powered up
	// take unlike times to boot.
	bareLeaderStart = 10 * time.Second
	bareMemberStart = 30 * time.Second
	// startPoll is how often they are asked meanwhile.
	startPoll = 500 * time.Millisecond

	// seekEvery is how often a hub looks for help by itself whose upstream answers
	// and hears nothing either: that one looks all the time.
	seekEvery = 10 * time.Second
	// linkFor is how long a peer counts as one with a link after it was last said
	// to have one.
	linkFor = 10 * time.Second

	// maxVia bounds the hubs between one and the cloud.
	maxVia = 8
)

// patience is what a hub's waits are drawn from. Each hub draws its own, so that
// those who lost the same leader do not leave it together; and leaders are
// quicker, so that the others find them settled.
type patience struct{ grace, comeback time.Duration }

func (p patience) ofLeader() (least, spread time.Duration) { return p.grace * 5 / 8, p.grace / 4 }
func (p patience) ofMember() (least, spread time.Duration) { return p.grace, p.grace }
func (p patience) toReturn() (least, spread time.Duration) { return p.comeback, 2 * p.comeback }

// cloud is the upstream that is no peer.
const cloud = ""

// State is what a hub says of itself.
type State struct {
	Node string `json:"node"`
	// Link tells whether its own link to the cloud is up.
	Link bool `json:"link"`
	// Live tells whether what it holds of the shared resources follows the
	// cloud, and Via through which hubs, the nearest first.
	Live bool     `json:"live"`
	Via  []string `json:"via,omitempty"`
	// Ages are the times, in milliseconds, since the cloud last proved what
	// the hub holds, by scope.
	Ages map[string]int64 `json:"ages,omitempty"`
	// Peers are the addresses of hubs that have called it.
	Peers map[string]string `json:"peers,omitempty"`
	// Links are the hubs that told it lately that their link is up.
	Links []string `json:"links,omitempty"`
}

// peer is what a member knows of another hub.
type peer struct {
	heard   time.Time // when it last said how it does
	failed  time.Time // when it last did not answer
	there   bool      // its machine did, then
	said    State
	linked  time.Time // when it last said that its link is up
	hearsay time.Time // when another said so
	hints   bool      // it says that it hears the cloud, and was not asked since
}

// member decides whom a hub follows for what its pool shares. It has no input
// but its methods' arguments and no output but their results: the same calls
// and the same seed give the same decisions.
//
// It prefers the leaders before it in the pool's list, in their order, then
// their deputy, then the cloud, then whoever else of the pool hears the cloud. So
// of a pool one hub asks the cloud, and when that one cannot, one other, which
// then helps the first.
type member struct {
	self string
	rand *rand.Rand
	patience

	leaders []string // all, in order
	deputy  string   // is followed when no leader can be, until there is another one; empty: nobody
	others  []string // the pool's other hubs whose address is known, in an order of this hub's own
	peers   map[string]*peer

	link   bool
	isBare bool
	alone  time.Time // since when neither its link nor a peer helps; zero: one does

	known   bool                 // the pool is known, or that there is none
	pool    string               // its name
	since   time.Time            // since when it is known
	start   time.Duration        // how long it waits then
	bare    time.Duration        // how long if it holds nothing of what is shared
	chosen  bool                 // current counts
	current string               // who is followed; cloud, or a peer
	good    map[string]time.Time // since when those who are good are so
	bad     time.Time            // since when current is not good; zero: it is
	leave   time.Duration        // after that; drawn when current went bad
	settle  time.Duration        // how long those before another are waited for then; drawn with it
	back    time.Duration        // when to leave it for a better one; drawn when it was chosen
}

func newMember(self string, seed uint64, p patience) *member {
	return &member{
		patience: p, self: self, rand: rand.New(rand.NewPCG(seed, 1)), peers: map[string]*peer{}, good: map[string]time.Time{},
	}
}

// setPool tells who is in the pool, which is empty if there is none; others are
// hubs beside the leaders whose address is known, of which one is their deputy,
// or this hub is. In another pool the hub chooses anew, at once.
func (m *member) setPool(now time.Time, pool string, leaders []string, deputy string, others []string) {
	if !m.known || pool != m.pool {
		m.known, m.pool, m.chosen = true, pool, false
		m.since, m.start, m.bare = now, leaderStart, bareLeaderStart
		if !slices.Contains(leaders, m.self) {
			m.start, m.bare = m.draw(memberStart, startSpread), m.draw(bareMemberStart, bareMemberStart/2)
		}
	}
	m.leaders, m.deputy = leaders, deputy
	in := map[string]bool{}
	for _, node := range append(slices.Clone(leaders), others...) {
		in[node] = true
	}
	m.others = slices.DeleteFunc(m.others, func(node string) bool { return !in[node] || slices.Contains(leaders, node) })
	for _, node := range others {
		if node != m.self && !slices.Contains(m.others, node) && !slices.Contains(leaders, node) {
			at := m.rand.IntN(len(m.others) + 1) // not everybody asks the same for help
			m.others = slices.Insert(m.others, at, node)
		}
	}
	for node := range m.peers {
		if !in[node] {
			delete(m.peers, node)
		}
	}
	for node := range in {
		if node != m.self && m.peers[node] == nil {
			m.peers[node] = &peer{}
		}
	}
	if m.current != cloud && m.peers[m.current] == nil {
		m.chosen = false // it is not of the pool any more: no grace
	}
}

func (m *member) setLink(up bool) { m.link = up }

// setBare tells whether the hub holds nothing of what is shared.
func (m *member) setBare(is bool) { m.isBare = is }

// heard is told what a peer says of itself. Helps: it has a link, which was not
// known.
func (m *member) heard(now time.Time, node string, s State) (helps bool) {
	p := m.peers[node]
	if p == nil {
		return false
	}
	helps = s.Link && !m.hasLink(now, node)
	p.heard, p.said, p.hints, p.hearsay = now, s, false, time.Time{}
	p.says(now, s.Link)
	return helps
}

func (p *peer) says(now time.Time, link bool) {
	if p.linked = (time.Time{}); link {
		p.linked = now
	}
}

// failedOf is told that a peer did not answer; there: its machine did.
func (m *member) failedOf(now time.Time, node string, there bool) {
	if p := m.peers[node]; p != nil {
		p.failed, p.there, p.hints, p.linked, p.hearsay = now, there, false, time.Time{}, time.Time{}
	}
}

// hint is told by a peer that asks whether its link is up and it hears the
// cloud. Helps is as for heard.
func (m *member) hint(now time.Time, node string, link, live bool) (helps bool) {
	p := m.peers[node]
	if p == nil {
		return false
	}
	helps = link && !m.hasLink(now, node)
	p.hints = live && !m.isGood(now, node)
	p.says(now, link)
	return helps
}

// hearsay is told by a peer that another one's link is up. Helps is as for
// heard.
func (m *member) hearsay(now time.Time, node string) (helps bool) {
	p := m.peers[node]
	if p == nil {
		return false
	}
	helps = !m.hasLink(now, node)
	p.hearsay = now
	return helps
}

// hasLink reports whether a peer's link is up, by its own word or another's.
func (m *member) hasLink(now time.Time, node string) bool {
	return m.saidLink(now, node) || m.peers[node] != nil && now.Sub(m.peers[node].hearsay) < linkFor
}

// saidLink reports whether the peer itself said so.
func (m *member) saidLink(now time.Time, node string) bool {
	p := m.peers[node]
	return p != nil && now.Sub(p.linked) < linkFor
}

// saidBy is what a peer last said of itself.
func (m *member) saidBy(node string) State {
	if p := m.peers[node]; p != nil {
		return p.said
	}
	return State{}
}

// asks is when a peer last answered or did not.
func (m *member) asks(node string) time.Time {
	p := m.peers[node]
	if p == nil {
		return time.Time{}
	}
	if p.failed.After(p.heard) {
		return p.failed
	}
	return p.heard
}

// ahead are the leaders before this hub in the list, and their deputy if it is
// none of them.
func (m *member) ahead() []string {
	if i := slices.Index(m.leaders, m.self); i >= 0 {
		return m.leaders[:i]
	}
	if m.deputy != "" && m.deputy != m.self && m.peers[m.deputy] != nil {
		return append(slices.Clone(m.leaders), m.deputy)
	}
	return m.leaders
}

// isQuick reports whether this hub shall settle before those that may follow it.
func (m *member) isQuick() bool { return slices.Contains(m.leaders, m.self) || m.deputy == m.self }

// order is whom the hub would follow, the best first.
func (m *member) order() []string {
	ahead := m.ahead()
	out := append(slices.Clone(ahead), cloud)
	for _, node := range slices.Concat(m.leaders, m.others) {
		if node != m.self && !slices.Contains(ahead, node) {
			out = append(out, node)
		}
	}
	return out
}

// isAlive reports whether the upstream answers at all.
func (m *member) isAlive(now time.Time, node string) bool {
	if node == cloud {
		return m.link
	}
	p := m.peers[node]
	return p != nil && !p.heard.IsZero() && now.Sub(p.heard) < silentFor && !p.failed.After(p.heard)
}

// isGood reports whether the upstream hears the cloud, and not through this
// hub.
func (m *member) isGood(now time.Time, node string) bool {
	return m.isAlive(now, node) && (node == cloud || m.peers[node].said.Live && !m.loops(node))
}

func (m *member) loops(node string) bool {
	via := m.peers[node].said.Via
	return len(via) >= maxVia || slices.Contains(via, m.self)
}

// decide returns the upstream of the pool's shared resources, and false while
// there is none to name. Call it again after wait at the latest.
func (m *member) decide(now time.Time) (upstream string, ok bool, wait time.Duration) {
	const again = time.Second
	order := m.order()
	for _, node := range order {
		_, was := m.good[node]
		switch is := m.isGood(now, node); {
		case is && !was:
			m.good[node] = now
		case !is:
			delete(m.good, node)
		}
	}
	best := slices.IndexFunc(order, func(node string) bool { return !m.good[node].IsZero() })
	if !m.chosen {
		return m.first(now, order, best)
	}
	at := slices.Index(order, m.current)
	if _, fine := m.good[m.current]; fine && at >= 0 {
		m.bad = time.Time{}
		for _, node := range order[:at] {
			if since, ok := m.good[node]; ok && now.Sub(since) >= m.back {
				m.choose(node)
				break
			}
		}
		return m.current, true, pollEvery
	}
	if m.bad.IsZero() {
		m.bad = now
		if m.isQuick() {
			m.leave, m.settle = m.draw(m.ofLeader()), leaderSettle
		} else {
			m.leave, m.settle = m.draw(m.ofMember()), m.draw(memberSettle, startSpread)
		}
	}
	if now.Sub(m.bad) < m.leave {
		return m.current, true, min(again, m.leave-now.Sub(m.bad))
	}
	switch {
	case best >= 0:
		_, answers := m.anyAlive(now, order[:best])
		if left := m.settle - now.Sub(m.good[order[best]]); left > 0 && answers {
			return m.current, true, min(startPoll, left)
		}
		m.choose(order[best])
	case !m.isAlive(now, m.current):
		// Nobody hears the cloud. Who lives may still know more.
		if node, ok := m.anyAlive(now, order); ok {
			m.choose(node)
		}
	}
	return m.current, true, again
}

// first chooses for a hub that follows nobody yet.
func (m *member) first(now time.Time, order []string, best int) (upstream string, ok bool, wait time.Duration) {
	if !m.known {
		return cloud, false, time.Second
	}
	left := m.start - now.Sub(m.since)
	for i, node := range order {
		if i == best || node == cloud {
			break // what comes after it is no reason to wait
		}
		if left > 0 && m.mayStart(node) {
			return cloud, false, min(left, startPoll)
		}
	}
	atCloud := best < 0 || order[best] == cloud
	if left := m.bare - now.Sub(m.since); m.isBare && atCloud && left > 0 && slices.ContainsFunc(m.ahead(), m.mayCome) {
		return cloud, false, min(left, startPoll)
	}
	if best >= 0 {
		m.choose(order[best])
		return m.current, true, time.Second
	}
	m.choose(cloud)
	if node, ok := m.anyAlive(now, order); ok {
		m.choose(node)
	}
	return m.current, true, time.Second
}

// mayStart reports whether a peer that is not good yet may be so soon.
func (m *member) mayStart(node string) bool {
	p := m.peers[node]
	switch {
	case p == nil:
		return false
	case p.failed.After(p.heard):
		return p.there
	case p.heard.IsZero():
		return true // it is being asked
	}
	return !m.loops(node)
}

// mayCome reports whether a peer may be good once its machine has started.
func (m *member) mayCome(node string) bool { return m.peers[node] != nil && !m.loops(node) }

// anyAlive returns the first hub that answers and does not follow this one.
func (m *member) anyAlive(now time.Time, order []string) (string, bool) {
	i := slices.IndexFunc(order, func(node string) bool { return node != cloud && m.isAlive(now, node) && !m.loops(node) })
	if i < 0 {
		return "", false
	}
	return order[i], true
}

func (m *member) choose(node string) {
	m.chosen, m.current, m.bad = true, node, time.Time{}
	m.back = m.draw(m.toReturn())
}

func (m *member) draw(least, spread time.Duration) time.Duration {
	return least + time.Duration(m.rand.Int64N(int64(spread)))
}

// live reports whether the hub itself hears the cloud, and through whom.
func (m *member) live(now time.Time) (live bool, via []string) {
	if !m.chosen {
		return false, nil
	}
	if m.current == cloud {
		return m.link, nil
	}
	if p := m.peers[m.current]; p != nil {
		via = append([]string{m.current}, p.said.Via...)
	}
	return m.isGood(now, m.current), via[:min(len(via), maxVia)]
}

// usable returns the first upstream that is good and not to be avoided: the one
// that was decided on before all others, which counts during its grace too. It
// reports false where only that one is left.
func (m *member) usable(now time.Time, avoid func(string) bool) (string, bool) {
	if !avoid(m.current) {
		return m.current, true
	}
	for _, node := range m.order() {
		if m.isGood(now, node) && !avoid(node) {
			return node, true
		}
	}
	return m.current, false
}

// asked are those of whom the hub wants to know how they do: whom it follows,
// whom it would rather follow than the cloud, and, when it needs help, some of
// the others.
func (m *member) asked(now time.Time) []string {
	order := m.order()
	at, upTo := slices.Index(order, m.current), slices.Index(order, cloud)
	var out []string
	if m.chosen && at >= 0 && m.current != cloud {
		out = append(out, m.current)
	}
	// While all is well with a leader nobody needs the deputy.
	led := m.chosen && m.bad.IsZero() && at < slices.Index(order, m.deputy)
	for _, node := range order[:upTo] {
		if !slices.Contains(out, node) && (!led || node != m.deputy) {
			out = append(out, node)
		}
	}
	out = out[:min(len(out), maxPolled)]
	if live, _ := m.live(now); live || m.link {
		m.alone = time.Time{}
		return out
	}
	if m.alone.IsZero() {
		m.alone = now
	}
	others := slices.DeleteFunc(order[upTo+1:], func(node string) bool { return slices.Contains(out, node) })
	return append(out, m.helpers(now, others)...)
}

// helpers are those of the others to ask next: who hears the cloud, or says so,
// is asked before that is forgotten, then who was asked longest ago. All are
// asked once soon after the hub is alone, and then less often: where a whole pool
// is cut off that goes on for as long as it lasts. A hub whose upstream answers
// leaves it to that one, or each would keep up connections to all others.
func (m *member) helpers(now time.Time, others []string) []string {
	may := func(node string) bool { return m.isGood(now, node) || m.peers[node].hints }
	most := 1 + len(others)/20
	switch answers := m.chosen && m.current != cloud && m.isAlive(now, m.current); {
	case answers && slices.ContainsFunc(others, func(node string) bool { return now.Sub(m.asks(node)) < seekEvery }):
		others = slices.DeleteFunc(others, func(node string) bool { return !may(node) })
	case answers:
		most = 1
	case slices.ContainsFunc(others, func(node string) bool { return m.asks(node).Before(m.alone) }):
		most = 2 + len(others)/10
	}
	slices.SortStableFunc(others, func(a, b string) int {
		switch first := may(a); {
		case first == may(b):
			return m.asks(a).Compare(m.asks(b))
		case first:
			return -1
		}
		return 1
	})
	return others[:min(len(others), most, maxPolled)]
}
