package playground

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	lockPoll = 200 * time.Millisecond
	// progressEvery is how often a running step says how far it is: seldom
	// enough for a CI log, often enough that nobody thinks it hangs.
	progressEvery = 10 * time.Second
)

// Progress tells a person what long steps do. The zero value tells nothing.
type Progress struct {
	out *printer
}

// NewProgress returns a Progress that writes whole lines to w, without cursor
// movement, so that a log reads as well as a terminal.
func NewProgress(w io.Writer) Progress {
	return Progress{out: &printer{w: w, start: time.Now()}}
}

type printer struct {
	mu    sync.Mutex // guards w
	w     io.Writer
	start time.Time
}

func (p *printer) line(format string, args ...any) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.w, "%6.1fs  %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, args...))
}

// Step is one long piece of work that is under way.
type Step struct {
	out   *printer
	what  string
	start time.Time

	mu   sync.Mutex // guards last
	last time.Time
}

// Start announces a step.
func (p Progress) Start(what string) *Step {
	p.out.line("%s ...", what)
	now := time.Now()
	return &Step{out: p.out, what: what, start: now, last: now}
}

// Update says how far the step is, but not more often than every ten seconds.
func (s *Step) Update(state string) {
	s.mu.Lock()
	due := time.Since(s.last) >= progressEvery
	if due {
		s.last = time.Now()
	}
	s.mu.Unlock()
	if due {
		s.out.line("%s: %s (%s so far)", s.what, state, time.Since(s.start).Round(time.Second))
	}
}

// Done announces the end of the step and how long it took.
func (s *Step) Done() {
	s.out.line("%s: done in %s", s.what, time.Since(s.start).Round(100*time.Millisecond))
}

// Fail ends the step with err and returns err.
func (s *Step) Fail(err error) error {
	s.out.line("%s: failed after %s", s.what, time.Since(s.start).Round(100*time.Millisecond))
	return err
}

// poll calls done at once and then every interval until it returns true or an
// error, or until ctx ends.
func poll(ctx context.Context, interval time.Duration, done func() (bool, error)) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// lineWriter calls line for every complete line that is written to it.
func lineWriter(line func(string)) io.Writer { return &lines{line: line} }

type lines struct {
	line func(string)
	rest []byte
}

func (l *lines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		i := bytes.IndexByte(l.rest, '\n')
		if i < 0 {
			return len(p), nil
		}
		l.line(string(l.rest[:i]))
		l.rest = l.rest[i+1:]
	}
}

// tail returns the last n lines of text.
func tail(text string, n int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}

func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
