package hub

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/hub/gentle"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// TestEndings: what of the cloud's changes stops a pod that runs, and why.
func TestEndings(t *testing.T) {
	deleted := metav1.NewTime(time.Date(2026, 11, 26, 10, 0, 30, 0, time.UTC))
	running := func(change func(*corev1.Pod)) *corev1.Pod {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "till", UID: "1", ResourceVersion: "7"},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning},
		}
		if change != nil {
			change(pod)
		}
		return pod
	}
	doomed := func(pod *corev1.Pod) {
		pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds = &deleted, new(int64(30))
	}
	mirror := func(pod *corev1.Pod) {
		pod.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
	}
	over := func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodFailed }
	target := func(reason string) func(*corev1.Pod) {
		return func(pod *corev1.Pod) {
			pod.Status.Conditions = []corev1.PodCondition{{
				Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: reason, Message: "the node was away",
			}}
		}
	}
	both := func(a, b func(*corev1.Pod)) func(*corev1.Pod) {
		return func(pod *corev1.Pod) { a(pod); b(pod) }
	}
	for name, tc := range map[string]struct {
		typ       watch.EventType
		prev, now *corev1.Pod
		why       string // "": it does not end
	}{
		"deleted":              {watch.Modified, running(nil), running(doomed), "deleted at 2026-11-26T10:00:00Z"},
		"deleted by force":     {watch.Deleted, running(nil), running(nil), "deleted"},
		"evicted":              {watch.Modified, running(nil), running(both(doomed, target("DeletionByTaintManager"))), "deleted at 2026-11-26T10:00:00Z (DeletionByTaintManager: the node was away)"},
		"ended by the cloud":   {watch.Modified, running(nil), running(both(over, target("DeletionByPodGC"))), "ended (DeletionByPodGC: the node was away)"},
		"of unknown past":      {watch.Modified, nil, running(doomed), "deleted at 2026-11-26T10:00:00Z"},
		"changed":              {watch.Modified, running(nil), running(nil), ""},
		"over by its own word": {watch.Modified, running(nil), running(over), ""},
		"ended by the kubelet": {watch.Modified, running(nil), running(both(over, target(corev1.PodReasonTerminationByKubelet))), ""},
		"ends already":         {watch.Deleted, running(doomed), running(doomed), ""},
		"is over already":      {watch.Deleted, running(over), running(over), ""},
		"never ran here":       {watch.Added, nil, running(doomed), ""},
		"mirror pod":           {watch.Modified, running(mirror), running(both(mirror, doomed)), ""},
		"mirror pod, gone":     {watch.Deleted, running(mirror), running(mirror), ""},
	} {
		t.Run(name, func(t *testing.T) {
			data, err := tc.now.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			metaOf := func(pod *corev1.Pod) *wire.Meta {
				text, err := pod.Marshal()
				if err != nil {
					t.Fatal(err)
				}
				m, err := wire.ReadMeta(wire.Protobuf, text, true)
				if err != nil {
					t.Fatal(err)
				}
				return &m
			}
			ch := replica.Change{
				Type: tc.typ, Meta: metaOf(tc.now), Object: data, Kind: replica.Kind{APIVersion: "v1", Kind: "Pod", Encoding: wire.Protobuf},
			}
			if tc.prev != nil {
				ch.Prev = metaOf(tc.prev)
			}
			e, ends := endingOf(ch)
			if ends != (tc.why != "") || ends && e.Why != tc.why {
				t.Errorf("ends: %v, %q", ends, e.Why)
			}
			if ends && (e.Namespace != "shop" || e.Name != "till" || e.UID != "1") {
				t.Errorf("it is %+v", e)
			}
		})
	}
}

// TestStopEventName: one name for one pod, which the API takes.
func TestStopEventName(t *testing.T) {
	long := strings.Repeat("a", 235) + "." + strings.Repeat("b", 17)
	a, b := stopEventName(gentle.Ending{Name: long, UID: "1"}), stopEventName(gentle.Ending{Name: long, UID: "2"})
	if a == b || a != stopEventName(gentle.Ending{Name: long, UID: "1"}) {
		t.Errorf("%s and %s", a, b)
	}
	for _, name := range []string{a, b, stopEventName(gentle.Ending{Name: "till", UID: "1"})} {
		if errs := validation.IsDNS1123Subdomain(name); errs != nil {
			t.Errorf("%s: %q", name, errs)
		}
	}
}
