package conform

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// sameWatch asks both sides at once, because a watch takes its time.
func sameWatch(ctx context.Context, server, edge *side, q question) error {
	for tries := 0; ; tries++ {
		var (
			got  [2]answer
			errs [2]error
			wg   sync.WaitGroup
		)
		for i, s := range []*side{server, edge} {
			wg.Go(func() { got[i], errs[i] = s.ask(ctx, q) })
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
		err := differ(got[0].timeless(), got[1].timeless())
		if err == nil || tries == 2 {
			return err
		}
	}
}

// manyWatches compares watches to their end, most at once.
func manyWatches(t *testing.T, server, edge *side, questions []question) {
	t.Helper()
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	for _, q := range questions {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := sameWatch(t.Context(), server, edge, q); err != nil {
				t.Errorf("%s: %v", q, err)
			}
		})
	}
	wg.Wait()
}

// TestWatchModes compares how watches begin, in all modes, and that they end
// when their time is over.
func TestWatchModes(t *testing.T) {
	t.Parallel()
	hub, _ := calm.hub(t, "edge-modes")
	server, edge := calm.sides(t, hub, "reader")
	var qs []question
	for _, k := range kinds {
		warm(t, edge, k.collection)
		base := "watch=true&timeoutSeconds=1"
		object := objectVersion(t, server, k)
		if k.name == "pods" || k.name == "gadgets" {
			for _, version := range []string{"", "resourceVersion=0", "resourceVersion=1", "resourceVersion=garbage", "resourceVersion=-1"} {
				for _, initial := range []string{"", "sendInitialEvents=true", "sendInitialEvents=false"} {
					for _, match := range []string{"", "resourceVersionMatch=NotOlderThan", "resourceVersionMatch=Exact"} {
						for _, marks := range []string{"", "allowWatchBookmarks=true"} {
							qs = append(qs, question{k.collection, join(base, version, initial, match, marks), inJSON})
						}
					}
				}
			}
		}
		for form, accept := range accepts {
			if k.custom && form == "protobuf" {
				continue // 406, with and without a hub, but only once there is something to send
			}
			qs = append(qs,
				question{k.collection, join(base, "resourceVersion=0"), accept},
				question{k.collection, join(base, "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"), accept})
		}
		for _, include := range []string{"None", "Metadata", "Object", "Nonsense"} {
			qs = append(qs, question{k.collection, join(base, "includeObject="+include), accepts["table"]})
		}
		for _, sel := range selectors(k) {
			if sel == "" || sel == "fieldSelector=metadata.name" {
				continue
			}
			qs = append(qs,
				question{k.collection, join(base, sel), inJSON},
				question{k.collection, join(base, sel, "resourceVersion=0&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"), accepts["client-go"]})
		}
		qs = append(qs,
			question{k.collection, "watch=1&timeoutSeconds=1", inJSON},
			question{k.collection + "/" + k.object, base, inJSON},
			question{k.collection + "/nobody", base, inJSON},
			question{strings.Replace(k.collection, "/v1/", "/v1/watch/", 1), "timeoutSeconds=1", inJSON},
			question{k.collection, "watch=true&timeoutSeconds=x", inJSON},
			question{k.collection, join(base, "pretty=true"), inJSON},
			question{k.collection, join(base, "limit=1"), inJSON},
			question{k.collection, join(base, "resourceVersion="+object+"&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"), inJSON},
			question{k.collection, join(base, "resourceVersion="+object+"&sendInitialEvents=false&resourceVersionMatch=NotOlderThan"), inJSON},
		)
	}
	qs = append(qs,
		question{kinds[0].collection, "watch=true&timeoutSeconds=1&resourceVersion=99999999", inJSON},
		question{kinds[0].collection, "watch=true&timeoutSeconds=1&resourceVersion=99999999&sendInitialEvents=true&resourceVersionMatch=NotOlderThan", inJSON},
	)
	manyWatches(t, server, edge, qs)
}

// history makes and changes objects in all the ways that move them into and
// out of selections. It returns the resource versions it went through.
func history(t *testing.T, client dynamic.ResourceInterface, object func(name string, labels map[string]any) *unstructured.Unstructured) []string {
	t.Helper()
	var versions []string
	ctx := t.Context()
	note := func(u *unstructured.Unstructured, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		versions = append(versions, u.GetResourceVersion())
	}
	relabel := func(name, value string) {
		t.Helper()
		patch := fmt.Sprintf(`{"metadata":{"labels":{"app":%q}}}`, value)
		u, err := client.Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		note(u, err)
	}
	drop := func(name string) {
		t.Helper()
		now := int64(0)
		if err := client.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"h-1", "h-2"} {
		note(client.Create(ctx, object(name, map[string]any{"app": "web"}), metav1.CreateOptions{}))
	}
	note(client.Create(ctx, object("h-3", nil), metav1.CreateOptions{}))
	relabel("h-1", "job")
	relabel("h-2", "job")
	relabel("h-1", "web")
	relabel("h-3", "web")
	drop("h-1") // as a member
	drop("h-2") // while it is none
	note(client.Create(ctx, object("h-1", map[string]any{"app": "web", "again": "yes"}), metav1.CreateOptions{}))
	relabel("h-3", "other")
	drop("h-3")
	relabel("h-1", "last")
	return versions
}

// TestWatchEvents compares what watchers are told of the same changes, those
// connected while they happen and those that come later with an old version.
func TestWatchEvents(t *testing.T) {
	t.Parallel()
	hub, _ := busy.hub(t, "edge-events")
	server, edge := busy.sides(t, hub, "reader")
	admin, err := dynamic.NewForConfig(busy.Cloud.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		gvr    schema.GroupVersionResource
		prefix string
		kind   string
		spec   map[string]any
		fields []string
	}{
		{gvr: schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}, prefix: "/api/v1", kind: "ConfigMap"},
		{
			gvr: schema.GroupVersionResource{Version: "v1", Resource: "pods"}, prefix: "/api/v1", kind: "Pod",
			spec: map[string]any{
				"serviceAccountName": "reader", "automountServiceAccountToken": false, "nodeName": "edge-2",
				"containers": []any{map[string]any{"name": "main", "image": "example.invalid/x:1"}},
			},
			fields: []string{"spec.nodeName=edge-2", "spec.nodeName=", "spec.nodeName!=edge-2"},
		},
		{
			gvr: schema.GroupVersionResource{Group: "conform.example.com", Version: "v1", Resource: "gadgets"}, prefix: "/apis/conform.example.com/v1", kind: "Gadget",
			spec: map[string]any{"color": "red"}, fields: []string{"spec.color=red"},
		},
	} {
		t.Run(c.gvr.Resource, func(t *testing.T) {
			t.Parallel()
			path := c.prefix + "/namespaces/conform-c/" + c.gvr.Resource
			warm(t, edge, path)
			from, err := edge.mustAsk(t, question{path, "resourceVersion=0", inJSON}).listVersion()
			if err != nil {
				t.Fatal(err)
			}
			var sels []string
			for _, s := range []string{"", "app=web", "app!=web", "!app", "app in (web,job)", "again", "nobody"} {
				sels = append(sels, "labelSelector="+url.QueryEscape(s))
			}
			for _, f := range append([]string{"metadata.name=h-1", "metadata.name!=h-1"}, c.fields...) {
				sels = append(sels, "fieldSelector="+url.QueryEscape(f))
			}
			var qs []question
			for _, sel := range sels {
				for _, form := range fewAccepts {
					if form == "metadatalist" {
						form = "metadata" // a watch is of single objects
					}
					if c.kind == "Gadget" && form == "protobuf" {
						continue
					}
					q := join("watch=true&timeoutSeconds=4&resourceVersion="+fmt.Sprint(from), sel)
					qs = append(qs, question{path, q, accepts[form]})
				}
			}
			answers := make([][2]answer, len(qs))
			var done sync.WaitGroup
			for i, q := range qs {
				for j, s := range []*side{server, edge} {
					done.Go(func() {
						var err error
						if answers[i][j], err = s.ask(t.Context(), q); err != nil {
							t.Error(err)
						}
					})
				}
			}
			versions := history(t, admin.Resource(c.gvr).Namespace("conform-c"), func(name string, labels map[string]any) *unstructured.Unstructured {
				u := &unstructured.Unstructured{Object: map[string]any{
					"apiVersion": c.gvr.GroupVersion().String(), "kind": c.kind,
					"metadata": map[string]any{"name": name},
				}}
				if labels != nil {
					_ = unstructured.SetNestedMap(u.Object, labels, "metadata", "labels")
				}
				if c.spec != nil {
					_ = unstructured.SetNestedMap(u.Object, c.spec, "spec")
				}
				return u
			})
			done.Wait()
			for i, q := range qs {
				if err := differ(answers[i][0].timeless(), answers[i][1].timeless()); err != nil {
					t.Errorf("%s: %v", q, err)
				}
			}
			// Late comers. The cluster is still now, so that both sides end
			// with the same event.
			qs = nil
			for _, version := range versions {
				for _, sel := range sels {
					qs = append(qs, question{path, join("watch=true&timeoutSeconds=1&resourceVersion="+version, sel), inJSON})
				}
			}
			manyWatches(t, server, edge, qs)
		})
	}
}

// TestWatchBinding compares what watchers by node are told when a pod without
// a node gets one, which is the one change of a selectable field.
func TestWatchBinding(t *testing.T) {
	t.Parallel()
	hub, _ := busy.hub(t, "edge-bindings")
	server, edge := busy.sides(t, hub, "reader")
	path := "/api/v1/namespaces/conform-d/pods"
	warm(t, edge, "/api/v1/pods")
	pods := busy.admin.CoreV1().Pods("conform-d")
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "bound-late"},
		Spec: corev1.PodSpec{
			ServiceAccountName: "reader",
			Containers:         []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
		},
	}
	made, err := pods.Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var qs []question
	for _, sel := range []string{"spec.nodeName=edge-2", "spec.nodeName!=edge-2", "spec.nodeName=", "spec.nodeName!="} {
		for _, form := range []string{inJSON, inProto} {
			qs = append(qs, question{path, "watch=true&timeoutSeconds=1&resourceVersion=" + made.ResourceVersion + "&fieldSelector=" + url.QueryEscape(sel), form})
		}
	}
	err = pods.Bind(t.Context(), &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Name: pod.Name}, Target: corev1.ObjectReference{Kind: "Node", Name: "edge-2"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	now := int64(0)
	if err := pods.Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	manyWatches(t, server, edge, qs)
}
