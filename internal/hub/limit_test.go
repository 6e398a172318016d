package hub

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/request"
)

func TestLanes(t *testing.T) {
	t.Parallel()
	l := newLanes()
	fill := func(who string, watch, node bool) (leaves []func()) {
		for {
			leave, full := l.enter(who, watch, node)
			if leave == nil {
				if full == "" {
					t.Fatal("refused without a reason")
				}
				return leaves
			}
			leaves = append(leaves, leave)
		}
	}
	var all []func()
	for watch, most := range map[bool][2]int{false: {maxRequests, maxTotalRequests}, true: {maxWatches, maxTotalWatches}} {
		for i := 0; i < most[1]/most[0]; i++ {
			got := fill(fmt.Sprintf("pod-%d", i), watch, false)
			if len(got) != most[0] {
				t.Fatalf("a caller has %d in flight, watches %t, want %d", len(got), watch, most[0])
			}
			all = append(all, got...)
		}
		if leave, _ := l.enter("late", watch, false); leave != nil {
			t.Errorf("one more was let in, watches %t", watch)
		}
	}
	requests := fill("node", false, true)
	watches := fill("node", true, true)
	if len(requests) != maxRequests || len(watches) != maxWatches {
		t.Errorf("the node has %d requests and %d watches", len(requests), len(watches))
	}
	for _, leave := range append(append(all, requests...), watches...) {
		leave()
	}
	if len(l.busy) != 0 || l.others != (lane{}) {
		t.Errorf("%d callers, %d in flight, and all have left", len(l.busy), l.others)
	}
}

func TestPodsOfOneAccountHaveLanesOfTheirOwn(t *testing.T) {
	t.Parallel()
	pod := func(uid string) *identity.Caller {
		return &identity.Caller{Name: "system:serviceaccount:a:default", Extra: map[string][]string{
			"authentication.kubernetes.io/pod-uid": {uid},
		}}
	}
	if laneOf(pod("1")) == laneOf(pod("2")) {
		t.Error("two pods share a lane")
	}
}

// staged is a hub's pipeline from resolve on, in front of a handler.
func staged(t *testing.T, h *Hub, caller *identity.Caller, handler http.HandlerFunc) http.Handler {
	t.Helper()
	h.log, h.metrics = slog.New(slog.DiscardHandler), newHubMetrics(prometheus.NewRegistry())
	h.self = &identity.Caller{Name: "system:node:edge-1"}
	h.lanes = newLanes()
	if h.memory == nil {
		h.memory = newCeiling()
	}
	inner := h.resolve(h.limit(t.Context())(handler))
	return h.survive(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r.WithContext(withCaller(r.Context(), caller)))
	}))
}

var (
	somePod    = &identity.Caller{Name: "system:serviceaccount:a:b"}
	theKubelet = &identity.Caller{Name: "system:node:edge-1", Groups: []string{"system:nodes"}, Certificate: true}
)

func TestWhatARequestMayBe(t *testing.T) {
	t.Parallel()
	read := func(w http.ResponseWriter, r *http.Request) {
		if _, err := readBody(r); err != nil {
			w.WriteHeader(int(statusCode(err)))
		}
	}
	pipeline := staged(t, &Hub{}, somePod, read)
	const pods = "/api/v1/namespaces/a/pods"
	for _, tc := range []struct {
		method, path string
		body         int
		want         int
	}{
		{http.MethodPost, pods, maxBody, 200},
		{http.MethodPost, pods, maxBody + 1, http.StatusRequestEntityTooLarge},
		{http.MethodPatch, pods + "/x/status", maxBody + 1, http.StatusRequestEntityTooLarge},
		{http.MethodPost, "/apis/authorization.k8s.io/v1/subjectaccessreviews", maxBody + 1, http.StatusRequestEntityTooLarge},
		{http.MethodPost, "/anything", maxBody + 1, http.StatusRequestEntityTooLarge},
		// What flows through to a pod is for the pod to bound.
		{http.MethodPost, pods + "/x/proxy/upload", maxBody + 1, 200},
		{http.MethodGet, pods + "?labelSelector=" + strings.Repeat("a", maxURL), 0, http.StatusRequestURITooLong},
		{http.MethodGet, pods + "?labelSelector=a", 0, 200},
	} {
		for _, sized := range []bool{true, false} {
			var body io.Reader = strings.NewReader(strings.Repeat("x", tc.body))
			if !sized {
				body = struct{ io.Reader }{body}
			}
			w := httptest.NewRecorder()
			pipeline.ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, body))
			if w.Code != tc.want {
				t.Errorf("%s %.60s with %d bytes, length stated %t: %d, want %d", tc.method, tc.path, tc.body, sized, w.Code, tc.want)
			}
		}
	}
}

func TestTooManyRequestsAreToldWhenToComeBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		h := &Hub{}
		wait := func(http.ResponseWriter, *http.Request) { <-release }
		pipeline := staged(t, h, somePod, wait)
		ask := func() *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			pipeline.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/api/v1/pods", nil))
			return w
		}
		for range maxRequests {
			go ask()
		}
		synctest.Wait()
		if w := ask(); w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") == "" {
			t.Errorf("%d %v", w.Code, w.Header())
		}
		if n := testutil.ToFloat64(h.metrics.refused.WithLabelValues("limit")); n != 1 {
			t.Errorf("%v refusals are counted", n)
		}
		close(release)
		synctest.Wait()
		if w := ask(); w.Code != 200 {
			t.Errorf("after all have left: %d", w.Code)
		}
	})
}

func TestShortOfMemoryNewListsWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		used := uint64(0)
		h := &Hub{memory: &ceiling{limit: 100, read: func() uint64 { return used }}}
		ok := func(http.ResponseWriter, *http.Request) {}
		pod := staged(t, h, somePod, ok)
		ask := func(pipeline http.Handler, path string) int {
			w := httptest.NewRecorder()
			pipeline.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			if w.Code == http.StatusTooManyRequests && w.Header().Get("Retry-After") == "" {
				t.Error("not told when to come back")
			}
			return w.Code
		}
		const list, watch, get = "/api/v1/pods", "/api/v1/pods?watch=true", "/api/v1/namespaces/a/pods/b"
		for _, want := range []struct {
			used       uint64
			list, many int
		}{{79, 200, 200}, {81, 429, 429}, {50, 200, 200}} {
			used = want.used
			pass(memoryCheckEvery)
			if l, w := ask(pod, list), ask(pod, watch); l != want.list || w != want.many {
				t.Errorf("with %d of 100 in use: list %d, watch %d", used, l, w)
			}
			if code := ask(pod, get); code != 200 {
				t.Errorf("with %d of 100 in use: get %d", used, code)
			}
		}
		used = 99
		pass(memoryCheckEvery)
		kubelet := staged(t, h, theKubelet, ok)
		if code := ask(kubelet, list); code != 200 {
			t.Errorf("the kubelet's list: %d", code)
		}
	})
}

func TestAPanicCostsOneRequest(t *testing.T) {
	t.Parallel()
	h := &Hub{}
	s := httptest.NewServer(staged(t, h, somePod, func(w http.ResponseWriter, r *http.Request) {
		switch request.From(r.Context()).Path {
		case "/early":
			panic("a bug")
		case "/late":
			_, _ = io.WriteString(w, "half an")
			_ = http.NewResponseController(w).Flush() // else the client asks again
			panic("a bug")
		}
		_, _ = io.WriteString(w, "fine")
	}))
	defer s.Close()
	get := func(path string) (int, string, error) {
		resp, err := s.Client().Get(s.URL + path)
		if err != nil {
			return 0, "", err
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text), err
	}
	if code, text, err := get("/early"); code != 500 || err != nil || !strings.Contains(text, `"kind":"Status"`) {
		t.Errorf("before the answer began: %d %q %v", code, text, err)
	}
	if code, text, err := get("/late"); err == nil {
		t.Errorf("half an answer looks whole: %d %q", code, text)
	}
	if code, text, err := get("/"); code != 200 || text != "fine" || err != nil {
		t.Errorf("the next request: %d %q %v", code, text, err)
	}
	if n := testutil.ToFloat64(h.metrics.panics); n != 2 {
		t.Errorf("%v panics are counted", n)
	}
	s.Client().CloseIdleConnections()
}

func TestComplicatedSelectorsAreTheCloudsBusiness(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]bool{
		"labelSelector=app%3Dx&fieldSelector=metadata.name%3Dy":                  false,
		"labelSelector=" + strings.TrimSuffix(labelled(maxRequirements), ","):    false,
		"labelSelector=" + strings.TrimSuffix(labelled(maxRequirements+1), ","):  true,
		"labelSelector=app+in+(" + strings.Repeat("a,", maxSelector/2) + "b)":    false, // one value
		"labelSelector=app+in+(" + strings.TrimSuffix(labelled(1000), ",") + ")": true,
		"fieldSelector=metadata.name%3D" + strings.Repeat("x", maxSelector):      true,
	} {
		info, err := request.Resolve(httptest.NewRequest(http.MethodGet, "/api/v1/pods?"+query, nil))
		if err != nil {
			t.Fatal(err)
		}
		if got := complicated(info); got != want {
			t.Errorf("%.80s: %t", query, got)
		}
	}
}

func labelled(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "label-%d,", i)
	}
	return b.String()
}

func statusCode(err error) int32 {
	w := httptest.NewRecorder()
	(&Hub{metrics: newHubMetrics(prometheus.NewRegistry())}).refuse(w, httptest.NewRequest(http.MethodGet, "/", nil), "test", err)
	return int32(w.Code)
}
