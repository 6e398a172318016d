package hub

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestPanicIsLoggedWithoutItsWords: what a panic carries may be a piece of the
// request or of an object.
func TestPanicIsLoggedWithoutItsWords(t *testing.T) {
	const secret = "of-nobody-else"
	for name, tc := range map[string]struct {
		panics func()
		want   string
	}{
		"text":  {func() { panic("cannot read " + secret) }, "cause=string"},
		"error": {func() { panic(fmt.Errorf("cannot read: %w", errors.New(secret))) }, "cause=*fmt.wrapError"},
		"value": {func() { panic(struct{ token string }{secret}) }, "cause=\"struct { token string }\""},
		"runtime": {func() {
			_ = []byte(secret)[len(secret):][len(secret)]
		}, "index out of range"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			h := &Hub{
				log:     slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
				metrics: newHubMetrics(prometheus.NewRegistry()),
			}
			w := httptest.NewRecorder()
			r := httptest.NewRequest(http.MethodPost, "/api/v1/secrets?"+secret, strings.NewReader(secret))
			r.Header.Set("Authorization", "Bearer "+secret)
			h.survive(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { tc.panics() })).ServeHTTP(w, r)
			if w.Code != http.StatusInternalServerError || !strings.Contains(log.String(), tc.want) {
				t.Errorf("%d, log %s", w.Code, &log)
			}
			if strings.Contains(log.String()+w.Body.String(), secret) {
				t.Errorf("the secret is told: %s%s", &log, w.Body)
			}
		})
	}
}
