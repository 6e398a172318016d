package httpx

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"go.uber.org/goleak"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWriteStatusInTheCallersEncoding(t *testing.T) {
	t.Parallel()
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	scheme.AddUnversionedTypes(schema.GroupVersion{Version: "v1"}, &metav1.Status{})
	for _, tc := range []struct {
		accept string
		media  string
	}{
		{"", mediaJSON},
		{"*/*", mediaJSON},
		{"application/json;as=Table;v=v1;g=meta.k8s.io,application/json", mediaJSON},
		{"application/vnd.kubernetes.protobuf", mediaProtobuf},
		{"application/vnd.kubernetes.protobuf;stream=watch", mediaProtobuf},
		{"application/vnd.kubernetes.protobuf,application/json", mediaProtobuf},
		{"application/json,application/vnd.kubernetes.protobuf", mediaJSON},
		{"application/json;q=0.5,application/vnd.kubernetes.protobuf", mediaProtobuf},
		{"text/html;;;, application/vnd.kubernetes.protobuf;q=x", mediaJSON},
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("Accept", tc.accept)
		w := httptest.NewRecorder()
		WriteStatus(w, r, apierrors.NewTooManyRequests("wait", 3))
		if w.Code != 429 || w.Header().Get("Content-Type") != tc.media || w.Header().Get("Retry-After") != "3" {
			t.Errorf("%q: %d %v", tc.accept, w.Code, w.Header())
		}
		var got metav1.Status
		if tc.media == mediaJSON {
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Errorf("%q: %v", tc.accept, err)
			}
		} else {
			s := protobuf.NewSerializer(scheme, scheme)
			if _, _, err := s.Decode(w.Body.Bytes(), nil, &got); err != nil {
				t.Errorf("%q: %v", tc.accept, err)
			}
		}
		if got.Code != 429 || got.Reason != metav1.StatusReasonTooManyRequests || got.Details.RetryAfterSeconds != 3 {
			t.Errorf("%q: %+v", tc.accept, got)
		}
	}
}

func TestWriteStatusOfAnyError(t *testing.T) {
	t.Parallel()
	w := httptest.NewRecorder()
	WriteStatus(w, httptest.NewRequest(http.MethodGet, "/", nil), errors.New("oops"))
	var got metav1.Status
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != 500 || got.Reason != metav1.StatusReasonInternalError || got.Kind != "Status" {
		t.Errorf("%d %+v, %v", w.Code, got, err)
	}
}

func TestAddWarning(t *testing.T) {
	t.Parallel()
	h := http.Header{}
	AddWarning(h, "a \"b\" \\ c\r\nX-Evil: 1")
	if got, want := h.Get("Warning"), `299 - "a \"b\" \\ c  X-Evil: 1"`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestServerStops(t *testing.T) {
	t.Parallel()
	for name, grace := range map[string]time.Duration{"after the requests": time.Minute, "when the grace is over": time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			entered, release := make(chan struct{}), make(chan struct{})
			s := Server{Listener: l, Grace: grace, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				close(entered)
				select {
				case <-release:
				case <-r.Context().Done():
				}
				_, _ = io.WriteString(w, "done")
			})}
			ctx, cancel := context.WithCancel(t.Context())
			stopped := make(chan error, 1)
			go func() { stopped <- s.Run(ctx) }()
			answered := make(chan error, 1)
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			go func() {
				resp, err := client.Get("http://" + l.Addr().String())
				if err == nil {
					_, err = io.ReadAll(resp.Body)
					_ = resp.Body.Close()
				}
				answered <- err
			}()
			<-entered
			cancel()
			if grace == time.Minute {
				close(release)
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			if err := <-answered; (err == nil) != (grace == time.Minute) {
				t.Errorf("client got %v", err)
			}
		})
	}
}

func TestServerReportsABrokenListener(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	s := Server{Listener: l, Handler: http.NotFoundHandler()}
	if err := s.Run(t.Context()); err == nil {
		t.Error("no error")
	}
}
