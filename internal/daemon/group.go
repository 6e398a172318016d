package daemon

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"runtime/debug"
	"strings"
	"time"
)

// StopTimeout is how long Group waits, once its context has ended, for runs
// to return. It is well below systemd's 90 s, so that the log says which run
// hangs before systemd kills the process.
const StopTimeout = 15 * time.Second

// Group calls every run at the same time, each in its own goroutine, and
// waits for all of them. The first error cancels the context of the others;
// a run that returns nil does not. A panic of a run is an error. All errors are joined; an error that only
// says that the context was cancelled is dropped, so Group returns nil after
// an orderly stop by ctx.
//
// Runs that have not returned StopTimeout after the cancellation are named in
// the error and left behind: the process is then expected to exit.
func Group(ctx context.Context, runs ...func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	type result struct {
		index int
		err   error
	}
	// Room for every result, so that a run left behind can still end.
	results := make(chan result, len(runs))
	for i, run := range runs {
		go func() { results <- result{i, guarded(ctx, run)} }()
	}

	var (
		errs     []error
		running  = make([]bool, len(runs))
		stopping = ctx.Done()
		deadline <-chan time.Time
	)
	for i := range running {
		running[i] = true
	}
	for left := len(runs); left > 0; {
		select {
		case r := <-results:
			left--
			running[r.index] = false
			if r.err == nil || ctx.Err() != nil && errors.Is(r.err, context.Canceled) {
				continue
			}
			errs = append(errs, r.err)
			cancel(r.err)
		case <-stopping:
			stopping = nil
			deadline = time.After(StopTimeout)
		case <-deadline:
			var names []string
			for i, run := range runs {
				if running[i] {
					names = append(names, nameOf(run))
				}
			}
			errs = append(errs, fmt.Errorf("stop within %s: %s still running", StopTimeout, strings.Join(names, ", ")))
			return errors.Join(errs...)
		}
	}
	return errors.Join(errs...)
}

// guarded turns a panic of a run into its error, so that the others stop in
// good order and the log says which run it was.
func guarded(ctx context.Context, run func(context.Context) error) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("%s: panic: %s\n%s", nameOf(run), PanicCause(cause), debug.Stack())
		}
	}()
	return run(ctx)
}

// nameOf returns the name that the compiler gave run, without the folders of
// its import path, for example "upstream.(*Link).Run".
func nameOf(run func(context.Context) error) string {
	f := runtime.FuncForPC(reflect.ValueOf(run).Pointer())
	if f == nil {
		return "unknown"
	}
	name := f.Name()[strings.LastIndex(f.Name(), "/")+1:]
	return strings.TrimSuffix(name, "-fm")
}
