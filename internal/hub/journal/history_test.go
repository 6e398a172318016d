package journal

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// TestRandomWrites leads lives of a kubelet that counts its writes, in a world
// of cuts, crashes of the hub and a cloud that deletes pods and makes new ones
// of the same names. What was acknowledged is in the cloud in the end, or its
// pod is gone; nothing comes back; and no watcher ever sees a pod's count fall.
func TestRandomWrites(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			inBubble(t, Config{}, func(t *testing.T, b *bed) {
				l := &life{
					bed: b, t: t, rand: rand.New(rand.NewPCG(seed, 1)), up: true,
					acked: map[string]int{}, uids: map[string]string{},
					watcher: watcher{counts: map[string]int{}, held: map[string]string{}},
				}
				l.live()
			})
		})
	}
}

type life struct {
	*bed

	t       *testing.T
	rand    *rand.Rand
	up      bool
	made    int               // pods
	writes  int               // the kubelet's count
	acked   map[string]int    // the newest acknowledged, by UID
	uids    map[string]string // of the cloud's pods, by name
	watcher watcher
}

func (l *life) live() {
	for range 3 {
		l.create(fmt.Sprint("p", l.made))
	}
	stop := l.watch()
	pass(3 * time.Second)
	for range 60 {
		name := fmt.Sprint("p", l.rand.IntN(3))
		switch n := l.rand.IntN(20); {
		case n < 10:
			l.write(name)
		case n < 13 && l.up:
			l.cloud.cut()
			l.up = false
		case n < 14 && !l.up:
			l.cloud.heal()
			l.up = true
		case n == 15 && l.uids[name] != "":
			l.cloud.remove(name)
			delete(l.uids, name)
		case n == 16 && l.uids[name] == "":
			l.create(name)
		case n == 17:
			stop()
			l.forget()
			l.crash()
			stop = l.watch()
		default:
			pass(time.Duration(l.rand.IntN(3000)) * time.Millisecond)
		}
	}
	if !l.up {
		l.cloud.heal()
	}
	pass(3 * keepTaken)
	l.depth(0, 0)
	if n := l.overlays(); n != 0 {
		l.t.Errorf("%d overlays are left", n)
	}
	l.cloud.mu.Lock()
	pods := len(l.cloud.pods)
	l.cloud.mu.Unlock()
	if pods != len(l.uids) {
		l.t.Errorf("the cloud has %d pods, want %d", pods, len(l.uids))
	}
	for name, uid := range l.uids {
		pod := l.cloud.pod(name)
		if string(pod.UID) != uid || count(pod) != l.acked[uid] {
			l.t.Errorf("the cloud has %s of %s at %d, want %s at %d", name, pod.UID, count(pod), uid, l.acked[uid])
		}
		if seen := count(l.seen(name)); seen != l.acked[uid] {
			l.t.Errorf("the node has %s at %d, want %d", name, seen, l.acked[uid])
		}
	}
	stop()
	l.watcher.mu.Lock()
	defer l.watcher.mu.Unlock()
	if fmt.Sprint(l.watcher.held) != fmt.Sprint(l.uids) {
		l.t.Errorf("a watcher holds %v, want %v", l.watcher.held, l.uids)
	}
	for name, uid := range l.uids {
		if l.watcher.counts[uid] != l.acked[uid] {
			l.t.Errorf("a watcher has %s at %d, want %d", name, l.watcher.counts[uid], l.acked[uid])
		}
	}
	for _, wrong := range l.watcher.wrong {
		l.t.Error(wrong)
	}
}

// forget allows what is not promised: a hub that dies after the cloud has
// taken a status, and before the replica has it back, knows of it no more.
func (l *life) forget() {
	l.journal.mu.Lock()
	defer l.journal.mu.Unlock()
	l.watcher.mu.Lock()
	defer l.watcher.mu.Unlock()
	for _, e := range l.journal.status {
		if e.delivered() {
			l.watcher.counts[e.UID] = 0
		}
	}
}

func count(pod *corev1.Pod) int {
	n, _ := strconv.Atoi(pod.Status.Reason) // what was never written is at 0
	return n
}

func (l *life) create(name string) {
	l.made++
	uid := fmt.Sprint("u", l.made)
	l.cloud.add(name, uid)
	l.uids[name] = uid
}

// write is what the hub does with a kubelet's write: relayed while the link is
// up and nothing older waits, else journalled.
func (l *life) write(name string) {
	object, err := l.replica.Get(request.Info{Verb: "get", IsResource: true, Resource: podsResource, Namespace: "ns", Name: name}, 0)
	if err != nil {
		return // it is gone, or the replica has yet to hear of it
	}
	pod := &corev1.Pod{}
	if err := pod.Unmarshal(object.Data); err != nil {
		l.t.Fatal(err)
	}
	l.writes++
	patch := fmt.Sprintf(`{"metadata":{"uid":%q},"status":{"reason":"%d"}}`, pod.UID, l.writes)
	if l.up && !l.journal.Pending(podsResource, "ns", name) {
		r := httptest.NewRequest(http.MethodPatch, "/api/v1/namespaces/ns/pods/"+name+"/status", strings.NewReader(patch))
		resp, err := l.cloud.RoundTrip(r)
		if err != nil || resp.StatusCode != http.StatusOK {
			return
		}
	} else if _, err := l.journal.PatchStatus(l.t.Context(), podsResource, types.StrategicMergePatchType, []byte(patch), object); err != nil {
		if !apierrors.IsConflict(err) {
			l.t.Errorf("write: %v", err)
		}
		return
	}
	l.acked[string(pod.UID)] = l.writes
}

// watcher is a client that watches all pods, and goes on after a restart of
// the hub where it was.
type watcher struct {
	mu      sync.Mutex // guards the following
	version uint64
	counts  map[string]int    // by UID
	held    map[string]string // UIDs by name
	wrong   []string
}

// pipe is an answer that is read while it is written.
type pipe struct{ *io.PipeWriter }

func (pipe) Header() http.Header { return http.Header{} }
func (pipe) WriteHeader(int)     {}
func (pipe) Flush()              {}

// watch returns the function that ends it.
func (l *life) watch() (stop func()) {
	ctx, cancel := context.WithCancel(l.t.Context())
	reader, writer := io.Pipe()
	var running sync.WaitGroup
	running.Go(func() {
		defer writer.Close()
		for ctx.Err() == nil {
			l.watcher.mu.Lock()
			options := &internalversion.ListOptions{Watch: true, AllowWatchBookmarks: true}
			if l.watcher.version > 0 {
				options.ResourceVersion = strconv.FormatUint(l.watcher.version, 10)
			}
			l.watcher.mu.Unlock()
			if slice, ok := l.replica.Held(allPods); ok {
				r := httptest.NewRequest(http.MethodGet, "/api/v1/pods?watch=true", nil).WithContext(ctx)
				info := request.Info{Verb: "watch", IsResource: true, Resource: podsResource, Options: options}
				_ = slice.Watch(pipe{writer}, r, info, []request.Format{{Encoding: wire.JSON}}) // it is asked again
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
	running.Go(func() {
		lines := bufio.NewScanner(reader)
		for lines.Scan() {
			l.watcher.take(lines.Bytes())
		}
	})
	return sync.OnceFunc(func() {
		synctest.Wait() // it has taken what there is
		cancel()
		running.Wait()
	})
}

func (w *watcher) take(line []byte) {
	var event struct {
		Type   string
		Object corev1.Pod
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	bad := func(format string, args ...any) { w.wrong = append(w.wrong, fmt.Sprintf(format, args...)) }
	if err := json.Unmarshal(line, &event); err != nil {
		bad("event %q: %v", line, err)
		return
	}
	pod := &event.Object
	version, _ := strconv.ParseUint(pod.ResourceVersion, 10, 64)
	uid := string(pod.UID)
	local := event.Type == "MODIFIED" && w.held[pod.Name] == uid // an overlay has no version of its own
	if version < w.version && !local {
		bad("%s of %s at %d after %d", event.Type, pod.Name, version, w.version)
	}
	w.version = max(w.version, version)
	switch event.Type {
	case "BOOKMARK":
		return
	case "ADDED", "MODIFIED":
		if old, there := w.held[pod.Name]; there == (event.Type == "ADDED") || (there && old != uid) {
			bad("%s of %s, %s, but %q is held", event.Type, pod.Name, uid, old)
		}
		w.held[pod.Name] = uid
	case "DELETED":
		if w.held[pod.Name] != uid {
			bad("DELETED of %s, %s, but %q is held", pod.Name, uid, w.held[pod.Name])
		}
		delete(w.held, pod.Name)
		return
	default:
		bad("event %s", line)
		return
	}
	if n := count(pod); n < w.counts[uid] {
		bad("%s falls from %d to %d", pod.Name, w.counts[uid], n)
	} else {
		w.counts[uid] = n
	}
}
