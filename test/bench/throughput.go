package main

import (
	"context"
	"fmt"
	"os"
	"time"
)

func (b *bench) binarySize(context.Context) error {
	info, err := os.Stat(b.binary)
	if err != nil {
		return fmt.Errorf("measure binary: %w", err)
	}
	b.hub("yurthub, stripped", "MB", float64(info.Size())/1e6, atMost(45), "")
	return nil
}

// forward measures what the hub must ask the cloud for.
func (b *bench) forward(ctx context.Context) error {
	if err := b.maps(ctx, "forward", 100, 2048); err != nil {
		return err
	}
	if err := b.create(ctx, slicePath, "held", 1, sliceIn("held")); err != nil {
		return err
	}
	h, err := b.startHub(ctx, false)
	if err != nil {
		return err
	}
	defer h.close()
	if err := h.holds(ctx, fmt.Sprintf(slicePath, "held"), 1); err != nil {
		return err
	}
	list := fmt.Sprintf(mapPath, "forward")
	loads := []struct {
		what string
		load load
		bar  bar
	}{
		{"forwarded GET of 2 KB", load{path: list + "/object-00000", accept: protobuf}, atLeast(0.9)},
		{"forwarded LIST of 100 × 2 KB", load{path: list, accept: protobuf}, atLeast(0.9)},
		{"GET of what is held, latest", load{path: fmt.Sprintf(slicePath, "held") + "/object-00000", accept: protobuf}, bar{}},
	}
	for _, n := range []int{1, 8, 64} {
		s := connect(b.direct(), h.user, n)
		for _, l := range loads {
			c, err := s.compare(ctx, h, l.load, pick(b, 5, 3), pick(b, 2*time.Second, time.Second))
			if err != nil {
				return err
			}
			b.compared(fmt.Sprintf("%s, %d connections", l.what, n), c, l.bar)
		}
		if n == 64 {
			err = h.profile(ctx, "forward-get", func() error {
				_, _, err := rate(ctx, s[1], loads[0].load, 5*time.Second)
				return err
			})
			if err != nil {
				return err
			}
		}
		s.close()
	}
	return nil
}

// compared adds the figures of a comparison.
func (b *bench) compared(what string, c comparison, least bar) {
	b.pair(what, "1/s", c.pace, least, c.note())
	b.pair(what+": processor time of all servers", "µs", c.cost, bar{}, "")
}

// replica measures what the hub answers by itself: EndpointSlices, which it
// holds without being asked.
func (b *bench) replica(ctx context.Context) error {
	if err := b.slices(ctx, "slices", 1000); err != nil {
		return err
	}
	h, err := b.startHub(ctx, false)
	if err != nil {
		return err
	}
	defer h.close()
	list := fmt.Sprintf(slicePath, "slices")
	if err := h.holds(ctx, list, 1000); err != nil {
		return err
	}
	const cached = "?resourceVersion=0"
	loads := []struct {
		name, what string
		conns      int
		load       load
		bar        bar
	}{
		{"replica-get", "GET rv=0 of a 12 KB slice, protobuf", 8, load{path: list + "/object-00000" + cached, accept: protobuf}, atLeast(4)},
		{"replica-get-json", "GET rv=0 of a 12 KB slice, JSON", 8, load{path: list + "/object-00000" + cached, accept: jsonType}, atLeast(4)},
		{"replica-list", "LIST rv=0 of 1 000 slices, protobuf", 4, load{path: list + cached, accept: protobuf}, atLeast(5)},
		{"replica-list-json", "LIST rv=0 of 1 000 slices, JSON", 4, load{path: list + cached, accept: jsonType}, atLeast(5)},
		{"replica-list-gzip", "LIST rv=0 of 1 000 slices, protobuf, client takes gzip as client-go does", 4, load{path: list + cached, accept: protobuf, gzip: true}, bar{}},
	}
	for _, l := range loads {
		s := connect(b.direct(), h.user, l.conns)
		c, err := s.compare(ctx, h, l.load, pick(b, 5, 3), pick(b, 2*time.Second, time.Second))
		if err == nil {
			b.compared(fmt.Sprintf("%s, %d connections", l.what, l.conns), c, l.bar)
			err = h.profile(ctx, l.name, func() error {
				_, _, err := rate(ctx, s[1], l.load, 5*time.Second)
				return err
			})
		}
		s.close()
		if err != nil {
			return err
		}
	}
	return b.memory(h, "after LISTs of 1 000 slices by several clients", atMost(60))
}
