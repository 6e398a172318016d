package request

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func TestResolve(t *testing.T) {
	for _, c := range []struct {
		method, target string
		want           string // as String has it
		name           string
		resource       string
		reads          bool
	}{
		{"GET", "/version", "get /version", "", "", false},
		{"GET", "/api/v1/pods", "list pods", "", "pods", true},
		{"GET", "/api/v1/namespaces/ns/pods/a", "get pods ns/a", "a", "pods", true},
		{"GET", "/api/v1/namespaces/ns", "get namespaces ns", "ns", "namespaces", true},
		{"GET", "/api/v1/namespaces", "list namespaces", "", "namespaces", true},
		{"GET", "/api/v1/namespaces/ns/pods?watch=true", "watch pods ns", "", "pods", true},
		{"GET", "/api/v1/namespaces/ns/pods?watch=1&fieldSelector=metadata.name%3Da", "watch pods ns", "", "pods", true},
		{"GET", "/api/v1/nodes/n?watch=true", "get nodes n", "n", "nodes", true},
		{"GET", "/api/v1/watch/nodes/n", "watch nodes n", "n", "nodes", true},
		{"GET", "/apis/apps/v1/deployments", "list deployments.apps", "", "deployments", true},
		{"GET", "/api/v1/namespaces/ns/pods/a/log", "get pods/log ns/a", "a", "pods", false},
		{"GET", "/api/v1/namespaces/ns/pods/a/status", "get pods/status ns/a", "a", "pods", false},
		{"POST", "/api/v1/namespaces/ns/pods", "create pods ns", "", "pods", false},
		{"PATCH", "/api/v1/nodes/n/status", "patch nodes/status n", "n", "nodes", false},
		{"DELETE", "/api/v1/namespaces/ns/pods", "deletecollection pods ns", "", "pods", false},
		{"POST", "/healthz", "post /healthz", "", "", false},
	} {
		r := httptest.NewRequest(c.method, c.target, nil)
		info, err := Resolve(r)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.target, err)
			continue
		}
		if info.String() != c.want || info.Name != c.name || info.Resource.Resource != c.resource || info.Reads() != c.reads {
			t.Errorf("%s %s: %s, name %q, resource %q, reads %v", c.method, c.target, info, info.Name, info.Resource.Resource, info.Reads())
		}
		if info.Reads() != (info.Options != nil) {
			t.Errorf("%s: options %v", info, info.Options)
		}
		if got := From(With(t.Context(), info)); got.String() != info.String() {
			t.Errorf("from context: %s", got)
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	for _, query := range []string{"labelSelector=a%3D%3D%3Db", "fieldSelector=a", "limit=x", "timeoutSeconds=y"} {
		if _, err := Resolve(httptest.NewRequest(http.MethodGet, "/api/v1/pods?"+query, nil)); err == nil {
			t.Errorf("%s is taken", query)
		}
	}
}

func TestUpgradesAreNotRead(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/api/v1/namespaces/ns/pods/a?watch=true", nil)
	r.Header.Set("Connection", "keep-alive, Upgrade")
	if info, err := Resolve(r); err != nil || !info.Upgrade || info.Reads() {
		t.Errorf("%+v, %v", info, err)
	}
}

func TestFromPanicsWithoutInfo(t *testing.T) {
	defer func() {
		if err, ok := recover().(error); !ok || !errors.Is(err, ErrMissing) {
			t.Errorf("panicked with %v", err)
		}
	}()
	From(t.Context())
}

func TestFormats(t *testing.T) {
	const table = "application/json;as=Table;v=v1;g=meta.k8s.io"
	anyJSON, asJSON, asProto := Format{Encoding: wire.JSON, Any: true}, Format{Encoding: wire.JSON}, Format{Encoding: wire.Protobuf}
	asTable := Format{View: Table, Encoding: wire.JSON}
	for accept, want := range map[string][]Format{
		"":                                    {anyJSON},
		"*/*":                                 {anyJSON},
		"application/*":                       {anyJSON},
		"application/json":                    {asJSON},
		"application/vnd.kubernetes.protobuf": {asProto},
		"application/vnd.kubernetes.protobuf, application/json":       {asProto, asJSON},
		"application/json;q=0.5, application/vnd.kubernetes.protobuf": {asProto, asJSON},
		"application/json;q=0":               {},
		"application/json;q=x":               {},
		"application/cbor":                   {},
		"application/cbor, application/json": {asJSON},
		table + ",application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json": {asTable, asJSON},
		"application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io":            {{View: MetadataList, Encoding: wire.JSON}},
		"application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;v=v1;g=meta.k8s.io": {
			{View: Metadata, Encoding: wire.Protobuf},
		},
		"application/json;as=Other;v=v1;g=meta.k8s.io": {},
		"text/html, ;;;": {},
	} {
		if got := Formats(http.Header{"Accept": {accept}}); !slices.Equal(got, want) {
			t.Errorf("%q: %+v, want %+v", accept, got, want)
		}
	}
	if got := Formats(http.Header{}); !slices.Equal(got, []Format{anyJSON}) {
		t.Errorf("no header: %+v", got)
	}
}

func FuzzFormats(f *testing.F) {
	f.Add("application/json;as=Table;v=v1;g=meta.k8s.io,application/vnd.kubernetes.protobuf;q=0.9,*/*;q=0.1")
	f.Add(",;=\"")
	f.Fuzz(func(t *testing.T, accept string) {
		for _, got := range Formats(http.Header{"Accept": {accept}}) {
			if got.Encoding != wire.JSON && got.Encoding != wire.Protobuf {
				t.Errorf("encoding %v", got.Encoding)
			}
			if got.Any && got.Encoding != wire.JSON {
				t.Errorf("any is %v", got.Encoding)
			}
		}
	})
}

func FuzzResolve(f *testing.F) {
	f.Add("GET", "/api/v1/namespaces/ns/pods/a", "watch=true&labelSelector=a%3Db", "")
	f.Add("GET", "/apis/apps/v1/watch/deployments", "fieldSelector=metadata.name%3Da&resourceVersion=5", "upgrade")
	f.Add("PATCH", "/api/v1/nodes/n/status", "", "")
	f.Add("POST", "/api/v1/watch/pods", "", "")
	f.Add("GET", "/api//v1///", "limit=-1&continue=x", "")
	f.Add("GET", "/api/v1//v1///", "", "")
	f.Fuzz(func(t *testing.T, method, path, query, connection string) {
		r := &http.Request{Method: method, URL: &url.URL{Path: path, RawQuery: query}, Header: http.Header{"Connection": {connection}}}
		info, err := Resolve(r.WithContext(t.Context()))
		if err != nil {
			return
		}
		if info.Reads() && (info.Options == nil || info.Resource.Resource == "" || info.Subresource != "") {
			t.Errorf("%q %q reads as %+v", path, query, info)
		}
		if !info.IsResource && info.Resource.Resource != "" {
			t.Errorf("%q: no resource, but %v", path, info.Resource)
		}
		if !strings.Contains(info.String(), info.Verb) {
			t.Errorf("named %q", info)
		}
	})
}
