package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
)

const fanOutRate = 200 // updates per second

// delivery is what one round of a fan-out came to.
type delivery struct {
	latency []float64 // ms from before the write to receipt
	added   []float64 // ms after the receipt by a watcher at the API server
	pace    float64   // updates per second
	busy    float64   // of the hub, in percent of one processor
	client  float64   // of this process
	uplink  float64   // bytes per update
}

// fanOut measures how updates reach many watchers of one resource. The same
// updates reach one watcher at the API server, to which the others compare.
func (b *bench) fanOut(ctx context.Context) error {
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
	updates := fanOutRate * pick(b, 8, 3)
	w, err := b.newWriter("slices", endpoints, 200, 100*updates)
	if err != nil {
		return err
	}
	uplink := map[int]float64{}
	for _, n := range []int{1, 10, 50} {
		var p50, p99, added50, added99, load, client, bytes rounds
		for i := range pick(b, 3, 1) {
			var round [2]delivery
			for j := range 2 {
				which := (i + j) % 2
				t := b.direct()
				if which == 1 {
					t = h.user
				}
				if round[which], err = b.deliver(ctx, h, w, t, n, updates); err != nil {
					return err
				}
			}
			both := func(f func(d *delivery) float64) [2]float64 { return [2]float64{f(&round[0]), f(&round[1])} }
			p50 = append(p50, both(func(d *delivery) float64 { return quantile(d.latency, 0.5) }))
			p99 = append(p99, both(func(d *delivery) float64 { return quantile(d.latency, 0.99) }))
			added50 = append(added50, both(func(d *delivery) float64 { return quantile(d.added, 0.5) }))
			added99 = append(added99, both(func(d *delivery) float64 { return quantile(d.added, 0.99) }))
			load = append(load, both(func(d *delivery) float64 { return d.busy }))
			client = append(client, both(func(d *delivery) float64 { return d.client }))
			bytes = append(bytes, both(func(d *delivery) float64 { return d.uplink }))
			if pace := round[1].pace; pace < 0.95*fanOutRate {
				fmt.Fprintf(b.log, "fan-out: the writer made only %.0f updates/s\n", pace)
			}
		}
		who := fmt.Sprintf(", %d watchers", n)
		b.pair("latency from write, p50"+who, "ms", p50, bar{}, "")
		b.pair("latency from write, p99"+who, "ms", p99, bar{}, "")
		add := func(what string, r rounds, most bar) {
			direct, hub, _ := r.medians()
			b.add(Row{What: what + who, Unit: "ms", Direct: &direct, Hub: &hub, Note: "after one more watcher at the API server, same updates"}, most)
		}
		add("latency added, p50", added50, bar{})
		add("latency added, p99", added99, atMost(20))
		_, cpu, _ := load.medians()
		_, self, _ := client.medians()
		b.hub("processor time of the hub"+who, "%", cpu, bar{}, fmt.Sprintf("of one processor; writer and watchers themselves %.0f %%", self))
		_, uplink[n], _ = bytes.medians()
	}
	b.hub("uplink bytes for 50 watchers, of those for one", "×", uplink[50]/uplink[1], atMost(1.1),
		fmt.Sprintf("%.0f and %.0f bytes per update", uplink[50], uplink[1]))
	err = h.profile(ctx, "fan-out", func() error {
		_, err := b.deliver(ctx, h, w, h.user, 50, 5*fanOutRate)
		return err
	})
	if err != nil {
		return err
	}
	return b.memory(h, "after a fan-out to 50 watchers", atMost(100))
}

// deliver makes updates and measures when n watchers of t get them.
func (b *bench) deliver(ctx context.Context, h *hub, w *writer, t target, n, updates int) (delivery, error) {
	reference, err := w.audience(ctx, b.direct(), 1, w.next, updates)
	if err != nil {
		return delivery{}, err
	}
	defer reference.close()
	local, err := w.audience(ctx, t, n, w.next, updates)
	if err != nil {
		return delivery{}, err
	}
	defer local.close()
	before, err := readProcess(h.PID())
	if err != nil {
		return delivery{}, err
	}
	client, err := busy(os.Getpid())
	if err != nil {
		return delivery{}, err
	}
	bytes, start := h.uplink(), time.Now()
	first, pace, err := w.write(ctx, updates, fanOutRate)
	if err != nil {
		return delivery{}, err
	}
	var g errgroup.Group
	for _, a := range []*audience{reference, local} {
		g.Go(func() error { return a.wait(ctx, 30*time.Second) })
	}
	if err := g.Wait(); err != nil {
		return delivery{}, err
	}
	after, err := readProcess(h.PID())
	if err != nil {
		return delivery{}, err
	}
	percent := 100 / float64(time.Since(start))
	self, err := busy(os.Getpid())
	if err != nil {
		return delivery{}, err
	}
	d := delivery{
		pace: pace, busy: percent * float64(after.busy-before.busy), client: percent * float64(self-client),
		uplink: (h.uplink() - bytes) / float64(updates),
	}
	for _, got := range local.got {
		for k := range got {
			at := got[k].Load()
			d.latency = append(d.latency, ms(at-w.sent[first+k].Load()))
			d.added = append(d.added, ms(at-reference.got[0][k].Load()))
		}
	}
	return d, nil
}

func ms(ns int64) float64 { return float64(ns) / 1e6 }
