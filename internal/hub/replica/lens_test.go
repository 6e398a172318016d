package replica

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// glass hides some objects and stains others, by their value.
type glass struct {
	colour  uint32
	version uint64
}

func (g *glass) Version() uint64 { return g.version }

func (g *glass) Same(_ schema.GroupVersionResource, other Filter) bool {
	o, ok := other.(*glass)
	return ok && o.colour == g.colour
}

// sees returns a value as it is seen.
func (g *glass) sees(value string) (string, bool) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(value))
	switch (h.Sum32() + g.colour) % 4 {
	case 0:
		return "", false
	case 1:
		return fmt.Sprintf("%s through %d", value, g.colour), true
	}
	return value, true
}

func (g *glass) Show(r schema.GroupVersionResource, _ Kind, object []byte) ([]byte, bool) {
	th, err := read(r.Resource, object)
	if err != nil {
		panic(err)
	}
	seen, ok := g.sees(th.value)
	if !ok || seen == th.value {
		return object, ok
	}
	return write(th, seen), true
}

type readable struct {
	value  string
	custom map[string]any
	cm     *corev1.ConfigMap
}

func read(resource string, object []byte) (readable, error) {
	if resource == "configmaps" {
		cm := &corev1.ConfigMap{}
		err := cm.Unmarshal(object)
		return readable{value: cm.Data["value"], cm: cm}, err
	}
	var tree map[string]any
	if err := json.Unmarshal(object, &tree); err != nil {
		return readable{}, err
	}
	spec, _ := tree["spec"].(map[string]any)
	value, _ := spec["value"].(string)
	return readable{value: value, custom: tree}, nil
}

func write(th readable, value string) []byte {
	var (
		out []byte
		err error
	)
	if th.cm != nil {
		th.cm.Data["value"] = value
		out, err = th.cm.Marshal()
	} else {
		th.custom["spec"] = map[string]any{"value": value}
		out, err = json.Marshal(th.custom)
	}
	if err != nil {
		panic(err)
	}
	return out
}

func (h *history) through(i int) *Slice {
	h.t.Helper()
	sl, err := h.held(h.scopes[i]).Through("reader", fmt.Sprint("client ", i))
	if err != nil {
		h.t.Fatal(err)
	}
	return sl
}

// TestFilteredHistory is TestRandomHistory for readers who are shown the
// objects by a filter that changes its mind. What a watcher has is what a list
// shows, byte for byte, and that is what the filter makes of the cloud's state.
func TestFilteredHistory(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { filteredHistory(t, seed, &glass{}) })
		})
	}
}

// TestAccessFilterHistory is TestFilteredHistory with AccessFilters, that come,
// change, go bad and go.
func TestAccessFilterHistory(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { filteredHistory(t, seed, &accessGlass{}) })
		})
	}
}

// mind is a filter of which it is known what it makes of a value.
type mind interface {
	Filter
	sees(value string) (string, bool)
	// next is what it thinks next, of a version.
	next(rng *rand.Rand, version uint64) mind
}

func (*glass) next(rng *rand.Rand, version uint64) mind {
	return &glass{colour: rng.Uint32(), version: version}
}

func filteredHistory(t *testing.T, seed uint64, first mind) {
	var current atomic.Pointer[mind]
	current.Store(&first)
	h := newHistory(t, seed)
	h.stop()
	moves := rand.New(rand.NewPCG(seed, 2))
	move := func() {
		// What it goes by may come sooner or later than the objects.
		now := h.cloud.at()
		next := (*current.Load()).next(moves, now-min(now, moves.Uint64N(5)))
		current.Store(&next)
	}
	h.conf = func(c *Config) {
		if moves.IntN(2) == 0 {
			move() // while the hub was down
		}
		c.Filter = func(string) Filter { return *current.Load() }
	}
	h.open()
	defer func() {
		for _, c := range h.clients {
			c.end()
		}
		h.stop()
	}()
	for _, scope := range []Scope{configMaps, widgets} {
		for range h.rng.IntN(40) {
			h.change(scope.Resource.Resource)
		}
		pin(h.bed, scope)
	}
	for i := range h.scopes {
		h.clients = append(h.clients, h.inform(h.through(i)))
	}
	for range 120 {
		h.step()
		if moves.IntN(8) == 0 {
			move()
			if err := h.Refilter("reader"); err != nil {
				t.Fatal(err)
			}
		}
		h.comeBackThrough()
	}
	h.cloud.setFault(nil)
	h.cloud.heal()
	pass(2 * time.Minute)
	synctest.Wait()
	for range 3 {
		h.comeBackThrough()
	}
	synctest.Wait()
	for i, scope := range h.scopes {
		name := fmt.Sprintf("client %d of %s", i, scope.ID())
		listed, _, err := list(t, h.through(i))
		if err != nil {
			t.Fatal(err)
		}
		has := h.clients[i].has()
		for key, text := range h.clients[i].wasTold() {
			if has[key] != text {
				t.Errorf("%s: the handlers were told %.300q of %s, it has %.300q", name, text, key, has[key])
			}
		}
		if !maps.Equal(has, listed) {
			for key, text := range listed {
				if has[key] != text {
					t.Errorf("%s: %s is %.300q, a list shows %.300q", name, key, has[key], text)
				}
			}
			t.Fatalf("%s has %d objects, a list shows %d", name, len(has), len(listed))
		}
		want := map[string]string{}
		for key, th := range h.cloud.state(scope, h.cloud.at()) {
			if seen, ok := (*current.Load()).sees(th.value); ok {
				want[key] = seen
			}
		}
		got := map[string]string{}
		for key, text := range has {
			th, err := read(scope.Resource.Resource, []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			got[key] = th.value
		}
		if !maps.Equal(got, want) {
			t.Fatalf("%s has %v, want %v", name, got, want)
		}
	}
}

func (h *history) comeBackThrough() {
	for i, c := range h.clients {
		if !c.isClosed() {
			continue
		}
		if _, ok := h.Held(h.scopes[i]); !ok {
			continue
		}
		sl, err := h.held(h.scopes[i]).Through("reader", fmt.Sprint("client ", i))
		if errors.Is(err, errNotSynced) {
			continue
		}
		if err != nil {
			h.t.Fatal(err)
		}
		if errors.Is(c.err, ErrExpired) || h.rng.IntN(10) == 0 {
			c.relist(sl)
			continue
		}
		if c.err != nil && !errors.Is(c.err, io.ErrClosedPipe) {
			h.t.Fatalf("watch of %s: %v", c.scope.ID(), c.err)
		}
		c.follow(sl, c.version)
	}
}

// filtered is a bed with one glass.
func filtered(t *testing.T) (b *bed, move func(colour uint32, version uint64)) {
	t.Helper()
	var current atomic.Pointer[glass]
	current.Store(&glass{})
	b = newBed(t, func(c *Config) { c.Filter = func(string) Filter { return current.Load() } })
	return b, func(colour uint32, version uint64) {
		t.Helper()
		current.Store(&glass{colour: colour, version: version})
		if err := b.Refilter("reader"); err != nil {
			t.Fatal(err)
		}
	}
}

// value returns one that a glass of colour 0 shows in a way: hidden, stained
// or as it is.
func value(t *testing.T, hidden, stained bool) string {
	t.Helper()
	for i := range 100 {
		v := fmt.Sprint("value ", i)
		seen, ok := (&glass{}).sees(v)
		if ok != hidden && (seen != v) == stained && (hidden || ok) {
			return v
		}
		if !ok && hidden {
			return v
		}
	}
	t.Fatal("no such value")
	return ""
}

func seenBy(t *testing.T, sl *Slice) *Slice {
	t.Helper()
	out, err := sl.Through("reader", "somebody")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFilterChangesItsMind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, move := filtered(t)
		defer b.stop()
		b.cloud.put("configmaps", "ns", "plain", value(t, false, false), nil)
		b.cloud.put("configmaps", "ns", "stained", value(t, false, true), nil)
		b.cloud.put("configmaps", "ns", "hidden", value(t, true, false), nil)
		sl := seenBy(t, b.sync(configMaps))
		pass(2 * time.Second)
		c := b.inform(sl)
		if got := c.has(); len(got) != 2 || got["ns/hidden"] != "" || !strings.Contains(got["ns/stained"], "through 0") {
			t.Fatalf("it has %q", got)
		}
		before := sl.Version()

		// The same by other reasons is no news.
		move(0, 1000)
		wantLog(t, c.settled())

		// Colour 2 hides what has remainder 2 and shows what was hidden.
		move(2, 2000)
		log := c.settled()
		if len(log) == 0 || log[len(log)-1] == "" {
			t.Fatalf("events %q", log)
		}
		for _, line := range log {
			if !strings.HasSuffix(line, "@2000") {
				t.Errorf("%s is not at the version of what changed", line)
			}
		}
		listed, version, err := list(t, sl)
		if err != nil {
			t.Fatal(err)
		}
		if version <= 2000 || !maps.Equal(listed, c.has()) {
			t.Errorf("list at %d: %q; the watcher has %q", version, listed, c.has())
		}

		// Who knows a state before it is told; who knows a state of another
		// life of the hub lists.
		late := b.watch(sl, before)
		if got := late.settled(); len(got) != len(log) {
			t.Errorf("late: %q, want %q", got, log)
		}
		if _, err := sl.startOf(t.Context(), info(t, "/api/v1/configmaps?watch=true&resourceVersion=1")); !errors.Is(err, ErrExpired) {
			t.Errorf("a version of another life: %v", err)
		}
		if _, err := sl.startOf(t.Context(), info(t, "/api/v1/configmaps?watch=true&resourceVersion=99999")); !errors.Is(err, ErrExpired) {
			t.Errorf("a version that nobody gave: %v", err)
		}

		// What the cloud changes next has an older version than the client
		// has seen, and is shown under a newer one.
		b.cloud.put("configmaps", "ns", "plain", "changed", nil)
		for _, line := range c.settled() {
			var typ, key string
			var v uint64
			if _, err := fmt.Sscanf(strings.Replace(line, "@", " ", 1), "%s %s %d", &typ, &key, &v); err != nil || v <= 2000 {
				t.Errorf("%s: %v", line, err)
			}
		}
		listed, _, err = list(t, sl)
		if err != nil || !maps.Equal(listed, c.has()) {
			t.Errorf("list: %q, %v; the watcher has %q", listed, err, c.has())
		}
	})
}

func info(t *testing.T, target string) request.Info {
	t.Helper()
	_, i := ask(t, target)
	return i
}

// Get, tables and metadata show what lists show.
func TestViewsThroughAFilterAgree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, move := filtered(t)
		defer b.stop()
		b.cloud.put("configmaps", "ns", "stained", value(t, false, true), nil)
		b.cloud.put("configmaps", "ns", "hidden", value(t, true, false), nil)
		base := b.sync(configMaps)
		sl := seenBy(t, base)
		pass(time.Second)
		_ = move
		listed, _, err := list(t, sl)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]bool{"stained": true, "hidden": false} {
			obj, err := b.Get(info(t, "/api/v1/namespaces/ns/configmaps/"+name), 0)
			if err != nil {
				t.Fatal(err)
			}
			seen, ok, err := b.Through(obj, "reader")
			if err != nil || ok != want {
				t.Fatalf("%s is seen: %v, %v", name, ok, err)
			}
			if ok && string(seen.Data) != listed["ns/"+name] {
				t.Errorf("get shows %q, a list %q", seen.Data, listed["ns/"+name])
			}
		}
		for _, f := range []request.Format{
			{View: request.Table, Encoding: wire.JSON},
			{View: request.MetadataList, Encoding: wire.JSON},
			{View: request.MetadataList, Encoding: wire.Protobuf},
			{Encoding: wire.JSON},
		} {
			r, _ := ask(t, "/api/v1/configmaps")
			w := httptest.NewRecorder()
			if err := sl.List(w, r, []request.Format{f}); err != nil {
				t.Fatal(err)
			}
			if text := w.Body.String(); !strings.Contains(text, "stained") || strings.Contains(text, "hidden") {
				t.Errorf("%+v: %q", f, text)
			}
		}
		// Others see the set as it is.
		if plain, _, err := list(t, base); err != nil || len(plain) != 2 || strings.Contains(plain["ns/stained"], "through") {
			t.Errorf("unfiltered: %q, %v", plain, err)
		}
		if peers, _, err := list(t, base.Base()); err != nil || len(peers) != 2 {
			t.Errorf("peers: %q, %v", peers, err)
		}
	})
}

// A lens that nobody uses goes.
func TestUnusedLensesGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _ := filtered(t)
		defer b.stop()
		b.cloud.put("configmaps", "ns", "a", value(t, false, true), nil)
		pin(b, configMaps)
		c := b.inform(seenBy(t, b.held(configMaps)))
		pass(pauseAfter + 2*idleEvery)
		s := b.held(configMaps).stream.set
		count := func() int {
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.lenses)
		}
		if count() != 1 {
			t.Fatal("a lens with a watcher went")
		}
		c.end()
		pass(pauseAfter + 2*idleEvery)
		if n := count(); n != 0 {
			t.Errorf("%d lenses stay", n)
		}
	})
}

// stamp shows every pod with a label of its own.
type stamp struct{}

func (stamp) Version() uint64                                   { return 0 }
func (stamp) Same(_ schema.GroupVersionResource, _ Filter) bool { return true }

func (stamp) Show(_ schema.GroupVersionResource, _ Kind, object []byte) ([]byte, bool) {
	pod := &corev1.Pod{}
	if err := pod.Unmarshal(object); err != nil {
		panic(err)
	}
	pod.Spec.SchedulerName = "marked"
	out, err := pod.Marshal()
	if err != nil {
		panic(err)
	}
	return out, true
}

// TestHoldThroughAFilter: what waits for others waits for readers of a filter
// too, in watches and lists, and they never see an object unfiltered.
func TestHoldThroughAFilter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &keeper{}
		b := newBed(t, func(c *Config) {
			c.Hold = Hold{Scope: pods, After: time.Minute, Ask: k.ask}
			c.Filter = func(string) Filter { return stamp{} }
		})
		defer func() { b.stop() }()
		for _, name := range []string{"a", "b"} {
			b.cloud.put("pods", "ns", name, "here Running", nil)
		}
		sl := seenBy(t, b.sync(pods))
		c := b.inform(sl)
		synctest.Wait()
		b.cloud.cut()
		pass(2 * time.Minute)
		b.cloud.remove("pods", "ns", "a")
		b.cloud.heal()
		pass(2 * time.Minute)
		fresh := b.inform(sl)
		synctest.Wait()
		for who, has := range map[string]map[string]string{"who watched": c.has(), "who lists": fresh.has()} {
			if len(has) != 2 {
				t.Errorf("%s has %d pods", who, len(has))
			}
			for key, text := range has {
				if !strings.Contains(text, "marked") {
					t.Errorf("%s sees %s unfiltered", who, key)
				}
			}
		}
		k.letGo(t)
		for who, client := range map[string]*client{"who watched": c, "who listed": fresh} {
			if log := client.settled(); len(log) != 1 || !strings.HasPrefix(log[0], "DELETED ns/a@") {
				t.Errorf("%s was told %q", who, log)
			}
			if len(client.has()) != 1 {
				t.Errorf("%s has %d pods", who, len(client.has()))
			}
		}
	})
}
