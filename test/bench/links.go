package main

import (
	"context"
	"fmt"
	"time"

	"github.com/yurt-edge/yurt/test/bed"
)

// links measures what a kubelet notices of a bad link. In these rows "direct"
// is the same read through a hub with a good link, at the same time.
func (b *bench) links(ctx context.Context) error {
	good, err := bed.NewPatient(ctx, b.cloud, b.binary, b.dir, "links-good")
	if err != nil {
		return err
	}
	defer good.Close()
	for n, illness := range bed.Illnesses() {
		if err := b.badLink(ctx, good, illness, fmt.Sprintf("links-%d", n)); err != nil {
			return fmt.Errorf("%s: %w", illness, err)
		}
	}
	return nil
}

func (b *bench) badLink(ctx context.Context, good *bed.Patient, illness bed.Illness, node string) error {
	ill, err := bed.NewPatient(ctx, b.cloud, b.binary, b.dir, node)
	if err != nil {
		return err
	}
	defer ill.Close()
	out, err := (&bed.Trial{Good: good, Ill: ill}).Run(ctx, illness, pick(b, 30*time.Second, 12*time.Second))
	if err != nil {
		return err
	}
	ms := func(t bed.Times, q float64) float64 { return float64(t.Quantile(q)) / float64(time.Millisecond) }
	for _, how := range bed.Readings() {
		for _, q := range []float64{0.5, 0.99} {
			most := bar{}
			if q == 0.99 {
				most = ratioAtMost(2)
			}
			b.pair(fmt.Sprintf("%s: %s, p%.0f", illness, how, 100*q), "ms",
				rounds{{ms(out.Good[how], q), ms(out.Ill[how], q)}}, most, fmt.Sprintf("%d reads", len(out.Ill[how])))
		}
	}
	b.hub(fmt.Sprintf("%s: until a watch shows a status, p99", illness), "ms", ms(out.Status, 0.99), bar{}, fmt.Sprintf("of %d", len(out.Status)))
	if illness.Works() {
		b.hub(fmt.Sprintf("%s: until the cloud knows of a renewed lease", illness), "s", out.Lease.Seconds(), atMost(40), "the node's grace")
	}
	// The first two losses are taken at their word.
	b.hub(fmt.Sprintf("%s: changes of state, with the return", illness), "", float64(out.Turns), atMost(5), "")
	b.hub(fmt.Sprintf("%s: return to the first request forwarded", illness), "s", out.Forwarded.Seconds(), atMost(2), "")
	b.hub(fmt.Sprintf("%s: return to a watch that has caught up", illness), "s", out.CaughtUp.Seconds(), bar{}, "")
	return nil
}
