package link

import (
	"testing"
	"time"
)

func TestPaceForgivesSlowlyAndWaitsNoLongerThanUsual(t *testing.T) {
	t.Parallel()
	now := time.Unix(0, 0)
	p := &pace{}
	// recover copies in time until the link is slow no more.
	recovered := func() (copies int) {
		t.Helper()
		for p.slow && copies < 1000 {
			now = now.Add(p.pause)
			if !p.copy(now) {
				t.Fatalf("no copy %s after the last", p.pause)
			}
			if p.copy(now) {
				t.Fatal("two copies at once")
			}
			p.copied(now, true)
			copies++
		}
		return copies
	}
	for _, want := range []int{4, 8, 16, 16} {
		if !p.late(now) || p.late(now) {
			t.Fatal("a late answer turns a link slow, once")
		}
		if got := recovered(); got != want {
			t.Fatalf("%d copies were enough, want %d", got, want)
		}
	}
	// What turned slow because it was about to be cut has not relapsed.
	p.need = paceNeed
	p.late(now)
	if !p.cut(now.Add(paceSlow)) || p.slow || p.need != paceNeed {
		t.Errorf("after the cut: slow %v, need %d", p.slow, p.need)
	}
	now = now.Add(paceMemory + time.Second)
	p.late(now)
	if p.cut(now.Add(paceSlow + 1)) {
		t.Error("a link that was slow for long is not when it is cut")
	}
	p.copy(now.Add(pacePause))
	for range 20 {
		p.copied(now, false)
	}
	if p.pause != pacePatient || p.copy(now.Add(pacePatient-1)) {
		t.Errorf("late copies follow each other after %s", p.pause)
	}
	if !p.renew(now) || p.slow {
		t.Error("a link that came back is slow for what was before")
	}

	if got := p.patience(2 * time.Second); got != 2*time.Second {
		t.Errorf("patience %s before any answer", got)
	}
	for range 100 {
		p.answered(now, 10*time.Millisecond)
	}
	if got := p.patience(2 * time.Second); got < paceSlack || got > paceSlack+50*time.Millisecond {
		t.Errorf("patience %s where answers take 10 ms", got)
	}
	for range 10 * tardyMost {
		if p.answered(now, time.Second) || p.answered(now, 20*time.Millisecond) || p.answered(now, 20*time.Millisecond) {
			t.Fatal("one tardy answer made the link slow")
		}
	}
	for range tardyMost/2 - 1 {
		p.answered(now, time.Second)
	}
	if !p.answered(now, time.Second) || !p.slow {
		t.Error("tardy answers in a row did not make the link slow")
	}
}
