package turn

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
)

// TestCallersTakeTurns has one caller ask a hundred times before another asks
// once: the other is next but one.
func TestCallersTakeTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := New(1)
		first := From(q.With(t.Context(), "flood"))
		if err := first.Begin(t.Context()); err != nil {
			t.Fatal(err)
		}
		var order []string // written by whoever has the turn
		ask := func(who string) {
			ticket := From(q.With(t.Context(), who))
			go func() {
				if err := ticket.Begin(t.Context()); err != nil {
					t.Error(err)
					return
				}
				order = append(order, who)
				ticket.End()
			}()
			synctest.Wait()
		}
		for range 100 {
			ask("flood")
		}
		ask("other")
		ask("third")
		if len(order) != 0 {
			t.Fatalf("%d went while the only turn was taken", len(order))
		}
		if !first.End() || first.End() {
			t.Error("a turn ends once")
		}
		synctest.Wait()
		if want := []string{"flood", "other", "third", "flood"}; len(order) != 102 || !slices.Equal(order[:4], want) {
			t.Errorf("%d went, first %v, want 102, first %v", len(order), order[:min(len(order), 4)], want)
		}
	})
}

func TestWhoLeavesTheQueueTakesNoTurn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := New(1)
		held := From(q.With(t.Context(), "a"))
		if err := held.Begin(t.Context()); err != nil {
			t.Fatal(err)
		}
		gone, leave := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() { left <- From(q.With(gone, "b")).Begin(gone) }()
		synctest.Wait()
		leave()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("left with %v", err)
		}
		held.End()
		for range 2 { // the turn is neither lost nor doubled
			if err := held.Begin(t.Context()); err != nil {
				t.Fatal(err)
			}
			if q.free != 0 || len(q.lines) != 0 {
				t.Fatalf("%d turns free, %d lines, while the only one is held", q.free, len(q.lines))
			}
			held.End()
		}
	})
}

func TestNoTicketNeverWaits(t *testing.T) {
	t.Parallel()
	none := From(t.Context())
	if err := none.Begin(t.Context()); err != nil || none.End() {
		t.Errorf("%v", err)
	}
}
