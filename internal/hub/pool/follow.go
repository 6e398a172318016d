package pool

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	// pollEvery is how often peers are asked how they do, and pollPatience how
	// long they may take to say it.
	pollEvery    = 2 * time.Second
	pollPatience = 2 * time.Second
	// maxPolled bounds whom a hub asks at a time: of those it follows or would
	// follow, and of those who might help it.
	maxPolled = 16
	// maxGossip bounds the addresses that hubs tell each other.
	maxGossip = 64
	maxState  = 64 << 10
	oldest    = int64(10 * 365 * 24 * time.Hour / time.Millisecond) // age that is believed
	// joinPatience is how long a hub that starts waits to hear of its pool
	// before it takes the cloud for what pools share.
	joinPatience = 5 * time.Second
)

// follow keeps deciding whom to follow until ctx ends.
func (p *Pool) follow(ctx context.Context) {
	begun := time.Now()
	for ctx.Err() == nil {
		up, linkChanged := p.cfg.Link()
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		bare := len(p.cfg.Ages()) == 0
		wait := p.decide(begun, up, bare)
		p.poll(ctx)
		wait = min(wait, p.decide(begun, up, bare))
		timer := time.NewTimer(min(wait, pollEvery) + rand.N(pollEvery/10))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-changed:
		case <-linkChanged:
		}
		timer.Stop()
	}
}

// decide runs the machine on what is known now, and tells those who wait for
// another upstream.
func (p *Pool) decide(begun time.Time, link, bare bool) (wait time.Duration) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.machine
	m.setLink(link)
	m.setBare(bare)
	if p.known || p.member.Pool != "" || now.Sub(begun) >= joinPatience {
		leaders := make([]string, 0, len(p.member.Leaders))
		for _, l := range p.member.Leaders {
			if p.member.Has(l.Node) {
				leaders = append(leaders, l.Node)
			}
		}
		var others []string
		for _, node := range slices.Sorted(maps.Keys(p.book)) {
			if p.book[node].address != "" && !p.member.leader(node) {
				others = append(others, node)
			}
		}
		m.setPool(now, p.member.Pool, leaders, p.member.deputy(), others)
	}
	before := m.current
	upstream, ok, wait := m.decide(now)
	if !ok || p.decided && upstream == before {
		return wait
	}
	if p.decided || upstream != cloud {
		p.log.Info("shared resources come from another upstream", "from", orCloud(before), "to", orCloud(upstream))
		p.metrics.switches.WithLabelValues(p.kindLocked(upstream)).Inc()
	}
	p.decided = true
	close(p.moved)
	p.moved = make(chan struct{})
	return wait
}

func orCloud(node string) string { return cmp.Or(node, "cloud") }

func (p *Pool) kindLocked(upstream string) string {
	switch {
	case upstream == cloud:
		return "cloud"
	case p.member.leader(upstream):
		return "leader"
	}
	return "peer"
}

// Upstream is a way to what the pool shares.
type Upstream struct {
	Peer string // "": the cloud
	Kind string // cloud, leader or peer
}

// Choose returns the upstream to take, past those to be avoided. Other is false
// when nobody but one of those is left; ok is false while none is decided on.
// The channel is closed when the answer may have changed.
func (p *Pool) Choose(avoid func(peer string) bool) (u Upstream, other, ok bool, changed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.decided {
		return u, false, false, p.moved
	}
	u.Peer, other = p.machine.usable(time.Now(), avoid)
	u.Kind = p.kindLocked(u.Peer)
	return u, other, true, p.moved
}

// Live reports whether a peer that is followed hears the cloud.
func (p *Pool) Live(peer string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.machine.isGood(time.Now(), peer)
}

// Proved is when the cloud last proved what a peer holds of a scope; zero if
// nobody knows.
func (p *Pool) Proved(peer, scope string) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e, ok := p.book[peer]; ok {
		return e.proved[scope]
	}
	return time.Time{}
}

// Leads reports whether the hub is a leader of its pool.
func (p *Pool) Leads() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.member.leader(p.cfg.Node)
}

// State is what the hub says of itself.
func (p *Pool) State() State {
	ages := p.cfg.Ages()
	up, _ := p.cfg.Link()
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	s := State{Node: p.cfg.Node, Link: up, Ages: map[string]int64{}, Peers: map[string]string{}}
	s.Live, s.Via = p.machine.live(now)
	for scope, age := range ages {
		s.Ages[scope] = age.Milliseconds()
	}
	for node, e := range p.book {
		if len(s.Peers) < maxGossip && e.address != "" && !p.member.leader(node) {
			s.Peers[node] = e.address
		}
		if len(s.Links) < maxGossip && p.machine.saidLink(now, node) {
			s.Links = append(s.Links, node)
		}
	}
	return s
}

// Following is whom the hub follows: a node, or "" for the cloud.
func (p *Pool) Following() (peer string, live bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	live, _ = p.machine.live(time.Now())
	return p.machine.current, live
}

// hint takes what a peer says of itself when it asks how this hub does.
func (p *Pool) hint(node string, link, live bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.machine.hint(now, node, link, live) {
		p.helpLocked()
	}
}

// poll asks peers how they do, all at a time.
func (p *Pool) poll(ctx context.Context) {
	p.mu.Lock()
	asked := p.machine.asked(time.Now())
	p.mu.Unlock()
	var polls sync.WaitGroup
	for _, node := range asked {
		polls.Go(func() {
			begun := time.Now()
			s, err := p.ask(ctx, node)
			if ctx.Err() != nil {
				return
			}
			p.hear(node, begun, s, err)
		})
	}
	polls.Wait()
}

// errRefused is an answer that is none.
var errRefused = errors.New("refused")

func (p *Pool) ask(ctx context.Context, node string) (State, error) {
	ctx, cancel := context.WithTimeout(ctx, pollPatience)
	defer cancel()
	link, _ := p.cfg.Link()
	_, live := p.Following()
	query := url.Values{linkParam: {strconv.FormatBool(link)}, liveParam: {strconv.FormatBool(live)}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://peer"+StatePath+"?"+query.Encode(), http.NoBody)
	if err != nil {
		return State{}, fmt.Errorf("ask %s how it does: %w", node, err)
	}
	resp, err := p.Transport(node).RoundTrip(req)
	if err != nil {
		return State{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxState))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%w: %s: %.200q", errRefused, resp.Status, text)
	}
	var s State
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		return State{}, fmt.Errorf("ask %s how it does: %w", node, err)
	}
	return s, nil
}

// hear takes what a peer says of itself, which was asked at asked: its ages count
// from then, so that no answer makes anything look fresher than it is.
func (p *Pool) hear(node string, asked time.Time, s State, err error) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.log.Debug("peer does not answer", "peer", node, "err", err)
		// A machine that is up and a hub that is not; or a hub that does not
		// know its pool yet.
		p.machine.failedOf(now, node, errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, errRefused))
		return
	}
	helps := p.machine.heard(now, node, s)
	for _, other := range s.Links[:min(len(s.Links), maxGossip)] {
		helps = p.machine.hearsay(now, other) || helps
	}
	if helps {
		p.helpLocked()
	}
	e, ok := p.book[node]
	if !ok {
		return
	}
	e.proved = make(map[string]time.Time, len(s.Ages))
	for scope, age := range s.Ages {
		if age >= 0 && age <= oldest {
			e.proved[scope] = asked.Add(-time.Duration(age) * time.Millisecond)
		}
	}
	for other, address := range s.Peers {
		// Who it is shows when it is asked.
		if other == p.cfg.Node || !p.member.Has(other) || net.ParseIP(address) == nil {
			continue
		}
		if e := p.entryLocked(other); e.address == "" {
			e.address = address
			p.helpLocked()
		}
	}
}
