package bed

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"
	"time"
)

const (
	setUpBudget = 15 * time.Minute
	pause       = 20 * time.Millisecond
)

// Run runs the tests of a package that share what setUp starts, and returns the
// exit code. They are given a directory, which goes with the last of them
// unless one failed. What setUp returns, if it is not nil, is called in the
// end, and when setUp fails.
func Run(m *testing.M, name string, setUp func(ctx context.Context, dir string) (tearDown func() error, err error)) (code int) {
	flag.Parse() // before setUp, which may set some
	code, err := run(m, name, setUp)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func run(m *testing.M, name string, setUp func(context.Context, string) (func() error, error)) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), setUpBudget)
	defer cancel()
	dir, err := os.MkdirTemp("", "yurt-"+name+"-")
	if err != nil {
		return 0, err
	}
	tearDown, err := setUp(ctx, dir)
	code := 1
	if err == nil {
		code = m.Run()
	}
	if tearDown != nil {
		err = errors.Join(err, tearDown())
	}
	if code == 0 && err == nil {
		return 0, os.RemoveAll(dir)
	}
	fmt.Fprintln(os.Stderr, "logs are in", dir)
	return code, err
}

// Until repeats try until it gives no error, or the budget is over.
func Until(ctx context.Context, budget time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	var last error
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil {
			last = err // not that the time is over
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", budget, last)
		case <-tick.C:
		}
	}
}
