package hub

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/yurt-edge/yurt/internal/hub/identity"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// remembering runs a test with answers on an empty store, in a bubble.
func remembering(t *testing.T, test func(t *testing.T, a *answers)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s, err := store.Open(t.Context(), store.Config{Path: t.TempDir() + "/store", Key: bytes.Repeat([]byte{7}, 32)})
		if err != nil {
			t.Fatal(err)
		}
		a := newAnswers(s, nil, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = a.run(ctx)
		}()
		defer func() {
			cancel()
			<-done
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}()
		test(t, a)
	})
}

// say has the cloud answer, and waits until that is on disk.
func say(a *answers, bucket, key string, code int, contentType, body string) {
	resp := &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {contentType}}}
	if done := a.keep(bucket, key)(resp); done != nil {
		done([]byte(body))
	}
	pass(time.Second)
	synctest.Wait()
}

func at(t *testing.T, target string) *url.URL {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestDocumentsVaryByForm(t *testing.T) {
	const aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
	remembering(t, func(t *testing.T, a *answers) {
		key := documentKey(at(t, "/apis?timeout=32s"))
		say(a, documentBucket, key, 200, "application/json", "plain")
		say(a, documentBucket, key, 200, aggregated, "aggregated")
		say(a, documentBucket, "/apis/apps/v1", 200, "application/json", "another path")
		say(a, documentBucket, key, 500, "application/json", "trouble")
		for accept, want := range map[string]string{
			"application/json": "plain", "": "plain", "*/*": "plain", "application/*": "plain",
			aggregated + ",application/json": "aggregated",
			"application/yaml," + aggregated: "aggregated",
			"application/yaml":               "",
		} {
			got, err := a.document(at(t, "/apis"), http.Header{"Accept": {accept}})
			if (err != nil) != (want == "") || string(got.Body) != want {
				t.Errorf("%q: %q, %v", accept, got.Body, err)
			}
		}
		if _, err := a.document(at(t, "/api"), http.Header{}); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("never seen: %v", err)
		}
	})
}

func TestDocumentKeys(t *testing.T) {
	for target, want := range map[string]string{
		"/api?timeout=32s": "/api", "/openapi/v3?x=1&y=2": "/openapi/v3",
		"/openapi/v3/apis/apps/v1?hash=AB%26&timeout=1s": "/openapi/v3/apis/apps/v1?hash=AB%26",
	} {
		if got := documentKey(at(t, target)); got != want {
			t.Errorf("%s: %s", target, got)
		}
	}
}

func TestPackedAnswersAreUnpacked(t *testing.T) {
	remembering(t, func(t *testing.T, a *answers) {
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		_, _ = io.WriteString(w, "text")
		_ = w.Close()
		a.remember(documentBucket, "/a", "gzip", answer{ContentType: "text/plain"}, packed.Bytes())
		a.remember(documentBucket, "/b", "br", answer{ContentType: "text/plain"}, packed.Bytes())
		a.remember(documentBucket, "/c", "gzip", answer{ContentType: "text/plain"}, []byte("not packed"))
		synctest.Wait()
		pass(time.Second)
		for path, ok := range map[string]bool{"/a": true, "/b": false, "/c": false} {
			if got, err := a.document(at(t, path), http.Header{}); (err == nil) != ok || (ok && string(got.Body) != "text") {
				t.Errorf("%s: %q, %v", path, got.Body, err)
			}
		}
	})
}

const lease = `{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"l","resourceVersion":"%d"}}`

func TestObjectsAreForOneIdentity(t *testing.T) {
	remembering(t, func(t *testing.T, a *answers) {
		r := httptest.NewRequest(http.MethodGet, "/apis/coordination.k8s.io/v1/namespaces/ns/leases/l?timeout=5s", nil)
		info, err := request.Resolve(r)
		if err != nil {
			t.Fatal(err)
		}
		alice := &identity.Caller{Name: "alice", UID: "1", Groups: []string{"a", "b"}}
		say(a, objectBucket, objectKey(alice, info), 200, "application/json", fmt.Sprintf(lease, 5))
		got, err := a.object(alice, info)
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range []*identity.Caller{
			{Name: "bob", UID: "1", Groups: alice.Groups},
			{Name: "alice", UID: "2", Groups: alice.Groups},
			{Name: "alice", UID: "1", Groups: []string{"a"}},
		} {
			if _, err := a.object(other, info); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("%v gets it too: %v", other, err)
			}
		}
		for enc, contentType := range map[wire.Encoding]string{
			wire.JSON: "application/json", wire.Protobuf: "application/vnd.kubernetes.protobuf",
		} {
			w := httptest.NewRecorder()
			if err := got.writeObject(w, []request.Format{{View: request.Table}, {Encoding: enc}}); err != nil {
				t.Fatal(err)
			}
			if w.Header().Get("Content-Type") != contentType {
				t.Errorf("asked for %s: %s", enc, w.Header().Get("Content-Type"))
			}
			apiVersion, kind, data, err := wire.ReadObject(enc, w.Body.Bytes())
			if err != nil || kind != "Lease" {
				t.Errorf("%s %s, %v", apiVersion, kind, err)
			}
			if m, err := wire.ReadMeta(enc, data, false); err != nil || m.Version != 5 {
				t.Errorf("%+v, %v", m, err)
			}
		}
		if err := got.writeObject(httptest.NewRecorder(), []request.Format{{View: request.Table}}); err == nil {
			t.Error("a table was made of it")
		}
	})
}

func TestOnlyWholeObjectsAreRemembered(t *testing.T) {
	remembering(t, func(t *testing.T, a *answers) {
		for i, body := range []string{
			`{"kind":"Table","apiVersion":"meta.k8s.io/v1","rows":[]}`,
			`{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{}}`,
			`<html>log in</html>`, ``,
		} {
			key := fmt.Sprint(i)
			say(a, objectBucket, key, 200, "application/json", body)
			if _, err := a.load(objectBucket, key); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("%q is remembered: %v", body, err)
			}
		}
	})
}

func TestAnObjectThatIsGoneIsForgotten(t *testing.T) {
	remembering(t, func(t *testing.T, a *answers) {
		say(a, objectBucket, "k", 200, "application/json", fmt.Sprintf(lease, 5))
		say(a, objectBucket, "k", 404, "application/json", "")
		if _, err := a.load(objectBucket, "k"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("still there: %v", err)
		}
		say(a, objectBucket, "k", 200, "application/json", fmt.Sprintf(lease, 5))
		if _, err := a.load(objectBucket, "k"); err != nil {
			t.Errorf("back again: %v", err)
		}
	})
}

// A pod that polls an object that always changes writes once a minute.
func TestPollingDoesNotWearTheFlash(t *testing.T) {
	remembering(t, func(t *testing.T, a *answers) {
		for i := range 600 {
			say(a, objectBucket, "k", 200, "application/json", fmt.Sprintf(lease, i+1))
		}
		if n := a.store.Stats().Commits; n > 15 {
			t.Errorf("%d commits in ten minutes", n)
		}
		got, err := a.load(objectBucket, "k")
		if err != nil || time.Since(got.At) > 2*rewriteEvery {
			t.Errorf("remembered %s ago, %v", time.Since(got.At), err)
		}
		before := a.store.Stats().Commits
		for range 600 {
			say(a, documentBucket, "/api", 200, "application/json", "the same")
		}
		if n := a.store.Stats().Commits - before; n != 1 {
			t.Errorf("the same answer was written %d times", n)
		}
	})
}

func TestOldAnswersGoFirst(t *testing.T) {
	remembering(t, func(t *testing.T, a *answers) {
		big := strings.Repeat("x", maxAnswer/2)
		var newest string
		for i := range 2 * maxRememberedBytes / len(big) {
			newest = fmt.Sprintf("/openapi/v3/%d", i)
			say(a, documentBucket, newest, 200, "application/json", fmt.Sprint(i)+big)
		}
		say(a, documentBucket, "/api", 200, "application/json", "small")
		snap, err := a.store.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		defer snap.Close()
		total, first := 0, false
		err = snap.Scan(documentBucket, "", func(key string, h store.Header) error {
			total += h.Size
			first = first || strings.HasPrefix(key, "/openapi/v3/0 ")
			return nil
		})
		if err != nil || total > maxRememberedBytes*3/2 || first {
			t.Errorf("%d bytes, the oldest is there: %v, %v", total, first, err)
		}
		if _, err := a.document(at(t, newest), http.Header{}); err != nil {
			t.Errorf("the newest: %v", err)
		}
	})
}

func TestPrefetch(t *testing.T) {
	remembering(t, func(t *testing.T, a *answers) {
		asked := 0
		cloud := roundTripper(func(r *http.Request) (*http.Response, error) {
			asked++
			return &http.Response{
				StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {r.Header.Get("Accept")}}, Body: io.NopCloser(strings.NewReader(r.URL.Path)),
			}, nil
		})
		for range 3 {
			if err := a.prefetch(t.Context(), cloud); err != nil {
				t.Fatal(err)
			}
			pass(time.Minute)
		}
		if asked != len(discovery) {
			t.Errorf("asked %d times", asked)
		}
		pass(prefetchEvery)
		if err := a.prefetch(t.Context(), cloud); err != nil || asked != 2*len(discovery) {
			t.Errorf("a day later asked %d times, %v", asked, err)
		}
		for _, d := range discovery {
			if got, err := a.document(at(t, d.path), http.Header{"Accept": {d.accept}}); err != nil || string(got.Body) != d.path {
				t.Errorf("%s: %q, %v", d.path, got.Body, err)
			}
		}
	})
}

// TestWhoGetsMuchPushesOutItsOwn keeps the kubelet's answer, the oldest of all,
// while a pod's fill the room.
func TestWhoGetsMuchPushesOutItsOwn(t *testing.T) {
	t.Parallel()
	remembering(t, func(t *testing.T, a *answers) {
		object := func(name string) string {
			return fmt.Sprintf(`{"kind":"Pod","apiVersion":"v1","metadata":{"name":%q},"x":%q}`, name, strings.Repeat("x", 1<<20))
		}
		say(a, objectBucket, "kubelet /api/v1/x", http.StatusOK, "application/json", object("x"))
		pass(time.Second)
		for i := range 2 * maxRememberedBytes >> 20 {
			say(a, objectBucket, fmt.Sprintf("pod /api/v1/%d", i), http.StatusOK, "application/json", object("y"))
		}
		if _, err := a.load(objectBucket, "kubelet /api/v1/x"); err != nil {
			t.Error(err)
		}
		if _, err := a.load(objectBucket, "pod /api/v1/0"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("the flood is kept whole: %v", err)
		}
	})
}

// TestAnswersWaitForTheDiskWithinABound has a disk that writes nothing.
func TestAnswersWaitForTheDiskWithinABound(t *testing.T) {
	t.Parallel()
	s, err := store.Open(t.Context(), store.Config{Path: t.TempDir() + "/store", Key: bytes.Repeat([]byte{7}, 32)})
	if err != nil {
		t.Fatal(err)
	}
	a := newAnswers(s, nil, slog.New(slog.DiscardHandler)) // and no run
	var bomb bytes.Buffer
	packer := gzip.NewWriter(&bomb)
	_, _ = packer.Write(make([]byte, 2*maxAnswer))
	_ = packer.Close()
	big := strings.Repeat("x", 3<<20)
	for i := range 50 {
		known := answer{ContentType: "application/json"}
		a.remember(documentBucket, fmt.Sprintf("/bomb/%d", i), "gzip", known, bomb.Bytes())
		a.remember(documentBucket, fmt.Sprintf("/apis/%d", i), "", known, []byte(big))
	}
	waiting := 0
	for len(a.queue) > 0 {
		waiting += len((<-a.queue).answer.Body)
	}
	if waiting == 0 || waiting > maxQueued {
		t.Errorf("%d bytes wait, may be %d", waiting, maxQueued)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (rt roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return rt(r) }

// pass moves the bubble's clock and lets everything come to rest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}
