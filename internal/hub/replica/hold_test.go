package replica

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/watch"
)

// keeper holds what ends, until it is told to let go of one.
type keeper struct {
	mu   sync.Mutex // guards the following
	keys []string
	held []chan struct{}
}

func (k *keeper) ask(ch Change) <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys = append(k.keys, string(ch.Type)+" "+ch.Meta.Name)
	if ch.Type != watch.Deleted {
		return nil
	}
	c := make(chan struct{})
	k.held = append(k.held, c)
	return c
}

func (k *keeper) letGo() {
	k.mu.Lock()
	defer k.mu.Unlock()
	close(k.held[0])
	k.held = k.held[1:]
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
				b := newBed(t, func(c *Config) { c.Hold = Hold{Scope: pods, After: time.Minute, Ask: k.ask} })
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
				k.letGo()
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
				k.letGo()
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
		b := newBed(t, func(c *Config) { c.Hold = Hold{Scope: pods, After: time.Minute, Ask: k.ask} })
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
		k.letGo()
		wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/a@%d", gone))
	})
}
