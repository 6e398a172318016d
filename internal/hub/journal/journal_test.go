package journal

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	podsResource = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	allPods      = replica.Scope{Resource: podsResource}
	testKey      = bytes.Repeat([]byte{7}, 32)
)

// cloud is a small API server: pods that can be listed and watched, whose
// status can be patched, and events.
type cloud struct {
	t *testing.T

	mu      sync.Mutex // guards all below
	up      chan struct{}
	version int
	pods    map[string]*corev1.Pod
	frames  []byte         // of all changes, for watches
	ends    map[string]int // of the frames, by resource version
	changed chan struct{}
	cuts    chan struct{}
	asked   []string // "METHOD path" of all writes
	events  map[string]map[string]any
	answer  func(r *http.Request) int // a code instead, or 0
	lose    bool                      // the answer is lost after the write
	portal  int                       // the code of something that answers every write with HTML
}

func newCloud(t *testing.T) *cloud {
	c := &cloud{
		t: t, version: 10, pods: map[string]*corev1.Pod{}, changed: make(chan struct{}), cuts: make(chan struct{}), ends: map[string]int{},
		events: map[string]map[string]any{}, up: make(chan struct{}),
	}
	close(c.up)
	return c
}

func (c *cloud) Node() http.RoundTripper   { return c }
func (c *cloud) Bearer() http.RoundTripper { return c }

func (c *cloud) WaitUp(ctx context.Context) error {
	c.mu.Lock()
	up := c.up
	c.mu.Unlock()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-up:
		return nil
	}
}

func (c *cloud) online() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.up:
		return true
	default:
		return false
	}
}

func (c *cloud) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.up = make(chan struct{})
	close(c.cuts)
	c.cuts = make(chan struct{})
}

func (c *cloud) heal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.up)
}

func (c *cloud) set(typ string, pod *corev1.Pod) {
	c.version++
	pod.ResourceVersion = fmt.Sprint(c.version)
	data, err := pod.Marshal()
	if err != nil {
		c.t.Error(err)
	}
	key := pod.Namespace + "/" + pod.Name
	if c.pods[key] = pod; typ == "DELETED" {
		delete(c.pods, key)
	}
	c.frames = wire.AppendEvent(c.frames, wire.Protobuf, typ, "v1", "Pod", data)
	c.ends[pod.ResourceVersion] = len(c.frames)
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *cloud) add(name, uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set("ADDED", &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(uid)},
		Status: corev1.PodStatus{
			Phase: corev1.PodPending, Message: "waiting", PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}},
			NominatedNodeName: "edge-9",
		},
	})
}

func (c *cloud) remove(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set("DELETED", c.pods["ns/"+name].DeepCopy())
}

func (c *cloud) pod(name string) *corev1.Pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pods["ns/"+name].DeepCopy()
}

func (c *cloud) writes() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.asked)
}

func (c *cloud) RoundTrip(r *http.Request) (*http.Response, error) {
	if !c.online() {
		return nil, errors.New("no route to host")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	w := httptest.NewRecorder()
	switch q := r.URL.Query(); {
	case q.Get("watch") != "":
		body := &watchBody{cloud: c, ctx: r.Context(), cuts: c.cuts}
		body.sent = c.ends[q.Get("resourceVersion")]
		return &http.Response{
			StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/vnd.kubernetes.protobuf;stream=watch"}}, Body: body,
		}, nil
	case r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/pods"):
		var items [][]byte
		size := 0
		for _, p := range c.pods {
			data, _ := p.Marshal()
			items, size = append(items, data), size+wire.ItemSize(wire.Protobuf, len(data))
		}
		h := wire.ListHeader{APIVersion: "v1", Kind: "PodList", Version: uint64(c.version)}
		out := wire.AppendListStart(nil, wire.Protobuf, h, size)
		for i, item := range items {
			out = wire.AppendItem(out, wire.Protobuf, i == 0, item)
		}
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
		_, _ = w.Write(wire.AppendListEnd(out, wire.Protobuf, h))
	default:
		if c.portal != 0 {
			w.WriteHeader(c.portal)
			fmt.Fprint(w, "<html>Please accept our terms</html>")
			break
		}
		c.asked = append(c.asked, r.Method+" "+r.URL.Path)
		code := 0
		if c.answer != nil {
			code = c.answer(r)
		}
		if code == 0 {
			code = c.write(r, w)
		}
		if code >= 400 {
			fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","code":%d}`, code)
		}
		if c.lose {
			return nil, errors.New("connection reset by peer")
		}
		w.Code = code
	}
	return w.Result(), nil
}

func (c *cloud) write(r *http.Request, w io.Writer) int {
	body := []byte{}
	if r.Body != nil {
		body, _ = io.ReadAll(r.Body)
	}
	name := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	switch {
	case strings.Contains(r.URL.Path, "/events"):
		var e map[string]any
		if err := json.Unmarshal(body, &e); err != nil {
			c.t.Errorf("event: %v", err)
		}
		if r.Method == http.MethodPost {
			name = e["metadata"].(map[string]any)["name"].(string)
			if c.events[name] != nil {
				return http.StatusConflict
			}
		}
		c.events[name] = e
		fmt.Fprint(w, `{"kind":"Event","apiVersion":"v1"}`)
		if r.Method == http.MethodPost {
			return http.StatusCreated
		}
		return http.StatusOK
	case strings.HasSuffix(r.URL.Path, "/status"):
		parts := strings.Split(r.URL.Path, "/")
		pod := c.pods["ns/"+parts[len(parts)-2]]
		if pod == nil {
			return http.StatusNotFound
		}
		var p struct{ Metadata metav1.ObjectMeta }
		if err := json.Unmarshal(body, &p); err != nil {
			c.t.Errorf("patch: %v", err)
		}
		if p.Metadata.UID != pod.UID {
			return http.StatusConflict
		}
		text, _ := json.Marshal(pod)
		text, err := strategicpatch.StrategicMergePatch(text, body, corev1.Pod{})
		if err != nil {
			c.t.Errorf("patch: %v", err)
		}
		next := &corev1.Pod{}
		if err := json.Unmarshal(text, next); err != nil {
			c.t.Error(err)
		}
		c.set("MODIFIED", next)
		text, _ = json.Marshal(next)
		_, _ = w.Write(text)
		return http.StatusOK
	}
	pod := c.pods["ns/"+name]
	if pod == nil {
		return http.StatusNotFound
	}
	text, _ := json.Marshal(pod)
	_, _ = w.Write(text)
	return http.StatusOK
}

type watchBody struct {
	cloud *cloud
	ctx   context.Context
	cuts  chan struct{}
	sent  int
}

func (b *watchBody) Close() error { return nil }

func (b *watchBody) Read(p []byte) (int, error) {
	for {
		b.cloud.mu.Lock()
		n := copy(p, b.cloud.frames[b.sent:])
		changed := b.cloud.changed
		b.cloud.mu.Unlock()
		if b.sent += n; n > 0 {
			return n, nil
		}
		select {
		case <-b.ctx.Done():
			return 0, b.ctx.Err()
		case <-b.cuts:
			return 0, errors.New("connection reset by peer")
		case <-changed:
		}
	}
}

// bed is a journal and a replica on one store.
type bed struct {
	t       *testing.T
	cloud   *cloud
	path    string
	limits  Config
	store   *store.Store
	journal *Journal
	replica *replica.Replica
	stop    func()
}

func newBed(t *testing.T, limits Config) *bed {
	b := &bed{t: t, cloud: newCloud(t), path: t.TempDir() + "/store", limits: limits}
	b.open()
	return b
}

func (b *bed) open() {
	b.t.Helper()
	var err error
	if b.store, err = store.Open(b.t.Context(), store.Config{Path: b.path, Key: testKey}); err != nil {
		b.t.Fatal(err)
	}
	cfg := b.limits
	cfg.Store, cfg.Cloud, cfg.WaitUp = b.store, b.cloud, b.cloud.WaitUp
	cfg.Log, cfg.Registerer = slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	cfg.Refresh = func(r schema.GroupVersionResource, ns, name string) error { return b.replica.Refresh(r, ns, name) }
	if b.journal, err = Open(cfg); err != nil {
		b.t.Fatal(err)
	}
	b.replica, err = replica.New(replica.Config{
		Store: b.store, Upstream: b.cloud, Online: b.cloud.online, Overlay: b.journal.Overlay,
		Log: cfg.Log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.journal.Show()
	if err := b.replica.Pin(allPods); err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = b.replica.Run(ctx) })
	running.Go(func() { _ = b.journal.Run(ctx) })
	b.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		if err := b.store.Close(); err != nil {
			b.t.Error(err)
		}
	})
}

// crash leaves what is on disk now.
func (b *bed) crash() {
	b.t.Helper()
	text, err := os.ReadFile(b.path)
	if err != nil {
		b.t.Fatal(err)
	}
	b.stop()
	if err := os.WriteFile(b.path, text, 0o600); err != nil {
		b.t.Fatal(err)
	}
	b.open()
}

func (b *bed) object(name string) *replica.Object {
	b.t.Helper()
	o, err := b.replica.Get(request.Info{Verb: "get", IsResource: true, Resource: podsResource, Namespace: "ns", Name: name}, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	return o
}

// seen is the pod as local readers see it.
func (b *bed) seen(name string) *corev1.Pod {
	b.t.Helper()
	pod := &corev1.Pod{}
	if err := pod.Unmarshal(b.object(name).Data); err != nil {
		b.t.Fatal(err)
	}
	return pod
}

func (b *bed) patch(name, status string) error {
	b.t.Helper()
	o := b.object(name)
	_, err := b.journal.PatchStatus(b.t.Context(), podsResource, types.StrategicMergePatchType, []byte(`{"status":`+status+`}`), o)
	return err
}

func (b *bed) mustPatch(name, status string) {
	b.t.Helper()
	if err := b.patch(name, status); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) depth(status, events int) {
	b.t.Helper()
	s := b.journal.Stats()
	if s.Status != status || s.Events != events {
		b.t.Errorf("%d status and %d events wait, want %d and %d", s.Status, s.Events, status, events)
	}
}

func (b *bed) overlays() int {
	b.journal.mu.Lock()
	defer b.journal.mu.Unlock()
	return len(b.journal.status)
}

func inBubble(t *testing.T, limits Config, test func(t *testing.T, b *bed)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, limits)
		defer func() { b.stop() }()
		test(t, b)
	})
}

func TestStatusIsKeptShownAndDelivered(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		pass(3 * time.Second) // the replica has stored it
		b.cloud.cut()
		b.mustPatch("a", `{"phase":"Running","message":null,"conditions":[{"type":"Ready","status":"False"}]}`)
		b.crash() // it was acknowledged
		b.depth(1, 0)
		b.mustPatch("a", `{"conditions":[{"type":"Ready","status":"True"}],"podIP":"10.0.0.2","podIPs":[{"$patch":"delete","ip":"10.0.0.1"},{"ip":"10.0.0.2"}]}`)
		b.depth(1, 0)
		check := func(where string, pod *corev1.Pod) {
			t.Helper()
			s := pod.Status
			if s.Phase != corev1.PodRunning || len(s.Conditions) != 1 || s.Conditions[0].Status != corev1.ConditionTrue ||
				s.Message != "" || s.PodIP != "10.0.0.2" || len(s.PodIPs) != 1 || s.PodIPs[0].IP != "10.0.0.2" {
				t.Errorf("%s: %+v", where, s)
			}
		}
		check("offline", b.seen("a"))
		if !b.journal.Pending(podsResource, "ns", "a") {
			t.Error("newer ones must wait behind it")
		}

		b.cloud.mu.Lock()
		b.cloud.pods["ns/a"].Status.NominatedNodeName = "edge-3" // by the scheduler
		b.cloud.mu.Unlock()
		b.cloud.heal()
		pass(time.Minute)
		b.depth(0, 0)
		check("cloud", b.cloud.pod("a"))
		check("online", b.seen("a"))
		if n := b.cloud.pod("a").Status.NominatedNodeName; n != "edge-3" {
			t.Errorf("the scheduler's field became %q", n)
		}
		if n := b.overlays(); n != 0 {
			t.Errorf("%d overlays left", n)
		}
		b.crash()
		pass(time.Minute)
		if got := b.cloud.writes(); len(got) != 1 {
			t.Errorf("writes %q", got)
		}
	})
}

func TestStatusKeepsOrderAndMerges(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		for _, name := range []string{"c", "a", "b"} {
			b.cloud.add(name, "u-"+name)
		}
		synctest.Wait()
		b.cloud.cut()
		for i := range 5 {
			for _, name := range []string{"c", "a", "b"} {
				b.mustPatch(name, fmt.Sprintf(`{"reason":"r%d"}`, i))
			}
		}
		b.depth(3, 0)
		b.crash()
		b.cloud.heal()
		pass(time.Minute)
		var want []string
		for _, name := range []string{"c", "a", "b"} {
			want = append(want, "PATCH /api/v1/namespaces/ns/pods/"+name+"/status")
			if got := b.cloud.pod(name).Status.Reason; got != "r4" {
				t.Errorf("%s: %s", name, got)
			}
		}
		if got := b.cloud.writes(); !slices.Equal(got, want) {
			t.Errorf("writes %q", got)
		}
	})
}

// Two patches made from the same view of the object both count.
func TestStatusPatchesDoNotOverwriteOneAnother(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		synctest.Wait()
		b.cloud.cut()
		view := b.object("a")
		for _, p := range []string{`{"status":{"phase":"Running"}}`, `{"status":{"reason":"R"}}`} {
			if _, err := b.journal.PatchStatus(t.Context(), podsResource, types.StrategicMergePatchType, []byte(p), view); err != nil {
				t.Fatal(err)
			}
		}
		if s := b.seen("a").Status; s.Phase != corev1.PodRunning || s.Reason != "R" {
			t.Errorf("%+v", s)
		}
	})
}

func TestStatusIsRefused(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		synctest.Wait()
		o := b.object("a")
		for name, c := range map[string]struct {
			typ   types.PatchType
			patch string
			is    func(error) bool
		}{
			"not JSON":      {types.StrategicMergePatchType, `{`, apierrors.IsBadRequest},
			"another pod":   {types.StrategicMergePatchType, `{"metadata":{"uid":"u2"},"status":{}}`, apierrors.IsConflict},
			"wrong type":    {types.StrategicMergePatchType, `{"status":{"phase":7}}`, apierrors.IsBadRequest},
			"wrong shape":   {types.StrategicMergePatchType, `{"status":[]}`, apierrors.IsBadRequest},
			"another patch": {types.JSONPatchType, `[]`, func(err error) bool { return err != nil }},
		} {
			if _, err := b.journal.PatchStatus(t.Context(), podsResource, c.typ, []byte(c.patch), o); !c.is(err) {
				t.Errorf("%s: %v", name, err)
			}
		}
		b.depth(0, 0)
	})
}

func TestStatusOfWhatIsGoneIsDropped(t *testing.T) {
	for name, c := range map[string]struct {
		meanwhile func(b *bed)
		writes    int
	}{
		"deleted":  {func(b *bed) { b.cloud.remove("a") }, 1},
		"replaced": {func(b *bed) { b.cloud.remove("a"); b.cloud.add("a", "u2") }, 2},
		"forbidden": {func(b *bed) {
			b.cloud.mu.Lock()
			b.cloud.answer = func(*http.Request) int { return http.StatusForbidden }
			b.cloud.mu.Unlock()
		}, 16}, // for half a minute it might be one that has just started
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, Config{}, func(t *testing.T, b *bed) {
				b.cloud.add("a", "u1")
				b.cloud.add("b", "u3")
				synctest.Wait()
				b.cloud.cut()
				b.mustPatch("a", `{"phase":"Running"}`)
				c.meanwhile(b)
				b.cloud.heal()
				pass(2 * keepTaken)
				b.depth(0, 0)
				if got := b.cloud.writes(); len(got) != c.writes {
					t.Errorf("writes %q", got)
				}
				if pod := b.cloud.pod("a"); pod != nil && pod.Status.Phase == corev1.PodRunning {
					t.Error("another pod got the status")
				}
				if name != "deleted" && b.seen("a").Status.Phase == corev1.PodRunning {
					t.Error("the overlay was left")
				}
				if n := b.overlays(); n != 0 {
					t.Errorf("%d overlays left", n)
				}
			})
		})
	}
}

func TestDeliveryIsRepeated(t *testing.T) {
	for name, answer := range map[string]func(n int) int{
		"500": func(n int) int { return []int{500, 500, 0}[min(n, 2)] },
		"429": func(n int) int { return []int{429, 0}[min(n, 1)] },
		"409": func(n int) int { return []int{409, 0}[min(n, 1)] }, // written to by others
		"401": func(n int) int { return []int{401, 401, 0}[min(n, 2)] },
		"403": func(n int) int { return []int{403, 403, 0}[min(n, 2)] }, // from one that has just started
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, Config{}, func(t *testing.T, b *bed) {
				b.cloud.add("a", "u1")
				b.cloud.add("b", "u2")
				synctest.Wait()
				b.cloud.cut()
				b.mustPatch("a", `{"phase":"Running"}`)
				b.mustPatch("b", `{"phase":"Running"}`)
				n := -1
				b.cloud.mu.Lock()
				b.cloud.answer = func(r *http.Request) int {
					if !strings.Contains(r.URL.Path, "/a/status") {
						return 0
					}
					n++
					return answer(n)
				}
				b.cloud.mu.Unlock()
				b.cloud.heal()
				pass(time.Minute)
				b.depth(0, 0)
				for _, name := range []string{"a", "b"} {
					if p := b.cloud.pod(name).Status.Phase; p != corev1.PodRunning {
						t.Errorf("%s is %s", name, p)
					}
				}
			})
		})
	}
}

func TestOneRefusalDoesNotHoldUpTheRest(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		b.cloud.add("b", "u2")
		synctest.Wait()
		b.cloud.cut()
		b.mustPatch("a", `{"phase":"Running"}`)
		b.mustPatch("b", `{"phase":"Running"}`)
		b.event("e")
		b.cloud.mu.Lock()
		b.cloud.answer = func(r *http.Request) int {
			if strings.Contains(r.URL.Path, "/a/status") {
				return http.StatusInternalServerError // a webhook that fails on this pod
			}
			return 0
		}
		b.cloud.mu.Unlock()
		b.cloud.heal()
		pass(time.Minute)
		b.depth(1, 0)
	})
}

func (b *bed) event(name string) {
	b.t.Helper()
	text := fmt.Sprintf(`{"metadata":{"name":%q,"namespace":"ns"},"reason":"Test","count":1}`, name)
	if _, err := b.journal.AddEvent(b.t.Context(), "/api/v1/namespaces/ns/events", "ns", []byte(text)); err != nil {
		b.t.Fatal(err)
	}
}

func TestEventsAreKeptInOrderAndBounded(t *testing.T) {
	inBubble(t, Config{MaxEvents: 5}, func(t *testing.T, b *bed) {
		b.cloud.cut()
		for i := range 8 {
			b.event(fmt.Sprint(i))
		}
		b.depth(0, 5)
		b.crash()
		b.depth(0, 5)
		b.event("8")
		b.depth(0, 5)
		if n := b.journal.Stats().Displaced; n != 1 {
			t.Errorf("%d events made place", n)
		}
		out, err := b.journal.PatchEvent(t.Context(), "/api/v1/namespaces/ns/events", "6", types.StrategicMergePatchType, []byte(`{"count":2}`))
		if err != nil || !strings.Contains(string(out), `"count":2`) {
			t.Errorf("patched: %s, %v", out, err)
		}
		_, err = b.journal.PatchEvent(t.Context(), "/api/v1/namespaces/ns/events", "1", types.StrategicMergePatchType, []byte(`{"count":2}`))
		if !apierrors.IsNotFound(err) {
			t.Errorf("patch of a dropped event: %v", err)
		}
		_, err = b.journal.AddEvent(t.Context(), "/api/v1/namespaces/ns/events", "ns", []byte(`{"metadata":{"name":"8"}}`))
		if !apierrors.IsAlreadyExists(err) {
			t.Errorf("the same event again: %v", err)
		}
		b.cloud.heal()
		pass(time.Minute)
		b.depth(0, 0)
		if b.journal.eventBytes != 0 {
			t.Errorf("%d bytes of no events", b.journal.eventBytes)
		}
		if s := b.journal.Stats(); s.Displaced != 0 || s.Dropped != 1 {
			t.Errorf("%+v after all is delivered", s)
		}
		if got := b.cloud.writes(); len(got) != 5 {
			t.Errorf("writes %q", got)
		}
		for _, name := range []string{"4", "5", "6", "7", "8"} {
			if e := b.cloud.events[name]; e == nil || (name == "6") != (e["count"] == 2.0) {
				t.Errorf("event %s: %v", name, e)
			}
		}
		if m := b.cloud.events["4"]["metadata"].(map[string]any); m["uid"] != nil || m["creationTimestamp"] != nil {
			t.Errorf("sent with what the cloud sets: %v", m)
		}
	})
}

// TestReturnIsSpread: statuses go to the cloud at once when the link is back,
// events within the spread. While it stays up all go at once.
func TestReturnIsSpread(t *testing.T) {
	inBubble(t, Config{Spread: 10 * time.Second}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		pass(3 * time.Second) // the replica has stored it
		soon := 0
		for i := range 20 {
			b.cloud.cut()
			b.mustPatch("a", fmt.Sprintf(`{"message":"%d"}`, i))
			b.event(fmt.Sprint("cut", i))
			pass(time.Minute)
			b.cloud.heal()
			pass(time.Second)
			if s := b.journal.Stats(); s.Status != 0 {
				t.Errorf("statuses wait: %+v", s)
			} else if s.Events == 0 {
				soon++
			}
			pass(9 * time.Second)
			b.depth(0, 0)
			b.event(fmt.Sprint("up", i))
			pass(0)
			b.depth(0, 0)
		}
		if soon > 10 {
			t.Errorf("%d of 20 returns were not spread", soon)
		}
	})
}

// TestSpreadEnds: a link that comes and goes does not put events off for ever.
func TestSpreadEnds(t *testing.T) {
	inBubble(t, Config{Spread: 10 * time.Second}, func(t *testing.T, b *bed) {
		const down, up = 2 * returned, time.Millisecond
		for i := range 20 {
			b.cloud.cut()
			b.event(fmt.Sprint(i))
			pass(down)
			b.cloud.heal()
			pass(up)
			if n := b.journal.Stats().Events; n > 2 {
				t.Fatalf("return %d: %d events wait", i, n)
			}
		}
	})
}

func TestEventsAreBoundedInBytes(t *testing.T) {
	inBubble(t, Config{MaxEventBytes: 2000}, func(t *testing.T, b *bed) {
		b.cloud.cut()
		for i := range 50 {
			b.event(fmt.Sprint(i))
			if b.journal.eventBytes > 2000 {
				t.Fatalf("%d bytes", b.journal.eventBytes)
			}
		}
		if n := b.journal.Stats().Events; n < 5 {
			t.Errorf("%d events", n)
		}
	})
}

// The cloud took it and the answer was lost: it is sent again and does no
// harm; what was patched since arrives too.
func TestLostAnswers(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		synctest.Wait()
		b.cloud.cut()
		b.event("e")
		b.mustPatch("a", `{"phase":"Running"}`)
		b.cloud.mu.Lock()
		b.cloud.lose = true
		b.cloud.mu.Unlock()
		b.cloud.heal()
		pass(10 * time.Second)
		b.cloud.cut()
		b.depth(1, 1)
		b.crash()
		b.depth(1, 1)
		_, err := b.journal.PatchEvent(t.Context(), "/api/v1/namespaces/ns/events", "e", types.StrategicMergePatchType, []byte(`{"count":2}`))
		if err != nil {
			t.Fatal(err)
		}
		b.cloud.mu.Lock()
		b.cloud.lose = false
		b.cloud.events["e"] = map[string]any{"count": 1.0}
		b.cloud.mu.Unlock()
		b.cloud.heal()
		pass(time.Minute)
		b.depth(0, 0)
		if b.cloud.events["e"]["count"] != 2.0 || b.cloud.pod("a").Status.Phase != corev1.PodRunning {
			t.Errorf("%v, %v", b.cloud.events["e"], b.cloud.pod("a").Status)
		}
	})
}

// No acknowledgement without the disk.
func TestUnwrittenIsNotAcknowledged(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		synctest.Wait()
		b.cloud.cut()
		o := b.object("a")
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := b.journal.PatchStatus(ended, podsResource, types.StrategicMergePatchType, []byte(`{"status":{"phase":"Failed"}}`), o); err == nil {
			t.Error("acknowledged")
		}
		if _, err := b.journal.AddEvent(ended, "/api/v1/namespaces/ns/events", "ns", []byte(`{"metadata":{"name":"e"}}`)); err == nil {
			t.Error("acknowledged")
		}
		b.depth(0, 0)
		if p := b.seen("a").Status.Phase; p != corev1.PodPending {
			t.Errorf("shown as %s", p)
		}
	})
}

// An overlay of a pod that the replica no longer holds does not stay.
func TestTakenOverlaysAreForgotten(t *testing.T) {
	inBubble(t, Config{}, func(t *testing.T, b *bed) {
		b.cloud.add("a", "u1")
		b.cloud.add("b", "u2")
		synctest.Wait()
		j := b.journal
		j.mu.Lock()
		old := &statusEntry{Resource: "pods", Namespace: "ns", Name: "left", UID: "u9", version: 1 << 40, taken: time.Now()}
		j.status[old.target()] = old
		j.mu.Unlock()
		pass(2 * keepTaken)
		b.cloud.cut()
		b.mustPatch("a", `{"phase":"Running"}`)
		b.cloud.heal()
		pass(time.Minute)
		if n := b.overlays(); n != 0 {
			t.Errorf("%d overlays left", n)
		}
	})
}

func TestFields(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Status: corev1.PodStatus{Phase: "Running"}}
	data, err := pod.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	unknown := []byte{0xf2, 0x3f, 3, 'n', 'e', 'w'} // a field of a newer API
	data = append(data, unknown...)
	out := setStatus(data, getStatus(data))
	if !bytes.Contains(out, unknown) {
		t.Error("an unknown field was lost")
	}
	if got := new(corev1.Pod); got.Unmarshal(out) != nil || got.Name != "a" || got.Status.Phase != "Running" {
		t.Errorf("%+v", got)
	}
	if got := getStatus([]byte{0xff}); got != nil {
		t.Errorf("a field of garbage: %q", got)
	}
}

// pass moves the bubble's clock and lets everything come to rest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}
