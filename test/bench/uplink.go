package main

import (
	"context"
	"fmt"
	"time"

	"github.com/yurt-edge/yurt/test/bed"
)

// uplink measures what the hub itself asks of the link.
func (b *bench) uplink(ctx context.Context) error {
	if err := b.slices(ctx, "slices", 1000); err != nil {
		return err
	}
	h, err := b.startHub(ctx, true)
	if err != nil {
		return err
	}
	defer h.close()
	path := fmt.Sprintf(slicePath, "slices")
	if err := h.holds(ctx, path, 1000); err != nil {
		return err
	}
	if err := h.settle(ctx); err != nil {
		return err
	}
	first := h.uplink()
	b.hub("bytes of the first sync, 1 000 slices", "MB", first/1e6, bar{}, "certificate, discovery and all")
	h.Stop()
	before := h.uplink()
	if err := h.Start(ctx); err != nil {
		return err
	}
	if err := h.holds(ctx, path, 1000); err != nil {
		return err
	}
	if err := h.settle(ctx); err != nil {
		return err
	}
	again := h.uplink() - before
	b.hub("bytes after a restart with nothing changed, of the first sync", "%", 100*again/first, atMost(1), fmt.Sprintf("%.0f KB", again/1e3))

	period := pick(b, time.Minute, 10*time.Second)
	p0, err := readProcess(h.PID())
	if err != nil {
		return err
	}
	before = h.uplink()
	if err := pause(ctx, period); err != nil {
		return err
	}
	p1, err := readProcess(h.PID())
	if err != nil {
		return err
	}
	hourly := float64(time.Hour) / float64(period)
	note := fmt.Sprintf("extrapolated from %s", period)
	b.hub("bytes idle, per hour", "KB", (h.uplink()-before)*hourly/1e3, bar{}, note)
	b.hub("disk written idle, per hour", "KB", (p1.written-p0.written)*hourly/1e3, bar{}, note)
	b.hub("processor time idle", "%", 100*float64(p1.busy-p0.busy)/float64(period), bar{}, "of one processor")
	return nil
}

// settle waits until nothing has passed over the link for a second.
func (h *hub) settle(ctx context.Context) error {
	last, since := -1.0, time.Now()
	return until(ctx, time.Minute, 50*time.Millisecond, func() (bool, error) {
		if bytes := h.uplink(); bytes != last {
			last, since = bytes, time.Now()
		}
		return time.Since(since) > 2*time.Second, nil
	})
}

// reconnect cuts the link, changes objects behind the hub's back, and times
// how soon after the link's return every local watcher has every change.
func (b *bench) reconnect(ctx context.Context) error {
	if err := b.slices(ctx, "slices", 1000); err != nil {
		return err
	}
	h, err := b.startHub(ctx, true)
	if err != nil {
		return err
	}
	defer h.close()
	if err := h.holds(ctx, fmt.Sprintf(slicePath, "slices"), 1000); err != nil {
		return err
	}
	const watchers, changes = 10, 500
	times := pick(b, 2, 1)
	w, err := b.newWriter("slices", endpoints, changes, 2*times*changes)
	if err != nil {
		return err
	}
	for _, mode := range []bed.Mode{bed.Down, bed.Blackhole} {
		var took []float64
		var late error
		broken, bytes := 0, 0.0
		for range times {
			a, err := w.audience(ctx, h.user, watchers, w.next, changes)
			if err != nil {
				return err
			}
			back, err := h.cutAround(ctx, mode, b.cut, func() error {
				_, _, err := w.write(ctx, changes, 0)
				return err
			})
			before := h.uplink()
			if err == nil {
				// Who misses something after this has lost its stream.
				late = a.wait(ctx, 20*time.Second)
			}
			took = append(took, time.Since(back).Seconds())
			bytes = h.uplink() - before
			broken += a.broken()
			a.close()
			if err != nil {
				return err
			}
		}
		note := fmt.Sprintf("%.1f MB over the link", bytes/1e6)
		if late != nil {
			note = late.Error()
		}
		how := map[bed.Mode]string{bed.Down: "refused", bed.Blackhole: "silent"}[mode]
		b.hub(fmt.Sprintf("%s of a %s link, 500 objects changed: until %d watchers have all", b.cut, how, watchers), "s",
			median(took), atMost(2), note)
		b.hub("streams broken by it", "", float64(broken), atMost(0), fmt.Sprintf("of %d", watchers*times))
	}
	return nil
}

// cutAround cuts the link for at least d, does something meanwhile, and
// returns when the link came back.
func (h *hub) cutAround(ctx context.Context, mode bed.Mode, d time.Duration, meanwhile func() error) (time.Time, error) {
	if err := h.link.Cut(mode); err != nil {
		return time.Time{}, err
	}
	end := time.Now().Add(d)
	err := meanwhile()
	if err == nil {
		err = pause(ctx, time.Until(end))
	}
	back := time.Now()
	if herr := h.link.Heal(); err == nil {
		err = herr
	}
	return back, err
}

// large measures a cluster of ten thousand slices.
func (b *bench) large(ctx context.Context) error {
	const objects = 10000
	if err := b.slices(ctx, "slices", 1000); err != nil {
		return err
	}
	if err := b.slices(ctx, "more-slices", objects-1000); err != nil {
		return err
	}
	h, err := b.startHub(ctx, false)
	if err != nil {
		return err
	}
	defer h.close()
	if err := h.holds(ctx, fmt.Sprintf(slicePath, "more-slices"), objects-1000); err != nil {
		return err
	}
	if err := h.quiet(ctx); err != nil {
		return err
	}
	if err := b.memory(h, "10 000 slices just replicated", atMost(120)); err != nil {
		return err
	}
	s := connect(b.direct(), h.user, 1)
	defer s.close()
	l := load{path: "/apis/discovery.k8s.io/v1/endpointslices?resourceVersion=0", accept: protobuf}
	c, err := s.compare(ctx, h, l, pick(b, 5, 2), pick(b, 3*time.Second, time.Second))
	if err != nil {
		return err
	}
	b.compared("LIST rv=0 of 10 000 slices, protobuf, 1 connection", c, atLeast(5))
	if err := b.memory(h, "10 000 slices replicated and listed", atMost(120)); err != nil {
		return err
	}
	return h.profile(ctx, "large", func() error {
		_, _, err := rate(ctx, s[1], l, 5*time.Second)
		return err
	})
}
