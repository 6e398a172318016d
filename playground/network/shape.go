package network

import (
	"math/rand/v2"
	"sync"
	"time"
)

// Shape is what a narrow link does to packets of one direction. The zero
// Shape does nothing.
type Shape struct {
	// Delay is added to each packet, give or take Jitter. Packets are
	// never reordered.
	Delay, Jitter time.Duration
	// Rate is in bits per second; zero is unlimited. Up to 100 ms of
	// packets (or 64 KiB) wait for their turn, more are dropped.
	Rate int64
	// Loss is the share of packets dropped, from 0 to 1.
	Loss float64
}

// IsZero tells whether the shape does nothing.
func (s Shape) IsZero() bool {
	return s == Shape{}
}

func (s Shape) valid() bool {
	return s.Delay >= 0 && s.Jitter >= 0 && s.Rate >= 0 && s.Loss >= 0 && s.Loss <= 1
}

// LaneStats counts the packets of one direction of a relay.
type LaneStats struct {
	// Packets and Bytes have been let through.
	Packets, Bytes uint64
	// Lost were dropped by chance, Overrun because a queue was full.
	Lost, Overrun uint64
}

const (
	// queueTime and queueBytes bound what waits for the rate; the larger
	// one counts.
	queueTime  = 100 * time.Millisecond
	queueBytes = 64 << 10
	// lineBytes bounds what is under way because of the delay: 2 s of
	// 100 Mbit/s.
	lineBytes = 25 << 20
)

type frame struct {
	due  time.Time
	data []byte
}

// A lane is one direction of a relay: a first-in-first-out line of packets
// with the time at which each comes out. It is told the time, so that tests
// need not wait.
type lane struct {
	mu    sync.Mutex // guards all below
	shape Shape
	line  []frame
	bytes int
	// idle is when the last admitted packet has been sent at Rate.
	idle time.Time
	// last is when the last admitted packet comes out.
	last  time.Time
	stats LaneStats

	// more holds a token when the line may have a new head.
	more chan struct{}
}

func newLane() *lane {
	return &lane{more: make(chan struct{}, 1)}
}

func (l *lane) set(s Shape) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shape = s
}

// admit takes a packet in, or drops it. The lane owns data afterwards.
func (l *lane) admit(now time.Time, data []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.shape
	if s.Loss > 0 && rand.Float64() < s.Loss {
		l.stats.Lost++
		return
	}
	out := now
	if s.Rate > 0 {
		bits := func(n int) time.Duration {
			return time.Duration(float64(n) * 8 / float64(s.Rate) * float64(time.Second))
		}
		start := now
		if l.idle.After(now) {
			start = l.idle
		}
		if start.Sub(now) > max(queueTime, bits(queueBytes)) {
			l.stats.Overrun++
			return
		}
		l.idle = start.Add(bits(len(data)))
		out = l.idle
	}
	if l.bytes+len(data) > lineBytes {
		l.stats.Overrun++
		return
	}
	out = out.Add(s.Delay)
	if s.Jitter > 0 {
		out = out.Add(time.Duration((2*rand.Float64() - 1) * float64(s.Jitter)))
	}
	if out.Before(l.last) {
		out = l.last
	}
	l.last = out
	l.bytes += len(data)
	l.line = append(l.line, frame{out, data})
	select {
	case l.more <- struct{}{}:
	default:
	}
}

// take returns the packets that are due, and after them how long it is until
// the next one; zero when there is none.
func (l *lane) take(now time.Time) (due [][]byte, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for ; n < len(l.line) && !l.line[n].due.After(now); n++ {
		data := l.line[n].data
		due = append(due, data)
		l.bytes -= len(data)
		l.stats.Packets++
		l.stats.Bytes += uint64(len(data))
		l.line[n] = frame{}
	}
	l.line = l.line[n:]
	if len(l.line) > 0 {
		return due, l.line[0].due.Sub(now)
	}
	// Give the array back, so that a burst is not held for ever.
	l.line = nil
	return due, 0
}

func (l *lane) snapshot() (Shape, LaneStats) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shape, l.stats
}
