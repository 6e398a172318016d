package hub

import (
	"net/http"
	"net/http/httptest"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// FuzzBodies reads what a kubelet sends, heartbeats among it, and answers with
// it as the hub does alone: what it gives, it can read again.
func FuzzBodies(f *testing.F) {
	kinds := []struct {
		gv   schema.GroupVersion
		make func() runtime.Object
	}{
		{coordinationv1.SchemeGroupVersion, func() runtime.Object { return &coordinationv1.Lease{} }},
		{authenticationv1.SchemeGroupVersion, func() runtime.Object { return &authenticationv1.TokenRequest{} }},
		{authenticationv1.SchemeGroupVersion, func() runtime.Object { return &authenticationv1.TokenReview{} }},
		{authorizationv1.SchemeGroupVersion, func() runtime.Object { return &authorizationv1.SubjectAccessReview{} }},
	}
	f.Add([]byte(`{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"edge-1"},"spec":{"renewTime":"2026-11-26T12:00:00.000001Z","leaseDurationSeconds":40}}`), true)
	f.Add([]byte(`{"spec":{"expirationSeconds":9223372036854775807,"boundObjectRef":{"kind":"Pod","uid":"x"}}}`), false)
	f.Add([]byte(`{"kind":"Pod","apiVersion":"v1"}`), false)
	for _, k := range kinds {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPut, "/", http.NoBody)
		r.Header.Set("Accept", runtime.ContentTypeProtobuf)
		respond(w, r, http.StatusOK, k.gv, k.make())
		f.Add(w.Body.Bytes(), true)
	}
	f.Fuzz(func(t *testing.T, body []byte, protobuf bool) {
		r := httptest.NewRequest(http.MethodPut, "/", http.NoBody)
		if protobuf {
			r.Header.Set("Accept", runtime.ContentTypeProtobuf)
		}
		for _, k := range kinds {
			object := k.make()
			if decode(body, object) != nil {
				continue
			}
			if l, ok := object.(*coordinationv1.Lease); ok {
				b := &heartbeat{owed: make(chan struct{}, 1)}
				b.renew(l)
				b.took("7")
				object = b.get()
			}
			w := httptest.NewRecorder()
			respond(w, r, http.StatusOK, k.gv, object)
			if w.Code != http.StatusOK {
				t.Fatalf("%T: %d %s", object, w.Code, w.Body)
			}
			if err := decode(w.Body.Bytes(), k.make()); err != nil {
				t.Errorf("%T: %v", object, err)
			}
		}
	})
}

// FuzzDocumentType compares what a client accepts with the type of a document,
// both of which are somebody else's words.
func FuzzDocumentType(f *testing.F) {
	f.Add("application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList", "application/json")
	f.Add("*/*", "application/com.github.proto-openapi.spec.v2@v1.0+protobuf")
	f.Add("application/*;as", "application/json; charset=utf-8")
	f.Fuzz(func(t *testing.T, clause, contentType string) {
		if accepts(clause, contentType) && !accepts(contentType, contentType) {
			t.Errorf("%q takes %q, which does not take itself", clause, contentType)
		}
	})
}
