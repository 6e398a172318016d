// Package doctor tells an operator on a node how its hub does (status), and
// which hop fails when it does not (doctor). Both work with the link cut and
// with the hub down, change nothing, and break no lock of the hub.
//
// A check finds one thing. It is not made when one that it rests on has
// failed, so that the first failure is the one to mend.
package doctor

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// budget bounds a whole examination, as on a link that swallows everything.
const budget = 14 * time.Second

// Outcome is what a check found.
type Outcome string

// The outcomes of a check.
const (
	OK      Outcome = "ok"
	Warn    Outcome = "warn"
	Fail    Outcome = "fail"
	Skipped Outcome = "skipped"
)

// Result is one check's.
type Result struct {
	Check   string  `json:"check"`
	Target  string  `json:"target,omitempty"` // what was looked at
	Outcome Outcome `json:"outcome"`
	Text    string  `json:"text"`              // what was found
	Hint    string  `json:"hint,omitempty"`    // what helps
	Command string  `json:"command,omitempty"` // what to run for it
}

func ok(format string, a ...any) Result { return Result{Outcome: OK, Text: fmt.Sprintf(format, a...)} }

func warn(format string, a ...any) Result {
	return Result{Outcome: Warn, Text: fmt.Sprintf(format, a...)}
}

func fail(format string, a ...any) Result {
	return Result{Outcome: Fail, Text: fmt.Sprintf(format, a...)}
}

// so adds what helps.
func (r Result) so(hint, command string) Result {
	r.Hint, r.Command = hint, command
	return r
}

// check is one thing to find out.
type check struct {
	name  string
	needs []string // of the same chain, or made before it
	limit time.Duration
	run   func(context.Context) Result
}

// chain is checks that are made one after the other.
type chain struct {
	target string
	checks []check
}

// run makes the checks and tells each result. Checks in before were made.
func (c chain) run(ctx context.Context, before []Result, tell func(Result)) []Result {
	done := slices.Clone(before)
	var out []Result
	for _, k := range c.checks {
		r := c.one(ctx, k, done)
		r.Check, r.Target = k.name, c.target
		tell(r)
		done, out = append(done, r), append(out, r)
	}
	return out
}

func (c chain) one(ctx context.Context, k check, done []Result) Result {
	for _, r := range done {
		if slices.Contains(k.needs, r.Check) && (r.Outcome == Fail || r.Outcome == Skipped) {
			return Result{Outcome: Skipped, Text: "not checked because of " + r.Check}
		}
	}
	if ctx.Err() != nil {
		return Result{Outcome: Skipped, Text: "not checked because the time was over"}
	}
	ctx, cancel := context.WithTimeout(ctx, k.limit)
	defer cancel()
	result := make(chan Result, 1) // room, so that a check that hangs can end
	go func() { result <- k.run(ctx) }()
	select {
	case r := <-result:
		return r
	case <-ctx.Done():
		// A system call may hang, as on a disk that is dying.
		return fail("no result within %s", k.limit)
	}
}

// Examine makes all checks for the node of s, in order: what is on the node,
// then the way to each server, all servers at the same time. tell is called
// for each result, from one goroutine at a time.
func Examine(ctx context.Context, s Settings, tell func(Result)) []Result {
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	results := chain{checks: s.local()}.run(ctx, nil, tell)
	ways := make([][]Result, len(s.Servers))
	var wg sync.WaitGroup
	var mu sync.Mutex // guards tell
	for i, server := range s.Servers {
		wg.Go(func() {
			ways[i] = s.way(server).run(ctx, results, func(r Result) {
				mu.Lock()
				defer mu.Unlock()
				tell(r)
			})
		})
	}
	wg.Wait()
	for _, w := range ways {
		results = append(results, w...)
	}
	return results
}

// first returns the first failure, which is the one to mend.
func first(results []Result) (Result, bool) {
	i := slices.IndexFunc(results, func(r Result) bool { return r.Outcome == Fail })
	if i < 0 {
		return Result{}, false
	}
	return results[i], true
}
