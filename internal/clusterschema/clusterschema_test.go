package clusterschema

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
)

var (
	gadget  = schema.GroupVersionKind{Group: "example.com", Version: "v1", Kind: "Gadget"}
	gadgets = gadget.GroupVersion().WithResource("gadgets")
)

// server is an API server that has one kind, of which the field changes.
type server struct {
	*httptest.Server
	field     string
	documents int // that were fetched
}

func newServer(t *testing.T) *server {
	s := &server{field: "size"}
	mux := http.NewServeMux()
	mux.HandleFunc("/openapi/v3", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"paths":{"apis/example.com/v1":{"serverRelativeURL":"/openapi/v3/apis/example.com/v1?hash=%s"}}}`, s.field)
	})
	mux.HandleFunc("/openapi/v3/apis/example.com/v1", func(w http.ResponseWriter, _ *http.Request) {
		s.documents++
		fmt.Fprintf(w, `{"openapi":"3.0.0","info":{"title":"t","version":"1"},"paths":{},"components":{"schemas":{
			"Gadget":{"type":"object","properties":{"spec":{"$ref":"#/components/schemas/Spec"}},
				"x-kubernetes-group-version-kind":[{"group":"example.com","version":"v1","kind":"Gadget"}]},
			"Spec":{"type":"object","properties":{%q:{"type":"integer"}}}}}}`, s.field)
	})
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

func (s *server) source(t *testing.T) *Source {
	t.Helper()
	client, err := discovery.NewDiscoveryClientForConfig(&rest.Config{Host: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	mapper := meta.NewDefaultRESTMapper(nil)
	mapper.AddSpecific(gadget, gadgets, gadget.GroupVersion().WithResource("gadget"), meta.RESTScopeRoot)
	return New(client, mapper)
}

func (s *server) has(t *testing.T, source *Source, field string) {
	t.Helper()
	got, err := source.Of(gadgets)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := got.Properties["spec"].Properties[field]; !ok {
		t.Errorf("no field %s in %v", field, got.Properties["spec"].Properties)
	}
}

// TestSchemaIsFetchedWhenItChanged changes the schema of a kind.
func TestSchemaIsFetchedWhenItChanged(t *testing.T) {
	s := newServer(t)
	source := s.source(t)
	s.has(t, source, "size")
	s.has(t, source, "size")
	if s.documents != 1 {
		t.Errorf("the document was fetched %d times, want once", s.documents)
	}
	s.field = "weight"
	s.has(t, source, "weight")
	if s.documents != 2 {
		t.Errorf("the document was fetched %d times, want twice", s.documents)
	}
}

// TestWhatIsNotThere tells a kind that is missing from a server that is.
func TestWhatIsNotThere(t *testing.T) {
	s := newServer(t)
	source := s.source(t)
	for _, gvk := range []schema.GroupVersionKind{
		gadget.GroupVersion().WithKind("Widget"), {Group: "example.org", Version: "v1", Kind: "Gadget"}, {Version: "v1", Kind: "Pod"},
	} {
		if _, err := source.ResolveSchema(gvk); !errors.Is(err, resolver.ErrSchemaNotFound) {
			t.Errorf("%s: got %v, want %v", gvk, err, resolver.ErrSchemaNotFound)
		}
	}
	for _, gvr := range []schema.GroupVersionResource{
		gadget.GroupVersion().WithResource("widgets"), {Version: "v1", Resource: "gadgets"}, {Group: "example.com", Version: "v2", Resource: "gadgets"},
	} {
		if _, err := source.Of(gvr); !errors.Is(err, resolver.ErrSchemaNotFound) {
			t.Errorf("%s: got %v, want %v", gvr, err, resolver.ErrSchemaNotFound)
		}
	}
	if _, err := source.Of(gadget.GroupVersion().WithResource("gadget")); !errors.Is(err, resolver.ErrSchemaNotFound) || !strings.Contains(err.Error(), "it calls them gadgets") {
		t.Errorf("the singular: got %v", err)
	}
	s.Close()
	if _, err := source.ResolveSchema(gadget); err == nil || errors.Is(err, resolver.ErrSchemaNotFound) {
		t.Errorf("without a server: got %v", err)
	}
}
