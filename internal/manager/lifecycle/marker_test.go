package lifecycle

import (
	"context"
	"errors"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
)

// TestMark marks a node by what cache and API server know of its pool.
func TestMark(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), v1beta2.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	const none = v1beta2.NodePoolType("")
	knows := func(kind v1beta2.NodePoolType, err error, nodes ...client.Object) client.Client {
		b := fake.NewClientBuilder().WithScheme(scheme).WithObjects(nodes...)
		if kind != none {
			b = b.WithObjects(&v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: v1beta2.NodePoolSpec{Type: kind}})
		}
		return b.WithInterceptorFuncs(interceptor.Funcs{Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
			if err != nil {
				return err
			}
			return c.Get(ctx, key, obj, opts...)
		}}).Build()
	}
	down := errors.New("down")
	for name, tc := range map[string]struct {
		pool, mark  string
		cached, now v1beta2.NodePoolType
		err         error // of the API server
		want        string
	}{
		"in no pool":                      {"", "", none, none, down, ""},
		"it has left its pool":            {"", "p", none, none, down, ""},
		"an Edge pool":                    {"p", "", v1beta2.Edge, none, down, ""},
		"an Edge pool, after a Cloud one": {"p", "dc", v1beta2.Edge, none, down, ""},
		"an Edge pool of the same name":   {"p", "p", v1beta2.Edge, none, down, ""},
		"a Cloud pool":                    {"p", "", v1beta2.Cloud, v1beta2.Cloud, nil, "p"},
		"a Cloud pool, after another":     {"p", "dc", v1beta2.Cloud, v1beta2.Cloud, nil, "p"},
		"marked already":                  {"p", "p", v1beta2.Cloud, none, down, "p"},
		"no such pool":                    {"p", "", none, none, nil, "p"},
		"not in the cache yet":            {"p", "", none, v1beta2.Edge, nil, ""},
		"made anew":                       {"p", "", v1beta2.Cloud, v1beta2.Edge, nil, ""},
		"the API server cannot be asked":  {"p", "", none, v1beta2.Edge, down, ""},
	} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{}}}
		if tc.pool != "" {
			node.Labels[apps.NodePoolLabel] = tc.pool
		}
		if tc.mark != "" {
			node.Annotations = map[string]string{apps.SilenceEvicts: tc.mark}
		}
		nodes := knows(tc.cached, nil, node)
		m := &marker{read: nodes, live: knows(tc.now, tc.err), write: nodes}
		_, err := m.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKey{Name: "n"}})
		if fails := name == "the API server cannot be asked"; fails != errors.Is(err, down) || !fails && err != nil {
			t.Errorf("%s: got %v", name, err)
		}
		if err := nodes.Get(t.Context(), client.ObjectKey{Name: "n"}, node); err != nil {
			t.Fatal(err)
		}
		if got := node.Annotations[apps.SilenceEvicts]; got != tc.want {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
	}
}
