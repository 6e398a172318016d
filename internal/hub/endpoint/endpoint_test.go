package endpoint

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func containsText(data []byte, text string) bool { return bytes.Contains(data, []byte(text)) }

// world is the little that a tracker sees: a replica of one slice and some
// pods and services, and a link.
type world struct {
	t       *testing.T
	tracker *Tracker
	online  atomic.Bool
	pending atomic.Bool
	changed atomic.Pointer[chan struct{}]

	mu      sync.Mutex // guards the following
	objects map[schema.GroupVersionResource]map[string][]byte
	reads   int      // of slices
	shown   []string // what watchers of the slice saw, one line each
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, objects: map[schema.GroupVersionResource]map[string][]byte{}}
	w.changed.Store(new(make(chan struct{})))
	w.online.Store(true)
	w.tracker = New(Config{
		Node: "edge-1", Online: w.online.Load, Changed: func() <-chan struct{} { return *w.changed.Load() },
		Pending: w.pending.Load, Each: w.each, Refresh: w.refresh,
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	w.pod("a", "10.0.0.1", true)
	w.pod("b", "10.0.0.2", true)
	w.cloud(made("a", "edge-1", "10.0.0.1", true, true, false), made("b", "edge-1", "10.0.0.2", true, true, false), made("c", "edge-2", "10.0.0.3", true, true, false))
	return w
}

func (w *world) each(r schema.GroupVersionResource, namespace string, fn func(string, replica.Kind, []byte) error) error {
	w.mu.Lock()
	held := maps.Clone(w.objects[r])
	w.mu.Unlock()
	for key, data := range held {
		if r == resources[0] {
			w.reads++
		}
		if ns, _ := replica.SplitKey(key); namespace == "" || ns == namespace {
			if err := fn(key, replica.Kind{Encoding: wire.Protobuf}, data); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *world) put(r schema.GroupVersionResource, object interface{ Marshal() ([]byte, error) }, key string) []byte {
	data, err := object.Marshal()
	if err != nil {
		w.t.Error(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.objects[r] == nil {
		w.objects[r] = map[string][]byte{}
	}
	w.objects[r][key] = data
	return data
}

func podObject(name, uid, ip string, ready bool) *corev1.Pod {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(uid)},
		Spec:       corev1.PodSpec{NodeName: "edge-1"},
		Status:     corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: ip}}, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: status}}},
	}
}

// pod puts a pod into the replica.
func (w *world) pod(name, ip string, ready bool) {
	w.put(schema.GroupVersionResource{Version: "v1", Resource: "pods"}, podObject(name, "u-"+name, ip, ready), "ns/"+name)
}

// wrote is a status write of the kubelet.
func (w *world) wrote(name, uid, ip string, ready bool) {
	data, err := podObject(name, uid, ip, ready).Marshal()
	if err != nil {
		w.t.Error(err)
	}
	w.tracker.Wrote(wire.Protobuf, data)
}

// cloud puts a new state of the slice into the replica.
func (w *world) cloud(endpoints ...discoveryv1.Endpoint) {
	w.put(resources[0], slice(discoveryv1.AddressTypeIPv4, endpoints...), "ns/web-1")
	w.see(true)
}

func (w *world) refresh(schema.GroupVersionResource, string, string) error {
	w.see(false)
	return nil
}

// see notes what a watcher gets: of a new object always something, of a
// refreshed one what changed.
func (w *world) see(fresh bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	data := w.objects[resources[0]]["ns/web-1"]
	if shown, ok := w.tracker.Overlay(resources[0], "ns/web-1", replica.Kind{Encoding: wire.Protobuf}, data); ok {
		data = shown
	}
	s := &discoveryv1.EndpointSlice{}
	if err := s.Unmarshal(data); err != nil {
		w.t.Error(err)
	}
	var line []string
	for _, e := range s.Endpoints {
		if !*e.Conditions.Ready {
			e.Addresses[0] += "!"
		}
		line = append(line, e.Addresses[0])
	}
	now := strings.Join(line, " ")
	if n := len(w.shown); fresh || n == 0 || w.shown[n-1] != now {
		w.shown = append(w.shown, now)
	}
}

func (w *world) link(up bool) {
	w.online.Store(up)
	close(*w.changed.Swap(new(make(chan struct{}))))
	synctest.Wait()
}

func (w *world) want(lines ...string) {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Equal(w.shown, lines) {
		w.t.Errorf("watchers saw\n%s\nwant\n%s", strings.Join(w.shown, "\n"), strings.Join(lines, "\n"))
	}
	w.shown = w.shown[len(w.shown)-1:]
}

func inBubble(t *testing.T, test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = w.tracker.Run(ctx) }() // ends with ctx
		synctest.Wait()
		test(w)
	})
}

func TestOnlineCostsNothing(t *testing.T) {
	inBubble(t, func(w *world) {
		if w.tracker.Active() || w.reads != 0 {
			t.Errorf("active %v, %d slices read", w.tracker.Active(), w.reads)
		}
	})
}

// TestEndpointsFollow is an outage in which one pod gets a new address and the
// other loses its readiness, and the cloud's way back to the truth.
func TestEndpointsFollow(t *testing.T) {
	inBubble(t, func(w *world) {
		w.want("10.0.0.1 10.0.0.2 10.0.0.3")
		w.link(false)
		w.want("10.0.0.1 10.0.0.2 10.0.0.3")
		w.pending.Store(true)
		w.wrote("a", "u-a", "10.0.0.9", true)
		w.wrote("b", "u-b", "10.0.0.2", false)
		w.wrote("b", "u-b", "10.0.0.2", false) // something else of its status: no event
		w.want("10.0.0.1 10.0.0.2 10.0.0.3", "10.0.0.9 10.0.0.2 10.0.0.3", "10.0.0.9 10.0.0.2! 10.0.0.3")
		if w.reads != 1 {
			w.t.Errorf("slices were read %d times", w.reads)
		}
		w.link(true)
		// What the cloud has done meanwhile: it takes the pods for not ready,
		// and knows more of other nodes.
		w.cloud(made("a", "edge-1", "10.0.0.1", false, false, false), made("b", "edge-1", "10.0.0.2", false, false, false), made("c", "edge-2", "10.0.0.3", false, false, false))
		w.pending.Store(false)
		pass(20 * time.Second)
		w.cloud(made("a", "edge-1", "10.0.0.9", true, true, false), made("b", "edge-1", "10.0.0.2", false, false, false), made("c", "edge-2", "10.0.0.3", true, true, false))
		pass(20 * time.Second)
		w.want("10.0.0.9 10.0.0.2! 10.0.0.3", "10.0.0.9 10.0.0.2! 10.0.0.3!", "10.0.0.9 10.0.0.2! 10.0.0.3")
		if w.tracker.Active() {
			t.Error("still active")
		}
		w.cloud(made("a", "edge-1", "10.0.0.9", false, false, false))
		w.want("10.0.0.9 10.0.0.2! 10.0.0.3", "10.0.0.9!")
	})
}

// TestSilentNodesPodsStay holds pods of which nothing changed: the cloud took
// them for not ready because the node was silent, and the kubelet puts that
// right some seconds after the link is back.
func TestSilentNodesPodsStay(t *testing.T) {
	inBubble(t, func(w *world) {
		w.link(false)
		w.link(true)
		w.cloud(made("a", "edge-1", "10.0.0.1", false, false, false), made("b", "edge-1", "10.0.0.2", false, false, false))
		pass(10 * time.Second)
		w.wrote("a", "u-a", "10.0.0.1", true)
		w.cloud(made("a", "edge-1", "10.0.0.1", true, true, false), made("b", "edge-1", "10.0.0.2", false, false, false))
		// Of b the kubelet says something else than before.
		w.wrote("b", "u-b", "10.0.0.2", false)
		pass(30 * time.Second)
		w.want("10.0.0.1 10.0.0.2 10.0.0.3", "10.0.0.1 10.0.0.2", "10.0.0.1 10.0.0.2", "10.0.0.1 10.0.0.2!")
		if w.tracker.Active() {
			t.Error("still active")
		}
	})
}

// TestLateCloudIsBelieved bounds the overlay: the cloud shows something else
// and does not come round.
func TestLateCloudIsBelieved(t *testing.T) {
	for name, c := range map[string]struct {
		pending bool
		least   time.Duration
	}{"delivered": {false, lag}, "undelivered": {true, most}} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(w *world) {
				w.link(false)
				w.wrote("a", "u-a", "10.0.0.9", true)
				w.pending.Store(c.pending)
				w.link(true)
				pass(c.least - time.Second)
				w.want("10.0.0.1 10.0.0.2 10.0.0.3", "10.0.0.9 10.0.0.2 10.0.0.3")
				pass(30 * time.Second)
				w.want("10.0.0.9 10.0.0.2 10.0.0.3", "10.0.0.1 10.0.0.2 10.0.0.3")
			})
		})
	}
}

// TestFlappingLink keeps what the kubelet said, and reads nothing twice.
func TestFlappingLink(t *testing.T) {
	inBubble(t, func(w *world) {
		w.link(false)
		w.wrote("a", "u-a", "10.0.0.9", true)
		w.pod("a", "10.0.0.9", true)
		for range 10 {
			w.link(true)
			pass(5 * time.Second)
			w.link(false)
			pass(5 * time.Second)
		}
		w.want("10.0.0.1 10.0.0.2 10.0.0.3", "10.0.0.9 10.0.0.2 10.0.0.3")
		if w.reads != 1 {
			w.t.Errorf("slices were read %d times", w.reads)
		}
	})
}

// says is the word of other nodes' hubs on the pod c.
func (w *world) says(node, uid, ip string, ready bool) {
	pods := map[string]Pod{"ns/c": {UID: uid, Addresses: []string{ip}, Ready: ready}}
	w.tracker.Hear(map[string]Word{node: {pods, time.Now()}})
}

// TestPeersPodsFollow is an outage of two nodes. What the hub of the other one
// says of its pod is seen, through the cloud's return, which takes the pod for
// not ready; until the cloud shows the same, or the other is silent.
func TestPeersPodsFollow(t *testing.T) {
	const own = "10.0.0.1 10.0.0.2 "
	back := func(w *world) {
		w.want(own + "10.0.0.3")
		w.says("edge-2", "u-c", "10.0.0.7", true) // the cloud is there: its word counts
		w.link(false)
		w.says("edge-2", "u-c", "10.0.0.3", true)
		w.says("edge-2", "u-c", "10.0.0.3", false)
		w.says("edge-2", "u-c", "10.0.0.8", true)
		w.want(own+"10.0.0.3", own+"10.0.0.3!", own+"10.0.0.8")
		w.link(true)
		w.cloud(made("a", "edge-1", "10.0.0.1", false, false, false), made("b", "edge-1", "10.0.0.2", false, false, false), made("c", "edge-2", "10.0.0.3", false, false, false))
		w.want(own+"10.0.0.8", own+"10.0.0.8")
	}
	right := func(w *world) {
		w.cloud(made("a", "edge-1", "10.0.0.1", true, true, false), made("b", "edge-1", "10.0.0.2", true, true, false), made("c", "edge-2", "10.0.0.8", true, true, false))
	}
	t.Run("the cloud comes round", func(t *testing.T) {
		inBubble(t, func(w *world) {
			back(w)
			for range 4 {
				pass(5 * time.Second)
				w.says("edge-2", "u-c", "10.0.0.8", true)
			}
			right(w)
			pass(20 * time.Second)
			w.want(own+"10.0.0.8", own+"10.0.0.8")
			if w.tracker.Active() {
				t.Error("still active")
			}
		})
	})
	t.Run("the other dies", func(t *testing.T) {
		inBubble(t, func(w *world) {
			back(w)
			pass(Good + time.Second)
			w.tracker.Hear(nil)
			w.want(own+"10.0.0.8", own+"10.0.0.3!")
		})
	})
	t.Run("it comes by way of a third", func(t *testing.T) {
		inBubble(t, func(w *world) {
			back(w)
			pass(Good - time.Second)
			pods := map[string]Pod{"ns/c": {UID: "u-c", Addresses: []string{"10.0.0.8"}, Ready: true}}
			w.tracker.Hear(map[string]Word{"edge-2": {pods, time.Now().Add(2*time.Second - Good)}})
			w.want(own + "10.0.0.8")
			pass(3 * time.Second)
			w.tracker.Hear(nil)
			w.want(own+"10.0.0.8", own+"10.0.0.3!")
		})
	})
	t.Run("the other believes the cloud", func(t *testing.T) {
		inBubble(t, func(w *world) {
			back(w)
			w.tracker.Hear(map[string]Word{"edge-2": {At: time.Now()}})
			w.want(own+"10.0.0.8", own+"10.0.0.3!")
		})
	})
	t.Run("the cloud does not come round", func(t *testing.T) {
		inBubble(t, func(w *world) {
			back(w)
			for range (lag + 30*time.Second) / (5 * time.Second) {
				w.says("edge-2", "u-c", "10.0.0.8", true)
				pass(5 * time.Second)
			}
			w.want(own+"10.0.0.8", "10.0.0.1! 10.0.0.2! 10.0.0.3!")
			if w.tracker.Active() {
				t.Error("still active")
			}
		})
	})
}

// TestPeersSpeakForTheirPods: of a pod only the word of its own node counts.
func TestPeersSpeakForTheirPods(t *testing.T) {
	inBubble(t, func(w *world) {
		w.link(false)
		w.says("edge-2", "another", "10.0.0.9", true)
		w.says("edge-3", "u-c", "10.0.0.9", true)
		theirs := map[string]Pod{"ns/a": {UID: "u-a", Addresses: []string{"10.0.0.9"}, Ready: true}}
		w.tracker.Hear(map[string]Word{"edge-1": {theirs, time.Now()}, "edge-2": {theirs, time.Now()}})
		w.want("10.0.0.1 10.0.0.2 10.0.0.3")
	})
}

// TestOwnIsWhatEndpointsMention: others are told of no other pods, and of none
// while the cloud is there.
func TestOwnIsWhatEndpointsMention(t *testing.T) {
	inBubble(t, func(w *world) {
		w.pod("unseen", "10.0.0.5", true)
		if own := w.tracker.Own(); len(own) > 0 {
			t.Errorf("online: %v", own)
		}
		w.link(false)
		w.wrote("a", "u-a", "10.0.0.9", false)
		w.wrote("unseen", "u-unseen", "10.0.0.5", true)
		want := map[string]Pod{
			"ns/a": {UID: "u-a", Addresses: []string{"10.0.0.9"}}, "ns/b": {UID: "u-b", Addresses: []string{"10.0.0.2"}, Ready: true},
		}
		if own := w.tracker.Own(); !reflect.DeepEqual(own, want) {
			t.Errorf("got %v, want %v", own, want)
		}
	})
}

// TestOthersAreLeftAlone are endpoints that only look like those of the node's
// pods.
func TestOthersAreLeftAlone(t *testing.T) {
	inBubble(t, func(w *world) {
		w.link(false)
		w.wrote("a", "u-a", "10.0.0.9", true)
		same := func(what string, change func(s *discoveryv1.EndpointSlice)) {
			s := slice(discoveryv1.AddressTypeIPv4, made("a", "edge-1", "10.0.0.1", true, true, false))
			change(s)
			data, err := s.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := w.tracker.Overlay(resources[0], "ns/x", replica.Kind{Encoding: wire.Protobuf}, data); ok {
				t.Errorf("%s: edited", what)
			}
		}
		same("another pod of that name", func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].TargetRef.UID = "other" })
		same("another node", func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].NodeName = new("edge-10") })
		same("no node", func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].NodeName = nil })
		same("no pod", func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].TargetRef.Kind = "Node" })
		same("another namespace", func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].TargetRef.Namespace = "other" })
		same("made by hand", func(s *discoveryv1.EndpointSlice) { delete(s.Labels, discoveryv1.LabelManagedBy) })
		same("made by another controller", func(s *discoveryv1.EndpointSlice) { s.Labels[discoveryv1.LabelManagedBy] = "multus" })
		s := slice(discoveryv1.AddressTypeIPv4, made("a", "edge-1", "10.0.0.1", true, true, false))
		s.Endpoints[0].TargetRef.UID = ""
		data, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := w.tracker.Overlay(resources[0], "ns/x", replica.Kind{Encoding: wire.Protobuf}, data); !ok {
			t.Error("a reference without a UID is not followed")
		}
	})
}

// TestPublishedServices read the Service: its endpoints alone do not tell while
// all of them are ready.
func TestPublishedServices(t *testing.T) {
	inBubble(t, func(w *world) {
		w.put(servicesResource, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"}, Spec: corev1.ServiceSpec{PublishNotReadyAddresses: true},
		}, "ns/web")
		w.link(false)
		w.wrote("a", "u-a", "10.0.0.9", false)
		w.want("10.0.0.1 10.0.0.2 10.0.0.3", "10.0.0.9 10.0.0.2 10.0.0.3")
	})
}

// pass lets time go by, in a bubble.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func BenchmarkOverlay(b *testing.B) {
	w := newWorld(&testing.T{})
	w.online.Store(false)
	w.tracker.Hold()
	var foreign []discoveryv1.Endpoint
	for range 50 {
		foreign = append(foreign, made("c", "edge-2", "10.0.0.3", true, true, false))
	}
	own := append(slices.Clone(foreign[:49]), made("a", "edge-1", "10.0.0.1", true, true, false))
	for name, endpoints := range map[string][]discoveryv1.Endpoint{"foreign": foreign, "own": own} {
		data, err := slice(discoveryv1.AddressTypeIPv4, endpoints...).Marshal()
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				w.tracker.Overlay(resources[0], "ns/web-1", replica.Kind{Encoding: wire.Protobuf}, data)
			}
		})
	}
}
