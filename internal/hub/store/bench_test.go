package store_test

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/hub/store"
)

// slice returns an EndpointSlice of 50 endpoints as protobuf, about 5 KB.
func slice(tb testing.TB, i int) []byte {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("web-%05d", i), Namespace: "shop", ResourceVersion: fmt.Sprint(1000 + i),
			UID:    uid(i),
			Labels: map[string]string{"kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	yes := true
	for j := range 50 {
		node := fmt.Sprintf("edge-%d", (i*7+j*13)%200)
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{fmt.Sprintf("10.%d.%d.%d", i%250, j, (i*j)%250)},
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes},
			NodeName:   &node,
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: fmt.Sprintf("web-%d-%x", j, i*j*7919), UID: uid(i*50 + j)},
		})
	}
	return marshal(tb, s)
}

// pod returns a Pod as protobuf, about 2 KB, that differs with step as it
// does from one status update to the next.
func pod(tb testing.TB, i, step int) []byte {
	now := metav1.NewTime(time.Unix(1_700_000_000+int64(step), 0))
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("web-6d4cf56db6-%05d", i), Namespace: "shop", UID: uid(i), ResourceVersion: fmt.Sprint(step),
			GenerateName: "web-6d4cf56db6-", CreationTimestamp: now,
			Labels:          map[string]string{"app": "web", "pod-template-hash": "6d4cf56db6", "tier": "frontend"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-6d4cf56db6", UID: uid(0)}},
		},
		Spec: corev1.PodSpec{
			NodeName: "edge-1", ServiceAccountName: "web", SchedulerName: "default-scheduler", DNSPolicy: "ClusterFirst", RestartPolicy: "Always",
			Volumes: []corev1.Volume{{Name: "kube-api-access-x7x2p"}, {Name: "config"}},
			Containers: []corev1.Container{{
				Name: "web", Image: "registry.example.com/shop/web:v1.27.3", ImagePullPolicy: "IfNotPresent",
				Env:                      []corev1.EnvVar{{Name: "POD_NAME", Value: "x"}, {Name: "BACKEND", Value: "http://backend.shop.svc:8080"}, {Name: "MODE", Value: "production"}},
				Resources:                corev1.ResourceRequirements{Limits: corev1.ResourceList{"cpu": resource.MustParse("500m"), "memory": resource.MustParse("128Mi")}},
				VolumeMounts:             []corev1.VolumeMount{{Name: "kube-api-access-x7x2p", MountPath: "/var/run/secrets/kubernetes.io/serviceaccount", ReadOnly: true}, {Name: "config", MountPath: "/etc/web"}},
				TerminationMessagePath:   "/dev/termination-log",
				TerminationMessagePolicy: "File",
				LivenessProbe:            &corev1.Probe{PeriodSeconds: 10, TimeoutSeconds: 1, FailureThreshold: 3},
			}},
			Tolerations: []corev1.Toleration{{Key: "node.kubernetes.io/not-ready", Operator: "Exists", Effect: "NoExecute"}, {Key: "node.kubernetes.io/unreachable", Operator: "Exists", Effect: "NoExecute"}},
		},
		Status: corev1.PodStatus{
			Phase: "Running", HostIP: "192.168.12.7", PodIP: fmt.Sprintf("10.244.3.%d", i%250), StartTime: &now, QOSClass: "Burstable",
			ContainerStatuses: []corev1.ContainerStatus{{
				Name: "web", Ready: true, RestartCount: int32(step), Image: "registry.example.com/shop/web:v1.27.3",
				ImageID:     "registry.example.com/shop/web@sha256:" + strings.Repeat("9e3779b1", 8),
				ContainerID: fmt.Sprintf("containerd://%032x%032x", uint64(i)*0x9E3779B97F4A7C15, uint64(step+1)*0xC2B2AE3D27D4EB4F),
				State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
			}},
		},
	}
	for _, c := range []corev1.PodConditionType{"PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"} {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: c, Status: "True", LastTransitionTime: now})
	}
	p.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubelet", Operation: "Update", APIVersion: "v1", Time: &now, FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(
		`{"f:status":{"f:conditions":{"k:{\"type\":\"ContainersReady\"}":{".":{},"f:lastProbeTime":{},"f:lastTransitionTime":{},"f:status":{},"f:type":{}},"k:{\"type\":\"Initialized\"}":{".":{},"f:lastProbeTime":{},"f:lastTransitionTime":{},"f:status":{},"f:type":{}}},"f:containerStatuses":{},"f:hostIP":{},"f:phase":{},"f:podIP":{}}}`)}}
	return marshal(tb, p)
}

func uid(i int) types.UID {
	x := uint64(i+1) * 0x9E3779B97F4A7C15
	return types.UID(fmt.Sprintf("%08x-%04x-4%03x-9%03x-%012x", uint32(x), uint16(x>>32), x>>20&0xfff, x>>40&0xfff, x*31&0xffffffffffff))
}

func marshal(tb testing.TB, o interface{ Marshal() ([]byte, error) }) []byte {
	tb.Helper()
	b, err := o.Marshal()
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func openTemp(tb testing.TB, cfg store.Config) *store.Store {
	tb.Helper()
	cfg.Key = testKey()
	if cfg.Path == "" {
		cfg.Path = tb.TempDir() + "/store"
	}
	s, err := store.Open(tb.Context(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil && !errors.Is(err, store.ErrClosed) {
			tb.Error(err)
		}
	})
	return s
}

// fill stores n objects made by data, in batches as a first list does.
func fill(tb testing.TB, s *store.Store, bucket string, n int, data func(i int) []byte) {
	tb.Helper()
	b := store.NewBatch()
	for i := range n {
		b.Put(bucket, fmt.Sprintf("shop/object-%06d", i), store.Record{Version: uint64(i), Encoding: 1, Data: data(i)})
		if b.Size() > 1<<20 || i == n-1 {
			if err := s.Commit(tb.Context(), b); err != nil {
				tb.Fatal(err)
			}
			b = store.NewBatch()
		}
	}
}

func BenchmarkAppendData(b *testing.B) {
	for _, kind := range []struct {
		name string
		data func(i int) []byte
	}{
		{"slice", func(i int) []byte { return slice(b, i) }},
		{"half", func(i int) []byte { return pod(b, i, i)[:500] }},
		{"pod", func(i int) []byte { return pod(b, i, i) }},
	} {
		b.Run(kind.name, func(b *testing.B) {
			s := openTemp(b, store.Config{})
			fill(b, s, "b", 1000, kind.data)
			var keys []string
			sn, err := s.Snapshot()
			if err != nil {
				b.Fatal(err)
			}
			defer sn.Close()
			total := 0
			err = sn.Scan("b", "", func(key string, h store.Header) error {
				keys, total = append(keys, key), total+h.Size
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(total / len(keys)))
			b.ReportAllocs()
			buf := make([]byte, 0, 64<<10)
			for i := 0; b.Loop(); i++ {
				if buf, _, err = sn.AppendData(buf[:0], "b", keys[i%len(keys)]); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(total)/1000, "plain-B/object")
			b.ReportMetric(float64(s.Stats().DiskBytes)/1000, "disk-B/object")
		})
	}
}

func BenchmarkScan10000(b *testing.B) {
	s := openTemp(b, store.Config{})
	fill(b, s, "b", 10_000, func(i int) []byte { return pod(b, i, i) })
	sn, err := s.Snapshot()
	if err != nil {
		b.Fatal(err)
	}
	defer sn.Close()
	b.ReportAllocs()
	for b.Loop() {
		n := 0
		if err := sn.Scan("b", "", func(string, store.Header) error { n++; return nil }); err != nil || n != 10_000 {
			b.Fatal(n, err)
		}
	}
}

func BenchmarkOpen10000(b *testing.B) {
	path := b.TempDir() + "/store"
	s := openTemp(b, store.Config{Path: path})
	fill(b, s, "b", 10_000, func(i int) []byte { return pod(b, i, i) })
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s := openTemp(b, store.Config{Path: path})
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoneCommit(b *testing.B) {
	s := openTemp(b, store.Config{})
	for i := 0; b.Loop(); i++ {
		batch := store.NewBatch()
		batch.Put("b", "k", store.Record{Data: pod(b, 1, i)})
		if err := s.Commit(b.Context(), batch); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStatusUpdates submits updates of the pods of one node at 50/s and
// reports what reaches the disk. One iteration is 10 s of them; run it with
// -benchtime=1x.
func BenchmarkStatusUpdates(b *testing.B) {
	for _, pods := range []int{10, 110} {
		b.Run(fmt.Sprint(pods), func(b *testing.B) {
			s := openTemp(b, store.Config{})
			fill(b, s, "b", pods, func(i int) []byte { return pod(b, i, i) })
			tick := time.NewTicker(time.Second / 50)
			defer tick.Stop()
			before, stats, n := writeBytes(b), s.Stats(), 0
			for b.Loop() {
				for range 500 {
					<-tick.C
					batch := store.NewBatch()
					batch.Put("b", fmt.Sprintf("shop/object-%06d", n*37%pods), store.Record{Version: uint64(n), Data: pod(b, n*37%pods, n)})
					batch.Put("versions", "pods", store.Record{Version: uint64(n)})
					if err := s.Submit(b.Context(), batch, nil); err != nil {
						b.Fatal(err)
					}
					n++
				}
				if err := s.Commit(b.Context(), store.NewBatch()); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(writeBytes(b)-before)/float64(n), "write_bytes/update")
			b.ReportMetric(float64(s.Stats().BytesWritten-stats.BytesWritten)/float64(n), "pages-B/update")
			b.ReportMetric(float64(s.Stats().Commits-stats.Commits), "commits")
		})
	}
}

// writeBytes returns what this process has caused to be written to disk.
func writeBytes(tb testing.TB) int64 {
	tb.Helper()
	data, err := os.ReadFile("/proc/self/io")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			if err != nil {
				tb.Fatal(err)
			}
			return n
		}
	}
	tb.Fatal("no write_bytes in /proc/self/io")
	return 0
}
