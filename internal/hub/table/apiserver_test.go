package table_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/internal/hub/table"
	"github.com/yurt-edge/yurt/internal/hub/wire"
	"github.com/yurt-edge/yurt/playground"
)

// resource is one that the real API server and we are asked for.
type resource struct {
	path, apiVersion, kind string
	custom                 bool
}

var resources = []resource{
	{path: "/api/v1/pods", apiVersion: "v1", kind: "Pod"},
	{path: "/api/v1/nodes", apiVersion: "v1", kind: "Node"},
	{path: "/api/v1/namespaces", apiVersion: "v1", kind: "Namespace"},
	{path: "/api/v1/services", apiVersion: "v1", kind: "Service"},
	{path: "/api/v1/endpoints", apiVersion: "v1", kind: "Endpoints"},
	{path: "/api/v1/configmaps", apiVersion: "v1", kind: "ConfigMap"},
	{path: "/api/v1/secrets", apiVersion: "v1", kind: "Secret"},
	{path: "/api/v1/serviceaccounts", apiVersion: "v1", kind: "ServiceAccount"},
	{path: "/api/v1/events", apiVersion: "v1", kind: "Event"},
	{path: "/api/v1/persistentvolumes", apiVersion: "v1", kind: "PersistentVolume"},
	{path: "/api/v1/persistentvolumeclaims", apiVersion: "v1", kind: "PersistentVolumeClaim"},
	{path: "/api/v1/limitranges", apiVersion: "v1", kind: "LimitRange"},
	{path: "/apis/discovery.k8s.io/v1/endpointslices", apiVersion: "discovery.k8s.io/v1", kind: "EndpointSlice"},
	{path: "/apis/coordination.k8s.io/v1/leases", apiVersion: "coordination.k8s.io/v1", kind: "Lease"},
	{path: "/apis/apps/v1/deployments", apiVersion: "apps/v1", kind: "Deployment"},
	{path: "/apis/apps/v1/replicasets", apiVersion: "apps/v1", kind: "ReplicaSet"},
	{path: "/apis/apps/v1/daemonsets", apiVersion: "apps/v1", kind: "DaemonSet"},
	{path: "/apis/apps/v1/statefulsets", apiVersion: "apps/v1", kind: "StatefulSet"},
	{path: "/apis/batch/v1/jobs", apiVersion: "batch/v1", kind: "Job"},
	{path: "/apis/batch/v1/cronjobs", apiVersion: "batch/v1", kind: "CronJob"},
	{path: "/apis/storage.k8s.io/v1/storageclasses", apiVersion: "storage.k8s.io/v1", kind: "StorageClass"},
	{path: "/apis/storage.k8s.io/v1/csidrivers", apiVersion: "storage.k8s.io/v1", kind: "CSIDriver"},
	{path: "/apis/storage.k8s.io/v1/csinodes", apiVersion: "storage.k8s.io/v1", kind: "CSINode"},
	{path: "/apis/node.k8s.io/v1/runtimeclasses", apiVersion: "node.k8s.io/v1", kind: "RuntimeClass"},
	{path: "/apis/networking.k8s.io/v1/ingresses", apiVersion: "networking.k8s.io/v1", kind: "Ingress"},
	{path: "/apis/networking.k8s.io/v1/networkpolicies", apiVersion: "networking.k8s.io/v1", kind: "NetworkPolicy"},
	{path: "/apis/scheduling.k8s.io/v1/priorityclasses", apiVersion: "scheduling.k8s.io/v1", kind: "PriorityClass"},
	{path: "/apis/rbac.authorization.k8s.io/v1/clusterroles", apiVersion: "rbac.authorization.k8s.io/v1", kind: "ClusterRole"},
	{path: "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", apiVersion: "apiextensions.k8s.io/v1", kind: "CustomResourceDefinition"},
	{path: "/apis/example.com/v1/plains", apiVersion: "example.com/v1", kind: "Plain", custom: true},
	{path: "/apis/example.com/v1/fancies", apiVersion: "example.com/v1", kind: "Fancy", custom: true},
}

const (
	asTable   = ";as=Table;v=v1;g=meta.k8s.io"
	asPartial = ";as=PartialObjectMetadata;v=v1;g=meta.k8s.io"
	asList    = ";as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
	inJSON    = "application/json"
	inProto   = "application/vnd.kubernetes.protobuf"
)

// server asks the real API server.
type server struct {
	base   string
	client *http.Client
}

func newServer(t *testing.T) *server {
	t.Helper()
	cp, err := playground.StartControlPlane(t.Context(), playground.ControlPlaneConfig{
		Dir:      t.TempDir(),
		Progress: playground.NewProgress(os.Stderr),
		// No quota or account controller runs: pods come as they are.
		APIServerFlags: []string{"--disable-admission-plugins=ServiceAccount,DefaultStorageClass"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cp.Stop)
	cfg := cp.RESTConfig()
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &server{base: cfg.Host, client: client}
}

func (s *server) open(ctx context.Context, path, accept string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", accept)
	return s.client.Do(req)
}

func (s *server) get(t *testing.T, path, accept string) []byte {
	t.Helper()
	resp, err := s.open(t.Context(), path, accept)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s: %s", path, resp.Status, body)
	}
	return body
}

// create posts an object and, if it has one, its status.
func (s *server) create(t *testing.T, path string, object map[string]any) {
	t.Helper()
	body := s.send(t, http.MethodPost, path, object)
	status, ok := object["status"]
	if !ok {
		return
	}
	var made map[string]any
	if err := json.Unmarshal(body, &made); err != nil {
		t.Fatal(err)
	}
	made["status"] = status
	name := made["metadata"].(map[string]any)["name"].(string)
	s.send(t, http.MethodPut, path+"/"+name+"/status", made)
}

func (s *server) send(t *testing.T, method, path string, object any) []byte {
	t.Helper()
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, s.base+path, bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", inJSON)
	resp, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode >= 300 {
		t.Fatalf("%s %s: %s: %s", method, path, resp.Status, body)
	}
	return body
}

// native is how the replica keeps a resource.
func (r resource) native() (wire.Encoding, string) {
	if r.custom {
		return wire.JSON, inJSON
	}
	return wire.Protobuf, inProto
}

// ages are the only cells that tick. A test second may pass between the two
// tables, so both sides lose them.
var ages = regexp.MustCompile(`"\d+s"|\(\d+s ago\)|"\d+m(\d+s)?"`)

func equal(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	cut := func(b []byte) []byte { return b[max(0, at-100):min(len(b), at+100)] }
	t.Errorf("%s differs at byte %d of %d:\n got %q\nwant %q", what, at, len(want), cut(got), cut(want))
}

func equalTable(t *testing.T, what string, got, want []byte) {
	t.Helper()
	equal(t, what, ages.ReplaceAll(got, []byte(`"AGE"`)), ages.ReplaceAll(want, []byte(`"AGE"`)))
}

func TestAnswersEqualTheAPIServers(t *testing.T) {
	s := newServer(t)
	fill(t, s)
	compareStatus(t, s)
	for _, r := range resources {
		t.Run(r.kind, func(t *testing.T) {
			list := compareLists(t, s, r)
			if len(list.Items) == 0 {
				t.Fatalf("no %s to compare", r.kind)
			}
			for _, item := range list.Items {
				compareObject(t, s, r, item)
			}
			compareEmptyTable(t, s, r)
			compareWatches(t, s, r)
		})
	}
}

// TestBookmarksEqualTheAPIServers covers every resource that can be watched.
func TestBookmarksEqualTheAPIServers(t *testing.T) {
	s := newServer(t)
	client, err := discovery.NewDiscoveryClientForConfigAndClient(&rest.Config{Host: s.base}, s.client)
	if err != nil {
		t.Fatal(err)
	}
	_, groups, err := client.ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, group := range groups {
		prefix := "/apis/"
		if group.GroupVersion == "v1" {
			prefix = "/api/"
		}
		for _, info := range group.APIResources {
			if !slices.Contains(info.Verbs, "watch") || !wire.Known(group.GroupVersion, info.Kind) {
				continue
			}
			seen++
			r := resource{path: prefix + group.GroupVersion + "/" + info.Name, apiVersion: group.GroupVersion, kind: info.Kind}
			for enc, accept := range map[wire.Encoding]string{wire.Protobuf: inProto, wire.JSON: inJSON} {
				_, events := s.watch(t, r, enc, accept)
				want := events[len(events)-1]
				version, end, err := wire.ReadBookmark(enc, want.Object)
				if err != nil || !end {
					t.Fatal(end, err)
				}
				equal(t, r.kind+" bookmark", wire.Bookmark(enc, r.apiVersion, r.kind, version, end), want.Object)
			}
		}
	}
	if seen < 40 {
		t.Errorf("only %d resources can be watched", seen)
	}
}

// compareLists writes the lists of a resource from the native one.
func compareLists(t *testing.T, s *server, r resource) wire.List {
	enc, accept := r.native()
	body := s.get(t, r.path, accept)
	list, err := wire.ReadList(enc, body)
	if err != nil {
		t.Fatal(err)
	}
	h := wire.ListHeader{APIVersion: list.APIVersion, Kind: list.Kind, Version: list.Version, Continue: list.Continue, Remaining: list.Remaining}
	equal(t, "native list", writeList(enc, h, list.Items), body)

	if !r.custom {
		var items [][]byte
		for _, item := range list.Items {
			text, err := wire.ToJSON(nil, r.apiVersion, r.kind, item, false)
			if err != nil {
				t.Fatal(err)
			}
			items = append(items, text)
		}
		equal(t, "JSON list", writeList(wire.JSON, h, items), s.get(t, r.path, inJSON))
	}

	partial := wire.ListHeader{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadataList", Version: list.Version, Continue: list.Continue, Remaining: list.Remaining}
	var protos, texts [][]byte
	for _, item := range list.Items {
		p, err := wire.PartialMetadataOf(enc, r.apiVersion, r.kind, item)
		if err != nil {
			t.Fatal(err)
		}
		proto, text := p, p
		if r.custom {
			proto, err = wire.FromJSON("meta.k8s.io/v1", "PartialObjectMetadata", p)
		} else {
			text, err = wire.ToJSON(nil, "meta.k8s.io/v1", "PartialObjectMetadata", p, true)
		}
		if err != nil {
			t.Fatal(err)
		}
		protos, texts = append(protos, proto), append(texts, text)
	}
	equal(t, "protobuf metadata list", writeList(wire.Protobuf, partial, protos), s.get(t, r.path, inProto+asList))
	equal(t, "JSON metadata list", writeList(wire.JSON, partial, texts), s.get(t, r.path, inJSON+asList))

	for _, include := range []metav1.IncludeObjectPolicy{"", metav1.IncludeNone, metav1.IncludeObject} {
		b := table.New(r.apiVersion, r.kind, h)
		for _, item := range list.Items {
			if err := b.Add(enc, item, include); err != nil {
				t.Fatal(err)
			}
		}
		got, err := b.AppendJSON(nil)
		if err != nil {
			t.Fatal(err)
		}
		got = wire.AppendObject(nil, wire.JSON, "", "", got)
		want := s.get(t, r.path+"?includeObject="+string(include), inJSON+asTable)
		equalTable(t, "table including "+string(include), got, want)
	}

	// A page has a continue token and a remaining count.
	body = s.get(t, r.path+"?limit=1", accept)
	page, err := wire.ReadList(enc, body)
	if err != nil {
		t.Fatal(err)
	}
	h = wire.ListHeader{APIVersion: page.APIVersion, Kind: page.Kind, Version: page.Version, Continue: page.Continue, Remaining: page.Remaining}
	equal(t, "page", writeList(enc, h, page.Items), body)
	return list
}

func writeList(enc wire.Encoding, h wire.ListHeader, items [][]byte) []byte {
	size := 0
	for _, item := range items {
		size += wire.ItemSize(enc, len(item))
	}
	out := wire.AppendListStart(nil, enc, h, size)
	for i, item := range items {
		out = wire.AppendItem(out, enc, i == 0, item)
	}
	return wire.AppendListEnd(out, enc, h)
}

func compareObject(t *testing.T, s *server, r resource, item []byte) {
	enc, accept := r.native()
	m, err := wire.ReadMeta(enc, item, r.kind == "Pod")
	if err != nil {
		t.Fatal(err)
	}
	path := inNamespace(r.path, m.Namespace) + "/" + m.Name
	body := s.get(t, path, accept)
	apiVersion, kind, object, err := wire.ReadObject(enc, body)
	if err != nil {
		t.Fatal(err)
	}
	if apiVersion != r.apiVersion || kind != r.kind {
		t.Errorf("got %s %s", apiVersion, kind)
	}
	equal(t, m.Name+" listed", item, object)
	equal(t, m.Name, wire.AppendObject(nil, enc, apiVersion, kind, object), body)

	partial, err := wire.PartialMetadataOf(enc, r.apiVersion, r.kind, object)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, m.Name+" native metadata", wire.AppendObject(nil, enc, "meta.k8s.io/v1", "PartialObjectMetadata", partial), s.get(t, path, accept+asPartial))
	if !r.custom {
		text, err := wire.ToJSON(nil, apiVersion, kind, object, true)
		if err != nil {
			t.Fatal(err)
		}
		want := s.get(t, path, inJSON)
		equal(t, m.Name+" as JSON", wire.AppendObject(nil, wire.JSON, apiVersion, kind, text), want)
		again, err := wire.FromJSON(apiVersion, kind, text)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, m.Name+" from JSON", again, object)
	}
	got, err := table.Object(r.apiVersion, r.kind, enc, object, "", true)
	if err != nil {
		t.Fatal(err)
	}
	equalTable(t, m.Name+" as table", append(got, '\n'), s.get(t, path, inJSON+asTable))
}

func compareEmptyTable(t *testing.T, s *server, r resource) {
	none := "?fieldSelector=metadata.name%3Dno-such"
	enc, accept := r.native()
	body := s.get(t, r.path+none, accept)
	list, err := wire.ReadList(enc, body)
	if err != nil {
		t.Fatal(err)
	}
	h := wire.ListHeader{APIVersion: list.APIVersion, Kind: list.Kind, Version: list.Version}
	equal(t, "empty native list", writeList(enc, h, nil), body)
	if !r.custom {
		equal(t, "empty JSON list", writeList(wire.JSON, h, nil), s.get(t, r.path+none, inJSON))
	}
	got, err := table.New(r.apiVersion, r.kind, h).AppendJSON(nil)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "empty table", append(got, '\n'), s.get(t, r.path+none, inJSON+asTable))
	h.APIVersion, h.Kind = "meta.k8s.io/v1", "PartialObjectMetadataList"
	equal(t, "empty metadata list", writeList(wire.JSON, h, nil), s.get(t, r.path+none, inJSON+asList))
}

// compareWatches reads the initial events of a WatchList up to the bookmark
// in every form, and writes them from the native ones.
func compareWatches(t *testing.T, s *server, r resource) {
	enc, accept := r.native()
	_, native := s.watch(t, r, enc, accept)
	version := func(ev wire.Event) uint64 {
		v, _, err := wire.ReadBookmark(wire.JSON, ev.Object)
		if enc == wire.Protobuf {
			v, _, err = wire.ReadBookmark(enc, ev.Object)
		}
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	rewrite := func(enc wire.Encoding, apiVersion, kind string, object func(wire.Event) ([]byte, error)) []byte {
		var out []byte
		for _, ev := range native {
			data, err := object(ev)
			if err != nil {
				t.Fatal(err)
			}
			out = wire.AppendEvent(out, enc, ev.Type, apiVersion, kind, data)
		}
		return out
	}
	raw, again := s.watch(t, r, enc, accept)
	if v, w := version(native[len(native)-1]), version(again[len(again)-1]); v != w {
		t.Fatalf("the cluster moves: %d, %d", v, w)
	}
	equal(t, "native watch", rewrite(enc, r.apiVersion, r.kind, func(ev wire.Event) ([]byte, error) {
		if ev.Type == "BOOKMARK" {
			return wire.Bookmark(enc, r.apiVersion, r.kind, version(ev), true), nil
		}
		return ev.Object, nil
	}), raw)
	if !r.custom {
		raw, _ = s.watch(t, r, wire.JSON, inJSON)
		equal(t, "JSON watch", rewrite(wire.JSON, r.apiVersion, r.kind, func(ev wire.Event) ([]byte, error) {
			if ev.Type == "BOOKMARK" {
				return wire.Bookmark(wire.JSON, r.apiVersion, r.kind, version(ev), true), nil
			}
			return wire.ToJSON(nil, r.apiVersion, r.kind, ev.Object, true)
		}), raw)
	}
	raw, _ = s.watch(t, r, enc, accept+asPartial)
	equal(t, "metadata watch", rewrite(enc, "meta.k8s.io/v1", "PartialObjectMetadata", func(ev wire.Event) ([]byte, error) {
		return wire.PartialMetadataOf(enc, r.apiVersion, r.kind, ev.Object)
	}), raw)
	raw, _ = s.watch(t, r, wire.JSON, inJSON+asTable)
	first := true
	equalTable(t, "table watch", rewrite(wire.JSON, "", "", func(ev wire.Event) ([]byte, error) {
		object := ev.Object
		if ev.Type == "BOOKMARK" {
			object = wire.Bookmark(enc, r.apiVersion, r.kind, version(ev), true)
		}
		out, err := table.Object(r.apiVersion, r.kind, enc, object, "", first)
		first = false
		return out, err
	}), raw)
}

// watch returns the events up to the end of the initial ones, and their bytes.
func (s *server) watch(t *testing.T, r resource, enc wire.Encoding, accept string) (raw []byte, events []wire.Event) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	resp, err := s.open(ctx, r.path+"?watch=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&resourceVersion=", accept)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		t.Fatalf("watch %s: %s %s", r.path, resp.Status, body)
	}
	var seen bytes.Buffer
	er := wire.NewEventReader(io.TeeReader(resp.Body, &seen), enc, 8<<20)
	for {
		ev, err := er.Read()
		if err != nil {
			t.Fatalf("watch %s: %v", r.path, err)
		}
		events = append(events, ev)
		if ev.Type == "BOOKMARK" {
			raw = seen.Bytes()
			if enc == wire.JSON && !bytes.HasSuffix(raw, []byte("\n")) {
				raw = append(raw, '\n') // it may come a moment after the object
			}
			return raw, events
		}
	}
}

// compareStatus writes the API server's own refusal.
func compareStatus(t *testing.T, s *server) {
	for enc, accept := range map[wire.Encoding]string{wire.Protobuf: inProto, wire.JSON: inJSON} {
		resp, err := s.open(t.Context(), "/api/v1/namespaces/default/pods/no-such", accept)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		apiVersion, kind, object, err := wire.ReadObject(enc, body)
		if err != nil {
			t.Fatal(err)
		}
		status, err := wire.ReadStatus(enc, object)
		if err != nil {
			t.Fatal(err)
		}
		if kind != "Status" || status.Code != http.StatusNotFound {
			t.Fatalf("got %s %v, want 404", kind, status)
		}
		want := wire.AppendEvent(nil, enc, "ERROR", apiVersion, kind, object)
		equal(t, "error event", wire.AppendStatusEvent(nil, enc, status), want)
	}
}
