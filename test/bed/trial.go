package bed

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/playground"
)

// Trial puts the hub of one node behind a link that falls ill, beside one
// whose link is good, and measures what a kubelet notices.
type Trial struct {
	Good, Ill *Patient
}

// Patient is a hub with its link, and the kubelet that uses it.
type Patient struct {
	Hub  *Hub
	Link *Link

	admin   *kubernetes.Clientset
	kubelet *kubernetes.Clientset
	http    *http.Client
	pod     string
	ill     Illness // from the start
}

const trialNamespace = "default"

// With gives a patient's hub further servers, behind its own link.
func With(mode string, servers ...string) func(*Patient) {
	return func(p *Patient) {
		p.Hub.Args = append(p.Hub.Args, "--server-addr", strings.Join(servers, ","), "--lb-mode", mode)
	}
}

// Over makes the link ill before the hub starts.
func Over(i Illness) func(*Patient) {
	return func(p *Patient) { p.ill = i }
}

// NewPatient starts a hub for a node of its own, with a pod on it.
func NewPatient(ctx context.Context, cloud *playground.ControlPlane, binary, dir, node string, change ...func(*Patient)) (*Patient, error) {
	link, err := NewLoopLink(cloud.RESTConfig().Host) //nolint:contextcheck // it lives until Close
	if err != nil {
		return nil, err
	}
	p := &Patient{Link: link, pod: "on-" + node}
	if err := p.start(ctx, cloud, binary, dir, node, change); err != nil {
		p.Close()
		return nil, fmt.Errorf("hub of %s: %w", node, err)
	}
	return p, nil
}

// Close ends the hub and the link.
func (p *Patient) Close() {
	if p.Hub != nil {
		p.Hub.Kill()
	}
	p.Link.Close()
}

func (p *Patient) start(ctx context.Context, cloud *playground.ControlPlane, binary, dir, node string, change []func(*Patient)) error {
	var err error
	if p.Hub, err = NewHub(ctx, cloud, binary, node, filepath.Join(dir, node), p.Link.URL()); err != nil {
		return err
	}
	p.Hub.Args = []string{"--log-level", "debug"}
	for _, c := range change {
		c(p)
	}
	if p.ill != "" {
		if err := p.Link.Sicken(p.ill); err != nil {
			return err
		}
	}
	if p.admin, err = cloud.Client(); err != nil {
		return err
	}
	if err := p.Hub.Start(ctx); err != nil {
		return err
	}
	cfg, err := p.Hub.KubeletConfig()
	if err != nil {
		return err
	}
	if p.kubelet, err = kubernetes.NewForConfig(cfg); err != nil {
		return err
	}
	if p.http, err = rest.HTTPClientFor(cfg); err != nil {
		return err
	}
	if _, err = p.admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	err = Await(ctx, func(ctx context.Context) error { // its ServiceAccount may be made just now
		_, err := p.admin.CoreV1().Pods(trialNamespace).Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: p.pod},
			Spec: corev1.PodSpec{
				NodeName: node, Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers: []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
			},
		}, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			err = nil
		}
		return err
	})
	if err != nil {
		return err
	}
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: node}}
	if _, err := p.kubelet.CoordinationV1().Leases("kube-node-lease").Create(ctx, lease, metav1.CreateOptions{}); err != nil {
		return err
	}
	// A list from the replica waits until there is one.
	for _, how := range []Reading{ReplicaList, ReplicaGet, LatestGet, LatestList} {
		err := Await(ctx, func(ctx context.Context) error {
			_, _, err := p.Read(ctx, how)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Await repeats try until it succeeds, for at most half a minute.
func Await(ctx context.Context, try func(context.Context) error) error {
	return Within(ctx, 30*time.Second, try)
}

// Within is Await with a patience of its own.
func Within(ctx context.Context, patience time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", patience, err)
		case <-tick.C:
		}
	}
}

// Reading is one way to read what the replica holds.
type Reading string

// The ways to read: from the replica, and the latest.
const (
	ReplicaGet  Reading = "GET rv=0"
	ReplicaList Reading = "LIST rv=0"
	LatestGet   Reading = "GET latest"
	LatestList  Reading = "LIST latest"
)

// Readings are all of them.
func Readings() []Reading { return []Reading{ReplicaGet, ReplicaList, LatestGet, LatestList} }

// Read reads once, and returns how long it took and the warning that came
// with the answer.
func (p *Patient) Read(ctx context.Context, how Reading) (time.Duration, string, error) {
	path := "/api/v1/namespaces/" + trialNamespace + "/pods/" + p.pod + "?"
	if how == ReplicaList || how == LatestList {
		path = "/api/v1/pods?fieldSelector=spec.nodeName%3D" + p.Hub.Node + "&"
	}
	if how == ReplicaGet || how == ReplicaList {
		path += "resourceVersion=0"
	}
	begun := time.Now()
	header, body, err := p.get(ctx, path)
	if err == nil && !bytes.Contains(body, []byte(p.pod)) {
		err = errors.New("the pod is not in the answer")
	}
	if err != nil {
		return 0, "", fmt.Errorf("%s: %w", how, err)
	}
	return time.Since(begun), header.Get("Warning"), nil
}

func (p *Patient) get(ctx context.Context, path string) (http.Header, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.Hub.URL+path, nil)
	if err != nil {
		return nil, nil, err
	}
	resp, err := p.http.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.200s", resp.Status, body)
	}
	return resp.Header, body, err
}

// Forwarded asks for what only the cloud can answer.
func (p *Patient) Forwarded(ctx context.Context) error {
	_, _, err := p.get(ctx, "/readyz")
	return err
}

// Report writes a status of the pod that carries mark, as the kubelet does.
func (p *Patient) Report(ctx context.Context, mark string) error {
	patch := fmt.Sprintf(`{"status":{"phase":"Running","message":%q}}`, mark)
	_, err := p.kubelet.CoreV1().Pods(trialNamespace).Patch(ctx, p.pod, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
	return err
}

// Mark marks the pod in the cloud.
func (p *Patient) Mark(ctx context.Context, mark string) error {
	patch := fmt.Sprintf(`{"metadata":{"annotations":{"mark":%q}}}`, mark)
	_, err := p.admin.CoreV1().Pods(trialNamespace).Patch(ctx, p.pod, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// Renew renews the node's lease as the kubelet does and returns the time that
// it wrote.
func (p *Patient) Renew(ctx context.Context) (time.Time, error) {
	leases := p.kubelet.CoordinationV1().Leases("kube-node-lease")
	lease, err := leases.Get(ctx, p.Hub.Node, metav1.GetOptions{})
	if err != nil {
		return time.Time{}, err
	}
	now := metav1.NowMicro()
	lease.Spec.RenewTime = &now
	_, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
	return now.Truncate(time.Microsecond), err
}

// Renewed is when the lease was last renewed as the cloud knows it.
func (p *Patient) Renewed(ctx context.Context) (time.Time, error) {
	lease, err := p.admin.CoordinationV1().Leases("kube-node-lease").Get(ctx, p.Hub.Node, metav1.GetOptions{})
	if err != nil || lease.Spec.RenewTime == nil {
		return time.Time{}, err
	}
	return lease.Spec.RenewTime.Time, nil
}

// Logged is how often the hub has logged text.
func (p *Patient) Logged(text string) (int, error) {
	log, err := os.ReadFile(filepath.Join(p.Hub.Dir, "hub.log"))
	if err != nil {
		return 0, fmt.Errorf("read the hub's log: %w", err)
	}
	return bytes.Count(log, []byte(text)), nil
}

// Turns is how often the hub has called its link up or down.
func (p *Patient) Turns() (int, error) {
	up, err := p.Logged("link is up")
	down, err2 := p.Logged("link is down")
	return up + down, errors.Join(err, err2)
}

// Watcher sees the pod through the hub.
type Watcher struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex // guards the following
	seen    []byte
	changed chan struct{}
}

// Watch starts to watch the pod.
func (p *Patient) Watch(ctx context.Context) (*Watcher, error) {
	ctx, cancel := context.WithCancel(ctx)
	path := p.Hub.URL + "/api/v1/pods?watch=true&fieldSelector=spec.nodeName%3D" + p.Hub.Node
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, path, nil)
	if err != nil {
		cancel()
		return nil, err
	}
	resp, err := p.http.Do(req) //nolint:bodyclose // the goroutine below closes it
	if err != nil {
		cancel()
		return nil, err
	}
	w := &Watcher{cancel: cancel, done: make(chan struct{}), changed: make(chan struct{})}
	go func() { // ends with the stream or with Close
		defer close(w.done)
		defer resp.Body.Close()
		for lines := bufio.NewReader(resp.Body); ; {
			line, err := lines.ReadBytes('\n')
			if err != nil {
				return
			}
			w.mu.Lock()
			w.seen = line
			close(w.changed)
			w.changed = make(chan struct{})
			w.mu.Unlock()
		}
	}()
	return w, nil
}

// Close ends the watch.
func (w *Watcher) Close() {
	w.cancel()
	<-w.done
}

// Sees returns once the watcher sees mark in the pod. It fails when the stream
// ends.
func (w *Watcher) Sees(ctx context.Context, mark string) error {
	for {
		w.mu.Lock()
		seen, changed := bytes.Contains(w.seen, []byte(strconv.Quote(mark))), w.changed
		w.mu.Unlock()
		if seen {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("watch: %s is not seen: %w", mark, context.Cause(ctx))
		case <-w.done:
			return fmt.Errorf("watch ended before %s was seen", mark)
		case <-changed:
		}
	}
}

// Times are the latencies of one kind of request.
type Times []time.Duration

// Quantile sorts the times.
func (t Times) Quantile(q float64) time.Duration {
	if len(t) == 0 {
		return 0
	}
	slices.Sort(t)
	return t[int(q*float64(len(t)-1)+0.5)]
}

// Outcome is what a trial has found.
type Outcome struct {
	Good, Ill map[Reading]Times
	// Status is how long after the kubelet reported a status a local watcher
	// saw it, while the link was ill.
	Status Times
	// Lease is how long after the kubelet renewed its lease the cloud knew,
	// while the link was ill. Zero if it did not have to.
	Lease time.Duration
	// Turns is how often the link went up or down, with the return.
	Turns int
	// Forwarded is when, after the link was well again, the first request was
	// forwarded; CaughtUp when a watcher had what it missed.
	Forwarded, CaughtUp time.Duration
}

// Run makes the link ill for at least d and measures.
func (t *Trial) Run(ctx context.Context, i Illness, d time.Duration) (*Outcome, error) {
	out := &Outcome{Good: map[Reading]Times{}, Ill: map[Reading]Times{}}
	w, err := t.Ill.Watch(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	before, err := t.Ill.Turns()
	if err != nil {
		return nil, err
	}
	if err := t.Ill.Link.Sicken(i); err != nil {
		return nil, err
	}
	if err := t.Ill.Mark(ctx, "missed"); err != nil {
		return nil, err
	}
	if err := t.read(ctx, d, out); err != nil {
		return nil, err
	}
	if err := t.write(ctx, i, w, out); err != nil {
		return nil, err
	}
	if err := t.Ill.Link.Heal(); err != nil {
		return nil, err
	}
	well := time.Now()
	caught := make(chan error, 1)
	const patience = 40 * time.Second
	waiting, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("waited %s", patience))
	defer cancel()
	go func() { // ends with waiting
		// The status came last, so that it is in the last event whatever
		// the annotation; both are the cloud's when it is no overlay.
		err := w.Sees(waiting, "missed")
		out.CaughtUp = time.Since(well)
		caught <- err
	}()
	err = Await(waiting, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		return t.Ill.Forwarded(ctx)
	})
	out.Forwarded = time.Since(well)
	if err = errors.Join(err, <-caught); err != nil {
		return nil, err
	}
	after, err := t.Ill.Turns()
	out.Turns = after - before
	return out, err
}

// read reads by turns through both hubs, in all ways.
func (t *Trial) read(ctx context.Context, d time.Duration, out *Outcome) error {
	tick := time.NewTicker(15 * time.Millisecond)
	defer tick.Stop()
	reads, warned, last := 0, 0, ""
	for end := time.Now().Add(d); time.Now().Before(end); {
		for _, how := range Readings() {
			took, warning, err := t.Good.Read(ctx, how)
			if err != nil {
				return err
			}
			if warning == "" {
				out.Good[how] = append(out.Good[how], took)
			} else {
				warned, last = warned+1, fmt.Sprintf("%s: %s", how, warning)
			}
			reads++
			if took, _, err = t.Ill.Read(ctx, how); err != nil {
				return err
			}
			out.Ill[how] = append(out.Ill[how], took)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	// A machine that is busy makes a good link slow for a second or two.
	if warned > reads/2 {
		return fmt.Errorf("%d of %d reads over a good link were old ones, the last was %s", warned, reads, last)
	}
	return nil
}

// write reports statuses, and renews the lease, while the link is ill.
func (t *Trial) write(ctx context.Context, i Illness, w *Watcher, out *Outcome) error {
	const statuses, patience = 10, 40 * time.Second
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("waited %s", patience))
	defer cancel()
	for n := range statuses {
		mark := fmt.Sprintf("status %d", n)
		begun := time.Now()
		if err := t.Ill.Report(ctx, mark); err != nil {
			return fmt.Errorf("report status: %w", err)
		}
		if err := w.Sees(ctx, mark); err != nil {
			return err
		}
		out.Status = append(out.Status, time.Since(begun))
	}
	begun := time.Now()
	wrote, err := t.Ill.Renew(ctx)
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	if !i.Works() {
		return nil
	}
	err = Await(ctx, func(ctx context.Context) error {
		at, err := t.Ill.Renewed(ctx)
		if err == nil && at.Before(wrote) {
			err = fmt.Errorf("in the cloud the lease was renewed at %s, here at %s", at, wrote)
		}
		return err
	})
	out.Lease = time.Since(begun)
	return err
}
