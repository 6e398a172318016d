package manager

import (
	"context"
	"crypto"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/internal/heartbeat"
)

const (
	leaseSeconds = 4
	beatEvery    = 400 * time.Millisecond
)

// machine is a node as the cloud knows one: by its lease, its status, and the
// key of its certificate. While its link is up it renews its lease, as the
// node, and carries the heartbeats of others.
type machine struct {
	c     *cluster
	name  string
	uid   types.UID
	cert  []byte
	key   crypto.Signer
	cloud client.Client // as the node

	mu      sync.Mutex // guards the following
	carried []heartbeat.Signed
	carries []*machine
	skew    time.Duration
	stop    chan struct{}
	stopped chan struct{}
}

// machine makes one and lets it live. Its pods tolerate its absence for a
// second and for five minutes.
func (c *cluster) machine(t *testing.T, name, pool string) *machine {
	t.Helper()
	// Kubernetes evicts nobody in a zone where too many nodes are silent.
	zone := pool
	if zone == "" {
		zone = name
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: zone}}}
	if pool != "" {
		node.Labels[apps.NodePoolLabel] = pool
	}
	if err := c.Create(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	cfg, err := c.cp.ClientConfig("system:node:"+name, "system:nodes")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cfg.CertData, cfg.KeyData)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{c: c, name: name, uid: node.UID, cert: pair.Certificate[0], key: pair.PrivateKey.(crypto.Signer)}
	if m.cloud, err = client.New(cfg, client.Options{Scheme: newScheme()}); err != nil {
		t.Fatal(err)
	}
	seconds := int32(leaseSeconds)
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: name},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &name, LeaseDurationSeconds: &seconds, RenewTime: new(metav1.NowMicro())},
	}
	if err := m.cloud.Create(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	m.connect()
	t.Cleanup(m.cut)
	c.condition(t, name, corev1.NodeReady, corev1.ConditionTrue)
	for suffix, tolerates := range map[string]int64{"-brief": 1, "-long": 300} {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name + suffix},
			Spec: corev1.PodSpec{
				NodeName: name, TerminationGracePeriodSeconds: new(int64(0)), AutomountServiceAccountToken: new(false),
				Containers: []corev1.Container{{Name: "c", Image: "none"}},
			},
		}
		for _, key := range []string{corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable} {
			pod.Spec.Tolerations = append(pod.Spec.Tolerations, corev1.Toleration{
				Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &tolerates,
			})
		}
		if err := c.Create(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// connect lets the machine speak to the cloud until it is cut.
func (m *machine) connect() {
	stop, stopped := make(chan struct{}), make(chan struct{})
	m.mu.Lock()
	m.stop, m.stopped = stop, stopped
	m.mu.Unlock()
	go func() { // ends at the cut
		defer close(stopped)
		tick := time.NewTicker(beatEvery)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				_ = m.renew() // the next one comes soon
			}
		}
	}()
}

// cut silences the machine.
func (m *machine) cut() {
	m.mu.Lock()
	stop, stopped := m.stop, m.stopped
	m.stop = nil
	m.mu.Unlock()
	if stop != nil {
		close(stop)
		<-stopped
	}
}

// renew does what kubelet and hub do together.
func (m *machine) renew() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var lease coordinationv1.Lease
	if err := m.cloud.Get(ctx, client.ObjectKey{Namespace: corev1.NamespaceNodeLease, Name: m.name}, &lease); err != nil {
		return err
	}
	m.mu.Lock()
	all, carries, skew := slices.Clone(m.carried), m.carries, m.skew
	m.mu.Unlock()
	for _, other := range carries {
		signed, err := other.beat(nil)
		if err != nil {
			return err
		}
		all = append(all, signed)
	}
	text, err := heartbeat.Join(all)
	if err != nil {
		return err
	}
	if lease.Annotations == nil {
		lease.Annotations = map[string]string{}
	}
	if lease.Annotations[apps.Heartbeats] = text; text == "" {
		delete(lease.Annotations, apps.Heartbeats)
	}
	lease.Spec.RenewTime = new(metav1.NewMicroTime(time.Now().Add(skew)))
	return m.cloud.Update(ctx, &lease)
}

// carry replaces what the machine carries: heartbeats as they are, and new ones
// of others with each renewal.
func (m *machine) carry(signed []heartbeat.Signed, fresh ...*machine) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.carried, m.carries = signed, fresh
}

// beat signs a heartbeat, edited if need be.
func (m *machine) beat(edit func(*heartbeat.Beat)) (heartbeat.Signed, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := heartbeat.Beat{
		Node: m.name, UID: m.uid, Time: metav1.NowMicro(), Renewed: metav1.NewMicroTime(time.Now().Add(m.skew)), Ready: corev1.ConditionTrue,
	}
	if edit != nil {
		edit(&b)
	}
	return heartbeat.Sign(b, [][]byte{m.cert}, m.key)
}

// evicted returns which pods of the machines are gone or going.
func (c *cluster) evicted(t *testing.T, machines ...*machine) []string {
	t.Helper()
	var out []string
	for _, m := range machines {
		for _, suffix := range []string{"-brief", "-long"} {
			var pod corev1.Pod
			err := c.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: m.name + suffix}, &pod)
			if client.IgnoreNotFound(err) != nil {
				t.Fatal(err)
			}
			if err != nil || pod.DeletionTimestamp != nil {
				out = append(out, m.name+suffix)
			}
		}
	}
	return out
}

// awaitEvicted waits until the brief pods of the machines are evicted, and no
// others of them.
func (c *cluster) awaitEvicted(t *testing.T, what string, machines ...*machine) {
	t.Helper()
	var want []string
	for _, m := range machines {
		want = append(want, m.name+"-brief")
	}
	await(t, what, func() error {
		if got := c.evicted(t, machines...); !slices.Equal(got, want) {
			return fmt.Errorf("evicted %v, want %v", got, want)
		}
		return nil
	})
}

// stay fails the test if a pod of the machines was evicted.
func (c *cluster) stay(t *testing.T, when string, machines ...*machine) {
	t.Helper()
	if got := c.evicted(t, machines...); len(got) > 0 {
		t.Fatalf("%s: %v were evicted", when, got)
	}
}

func (c *cluster) awaitReady(t *testing.T, want corev1.ConditionStatus, machines ...*machine) {
	t.Helper()
	for _, m := range machines {
		await(t, m.name+" Ready="+string(want), func() error {
			if got := conditionOf(c.get(t, m.name), corev1.NodeReady); got.Status != want {
				return fmt.Errorf("it is %+v", got)
			}
			return nil
		})
	}
}

func conditionOf(n *corev1.Node, kind corev1.NodeConditionType) (c corev1.NodeCondition) {
	for _, c := range n.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return c
}

func has(n *corev1.Node, key string, effect corev1.TaintEffect) bool {
	return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key && t.Effect == effect })
}

func (c *cluster) lease(t *testing.T, name string) *coordinationv1.Lease {
	t.Helper()
	var l coordinationv1.Lease
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: corev1.NamespaceNodeLease, Name: name}, &l); err != nil {
		t.Fatal(err)
	}
	return &l
}

// metric reads a counter of the first manager.
func (c *cluster) metric(t *testing.T, line string) bool {
	t.Helper()
	token, err := c.cp.Kubectl(t.Context(), "create", "token", "-n", "default", "scraper")
	if err != nil {
		t.Fatal(err)
	}
	req, err := newRequest(t, "https://"+c.managers[0].metrics+"/metrics", strings.TrimSpace(token))
	if err != nil {
		t.Fatal(err)
	}
	http := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: c.bundle(t)}}}
	defer http.CloseIdleConnections()
	resp, err := http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(text), "\n"+line)
}

// TestLinkLossEvictsNobody runs nodes against the stock controllers of
// Kubernetes, whose times are shortened: with the manager down, with it up,
// and with an API server that cannot mutate. That those controllers do evict,
// nodes outside of Edge pools show each time.
func TestLinkLossEvictsNobody(t *testing.T) {
	c, err := startCluster(t.Context(), t, "--node-monitor-grace-period=7s", "--node-monitor-period=500ms", "--node-eviction-rate=10")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.stop)
	edge, cloud := v1beta2.NodePoolSpec{Type: v1beta2.Edge, InterConnectivity: true}, v1beta2.NodePoolSpec{Type: v1beta2.Cloud}
	apart := v1beta2.NodePoolSpec{Type: v1beta2.Edge} // none can vouch for another
	for name, spec := range map[string]v1beta2.NodePoolSpec{"cut": edge, "alone": edge, "site": edge, "apart": apart, "dc": cloud, "dc-new": cloud} {
		if err := c.Create(t.Context(), &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}); err != nil {
			t.Fatal(err)
		}
	}
	cut1, cut2, alone := c.machine(t, "cut-1", "cut"), c.machine(t, "cut-2", "cut"), c.machine(t, "alone-1", "alone")
	leads, dies, linkless := c.machine(t, "site-1", "site"), c.machine(t, "site-2", "site"), c.machine(t, "site-3", "site")
	c.machine(t, "apart-1", "apart")
	unreached := c.machine(t, "apart-2", "apart")
	joins := c.machine(t, "joins-1", "")
	c.machine(t, "dc-1", "dc")
	dc, unseen, poolless := c.machine(t, "dc-2", "dc"), c.machine(t, "dc-new-1", "dc-new"), c.machine(t, "nowhere-1", "nowhere")
	plain, sentinel, sentinel2 := c.machine(t, "plain-1", ""), c.machine(t, "plain-2", ""), c.machine(t, "plain-3", "")
	edges := []*machine{cut1, cut2, alone, dies, linkless, unreached}
	passed := t.Run("the manager is down", func(t *testing.T) {
		c.spares(t, joins.name)
		c.mark(t, dc.name, "dc") // the manager has seen it before
		for _, m := range append(slices.Clone(edges), dc, plain, unseen, poolless) {
			m.cut()
		}
		c.awaitReady(t, corev1.ConditionUnknown, edges...)
		c.awaitEvicted(t, "stock eviction", dc, plain)
		sentinel.cut() // it is evicted more than a grace period later
		c.awaitEvicted(t, "stock eviction, later", sentinel)
		c.stay(t, "cut off, manager down", append(slices.Clone(edges), unseen, poolless)...)
		for _, m := range edges {
			if n := c.get(t, m.name); !has(n, corev1.TaintNodeUnreachable, corev1.TaintEffectNoSchedule) || has(n, corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute) {
				t.Errorf("taints of %s: %v", m.name, n.Spec.Taints)
			}
		}
		if n := c.get(t, plain.name); !has(n, corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute) {
			t.Errorf("taints of %s: %v", plain.name, n.Spec.Taints)
		}
	})
	if !passed {
		return
	}
	passed = t.Run("a node joins with the taint", func(t *testing.T) {
		// Its pods do not tolerate it for long: it must go with the join.
		c.patch(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: joins.name}}, `{"metadata":{"labels":{"apps.openyurt.io/nodepool":"alone"}},
			"spec":{"taints":[{"key":"node.kubernetes.io/unreachable","effect":"NoExecute"},{"key":"mine","effect":"NoSchedule"}]}}`)
		if n := c.get(t, joins.name); has(n, corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute) || !has(n, "mine", corev1.TaintEffectNoSchedule) {
			t.Errorf("taints: %v", n.Spec.Taints)
		}
		c.label(t, joins.name, apps.NodePoolLabel, "")
	})
	if !passed {
		return
	}
	t.Run("the manager is uninstalled", func(t *testing.T) { c.uninstall(t, joins) })
	if err := c.startManagers(1, "--node-monitor-grace-period=5s", "--leader-elect-lease-duration=60s"); err != nil {
		t.Fatal(err)
	}
	leads.carry(nil, linkless)
	passed = t.Run("vouched for and dead", func(t *testing.T) {
		await(t, "vouched for", func() error {
			n, l := c.get(t, linkless.name), c.lease(t, linkless.name)
			v := conditionOf(n, apps.VouchedForCondition)
			if v.Status != corev1.ConditionTrue || !strings.Contains(v.Message, leads.name) || v.LastTransitionTime.IsZero() {
				return fmt.Errorf("condition %+v, lease %v", v, l.Annotations)
			}
			if l.Annotations[apps.DelegateHeartbeat] != "true" || !has(n, apps.UnschedulableTaint, corev1.TaintEffectNoSchedule) {
				return fmt.Errorf("lease %v, taints %v", l.Annotations, n.Spec.Taints)
			}
			return nil
		})
		c.awaitEvicted(t, "stock eviction outside of Edge pools, which the manager has seen now", unseen, poolless)
		c.awaitReady(t, corev1.ConditionTrue, linkless) // by the word that came with the heartbeat
		c.awaitEvicted(t, "death of a node", dies)
		n := c.get(t, dies.name)
		if since := conditionOf(n, corev1.NodeReady).LastTransitionTime; n.Annotations[apps.Dead] != since.UTC().Format(time.RFC3339) {
			t.Errorf("dead %q, want %v", n.Annotations[apps.Dead], since)
		}
		await(t, "event", func() error {
			var list corev1.EventList
			if err := c.List(t.Context(), &list, client.MatchingFields{"reason": "NodeDead"}); err != nil || len(list.Items) == 0 {
				return fmt.Errorf("events %v, %w", list.Items, err)
			}
			if text := list.Items[0].Message; !strings.Contains(text, "site-1 are heard") {
				t.Errorf("event %q", text)
			}
			return nil
		})
		sentinel2.cut()
		c.awaitEvicted(t, "stock eviction", sentinel2)
		c.stay(t, "cut off", cut1, cut2, alone, linkless, unreached)
		if n := c.get(t, linkless.name); conditionOf(n, corev1.NodeReady).Status != corev1.ConditionTrue {
			t.Errorf("the node that is vouched for: %+v", n.Status.Conditions)
		}
		c.stay(t, "alive", leads)
		await(t, "the pool counts it", func() error {
			var p v1beta2.NodePool
			if err := c.Get(t.Context(), client.ObjectKey{Name: "site"}, &p); err != nil || p.Status.VouchedNodeNum != 1 || p.Status.ReadyNodeNum != 2 {
				return fmt.Errorf("status %+v, %w", p.Status, err)
			}
			return nil
		})
	})
	if !passed {
		return
	}
	t.Run("nothing for a lie", func(t *testing.T) { c.lies(t, leads, dies, alone, cut1, linkless) })
	passed = t.Run("back again", func(t *testing.T) {
		leads.carry(nil)
		linkless.connect()
		dies.connect()
		for _, m := range []*machine{linkless, dies} {
			c.condition(t, m.name, corev1.NodeReady, corev1.ConditionTrue)
		}
		await(t, "the node speaks for itself", func() error {
			n, l := c.get(t, linkless.name), c.lease(t, linkless.name)
			if v := conditionOf(n, apps.VouchedForCondition); v.Type != "" || has(n, apps.UnschedulableTaint, corev1.TaintEffectNoSchedule) || l.Annotations[apps.DelegateHeartbeat] != "" {
				return fmt.Errorf("condition %+v, taints %v, lease %v", v, n.Spec.Taints, l.Annotations)
			}
			return nil
		})
		await(t, "the node is not dead", func() error {
			n := c.get(t, dies.name)
			if n.Annotations[apps.Dead] != "" || has(n, corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute) {
				return fmt.Errorf("annotations %v, taints %v", n.Annotations, n.Spec.Taints)
			}
			return nil
		})
	})
	if !passed {
		return
	}
	passed = t.Run("a pool is back but for one", func(t *testing.T) {
		cut1.connect()
		c.condition(t, cut1.name, corev1.NodeReady, corev1.ConditionTrue)
		c.awaitReady(t, corev1.ConditionTrue, cut1)
		c.stay(t, "one of the pool is back", cut1, cut2)
		c.awaitEvicted(t, "the other is found dead", cut2)
		c.stay(t, "the node that is back", cut1)
	})
	if !passed {
		return
	}
	t.Run("hubs of a pool", c.hubsOfAPool)
	t.Run("an API server that cannot mutate", func(t *testing.T) {
		for _, kind := range []string{"mutatingadmissionpolicybinding", "mutatingadmissionpolicy"} {
			if _, err := c.cp.Kubectl(t.Context(), "delete", kind, "yurt-silence-evicts-nobody"); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.applyPolicies(t, "nothing newer"); err != nil {
			t.Fatal(err)
		}
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: linkless.name}}
		taint := client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"taints":[{"key":"node.kubernetes.io/unreachable","effect":"NoExecute"}]}}`))
		await(t, "the taint is refused", func() error {
			if err := c.Patch(t.Context(), node, taint, client.DryRunAll); err == nil || !strings.Contains(err.Error(), "yurt-silence-evicts-nobody") {
				return fmt.Errorf("got %w", err)
			}
			return nil
		})
		c.spares(t, joins.name)
		linkless.cut()
		leads.cut()
		dies.cut()
		c.awaitReady(t, corev1.ConditionUnknown, linkless, leads)
		again := c.machine(t, "plain-4", "")
		again.cut()
		c.awaitEvicted(t, "stock eviction", again)
		c.stay(t, "cut off", linkless, leads, alone)
	})
}

// nodelifecycle is a client of the account that marks nodes.
func (c *cluster) nodelifecycle(t *testing.T) client.Client {
	return c.as(t, "system:serviceaccount:"+namespace+":yurt-manager-node-life-cycle-controller")
}

func (c *cluster) mark(t *testing.T, node, pool string) {
	t.Helper()
	text := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, apps.SilenceEvicts, pool)
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}
	if err := c.nodelifecycle(t).Patch(t.Context(), n, client.RawPatch("application/merge-patch+json", []byte(text))); err != nil {
		t.Fatal(err)
	}
}

// spared reports whether a node keeps free of the taint that evicts, if it is
// written together with its pool and its mark.
func (c *cluster) spared(t *testing.T, node, metadata string) bool {
	t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}
	text := `{"metadata":` + metadata + `,"spec":{"taints":[{"key":"node.kubernetes.io/unreachable","effect":"NoExecute"}]}}`
	err := c.nodelifecycle(t).Patch(t.Context(), n, client.RawPatch("application/merge-patch+json", []byte(text)), client.DryRunAll)
	if err != nil && !strings.Contains(err.Error(), "yurt-silence-evicts-nobody") {
		t.Fatal(err)
	}
	return err != nil || !has(n, corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute)
}

// spares goes through what the API server may find on a node, without a word of
// the manager. The node is in no pool.
func (c *cluster) spares(t *testing.T, node string) {
	t.Helper()
	for what, tc := range map[string]struct {
		pool, mark string
		want       bool
	}{
		"no pool":                         {"", "", false},
		"it has left a Cloud pool":        {"", "dc", false},
		"an Edge pool":                    {"cut", "", true},
		"moved from Cloud to Edge":        {"cut", "dc", true},
		"a Cloud pool":                    {"dc", "dc", false},
		"a Cloud pool, not yet seen":      {"dc", "", true},
		"moved from one Cloud to another": {"dc-new", "dc", true},
		"no such pool":                    {"nowhere", "nowhere", false},
		"no such pool, not yet seen":      {"nowhere", "", true},
	} {
		text := fmt.Sprintf(`{"labels":{%q:%q},"annotations":{%q:%q}}`, apps.NodePoolLabel, tc.pool, apps.SilenceEvicts, tc.mark)
		if got := c.spared(t, node, text); got != tc.want {
			t.Errorf("%s: spared %t, want %t", what, got, tc.want)
		}
	}
}

// TestWhoseSilenceEvicts follows a node, and the pool that it names, through
// what can happen to them.
func TestWhoseSilenceEvicts(t *testing.T) {
	c := theCluster(t)
	c.pool(t, "whose-dc", v1beta2.NodePoolSpec{Type: v1beta2.Cloud})
	c.pool(t, "whose-edge", v1beta2.NodePoolSpec{Type: v1beta2.Edge})
	c.node(t, "whose", "whose-dc", "10.9.7.1")
	is := func(what, mark string) {
		t.Helper()
		await(t, what, func() error {
			if got := c.get(t, "whose").Annotations[apps.SilenceEvicts]; got != mark {
				return fmt.Errorf("mark %q, want %q", got, mark)
			}
			return nil
		})
		if got := c.spared(t, "whose", "{}"); got != (mark == "") {
			t.Errorf("%s: spared %t", what, got)
		}
	}
	is("in a Cloud pool", "whose-dc")
	c.label(t, "whose", apps.NodePoolLabel, "whose-edge")
	if !c.spared(t, "whose", "{}") {
		t.Error("not spared at once when it has moved to an Edge pool")
	}
	is("moved to an Edge pool", "")
	c.label(t, "whose", apps.NodePoolLabel, "whose-dc")
	is("moved to a Cloud pool", "whose-dc")
	c.label(t, "whose", apps.NodePoolLabel, "whose-late")
	is("in a pool that is not there", "whose-late")
	late := c.pool(t, "whose-late", v1beta2.NodePoolSpec{Type: v1beta2.Edge})
	is("in an Edge pool that came later", "")

	// A policy keeps pools with nodes; without it this one would go.
	keep := &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: "yurt-nodepool-in-use"}}
	if err := c.Delete(t.Context(), keep); err != nil {
		t.Fatal(err)
	}
	await(t, "delete a pool in use", func() error { return client.IgnoreNotFound(c.Delete(t.Context(), late)) })
	is("in a pool that is gone", "whose-late")
	if err := c.applyPolicies(t, mutates); err != nil {
		t.Fatal(err)
	}
	c.label(t, "whose", apps.NodePoolLabel, "whose-edge")
	is("in an Edge pool", "")
	await(t, "a pool in use is kept", func() error {
		err := c.Delete(t.Context(), &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: "whose-edge"}}, client.DryRunAll)
		if err == nil || !strings.Contains(err.Error(), "node whose is in pool whose-edge") {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
}

// TestNodesCostTheSameWithManyPools counts what policies evaluate for one write
// of a node, of the kind that Kubernetes makes by the thousand in an outage.
func TestNodesCostTheSameWithManyPools(t *testing.T) {
	c := theCluster(t)
	few := map[string]string{"made-for": "cost"}
	more := func(from, to int) {
		t.Helper()
		for i := from; i < to; i++ {
			p := &v1beta2.NodePool{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("cost-%d", i), Labels: few}}
			if err := c.Create(t.Context(), p); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(func() {
		await(t, "delete pools", func() error {
			return c.DeleteAllOf(context.Background(), &v1beta2.NodePool{}, client.MatchingLabels(few))
		})
	})
	more(0, 5)
	c.node(t, "cost", "cost-0", "10.9.8.1")
	if !c.spared(t, "cost", "{}") {
		t.Error("no policy spares the node")
	}
	before := c.evaluations(t, "cost")
	more(5, 100)
	if after := c.evaluations(t, "cost"); before == 0 || after != before {
		t.Errorf("one write of a node: %d evaluations with 5 pools, %d with 100", before, after)
	}
}

// evaluations returns how many match conditions policies evaluate for a write
// of the node. Others write, too: it is the least of several times.
func (c *cluster) evaluations(t *testing.T, node string) int {
	t.Helper()
	count := func() (sum int) {
		text, err := c.kube.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if !strings.HasPrefix(line, "apiserver_admission_match_condition_evaluation_seconds_count{") {
				continue
			}
			n, err := strconv.Atoi(strings.TrimSpace(line[strings.LastIndexByte(line, ' ')+1:]))
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
		return sum
	}
	least := math.MaxInt
	for range 10 {
		before := count()
		c.spared(t, node, "{}")
		least = min(least, count()-before)
	}
	return least
}

// applyPolicies applies the chart's policies for an API server that serves
// what is named.
func (c *cluster) applyPolicies(t *testing.T, serves string) error {
	for _, o := range renderFor(t, serves, namespace, nil) {
		if strings.Contains(o.GetKind(), "AdmissionPolicy") {
			if err := c.Patch(t.Context(), o, client.Apply, client.FieldOwner("helm"), client.ForceOwnership); err != nil { //nolint:staticcheck // of any kind
				return err
			}
		}
	}
	return nil
}

// lies carries heartbeats that prove nothing. The one that is good and comes
// last shows that all were looked at.
func (c *cluster) lies(t *testing.T, carrier, silent, other, moved, good *machine) {
	if err := c.cp.Apply(t.Context(), scraper); err != nil {
		t.Fatal(err)
	}
	sign := func(m *machine, edit func(*heartbeat.Beat)) heartbeat.Signed {
		s, err := m.beat(edit)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	aged := func(age time.Duration) func(*heartbeat.Beat) {
		return func(b *heartbeat.Beat) { b.Time = metav1.NewMicroTime(b.Time.Add(-age)) }
	}
	edited, stranger := sign(silent, nil), sign(other, nil)
	edited.Beat = []byte(strings.Replace(string(edited.Beat), "True", "False", 1))
	stranger.Certificate = silent.cert
	meant := sign(silent, func(b *heartbeat.Beat) { b.To = other.name })
	before := c.lease(t, silent.name)
	for result, s := range map[string]heartbeat.Signed{
		"forged": stranger, "stale": sign(silent, aged(heartbeat.Good+time.Minute)), "superseded": sign(good, aged(time.Minute)),
		"unknown": sign(silent, func(b *heartbeat.Beat) { b.UID = "of another life" }), "other-pool": sign(other, nil),
	} {
		carrier.carry([]heartbeat.Signed{s, edited, meant}, good)
		await(t, result, func() error {
			if !c.metric(t, fmt.Sprintf("yurt_manager_heartbeats_total{result=%q}", result)) {
				return fmt.Errorf("not counted")
			}
			return nil
		})
	}
	await(t, "the good one goes on", func() error {
		if v := conditionOf(c.get(t, good.name), apps.VouchedForCondition); v.Status != corev1.ConditionTrue {
			return fmt.Errorf("condition %+v", v)
		}
		return nil
	})
	for _, m := range []*machine{silent, other, moved} {
		if l := c.lease(t, m.name); l.Annotations[apps.DelegateHeartbeat] != "" || conditionOf(c.get(t, m.name), apps.VouchedForCondition).Type != "" {
			t.Errorf("%s is vouched for: %v", m.name, l.Annotations)
		}
	}
	if after := c.lease(t, silent.name); after.ResourceVersion != before.ResourceVersion || !maps.Equal(after.Annotations, before.Annotations) {
		t.Errorf("the lease changed: %+v", after)
	}
	await(t, "event", func() error {
		var list corev1.EventList
		if err := c.List(t.Context(), &list, client.MatchingFields{"reason": "HeartbeatRefused"}); err != nil || len(list.Items) == 0 {
			return fmt.Errorf("events %v, %w", list.Items, err)
		}
		return nil
	})
}

// uninstall runs what the guide says for when no manager runs any more.
func (c *cluster) uninstall(t *testing.T, was *machine) {
	guide, err := os.ReadFile("../../docs/guide/pools.md")
	if err != nil {
		t.Fatal(err)
	}
	_, command, ok := strings.Cut(string(guide), "helm uninstall yurt --namespace kube-system\nkubectl ")
	if !ok {
		t.Fatal("the guide does not say how to uninstall")
	}
	command, _, _ = strings.Cut(command, "\n")
	c.patch(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: was.name}},
		`{"spec":{"taints":[{"key":"mine","effect":"NoSchedule"},{"key":"`+apps.UnschedulableTaint+`","effect":"NoSchedule"}]}}`)
	out, err := c.cp.Kubectl(t.Context(), strings.Fields(command)...)
	if n := c.get(t, was.name); has(n, apps.UnschedulableTaint, corev1.TaintEffectNoSchedule) || !has(n, "mine", corev1.TaintEffectNoSchedule) {
		t.Errorf("taints %v after kubectl %s: %s, %v", n.Spec.Taints, command, out, err)
	}
}

// TestOnlyTheManagerCallsANodeDead tries the mark as others.
func TestOnlyTheManagerCallsANodeDead(t *testing.T) {
	c := theCluster(t)
	c.node(t, "marked", "", "10.9.9.1")
	for _, annotation := range []string{apps.Dead, apps.SilenceEvicts} {
		c.onlyTheManagerMarks(t, annotation)
	}
}

func (c *cluster) onlyTheManagerMarks(t *testing.T, annotation string) {
	mark := client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"metadata":{"annotations":{%q:"2026-01-01T00:00:00Z"}}}`, annotation))
	node := func() client.Object { return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "marked"}} }
	for user, who := range map[string]client.Client{
		"an administrator": c.Client, "the node": c.as(t, "system:node:marked", "system:nodes"),
		"another controller": c.as(t, "system:serviceaccount:"+namespace+":yurt-manager-nodepool-controller"),
	} {
		if err := who.Patch(t.Context(), node(), mark, client.DryRunAll); err == nil || !strings.Contains(err.Error(), "written by yurt-manager only") {
			t.Errorf("%s as %s: got %v", annotation, user, err)
		}
	}
	if err := c.nodelifecycle(t).Patch(t.Context(), node(), mark, client.DryRunAll); err != nil {
		t.Errorf("the manager: %v", err)
	}
}
