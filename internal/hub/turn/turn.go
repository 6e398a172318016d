// Package turn shares the processor among callers who want heavy work done,
// such as lists of thousands of objects: few at a time do it, and callers take
// turns, so that one who asks a hundred times at once gets no more than one
// who asks once.
//
// A turn is for computing. Whoever waits, for a client or for the disk, gives
// it up and takes another one later.
package turn

import (
	"context"
	"fmt"
	"sync"
)

// Queue hands out turns. Use New.
type Queue struct {
	mu    sync.Mutex // guards the following
	free  int
	lines []*line // those in which somebody waits; the first is next
}

// line is where one caller's requests wait.
type line struct {
	who     string
	waiting []chan struct{} // closed when it is their turn
}

// New returns a queue with so many turns at a time.
func New(turns int) *Queue { return &Queue{free: turns} }

// take waits for a turn of who.
func (q *Queue) take(ctx context.Context, who string) error {
	q.mu.Lock()
	if q.free > 0 {
		q.free--
		q.mu.Unlock()
		return nil
	}
	ready := make(chan struct{})
	l := q.lineLocked(who)
	l.waiting = append(l.waiting, ready)
	q.mu.Unlock()
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-ready: // it came just now: the next one has it
		q.giveLocked()
	default:
		q.leaveLocked(who, ready)
	}
	return fmt.Errorf("wait for a turn: %w", context.Cause(ctx))
}

func (q *Queue) lineLocked(who string) *line {
	for _, l := range q.lines {
		if l.who == who {
			return l
		}
	}
	l := &line{who: who}
	q.lines = append(q.lines, l)
	return l
}

func (q *Queue) leaveLocked(who string, ready chan struct{}) {
	for i, l := range q.lines {
		if l.who != who {
			continue
		}
		for j, w := range l.waiting {
			if w == ready {
				l.waiting = append(l.waiting[:j], l.waiting[j+1:]...)
				break
			}
		}
		if len(l.waiting) == 0 {
			q.lines = append(q.lines[:i], q.lines[i+1:]...)
		}
		return
	}
}

func (q *Queue) give() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.giveLocked()
}

// giveLocked passes a turn on: to the first of the first line, whose others
// then wait behind all other lines.
func (q *Queue) giveLocked() {
	if len(q.lines) == 0 {
		q.free++
		return
	}
	l := q.lines[0]
	q.lines = q.lines[1:]
	close(l.waiting[0])
	if l.waiting = l.waiting[1:]; len(l.waiting) > 0 {
		q.lines = append(q.lines, l)
	}
}

// Ticket is one request's place in a queue. The nil ticket never waits. It is
// for one goroutine.
type Ticket struct {
	queue *Queue
	who   string
	held  bool
}

// Begin waits for a turn. An error is that of ctx.
func (t *Ticket) Begin(ctx context.Context) error {
	if t == nil || t.held {
		return nil
	}
	if err := t.queue.take(ctx, t.who); err != nil {
		return err
	}
	t.held = true
	return nil
}

// End gives the turn up. It reports whether there was one.
func (t *Ticket) End() bool {
	if t == nil || !t.held {
		return false
	}
	t.held = false
	t.queue.give()
	return true
}

type key struct{}

// With returns a context whose work takes turns in the queue, as who.
func (q *Queue) With(ctx context.Context, who string) context.Context {
	return context.WithValue(ctx, key{}, &Ticket{queue: q, who: who})
}

// From returns the ticket that With put there, or nil.
func From(ctx context.Context) *Ticket {
	t, _ := ctx.Value(key{}).(*Ticket)
	return t
}
