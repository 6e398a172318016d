package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

func TestSyncsAndResumes(t *testing.T) {
	for _, scope := range []Scope{configMaps, widgets} {
		t.Run(scope.Resource.Resource, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, nil)
				defer func() { b.stop() }()
				for i := range 2*pageSize + 7 {
					b.cloud.put(scope.Resource.Resource, "ns", fmt.Sprintf("o-%d", i), strings.Repeat("x", i%300), nil)
				}
				b.current(b.sync(scope))
				b.cloud.put(scope.Resource.Resource, "ns", "late", "1", nil)
				b.cloud.remove(scope.Resource.Resource, "ns", "o-1")
				synctest.Wait()
				b.current(b.held(scope))
				lists, _ := b.cloud.counts()
				if lists != 1 {
					t.Fatalf("%d lists", lists)
				}

				b.restart()
				b.cloud.put(scope.Resource.Resource, "ns", "later", "1", nil)
				synctest.Wait()
				b.current(b.held(scope))
				if again, watches := b.cloud.counts(); again != 1 || watches != 2 {
					t.Fatalf("after a restart %d lists, %d watches", again, watches)
				}
			})
		})
	}
}

// Whoever was told that a scope is held finds it again after a power cut in
// that very moment. The version of a small list equals that of its newest
// object.
func TestFirstSyncIsDurableBeforeItIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		b.sync(configMaps)
		b.cloud.cut()
		b.crash()
		b.open()
		b.current(b.held(configMaps))
	})
}

func TestEmptyScope(t *testing.T) {
	for _, scope := range []Scope{configMaps, widgets} {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t, nil)
			defer func() { b.stop() }()
			sl := b.sync(scope)
			b.current(sl)
			b.watch(sl, 0)
			b.restart()
			b.current(b.held(scope))
			c := b.watch(b.held(scope), 0)
			defer c.end()
			v := b.cloud.put(scope.Resource.Resource, "ns", "a", "1", nil)
			wantLog(t, c.settled(), fmt.Sprintf("ADDED ns/a@%d", v))
			b.current(b.held(scope))
		})
	}
}

// TestPersist: what is acknowledged of an object must find it after a crash.
func TestPersist(t *testing.T) {
	for _, persist := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t, nil)
			defer func() { b.stop() }()
			b.sync(configMaps)
			b.cloud.put("configmaps", "ns", "young", "1", nil)
			synctest.Wait()
			_, info := ask(t, "/api/v1/namespaces/ns/configmaps/young")
			obj, err := b.Get(info, 0)
			if err != nil {
				t.Fatal(err)
			}
			if persist {
				if err := obj.Persist(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			b.cloud.cut()
			b.crash()
			b.open()
			if _, err := b.Get(info, 0); (err == nil) != persist {
				t.Errorf("persisted: %t; after the crash: %v", persist, err)
			}
		})
	}
}

// TestWhoSawSomeOfAGapIsToldOfItsEnd is about a watcher that a relist shows
// some change of, but not the last: it may come back as if nothing had been.
func TestWhoSawSomeOfAGapIsToldOfItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		b.sync(configMaps)
		narrow := configMaps
		narrow.Fields = "metadata.name=a"
		c := b.inform(b.held(narrow))
		synctest.Wait()
		b.cloud.cut()
		mine := b.cloud.put("configmaps", "ns", "a", "2", nil)
		last := b.cloud.put("configmaps", "ns", "other", "1", nil)
		b.cloud.compact()
		b.cloud.heal()
		pass(30 * time.Second) // less than bookmarkEvery
		wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/a@%d", mine))
		if c.version < last {
			t.Errorf("told of version %d, want the end of the gap, %d", c.version, last)
		}
		c.end()
		if again := b.watch(b.held(narrow), c.version); again.isClosed() {
			t.Errorf("who comes back from %d: %v", c.version, again.err)
		}
	})
}

func TestGapBecomesDifferences(t *testing.T) {
	for _, scope := range []Scope{configMaps, widgets} {
		t.Run(scope.Resource.Resource, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, nil)
				defer func() { b.stop() }()
				res := scope.Resource.Resource
				for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
					b.cloud.put(res, "ns", name, "1", nil)
				}
				sl := b.sync(scope)
				c := b.inform(sl)
				synctest.Wait()
				b.cloud.cut()
				b.cloud.put(res, "ns", "b", "2", nil)
				g := b.cloud.put(res, "ns", "g", "1", nil)
				b.cloud.remove(res, "ns", "c")
				b.cloud.remove(res, "ns", "a")
				b.cloud.remove(res, "ns", "d")
				d := b.cloud.put(res, "ns", "d", "again", nil)
				bb := b.cloud.put(res, "ns", "b", "3", nil)
				b.cloud.put(res, "ns", "passing", "1", nil)
				last := b.cloud.remove(res, "ns", "passing")
				b.cloud.compact()
				b.cloud.heal()
				pass(time.Minute)
				wantLog(t, c.settled(),
					fmt.Sprintf("ADDED ns/g@%d", g),
					fmt.Sprintf("DELETED ns/d@%d", d-1),
					fmt.Sprintf("ADDED ns/d@%d", d),
					fmt.Sprintf("MODIFIED ns/b@%d", bb),
					fmt.Sprintf("DELETED ns/a@%d", last-1),
					fmt.Sprintf("DELETED ns/c@%d", last))
				if lists, _ := b.cloud.counts(); lists != 2 {
					t.Errorf("%d lists", lists)
				}
				if c.isClosed() {
					t.Error("the watch was ended")
				}
				b.current(b.held(scope))
				b.equals("watcher", c.has(), b.cloud.state(scope, last))
				c.end()

				// Who comes back with a version from the midst of it must list:
				// it may be one that the cloud gave, for objects that the
				// replica has never seen.
				for version, ok := range map[uint64]bool{bb: false, d: false, last: true, last - 1: false} {
					again := b.watch(b.held(scope), version)
					if again.isClosed() == ok {
						t.Errorf("watch from %d: %v", version, again.err)
					}
					if !ok && !errors.Is(again.err, ErrExpired) {
						t.Errorf("watch from %d: %v", version, again.err)
					}
					again.log = nil
					again.end()
				}
			})
		})
	}
}

// A client that listed in the cloud, past what the replica had seen, may hold
// what a relist cannot tell it of.
func TestWatcherInsideAGapIsEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		sl := b.sync(configMaps)
		b.cloud.cut()
		synctest.Wait()
		passing := b.cloud.put("configmaps", "ns", "passing", "1", nil)
		ahead := b.watch(sl, passing)
		b.cloud.remove("configmaps", "ns", "passing")
		b.cloud.put("configmaps", "ns", "b", "1", nil)
		b.cloud.compact()
		if ahead.isClosed() {
			t.Fatal(ahead.err)
		}
		b.cloud.heal()
		pass(time.Minute)
		if !ahead.isClosed() {
			t.Error("the watcher was left with an object that is gone")
		}
	})
}

func TestTooFarBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		sl := b.sync(configMaps)
		old := sl.Version()
		slow := b.watch(sl, old)
		for i := range 40 {
			b.cloud.put("configmaps", "ns", "a", strings.Repeat("x", 100_000+i), nil)
			synctest.Wait()
		}
		late := b.watch(sl, old)
		if !late.isClosed() || !errors.Is(late.err, ErrExpired) {
			t.Errorf("watch from before the window: %v", late.err)
		}
		if w := &sl.stream.set.window; w.bytes > windowBytes {
			t.Errorf("the window holds %d bytes", w.bytes)
		}
		slow.end()
	})
}

func TestNarrowIsServedByWide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		red, blue := map[string]string{"color": "red"}, map[string]string{"color": "blue"}
		b.cloud.put("configmaps", "ns", "a", "1", red)
		b.cloud.put("configmaps", "other", "b", "1", red)
		b.cloud.put("configmaps", "ns", "c", "1", blue)
		b.sync(configMaps)
		narrow := Scope{Resource: configMaps.Resource, Namespace: "ns", Labels: "color=red"}
		sl := b.sync(narrow)
		if lists, watches := b.cloud.counts(); lists != 1 || watches != 1 {
			t.Errorf("%d lists, %d watches", lists, watches)
		}
		b.current(sl)
		c := b.inform(sl)
		b.cloud.put("configmaps", "other", "b", "2", red)
		before := b.cloud.state(narrow, 1<<60)["ns/a"]
		v1 := b.cloud.put("configmaps", "ns", "a", "2", blue) // leaves
		v2 := b.cloud.put("configmaps", "ns", "c", "2", red)  // comes
		v3 := b.cloud.put("configmaps", "ns", "c", "3", red)
		v4 := b.cloud.remove("configmaps", "ns", "c")
		b.cloud.remove("configmaps", "ns", "a")
		wantLog(t, c.settled(),
			fmt.Sprintf("DELETED ns/a@%d", v1), fmt.Sprintf("ADDED ns/c@%d", v2),
			fmt.Sprintf("MODIFIED ns/c@%d", v3), fmt.Sprintf("DELETED ns/c@%d", v4))
		c.end()

		// An object that leaves is shown as it was, under the new version.
		s := sl.stream.set
		for _, e := range s.window.events {
			if typ, shown := e.as(sl.match); typ == "DELETED" && e.key == "ns/a" {
				if want := before.at(v1).data(t); string(shown.object) != string(want) {
					t.Errorf("it left as %q, not %q", shown.object, want)
				}
			}
		}
	})
}

// TestBrokenListGoesOn breaks off each page of a list once. The cloud is asked
// for no page again that has come.
func TestBrokenListGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		for i := range 3*pageSize + 1 {
			b.cloud.put("configmaps", "ns", fmt.Sprintf("c%04d", i), "x", nil)
		}
		asked := 0
		b.cloud.setFault(func(kind string, _ int, _ string) *fault {
			if asked++; kind != "list" || asked%2 == 0 {
				return nil
			}
			return &fault{cut: 700}
		})
		if err := b.Pin(configMaps); err != nil {
			t.Fatal(err)
		}
		pass(5 * time.Minute)
		b.current(b.held(configMaps))
		if lists, _ := b.cloud.counts(); lists != 2 {
			t.Errorf("the list began %d times, want 2: the first page broke off", lists)
		}
		if asked < 2*4 {
			t.Errorf("the cloud was asked %d times", asked)
		}
	})
}

func TestTwoScopesOfOneResource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		mine := Scope{Resource: pods.Resource, Fields: "spec.nodeName=edge-1"}
		ns := Scope{Resource: pods.Resource, Namespace: "ns"}
		b.cloud.put("pods", "ns", "p", "edge-1", nil)
		b.cloud.put("pods", "ns", "q", "edge-2", nil)
		b.cloud.put("pods", "kube-system", "r", "edge-1", nil)
		b.sync(mine)
		b.sync(ns)
		both := Scope{Resource: pods.Resource, Namespace: "ns", Fields: "spec.nodeName=edge-1"}
		b.current(b.held(mine))
		b.current(b.held(ns))
		b.current(b.held(both))
		if _, ok := b.Held(pods); ok {
			t.Error("all pods are not held")
		}
		b.cloud.put("pods", "ns", "q", "edge-1", nil)
		b.cloud.remove("pods", "ns", "p")
		synctest.Wait()
		b.current(b.held(mine))
		b.current(b.held(both))
		b.restart()
		b.current(b.held(both))
	})
}

func TestFaultsOfTheWay(t *testing.T) {
	portal := http.Header{"Content-Type": {"text/html"}}
	once := func(kind string, f fault) func(string, int, string) *fault {
		done := false
		return func(k string, _ int, _ string) *fault {
			if k != kind || done {
				return nil
			}
			done = true
			return &f
		}
	}
	for name, f := range map[string]func(string, int, string) *fault{
		"list refused":        once("list", fault{err: errors.New("connection refused")}),
		"list cut":            once("list", fault{cut: 700}),
		"list 500":            once("list", fault{status: 500, body: "oops"}),
		"list 429":            once("list", fault{status: 429, header: http.Header{"Retry-After": {"7"}}}),
		"list 503":            once("list", fault{status: 503}),
		"list portal":         once("list", fault{status: 200, header: portal, body: "<html>log in</html>"}),
		"list portal 403":     once("list", fault{status: 403, header: portal, body: "<html>no</html>"}),
		"list half JSON":      once("list", fault{status: 200, body: `{"kind":"ConfigMapList","items":[{`}),
		"list of no version":  once("list", fault{status: 200, body: `{"kind":"ConfigMapList","apiVersion":"v1","items":[]}`}),
		"list hangs":          once("list", fault{hang: true}),
		"list 410":            once("list", fault{status: 410}),
		"watch refused":       once("watch", fault{err: errors.New("connection refused")}),
		"watch cut in header": once("watch", fault{cut: 2}),
		"watch cut in frame":  once("watch", fault{cut: 50}),
		"watch 410":           once("watch", fault{status: 410}),
		"watch 401":           once("watch", fault{status: 401}),
		"watch portal":        once("watch", fault{status: 200, header: portal, body: "<html>log in</html>"}),
		"watch JSON":          once("watch", fault{status: 200}),
		"watch ends at once":  once("watch", fault{status: 200, header: http.Header{"Content-Type": {"application/vnd.kubernetes.protobuf;stream=watch"}}}),
		"watch garbage": once("watch", fault{
			status: 200, header: http.Header{"Content-Type": {"application/vnd.kubernetes.protobuf;stream=watch"}}, body: "\xff\xff\xff\xffgarbage",
		}),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, nil)
				defer func() { b.stop() }()
				for i := range 100 {
					b.cloud.put("configmaps", "ns", fmt.Sprint(i), "1", nil)
				}
				b.cloud.setFault(f)
				for range 2 { // the first may be told of the failure
					if _, err := b.Open(t.Context(), configMaps, Credential{}, ""); err == nil {
						break
					} else if t.Context().Err() != nil {
						t.Fatal(err)
					}
				}
				b.cloud.put("configmaps", "ns", "late", "1", nil)
				pass(2 * time.Minute)
				synctest.Wait()
				b.current(b.held(configMaps))
				if lists, watches := b.cloud.counts(); lists > 3 || watches > 3 {
					t.Errorf("%d lists, %d watches", lists, watches)
				}
			})
		})
	}
}

// A server that always ends or refuses must not be asked without pause.
func TestNoHotLoops(t *testing.T) {
	frames := http.Header{"Content-Type": {"application/vnd.kubernetes.protobuf;stream=watch"}}
	for name, f := range map[string]*fault{
		"gone": {status: 410}, "ends": {status: 200, header: frames}, "later": {status: 429, header: http.Header{"Retry-After": {"5"}}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, nil)
				defer func() { b.stop() }()
				b.cloud.setFault(func(kind string, _ int, _ string) *fault {
					if kind == "watch" {
						return f
					}
					return nil
				})
				b.sync(configMaps)
				pass(10 * time.Minute)
				b.cloud.mu.Lock()
				asked := b.cloud.asked
				b.cloud.mu.Unlock()
				if asked > 200 {
					t.Errorf("asked %d times in ten minutes", asked)
				}
			})
		})
	}
}

func TestWatchTimesOutInGoodOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		sl := b.sync(configMaps)
		c := b.watch(sl, 0)
		defer c.end()
		for i := range 5 {
			pass(time.Minute)
			b.cloud.endWatches()
			v := b.cloud.put("configmaps", "ns", fmt.Sprint(i), "1", nil)
			wantLog(t, c.settled(), fmt.Sprintf("ADDED ns/%d@%d", i, v))
		}
		if lists, watches := b.cloud.counts(); lists != 1 || watches != 6 {
			t.Errorf("%d lists, %d watches", lists, watches)
		}
	})
}

func TestRestoredCloudIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		backup := b.cloud.at()
		for range 20 {
			b.cloud.put("configmaps", "ns", "a", "2", nil)
		}
		b.cloud.put("configmaps", "ns", "b", "1", nil)
		sl := b.sync(configMaps)
		c := b.watch(sl, sl.Version())
		newest := sl.Version()
		b.cloud.rewind(backup)
		b.cloud.put("configmaps", "ns", "c", "1", nil)
		pass(silentAfter + time.Minute)
		b.current(b.held(configMaps))
		if !c.isClosed() {
			t.Error("a watcher of the lost history was kept")
		}
		if again := b.watch(b.held(configMaps), newest); !again.isClosed() || !errors.Is(again.err, ErrExpired) {
			t.Errorf("watch from the lost history: %v", again.err)
		}
		b.restart()
		b.current(b.held(configMaps))
	})
}

// pin syncs a scope that is then never paused.
func pin(b *bed, scope Scope) {
	b.t.Helper()
	if err := b.Pin(scope); err != nil {
		b.t.Fatal(err)
	}
	b.sync(scope)
}

func TestSilentWatchIsLookedAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.mute = true // as a server without bookmarks
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		pin(b, configMaps)
		pass(time.Hour)
		b.cloud.put("configmaps", "ns", "b", "1", nil)
		synctest.Wait()
		b.current(b.held(configMaps))
	})
}

func TestBookmarksDoNotWearTheFlash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		pin(b, configMaps)
		// Others, as many as a node may have, that begin at other times.
		for i := range 25 {
			pin(b, Scope{Resource: configMaps.Resource, Namespace: fmt.Sprint("ns-", i)})
			pass(13 * time.Second)
		}
		pass(3 * flushEvery)
		before := b.store.Stats()
		for range 60 {
			b.cloud.put("pods", "ns", "elsewhere", "edge-1", nil) // moves the version
			pass(time.Minute)
		}
		after := b.store.Stats()
		if n := after.Commits - before.Commits; n > 6 {
			t.Errorf("%d commits in an idle hour", n)
		}
		if n := after.BytesWritten - before.BytesWritten; n > 300_000 {
			t.Errorf("%d bytes in an idle hour", n)
		}
		if at := b.held(configMaps).Version(); at < b.cloud.at()-2 {
			t.Errorf("at %d, the cloud at %d", at, b.cloud.at())
		}
		if since := time.Since(b.held(configMaps).Contact()); since > 2*time.Minute {
			t.Errorf("last contact %s ago", since)
		}
	})
}

func TestPauseResumeDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		pinned := Scope{Resource: pods.Resource, Fields: "spec.nodeName=edge-1"}
		if err := b.Pin(pinned); err != nil {
			t.Fatal(err)
		}
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		b.sync(configMaps)
		watched := b.watch(b.sync(widgets), 0)
		defer func() { watched.end() }()
		pass(pauseAfter + 2*idleEvery)
		v := b.cloud.put("widgets", "ns", "w", "1", nil)
		wantLog(t, watched.settled(), fmt.Sprintf("ADDED ns/w@%d", v))
		b.cloud.put("configmaps", "ns", "a", "2", nil)
		synctest.Wait()
		_, before := b.cloud.counts()
		sl := b.held(configMaps)
		if sl.Version() == b.cloud.at() {
			t.Error("nobody uses it and it was followed")
		}
		sl.Touch()
		synctest.Wait()
		b.current(sl)
		if lists, watches := b.cloud.counts(); lists != 3 || watches != before+1 {
			t.Errorf("%d lists, %d watches, %d before", lists, watches, before)
		}

		// An outage does not count.
		b.cloud.cut()
		pass(3 * dropAfter)
		b.held(configMaps)
		b.cloud.heal()
		pass(dropAfter + 2*idleEvery)
		if _, ok := b.Held(configMaps); ok {
			t.Error("a day without use and still held")
		}
		b.held(pinned)
		names, err := b.store.Buckets()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if name == configMaps.ID() {
				t.Error("the dropped objects are still stored")
			}
		}
		b.current(b.sync(configMaps)) // it may come back
	})
}

func TestFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, func(c *Config) { c.MaxScopes = 2 })
		defer func() { b.stop() }()
		b.sync(configMaps)
		b.sync(widgets)
		if _, err := b.Open(t.Context(), pods, Credential{}, ""); !errors.Is(err, ErrFull) {
			t.Errorf("a third scope: %v", err)
		}
		b.restart()
		b.current(b.held(widgets))
		b.sync(configMaps)
	})
}

// TestScopesOfOneCaller fills the room of one caller: what it does not use
// makes place, others have their own, and the node's are untouched.
func TestScopesOfOneCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, func(c *Config) { c.MaxScopes = 8 })
		defer func() { b.stop() }()
		named := func(who string, i int) Scope {
			s := configMaps
			s.Fields = fmt.Sprintf("metadata.name=%s-%d", who, i)
			return s
		}
		open := func(who string, i int) error {
			_, err := b.Open(t.Context(), named(who, i), Credential{}, who)
			return err
		}
		b.sync(pods) // the node's
		for i := range 4 {
			if err := open("flood", i); err != nil {
				t.Fatal(err)
			}
		}
		if err := open("flood", 4); !errors.Is(err, ErrFull) {
			t.Errorf("a caller has more than it may, all in use: %v", err)
		}
		if err := open("other", 0); !errors.Is(err, ErrFull) {
			t.Errorf("callers have more than half of all, all in use: %v", err)
		}
		for i := range 3 { // the node's own half
			if _, err := b.Open(t.Context(), named("node", i), Credential{}, ""); err != nil {
				t.Fatal(err)
			}
		}
		c := b.watch(b.held(named("flood", 1)), 0)
		pass(unusedAfter + time.Second)
		b.held(named("flood", 2)).Touch()
		if err := open("other", 0); err != nil {
			t.Fatalf("nothing made place: %v", err)
		}
		pass(unusedAfter + time.Second)
		if err := open("flood", 5); err != nil {
			t.Fatalf("nothing made place: %v", err)
		}
		for scope, want := range map[Scope]bool{pods: true, named("flood", 1): true, named("node", 0): true, named("flood", 5): true} {
			if _, ok := b.Held(scope); ok != want {
				t.Errorf("%s is held: %t, want %t", scope.ID(), ok, want)
			}
		}
		held := 0
		for i := range 6 {
			if _, ok := b.Held(named("flood", i)); ok {
				held++
			}
		}
		if held > 4 || c.isClosed() {
			t.Errorf("a caller holds %d scopes; its watch ended: %t", held, c.isClosed())
		}
	})
}

// TestUnusedScopesGo has pods come with ever new names and selectors, each with
// a place of its own. What they leave behind must not fill the replica.
func TestUnusedScopesGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		if _, err := b.Open(t.Context(), configMaps, Credential{}, ""); err != nil {
			t.Fatal(err)
		}
		named := func(i int) Scope {
			return Scope{Resource: pods.Resource, Namespace: "ns", Labels: fmt.Sprintf("x=%d", i)}
		}
		const opened = 3 * keptUnused
		for i := range opened {
			if _, err := b.Open(t.Context(), named(i), Credential{}, fmt.Sprintf("pod-%d", i/8)); err != nil {
				t.Fatal(err)
			}
			pass(time.Second)
		}
		watched := b.watch(b.held(named(0)), 0)
		pass(pauseAfter + 2*idleEvery)
		held := 0
		for i := range opened {
			if _, ok := b.Held(named(i)); ok {
				held++
			}
		}
		if held != keptUnused+1 {
			t.Errorf("%d scopes are left, want %d and the one in use", held, keptUnused)
		}
		for scope, want := range map[Scope]bool{configMaps: true, named(0): true, named(1): false, named(opened - 1): true} {
			if _, ok := b.Held(scope); ok != want {
				t.Errorf("%s is held: %t, want %t", scope.ID(), ok, want)
			}
		}
		if watched.isClosed() {
			t.Error("a watch ended")
		}
		pass(dropAfter)
		if _, ok := b.Held(named(opened - 1)); ok {
			t.Error("an unused scope stays for ever")
		}
	})
}

// TestAPanicCostsOneAttempt has the upstream's answer trip over a bug once.
func TestAPanicCostsOneAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, func(c *Config) { c.Upstream = &tripping{Upstream: c.Upstream} })
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "a", "one", "1", nil)
		if _, err := b.Open(t.Context(), configMaps, Credential{}, ""); err == nil || !strings.Contains(err.Error(), "panic") {
			t.Errorf("the attempt that panicked: %v", err)
		}
		b.current(b.sync(configMaps))
	})
}

// tripping panics at the first request.
type tripping struct {
	Upstream
	once sync.Once
}

func (u *tripping) Node() http.RoundTripper {
	u.once.Do(func() { panic("a bug") })
	return u.Upstream.Node()
}

func TestWindowsShareABound(t *testing.T) {
	t.Parallel()
	var total atomic.Int64
	windows := make([]window, 100)
	for i := range windows {
		windows[i].total = &total
	}
	version, object := uint64(0), make([]byte, 64<<10)
	for range 100 {
		for i := range windows {
			version++
			windows[i].add(newEvent(watch.Modified, "key", nil, nil, Kind{}, object), version)
		}
	}
	sum := 0
	for i := range windows {
		sum += windows[i].bytes
		if len(windows[i].events) == 0 {
			t.Fatal("a window kept nothing")
		}
	}
	if most := windowsTotal + len(windows)*windowLeast; int64(sum) != total.Load() || sum > most {
		t.Errorf("windows hold %d bytes, counted %d, may hold %d", sum, total.Load(), most)
	}
	for i := range windows {
		windows[i].reset()
	}
	if total.Load() != 0 {
		t.Errorf("%d bytes are counted of empty windows", total.Load())
	}
}

func TestCredentials(t *testing.T) {
	allow := func(tokens ...string) func(string, int, string) *fault {
		return func(_ string, _ int, token string) *fault {
			if slices.Contains(tokens, token) {
				return nil
			}
			if token == "expired" {
				return &fault{status: 401, body: status(401, "Unauthorized")}
			}
			return &fault{status: 403, body: status(403, "Forbidden")}
		}
	}
	run := func(name string, test func(t *testing.T, b *bed)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, nil)
				defer func() { b.stop() }()
				b.cloud.put("configmaps", "ns", "a", "1", nil)
				test(t, b)
			})
		})
	}
	open := func(t *testing.T, b *bed, token string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err := b.Open(ctx, configMaps, Credential{Token: token}, "")
		return err
	}
	run("a refused one does not keep the next out", func(t *testing.T, b *bed) {
		b.cloud.setFault(allow("good"))
		if err := open(t, b, "bad"); !errors.Is(err, errForbidden) {
			t.Fatalf("with a bad token: %v", err)
		}
		pass(time.Hour) // the failure is old
		if err := open(t, b, "good"); err != nil {
			t.Fatal(err)
		}
		if !b.held(configMaps).Borrowed() {
			t.Error("borrowed, and does not say so")
		}
	})
	run("the node's refusal does not take a lent one away", func(t *testing.T, b *bed) {
		b.cloud.setFault(allow("good"))
		if err := open(t, b, ""); err == nil {
			t.Fatal("the node may not read this")
		}
		if err := open(t, b, "good"); err != nil {
			t.Fatal(err)
		}
		pass(5 * time.Minute)
		b.cloud.put("configmaps", "ns", "a", "2", nil)
		synctest.Wait()
		b.current(b.held(configMaps))
	})
	run("an expired one keeps the data and calls its clients back", func(t *testing.T, b *bed) {
		b.cloud.setFault(allow("good"))
		if err := open(t, b, "good"); err != nil {
			t.Fatal(err)
		}
		sl := b.held(configMaps)
		c := b.inform(sl)
		b.cloud.setFault(allow("renewed"))
		pass(time.Minute)
		b.cloud.endWatches()
		if !c.isClosed() {
			t.Fatal("its watcher does not know that nothing comes any more")
		}
		b.current(sl)
		sl.Offer(Credential{Token: "renewed"})
		v := b.cloud.put("configmaps", "ns", "a", "2", nil)
		c.follow(sl, c.version)
		wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/a@%d", v))
		c.end()
	})
	run("the node's own is revoked when it lasts", func(t *testing.T, b *bed) {
		b.current(b.sync(configMaps))
		c := b.watch(b.held(configMaps), 0)
		b.cloud.setFault(allow("none"))
		b.cloud.endWatches()
		pass(5 * time.Second)
		b.current(b.held(configMaps)) // an API server that starts denies all
		pass(3 * revokeAfter)
		if _, ok := b.Held(configMaps); ok {
			t.Error("forbidden and still held")
		}
		if !c.isClosed() {
			t.Error("a watcher was kept")
		}
		b.cloud.setFault(allow(""))
		pass(time.Minute)
		b.current(b.held(configMaps))
		b.cloud.setFault(allow("none"))
		b.cloud.endWatches()
		pass(4 * revokeAfter)
		b.cloud.cut()
		b.restart()
		if _, ok := b.Held(configMaps); ok {
			t.Error("forbidden, and held after a restart")
		}
	})
	run("unauthenticated keeps the data", func(t *testing.T, b *bed) {
		pin(b, configMaps)
		b.cloud.setFault(func(string, int, string) *fault { return &fault{status: 401, body: status(401, "Unauthorized")} })
		b.cloud.endWatches()
		pass(time.Hour)
		b.current(b.held(configMaps))
		b.cloud.setFault(nil)
		b.cloud.put("configmaps", "ns", "a", "2", nil)
		pass(time.Minute)
		b.current(b.held(configMaps))
	})
	run("a lent one is not stored", func(t *testing.T, b *bed) {
		b.cloud.setFault(allow("good"))
		if err := open(t, b, "good"); err != nil {
			t.Fatal(err)
		}
		b.restart()
		pass(time.Minute)
		b.cloud.put("configmaps", "ns", "a", "2", nil)
		synctest.Wait()
		sl := b.held(configMaps)
		if sl.Version() == b.cloud.at() {
			t.Error("followed with whose credential?")
		}
		sl.Offer(Credential{Token: "good"})
		synctest.Wait()
		b.current(sl)
		text, err := os.ReadFile(b.path)
		if err != nil || strings.Contains(string(text), "good") {
			t.Errorf("the token is in the store, %v", err)
		}
	})
}

func TestOpenGivesUpInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.setFault(func(string, int, string) *fault { return &fault{hang: true} })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := b.Open(ctx, configMaps, Credential{}, ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		b.cloud.setFault(func(string, int, string) *fault { return &fault{status: 404} })
		b.cloud.cut()
		b.cloud.heal()
		for range 5 { // nobody waits for a pause between two tries
			began := time.Now()
			if _, err := b.Open(t.Context(), widgets, Credential{}, ""); !errors.Is(err, errAbsent) {
				t.Error(err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("took %s", took)
			}
			pass(10 * time.Second)
		}
	})
}

func TestDamagedObject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		for i := range 20 {
			b.cloud.put("configmaps", "ns", fmt.Sprint(i), strings.Repeat("value", 20), nil)
		}
		b.sync(configMaps)
		c := b.watch(b.held(configMaps), 0)
		defer c.end()
		c.settled()
		pass(3 * flushEvery)
		b.cloud.cut()
		b.stop()
		damage(t, b.path, configMaps.ID(), "ns/7")
		b.open()
		if _, _, err := list(t, b.held(configMaps)); !errors.Is(err, store.ErrDamaged) {
			t.Fatalf("list with a damaged object: %v", err)
		}
		if _, info := ask(t, "/api/v1/namespaces/ns/configmaps/8"); true {
			if _, err := b.Get(info, 0); err != nil {
				t.Errorf("a sound object: %v", err)
			}
		}
		// It is set aside by now. That must not make the rest look whole.
		pass(time.Minute)
		b.crash()
		b.open()
		if _, _, err := list(t, b.held(configMaps)); !errors.Is(err, store.ErrDamaged) {
			t.Fatalf("list after a crash: %v", err)
		}
		b.cloud.heal()
		pass(time.Minute)
		b.current(b.held(configMaps))
		b.restart()
		b.current(b.held(configMaps))
	})
}

// damage flips a bit in the middle of a stored value.
func damage(t *testing.T, path, bucket, key string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{Path: path + ".copy", Key: testKey})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// The value follows its key in the leaf page; the header is in the
	// clear and 35 bytes long.
	hits := 0
	for i := 0; ; {
		n := strings.Index(string(text[i:]), key)
		if n < 0 {
			break
		}
		at := i + n + len(key) + 35 + 20
		if text[i+n+len(key)] == 1 { // the format's number
			text[at] ^= 0x40
			hits++
		}
		i += n + len(key)
	}
	if hits == 0 {
		t.Fatalf("%s of %s not found", key, bucket)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedScopes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		b.cloud.put("configmaps", "ns", "gone", "1", nil)
		b.sync(configMaps)
		b.sync(pods)
		pass(3 * flushEvery)
		b.stop()
		damage(t, b.path, scopesBucket, configMaps.ID())
		b.open()
		b.held(pods)
		if _, ok := b.Held(configMaps); ok {
			t.Error("held without a position")
		}
		b.cloud.remove("configmaps", "ns", "gone")
		b.current(b.sync(configMaps))
		// What the lost scope had stored must not come back.
		b.restart()
		b.current(b.held(configMaps))
	})
}

func TestFlushIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "1", nil)
		s := b.sync(configMaps).stream.set
		pass(3*flushEvery + flushEvery/2) // between two flushes
		b.cloud.put("configmaps", "ns", "a", "2", nil)
		synctest.Wait()
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.flush(ended); err == nil {
			t.Fatal("flushed without time")
		}
		if !s.due(false) {
			t.Error("a failed flush is forgotten")
		}
		b.current(b.held(configMaps))
		pass(3 * flushEvery)
		b.cloud.cut()
		b.crash()
		b.open()
		b.current(b.held(configMaps))
	})
}

// A view stays what it is while its objects are overwritten and written to
// the store.
func TestViewStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, nil)
		defer func() { b.stop() }()
		for i := range 50 {
			b.cloud.put("configmaps", "ns", fmt.Sprint(i), "old", nil)
		}
		s := b.sync(configMaps).stream.set
		synctest.Wait()
		v, err := s.view()
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		want := b.cloud.state(configMaps, v.version)
		for round := range 3 {
			for i := range 50 {
				b.cloud.put("configmaps", "ns", fmt.Sprint(i), fmt.Sprint("new", round), nil)
				if i%3 == 0 {
					b.cloud.remove("configmaps", "ns", fmt.Sprint(i))
				}
			}
			pass(2 * flushEvery)
			got := map[string]string{}
			err := v.each(matcher{}, func(key string, _ *entry, data []byte) error {
				got[key] = string(data)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			b.equals("view", got, want)
		}
	})
}

// overlays is a journal of values that readers see instead of the cloud's.
type overlays struct {
	t *testing.T

	mu     sync.Mutex // guards values
	values map[string]string
}

func (o *overlays) set(key, value string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.values[key] = value; value == "" {
		delete(o.values, key)
	}
}

func (o *overlays) overlay(r schema.GroupVersionResource, key string, _ Kind, base []byte) ([]byte, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	value, ok := o.values[key]
	if !ok {
		return nil, false
	}
	if isPods(r) { // the value is a phase
		pod := &corev1.Pod{}
		if err := pod.Unmarshal(base); err != nil {
			o.t.Error(err)
		}
		pod.Status.Phase = corev1.PodPhase(value)
		out, err := pod.Marshal()
		if err != nil {
			o.t.Error(err)
		}
		return out, true
	}
	m := &corev1.ConfigMap{}
	if err := m.Unmarshal(base); err != nil {
		o.t.Error(err)
	}
	m.Data["value"] = value
	out, err := m.Marshal()
	if err != nil {
		o.t.Error(err)
	}
	return out, true
}

func TestOverlay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &overlays{t: t, values: map[string]string{}}
		b := newBed(t, func(c *Config) { c.Overlay = o.overlay })
		defer func() { b.stop() }()
		b.cloud.put("configmaps", "ns", "a", "cloud", nil)
		b.cloud.put("configmaps", "ns", "b", "cloud", nil)
		pin(b, configMaps)
		refresh := func() {
			t.Helper()
			if err := b.Refresh(configMaps.Resource, "ns", "a"); err != nil {
				t.Fatal(err)
			}
		}
		reads := func(want string) {
			t.Helper()
			synctest.Wait()
			got, _, err := list(t, b.held(configMaps))
			m := &corev1.ConfigMap{}
			if err == nil {
				err = m.Unmarshal([]byte(got["ns/a"]))
			}
			if err != nil || m.Data["value"] != want {
				t.Errorf("reads %q, want %q; %v", m.Data["value"], want, err)
			}
		}
		c := b.inform(b.held(configMaps))
		c.local = true
		v := b.held(configMaps).Version()
		o.set("ns/a", "local")
		refresh()
		reads("local")
		wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/a@%d", v-1))

		// It stays over what the cloud changes, and who watches from then
		// on is shown it too.
		v = b.cloud.put("configmaps", "ns", "a", "cloud again", nil)
		reads("local")
		wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/a@%d", v))
		late := b.watch(b.held(configMaps), v)
		wantLog(t, late.settled(), fmt.Sprintf("MODIFIED ns/a@%d", v))
		late.end()

		// What is stored is the cloud's.
		pass(3 * flushEvery)
		b.cloud.cut()
		b.crash()
		b.open()
		refresh()
		reads("local")
		b.stop()
		damage(t, b.path, configMaps.ID(), "ns/a")
		b.open()
		if err := b.Refresh(configMaps.Resource, "ns", "a"); err == nil {
			t.Error("an overlay was put over a damaged object")
		}
		b.cloud.heal()
		pass(time.Minute)
		reads("local")
		c.relist(b.held(configMaps))
		c.settled()
		o.set("ns/a", "")
		refresh()
		reads("cloud again")
		b.current(b.held(configMaps))
		wantLog(t, c.settled(), fmt.Sprintf("MODIFIED ns/a@%d", v))
		o.set("ns/a", "local")
		refresh()
		b.cloud.remove("configmaps", "ns", "a")
		synctest.Wait()
		b.current(b.held(configMaps))
		if n := len(b.held(configMaps).stream.set.bases); n != 0 {
			t.Errorf("%d overlays of nothing", n)
		}
	})
}

// TestPhases: selections by phase go by what local readers see, whether the
// hub makes them or the cloud did.
func TestPhases(t *testing.T) {
	live := Scope{Resource: pods.Resource, Fields: "spec.nodeName=edge-1,status.phase!=Failed,status.phase!=Succeeded"}
	ended := Scope{Resource: pods.Resource, Fields: "spec.nodeName=edge-1,status.phase=Succeeded"}
	for name, held := range map[string][]Scope{
		"by the hub":   {{Resource: pods.Resource, Fields: "spec.nodeName=edge-1"}},
		"by the cloud": {live, ended},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &overlays{t: t, values: map[string]string{}}
				b := newBed(t, func(c *Config) { c.Overlay = o.overlay })
				defer func() { b.stop() }()
				b.cloud.put("pods", "ns", "other", "edge-1 Running", nil)
				b.cloud.put("pods", "ns", "away", "edge-2 Running", nil)
				v := b.cloud.put("pods", "ns", "a", "edge-1 Running", nil)
				for _, scope := range held {
					pin(b, scope)
				}
				refresh := func(phase string) {
					t.Helper()
					o.set("ns/a", phase)
					if err := b.Refresh(pods.Resource, "ns", "a"); err != nil {
						t.Fatal(err)
					}
				}
				names := func(scope Scope, want ...string) {
					t.Helper()
					synctest.Wait()
					got, _, err := list(t, b.held(scope))
					if keys := slices.Sorted(maps.Keys(got)); err != nil || !slices.Equal(keys, want) {
						t.Errorf("%s: %v, want %v; %v", scope.Fields, keys, want, err)
					}
				}
				c, d := b.inform(b.held(live)), b.inform(b.held(ended))
				c.local, d.local = true, true
				names(live, "ns/a", "ns/other")
				names(ended)

				// A status that waits makes it leave, under the version that it has.
				refresh("Succeeded")
				names(live, "ns/other")
				wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/a@%d", v))
				if len(held) == 1 { // else the cloud has yet to tell of it
					names(ended, "ns/a")
					wantLog(t, d.settled(), fmt.Sprintf("ADDED ns/a@%d", v))
				}
				// Who comes back may have it still.
				late := b.watch(b.held(live), b.held(live).Version())
				wantLog(t, late.settled(), fmt.Sprintf("DELETED ns/a@%d", v))
				late.end()

				// What the cloud changes meanwhile does not bring it back.
				v = b.cloud.put("pods", "ns", "a", "edge-1 Running", map[string]string{"new": "label"})
				names(live, "ns/other")
				wantLog(t, c.settled())
				if len(held) == 1 {
					wantLog(t, d.settled(), fmt.Sprintf("MODIFIED ns/a@%d", v))
				}

				// Delivered: nobody is told of it again.
				w := b.cloud.put("pods", "ns", "a", "edge-1 Succeeded", nil)
				synctest.Wait()
				o.set("ns/a", "")
				_ = b.Refresh(pods.Resource, "ns", "a") // one scope may not have it any more
				names(live, "ns/other")
				names(ended, "ns/a")
				wantLog(t, c.settled())
				first := "MODIFIED" // it was there by its overlay
				if len(held) > 1 {
					first = "ADDED"
				}
				wantLog(t, d.settled(), fmt.Sprintf("%s ns/a@%d", first, w), fmt.Sprintf("MODIFIED ns/a@%d", w))

				// The cloud's own changes of phase.
				w = b.cloud.put("pods", "ns", "other", "edge-1 Failed", nil)
				wantLog(t, c.settled(), fmt.Sprintf("DELETED ns/other@%d", w))
				w = b.cloud.put("pods", "ns", "other", "edge-1 Succeeded", nil)
				wantLog(t, c.settled())
				wantLog(t, d.settled(), fmt.Sprintf("ADDED ns/other@%d", w))
				w = b.cloud.remove("pods", "ns", "other")
				wantLog(t, c.settled())
				wantLog(t, d.settled(), fmt.Sprintf("DELETED ns/other@%d", w))

				// An overlay that is gone for good shows the cloud's again.
				refresh("Failed")
				wantLog(t, d.settled(), fmt.Sprintf("DELETED ns/a@%d", v+1))
				refresh("")
				wantLog(t, d.settled(), fmt.Sprintf("ADDED ns/a@%d", v+1))
				names(ended, "ns/a")
			})
		})
	}
}
