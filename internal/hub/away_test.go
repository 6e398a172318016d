package hub

import (
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/request"
)

// TestAway: who asks in a short cut is told to try again, who asks in a long
// one is told at once that it is no use.
func TestAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := link.State{Since: time.Now(), Reason: "connection refused"}
		for _, wait := range []bool{true, false} {
			err := away(request.Info{Verb: "list", Path: "/api/v1/events"}, state)
			if _, told := apierrors.SuggestsClientDelay(err); told != wait || !apierrors.IsServiceUnavailable(err) {
				t.Errorf("after %s: %v, told to wait: %t", time.Since(state.Since), err, told)
			}
			time.Sleep(briefly)
		}
	})
}
