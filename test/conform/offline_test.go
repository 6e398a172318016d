package conform

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/yurt-edge/yurt/test/bed"
)

// cut cuts the link and returns once the hub knows. The link is healed, and
// the hub knows it, when the test is over.
func cut(t *testing.T, link *bed.Link, edge *side, mode bed.Mode) {
	t.Helper()
	if err := link.Cut(mode); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { heal(t, link, edge) })
	mustAwait(t, func(ctx context.Context) error { return linkIs(ctx, edge, http.StatusServiceUnavailable) })
}

func heal(t *testing.T, link *bed.Link, edge *side) {
	t.Helper()
	if err := link.Heal(); err != nil {
		t.Fatal(err)
	}
	// The test's own context has ended when this is its cleanup.
	err := await(context.WithoutCancel(t.Context()), func(ctx context.Context) error { return linkIs(ctx, edge, http.StatusOK) })
	if err != nil {
		t.Fatal(err)
	}
}

// linkIs asks for something that is always the cloud's to say.
func linkIs(ctx context.Context, edge *side, want int) error {
	a, err := edge.ask(ctx, question{path: "/readyz"})
	if err == nil && a.code != want {
		err = fmt.Errorf("/readyz: %d %s", a.code, a.body)
	}
	return err
}

// ages are cells that grow while a test cuts the link.
var ages = regexp.MustCompile(`"(?:\d+[dhms])+"`)

func (a answer) timeless() answer {
	if !a.inProto() {
		a.body = ages.ReplaceAll(a.body, []byte(`"AGE"`))
	}
	return a
}

// old reports whether the answer says that it may be old.
func (a answer) old() bool {
	return strings.Contains(a.header.Get("Warning"), "the cloud cannot be reached")
}

// TestOffline compares what the hub says while the link is cut with what the
// API server said just before.
func TestOffline(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]bed.Mode{"down": bed.Down, "blackhole": bed.Blackhole} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hub, link := calm.hub(t, "edge-"+name)
			server, edge := calm.sides(t, hub, "reader")
			// For each question offline, one with the same answer online.
			online := map[question]question{}
			add := func(q, as question) { online[q] = as }
			for _, k := range kinds {
				if k.name == "events" {
					continue // no scope is made for them
				}
				warm(t, edge, k.collection)
				forms := []string{"json", "table", "kubectl", "metadatalist", "client-go", "weighted", "protobuf"}
				if k.custom {
					forms = []string{"json", "metadatalist", "client-go", "weighted"} // its columns are the cloud's
				}
				for _, form := range forms {
					for _, version := range []string{"", "resourceVersion=0"} {
						add(question{k.collection, version, accepts[form]}, question{k.collection, "resourceVersion=0", accepts[form]})
						one, accept := k.collection+"/"+k.object, accepts[form]
						if form == "metadatalist" {
							accept = accepts["metadata"]
						}
						add(question{one, version, accept}, question{one, "resourceVersion=0", accept})
					}
				}
				for _, sel := range selectors(k) {
					as := question{k.collection, join("resourceVersion=0", sel), inJSON}
					if a := server.mustAsk(t, as); a.code != http.StatusOK {
						continue
					}
					for _, version := range []string{"", "resourceVersion=0"} {
						add(question{k.collection, join(version, sel), inJSON}, as)
					}
					watch := question{k.collection, join("watch=true&timeoutSeconds=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true", sel), inJSON}
					if sel == "" {
						add(watch, watch)
					}
				}
				for _, version := range []string{"", "resourceVersion=0"} {
					add(question{k.collection + "/nobody", version, inJSON}, question{k.collection + "/nobody", "resourceVersion=0", inJSON})
				}
			}
			// Asked of the hub as well, so that it knows the caller and has
			// the scopes.
			many(t, server, edge, slices.Compact(slices.Collect(maps.Values(online))), nil)
			var (
				mu     sync.Mutex // guards checks
				checks = map[question]answer{}
			)
			qs := slices.Collect(maps.Keys(online))
			many(t, server, edge, qs, func(ctx context.Context, q question) error {
				a, err := server.ask(ctx, online[q])
				mu.Lock()
				defer mu.Unlock()
				checks[q] = a
				return err
			})
			cut(t, link, edge, mode)
			many(t, server, edge, qs, func(ctx context.Context, q question) error {
				began := time.Now()
				got, err := edge.ask(ctx, q)
				if err != nil {
					return err
				}
				if took := time.Since(began); took > 5*time.Second {
					return fmt.Errorf("took %s", took)
				}
				if err := differ(checks[q].timeless(), got.timeless()); err != nil {
					return err
				}
				latest := !strings.Contains(q.query, "resourceVersion=0") && !strings.Contains(q.query, "watch")
				if got.code == http.StatusOK && got.old() != latest {
					return fmt.Errorf("warning is %q", got.header.Get("Warning"))
				}
				return nil
			})
			offlineErrors(t, edge)
		})
	}
}

// offlineErrors asks what the replica cannot answer and expects to be told so
// in the API's terms, at once.
func offlineErrors(t *testing.T, edge *side) {
	t.Helper()
	pods := kinds[0].collection
	at, err := edge.mustAsk(t, question{pods, "resourceVersion=0", inJSON}).listVersion()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, query string
		code        int
		reason      string
	}{
		{pods, fmt.Sprintf("resourceVersion=%d&resourceVersionMatch=Exact", at), 200, ""},
		{pods, fmt.Sprintf("resourceVersion=%d&resourceVersionMatch=NotOlderThan&limit=1", at), 200, ""},
		{pods, "resourceVersion=1&resourceVersionMatch=NotOlderThan", 200, ""},
		{pods, "limit=1", 200, ""},
		{pods, "resourceVersion=1&resourceVersionMatch=Exact", 410, "Expired"},
		{pods, "resourceVersion=1&limit=1", 410, "Expired"},
		{pods, "continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MSwic3RhcnQiOiJ4In0", 410, "Expired"},
		{pods, "resourceVersion=99999999&resourceVersionMatch=NotOlderThan", 504, "Timeout"},
		{pods, "resourceVersion=99999999", 504, "Timeout"},
		{pods, "resourceVersion=99999999&resourceVersionMatch=Exact", 504, "Timeout"},
		{pods + "/web-1", "resourceVersion=99999999", 504, "Timeout"},
		{pods, "watch=true&timeoutSeconds=5&resourceVersion=99999999&sendInitialEvents=true&resourceVersionMatch=NotOlderThan", 504, "Timeout"},
		{pods, "watch=true&sendInitialEvents=true", 422, "Invalid"},
		{pods, "resourceVersionMatch=Exact", 422, "Invalid"},
		{pods, "labelSelector=%28%28", 400, "BadRequest"},
		{pods, "fieldSelector=spec.nonsense%3D1", 503, "ServiceUnavailable"},
		{"/api/v1/namespaces/conform-a/events", "", 503, "ServiceUnavailable"},
		{"/apis/batch/v1/jobs", "", 503, "ServiceUnavailable"},
		{"/apis/batch/v1/jobs", "resourceVersion=0", 503, "ServiceUnavailable"},
		{"/apis/batch/v1/jobs", "watch=true", 503, "ServiceUnavailable"},
		{"/apis/batch/v1/namespaces/conform-a/jobs/x", "", 503, "ServiceUnavailable"},
		{pods + "/web-1/log", "", 503, "ServiceUnavailable"},
		{"/livez", "", 503, "ServiceUnavailable"},
	} {
		q := question{c.path, c.query, inJSON}
		began := time.Now()
		a := edge.mustAsk(t, q)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%s took %s", q, took)
		}
		if a.code != c.code {
			t.Errorf("%s: %d, want %d: %.300s", q, a.code, c.code, a.body)
			continue
		}
		if c.code == http.StatusOK {
			continue
		}
		s, err := a.status()
		if err != nil || string(s.Reason) != c.reason {
			t.Errorf("%s: reason %q (%v), want %s", q, s.Reason, err, c.reason)
		}
		// Of a 503 only while the cut is fresh.
		if retry := a.header.Get("Retry-After"); (retry != "") != (c.code == 504) && c.code != 503 {
			t.Errorf("%s: Retry-After %q", q, retry)
		}
		if c.code == 504 && (s.Details == nil || len(s.Details.Causes) == 0 || s.Details.Causes[0].Type != "ResourceVersionTooLarge") {
			t.Errorf("%s: clients know by the cause that the version is too large: %+v", q, s)
		}
	}
	// A watch that is told to list again is told so in the watch.
	a := edge.mustAsk(t, question{pods, "watch=true&timeoutSeconds=5&resourceVersion=1", inJSON})
	if a.code != http.StatusOK || !bytes.Contains(a.body, []byte(`"reason":"Expired"`)) || !bytes.Contains(a.body, []byte(`"code":410`)) {
		t.Errorf("watch from version 1: %d %s", a.code, a.body)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
		path := "/api/v1/namespaces/conform-a/configmaps"
		if method != http.MethodPost {
			path += "/settings"
		}
		req, err := http.NewRequestWithContext(t.Context(), method, edge.base+path, strings.NewReader(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"settings"}}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := edge.http.Do(req)
		if err != nil {
			t.Error(errors.Join(errors.New(method), err))
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%s: %s", method, resp.Status)
		}
	}
}
