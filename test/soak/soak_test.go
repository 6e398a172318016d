package soak

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/test/bed"
)

var duration = flag.Duration("soak", 45*time.Second, "how long the soak lasts")

// growth is what may be added by the whole of a soak, as the line through its
// second half and the first says: a leak grows with time, noise does not.
//
// Goroutines of connections just closed come and go by dozens on a busy
// machine; one that each round left behind would be hundreds. The strangers'
// account has as many scopes as it may from the start: each more takes the
// place of another.
var growth = map[string]float64{
	"goroutines": 30, "live heap MB": 6, "descriptors": 10, "anonymous MB": 25, "scopes": 1, "disk MB": 8,
}

// ownScopes is how many scopes the hub holds for one caller.
const ownScopes = 64

// work is read-locked by what keeps the hub busy, and locked while the hub is
// measured: what is under way is no growth.
var work sync.RWMutex

// renewEvery is the longest that a renewal of the hub's certificate may take to
// come: see bed.Short, and the link is cut in between.
const renewEvery = 20 * time.Second

// TestSoak does in a short time what a node does in a long one: watchers and
// callers with new tokens come and go, objects change, the link is cut in both
// ways, the hub's certificates are renewed. Nothing may grow.
func TestSoak(t *testing.T) {
	ctx := t.Context()
	renewed := shared.Signer.Signed(bed.Node)
	token, err := shared.token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c, err := shared.caller(token)
	if err != nil {
		t.Fatal(err)
	}
	if err := shared.holds(ctx, c); err != nil {
		t.Fatal(err)
	}
	for i := range ownScopes {
		if err := c.want(ctx, strangePath(1000+i)); err != nil {
			t.Fatal(err)
		}
	}
	c.close()
	// Asked once while the cloud can say that this caller may ask.
	if _, err := shared.measure(ctx, token); err != nil {
		t.Fatal(err)
	}
	working, stop := context.WithCancel(ctx)
	var turns [4]atomic.Int64
	g, working := errgroup.WithContext(working)
	for i, round := range []func(context.Context) error{shared.watchers, shared.strangers, shared.changes, shared.cuts} {
		g.Go(func() error {
			for working.Err() == nil {
				work.RLock()
				err := round(working)
				work.RUnlock()
				if err != nil && working.Err() == nil {
					return err
				}
				turns[i].Add(1)
			}
			return nil
		})
	}
	var seen []vitals
	const samples = 12
	// The first fifth fills caches.
	tick := time.NewTicker(*duration / (samples * 5 / 4))
	defer tick.Stop()
	for i := range samples * 5 / 4 {
		select {
		case <-tick.C:
		case <-working.Done():
			t.Fatal(g.Wait())
		}
		if i < samples/4 {
			continue
		}
		work.Lock()
		v, err := shared.measure(ctx, token)
		work.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, v)
	}
	stop()
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := shared.Link.Heal(); err != nil {
		t.Fatal(err)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "in %s:\tfirst\tlast\tmost\tgrowth\tmay grow\t\n", duration)
	for _, name := range slices.Sorted(maps.Keys(growth)) {
		var values []float64
		for _, v := range seen {
			values = append(values, v.values()[name])
		}
		grown := slope(values) * float64(len(values)-1)
		verdict := ""
		if grown > growth[name] {
			verdict = "FAIL"
			t.Errorf("%s grow by %.1f in %s, may grow by %.1f: %.1f", name, grown, duration, growth[name], values)
		}
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%s\n", name, values[0], values[len(values)-1], slices.Max(values), grown, growth[name], verdict)
	}
	fmt.Fprintf(w, "rounds of watchers, strangers, changes, cuts:\t%d\t%d\t%d\t%d\t\t\n", turns[0].Load(), turns[1].Load(), turns[2].Load(), turns[3].Load())
	renewed = shared.Signer.Signed(bed.Node) - renewed
	fmt.Fprintf(w, "certificates of the hub:\t%d\t\t\t\t\t\n", renewed)
	if least := int(*duration / renewEvery); renewed < least {
		t.Errorf("the hub's certificate was renewed %d times in %s, at least %d were due", renewed, duration, least)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
}

// slope is that of the line through values by Theil and Sen: the median of
// the slopes between all pairs, which single outliers do not move.
func slope(values []float64) float64 {
	var all []float64
	for i := range values {
		for j := i + 1; j < len(values); j++ {
			all = append(all, (values[j]-values[i])/float64(j-i))
		}
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func TestSlope(t *testing.T) {
	if got := slope([]float64{1, 2, 3, 100, 5, 6}); got != 1 {
		t.Errorf("%v", got)
	}
	if got := slope([]float64{7, 7, 9, 7, 7}); got != 0 {
		t.Errorf("%v", got)
	}
}

// watchers come, see some changes and go.
func (w *world) watchers(ctx context.Context) error {
	token, err := w.token(ctx)
	if err != nil {
		return err
	}
	c, err := w.caller(token)
	if err != nil {
		return err
	}
	defer c.close()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var g errgroup.Group
	for i := range 10 {
		g.Go(func() error {
			resp, err := c.open(ctx, fmt.Sprintf("%s?watch=true&labelSelector=shard%%3D%d", mapPath, i))
			if err != nil {
				return nil // the link may be cut, and the time over
			}
			defer resp.Body.Close()
			_, _ = io.Copy(io.Discard, resp.Body)
			return nil
		})
	}
	return g.Wait()
}

// strangers are callers with a new token, a wrong token and new selectors.
func (w *world) strangers(ctx context.Context) error {
	token, err := w.token(ctx)
	if err != nil {
		return err
	}
	for _, token := range []string{token, strings.ToUpper(token)} {
		c, err := w.caller(token)
		if err != nil {
			return err
		}
		for _, path := range []string{
			fmt.Sprintf("%s/object-%05d?resourceVersion=0", mapPath, rand.IntN(objects)),
			fmt.Sprintf("%s/object-%05d", mapPath, rand.IntN(objects)),
			strangePath(rand.IntN(1000)),
			"/apis", "/openapi/v3",
		} {
			_, _, _ = c.get(ctx, path) // the link may be cut
		}
		c.close()
	}
	return nil
}

// strangePath is a list that makes a scope of its own.
func strangePath(i int) string {
	return fmt.Sprintf("/api/v1/secrets?labelSelector=x%%3D%d&resourceVersion=0", i)
}

// changes objects in the cloud.
func (w *world) changes(ctx context.Context) error {
	for range 20 {
		patch := fmt.Sprintf(`{"data":{"now":"%d"}}`, time.Now().UnixNano())
		_, err := w.admin.CoreV1().ConfigMaps(namespace).Patch(ctx, fmt.Sprintf("object-%05d", rand.IntN(objects)),
			types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		if err != nil {
			return err
		}
	}
	return nil
}

// cuts the link for a moment, in either way.
func (w *world) cuts(ctx context.Context) error {
	pause := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	if !pause(2 * time.Second) {
		return ctx.Err()
	}
	mode := bed.Down
	if rand.IntN(2) == 0 {
		mode = bed.Blackhole
	}
	if err := w.Link.Cut(mode); err != nil {
		return err
	}
	pause(time.Second)
	return w.Link.Heal()
}
