package link

import (
	"strings"
	"time"
)

// State says whether the cloud can be reached.
type State struct {
	// Up is true when at least one server is healthy.
	Up bool
	// Since is when Up last changed.
	Since time.Time
	// Reason is why, for people.
	Reason string
}

// Budgets are the times that the link's judgement rests on. Zero fields
// take the defaults.
type Budgets struct {
	// Stall is how long a request may wait for its response header before
	// a probe on a fresh connection checks the link: 2 s.
	Stall time.Duration
	// Connect is how long a confirming probe may take to connect while the
	// link is up: 1.5 s, or three times as long as it took of late if that
	// is more. It is the time that a black hole costs beyond Stall.
	Connect time.Duration
	// Answer is the same for the TLS handshake and the answer: 3 s.
	Answer time.Duration
	// Patience is how long any other probe or connection attempt may take
	// to connect, and then again to be answered: 12 s, enough for 3 s there
	// and back. Links that are slower than that count as down.
	Patience time.Duration
	// Idle is how long the link may be silent before it is probed, and
	// each HTTP/2 connection before it is pinged: 10 s.
	Idle time.Duration
	// Ping is how much later a silent link is probed if no ping has broken
	// the silence: 3 s.
	Ping time.Duration
	// Retry is the time between probes of a server that is not healthy,
	// jittered by a fifth: 1 s. Servers that can be reached but refuse to
	// serve are asked more and more seldom, down to every 5 Retry.
	Retry time.Duration
}

func (b Budgets) withDefaults() Budgets {
	for _, f := range []struct {
		at *time.Duration
		to time.Duration
	}{
		{&b.Stall, 2 * time.Second},
		{&b.Connect, 1500 * time.Millisecond},
		{&b.Answer, 3 * time.Second},
		{&b.Patience, 12 * time.Second},
		{&b.Idle, 10 * time.Second},
		{&b.Ping, 3 * time.Second},
		{&b.Retry, time.Second},
	} {
		if *f.at <= 0 {
			*f.at = f.to
		}
	}
	return b
}

// Damping: a server that was lost more than flapsFree times within flapWindow
// is given flapStep more of silence for each further loss, at most flapMost,
// before it counts as lost again. A link that comes and goes so stays up, and
// what it can carry it carries; that it is weak is judged apart, by pace.
const (
	flapWindow = time.Minute
	flapsFree  = 2
	flapStep   = 8 * time.Second
	flapMost   = 16 * time.Second
)

// returnAfter is how long a server that was lost must be healthy before it is
// preferred again to those behind it.
const returnAfter = 10 * time.Second

// unwellMost is how many times in a row a healthy server may not be well before
// that is believed: it may just elect a leader of its etcd.
const unwellMost = 3

// unreadyFor is how long an API server that says itself that it is not ready is
// kept if there is no better one. One that has too much to do says so, too, while
// it serves; if all nodes left it then it would have their return to stand as
// well. It is in doubt meanwhile, so nobody waits for it who has another way.
const unreadyFor = time.Minute

// verdict is what a probe found out.
type verdict int

const (
	alive    verdict = iota // an API server of the cluster serves
	unready                 // one answers, and says that it is not ready
	unwell                  // somebody answers for one, and not well: a balancer
	stranger                // somebody else answers: a captive portal
	silence                 // no connection, or no answer on it
)

// tracker turns evidence into the link's state. It is told the time, does no
// IO and is not safe for concurrent use.
type tracker struct {
	budgets Budgets
	servers []server
	state   State
}

// server is what is known about one API server.
type server struct {
	healthy bool
	// heard is the last proof of life: Invariant: never set back.
	heard time.Time
	// due is when the next probe is wanted.
	due time.Time
	// probed is when the last probe started, and jitter what stretches the time
	// until the next one.
	probed time.Time
	jitter float64
	// asking counts probes that have connected and wait for the answer.
	asking int
	// suspected says that something was wrong after the last probe set out:
	// the next one must be on a fresh connection, and is not put off.
	suspected bool
	// unwell counts probes in a row that got an answer, but not a good one.
	unwell int
	// unready is since when it has said that it is not ready; zero: it is, or says
	// nothing.
	unready time.Time
	// connect and answer are how long good probes took of late: the most,
	// forgotten little by little.
	connect, answer time.Duration
	// unsure says that they are of the probe that found the server healthy
	// again, which may have waited for that.
	unsure bool
	// losses are the times within flapWindow at which it fell silent, ailing
	// says that it has not been heard since the last of them.
	losses []time.Time
	ailing bool
	// preferred is when it may be preferred to the servers behind it.
	preferred time.Time
	reason    string
}

func newTracker(n int, b Budgets, now time.Time) *tracker {
	t := &tracker{
		budgets: b,
		servers: make([]server, n),
		state:   State{Since: now, Reason: "not probed yet"},
	}
	for i := range t.servers {
		t.servers[i].due = now
		t.servers[i].reason = t.state.Reason
	}
	return t
}

// hear takes a proof of life that is no probe: a response, bytes of a stream.
// It keeps a healthy server healthy and never makes one so, because only
// probes show that new connections can be made.
func (t *tracker) hear(i int, at time.Time) {
	s := &t.servers[i]
	if !at.After(s.heard) {
		return
	}
	s.heard = at
	if s.healthy && !s.suspected {
		s.due = later(s.due, at.Add(t.silent()))
	}
}

// suspect takes a sign that something may be wrong and reports whether a
// probe is now due that was not. Probes on suspicion are at least one Retry
// apart, so that failing requests cannot make a storm of them.
func (t *tracker) suspect(i int, now time.Time) bool {
	s := &t.servers[i]
	if !s.healthy {
		return false
	}
	s.suspected = true
	if !s.unready.IsZero() {
		return false // it is in doubt already, and not asked more for being slow
	}
	due := later(now, s.probed.Add(t.budgets.Retry))
	if !due.Before(s.due) {
		return false
	}
	s.due = due
	return true
}

// start notes that a probe starts now, and returns how long it may take to
// connect, and then to be answered. Jitter, around 1, stretches the time until
// the next one.
func (t *tracker) start(i int, now time.Time, jitter float64) (connect, answer time.Duration) {
	s := &t.servers[i]
	s.probed, s.jitter = now, jitter
	if !s.healthy {
		s.due = now.Add(time.Duration(jitter * float64(t.pause(s))))
		return t.budgets.Patience, t.budgets.Patience
	}
	s.suspected = false
	s.due = now.Add(t.silent())
	limit := func(least, took time.Duration) time.Duration {
		return min(max(least, 3*took), max(t.budgets.Patience, least))
	}
	// Answers that take their time tell of queues, which a first packet waits
	// in as well.
	return limit(t.budgets.Connect, max(s.connect, s.answer)), limit(t.budgets.Answer, s.answer)
}

// reached notes that the probe which set out at started has connected and
// waits for its answer; answered must follow. A server that is not healthy and
// lets probes in without answering them is busy, with those of other nodes
// perhaps: each that waits doubles the time until the next one.
func (t *tracker) reached(i int, started time.Time) {
	s := &t.servers[i]
	s.asking++
	if gap := s.due.Sub(s.probed); !s.healthy && started.Equal(s.probed) && gap > 0 {
		s.due = s.probed.Add(min(gap<<min(s.asking, 3), max(gap, t.budgets.Patience)))
	}
}

// answered notes that a probe waits no more.
func (t *tracker) answered(i int) { t.servers[i].asking-- }

// silent is how long a healthy server may be silent. It leaves the pings of
// HTTP/2 connections, if there are any, the time to break the silence.
func (t *tracker) silent() time.Duration { return t.budgets.Idle + t.budgets.Ping }

// pause is the time between probes of a server that is not healthy.
func (t *tracker) pause(s *server) time.Duration {
	return t.budgets.Retry * time.Duration(1+min(s.unwell/3, 4))
}

// another reports whether a server beside i is healthy and without blemish.
func (t *tracker) another(i int) bool {
	for j := range t.servers {
		if s := &t.servers[j]; j != i && s.healthy && s.unwell == 0 && !s.suspected {
			return true
		}
	}
	return false
}

// finding is what a probe came to.
type finding struct {
	verdict         verdict
	connect, answer time.Duration // how long each took
	reason          string
}

// report takes the finding of a probe that started at started. It reports
// whether the link went up or down.
func (t *tracker) report(i int, started, now time.Time, f finding) bool {
	s := &t.servers[i]
	if f.verdict == alive {
		s.heard = later(s.heard, now)
		if s.unsure || !s.healthy {
			s.connect, s.answer = 0, 0
		}
		s.connect, s.answer = max(f.connect, s.connect*3/4), max(f.answer, s.answer*3/4)
		s.unsure = !s.healthy
		s.unwell, s.unready, s.ailing, s.reason = 0, time.Time{}, false, f.reason
		if !s.suspected {
			s.due = now.Add(t.silent())
		}
		if !s.healthy {
			s.healthy, s.preferred = true, now
			if len(s.losses) > 0 {
				s.preferred = now.Add(returnAfter)
			}
			if f.connect+f.answer > t.budgets.Connect {
				s.due, s.suspected = now, true // to be sure
			}
		}
		return t.settle(now, f.reason)
	}
	if started.Before(s.heard) && f.verdict == silence {
		// The server was heard after this probe had set out: it is an old
		// probe that a better one has overtaken, or a lost packet.
		return false
	}
	if f.verdict == silence {
		s.unwell = 0
	} else {
		s.unwell++
	}
	if f.verdict != unready {
		s.unready = time.Time{}
	} else if s.unready.IsZero() {
		s.unready = now
	}
	if s.healthy {
		s.due = now.Add(t.budgets.Retry)
		if f.verdict == unready && now.Sub(s.unready) < unreadyFor && !t.another(i) {
			s.suspected, s.reason = true, f.reason
			s.due = now.Add(time.Duration(s.jitter * float64(min(t.budgets.Retry<<min(s.unwell-1, 3), t.budgets.Patience))))
			return false
		}
		if f.verdict <= unwell && s.unwell < unwellMost || now.Sub(s.heard) < s.spared(now) {
			s.suspected = true
			return false
		}
	}
	s.healthy, s.suspected, s.unready, s.reason = false, false, time.Time{}, f.reason
	return t.settle(now, f.reason)
}

// spared notes that the server has not answered and returns how long it may
// go on like that.
func (s *server) spared(now time.Time) time.Duration {
	for len(s.losses) > 0 && now.Sub(s.losses[0]) > flapWindow {
		s.losses = s.losses[1:]
	}
	if !s.ailing {
		s.ailing = true
		s.losses = append(s.losses, now)
	}
	return min(time.Duration(max(0, len(s.losses)-flapsFree))*flapStep, flapMost)
}

// settle derives the state from the servers and reports whether Up changed.
func (t *tracker) settle(now time.Time, reason string) bool {
	up := false
	var reasons []string
	for i := range t.servers {
		up = up || t.servers[i].healthy
		reasons = append(reasons, t.servers[i].reason)
	}
	if up == t.state.Up {
		if !up {
			t.state.Reason = strings.Join(reasons, "; ")
		}
		return false
	}
	if !up {
		reason = strings.Join(reasons, "; ")
	}
	t.state = State{Up: up, Since: now, Reason: reason}
	return true
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
