package journal

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestDiskThatKeepsWhatIsDelivered has the disk refuse to let go of entries
// that the cloud has got. Nothing waits behind them, what takes their place
// stays, and they go when the disk lets them.
func TestDiskThatKeepsWhatIsDelivered(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		pass(3 * time.Second)
		b.cloud.cut()
		synctest.Wait()
		b.mustPatch("a", `{"phase":"Running"}`)
		b.event("one")
		b.event("two")
		b.depth(1, 2)
		refused, cancel := context.WithCancel(t.Context())
		cancel() // the disk writes nothing for it
		for _, e := range b.journal.status {
			if err := b.journal.settle(refused, e, 1); err != nil {
				t.Errorf("the cloud has the status, and it is not settled: %v", err)
			}
		}
		for _, e := range b.journal.events {
			if err := b.journal.settleEvent(refused, e); err != nil {
				t.Errorf("the cloud has the event, and it is not settled: %v", err)
			}
		}
		if s := b.journal.Stats(); s.Status+s.Events != 0 || len(b.journal.lingering) != 3 {
			t.Fatalf("%+v wait, %d linger", s, len(b.journal.lingering))
		}
		b.event("two") // again
		if len(b.journal.lingering) != 2 {
			t.Errorf("%d linger: what was made anew is not what lingered", len(b.journal.lingering))
		}
		b.cloud.heal()
		pass(time.Minute)
		b.depth(0, 0)
		if n := len(b.journal.lingering); n != 0 {
			t.Errorf("%d linger though the disk would let them go", n)
		}
		b.crash()
		b.depth(0, 0)
	})
}
