package pools

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/yurt-edge/yurt/internal/report"
	"github.com/yurt-edge/yurt/test/bed"
)

// TestPool lets a pool of four hubs, two of them leaders, go through what may
// happen to it. Local watchers of all hubs see each change once and in order,
// by a watch that never ends.
func TestPool(t *testing.T) {
	s := newSite(t, "hangzhou", 4)
	s.args = []string{"--pool-grace=3s", "--pool-return=3s"}
	s.elect(t, 2)
	for range s.names() {
		s.write(t)
	}
	all := []int{0, 1, 2, 3}
	for _, i := range all {
		s.start(t, i)
	}
	for _, i := range all {
		s.watch(t, i)
	}
	first, second := s.node(0), s.node(1)
	step := func(name string, run func(t *testing.T)) {
		t.Helper()
		t.Log(name)
		run(t)
		if t.Failed() {
			t.FailNow()
		}
	}

	step("all follow the first leader, which follows the cloud", func(t *testing.T) {
		s.hubs[0].follows(t, "cloud", true)
		for _, i := range all[1:] {
			s.hubs[i].follows(t, first, true)
		}
		s.write(t)
		s.seen(t, all...)
	})
	step("a follower loses its uplink", func(t *testing.T) {
		cut(t, s.hubs[3], bed.Down)
		s.write(t)
		s.seen(t, all...)
		s.hubs[3].follows(t, first, true)
		heal(t, s.hubs[3])
	})
	step("the first leader loses its uplink", func(t *testing.T) {
		cut(t, s.hubs[0], bed.Blackhole)
		s.write(t)
		s.seen(t, all...)
		s.hubs[0].follows(t, second, true)
		s.hubs[1].follows(t, "cloud", true)
		heal(t, s.hubs[0])
		s.write(t)
		s.seen(t, all...)
	})
	step("the first leader is killed", func(t *testing.T) {
		s.hubs[0].follows(t, "cloud", true)
		s.hubs[3].follows(t, first, true)
		s.hubs[0].forget(t)
		s.hubs[0].Kill()
		s.write(t)
		s.seen(t, 1, 2, 3)
		s.hubs[1].follows(t, "cloud", true)
		if err := s.hubs[0].Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.write(t)
		s.seen(t, 1, 2, 3)
		s.watch(t, 0)
	})
	step("a follower cannot reach the first leader, who can reach it", func(t *testing.T) {
		s.hubs[2].follows(t, first, true)
		s.hubs[0].way.set(s.hubs[2].address, true)
		s.write(t)
		s.seen(t, all...)
		s.hubs[2].follows(t, second, true)
		s.hubs[0].way.set(s.hubs[2].address, false)
		s.write(t)
		s.seen(t, all...)
	})
	step("the whole pool is cut off", func(t *testing.T) {
		for _, i := range all {
			cut(t, s.hubs[i], bed.Down)
		}
		for _, i := range all {
			s.hubs[i].offline(t)
		}
		s.write(t)
		s.write(t)
		old := s.hubs[3].age(t)
		await(t, "an answer that says how old it is", func() error {
			if now := s.hubs[3].age(t); now <= old {
				return fmt.Errorf("it was %s old, and is %s", old, now)
			}
			return nil
		})
		heal(t, s.hubs[1]) // the second leader alone
		s.seen(t, all...)
		for _, i := range []int{0, 2, 3} {
			heal(t, s.hubs[i])
		}
	})
	step("a node moves to another pool", func(t *testing.T) {
		other := newSite(t, "other", 0)
		other.status(t, []string{s.node(3)}, nil)
		s.status(t, []string{first, second, s.node(2)}, map[string]string{first: s.hubs[0].wayAddress(), second: s.hubs[1].wayAddress()}, first, second)
		move := []byte(`{"metadata":{"labels":{"apps.openyurt.io/nodepool":"other"}}}`)
		if _, err := shared.admin.CoreV1().Nodes().Patch(t.Context(), s.node(3), types.MergePatchType, move, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		s.hubs[3].follows(t, "cloud", true)
		s.write(t)
		s.seen(t, all...)
		if r, err := report.Ask(t.Context(), s.hubs[3].Dir); err != nil || r.Pool != "other" || len(r.Sharing.Peers) != 0 {
			t.Errorf("it is in pool %q with peers %+v (%v)", r.Pool, r.Sharing.Peers, err)
		}
	})
}

// TestContacts: hubs of a pool without leaders find each other by its contacts.
// One that has lost its link hears the cloud through another, with which it has
// never spoken.
func TestContacts(t *testing.T) {
	s := newSite(t, "contacts", 2)
	s.args = []string{"--pool-grace=3s", "--pool-return=3s"}
	var contacts []map[string]string
	for i, h := range s.hubs {
		contacts = append(contacts, map[string]string{"nodeName": s.node(i), "address": h.address})
	}
	s.patchStatus(t, map[string]any{"nodes": []string{s.node(0), s.node(1)}, "contacts": contacts})
	for range s.names() {
		s.write(t)
	}
	for i := range s.hubs {
		s.start(t, i)
		s.watch(t, i)
		s.hubs[i].follows(t, "cloud", true)
	}
	cut(t, s.hubs[1], bed.Blackhole)
	s.write(t)
	s.seen(t, 0, 1)
	s.hubs[1].follows(t, s.node(0), true)
}

// offline waits until the hub knows that its link is cut.
func (h *hub) offline(t *testing.T) {
	t.Helper()
	await(t, h.Node+" is offline", func() error {
		r, err := report.Ask(t.Context(), h.Dir)
		if err == nil && r.Online {
			err = errors.New("its link is up")
		}
		return err
	})
}

// age is how old the hub says that its answer is.
func (h *hub) age(t *testing.T) time.Duration {
	t.Helper()
	r, err := report.Ask(t.Context(), h.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, scope := range r.Scopes {
		if scope.Scope == "discovery.k8s.io/v1/endpointslices" {
			return time.Since(scope.Contact)
		}
	}
	t.Fatalf("%s does not hold what is shared", h.Node)
	return 0
}

// TestUplink counts what crosses the links of a pool of four, in the first sync
// and while each EndpointSlice changes once, beside what crosses that of a hub
// alone. The hubs have their certificates already, and nothing else.
func TestUplink(t *testing.T) {
	const objects = 1000
	fill(t, objects)
	measure := func(name string, nodes int) (first, all int64) {
		s := newSite(t, name, nodes)
		s.elect(t, 1)
		for i, h := range s.hubs {
			s.start(t, i)
			h.admit(t)
			h.Stop()
			if err := os.RemoveAll(filepath.Join(h.Dir, "store")); err != nil {
				t.Fatal(err)
			}
		}
		for range s.names() {
			s.write(t)
		}
		count := func() (bytes int64) {
			for _, h := range s.hubs {
				up, down := h.link.Bytes()
				bytes += up + down
			}
			return bytes
		}
		before := count()
		var hubs []int
		for i, h := range s.hubs {
			hubs = append(hubs, i)
			if err := h.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.watch(t, i)
		}
		s.write(t)
		s.seen(t, hubs...)
		s.hubs[0].follows(t, "cloud", true)
		for _, h := range s.hubs[1:] {
			h.follows(t, s.node(0), true)
		}
		first = count() - before
		change(t, objects, name)
		s.write(t)
		s.seen(t, hubs...)
		return first, count() - before
	}
	oneFirst, one := measure("lone", 1)
	fourFirst, four := measure("four", 4)
	t.Logf("first sync: one hub %d bytes, four %d, %.3f times as many", oneFirst, fourFirst, float64(fourFirst)/float64(oneFirst))
	t.Logf("with the changes: one hub %d bytes, four %d, %.3f times as many", one, four, float64(four)/float64(one))
	// What a hub asks for itself, at its start: its Node, discovery, handshakes.
	if own := (fourFirst - oneFirst) / 3; own > 150_000 {
		t.Errorf("each further hub takes %d bytes in the first sync", own)
	}
	if float64(four) > 1.1*float64(one) {
		t.Errorf("four hubs of a pool take %d bytes, one alone %d", four, one)
	}
}

// change changes each EndpointSlice that fill made.
func change(t *testing.T, n int, value string) {
	t.Helper()
	todo, ctx := errgroup.WithContext(t.Context())
	todo.SetLimit(16)
	patch := fmt.Sprintf(`{"metadata":{"annotations":{"pools.test/change":%q}}}`, value)
	for i := range n {
		todo.Go(func() error {
			_, err := shared.admin.DiscoveryV1().EndpointSlices("pools").Patch(ctx, fmt.Sprintf("service-%04d", i), types.MergePatchType,
				[]byte(patch), metav1.PatchOptions{})
			return err
		})
	}
	if err := todo.Wait(); err != nil {
		t.Fatal(err)
	}
}

// admit approves the hub's request for a serving certificate, as the manager
// does, and waits until the hub has it.
func (h *hub) admit(t *testing.T) {
	t.Helper()
	requests := shared.admin.CertificatesV1().CertificateSigningRequests()
	await(t, "certificate of "+h.Node, func() error {
		if _, err := os.Stat(filepath.Join(h.Dir, "pki", "hub-server-cluster.pem")); err == nil {
			return nil
		}
		all, err := requests.List(t.Context(), metav1.ListOptions{FieldSelector: "spec.signerName=" + certificatesv1.KubeletServingSignerName})
		if err != nil {
			return err
		}
		for i := range all.Items {
			csr := &all.Items[i]
			if csr.Spec.Username != "system:node:"+h.Node || len(csr.Status.Conditions) > 0 {
				continue
			}
			csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
				Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test",
			})
			if _, err := requests.UpdateApproval(t.Context(), csr.Name, csr, metav1.UpdateOptions{}); err != nil {
				return err
			}
		}
		return errors.New("it has none yet")
	})
}

// fill makes Services and EndpointSlices of 50 endpoints in the cloud.
func fill(t *testing.T, n int) {
	t.Helper()
	todo, ctx := errgroup.WithContext(t.Context())
	todo.SetLimit(16)
	for i := range n {
		todo.Go(func() error {
			name := fmt.Sprintf("service-%04d", i)
			_, err := shared.admin.CoreV1().Services("pools").Create(ctx, &corev1.Service{
				ObjectMeta: metav1.ObjectMeta{Name: name},
				Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
			}, metav1.CreateOptions{})
			if err != nil {
				return err
			}
			slice := &discoveryv1.EndpointSlice{
				ObjectMeta: metav1.ObjectMeta{
					Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name, discoveryv1.LabelManagedBy: "test"},
				},
				AddressType: discoveryv1.AddressTypeIPv4,
				Ports:       []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(8080))}},
			}
			for e := range 50 {
				slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
					Addresses:  []string{fmt.Sprintf("10.%d.%d.%d", i/250, i%250, e)},
					Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true)},
					NodeName:   new(fmt.Sprintf("node-%03d", (7*i+e)%500)),
					TargetRef: &corev1.ObjectReference{
						Kind: "Pod", Namespace: "pools", Name: name + "-" + rand.Text()[:5], UID: uuid.NewUUID(),
					},
				})
			}
			_, err = shared.admin.DiscoveryV1().EndpointSlices("pools").Create(ctx, slice, metav1.CreateOptions{})
			return err
		})
	}
	if err := todo.Wait(); err != nil {
		t.Fatal(err)
	}
}
