package daemon

import (
	"context"
	"os/signal"
	"syscall"
)

// SignalContext returns a copy of parent that ends at the first SIGINT or
// SIGTERM; context.Cause then names the signal. A second signal kills the
// process at once, so that a stop that hangs can be ended from a terminal.
// The returned function releases the signals.
func SignalContext(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(parent, syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
