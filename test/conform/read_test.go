package conform

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// kind is a resource that both sides are asked about.
type kind struct {
	name       string // of the subtest
	collection string // in the namespace conform-a, where there are namespaces
	everywhere string // across namespaces; "" where that never stands still
	object     string // one that exists
	custom     bool
	field      string // a field selector of the kind's own
}

var kinds = []kind{
	{name: "pods", collection: "/api/v1/namespaces/conform-a/pods", everywhere: "/api/v1/pods", object: "web-1", field: "spec.nodeName=edge-1"},
	{name: "configmaps", collection: "/api/v1/namespaces/conform-a/configmaps", everywhere: "/api/v1/configmaps", object: "settings"},
	{name: "secrets", collection: "/api/v1/namespaces/conform-a/secrets", everywhere: "/api/v1/secrets", object: "password", field: "type=Opaque"},
	{name: "services", collection: "/api/v1/namespaces/conform-a/services", everywhere: "/api/v1/services", object: "web", field: "spec.clusterIP=None"},
	{name: "endpointslices", collection: "/apis/discovery.k8s.io/v1/namespaces/conform-a/endpointslices", everywhere: "/apis/discovery.k8s.io/v1/endpointslices", object: "headless-1"},
	{name: "nodes", collection: "/api/v1/nodes", object: "edge-1", field: "spec.unschedulable=false"},
	{name: "namespaces", collection: "/api/v1/namespaces", object: "conform-a", field: "status.phase=Active"},
	{name: "gadgets", collection: "/apis/conform.example.com/v1/namespaces/conform-a/gadgets", everywhere: "/apis/conform.example.com/v1/gadgets", object: "lamp", custom: true, field: "spec.color=red"},
	{name: "leases", collection: "/apis/coordination.k8s.io/v1/namespaces/conform-a/leases", object: "leader"},
	{name: "events", collection: "/api/v1/namespaces/conform-a/events", object: "web-1.1", field: "reason=Pulled"},
}

// accepts are the forms in which kubectl, client-go and others ask.
var accepts = map[string]string{
	"json":             inJSON,
	"protobuf":         inProto,
	"default":          "",
	"wildcard":         "*/*",
	"client-go":        inProto + "," + inJSON,
	"kubectl":          inJSON + asTable + "," + inJSON + ";as=Table;v=v1beta1;g=meta.k8s.io," + inJSON,
	"table":            inJSON + asTable,
	"table-protobuf":   inProto + asTable,
	"metadata":         inJSON + asMetadata,
	"metadata-proto":   inProto + asMetadata,
	"metadatalist":     inJSON + asMetaList,
	"metadatalist-p":   inProto + asMetaList,
	"metadatalist-inf": inProto + asMetaList + "," + inJSON + asMetaList + "," + inJSON,
	"weighted":         inProto + ";q=0.1," + inJSON + ";q=0.9",
	"unknown-first":    "text/html," + inJSON,
	"html":             "text/html",
	"cbor":             "application/cbor",
	"yaml":             "application/yaml",
	"bad-version":      inJSON + ";as=Table;v=v9;g=meta.k8s.io",
}

// fewAccepts are enough where the encoding is not the point.
var fewAccepts = []string{"json", "protobuf", "table", "metadatalist"}

// many asks all questions, some at a time, and reports what differs.
func many(t *testing.T, server, edge *side, questions []question, check func(ctx context.Context, q question) error) {
	t.Helper()
	var (
		wg    sync.WaitGroup
		slots = make(chan struct{}, 8)
	)
	if check == nil {
		check = func(ctx context.Context, q question) error { return same(ctx, server, edge, q) }
	}
	for _, q := range questions {
		if strings.Contains(q.path, "gadgets") && q.accept == inProto && refused(q) {
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			began := time.Now()
			if err := check(t.Context(), q); err != nil {
				t.Errorf("%s: %v", q, err)
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Logf("%s took %s", q, took)
			}
		})
	}
	wg.Wait()
}

// refused tells questions that have two things wrong with them when asked of
// a custom resource in protobuf, which it does not have. The API server looks
// at the form first, the hub at the rest.
func refused(q question) bool {
	return strings.Contains(q.path, "/nobody") || strings.Contains(q.query, "app+in+%28%28") ||
		strings.HasSuffix(q.query, "fieldSelector=metadata.name") || strings.Contains(q.query, "timeoutSeconds=x")
}

// warm makes the hub hold the resource, as an informer does.
func warm(t *testing.T, edge *side, path string) {
	t.Helper()
	a := edge.mustAsk(t, question{path: path, query: "resourceVersion=0", accept: inProto + "," + inJSON})
	if a.code != 200 {
		t.Fatalf("warm %s: %d %s", path, a.code, a.body)
	}
}

func selectors(k kind) []string {
	out := []string{
		"",
		"labelSelector=" + url.QueryEscape("app=web"),
		"labelSelector=" + url.QueryEscape("app in (web,job),tier"),
		"labelSelector=" + url.QueryEscape("app!=web"),
		"labelSelector=" + url.QueryEscape("app notin (web)"),
		"labelSelector=" + url.QueryEscape("!tier"),
		"labelSelector=" + url.QueryEscape("app=nobody"),
		"labelSelector=" + url.QueryEscape("app in (("),
		"fieldSelector=" + url.QueryEscape("metadata.name="+k.object),
		"fieldSelector=" + url.QueryEscape("metadata.name!="+k.object),
		"fieldSelector=" + url.QueryEscape("metadata.name=nobody"),
		"fieldSelector=" + url.QueryEscape("metadata.namespace=conform-a"),
		"fieldSelector=" + url.QueryEscape("metadata.name="+k.object+",metadata.namespace=conform-a"),
		"fieldSelector=" + url.QueryEscape("spec.nodeName=edge-1"),
		"fieldSelector=" + url.QueryEscape("spec.nodeName=edge-1") + "&labelSelector=app%3Dweb",
		"fieldSelector=" + url.QueryEscape("spec.nodeName=edge-1,status.phase!=Failed,status.phase!=Succeeded"), // kubectl describe node
		"fieldSelector=" + url.QueryEscape("status.phase=Running"),
		"fieldSelector=" + url.QueryEscape("spec.nonsense=1"),
		"fieldSelector=" + url.QueryEscape("metadata.name"),
	}
	if k.field != "" {
		out = append(out, "fieldSelector="+url.QueryEscape(k.field))
	}
	return out
}

func join(parts ...string) string {
	var out []string
	for _, p := range parts {
		if p != "" {
			out = append(out, p)
		}
	}
	return strings.Join(out, "&")
}

// TestListOnline compares lists while the link is whole: those without a
// resource version are the cloud's, resourceVersion=0 the replica's.
func TestListOnline(t *testing.T) {
	t.Parallel()
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			// Each has a hub of its own, as a hub begins no more than some
			// selections in a second.
			hub, _ := calm.hub(t, "edge-lists-"+k.name)
			server, edge := calm.sides(t, hub, "reader")
			paths := []string{k.collection}
			if k.everywhere != "" {
				paths = append(paths, k.everywhere)
				warm(t, edge, k.everywhere)
			}
			warm(t, edge, k.collection)
			var qs []question
			for _, path := range paths {
				for _, sel := range selectors(k) {
					for _, version := range []string{"", "resourceVersion=0"} {
						for _, form := range fewAccepts {
							qs = append(qs, question{path, join(version, sel), accepts[form]})
						}
					}
				}
			}
			for _, form := range accepts {
				for _, include := range []string{"", "includeObject=None", "includeObject=Metadata", "includeObject=Object", "includeObject=Nonsense"} {
					for _, version := range []string{"", "resourceVersion=0"} {
						qs = append(qs, question{k.collection, join(version, include), form})
					}
				}
			}
			qs = append(qs, question{k.collection, "resourceVersion=0&pretty=true", inJSON}, question{k.collection, "resourceVersion=0&pretty=1", inJSON + asTable})
			many(t, server, edge, qs, nil)
		})
	}
}

// TestListVersionsOnline compares what a resource version and its match mean.
func TestListVersionsOnline(t *testing.T) {
	t.Parallel()
	hub, _ := calm.hub(t, "edge-versions")
	server, edge := calm.sides(t, hub, "reader")
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel() // they wait more than they work
			warm(t, edge, k.collection)
			at, err := server.mustAsk(t, question{k.collection, "", inJSON}).listVersion()
			if err != nil {
				t.Fatal(err)
			}
			object := objectVersion(t, server, k)
			var qs []question
			for _, version := range []string{
				"", "0", object, fmt.Sprint(at), "1", "garbage", "-1", "1.5", "00", "18446744073709551616",
			} {
				for _, match := range []string{"", "Exact", "NotOlderThan", "Nonsense"} {
					for _, limit := range []string{"", "1", "500", "-1", "x"} {
						if (limit == "-1" || limit == "x") && version != "0" {
							continue
						}
						if version == fmt.Sprint(at) && (match == "NotOlderThan" || (match == "" && limit == "")) {
							continue // costs a second of waiting each: TestNotOlderThan has it
						}
						var q []string
						for name, value := range map[string]string{"resourceVersion": version, "resourceVersionMatch": match, "limit": limit} {
							if value != "" {
								q = append(q, name+"="+url.QueryEscape(value))
							}
						}
						qs = append(qs, question{k.collection, join(q...), inJSON})
					}
				}
			}
			for _, rest := range []string{
				"resourceVersion=" + fmt.Sprint(at), // waits for the replica, then asks the cloud
				"resourceVersion=" + fmt.Sprint(at) + "&resourceVersionMatch=NotOlderThan&labelSelector=app",
				"continue=garbage", "continue=garbage&resourceVersion=0", "continue=garbage&resourceVersion=" + fmt.Sprint(at),
				"sendInitialEvents=true", "resourceVersion=0&sendInitialEvents=false",
				"resourceVersion=0&timeoutSeconds=x", "resourceVersion=0&timeoutSeconds=10",
				"resourceVersion=0&allowWatchBookmarks=true", "resourceVersion=0&watch=false", "resourceVersion=0&watch=0",
				"resourceVersion=0&nonsense=1", "resourceVersion=0&resourceVersion=1",
			} {
				qs = append(qs, question{k.collection, rest, inJSON}, question{k.collection, rest, inProto})
			}
			if k.name == "pods" {
				// The API server thinks for three seconds about each.
				qs = append(qs,
					question{k.collection, "resourceVersion=99999999", inJSON},
					question{k.collection, "resourceVersion=99999999&resourceVersionMatch=NotOlderThan", inProto},
					question{k.collection, "resourceVersion=99999999&resourceVersionMatch=Exact", inJSON},
				)
			}
			many(t, server, edge, qs, nil)
		})
	}
}

func objectVersion(t *testing.T, server *side, k kind) string {
	t.Helper()
	m := bookmark.FindSubmatch(server.mustAsk(t, question{k.collection + "/" + k.object, "", inJSON}).body)
	if m == nil {
		t.Fatalf("%s %s has no version", k.name, k.object)
	}
	return digits.FindString(string(m[0]))
}

// TestPages follows continue tokens to the end on both sides.
func TestPages(t *testing.T) {
	t.Parallel()
	hub, _ := calm.hub(t, "edge-pages")
	server, edge := calm.sides(t, hub, "reader")
	for _, k := range kinds[:4] {
		path := k.everywhere
		warm(t, edge, path)
		for _, form := range fewAccepts {
			token := map[*side]string{}
			for page := 1; ; page++ {
				got := map[*side]answer{}
				for _, s := range []*side{server, edge} {
					query := url.Values{"limit": {"2"}}
					if page > 1 {
						query.Set("continue", token[s])
					}
					got[s] = s.mustAsk(t, question{path, query.Encode(), accepts[form]})
					var err error
					if token[s], err = got[s].continueToken(); err != nil {
						t.Fatal(err)
					}
				}
				if err := differ(got[server].timeless(), got[edge].timeless()); err != nil {
					t.Errorf("%s as %s, page %d: %v", path, form, page, err)
				}
				if (token[server] == "") != (token[edge] == "") {
					t.Fatalf("%s as %s, page %d: one side has ended", path, form, page)
				}
				if token[server] == "" {
					break
				}
			}
		}
	}
}

func (a answer) continueToken() (string, error) {
	if a.inProto() {
		_, raw, err := envelope(a.body)
		return string(field(field(raw, 1), 3)), err
	}
	m := token.Find(a.body)
	if m == nil {
		return "", nil
	}
	return strings.Trim(strings.TrimPrefix(string(m), `"continue":`), `"`), nil
}

// TestGetOnline compares gets of objects that exist and that do not.
func TestGetOnline(t *testing.T) {
	t.Parallel()
	hub, _ := calm.hub(t, "edge-gets")
	server, edge := calm.sides(t, hub, "reader")
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			warm(t, edge, k.collection)
			version := objectVersion(t, server, k)
			var qs []question
			for _, name := range []string{k.object, "nobody", "Not%20A%2FName"} {
				for _, query := range []string{
					"", "resourceVersion=0", "resourceVersion=" + version, "resourceVersion=1", "resourceVersion=garbage",
					"resourceVersion=0&pretty=true", "resourceVersion=0&includeObject=Object", "timeoutSeconds=1",
				} {
					for _, form := range accepts {
						qs = append(qs, question{k.collection + "/" + name, query, form})
					}
				}
			}
			if k.name == "pods" {
				qs = append(qs, question{k.collection + "/" + k.object, "resourceVersion=99999999", inJSON})
			}
			many(t, server, edge, qs, nil)
		})
	}
}

// TestPathsOnline compares requests that are odd in their path.
func TestPathsOnline(t *testing.T) {
	t.Parallel()
	hub, _ := calm.hub(t, "edge-paths")
	server, edge := calm.sides(t, hub, "reader")
	warm(t, edge, "/api/v1/configmaps")
	var qs []question
	for _, path := range []string{
		"/api/v1/nonsense", "/api/v1/namespaces/conform-a/nonsense", "/apis/nonsense.example.com/v1/things", "/api/v2/pods",
		"/api/v1/namespaces/nowhere/configmaps", "/api/v1/namespaces/nowhere/configmaps/x", "/api/v1/configmaps/x",
		"/api/v1/watch/nonsense", "/api/v1/namespaces/conform-a/pods/web-1/log", "/api/v1/namespaces/conform-a/pods/web-1/status",
		"/api/v1/namespaces/conform-a/pods/web-1/nonsense", "/api/v1/namespaces/conform-a/status", "/api/v1/nodes/edge-1/status",
		"/apis/apps/v1/namespaces/conform-a/deployments/x/scale", "/api/v1/namespaces/conform-a/", "/api/v1/namespaces/conform-a/configmaps/",
		"/api/v1/namespaces//configmaps", "/healthz", "/livez", "/readyz", "/metrics/nonsense", "/", "/nonsense",
		// A list of these has another order each time.
		"/api/v1/componentstatuses/scheduler", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/gadgets.conform.example.com",
	} {
		qs = append(qs, question{path, "", inJSON}, question{path, "", inProto})
		if path != "/api/v1/configmaps/x" { // the replica says 404 in other words
			qs = append(qs, question{path, "resourceVersion=0", inJSON}, question{path, "resourceVersion=0", inProto})
		}
	}
	many(t, server, edge, qs, nil)
}
