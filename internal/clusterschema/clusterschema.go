// Package clusterschema knows what the objects of a cluster look like: the
// OpenAPI v3 schema of each kind, built in or of a CustomResourceDefinition, as
// the API server says it is now.
package clusterschema

import (
	"cmp"
	"fmt"
	"slices"
	"sync"

	lru "github.com/hashicorp/golang-lru/v2"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/openapi"
	"k8s.io/kube-openapi/pkg/validation/spec"
)

// most bounds the schemas that are kept.
const most = 32

// Source answers by what the cluster serves now: each question asks for the
// list of documents, a few kilobytes, which tells by their hashes whether what
// is known of them still holds. It is a [resolver.SchemaResolver], and safe for
// use by several goroutines. Its requests have the deadline of the client's
// configuration.
type Source struct {
	client discovery.DiscoveryInterface
	mapper meta.RESTMapper

	mu    sync.Mutex // one question at a time: an answer costs memory
	known *lru.Cache[schema.GroupVersionKind, entry]
}

type entry struct {
	document string // its URL with the hash
	schema   *spec.Schema
}

var _ resolver.SchemaResolver = (*Source)(nil)

// New returns a Source. The mapper tells which kind a resource has.
func New(client discovery.DiscoveryInterface, mapper meta.RESTMapper) *Source {
	known, err := lru.New[schema.GroupVersionKind, entry](most)
	if err != nil {
		panic(err) // the size is a constant
	}
	return &Source{client: client, mapper: mapper, known: known}
}

// ResolveSchema returns the schema of a kind, which is not to be changed. The
// error wraps [resolver.ErrSchemaNotFound] if the cluster has no such kind, or
// tells nothing of it.
func (s *Source) ResolveSchema(gvk schema.GroupVersionKind) (*spec.Schema, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	documents, err := s.client.OpenAPIV3().Paths()
	if err != nil {
		return nil, fmt.Errorf("ask the API server for its OpenAPI: %w", err)
	}
	path := "apis/" + gvk.Group + "/" + gvk.Version
	if gvk.Group == "" {
		path = "api/" + gvk.Version
	}
	document, ok := documents[path]
	if !ok {
		return nil, fmt.Errorf("the API server has no OpenAPI of %s: %w", gvk.GroupVersion(), resolver.ErrSchemaNotFound)
	}
	if e, ok := s.known.Get(gvk); ok && e.document == document.ServerRelativeURL() {
		return e.schema, nil
	}
	found, err := (&resolver.ClientDiscoveryResolver{Discovery: listed{s.client, documents}}).ResolveSchema(gvk)
	if err != nil {
		return nil, fmt.Errorf("OpenAPI of %s: %w", gvk, err)
	}
	s.known.Add(gvk, entry{document.ServerRelativeURL(), found})
	return found, nil
}

// Of is ResolveSchema for the kind of a resource.
func (s *Source) Of(gvr schema.GroupVersionResource) (*spec.Schema, error) {
	kinds, err := s.mapper.KindsFor(gvr)
	if err != nil && !meta.IsNoMatchError(err) {
		return nil, fmt.Errorf("ask the API server for the kind of %s: %w", gvr, err)
	}
	resources, err := s.mapper.ResourcesFor(gvr)
	if err != nil && !meta.IsNoMatchError(err) {
		return nil, fmt.Errorf("ask the API server for %s: %w", gvr, err)
	}
	// To a mapper the empty group is any, and a singular or a short name is as
	// good as the name.
	i := slices.IndexFunc(kinds, func(k schema.GroupVersionKind) bool { return k.GroupVersion() == gvr.GroupVersion() })
	switch at := slices.IndexFunc(resources, func(r schema.GroupVersionResource) bool { return r.GroupVersion() == gvr.GroupVersion() }); {
	case i < 0 || at < 0:
		return nil, fmt.Errorf("the cluster has no %s in %s: %w", gvr.Resource, cmp.Or(gvr.Group, "the core group")+"/"+gvr.Version, resolver.ErrSchemaNotFound)
	case !slices.Contains(resources, gvr):
		return nil, fmt.Errorf("the cluster has no %s, it calls them %s: %w", gvr.Resource, resources[at].Resource, resolver.ErrSchemaNotFound)
	}
	return s.ResolveSchema(kinds[i])
}

// listed is a client whose list of documents is there already.
type listed struct {
	discovery.DiscoveryInterface
	documents documents
}

type documents map[string]openapi.GroupVersion

func (l listed) OpenAPIV3() openapi.Client { return l.documents }

// Paths is of [openapi.Client].
func (d documents) Paths() (map[string]openapi.GroupVersion, error) { return d, nil }
