package pools

import (
	"testing"

	"github.com/yurt-edge/yurt/test/bed"
)

// TestPool lets a pool of four hubs, two of them leaders, go through what may
// happen to it. Local watchers of all hubs see each change once and in order,
// by a watch that never ends.
func TestPool(t *testing.T) {
	s := newSite(t, "hangzhou", 4)
	s.elect(t, 2)
	for range s.names() {
		s.write(t)
	}
	all := []int{0, 1, 2, 3}
	for _, i := range all {
		s.start(t, i)
	}
	for _, i := range all {
		s.watch(t, i)
	}
	first, second := s.node(0), s.node(1)
	step := func(name string, run func(t *testing.T)) {
		t.Helper()
		t.Log(name)
		run(t)
		if t.Failed() {
			t.FailNow()
		}
	}

	step("all follow the first leader, which follows the cloud", func(t *testing.T) {
		s.hubs[0].follows(t, "cloud", true)
		for _, i := range all[1:] {
			s.hubs[i].follows(t, first, true)
		}
		s.write(t)
		s.seen(t, all...)
	})
	step("a follower loses its uplink", func(t *testing.T) {
		cut(t, s.hubs[3], bed.Down)
		s.write(t)
		s.seen(t, all...)
		s.hubs[3].follows(t, first, true)
		heal(t, s.hubs[3])
	})
	step("the first leader loses its uplink", func(t *testing.T) {
		cut(t, s.hubs[0], bed.Blackhole)
		s.write(t)
		s.seen(t, all...)
		s.hubs[0].follows(t, second, true)
		s.hubs[1].follows(t, "cloud", true)
		heal(t, s.hubs[0])
		s.write(t)
		s.seen(t, all...)
	})
}

func cut(t *testing.T, h *hub, how bed.Mode) {
	t.Helper()
	if err := h.link.Cut(how); err != nil {
		t.Fatal(err)
	}
}

func heal(t *testing.T, h *hub) {
	t.Helper()
	if err := h.link.Heal(); err != nil {
		t.Fatal(err)
	}
}
