package conform

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// TestRestartCostsTheLinkLittle starts a hub anew while nothing has changed.
// What it sends and is sent is some handshakes of four KB, a line for each watch,
// and what must be asked again: 38 KB alone, and more beside other tests, which
// have it open more connections. To list anew would be three times as much.
func TestRestartCostsTheLinkLittle(t *testing.T) {
	t.Parallel()
	hub, link := calm.hub(t, "edge-restart")
	total := func() int64 {
		up, down := link.Bytes()
		return up + down
	}
	settled := func() int64 {
		t.Helper()
		last, since := total(), time.Now()
		mustAwait(t, func(context.Context) error {
			if now := total(); now != last {
				last, since = now, time.Now()
			}
			if d := time.Since(since); d < 2*time.Second {
				return fmt.Errorf("bytes passed %s ago", d)
			}
			return nil
		})
		return last
	}
	first := settled()
	hub.Stop()
	before := total()
	if err := hub.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustAwait(t, func(context.Context) error {
		if total() == before {
			return fmt.Errorf("the hub has not asked anything yet")
		}
		return nil
	})
	again := settled() - before
	t.Logf("%d bytes at first, %d after a restart", first, again)
	if again > 65_000 {
		t.Errorf("a restart with nothing changed costs %d bytes, the first start cost %d", again, first)
	}
}
