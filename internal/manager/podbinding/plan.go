package podbinding

import (
	"fmt"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/yurt-edge/yurt/api/apps"
)

// binding is how long the pods of a node stay bound to it while it is away.
type binding struct {
	bound bool
	// seconds is nil for ever.
	seconds *int64
}

// bindingOf reads a node's annotations; of several the one that binds for
// longest counts. The error names the annotation and what it takes.
func bindingOf(node *corev1.Node) (binding, error) {
	if node.Annotations[apps.Autonomy] == "true" || node.Annotations[apps.Binding] == "true" {
		return binding{bound: true}, nil
	}
	if text, ok := node.Annotations[apps.AutonomyDuration]; ok {
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 {
			return binding{}, fmt.Errorf("annotation %s=%q is no duration: give it as 30m or 2h, or 0s for ever", apps.AutonomyDuration, text)
		}
		if d == 0 {
			return binding{bound: true}, nil
		}
		seconds := int64(d.Seconds())
		return binding{bound: true, seconds: &seconds}, nil
	}
	return binding{}, nil
}

// bound are the taints that a node gets while it is away, and where a pod
// remembers how long it tolerated them.
var bound = map[string]string{
	corev1.TaintNodeNotReady:    apps.OriginalNotReady,
	corev1.TaintNodeUnreachable: apps.OriginalUnreachable,
}

// bind changes the pod's tolerations to what the node's binding says, or back
// to what they were. It reports whether the pod changed.
//
// A pod that tolerated a taint for ever before is left as it is; OpenYurt's
// manager binds it like any other, with the memory "infinite".
func bind(pod *corev1.Pod, b binding) bool {
	changed := false
	for i := range pod.Spec.Tolerations {
		t := &pod.Spec.Tolerations[i]
		memory, ours := bound[t.Key]
		if !ours || t.Effect != corev1.TaintEffectNoExecute {
			continue
		}
		original, remembered := pod.Annotations[memory]
		switch {
		case b.bound && !remembered:
			if t.TolerationSeconds == nil {
				continue
			}
			if pod.Annotations == nil {
				pod.Annotations = map[string]string{}
			}
			pod.Annotations[memory] = strconv.FormatInt(*t.TolerationSeconds, 10)
			t.TolerationSeconds, changed = b.seconds, true
		case b.bound:
			if !same(t.TolerationSeconds, b.seconds) {
				t.TolerationSeconds, changed = b.seconds, true
			}
		case remembered:
			if seconds, err := strconv.ParseInt(original, 10, 64); err == nil {
				t.TolerationSeconds = &seconds
			} else if original == "infinite" {
				t.TolerationSeconds = nil
			}
			delete(pod.Annotations, memory)
			changed = true
		}
	}
	return changed
}

func same(a, b *int64) bool { return (a == nil) == (b == nil) && (a == nil || *a == *b) }
