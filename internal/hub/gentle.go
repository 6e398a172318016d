package hub

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/hub/gentle"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
	"github.com/yurt-edge/yurt/internal/report"
)

// GentleConfig is how pods end that the cloud ended while it was away.
type GentleConfig struct {
	After time.Duration // an absence at least this long; 0: as everything else
	Rate  float64       // pods of a pool in a minute
	Most  time.Duration // how long any of them waits
}

func (g GentleConfig) check() error {
	switch {
	case g.After < 0:
		return fmt.Errorf("--gentle-after %s is in the past: give a time, as 1m, or 0 for never", g.After)
	case !(g.Rate >= 0.1 && g.Rate <= 60_000):
		return fmt.Errorf("--gentle-rate %v is no rate of pods per minute: give one from 0.1 to 60000", g.Rate)
	case g.Most <= 0 || g.Most > time.Hour:
		return fmt.Errorf("--gentle-most %s is not within an hour: give a time, as 3m", g.Most)
	}
	return nil
}

// stopReason is that of the event about a pod that will end.
const stopReason = "StoppedAfterAbsence"

func (h *Hub) newGate() *gentle.Gate {
	return gentle.New(gentle.Config{
		Rate: h.cfg.Gentle.Rate, Most: h.cfg.Gentle.Most, Nodes: func() int { return int(h.poolSize.Load()) }, Tell: h.tellEnding,
		Log: h.log.With("part", "gentle"), Registerer: h.cfg.Registerer,
	})
}

// gentleHold is what local watchers of the node's pods wait for.
func (h *Hub) gentleHold() replica.Hold {
	return replica.Hold{
		Scope: h.ownPods(), After: h.cfg.Gentle.After,
		Ask: func(ch replica.Change) ([]byte, <-chan struct{}) {
			e, ends := endingOf(ch)
			if !ends {
				return nil, nil
			}
			note, err := json.Marshal(heldEnding{e, h.clock.Now()})
			if err != nil {
				return nil, nil // it cannot be: there are but strings in it
			}
			return note, h.gate.Hold(e, ch.Pass)
		},
		Again: func(note []byte, pass func(context.Context) error) <-chan struct{} {
			var e heldEnding
			if err := json.Unmarshal(note, &e); err != nil {
				h.log.Warn("a pod ends at once that waited before a restart", "err", err)
				return nil
			}
			return h.gate.Resume(e.Ending, h.clock.Since(e.Since), pass)
		},
	}
}

// heldEnding is an ending on disk.
type heldEnding struct {
	gentle.Ending

	Since time.Time
}

func (h *Hub) ownPods() replica.Scope {
	return replica.Scope{Resource: podsResource, Fields: "spec.nodeName=" + h.cfg.NodeName}
}

// countPool takes note of how many nodes the node's pool has. What is not known
// any more stays as it was.
func (h *Hub) countPool(name string) {
	held, err := h.replica.Get(request.Info{Verb: "get", IsResource: true, Resource: poolsResource, Name: name}, 0)
	if err != nil {
		return
	}
	var np v1beta2.NodePool
	if json.Unmarshal(held.Data, &np) == nil {
		h.poolSize.Store(int64(len(np.Status.Nodes)))
	}
}

// endingOf tells whether a change ends a pod that has not ended by itself, and
// why the cloud made it.
func endingOf(ch replica.Change) (e gentle.Ending, ends bool) {
	over := func(m *wire.Meta) bool {
		return m.Phase == string(corev1.PodSucceeded) || m.Phase == string(corev1.PodFailed)
	}
	prev := ch.Prev
	if ch.Type == watch.Added || prev != nil && (prev.DeletionTimestamp || over(prev)) {
		return e, false // it does not run here
	}
	deleted := ch.Type == watch.Deleted || ch.Meta.DeletionTimestamp
	if !deleted && (prev == nil || !over(ch.Meta)) {
		return e, false
	}
	pod := podOf(ch)
	if _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return e, false // what it shows runs on, whatever becomes of it
	}
	e = gentle.Ending{Namespace: ch.Meta.Namespace, Name: ch.Meta.Name, UID: ch.Meta.UID, Why: "deleted"}
	if deleted && !pod.DeletionTimestamp.IsZero() {
		at := pod.DeletionTimestamp.Time
		if grace := pod.DeletionGracePeriodSeconds; grace != nil {
			at = at.Add(-time.Duration(*grace) * time.Second)
		}
		e.Why = "deleted at " + at.UTC().Format(time.RFC3339)
	}
	for _, c := range pod.Status.Conditions {
		if c.Type != corev1.DisruptionTarget || c.Status != corev1.ConditionTrue || c.Reason == corev1.PodReasonTerminationByKubelet {
			continue
		}
		if !deleted {
			e.Why, deleted = "ended", true
		}
		e.Why += " (" + c.Reason + ": " + c.Message + ")"
	}
	// A pod that is merely over is so by the kubelet's own word.
	return e, deleted
}

// podOf returns what can be read of a change's pod.
func podOf(ch replica.Change) *corev1.Pod {
	pod := &corev1.Pod{}
	var err error
	if ch.Kind.Encoding == wire.Protobuf {
		err = pod.Unmarshal(ch.Object)
	} else {
		err = json.Unmarshal(ch.Object, pod)
	}
	if err != nil {
		return &corev1.Pod{}
	}
	return pod
}

// tellEnding makes the event that announces the end of a pod: in the cloud, or
// in the journal while that is away again. It is made once, whatever restarts
// meanwhile.
func (h *Hub) tellEnding(ctx context.Context, e gentle.Ending, due time.Time) error {
	now := time.Now()
	when := "now"
	if wait := due.Sub(now).Round(time.Second); wait > 0 {
		when = "in about " + wait.String()
	}
	event := &corev1.Event{
		TypeMeta:       metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta:     metav1.ObjectMeta{Namespace: e.Namespace, Name: stopEventName(e)},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: e.Namespace, Name: e.Name, UID: types.UID(e.UID)},
		Type:           corev1.EventTypeNormal, Reason: stopReason, Count: 1,
		Message:        fmt.Sprintf("Will be stopped %s: %s in the cloud while node %s was away", when, e.Why, h.cfg.NodeName),
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now),
		Source:              corev1.EventSource{Component: "yurthub", Host: h.cfg.NodeName},
		ReportingController: "yurthub", ReportingInstance: h.cfg.NodeName,
	}
	text, err := json.Marshal(event)
	if err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	err = h.addOwnEvent(ctx, e.Namespace, text)
	if err != nil && !apierrors.IsAlreadyExists(err) {
		_, err = h.journal.AddEvent(ctx, "/api/v1/namespaces/"+e.Namespace+"/events", e.Namespace, text)
	}
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// stopEventName is the same for the same pod.
func stopEventName(e gentle.Ending) string {
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(e.UID)) // it never fails
	name := e.Name[:min(len(e.Name), validation.DNS1123SubdomainMaxLength-17)]
	return fmt.Sprintf("%s.%016x", strings.TrimRight(name, ".-"), sum.Sum64())
}

func (h *Hub) endings() []report.Ending {
	var out []report.Ending
	for _, w := range h.gate.Waiting() {
		out = append(out, report.Ending{
			Pod: w.Namespace + "/" + w.Name, Why: w.Why, Since: w.Since, Due: w.Due, Announced: w.Told,
		})
	}
	return out
}
