package replica

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"sync"
	"time"
)

// Route is where a stream gets its scope from. The zero Peer is the cloud.
//
// A peer holds what the cloud said, at the cloud's own resource versions, so a
// stream goes on with a peer where it was with the cloud, and back. A peer
// may be behind: nothing that it says takes a set back to an older version.
type Route struct {
	Upstream

	Peer string // name of the hub
	Kind string // for metrics: cloud, leader or peer
	// Shared says that the hub's pool shares the scope: what comes of it is
	// counted.
	Shared bool
	// Contact is when the cloud last proved what the peer holds of the scope,
	// zero if nobody knows. Live tells whether the peer still hears the cloud.
	// They are nil for the cloud itself.
	Contact func() time.Time
	Live    func() bool
}

// Router chooses the route of a scope that the hub reads by its own right.
// Those in avoid have failed the scope. When nobody else is there it returns
// false, and the one that it would choose all the same, or, with no Upstream,
// none yet. The channel is closed when the answer may have changed.
type Router func(scope Scope, avoid func(peer string) bool) (route Route, ok bool, changed <-chan struct{})

const (
	// A peer that cannot serve a scope is left alone with it for this long, also
	// one whose history does not reach back: it may have listed a moment after
	// this hub did, and the next change brings the stream to where it began. One
	// that says nothing is left alone for longer.
	avoidFor       = 5 * time.Second
	avoidSilentFor = time.Minute
	// Each time that it fails again at once avoidFor is twice as long, at most
	// this: the cloud must not be asked for what a leader lacks every few
	// seconds.
	avoidMost = 5 * time.Minute
	// steadyAfter is how long a stream from a peer lasts that did not fail at
	// once.
	steadyAfter = time.Minute
	// syncPatience, and up to as much again, is how long a stream that holds
	// nothing yet waits for a peer that says that it is about to.
	syncPatience = 2 * time.Minute
)

var (
	// errMoved ends an attempt whose route is another now.
	errMoved = errors.New("another upstream is to be followed")
	// errBehind means that a peer has not seen what the set holds.
	errBehind = errors.New("the peer is behind")
	// errSilent means that an upstream says nothing, not even that nothing
	// happens.
	errSilent = errors.New("the upstream says nothing")
	// errAnswered means that a peer is there, and does not serve the scope, or
	// serves what cannot be read.
	errAnswered = errors.New("the peer does not serve it")
	// errSyncing means that a peer is about to hold the scope.
	errSyncing = errors.New("the peer does not hold it yet")
	// errAtOnce means that a watch has ended as soon as it began.
	errAtOnce = errors.New("the watch ended at once")
)

// waitRoute makes the route of the next attempt the stream's own, once its
// upstream is there. It reports false when another is to be asked for. The
// channel is closed when that may be so; nil: never.
func (st *stream) waitRoute(ctx context.Context) (changed <-chan struct{}, ok bool) {
	route, ok, changed := st.choose()
	if !ok {
		select {
		case <-ctx.Done():
		case <-changed:
		}
		return nil, false
	}
	st.take(route)
	err := st.onRoute(ctx, changed, route.WaitUp)
	return changed, err == nil
}

// choose returns the route of the stream's next attempt, and a channel that is
// closed when it is to be asked for again. ok is false while nobody knows one.
func (st *stream) choose() (route Route, ok bool, changed <-chan struct{}) {
	st.mu.Lock()
	lent := st.credential != Credential{}
	st.mu.Unlock()
	if st.router == nil || lent {
		// What a caller lent is shown to the cloud and to nobody else.
		return st.cloud, true, nil
	}
	now := time.Now()
	for peer, until := range st.avoided {
		if !now.Before(until) {
			delete(st.avoided, peer)
		}
	}
	route, other, changed := st.router(st.set.scope, func(peer string) bool {
		_, avoided := st.avoided[peer]
		return avoided
	})
	if route.Upstream == nil {
		return route, false, changed
	}
	if !other && len(st.avoided) > 0 {
		// All that are there have been tried. If it was for want of history,
		// what is missing shows in a list.
		if st.tooOld {
			st.forget()
		}
		clear(st.avoided)
		st.tooOld = false
	}
	return route, true, changed
}

// avoid keeps the stream from a peer for a while.
func (st *stream) avoid(peer string, d time.Duration) {
	if st.avoided == nil {
		st.avoided = map[string]time.Time{}
	}
	st.avoided[peer] = time.Now().Add(d + rand.N(d/2))
}

// avoidLonger keeps the stream from a peer, each time that it fails at once for
// twice as long.
func (st *stream) avoidLonger(peer string) {
	st.avoid(peer, min(avoidFor<<st.failures[peer], avoidMost))
	if st.failures == nil {
		st.failures = map[string]int{}
	}
	st.failures[peer] = min(st.failures[peer]+1, maxFailures)
}

// take makes a route the stream's own. The set then counts as proved when what
// comes by the route was.
func (st *stream) take(route Route) {
	if route.Peer != st.route.Peer {
		st.log.Debug("stream moves", "from", st.route.Peer, "to", route.Peer)
		st.begun = nil // a list that broke off is another's
	}
	st.route = route
	s := st.set
	s.mu.Lock()
	s.proof, s.live = route.Contact, route.Live
	s.mu.Unlock()
}

// watchRoute ends an attempt once its route is no longer the one to take. It
// returns when ctx has ended.
func (st *stream) watchRoute(ctx context.Context, moved context.CancelCauseFunc, on string, avoided map[string]time.Time, changed <-chan struct{}) {
	for {
		var earliest time.Time
		for _, until := range avoided {
			if earliest.IsZero() || until.Before(earliest) {
				earliest = until
			}
		}
		var again <-chan time.Time // never
		if !earliest.IsZero() {
			again = time.After(time.Until(earliest))
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
		}
		now := time.Now()
		maps.DeleteFunc(avoided, func(_ string, until time.Time) bool { return !now.Before(until) })
		route, _, next := st.router(st.set.scope, func(peer string) bool {
			_, ok := avoided[peer]
			return ok
		})
		if route.Upstream == nil || route.Peer != on {
			moved(errMoved)
			return
		}
		changed = next
	}
}

// onRoute runs an attempt that ends with errMoved when its route does.
func (st *stream) onRoute(ctx context.Context, changed <-chan struct{}, try func(context.Context) error) error {
	if changed == nil {
		return try(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	on, avoided := st.route.Peer, maps.Clone(st.avoided)
	watching.Go(func() { st.watchRoute(ctx, cancel, on, avoided, changed) })
	err := try(ctx)
	if errors.Is(context.Cause(ctx), errMoved) {
		err = errMoved
	}
	cancel(nil)
	watching.Wait()
	return err
}

// failed judges an attempt that a peer did not serve to its end. A peer that
// is gone is for the router to judge: a short absence moves nobody. One that
// is there and cannot serve this scope is passed by for it.
//
// One that has no history for the set, or nothing to say to it, may be right:
// the set may be ahead of a cloud that was restored from a backup. So the cloud
// is asked where it is before it is followed.
func (st *stream) failed(ctx context.Context, err error, lasted time.Duration, wait *backoff) {
	peer := st.route.Peer
	if lasted >= steadyAfter {
		delete(st.failures, peer)
	}
	switch {
	case errors.Is(err, errGone):
		st.tooOld, st.doubted = true, true
		st.avoidLonger(peer)
	case errors.Is(err, errSilent):
		st.doubted = true
		st.avoid(peer, avoidSilentFor)
	case errors.Is(err, errSyncing) && st.mayWait():
	case errors.Is(err, errAnswered), errors.Is(err, errBehind), errors.Is(err, errSyncing), errors.Is(err, errAtOnce) && wait.n >= maxPeerTries:
		st.avoidLonger(peer)
	}
	st.log.Debug("stream from a peer ended", "peer", peer, "err", err)
	wait.sleep(ctx, 0, st.hurried)
	if wait.n > maxPeerTries {
		wait.n = maxPeerTries
	}
}

// mayWait reports whether the stream should go on waiting for a peer that is
// about to hold the scope: the narrower the link, the longer it takes the peer,
// and the more it would cost the same link to be asked a second time.
func (st *stream) mayWait() bool {
	if st.set.isSynced() {
		return false // to follow the cloud for a while costs nothing but the changes
	}
	now := time.Now()
	if st.waits.IsZero() {
		st.waits = now.Add(syncPatience + rand.N(syncPatience))
	}
	return now.Before(st.waits)
}

// maxFailures keeps avoidFor from growing beyond all bounds.
const maxFailures = 10

// maxPeerTries keeps the pause between two tries of a peer below two seconds.
const maxPeerTries = 4

// provedLocked notes that what the set holds was just proved current, by the cloud
// or by a peer that says when the cloud did so. It is called under mu.
func (s *set) provedLocked() {
	at := s.clock.Now()
	if s.proof != nil {
		at = s.proof()
	}
	if at.After(s.contact) {
		s.contact = at
	}
}
