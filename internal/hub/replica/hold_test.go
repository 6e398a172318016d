package replica

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// keeper holds what ends, until it is told to let go of one.
type keeper struct {
	mu   sync.Mutex // guards the following
	keys []string
	held []heldTurn
}

type heldTurn struct {
	note string
	gone chan struct{}
	pass func(context.Context) error
}

func (k *keeper) hold() Hold {
	return Hold{Scope: pods, After: time.Minute, Ask: k.ask, Again: k.again}
}

func (k *keeper) ask(ch Change) ([]byte, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys = append(k.keys, string(ch.Type)+" "+ch.Meta.Name)
	ending := func(m *wire.Meta) bool { return m != nil && m.Phase == "Ending" }
	if ending(ch.Prev) || ch.Type != watch.Deleted && !ending(ch.Meta) {
		return nil, nil
	}
	note := "the end of " + ch.Meta.Name
	return []byte(note), k.heldLocked(note, ch.Pass)
}

func (k *keeper) heldLocked(note string, pass func(context.Context) error) <-chan struct{} {
	t := heldTurn{note, make(chan struct{}), pass}
	k.held = append(k.held, t)
	return t.gone
}

func (k *keeper) again(note []byte, pass func(context.Context) error) <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.heldLocked(string(note), pass)
}

// restarted forgets what waits, as a hub that is restarted does.
func (k *keeper) restarted() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.held = nil
}

func (k *keeper) notes() (out []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.held {
		out = append(out, t.note)
	}
	return out
}

func (k *keeper) letGo(t *testing.T) {
	t.Helper()
	k.mu.Lock()
	next := k.held[0]
	k.held = k.held[1:]
	k.mu.Unlock()
	if err := next.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(next.gone)
}

func (k *keeper) asked() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := k.keys
	k.keys = nil
	return out
}

// TestHold: what was deleted during a long absence reaches watchers one by one,
// in order, by a watch that goes on and by a list; the replica is current at
// once. A short absence, and what happens after the return, holds up nothing.
func TestHold(t *testing.T) {
	for name, compacted := range map[string]bool{"watch": false, "relist": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := &keeper{}
				b := newBed(t, func(c *Config) { c.Hold = k.hold() })
				defer func() { b.stop() }()
				put := func(name, value string) uint64 { return b.cloud.put("pods", "ns", name, value, nil) }
				remove := func(name string) uint64 { return b.cloud.remove("pods", "ns", name) }
				for _, name := range []string{"a", "b", "c", "d", "e", "other"} {
					put(name, "here Running")
				}
				b.cloud.put("configmaps", "ns", "a", "1", nil)
				sl, maps := b.sync(pods), b.sync(configMaps)
				c, m := b.inform(sl), b.inform(maps)
				synctest.Wait()

				b.cloud.cut()
				pass(30 * time.Second)
				gone := remove("other")
				b.cloud.heal()
				pass(30 * time.Second)
				wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/other@%d", gone))
				wantLog(t, k.asked())

				was := b.cloud.state(pods, b.cloud.at())
				b.cloud.cut()
				pass(2 * time.Minute)
				before := put("z", "here Running")
				da := remove("a")
				de := put("e", "here Running again")
				db := remove("b")
				mg := b.cloud.remove("configmaps", "ns", "a")
				if compacted {
					b.cloud.compact()
				}
				b.cloud.heal()
				pass(2 * time.Minute)
				// It has all that went before, and waits; lists do not, nor do
				// watchers of anything else.
				if compacted {
					// A relist tells of absences last.
					wantLog(t, k.asked(), "ADDED z", "MODIFIED e", "DELETED a", "DELETED b")
					wantLog(t, c.settled(), fmt.Sprintf("ADDED ns/z@%d", before), fmt.Sprintf("MODIFIED ns/e@%d", de))
				} else {
					wantLog(t, k.asked(), "ADDED z", "DELETED a", "MODIFIED e", "DELETED b")
					wantLog(t, c.settled(), fmt.Sprintf("ADDED ns/z@%d", before))
				}
				wantLog(t, m.settled(), fmt.Sprintf("DELETED ns/a@%d", mg))
				// A list shows what is, but what is held has not happened.
				shows := func(who string, got map[string]string, held ...string) {
					t.Helper()
					want := b.cloud.state(pods, b.cloud.at())
					for _, name := range held {
						want["ns/"+name] = was["ns/"+name]
					}
					b.equals(who, got, want)
				}
				listed, _, err := list(t, b.held(pods))
				if err != nil {
					t.Fatal(err)
				}
				shows("a list", listed, "a", "b")

				// What happens now waits its turn, and is not asked for.
				dc := remove("c")
				synctest.Wait()
				// Who watches from where it was goes on as it would have.
				late := b.watch(b.held(pods), before)
				if compacted {
					late.end() // from the midst of a relist it must list
				}
				wantLog(t, c.settled())

				// A watch does not end by time while it stands still.
				pass(2 * minWatchTimeout)
				if c.isClosed() {
					t.Fatal("the watch ended")
				}
				// Who lists waits for nothing but what is held.
				fresh, initial := b.inform(b.held(pods)), b.watch(b.held(pods), 0)
				synctest.Wait()
				shows("who lists", fresh.has(), "a", "b")
				shows("who watches from nothing", initial.has(), "a", "b")
				_, version, err := list(t, b.held(pods))
				if err != nil {
					t.Fatal(err)
				}
				k.letGo(t)
				between := b.watch(b.held(pods), version) // it has listed before
				wantLog(t, between.settled(), fmt.Sprintf("DELETED ns/a@%d", version))
				wantLog(t, fresh.settled(), fmt.Sprintf("DELETED ns/a@%d", version))
				initial.settled()
				shows("who watches from nothing", initial.has(), "b")
				if compacted {
					wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/a@%d", mg-1))
				} else {
					want := []string{fmt.Sprintf("DELETED ns/a@%d", da), fmt.Sprintf("MODIFIED ns/e@%d", de)}
					wantLog(t, c.settled(), want...)
					wantLog(t, late.settled(), want...)
				}
				k.letGo(t)
				if compacted {
					db = mg // where the list was
				}
				wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/b@%d", db), fmt.Sprintf("DELETED ns/c@%d", dc))
				wantLog(t, k.asked())
				wantLog(t, between.settled(), fmt.Sprintf("DELETED ns/b@%d", version))
				wantLog(t, fresh.settled(), fmt.Sprintf("DELETED ns/b@%d", version))
				for _, client := range []*client{c, fresh, initial} {
					shows("a watcher", client.has())
				}
				late.end()
				fresh.end()
				initial.end()
				between.end()

				// All is as ever.
				dd := remove("d")
				pass(time.Second)
				if !c.isClosed() { // its time is over, but not when it was
					wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/d@%d", dd))
				}
				b.current(b.held(pods))
			})
		})
	}
}

// TestHoldAcrossARestart: a hub that was off while the cloud could not be heard
// counts from the last that is on disk.
func TestHoldAcrossARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &keeper{}
		b := newBed(t, func(c *Config) { c.Hold = k.hold() })
		defer func() { b.stop() }()
		b.cloud.put("pods", "ns", "a", "here Running", nil)
		version := b.sync(pods).Version()
		pass(time.Second)
		b.cloud.cut()
		pass(time.Hour)
		b.restart()
		c := b.watch(b.held(pods), version)
		gone := b.cloud.remove("pods", "ns", "a")
		b.cloud.heal()
		pass(time.Minute)
		wantLog(t, c.settled())
		k.letGo(t)
		wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/a@%d", gone))
	})
}

// TestHeldGoesOn: what waits goes on waiting for whoever lists, whatever else
// becomes of it in the cloud, and whatever is restarted: the client, the hub in
// good order, the hub with no warning. Each change is seen once, in its turn, and
// what was seen does not come back.
func TestHeldGoesOn(t *testing.T) {
	for name, end := range map[string]func(*bed){
		"stop":  func(b *bed) { b.stop() },
		"crash": func(b *bed) { b.crash() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := &keeper{}
				b := newBed(t, func(c *Config) { c.Hold = k.hold() })
				defer func() { b.stop() }()
				put := func(name, value string) uint64 { return b.cloud.put("pods", "ns", name, value, nil) }
				remove := func(name string) uint64 { return b.cloud.remove("pods", "ns", name) }
				for _, name := range []string{"a", "b", "c", "d", "e"} {
					put(name, "here Running")
				}
				b.sync(pods)
				was := b.cloud.state(pods, b.cloud.at())
				shows := func(who string, got map[string]string, held ...string) {
					t.Helper()
					want := b.cloud.state(pods, b.cloud.at())
					for _, name := range held {
						want["ns/"+name] = was["ns/"+name]
					}
					b.equals(who, got, want)
				}
				b.local = true // what it is owed may be older than what it was told
				inform := func() *client {
					t.Helper()
					c := b.inform(b.held(pods))
					synctest.Wait()
					return c
				}
				restart := func() {
					t.Helper()
					end(b)
					k.restarted()
					b.open()
				}

				b.cloud.cut()
				pass(2 * time.Minute)
				put("a", "here Ending")
				remove("b")
				put("c", "here Ending")
				remove("d")
				b.cloud.heal()
				pass(2 * time.Minute)

				// The client begins anew, and tells the cloud how its pods are.
				c := inform()
				put("a", "here Ending still")
				put("e", "here Running on")
				remove("c")
				wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/e@%d", b.cloud.at()-1))
				shows("who has listed", c.has(), "a", "b", "c", "d")
				again := inform()
				shows("who lists later", again.has(), "a", "b", "c", "d")
				if !b.held(pods).Holds() {
					t.Error("the cloud may be asked")
				}
				k.letGo(t)
				wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/a@%d", b.cloud.at()-2))
				shows("who has listed", c.has(), "b", "c", "d")
				_, version, err := list(t, b.held(pods))
				if err != nil {
					t.Fatal(err)
				}
				k.letGo(t)
				restart()
				if got := k.notes(); !slices.Equal(got, []string{"the end of c", "the end of d"}) {
					t.Fatalf("%q wait after the restart", got)
				}
				listed, _, err := list(t, b.held(pods))
				if err != nil {
					t.Fatal(err)
				}
				shows("a list after the restart", listed, "c", "d")
				// One that has listed before a turn and comes back after the
				// restart is told of it.
				late := b.watch(b.held(pods), version)
				if log := late.settled(); log[len(log)-1] != fmt.Sprintf("DELETED ns/b@%d", version) {
					t.Fatalf("who comes back was told %q", log)
				}
				put("e", "here Running still")
				synctest.Wait()
				c = inform()

				// The link is lost again meanwhile, and once more for long.
				b.cloud.cut()
				k.letGo(t)
				if log := c.settled(); len(log) != 1 || !strings.HasPrefix(log[0], "DELETED ns/c@") {
					t.Fatalf("who listed was told %q", log)
				}
				pass(2 * time.Minute)
				was = b.cloud.state(pods, b.cloud.at())
				was["ns/d"] = &thing{resource: "pods", namespace: "ns", name: "d", uid: "uid-104", version: 104, value: "here Running"}
				remove("e")
				b.cloud.heal()
				pass(2 * time.Minute)
				if got := k.notes(); !slices.Equal(got, []string{"the end of d", "the end of e"}) {
					t.Fatalf("%q wait after the second cut", got)
				}
				restart()
				if got := k.notes(); !slices.Equal(got, []string{"the end of d", "the end of e"}) {
					t.Fatalf("%q wait after the second restart", got)
				}
				c = inform()
				shows("who lists", c.has(), "d", "e")
				k.letGo(t)
				k.letGo(t)
				synctest.Wait()
				shows("who has listed", c.has())
				if b.held(pods).Holds() {
					t.Error("the cloud may not be asked")
				}
				// Nothing is left behind.
				restart()
				put("f", "here Running")
				pass(time.Second)
				restart()
				put("f", "here Running on")
				pass(2 * time.Second)
				b.current(b.held(pods))
				b.keepsNothing()
			})
		})
	}
}

// keepsNothing fails if changes are held on disk.
func (b *bed) keepsNothing() {
	b.t.Helper()
	snap, err := b.store.Snapshot()
	if err != nil {
		b.t.Fatal(err)
	}
	defer snap.Close()
	err = snap.Scan(heldBucket, "", func(key string, _ store.Header) error {
		return fmt.Errorf("%s is kept", key)
	})
	if err != nil {
		b.t.Error(err)
	}
}

// TestHeldInTheMidst: a hub that is stopped between two changes of an absence
// holds those that come after the restart too.
func TestHeldInTheMidst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &keeper{}
		b := newBed(t, func(c *Config) { c.Hold = k.hold() })
		defer func() { b.stop() }()
		for i := range 3 {
			b.cloud.put("pods", "ns", fmt.Sprint("pod-", i), "here Running", nil)
		}
		b.sync(pods)
		b.cloud.cut()
		pass(2 * time.Minute)
		for i := range 3 {
			b.cloud.remove("pods", "ns", fmt.Sprint("pod-", i))
		}
		b.cloud.setFault(func(kind string, _ int, _ string) *fault {
			if kind != "watch" {
				return nil
			}
			return &fault{cut: 200} // bytes: some of the changes
		})
		b.cloud.heal()
		synctest.Wait()
		if n := len(k.notes()); n == 0 || n == 3 {
			t.Fatalf("%d changes came", n)
		}
		b.cloud.cut()
		pass(2 * time.Second)
		b.cloud.setFault(nil)
		b.crash()
		k.restarted()
		b.open()
		b.cloud.heal()
		pass(time.Second)
		if got := k.notes(); len(got) != 3 {
			t.Errorf("%q wait", got)
		}
	})
}

// TestHeldNoMore: a hub that is told to hold nothing any more shows what is.
func TestHeldNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, after := &keeper{}, time.Minute
		b := newBed(t, func(c *Config) {
			c.Hold = k.hold()
			c.Hold.After = after
		})
		defer func() { b.stop() }()
		b.cloud.put("pods", "ns", "a", "here Running", nil)
		b.sync(pods)
		b.cloud.cut()
		pass(2 * time.Minute)
		b.cloud.remove("pods", "ns", "a")
		b.cloud.heal()
		pass(time.Minute)
		if n := len(k.notes()); n != 1 {
			t.Fatalf("%d changes wait", n)
		}
		after = 0
		b.restart()
		b.current(b.held(pods))
		pass(2 * time.Second)
		b.keepsNothing()
	})
}
