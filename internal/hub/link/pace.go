package link

import "time"

// A link may be up and still be slower than anybody wants to wait. Pace judges
// that by the answers that somebody waits for: after a late one the link is
// slow, nobody waits any more, and now and then one request is copied to the
// cloud in the background. When enough copies in a row were answered in time
// the link is as good as any. Each relapse doubles what is enough, so that a
// link that is good by chance only is not believed for long.
//
// Pace is told the time, does no IO and is not safe for concurrent use.
type pace struct {
	slow bool
	// need copies in a row must be in time; streak are so far.
	need, streak int
	// before is what was enough before it turned slow, which it did at began.
	before int
	began  time.Time
	// copying says that a copy is under way. The next is due at next, pause
	// after the last.
	copying bool
	next    time.Time
	pause   time.Duration
	ended   time.Time     // when the link was last slow
	usual   time.Duration // that an answer takes, on average; 0: not known
	tardy   int           // a score: of answers that took longer than patience, less the others
}

const (
	paceNeed    = 4 // copies in time
	paceMost    = 16
	paceSlow    = 20 * time.Second       // a link that was slow for longer was not just about to be cut
	pacePause   = 250 * time.Millisecond // between copies in time
	pacePatient = 5 * time.Second        // between late ones, at most
	// paceSlack is what an answer may take beyond four times the usual: a new
	// connection is three, and the cloud has its moments too.
	paceSlack = 150 * time.Millisecond
	tardyMost = 6
	// paceMemory is how long a slow link is remembered.
	paceMemory = 10 * time.Minute
)

// late takes note of an answer that somebody waited for in vain. It reports
// whether the link was not slow before.
func (p *pace) late(now time.Time) bool {
	if p.slow {
		return false
	}
	p.before, p.began = p.need, now
	if p.need == 0 || now.Sub(p.ended) > paceMemory {
		p.need = paceNeed
	} else {
		p.need = min(2*p.need, paceMost)
	}
	p.slow, p.streak, p.pause, p.next = true, 0, pacePause, now.Add(pacePause)
	return true
}

// copy reports whether a copy of a request shall be sent now. If so, copied
// must follow.
func (p *pace) copy(now time.Time) bool {
	if !p.slow || p.copying || now.Before(p.next) {
		return false
	}
	p.copying = true
	return true
}

// copied takes the result of a copy. It reports whether the link is slow no
// more.
func (p *pace) copied(now time.Time, inTime bool) bool {
	p.copying = false
	if !p.slow {
		return false
	}
	if !inTime {
		p.streak, p.pause = 0, min(2*p.pause, pacePatient)
		p.next = now.Add(p.pause)
		return false
	}
	p.streak, p.pause = p.streak+1, pacePause
	p.next = now.Add(p.pause)
	if p.streak < p.need {
		return false
	}
	p.slow, p.ended = false, now
	return true
}

// cut takes note that the link went down. If it had turned slow just before,
// that was the cut, and is forgotten.
func (p *pace) cut(now time.Time) bool {
	if !p.slow || now.Sub(p.began) > paceSlow {
		return false
	}
	p.slow, p.need = false, p.before
	return true
}

// renew takes note that the link went up again. It starts with good faith,
// unless it was slow too often. It reports whether it is slow no more.
func (p *pace) renew(now time.Time) bool {
	if !p.slow || p.need > 2*paceNeed {
		return false
	}
	p.slow, p.ended = false, now
	return true
}

// patience is how long an answer is worth waiting for, at most limit.
func (p *pace) patience(limit time.Duration) time.Duration {
	if p.usual == 0 {
		return limit
	}
	return min(limit, paceSlack+4*p.usual)
}

// answered takes note of an answer and how long it took. It reports whether
// that makes the link slow: one that is tardy may have its reasons, three in a
// row, or most of some more, have the link's.
func (p *pace) answered(now time.Time, took time.Duration) bool {
	switch {
	case p.usual == 0:
		p.usual = max(took, 1)
	case took <= p.patience(took):
		p.usual += (took - p.usual) / 16
		p.tardy = max(0, p.tardy-1)
	default:
		if p.tardy += 2; p.tardy >= tardyMost {
			p.tardy = 0
			return p.late(now)
		}
	}
	return false
}
