package replica

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// TestRandomHistory lets the cloud, the link, the hub and its clients do what
// they may, in any order, and then compares what everybody holds.
func TestRandomHistory(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newHistory(t, seed).run() })
		})
	}
}

type history struct {
	*bed
	rng     *rand.Rand
	scopes  []Scope
	clients []*client
}

func newHistory(t *testing.T, seed uint64) *history {
	h := &history{bed: newBed(t, nil), rng: rand.New(rand.NewPCG(seed, 1))}
	h.scopes = []Scope{
		configMaps, widgets,
		{Resource: configMaps.Resource, Namespace: "ns-1"},
		{Resource: configMaps.Resource, Labels: "color=red"},
		{Resource: widgets.Resource, Namespace: "ns-0", Labels: "color!=red"},
		{Resource: widgets.Resource, Fields: "metadata.name=o-3"},
	}
	return h
}

func (h *history) run() {
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
	if h.rng.IntN(2) == 0 {
		pin(h.bed, h.scopes[3]) // a scope of its own instead of a share
	}
	for _, scope := range h.scopes {
		h.clients = append(h.clients, h.inform(h.held(scope)))
	}
	for range 120 {
		h.step()
		h.comeBack()
	}
	h.cloud.setFault(nil)
	h.cloud.heal()
	pass(2 * time.Minute)
	synctest.Wait()
	for range 3 { // watch, be told to list, list
		h.comeBack()
	}
	synctest.Wait()
	for i, scope := range h.scopes {
		h.current(h.held(scope))
		h.equals(fmt.Sprintf("client %d of %s", i, scope.ID()), h.clients[i].has(), h.cloud.state(scope, h.cloud.at()))
	}
}

func (h *history) change(resource string) {
	ns, name := fmt.Sprintf("ns-%d", h.rng.IntN(3)), fmt.Sprintf("o-%d", h.rng.IntN(6))
	if h.rng.IntN(3) == 0 {
		h.cloud.remove(resource, ns, name)
		return
	}
	h.cloud.put(resource, ns, name, fmt.Sprint(h.rng.Uint64()), map[string]string{"color": []string{"red", "blue"}[h.rng.IntN(2)]})
}

func (h *history) step() {
	switch n := h.rng.IntN(100); {
	case n < 60:
		h.change([]string{"configmaps", "widgets"}[h.rng.IntN(2)])
	case n < 66:
		h.cloud.cut()
	case n < 74:
		h.cloud.heal()
	case n < 78:
		h.cloud.compact()
	case n < 81:
		h.cloud.endWatches()
	case n < 83:
		h.restart()
	case n < 86:
		h.crash()
		h.checkStore()
		h.open()
	case n < 90:
		broken := h.rng.IntN(400)
		h.cloud.setFault(func(string, int, string) *fault {
			if broken = broken * 7 / 8; broken > 50 {
				return &fault{cut: broken}
			}
			return nil
		})
	case n < 97:
		pass(time.Duration(h.rng.Int64N(int64(3 * time.Second))))
	default:
		pass(time.Duration(h.rng.Int64N(int64(2 * time.Minute))))
	}
	if h.rng.IntN(2) == 0 {
		synctest.Wait()
	}
}

// comeBack has clients whose watch has ended watch again, or list when they
// are too far behind.
func (h *history) comeBack() {
	for i, c := range h.clients {
		if !c.isClosed() {
			continue
		}
		sl, ok := h.Held(h.scopes[i])
		if !ok {
			continue // the hub crashed before it was first stored
		}
		if errors.Is(c.err, ErrExpired) || h.rng.IntN(10) == 0 {
			c.relist(sl)
			continue
		}
		if c.err != nil && !errors.Is(c.err, io.ErrClosedPipe) { // that is the client's own end
			h.t.Fatalf("watch of %s: %v", c.scope.ID(), c.err)
		}
		c.follow(sl, c.version)
	}
}

// checkStore fails unless every scope on disk is what the cloud had at the
// scope's position.
func (h *history) checkStore() {
	h.t.Helper()
	s, err := store.Open(h.t.Context(), store.Config{Path: h.path, Key: testKey})
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	snap, err := s.Snapshot()
	if err != nil {
		h.t.Fatal(err)
	}
	defer snap.Close()
	var ids []string
	if err := snap.Scan(scopesBucket, "", func(id string, _ store.Header) error { ids = append(ids, id); return nil }); err != nil {
		h.t.Fatal(err)
	}
	for _, id := range ids {
		r, err := snap.Get(scopesBucket, id)
		if err != nil {
			h.t.Fatal(err)
		}
		var p position
		if err := json.Unmarshal(r.Data, &p); err != nil {
			h.t.Fatal(err)
		}
		if p.Version == 0 {
			continue
		}
		got := map[string]string{}
		err = snap.Scan(id, "", func(key string, _ store.Header) error {
			r, err := snap.Get(id, key)
			got[key] = string(r.Data)
			return err
		})
		if err != nil {
			h.t.Fatal(err)
		}
		h.equals(fmt.Sprintf("%s on disk at %d", id, p.Version), got, h.cloud.state(p.Scope, p.Version))
		if len(got) != p.Objects {
			h.t.Fatalf("%s: %d objects, the position says %d", id, len(got), p.Objects)
		}
	}
}

// TestCovers: what a scope covers it holds, and the hub picks the narrower
// scope's objects as the cloud does.
func TestCovers(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	labelTerms := []string{"a", "!a", "a=1", "a!=1", "a in (1,2)", "a notin (1,2)", "b=1", "b"}
	fieldTerms := []string{
		"metadata.name=x", "metadata.name!=x", "metadata.namespace=n", "spec.nodeName=e", "spec.nodeName!=e",
		"status.phase=Running", "status.phase!=Failed", "spec.unschedulable=true",
	}
	some := func(terms []string) string {
		var out []string
		for range rng.IntN(3) {
			out = append(out, pick(terms...))
		}
		return strings.Join(out, ",")
	}
	random := func() Scope {
		target := "/api/v1/" + pick("", "namespaces/n/", "namespaces/m/") + pick("pods", "configmaps")
		q := Scope{Fields: some(fieldTerms), Labels: some(labelTerms)}.query()
		_, info := ask(t, target+"?"+q.Encode())
		return ScopeOf(info)
	}
	covered := 0
	for range 60_000 {
		wide, narrow := random(), random()
		if !wide.covers(narrow) {
			continue
		}
		covered++
		m, ok := newMatcher(wide, narrow)
		if !ok {
			t.Fatalf("%s covers %s and cannot match it", wide.ID(), narrow.ID())
		}
		for range 4 {
			th := &thing{
				resource: narrow.Resource.Resource, namespace: pick("n", "m", "o"), name: pick("x", "y"),
				labels: map[string]string{}, value: pick("e", "f", "") + pick("", " Running", " Failed"),
			}
			for _, name := range []string{"a", "b"} {
				if v := pick("", "1", "2"); v != "" {
					th.labels[name] = v
				}
			}
			if unknown := strings.Contains(wide.Fields+narrow.Fields, "spec.unschedulable"); unknown {
				continue // nor does the cloud of these tests know it
			}
			inWide, inNarrow := selects(wide, th), selects(narrow, th)
			if inNarrow && !inWide {
				t.Fatalf("%s covers %s, but not %+v", wide.ID(), narrow.ID(), th)
			}
			meta := wire.Meta{Namespace: th.namespace, Name: th.name, Labels: maps.Clone(th.labels)}
			if th.resource == "pods" {
				meta.NodeName, meta.Phase = th.pod()
			}
			if inWide && m.matches(&meta) != inNarrow {
				t.Fatalf("%s of %s: %+v matches: %v", narrow.ID(), wide.ID(), th, !inNarrow)
			}
			if key := keyOf(th.namespace, th.name); inWide && inNarrow && !m.mayMatch(key) {
				t.Fatalf("%s of %s: %s may match", narrow.ID(), wide.ID(), key)
			}
			if key := keyOf(th.namespace, th.name); inWide && m.byKey() && m.matchesKey(key) != inNarrow {
				t.Fatalf("%s of %s: %s by its key: %v", narrow.ID(), wide.ID(), key, !inNarrow)
			}
		}
	}
	if covered < 500 {
		t.Errorf("only %d pairs cover", covered)
	}
}

func TestScopeIDsAreUnique(t *testing.T) {
	seen := map[string]Scope{}
	for _, s := range []Scope{
		configMaps, pods, widgets,
		{Resource: pods.Resource, Namespace: "a"},
		{Resource: pods.Resource, Fields: "a"},
		{Resource: pods.Resource, Labels: "a"},
		{Resource: pods.Resource, Namespace: "a&fields=b"},
		{Resource: pods.Resource, Namespace: "a", Fields: "b"},
		{Resource: pods.Resource, Labels: "a=b,c=d"},
		{Resource: pods.Resource, Labels: "a=b", Fields: "c=d"},
	} {
		if old, ok := seen[s.ID()]; ok {
			t.Errorf("%+v and %+v are both %s", old, s, s.ID())
		}
		seen[s.ID()] = s
	}
}

func TestWindow(t *testing.T) {
	var w window
	w.start = 10
	for i := range uint64(5) {
		w.add(&event{object: make([]byte, 10)}, 20+10*i) // 20 to 60
	}
	for version, want := range map[uint64]int{9: -1, 10: 5, 19: 5, 20: 4, 35: 3, 60: 0, 99: 0} {
		seq, ok := w.since(version, 60)
		if ok != (want >= 0) || (ok && int(w.next-seq) != want) {
			t.Errorf("since %d: %d of %d, %v; want %d events", version, seq, w.next, ok, want)
		}
	}
	if _, ok := w.from(w.next); !ok {
		t.Error("who has seen everything is not behind")
	}

	w.add(&event{object: make([]byte, windowBytes)}, 70)
	if len(w.events) != 1 || w.start != 60 {
		t.Errorf("%d events after %d", len(w.events), w.start)
	}
	if _, ok := w.from(3); ok {
		t.Error("events that are gone were given")
	}

	for i := range uint64(2 * maxGaps) {
		w.skip(100+10*i, 105+10*i)
	}
	if len(w.gaps) != maxGaps {
		t.Errorf("%d gaps", len(w.gaps))
	}
	for version, want := range map[uint64]bool{102: false, 172: false, 185: true, 187: true, 182: false, 252: false, 255: true, 300: true} {
		if _, ok := w.since(version, 255); ok != want {
			t.Errorf("since %d: %v", version, ok)
		}
	}

	seen := w.next
	w.lost = 400
	w.reset()
	if _, ok := w.from(seen); ok {
		t.Error("a watcher outlived its history")
	}
	for version, want := range map[uint64]bool{250: true, 255: true, 256: false, 400: false, 401: true} {
		if _, ok := w.since(version, 255); ok != want {
			t.Errorf("since %d of a restored cloud: %v", version, ok)
		}
	}
}

// A watcher that sees a part must not be left with an object whose former
// state could not be read.
func TestBlindEvents(t *testing.T) {
	red, err := parseMatcher("color=red", "ns")
	if err != nil {
		t.Fatal(err)
	}
	blue := &wire.Meta{Namespace: "ns", Name: "a", Labels: map[string]string{"color": "blue"}}
	e := newEvent("MODIFIED", "ns/a", blue, nil, Kind{}, nil)
	e.blind = true
	if typ, _ := e.as(red); typ != "DELETED" {
		t.Errorf("it may have been red: %q", typ)
	}
	e.key = "other/a"
	if typ, _ := e.as(red); typ != "" {
		t.Errorf("it was never in the namespace: %q", typ)
	}
}

func parseMatcher(labels, namespace string) (matcher, error) {
	m, ok := newMatcher(configMaps, Scope{Resource: configMaps.Resource, Labels: labels, Namespace: namespace})
	if !ok {
		return m, errors.New("no matcher")
	}
	return m, nil
}
