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
	// link is up: 1.5 s, or three times as long as connecting took last if
	// that is more. It is the time that a black hole costs beyond Stall.
	Connect time.Duration
	// Answer is how long the TLS handshake and the answer of a probe may
	// take once it is connected: 3 s.
	Answer time.Duration
	// Patience is how long any other connection attempt may take: 5 s.
	// Links that are slower than that count as down.
	Patience time.Duration
	// Idle is how long the link may be silent before it is probed, and
	// each HTTP/2 connection before it is pinged: 10 s.
	Idle time.Duration
	// Ping is how long the answer of an HTTP/2 ping may take: 3 s.
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
		{&b.Patience, 5 * time.Second},
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

// Flap damping: beyond flapsFree losses within flapWindow, each asks for one
// more good probe in a row before the link is up again.
const (
	flapWindow = time.Minute
	flapsFree  = 2
	flapsMost  = 5
)

// unwellMost is how many times in a row a healthy server may say that it is
// not ready before it is believed: it may just elect a leader of its etcd.
const unwellMost = 3

// verdict is what a probe found out.
type verdict int

const (
	alive    verdict = iota // an API server of the cluster serves
	unwell                  // one answers, but says that it is not ready
	stranger                // somebody else answers: a captive portal
	silence                 // no connection, or no answer on it
)

// tracker turns evidence into the link's state. It is told the time, does no
// IO and is not safe for concurrent use.
type tracker struct {
	budgets Budgets
	servers []server
	state   State
	// losses are the times within flapWindow at which the link went down.
	losses []time.Time
}

// server is what is known about one API server.
type server struct {
	healthy bool
	// heard is the last proof of life: Invariant: never set back.
	heard time.Time
	// due is when the next probe is wanted.
	due time.Time
	// probed is when the last probe started.
	probed time.Time
	// suspected says that the next probe must be on a fresh connection.
	suspected bool
	// good and unwell count probes in a row: those that found it alive, and
	// those that got any other answer.
	good, unwell int
	// connect is how long the last good probe took to connect.
	connect time.Duration
	reason  string
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
	due := later(now, s.probed.Add(t.budgets.Retry))
	if !s.healthy || !due.Before(s.due) {
		return false
	}
	s.due, s.suspected = due, true
	return true
}

// start notes that a probe starts now, and returns how long it may take to
// connect. Jitter, around 1, stretches the time until the next one.
func (t *tracker) start(i int, now time.Time, jitter float64) (connect time.Duration) {
	s := &t.servers[i]
	s.probed = now
	if !s.healthy {
		s.due = now.Add(time.Duration(jitter * float64(t.pause(s))))
		return t.budgets.Patience
	}
	s.suspected = false
	s.due = now.Add(t.silent())
	return min(max(t.budgets.Connect, 3*s.connect), max(t.budgets.Patience, t.budgets.Connect))
}

// silent is how long a healthy server may be silent. It leaves the pings of
// HTTP/2 connections, if there are any, the time to break the silence.
func (t *tracker) silent() time.Duration { return t.budgets.Idle + t.budgets.Ping }

// pause is the time between probes of a server that is not healthy.
func (t *tracker) pause(s *server) time.Duration {
	return t.budgets.Retry * time.Duration(1+min(s.unwell/3, 4))
}

// report takes the verdict of a probe that started at started and took
// connect to connect. It reports whether the link went up or down.
func (t *tracker) report(i int, started, now time.Time, v verdict, connect time.Duration, reason string) bool {
	s := &t.servers[i]
	if v == alive {
		s.heard = later(s.heard, now)
		s.connect = connect
		s.good, s.unwell = s.good+1, 0
		if !s.healthy && s.good < t.needed(now) {
			return false
		}
		s.healthy, s.reason = true, reason
		s.due = now.Add(t.silent())
		return t.settle(now, reason)
	}
	if started.Before(s.heard) && v == silence {
		// The server was heard after this probe had set out: it is an old
		// probe that a better one has overtaken, or a lost packet.
		return false
	}
	s.good = 0
	if v == silence {
		s.unwell = 0
	} else {
		s.unwell++
	}
	if s.healthy {
		s.due = now.Add(t.budgets.Retry)
		if v == unwell && s.unwell < unwellMost {
			s.suspected = true
			return false
		}
	}
	s.healthy, s.reason = false, reason
	return t.settle(now, reason)
}

// needed is how many good probes in a row bring a server up.
func (t *tracker) needed(now time.Time) int {
	t.forget(now)
	return min(max(1, 1+len(t.losses)-flapsFree), flapsMost)
}

func (t *tracker) forget(now time.Time) {
	for len(t.losses) > 0 && now.Sub(t.losses[0]) > flapWindow {
		t.losses = t.losses[1:]
	}
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
		t.forget(now)
		t.losses = append(t.losses, now)
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
