package filter

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/store"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

var sliceResource = schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}

// cloud gives one list, and then says nothing.
type cloud []byte

func (c cloud) Node() http.RoundTripper    { return c }
func (c cloud) Bearer() http.RoundTripper  { return c }
func (cloud) WaitUp(context.Context) error { return nil }

func (c cloud) RoundTrip(r *http.Request) (*http.Response, error) {
	resp := &http.Response{
		StatusCode: http.StatusOK, Request: r, Body: io.NopCloser(bytes.NewReader(c)),
		Header: http.Header{"Content-Type": {"application/vnd.kubernetes.protobuf"}},
	}
	if r.URL.Query().Get("watch") != "" {
		resp.Header.Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
		from, to := io.Pipe()
		context.AfterFunc(r.Context(), func() { _ = to.CloseWithError(io.EOF) })
		resp.Body = from
	}
	return resp, nil
}

// pools are the first nodes of 500 that are those of the pool.
var pools = map[string]int{"none": 0, "tenth": 50, "half": 250, "all": 500}

// replicaOf returns a replica that holds so many EndpointSlices of 50 endpoints
// on 500 nodes, each of a Service that keeps to its pool, which has so many of
// the nodes.
func replicaOf(tb testing.TB, slices, pool int) *replica.Replica {
	tb.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	var list discoveryv1.EndpointSliceList
	list.ResourceVersion = "1000000"
	s := &State{
		Version: 1000, Services: &Services{Topology: map[string]string{}},
		Place: &Place{Node: "node-000", Pool: "p", Nodes: map[string]struct{}{}},
	}
	for n := range pool {
		s.Place.Nodes[fmt.Sprintf("node-%03d", n)] = struct{}{}
	}
	ready, name, port := true, "http", int32(8080)
	for i := range slices {
		service := fmt.Sprintf("service-%05d", i)
		s.Services.Topology["bench/"+service] = apps.TopologyPool
		slice := discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "bench", Name: service + "-x", UID: "u", ResourceVersion: fmt.Sprint(i + 1),
				Labels: map[string]string{discoveryv1.LabelServiceName: service, discoveryv1.LabelManagedBy: "bench"},
			},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		}
		for e := range 50 {
			node, zone := fmt.Sprintf("node-%03d", rng.IntN(500)), "zone-a"
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses:  []string{fmt.Sprintf("10.%d.%d.%d", i/250, i%250, e)},
				Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready}, NodeName: &node, Zone: &zone,
			})
		}
		list.Items = append(list.Items, slice)
	}
	data, err := list.Marshal()
	if err != nil {
		tb.Fatal(err)
	}
	st, err := store.Open(tb.Context(), store.Config{Path: tb.TempDir() + "/store", Key: bytes.Repeat([]byte{7}, 32)})
	if err != nil {
		tb.Fatal(err)
	}
	table := New(Config{}, s, nil)
	r, err := replica.New(replica.Config{
		Store: st, Upstream: cloud(wire.AppendObject(nil, wire.Protobuf, "discovery.k8s.io/v1", "EndpointSliceList", data)),
		Online: func() bool { return true }, Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		Filter: func(component string) replica.Filter { return table.Reader(component) },
	})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx); err != nil {
			tb.Error(err)
		}
	}()
	tb.Cleanup(func() {
		cancel()
		<-done
		if err := st.Close(); err != nil {
			tb.Error(err)
		}
	})
	return r
}

// heap is what is alive on it.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// discard is a client that throws away what it gets.
type discard struct {
	header http.Header
	bytes  int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(int)             {}
func (d *discard) Write(b []byte) (int, error) { d.bytes += len(b); return len(b), nil }

// BenchmarkList lists 10 000 EndpointSlices as they are, and as kube-proxy sees
// them, with more or less of the endpoints near.
func BenchmarkList(b *testing.B) {
	for near, pool := range pools {
		b.Run(near, func(b *testing.B) { benchmarkList(b, pool) })
	}
}

func benchmarkList(b *testing.B, pool int) {
	r := replicaOf(b, 10_000, pool)
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	plain, err := r.Open(ctx, replica.Scope{Resource: sliceResource}, replica.Credential{}, "")
	if err != nil {
		b.Fatal(err)
	}
	before := heap()
	seen, err := plain.Through("kube-proxy", "bench")
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("the lens takes %.1f MB", float64(heap()-before)/1e6)
	for _, enc := range []wire.Encoding{wire.Protobuf, wire.JSON} {
		for name, slice := range map[string]*replica.Slice{"plain": plain, "filtered": seen} {
			b.Run(enc.String()+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				req := httptest.NewRequest(http.MethodGet, "/apis/discovery.k8s.io/v1/endpointslices?resourceVersion=0", nil)
				for b.Loop() {
					w := &discard{header: http.Header{}}
					if err := slice.List(w, req, []request.Format{{Encoding: enc}}); err != nil {
						b.Fatal(err)
					}
					b.SetBytes(int64(w.bytes))
				}
			})
		}
	}
}

// processorTime is what the process has used, which others do not disturb as
// they do the time that passes.
func processorTime(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkLook shows 10 000 objects, to filters of the hub and to programs
// that do the same.
func BenchmarkLook(b *testing.B) {
	s := &State{
		Services: &Services{Topology: map[string]string{}},
		Place:    &Place{Node: "node-000", Pool: "p", Nodes: map[string]struct{}{}},
	}
	for n := range 50 {
		s.Place.Nodes[fmt.Sprintf("node-%03d", n)] = struct{}{}
	}
	ready := true
	slices, services := make([][]byte, 10_000), make([][]byte, 10_000)
	for i := range slices {
		service := fmt.Sprintf("service-%05d", i)
		s.Services.Topology["bench/"+service] = apps.TopologyPool
		slice := discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "bench", Name: service + "-x", UID: "u", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		}
		for e := range 50 {
			node := fmt.Sprintf("node-%03d", (7*i+13*e)%500)
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{"10.0.0.1"}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}, NodeName: &node,
			})
		}
		svc := corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "bench", Name: service, UID: "u", Annotations: map[string]string{"a": "b", DiscardService: fmt.Sprint(i%2 == 0)}},
			Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, ClusterIP: "10.0.0.1", Ports: []corev1.ServicePort{{Port: 80}}},
		}
		var err error
		if slices[i], err = slice.Marshal(); err != nil {
			b.Fatal(err)
		}
		if services[i], err = svc.Marshal(); err != nil {
			b.Fatal(err)
		}
	}
	const discard = `drop: >-
  object.metadata.?annotations['svc.openyurt.io/discard'].orValue('') == 'true' && object.spec.type == 'LoadBalancer' ||
  object.metadata.namespace == 'kube-system' && object.metadata.name == 'x-tunnel-server-internal-svc'`
	for _, tc := range []struct {
		name     string
		resource schema.GroupVersionResource
		kind     string
		objects  [][]byte
		builtin  *Filter
		program  string
	}{
		{"topology", slicesV1, "EndpointSlice", slices, serviceTopology(), nearEndpoints},
		{"discard", servicesV1, "Service", services, discardCloudService(), discard},
	} {
		k := replica.Kind{APIVersion: tc.resource.GroupVersion().String(), Kind: tc.kind, Encoding: wire.Protobuf}
		var off []string
		for _, f := range All() {
			if f.Name != tc.builtin.Name {
				off = append(off, f.Name)
			}
		}
		with := *s
		with.Programs = []*Program{program(b, "p", tc.resource, tc.program)}
		readers := []*Reader{
			New(Config{Disabled: off}, s, nil).Reader("kube-proxy"),
			New(Config{Disabled: append(off, tc.builtin.Name)}, &with, nil).Reader("kube-proxy"),
		}
		b.Run(tc.name, func(b *testing.B) {
			var took [2]time.Duration
			for b.Loop() { // in turn, for the machine is not always as quick
				for i, reader := range readers {
					before := processorTime(b)
					for _, object := range tc.objects {
						reader.Show(tc.resource, k, object)
					}
					took[i] += processorTime(b) - before
				}
			}
			for i, name := range []string{"builtin-µs/object", "program-µs/object"} {
				b.ReportMetric(float64(took[i].Nanoseconds())/1000/float64(b.N*len(tc.objects)), name)
			}
			b.ReportMetric(float64(took[1])/float64(took[0]), "×")
		})
		if why := with.Programs[0].Failure(); why != "" {
			b.Errorf("the program fails: %s", why)
		}
	}
}
