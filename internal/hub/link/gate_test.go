package link

import (
	"net/http"
	"sync"
	"testing"
	"time"
)

// TestFewConnections begins many streams and questions at the same moment, as
// a hub does when the link comes up.
func TestFewConnections(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	u := newUpstream(t, ca, hello)
	r := newRig(t, ca, nil, u.addr())
	r.waitUp(t)
	before := u.dials.Load()
	var wg sync.WaitGroup
	for range 20 {
		for rt, path := range map[http.RoundTripper]string{r.Node(): "/api/v1/pods?watch=1", r.Questions(): "/version"} {
			wg.Go(func() {
				if _, err := read(rt.RoundTrip(newRequest(t, path))); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if n := u.dials.Load() - before; n > 2 {
		t.Errorf("%d connections were made for streams and questions, want one for each", n)
	}
}

// TestGateOpensWhenAllIsCut has a stream wait for another one's connection,
// which is being made in a black hole.
func TestGateOpensWhenAllIsCut(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	w := newWire(t, newUpstream(t, ca, hello).addr())
	r := newRig(t, ca, func(c *Config) {
		c.Budgets = Budgets{Stall: 200 * time.Millisecond, Connect: 200 * time.Millisecond, Answer: 200 * time.Millisecond, Patience: time.Minute}
	}, w.addr)
	r.waitUp(t)
	w.blackhole()
	failed := make(chan error, 2)
	for range cap(failed) {
		go func() {
			_, err := read(r.Node().RoundTrip(newRequest(t, "/api/v1/pods?watch=1")))
			failed <- err
		}()
	}
	for range cap(failed) {
		select {
		case err := <-failed:
			if err == nil {
				t.Error("a black hole answered")
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a stream waits for ever")
		}
	}
}
