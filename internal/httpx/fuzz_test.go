package httpx

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// FuzzAccept refuses requests whatever they accept: what comes back is a
// Status, in the form that the answer says it has.
func FuzzAccept(f *testing.F) {
	for _, accept := range []string{
		"", "*/*", "application/json", "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf;q=NaN, */*;q=0.1",
		"application/json;as=Table;g=meta.k8s.io;v=v1, application/vnd.kubernetes.protobuf;q=1e400", "text/html, ;;;=,",
	} {
		f.Add(accept, accept)
	}
	f.Fuzz(func(t *testing.T, first, second string) {
		r := httptest.NewRequest(http.MethodGet, "/api/v1/pods", http.NoBody)
		r.Header["Accept"] = []string{first, second}
		w := httptest.NewRecorder()
		WriteStatus(w, r, errors.New("no"))
		var s metav1.Status
		switch media := w.Header().Get("Content-Type"); media {
		case mediaJSON:
			if err := json.Unmarshal(w.Body.Bytes(), &s); err != nil {
				t.Fatal(err)
			}
		case mediaProtobuf:
			var envelope runtime.Unknown
			body, ok := bytes.CutPrefix(w.Body.Bytes(), []byte("k8s\x00"))
			if err := envelope.Unmarshal(body); !ok || err != nil {
				t.Fatalf("no envelope: %v", err)
			}
			if err := s.Unmarshal(envelope.Raw); err != nil {
				t.Fatal(err)
			}
		default:
			t.Fatalf("answered as %q", media)
		}
		if int(s.Code) != w.Code || w.Code != http.StatusInternalServerError {
			t.Errorf("answered %d with a Status of %d", w.Code, s.Code)
		}
	})
}
