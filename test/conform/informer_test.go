package conform

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/features"
	featurestesting "k8s.io/client-go/features/testing"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/yurt-edge/yurt/test/bed"
)

// TestInformers runs client-go's informers of all kinds against the hub, by
// WatchList and by list and watch, through a cut in which the cluster changes.
func TestInformers(t *testing.T) {
	t.Parallel()
	hub, link := busy.hub(t, "edge-informers")
	for _, watchList := range []bool{true, false} {
		t.Run(fmt.Sprintf("WatchList=%t", watchList), func(t *testing.T) {
			featurestesting.SetFeatureDuringTest(t, features.WatchListClient, watchList)
			informed(t, hub, link)
		})
	}
}

func informed(t *testing.T, hub *bed.Hub, link *bed.Link) {
	ctx, stop := context.WithCancel(t.Context())
	cfg := busy.through(t, hub, busy.tokens["reader"])
	configmaps := schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	gadgets := schema.GroupVersionResource{Group: "conform.example.com", Version: "v1", Resource: "gadgets"}
	all := map[string]cache.SharedIndexInformer{}
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	for name, media := range map[string]string{"protobuf": inProto, "JSON": inJSON} {
		c := rest.CopyConfig(cfg)
		c.ContentType, c.AcceptContentTypes = media, media+","+inJSON
		client, err := kubernetes.NewForConfig(c)
		if err != nil {
			t.Fatal(err)
		}
		f := informers.NewSharedInformerFactory(client, 0)
		all["typed "+name] = f.Core().V1().ConfigMaps().Informer()
		selected := informers.NewSharedInformerFactoryWithOptions(client, 0,
			informers.WithNamespace("conform-b"), informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = "app" }))
		all["selected "+name] = selected.Core().V1().ConfigMaps().Informer()
	}
	dyn, err := dynamic.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for name, gvr := range map[string]schema.GroupVersionResource{"dynamic": configmaps, "custom": gadgets} {
		all[name] = dynamicinformer.NewDynamicSharedInformerFactory(dyn, 0).ForResource(gvr).Informer()
	}
	md, err := metadata.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	all["metadata"] = metadatainformer.NewSharedInformerFactory(md, 0).ForResource(configmaps).Informer()
	for name, i := range all {
		err := i.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			t.Errorf("%s: the watch broke: %v", name, err)
		})
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() { i.RunWithContext(ctx) })
	}
	_, edge := busy.sides(t, hub, "reader")
	agree := func(when string) {
		t.Helper()
		for name, i := range all {
			gvr, namespace, opts := configmaps, "", metav1.ListOptions{}
			switch name {
			case "custom":
				gvr = gadgets
			case "selected protobuf", "selected JSON":
				namespace, opts.LabelSelector = "conform-b", "app"
			}
			if err := await(ctx, func(ctx context.Context) error { return holds(ctx, i, gvr, namespace, opts) }); err != nil {
				t.Fatalf("%s: %s: %v", when, name, err)
			}
		}
	}
	agree("at first")
	client := busy.admin.CoreV1().ConfigMaps("conform-b")
	change := func(name string) {
		t.Helper()
		_, err := client.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "x"}}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	change("informed")
	agree("after an addition")
	func() {
		if err := link.Cut(bed.Blackhole); err != nil {
			t.Fatal(err)
		}
		defer heal(t, link, edge)
		mustAwait(t, func(ctx context.Context) error { return linkIs(ctx, edge, 503) })
		change("informed-later")
		_, err := client.Patch(ctx, "settings", types.MergePatchType, []byte(`{"metadata":{"labels":{"app":null}}}`), metav1.PatchOptions{})
		if err == nil {
			err = client.Delete(ctx, "informed", metav1.DeleteOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}()
	agree("after a cut")
	_, err = client.Patch(ctx, "settings", types.MergePatchType, []byte(`{"metadata":{"labels":{"app":"db"}}}`), metav1.PatchOptions{})
	if err := errors.Join(err, client.Delete(ctx, "informed-later", metav1.DeleteOptions{})); err != nil {
		t.Fatal(err)
	}
	agree("after a removal")
}

// holds returns nil if the informer has just what the cloud has.
func holds(ctx context.Context, i cache.SharedIndexInformer, gvr schema.GroupVersionResource, namespace string, opts metav1.ListOptions) error {
	if !i.HasSynced() {
		return errors.New("not synced")
	}
	client, err := metadata.NewForConfig(busy.Cloud.RESTConfig())
	if err != nil {
		return err
	}
	list, err := client.Resource(gvr).Namespace(namespace).List(ctx, opts)
	if err != nil {
		return err
	}
	want, got := map[string]string{}, map[string]string{}
	for _, item := range list.Items {
		want[item.Namespace+"/"+item.Name] = item.ResourceVersion
	}
	for _, object := range i.GetStore().List() {
		m, err := meta.Accessor(object)
		if err != nil {
			return err
		}
		got[m.GetNamespace()+"/"+m.GetName()] = m.GetResourceVersion()
	}
	if !maps.Equal(want, got) {
		return fmt.Errorf("informer has %v, the cloud %v", got, want)
	}
	return nil
}
