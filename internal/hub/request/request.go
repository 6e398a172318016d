// Package request resolves the facts of a Kubernetes API request once, into
// one struct, so that every later handler reads the same answer.
//
// It is pure: it reads a request's method, URL and headers and nothing else.
package request

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion/scheme"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
)

// Info says what a request asks for. The zero Resource means a non-resource
// path such as /version.
type Info struct {
	Verb        string // get, list, watch, create, update, patch, delete, deletecollection; lower-cased method for paths
	Resource    schema.GroupVersionResource
	Subresource string
	Namespace   string
	Name        string // empty for list and watch, unless fixed by the path
	Path        string
	IsResource  bool
	Upgrade     bool // exec, attach, port-forward: the connection changes its protocol

	// Options are the list options of a list or watch, and the resource
	// version of a get. Nil for other verbs.
	Options *metainternalversion.ListOptions
}

// String is the form used in errors and logs.
func (i Info) String() string {
	if !i.IsResource {
		return i.Verb + " " + i.Path
	}
	s := i.Verb + " " + i.Resource.Resource
	if i.Resource.Group != "" {
		s += "." + i.Resource.Group
	}
	if i.Subresource != "" {
		s += "/" + i.Subresource
	}
	switch {
	case i.Namespace != "" && i.Name != "":
		s += " " + i.Namespace + "/" + i.Name
	case i.Namespace != "" || i.Name != "":
		s += " " + i.Namespace + i.Name
	}
	return s
}

// Reads reports whether the request is one that the replica may answer.
func (i Info) Reads() bool {
	// A path with an empty part, as /api/v1//x, names no resource.
	if !i.IsResource || i.Resource.Resource == "" || i.Subresource != "" || i.Upgrade {
		return false
	}
	return i.Verb == "get" || i.Verb == "list" || i.Verb == "watch"
}

var resolver = apirequest.RequestInfoFactory{
	APIPrefixes:          sets.NewString("api", "apis"),
	GrouplessAPIPrefixes: sets.NewString("api"),
}

// Resolve reads a request's facts. It fails on list options that the API
// server would refuse to parse; the error says which.
func Resolve(r *http.Request) (Info, error) {
	var (
		opts      *metainternalversion.ListOptions
		malformed error
		asked     = r
	)
	if r.URL.RawQuery == "" {
		opts = &metainternalversion.ListOptions{}
	} else if r.Method == http.MethodGet || r.Method == http.MethodHead {
		query := r.URL.Query()
		if opts, malformed = listOptions(query); malformed != nil {
			asked = withoutQuery(r, query)
		}
	}
	ri, err := resolver.NewRequestInfo(asked)
	if err != nil {
		return Info{}, fmt.Errorf("resolve %s %s: %w", r.Method, r.URL.Path, err)
	}
	info := Info{
		Verb: ri.Verb, Path: ri.Path, IsResource: ri.IsResourceRequest,
		Upgrade: isUpgrade(r),
	}
	if !ri.IsResourceRequest {
		return info, nil
	}
	info.Resource = schema.GroupVersionResource{Group: ri.APIGroup, Version: ri.APIVersion, Resource: ri.Resource}
	info.Subresource, info.Namespace, info.Name = ri.Subresource, ri.Namespace, ri.Name
	if ri.Resource == "namespaces" && ri.Name != "" {
		// The path's namespace is the object itself, which has none.
		info.Namespace = ""
	}
	if !info.Reads() {
		return info, nil
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		// Whatever is sent below /watch/ is called a watch.
		info.Verb = strings.ToLower(r.Method)
		return info, nil
	}
	info.Options = opts
	if malformed != nil {
		return info, malformed
	}
	// A list or watch by metadata.name carries its name in Name too, as the
	// API server's authoriser sees it; the selector stays in Options.
	if info.Verb != "get" && !nameInPath(ri) {
		info.Name = ""
	}
	return info, nil
}

// nameInPath reports whether the path itself names an object, as in
// GET /api/v1/watch/nodes/x.
func nameInPath(ri *apirequest.RequestInfo) bool { return len(ri.Parts) > 1 }

func listOptions(query url.Values) (*metainternalversion.ListOptions, error) {
	opts := &metainternalversion.ListOptions{}
	if err := scheme.ParameterCodec.DecodeParameters(query, metav1.SchemeGroupVersion, opts); err != nil {
		return nil, err //nolint:wrapcheck // the API server's words, for its clients
	}
	return opts, nil
}

// withoutQuery returns r with no more of its query than whether it watches.
// The resolver takes a query that it cannot parse for that as well, but logs
// it first, and what clients send is not for the log.
func withoutQuery(r *http.Request, query url.Values) *http.Request {
	out, u := *r, *r.URL
	u.RawQuery = ""
	if watch := query["watch"]; len(watch) > 0 && watch[0] != "0" && !strings.EqualFold(watch[0], "false") {
		u.RawQuery = "watch=true"
	}
	out.URL = &u
	return &out
}

func isUpgrade(r *http.Request) bool {
	for _, v := range r.Header.Values("Connection") {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "upgrade") {
				return true
			}
		}
	}
	return false
}

type key struct{}

// With returns a context that carries info.
func With(ctx context.Context, info Info) context.Context {
	return context.WithValue(ctx, key{}, info)
}

// ErrMissing is the panic value of From when no Info was resolved: a handler
// stands above the resolver in the pipeline.
var ErrMissing = errors.New("request: no Info in context")

// From returns the Info that With stored.
func From(ctx context.Context) Info {
	info, ok := ctx.Value(key{}).(Info)
	if !ok {
		panic(ErrMissing)
	}
	return info
}
