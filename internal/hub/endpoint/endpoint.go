// Package endpoint lets the endpoints of a node's own pods, and of pods on nodes
// of its pool that can be asked, follow these pods while the cloud, whose
// controllers keep them otherwise, is away. After a
// machine has lost its power while it was cut off its pods have new addresses,
// and a Service that led to the old ones would be dead until the link is back.
//
// What counts is the kubelet's own word: what it last wrote of a pod's
// addresses and readiness, here or, as its hub tells, there. Local readers see it in EndpointSlices, and in v1
// Endpoints, as an overlay on the replica. It begins when the link goes down
// and ends some time after it is back, once the cloud shows the same: until
// then the cloud knows the pods by their old addresses, or takes them for not
// ready because their node was silent.
//
// Only objects that the controllers of Kubernetes make are touched, and in
// them only the endpoints that name a pod of the node whose word it is. Everything else,
// fields that are not known here too, stays as the cloud has it.
package endpoint

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	// grace is how long the overlay stays at least once the link is up and
	// all is delivered: a kubelet looks every ten seconds whether the cloud
	// has its pods' status as it should be.
	grace = 15 * time.Second
	// lag is how long it stays at most while the cloud shows something else.
	lag = 2 * time.Minute
	// most is how long it stays at most after the link is back, though some
	// status cannot be delivered.
	most = 10 * time.Minute
	// checkEvery is how often it is looked whether it can end.
	checkEvery = 5 * time.Second
	// Good is how long the word of another node's hub holds. A node that is gone is
	// what the cloud says of it after that.
	Good = 20 * time.Second
)

var (
	servicesResource = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	// resources are what holds endpoints.
	resources = []schema.GroupVersionResource{
		{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
		{Version: "v1", Resource: "endpoints"},
	}
)

// Config is what a Tracker needs.
type Config struct {
	Node string
	// Online is the state of the link, and Changed is closed when it changes.
	Online  func() bool
	Changed func() <-chan struct{}
	// Pending reports whether statuses of pods wait to be delivered.
	Pending func() bool
	// Each calls fn for every object that the replica holds of a resource, in
	// one namespace or, if it is empty, in all; for pods it may be more than
	// this node's. The data is valid until fn returns.
	Each func(r schema.GroupVersionResource, namespace string, fn func(key string, k replica.Kind, data []byte) error) error
	// Refresh is called after the overlay of an object changed.
	Refresh    func(r schema.GroupVersionResource, namespace, name string) error
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Pod is what a kubelet says of a pod, as far as endpoints are concerned.
type Pod struct {
	UID       string   `json:"uid"`
	Addresses []string `json:"addresses,omitempty"`
	Ready     bool     `json:"ready,omitempty"`
	Ended     bool     `json:"ended,omitempty"` // all its containers have ended for good
}

// Word is what the hub of another node said of its pods.
type Word struct {
	Pods map[string]Pod
	At   time.Time
}

func (p Pod) equal(q Pod) bool {
	return p.UID == q.UID && p.Ready == q.Ready && p.Ended == q.Ended && slices.Equal(p.Addresses, q.Addresses)
}

// object names an object that holds endpoints.
type object struct {
	resource schema.GroupVersionResource
	key      string
}

// Tracker knows the node's pods while the cloud does not. Its methods are safe
// for concurrent use.
type Tracker struct {
	cfg    Config
	active atomic.Bool // whether pods are tracked: else nothing costs anything

	indexing sync.Mutex // held over a scan of the replica; taken before mu

	mu      sync.Mutex // guards the following
	pods    map[string]Pod
	words   map[string]Word                // by node; none without pods
	mention map[string]map[object]struct{} // the objects that mention a pod, by its key
	indexed map[string]bool                // namespaces whose objects are all in mention
	publish map[string]bool                // Services that publish what is not ready, by key
	edited  map[object]struct{}            // shown otherwise than the cloud has them
	up      time.Time                      // since when the link is up; zero: it is down
	quiet   time.Time                      // since when, besides, nothing waits to be delivered
}

// New returns a tracker of no pods.
func New(cfg Config) *Tracker {
	t := &Tracker{cfg: cfg}
	t.resetLocked()
	cfg.Registerer.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "node_yurthub_endpoints_overlaid",
		Help: "Objects whose endpoints follow the pods of this node or of its pool while the cloud shows something else.",
	}, func() float64 {
		t.mu.Lock()
		defer t.mu.Unlock()
		return float64(len(t.edited))
	}))
	return t
}

func (t *Tracker) resetLocked() {
	t.pods, t.mention, t.indexed = map[string]Pod{}, map[string]map[object]struct{}{}, map[string]bool{}
	t.words = map[string]Word{}
	t.publish, t.edited = map[string]bool{}, map[object]struct{}{}
	t.up, t.quiet = time.Time{}, time.Time{}
	t.active.Store(false)
}

// Active reports whether the tracker wants to know what the kubelet writes
// while the link is up.
func (t *Tracker) Active() bool { return t.active.Load() }

// Run tracks the node's pods while the link is down and some time longer,
// until ctx ends.
func (t *Tracker) Run(ctx context.Context) error {
	for {
		changed := t.cfg.Changed()
		online := t.cfg.Online()
		if !online {
			t.Hold()
		}
		var check <-chan time.Time
		if online && t.Active() {
			t.mu.Lock()
			if t.up.IsZero() {
				t.up = time.Now()
			}
			t.mu.Unlock()
			check = time.After(checkEvery)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-check:
			t.release()
		}
	}
}

// Hold takes the pods as the replica shows them for what the kubelet says. It
// must be called when the cloud went away, and after a start without it before
// anybody reads.
func (t *Tracker) Hold() {
	held, err := t.localPods()
	if err != nil {
		t.cfg.Log.Warn("pods not read", "err", err)
		return
	}
	t.mu.Lock()
	t.up, t.quiet = time.Time{}, time.Time{}
	t.active.Store(true) // without pods of its own too: others have some
	var news []string
	for key, pod := range held {
		// What the kubelet wrote since is newer, or the same.
		if old, ok := t.pods[key]; !ok || old.UID != pod.UID {
			t.pods[key] = pod
			news = append(news, key)
		}
	}
	for key := range t.pods {
		if _, ok := held[key]; !ok {
			delete(t.pods, key)
		}
	}
	t.mu.Unlock()
	t.show(news...)
}

// Own is what the hubs of other nodes are told: what the kubelet says of the
// pods that endpoints mention, which every node may read. It is nothing while
// the cloud's word is good.
func (t *Tracker) Own() map[string]Pod {
	out := map[string]Pod{}
	if !t.Active() {
		return out
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, pod := range t.pods {
		if len(t.mention[key]) > 0 {
			out[key] = pod
		}
	}
	return out
}

// Hear takes what the hubs of other nodes said of their pods, by node. It must be
// called again and again: a word that is older than [Good] is none.
func (t *Tracker) Hear(said map[string]Word) {
	t.indexing.Lock()
	t.mu.Lock()
	if !t.Active() {
		t.mu.Unlock()
		t.indexing.Unlock()
		return
	}
	next := maps.Clone(t.words)
	for node, w := range said {
		if _, ok := t.words[node]; !ok && len(w.Pods) > 0 {
			t.indexed = map[string]bool{} // its pods were not looked for
		}
		next[node] = w
	}
	maps.DeleteFunc(next, func(_ string, w Word) bool { return len(w.Pods) == 0 || time.Since(w.At) > Good })
	var news []string
	for _, diff := range [][2]map[string]Word{{t.words, next}, {next, t.words}} {
		for node, w := range diff[0] {
			for key, pod := range w.Pods {
				if other, ok := diff[1][node].Pods[key]; !ok || !other.equal(pod) {
					news = append(news, key)
				}
			}
		}
	}
	t.words = next
	t.mu.Unlock()
	t.indexing.Unlock()
	t.show(news...)
}

// localPods are the pods of this node as local readers see them.
func (t *Tracker) localPods() (map[string]Pod, error) {
	held := map[string]Pod{}
	podsResource := schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	err := t.cfg.Each(podsResource, "", func(key string, k replica.Kind, data []byte) error {
		meta, err := wire.ReadMeta(k.Encoding, data, true)
		if err != nil || meta.NodeName != t.cfg.Node {
			return nil //nolint:nilerr // what cannot be read is nobody's pod
		}
		pod, err := decodePod(k.Encoding, data)
		if err == nil {
			held[key] = podOf(pod)
		}
		return err
	})
	return held, err
}

// Wrote tells what the kubelet made of a pod: the object's data after a write
// of its status that was acknowledged.
func (t *Tracker) Wrote(enc wire.Encoding, data []byte) {
	object, err := decodePod(enc, data)
	if err != nil {
		t.cfg.Log.Warn("pod not read", "err", err)
		return
	}
	pod, key := podOf(object), object.Namespace+"/"+object.Name
	t.mu.Lock()
	old, known := t.pods[key]
	t.pods[key] = pod
	t.active.Store(true)
	t.mu.Unlock()
	if !known || !old.equal(pod) {
		t.show(key)
	}
}

func decodePod(enc wire.Encoding, data []byte) (*corev1.Pod, error) {
	pod := &corev1.Pod{}
	var err error
	if enc == wire.JSON {
		err = json.Unmarshal(data, pod)
	} else {
		err = pod.Unmarshal(data)
	}
	if err != nil {
		return nil, fmt.Errorf("read pod: %w", err)
	}
	return pod, nil
}

func podOf(object *corev1.Pod) Pod {
	status := &object.Status
	pod := Pod{
		UID:   string(object.UID),
		Ended: status.Phase == corev1.PodSucceeded || status.Phase == corev1.PodFailed,
	}
	for _, ip := range status.PodIPs {
		pod.Addresses = append(pod.Addresses, ip.IP)
	}
	if len(pod.Addresses) == 0 && status.PodIP != "" {
		pod.Addresses = []string{status.PodIP}
	}
	for _, c := range status.Conditions {
		if c.Type == corev1.PodReady {
			pod.Ready = c.Status == corev1.ConditionTrue
		}
	}
	return pod
}

// show brings the objects that mention the pods up to date.
func (t *Tracker) show(keys ...string) {
	for _, key := range keys {
		namespace, _ := replica.SplitKey(key)
		t.index(namespace)
	}
	t.mu.Lock()
	wanted := map[object]struct{}{}
	for _, key := range keys {
		for o := range t.mention[key] {
			wanted[o] = struct{}{}
		}
	}
	t.mu.Unlock()
	for o := range wanted {
		t.refresh(o)
	}
}

func (t *Tracker) refresh(o object) {
	namespace, name := replica.SplitKey(o.key)
	if err := t.cfg.Refresh(o.resource, namespace, name); err != nil {
		t.cfg.Log.Warn("endpoints not refreshed", "object", o.resource.Resource+"/"+o.key, "err", err)
	}
}

// index reads the endpoints of a namespace once per outage. What comes later
// passes Overlay.
func (t *Tracker) index(namespace string) {
	t.indexing.Lock()
	defer t.indexing.Unlock()
	t.mu.Lock()
	done := t.indexed[namespace]
	t.mu.Unlock()
	if done {
		return
	}
	err := t.cfg.Each(servicesResource, namespace, func(key string, k replica.Kind, data []byte) error {
		if publishes(k.Encoding, data) {
			t.mu.Lock()
			t.publish[key] = true
			t.mu.Unlock()
		}
		return nil
	})
	for _, r := range resources {
		if err != nil {
			break
		}
		err = t.cfg.Each(r, namespace, func(key string, k replica.Kind, data []byte) error {
			t.mu.Lock()
			defer t.mu.Unlock()
			if !t.concernsLocked(data) {
				return nil
			}
			return t.learnLocked(object{r, key}, k.Encoding, data)
		})
	}
	if err != nil {
		// A set that is damaged is fetched anew, and passes Overlay then.
		t.cfg.Log.Warn("endpoints not read", "namespace", namespace, "err", err)
	}
	t.mu.Lock()
	t.indexed[namespace] = true
	t.mu.Unlock()
}

// publishes reads spec.publishNotReadyAddresses of a Service.
func publishes(enc wire.Encoding, data []byte) bool {
	service := &corev1.Service{}
	if enc == wire.JSON {
		return json.Unmarshal(data, service) == nil && service.Spec.PublishNotReadyAddresses
	}
	return service.Unmarshal(data) == nil && service.Spec.PublishNotReadyAddresses
}

// concernsLocked reports whether an object may name a node whose pods are known.
func (t *Tracker) concernsLocked(data []byte) bool {
	return len(t.words) > 0 || bytes.Contains(data, []byte(t.cfg.Node))
}

// learnLocked takes note of the pods that an object mentions.
func (t *Tracker) learnLocked(o object, enc wire.Encoding, data []byte) error {
	e := editor{change: func(p point, _ discoveryv1.AddressType) point {
		t.noteLocked(o, p)
		return p
	}}
	_, err := e.edit(o.resource, enc, data)
	return err
}

// noteLocked takes note of the pod that an endpoint of the object names, and
// returns what is known of it: by the word of its own node only.
func (t *Tracker) noteLocked(o object, p point) (Pod, bool) {
	pods := t.pods
	if p.node != t.cfg.Node {
		pods = t.words[p.node].Pods
	}
	if p.kind != "Pod" || pods == nil {
		return Pod{}, false
	}
	key := p.namespace + "/" + p.name
	if t.mention[key] == nil {
		t.mention[key] = map[object]struct{}{}
	}
	t.mention[key][o] = struct{}{}
	pod, ok := pods[key]
	return pod, ok
}

// Holds reports whether Overlay may have a word on objects of the resource.
func Holds(r schema.GroupVersionResource) bool { return slices.Contains(resources, r) }

// Overlay is the replica's OverlayFunc for what Holds names.
func (t *Tracker) Overlay(r schema.GroupVersionResource, key string, k replica.Kind, base []byte) ([]byte, bool) {
	if !t.Active() {
		return nil, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	o := object{r, key}
	delete(t.edited, o)
	if !t.concernsLocked(base) {
		return nil, false
	}
	meta, err := wire.ReadMeta(k.Encoding, base, false)
	if err != nil || !ofController(r, meta.Labels) {
		return nil, false
	}
	service := meta.Name
	if r.Resource != "endpoints" {
		service = meta.Labels[discoveryv1.LabelServiceName]
	}
	publish := t.publish[meta.Namespace+"/"+service]
	e := editor{change: func(p point, family discoveryv1.AddressType) point {
		pod, ok := t.noteLocked(o, p)
		if !ok || (p.uid != "" && p.uid != pod.UID) {
			return p
		}
		return p.follow(pod, family, publish)
	}}
	shown, err := e.edit(r, k.Encoding, base)
	if err != nil || !e.changed {
		return nil, false
	}
	t.edited[o] = struct{}{}
	return shown, true
}

// ofController tells the objects that the controllers of Kubernetes make of a
// Service's pods. Others may lead to other addresses of the same pods.
func ofController(r schema.GroupVersionResource, labels map[string]string) bool {
	if r.Resource == "endpoints" {
		return true // older clusters do not say who made them
	}
	switch labels[discoveryv1.LabelManagedBy] {
	case "endpointslice-controller.k8s.io", "endpointslicemirroring-controller.k8s.io":
		return true
	}
	return false
}

// release ends the overlay when it has done its work: the cloud shows the same
// by itself, so that nobody sees it end; or does not within a bounded time.
func (t *Tracker) release() {
	pending := t.cfg.Pending()
	t.mu.Lock()
	now := time.Now()
	switch {
	case t.up.IsZero():
		t.mu.Unlock()
		return // the link went down meanwhile
	case pending:
		t.quiet = time.Time{}
	case t.quiet.IsZero():
		t.quiet = now
	}
	settled := !t.quiet.IsZero() && now.Sub(t.quiet) >= grace && (len(t.edited) == 0 || now.Sub(t.quiet) >= lag)
	if !settled && now.Sub(t.up) < most {
		t.mu.Unlock()
		return
	}
	late := t.edited
	t.resetLocked()
	t.mu.Unlock()
	for o := range late {
		t.cfg.Log.Warn("the cloud shows other endpoints than the kubelet's pods have", "object", o.resource.Resource+"/"+o.key)
		t.refresh(o)
	}
}
