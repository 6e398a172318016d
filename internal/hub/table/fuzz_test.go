package table_test

import (
	"encoding/json"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/hub/table"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// FuzzObject makes tables of objects that nobody has validated.
func FuzzObject(f *testing.F) {
	now := metav1.NewTime(time.Now())
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "a", DeletionTimestamp: &now},
		Spec:       corev1.PodSpec{InitContainers: []corev1.Container{{Name: "i"}}, Containers: []corev1.Container{{Name: "c"}}},
		Status: corev1.PodStatus{
			InitContainerStatuses: []corev1.ContainerStatus{{Name: "i"}, {Name: "j"}},
			ContainerStatuses:     []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Signal: 9}}}},
		},
	}
	message, err := pod.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	text, err := json.Marshal(pod)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(message)
	f.Add(text)
	f.Add([]byte(`{"metadata":{"name":1},"spec":{"ports":[{}],"rules":[{"host":null}],"replicas":"x"},"status":null,"subsets":[{}],"endpoints":[{"addresses":[]}]}`))
	kinds := [][2]string{
		{"v1", "Pod"},
		{"v1", "Node"},
		{"v1", "Service"},
		{"v1", "Endpoints"},
		{"v1", "Event"},
		{"v1", "PersistentVolumeClaim"},
		{"discovery.k8s.io/v1", "EndpointSlice"},
		{"apps/v1", "Deployment"},
		{"batch/v1", "CronJob"},
		{"networking.k8s.io/v1", "Ingress"},
		{"coordination.k8s.io/v1", "Lease"},
		{"apiextensions.k8s.io/v1", "CustomResourceDefinition"},
		{"new.k8s.io/v1", "Thing"},
	}
	f.Fuzz(func(t *testing.T, object []byte) {
		for _, k := range kinds {
			for _, enc := range []wire.Encoding{wire.JSON, wire.Protobuf} {
				out, err := table.Object(k[0], k[1], enc, object, metav1.IncludeMetadata, true)
				if err == nil && !json.Valid(out) {
					t.Errorf("%s: invalid JSON %q", k[1], out)
				}
			}
		}
	})
}
