package podbinding

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
)

func TestBindingOf(t *testing.T) {
	for _, tc := range []struct{ key, value, want string }{
		{apps.AutonomyDuration, "2h", "7200"},
		{apps.AutonomyDuration, "0s", "ever"},
		{apps.AutonomyDuration, "0", "ever"},
		{apps.AutonomyDuration, "-1s", "error"},
		{apps.AutonomyDuration, "soon", "error"},
		{apps.AutonomyDuration, "", "error"},
		{apps.Autonomy, "true", "ever"},
		{apps.Autonomy, "false", "not"},
		{apps.Binding, "true", "ever"},
		{"other", "true", "not"},
	} {
		b, err := bindingOf(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{tc.key: tc.value}}})
		got := "ever"
		switch {
		case err != nil:
			got = "error"
			if !strings.Contains(err.Error(), tc.key) || !strings.Contains(err.Error(), "0s for ever") {
				t.Errorf("%v names not the annotation and what it takes", err)
			}
		case !b.bound:
			got = "not"
		case b.seconds != nil:
			got = fmt.Sprint(*b.seconds)
		}
		if got != tc.want {
			t.Errorf("%s=%s: got %s, want %s", tc.key, tc.value, got, tc.want)
		}
	}
}

// TestBindingIsTheLongest has two annotations on a node, as one that a newer was
// added to.
func TestBindingIsTheLongest(t *testing.T) {
	for _, old := range []string{apps.Autonomy, apps.Binding} {
		b, err := bindingOf(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{old: "true", apps.AutonomyDuration: "2h"}}})
		if err != nil || !b.bound || b.seconds != nil {
			t.Errorf("%s: got %+v, %v", old, b, err)
		}
	}
}

func TestBindAndBack(t *testing.T) {
	pod := &corev1.Pod{Spec: corev1.PodSpec{Tolerations: []corev1.Toleration{
		{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: new(int64(300))},
		{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: new(int64(60))},
		{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoSchedule},
		{Key: "other", Effect: corev1.TaintEffectNoExecute, TolerationSeconds: new(int64(5))},
	}}}
	was := pod.DeepCopy()
	times := func() string {
		var out []string
		for _, tol := range pod.Spec.Tolerations {
			if tol.TolerationSeconds == nil {
				out = append(out, "ever")
			} else {
				out = append(out, fmt.Sprint(*tol.TolerationSeconds))
			}
		}
		return strings.Join(out, " ")
	}
	for _, tc := range []struct {
		b    binding
		want string
	}{
		{binding{bound: true, seconds: new(int64(7200))}, "7200 7200 ever 5"},
		{binding{bound: true}, "ever ever ever 5"},
		{binding{bound: true, seconds: new(int64(10))}, "10 10 ever 5"},
		{binding{}, "300 60 ever 5"},
	} {
		if !bind(pod, tc.b) || times() != tc.want {
			t.Errorf("%+v: got %s, want %s", tc.b, times(), tc.want)
		}
		if bind(pod, tc.b) {
			t.Errorf("%+v: changed twice", tc.b)
		}
	}
	if !reflect.DeepEqual(pod.Spec, was.Spec) || len(pod.Annotations) > 0 {
		t.Errorf("got %+v, want it as it was", pod)
	}
	taken := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{apps.OriginalNotReady: "infinite"}},
		Spec: corev1.PodSpec{Tolerations: []corev1.Toleration{
			{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: new(int64(7200))},
		}},
	}
	if !bind(taken, binding{}) || taken.Spec.Tolerations[0].TolerationSeconds != nil || len(taken.Annotations) > 0 {
		t.Errorf("a pod that OpenYurt's manager bound, and that tolerated for ever: %+v", taken)
	}
	own := &corev1.Pod{Spec: corev1.PodSpec{Tolerations: []corev1.Toleration{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute}}}}
	if bind(own, binding{bound: true, seconds: new(int64(1))}) {
		t.Error("a pod that tolerates for ever was shortened")
	}
}
