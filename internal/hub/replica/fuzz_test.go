package replica

import (
	"encoding/json"
	"net/url"
	"testing"
)

// FuzzPosition reads the records of scopes as they may stand in a store that
// was written by another release, and asks of the scopes what a hub does.
func FuzzPosition(f *testing.F) {
	f.Add([]byte(`{"scope":{"resource":{"Version":"v1","Resource":"pods"},"fields":"spec.nodeName=edge-1"},"kind":{"apiVersion":"v1","kind":"Pod","encoding":2},"version":7,"objects":1}`),
		[]byte(`{"scope":{"resource":{"Version":"v1","Resource":"pods"},"namespace":"a","fields":"spec.nodeName=edge-1,status.phase!=Failed","labels":"app in (a,b),!c"}}`))
	f.Add([]byte(`{"scope":{"resource":{"Group":"a?b","Version":"/","Resource":".."},"namespace":"../x","labels":"((","fields":"=,="}}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		var p, q position
		if json.Unmarshal(first, &p) != nil || json.Unmarshal(second, &q) != nil {
			return
		}
		for _, s := range []Scope{p.Scope, q.Scope} {
			if !s.covers(s) {
				t.Errorf("%s does not cover itself", s.ID())
			}
			if got, err := url.ParseQuery(s.query().Encode()); err != nil || got.Get("labelSelector") != s.Labels || got.Get("fieldSelector") != s.Fields {
				t.Errorf("%s asks for %v, %v", s.ID(), got, err)
			}
		}
		if p.Scope != q.Scope && p.Scope.covers(q.Scope) && p.Scope.Resource != q.Scope.Resource {
			t.Errorf("%s covers %s", p.Scope.ID(), q.Scope.ID())
		}
	})
}
