package pools

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

const widgets = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.pools.test}
spec:
  group: pools.test
  names: {plural: widgets, singular: widget, kind: Widget, listKind: WidgetList}
  scope: Namespaced
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, properties: {seq: {type: integer}}}}}}
`

const widgetsPath = "/apis/pools.test/v1/widgets"

// TestCustomResourcesAreShared follows custom resources, which have no Protobuf
// form, at a follower: from the leader, from the cloud when the leader is dead,
// and from the leader again. One watch of a local client shows each change once
// and in order.
func TestCustomResourcesAreShared(t *testing.T) {
	await(t, "definition", func() error { return shared.cloud.Apply(t.Context(), widgets) })
	admin := shared.admin.RESTClient()
	await(t, "custom resource", func() error { return admin.Get().AbsPath(widgetsPath).Do(t.Context()).Error() })
	seq := 0
	write := func() {
		t.Helper()
		seq++
		object := fmt.Sprintf(`{"apiVersion":"pools.test/v1","kind":"Widget","metadata":{"name":"one"},"spec":{"seq":%d}}`, seq)
		err := admin.Patch(types.ApplyPatchType).AbsPath("/apis/pools.test/v1/namespaces/pools/widgets/one").
			Param("fieldManager", "test").Body([]byte(object)).Do(t.Context()).Error()
		if err != nil {
			t.Fatal(err)
		}
	}
	write()

	s := newSite(t, "custom", 2, "widgets")
	s.args = []string{"--pool-grace=1s", "--pool-return=1s"}
	s.elect(t, 1)
	for i := range s.hubs {
		s.start(t, i)
	}
	leader, follower := s.hubs[0], s.hubs[1]
	follower.follows(t, s.node(0), true)
	user := follower.client(t).RESTClient()
	var list []byte
	await(t, "list at the follower", func() (err error) {
		list, err = user.Get().AbsPath(widgetsPath).Param("resourceVersion", "0").
			SetHeader("Accept", "application/vnd.kubernetes.protobuf, application/json").Do(t.Context()).Raw()
		return err
	})
	direct, err := admin.Get().AbsPath(widgetsPath).Do(t.Context()).Raw()
	if err != nil {
		t.Fatal(err)
	}
	var have, want struct {
		Metadata metav1.ListMeta   `json:"metadata"`
		Items    []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(list, &have); err != nil {
		t.Fatalf("the follower's list is no JSON: %v: %.200q", err, list)
	}
	if err := json.Unmarshal(direct, &want); err != nil {
		t.Fatal(err)
	}
	if len(have.Items) != 1 || !bytes.Equal(have.Items[0], want.Items[0]) {
		t.Errorf("the follower has %s, the cloud %s", have.Items, want.Items)
	}

	seen := watchWidgets(t, follower, have.Metadata.ResourceVersion, seq)
	fromOne := func(what string) {
		t.Helper()
		await(t, what, func() error { return oneWatch(t, "widgets") })
		write()
		await(t, what, func() error { return seen(seq) })
	}
	fromOne("the follower hears the cloud through the leader")
	leader.Kill()
	write()
	follower.follows(t, "cloud", true)
	fromOne("the follower hears the cloud itself")
	if err := leader.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	follower.follows(t, s.node(0), true)
	fromOne("the follower hears the cloud through the leader again")
}

// oneWatch reports whether the API server has one watch of a resource.
func oneWatch(t *testing.T, resource string) error {
	t.Helper()
	text, err := shared.admin.RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "apiserver_longrunning_requests{") && strings.Contains(line, `resource="`+resource+`"`) &&
			strings.Contains(line, `verb="WATCH"`) {
			if _, n, _ := strings.Cut(line, "} "); strings.TrimSpace(n) != "1" {
				return fmt.Errorf("the API server has %s watches of %s", strings.TrimSpace(n), resource)
			}
			return nil
		}
	}
	return fmt.Errorf("the API server has no watch of %s", resource)
}

// watchWidgets begins one watch, which must show each change once and in order.
// The function that it returns tells whether it has shown a change.
func watchWidgets(t *testing.T, h *hub, version string, last int) (seen func(seq int) error) {
	t.Helper()
	cfg, err := h.KubeletConfig()
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
		cfg.Host+widgetsPath+"?watch=true&timeoutSeconds=3600&resourceVersion="+version, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if kind := resp.Header.Get("Content-Type"); resp.StatusCode != http.StatusOK || kind != "application/json" {
		t.Fatalf("watch: %s, %s", resp.Status, kind)
	}
	var (
		mu      sync.Mutex // guards the following
		fault   error
		running sync.WaitGroup
	)
	running.Go(func() {
		lines := bufio.NewReader(resp.Body)
		for {
			line, err := lines.ReadBytes('\n')
			mu.Lock()
			var ev struct {
				Type   string
				Object struct{ Spec struct{ Seq int } }
			}
			switch {
			case err != nil:
				fault = fmt.Errorf("the watch ended after change %d: %w", last, err)
			case json.Unmarshal(line, &ev) != nil || ev.Type != "MODIFIED" || ev.Object.Spec.Seq != last+1:
				fault = fmt.Errorf("after change %d the watch showed %s", last, line)
			default:
				last++
			}
			over := fault != nil
			mu.Unlock()
			if over {
				return
			}
		}
	})
	t.Cleanup(func() { // the test's context has ended
		_ = resp.Body.Close()
		running.Wait()
	})
	return func(seq int) error {
		mu.Lock()
		defer mu.Unlock()
		if fault != nil {
			t.Fatal(fault)
		}
		if last < seq {
			return fmt.Errorf("it has shown change %d of %d", last, seq)
		}
		return nil
	}
}
