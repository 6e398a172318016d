package conform

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/yurt-edge/yurt/test/bed"
)

// TestHistory lets a cluster, its link, its API server and the hub live
// through a random time, and then asks every watcher what it has seen. A seed
// in CONFORM_SEED repeats one.
func TestHistory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b, err := bed.New(t.Context(), dir, bed.Config{APIServerFlags: []string{"--etcd-compaction-interval=3s"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	w, err := newWorld(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	seeds := []uint64{1, uint64(time.Now().UnixNano()) % 1e6, uint64(time.Now().UnixNano()+1) % 1e6}
	if text := os.Getenv("CONFORM_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = []uint64{seed}
	}
	for _, seed := range seeds {
		if !t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { live(t, w, seed) }) {
			if text, err := os.ReadFile(filepath.Join(b.Hub.Dir, "hub.log")); err == nil {
				_ = os.WriteFile(filepath.Join(os.TempDir(), fmt.Sprintf("yurt-conform-history-%d.log", seed)), text, 0o600)
			}
		}
	}
	log, err := os.ReadFile(filepath.Join(b.Hub.Dir, "hub.log"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(log, []byte("stream relisted")) == 0 {
		t.Error("no stream had to list again: the API server kept its history, and that path was not tried")
	}
	if n := bytes.Count(log, []byte("panicked")); n > 0 {
		t.Errorf("%d requests panicked in the hub", n)
	}
}

// life is one random time.
type life struct {
	t       *testing.T
	w       *world
	rng     *rand.Rand
	seed    uint64
	server  *side
	edge    *side
	client  dynamic.Interface
	epoch   atomic.Int64 // hub processes so far
	known   map[string]bool
	serials int
}

var historyKinds = []struct {
	gvr  schema.GroupVersionResource
	kind string
	path string
}{
	{schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}, "ConfigMap", "/api/v1"},
	{schema.GroupVersionResource{Group: "conform.example.com", Version: "v1", Resource: "gadgets"}, "Gadget", "/apis/conform.example.com/v1"},
}

func live(t *testing.T, w *world, seed uint64) {
	t.Logf("CONFORM_SEED=%d", seed)
	server, edge := w.sides(t, w.Hub, "reader")
	client, err := dynamic.NewForConfig(w.Cloud.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	l := &life{
		t: t, w: w, rng: rand.New(rand.NewPCG(seed, 0)), seed: seed,
		server: server, edge: edge, client: client, known: map[string]bool{},
	}
	var followers []*follower
	for _, k := range historyKinds {
		warm(t, edge, k.path+"/"+k.gvr.Resource)
		for _, namespace := range []string{"", "conform-a", "conform-b"} {
			path := k.path + "/" + k.gvr.Resource
			if namespace != "" {
				path = k.path + "/namespaces/" + namespace + "/" + k.gvr.Resource
			}
			for _, sel := range []string{"", "app=x", "app!=x", "app in (x,y)", "!app"} {
				query := ""
				if sel != "" {
					query = "labelSelector=" + url.QueryEscape(sel)
				}
				followers = append(followers, &follower{life: l, path: path, query: query})
			}
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, f := range followers {
		running.Go(func() { f.run(ctx) })
	}
	defer running.Wait()
	defer stop()
	l.write(20)
	for range 5 {
		l.step()
	}
	// All is well again; the last change is one that all can wait for.
	if err := w.Link.Heal(); err != nil {
		t.Fatal(err)
	}
	mustAwait(t, func(ctx context.Context) error { return linkIs(ctx, edge, http.StatusOK) })
	l.write(5)
	for _, f := range followers {
		mustAwait(t, f.current)
	}
	for _, k := range historyKinds {
		for _, form := range []string{"json", "client-go"} {
			if err := same(ctx, server, edge, question{k.path + "/" + k.gvr.Resource, "resourceVersion=0", accepts[form]}); err != nil {
				t.Error(err)
			}
		}
	}
	stop()
	running.Wait()
	events := 0
	for _, f := range followers {
		events += f.events
		for _, v := range f.violations {
			t.Errorf("watcher of %s?%s: %s", f.path, f.query, v)
		}
	}
	t.Logf("%d watchers saw %d events", len(followers), events)
}

// step is one thing that happens to the node, with writes before, during and
// after it.
func (l *life) step() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	must := func(err error) {
		l.t.Helper()
		if err != nil {
			l.t.Fatal(err)
		}
	}
	restart := func() {
		if l.rng.IntN(2) == 0 {
			l.t.Log("hub killed")
			l.w.Hub.Kill()
		} else {
			l.t.Log("hub stopped")
			l.w.Hub.Stop()
		}
		l.epoch.Add(1)
		l.write(l.rng.IntN(10))
		must(l.w.Hub.Start(ctx))
	}
	l.write(l.rng.IntN(20))
	what := l.rng.IntN(10)
	if what < 7 {
		mode := bed.Down
		if l.rng.IntN(2) == 0 {
			mode = bed.Blackhole
		}
		l.t.Logf("link cut, mode %d", mode)
		must(l.w.Link.Cut(mode))
		l.write(l.rng.IntN(40))
	}
	switch what {
	case 0, 1, 2: // a cut alone
	case 3, 4, 7: // the hub restarts, 3 and 4 without the cloud
		restart()
	case 5, 6, 8: // the API server forgets its history, 5 and 6 while nobody looks
		l.t.Log("API server restarts")
		l.w.Cloud.StopAPIServer()
		must(l.w.Cloud.StartAPIServer(ctx))
		if what == 6 {
			restart()
		}
	default: // two processes in a row
		restart()
		restart()
	}
	l.write(l.rng.IntN(20))
	if what < 7 && l.rng.IntN(4) > 0 {
		l.t.Log("link healed")
		must(l.w.Link.Heal())
		mustAwait(l.t, func(ctx context.Context) error { return linkIs(ctx, l.edge, http.StatusOK) })
	}
}

// write changes the cluster n times. The API server is up.
func (l *life) write(n int) {
	l.t.Helper()
	for range n {
		k := historyKinds[l.rng.IntN(len(historyKinds))]
		namespace := []string{"conform-a", "conform-b"}[l.rng.IntN(2)]
		name := fmt.Sprintf("r%d-%d", l.seed, l.rng.IntN(6))
		client := l.client.Resource(k.gvr).Namespace(namespace)
		key := k.kind + "/" + namespace + "/" + name
		action := l.rng.IntN(4)
		l.serials++
		object := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": k.gvr.GroupVersion().String(), "kind": k.kind,
			"metadata": map[string]any{"name": name, "annotations": map[string]any{"serial": strconv.Itoa(l.serials)}},
		}}
		if label := []string{"x", "y", "z", ""}[l.rng.IntN(4)]; label != "" {
			object.SetLabels(map[string]string{"app": label})
		}
		try := func(ctx context.Context) error {
			var err error
			switch {
			case !l.known[key]:
				_, err = client.Create(ctx, object, metav1.CreateOptions{})
			case action == 0:
				err = client.Delete(ctx, name, metav1.DeleteOptions{})
			default:
				var old *unstructured.Unstructured
				if old, err = client.Get(ctx, name, metav1.GetOptions{}); err == nil {
					object.SetResourceVersion(old.GetResourceVersion())
					_, err = client.Update(ctx, object, metav1.UpdateOptions{})
				}
			}
			return err
		}
		mustAwait(l.t, try)
		l.known[key] = !l.known[key] || action != 0
	}
}

// follower is a watcher with a memory: it lists once, watches, resumes from
// the last version it saw, and lists again only when it is told to.
type follower struct {
	*life
	path, query string

	mu     sync.Mutex // guards the following
	state  map[string]uint64
	seen   map[string]uint64 // versions, of what is gone as well
	at     uint64
	events int
	// ahead says that the state is by the cloud's own word, which may be newer
	// than the replica, and that the replica has told nothing newer since.
	ahead bool
	// epoch is that of the hub process that last served a watch.
	epoch      int64
	violations []string
}

func (f *follower) wrong(format string, args ...any) {
	if len(f.violations) < 5 {
		f.violations = append(f.violations, fmt.Sprintf(format, args...))
	}
}

// errRelist is what a 410 means.
var errRelist = errors.New("list again")

func (f *follower) run(ctx context.Context) {
	tick := time.NewTicker(30 * time.Millisecond)
	defer tick.Stop()
	version := "0"
	for {
		var err error
		if f.state == nil || version == "" {
			if err = f.list(ctx, version); err == nil {
				version = "0"
			}
		} else if err = f.watch(ctx); errors.Is(err, errRelist) {
			version = "" // as a reflector does
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

type listed struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Items []watched `json:"items"`
}

type watched struct {
	Metadata struct {
		Namespace       string `json:"namespace"`
		Name            string `json:"name"`
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Code    int    `json:"code"` // of a Status
	Message string `json:"message"`
}

func (w watched) key() string { return w.Metadata.Namespace + "/" + w.Metadata.Name }

func (w watched) version() uint64 {
	v, _ := strconv.ParseUint(w.Metadata.ResourceVersion, 10, 64)
	return v
}

// byCloud reports whether an answer is the API server's own: it names the
// queue that the request has passed.
func byCloud(h http.Header) bool { return h.Get("X-Kubernetes-Pf-Flowschema-Uid") != "" }

// objects lists. The answer's version may be ahead of the replica's when the
// cloud gave it.
func (s *side) objects(ctx context.Context, q question) (objects map[string]uint64, at uint64, cloud bool, err error) {
	a, err := s.ask(ctx, q)
	if err != nil {
		return nil, 0, false, err
	}
	if a.code != http.StatusOK {
		return nil, 0, false, fmt.Errorf("%s: %d %s", q, a.code, a.body)
	}
	var l listed
	if err := json.Unmarshal(a.body, &l); err != nil {
		return nil, 0, false, err
	}
	objects = map[string]uint64{}
	for _, item := range l.Items {
		objects[item.key()] = item.version()
	}
	at, err = strconv.ParseUint(l.Metadata.ResourceVersion, 10, 64)
	return objects, at, byCloud(a.header), err
}

func (f *follower) list(ctx context.Context, version string) error {
	if version != "" {
		version = "resourceVersion=" + version
	}
	objects, at, cloud, err := f.edge.objects(ctx, question{f.path, join(version, f.query), inJSON})
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if at < f.at {
		f.wrong("list went back from %d to %d", f.at, at)
	}
	if f.seen == nil {
		f.seen = map[string]uint64{}
	}
	for key, v := range objects {
		if v < f.seen[key] {
			f.wrong("list has %s at %d, seen at %d", key, v, f.seen[key])
		}
		f.seen[key] = v
	}
	f.state, f.at, f.ahead = objects, at, cloud
	return nil
}

func (f *follower) watch(ctx context.Context) error {
	epoch := f.life.epoch.Load()
	query := join("watch=true&allowWatchBookmarks=true&resourceVersion="+strconv.FormatUint(f.at, 10), f.query)
	resp, err := f.edge.open(ctx, question{f.path, query, inJSON})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("watch: %s", resp.Status)
	}
	if epoch != f.life.epoch.Load() {
		return nil // of which process it is nobody knows
	}
	lines := bufio.NewReader(resp.Body)
	for first := true; ; first = false {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return err
		}
		var event struct {
			Type   string  `json:"type"`
			Object watched `json:"object"`
		}
		if err := json.Unmarshal(line, &event); err != nil {
			f.mu.Lock()
			f.wrong("event %q: %v", line, err)
			f.mu.Unlock()
			return err
		}
		w := word{cloud: byCloud(resp.Header), fresh: first && epoch != f.epoch, line: line}
		if err := f.take(event.Type, event.Object, w); err != nil {
			return err
		}
		f.epoch = epoch
	}
}

// word is how an event came.
type word struct {
	line  []byte
	cloud bool // through a hub that had nothing to tell itself
	fresh bool // the first of another hub process, which may lack the history
}

// take judges one event. Who is ahead of the replica when that must list over
// a gap holds what the replica never saw, and has to list again, as who comes
// to a hub that has lost its history: see docs/guarantees.md.
func (f *follower) take(typ string, object watched, w word) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if typ == "ERROR" {
		if object.Code != http.StatusGone {
			f.wrong("error event: %s", w.line)
		} else if !w.fresh && !f.ahead && !f.insideGap(object.Message) {
			f.wrong("told to list again by the hub that had served it: %s", w.line)
		}
		return errRelist
	}
	v, key := object.version(), object.key()
	if v < f.at {
		f.wrong("%s %s at %d comes after version %d", typ, key, v, f.at)
	}
	f.ahead = w.cloud || f.ahead && v <= f.at
	f.at = max(f.at, v)
	if typ == "BOOKMARK" {
		return nil
	}
	f.events++
	_, held := f.state[key]
	switch {
	case typ == "ADDED" && held, typ == "MODIFIED" && !held:
		f.wrong("%s %s at %d, held: %t", typ, key, v, held)
	case typ != "DELETED" && v <= f.seen[key]:
		f.wrong("%s %s at %d, seen at %d", typ, key, v, f.seen[key])
	}
	f.seen[key] = max(v, f.seen[key])
	if typ == "DELETED" {
		delete(f.state, key)
	} else {
		f.state[key] = v
	}
	return nil
}

// insideGap tells the refusal of a version within a gap that this hub process
// had to list over: who heard only some of the differences, because the hub
// stopped, holds such a one.
func (f *follower) insideGap(message string) bool {
	var asked, begin uint64
	_, err := fmt.Sscanf(message[strings.LastIndex(message, ": ")+1:], " %d (%d)", &asked, &begin)
	log, readErr := os.ReadFile(filepath.Join(f.w.Hub.Dir, "hub.log"))
	lives := bytes.Split(log, []byte("hub is ready"))
	return err == nil && readErr == nil && asked > begin && bytes.Contains(lives[len(lives)-1], []byte("stream relisted"))
}

// current returns nil once the follower knows what the cloud has.
func (f *follower) current(ctx context.Context) error {
	want, _, _, err := f.server.objects(ctx, question{f.path, f.query, inJSON})
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !maps.Equal(want, f.state) {
		return fmt.Errorf("watcher of %s?%s has %v, the cloud %v", f.path, f.query, f.state, want)
	}
	return nil
}
