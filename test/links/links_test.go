package links

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/network"
	"github.com/yurt-edge/yurt/test/bed"
)

// shared is set by TestMain and read by tests.
var shared struct {
	cloud  *playground.ControlPlane
	binary string
	dir    string
}

func TestMain(m *testing.M) {
	os.Exit(bed.Run(m, "links", func(ctx context.Context, dir string) (func() error, error) {
		shared.dir = dir
		// The tests wait for links most of the time, not for processors.
		err := flag.Set("test.parallel", "4")
		if err == nil {
			shared.binary, err = bed.Build(ctx)
		}
		if err == nil {
			shared.cloud, err = playground.StartControlPlane(ctx, playground.ControlPlaneConfig{
				Dir: filepath.Join(dir, "cloud"), ControllerManager: true, SANs: network.LoopAddresses(),
			})
		}
		if err != nil {
			return nil, err
		}
		return func() error {
			shared.cloud.Stop()
			return nil
		}, nil
	}))
}

func newPatient(t *testing.T, node string) *bed.Patient {
	t.Helper()
	p, err := bed.NewPatient(t.Context(), shared.cloud, shared.binary, shared.dir, node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// TestBadLinks makes a link bad in every way there is. Local readers do not
// notice, the state does not flap, and the return is seen at once.
func TestBadLinks(t *testing.T) {
	t.Parallel()
	good := newPatient(t, "good")
	for n, illness := range bed.Illnesses() {
		t.Run(strings.ReplaceAll(string(illness), " ", "-"), func(t *testing.T) {
			t.Parallel()
			trial := &bed.Trial{Good: good, Ill: newPatient(t, fmt.Sprintf("ill-%d", n))}
			ill := 4 * time.Second
			switch illness {
			case bed.Lossy, bed.Narrow: // it takes some answers to see it
				ill = 15 * time.Second
			case bed.Flapping:
				ill = 24 * time.Second
			}
			out, err := trial.Run(t.Context(), illness, ill)
			if err != nil {
				t.Fatal(err)
			}
			for _, how := range bed.Readings() {
				q := 0.99
				if how == bed.LatestGet || how == bed.LatestList {
					// Who meets the cut first waits for the cloud, once, and
					// no longer than the hub's budget for that.
					q = 0.9
					if slowest := out.Ill[how].Quantile(1); slowest > 3*time.Second {
						t.Errorf("%s: the slowest took %s", how, slowest)
					}
				}
				g, i := out.Good[how].Quantile(q), out.Ill[how].Quantile(q)
				t.Logf("%s: p%.0f %s, good link %s", how, 100*q, i, g)
				// The reads of this machine's other tests are in both.
				if i > 4*g+20*time.Millisecond {
					t.Errorf("%s: p%.0f is %s, %s over a good link", how, 100*q, i, g)
				}
			}
			t.Logf("status p50 %s, lease %s, %d turns, forwarded %s and caught up %s after the return",
				out.Status.Quantile(0.5), out.Lease, out.Turns, out.Forwarded, out.CaughtUp)
			most, soon := 2, 3*time.Second
			if illness.Works() {
				// What TCP sends again on such a link has its own time.
				soon = 8 * time.Second
			}
			switch illness {
			case bed.HalfOpen:
				most = 0
			case bed.Flapping:
				most = 5 // the first losses are taken at their word
			case bed.Lossy, bed.Far:
				most = 4
			}
			if out.Turns > most {
				t.Errorf("the state changed %d times", out.Turns)
			}
			if out.Forwarded > soon || out.CaughtUp > soon {
				t.Errorf("the first request was forwarded %s after the return, a watch had caught up %s after it",
					out.Forwarded, out.CaughtUp)
			}
			if !illness.Works() && out.Status.Quantile(0.5) > 100*time.Millisecond {
				t.Errorf("a local status took %s to be seen", out.Status.Quantile(0.5))
			}
		})
	}
}

// TestSeveralServers gives a hub three ways to one API server and makes two of
// them bad.
func TestSeveralServers(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"rr", "priority"} {
		for _, illness := range []bed.Illness{bed.Silent, bed.Refused, bed.Portal} {
			t.Run(mode+"/"+strings.ReplaceAll(string(illness), " ", "-"), func(t *testing.T) {
				t.Parallel()
				severalServers(t, mode, illness)
			})
		}
	}
}

func severalServers(t *testing.T, mode string, illness bed.Illness) {
	t.Helper()
	node := "several-" + mode + "-" + strings.ReplaceAll(string(illness), " ", "-")
	var ways []*bed.Link
	for range 2 {
		l, err := bed.NewLoopLink(shared.cloud.RESTConfig().Host)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.Close)
		ways = append(ways, l)
	}
	p, err := bed.NewPatient(t.Context(), shared.cloud, shared.binary, shared.dir, node,
		bed.With(mode, ways[0].URL(), ways[1].URL()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	ways = append([]*bed.Link{p.Link}, ways...)
	w, err := p.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ask := func(n int) (slow int, most time.Duration) {
		t.Helper()
		for range n {
			begun := time.Now()
			if err := p.Forwarded(t.Context()); err != nil {
				t.Errorf("with a good server left: %v", err)
			}
			took := time.Since(begun)
			if took > 500*time.Millisecond {
				slow++
			}
			most = max(most, took)
		}
		return slow, most
	}
	ask(20)
	before, err := p.Turns()
	if err != nil {
		t.Fatal(err)
	}

	sick := time.Now()
	for _, l := range ways[:2] {
		if err := l.Sicken(illness); err != nil {
			t.Fatal(err)
		}
	}
	// To find out costs a few requests a wait, once for each server.
	slow, most := ask(200)
	t.Logf("%d of 200 requests were slow, the slowest took %s", slow, most)
	if slow > 4 || most > 10*time.Second {
		t.Errorf("%d of 200 requests were slow, the slowest took %s", slow, most)
	}
	if slow, most := ask(100); slow > 0 {
		t.Errorf("%d of 100 requests were slow once it was known, the slowest took %s", slow, most)
	}
	for time.Since(sick) < 3*time.Second { // it is lost by then, and not only in doubt
		ask(20)
	}
	if err := p.Mark(t.Context(), "through the third"); err != nil {
		t.Fatal(err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := w.Sees(soon, "through the third"); err != nil {
		t.Error(err)
	}

	if err := ways[0].Heal(); err != nil {
		t.Fatal(err)
	}
	begun, up := time.Now(), func() int64 { n, _ := ways[0].Bytes(); return n }
	carried := up()
	// Probes are some kilobytes in all; requests are many.
	const requests = 64 << 10
	if err := bed.Await(t.Context(), func(ctx context.Context) error {
		for range 20 {
			if err := p.Forwarded(ctx); err != nil {
				return err
			}
		}
		if n := up() - carried; n < requests {
			return fmt.Errorf("the server that is back has been sent %d bytes", n)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	returned := time.Since(begun)
	t.Logf("the server that came back was used after %s", returned)
	if mode == "priority" && returned < 8*time.Second {
		t.Errorf("the first server was preferred again after %s already", returned)
	}
	if after, err := p.Turns(); err != nil || after != before {
		t.Errorf("the link turned %d times with a good server left (%v)", after-before, err)
	}
}

// TestFirstSyncOverANarrowLink starts a hub that has nothing behind 50 kbit/s.
func TestFirstSyncOverANarrowLink(t *testing.T) {
	t.Parallel()
	admin, err := shared.cloud.Client()
	if err != nil {
		t.Fatal(err)
	}
	const slices, endpoints = 150, 12
	for n := range slices {
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: fmt.Sprintf("slice-%d", n)},
			AddressType: discoveryv1.AddressTypeIPv4,
		}
		for e := range endpoints {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{fmt.Sprintf("10.%d.%d.%d", n, e, n^e)}, NodeName: new("node-" + strconv.Itoa(n*e)),
			})
		}
		if _, err := admin.DiscoveryV1().EndpointSlices("default").Create(t.Context(), slice, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	p, err := bed.NewPatient(t.Context(), shared.cloud, shared.binary, shared.dir, "narrow", bed.Over(bed.Narrow))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	synced := func(context.Context) error {
		n, err := p.Logged(fmt.Sprintf(`endpointslices objects=%d`, slices))
		if err == nil && n == 0 {
			err = errors.New("the hub has not synced yet")
		}
		return err
	}
	begun := time.Now()
	if err := bed.Within(t.Context(), 3*time.Minute, synced); err != nil { // 200 KB are half a minute alone
		t.Fatal(err)
	}
	_, down := p.Link.Bytes()
	t.Logf("synced %s after the start, %d bytes came", time.Since(begun), down)
	// It came up, and a full queue is no cut.
	if turns, err := p.Turns(); err != nil || turns > 1 {
		t.Errorf("the state changed %d times (%v)", turns, err)
	}
}
