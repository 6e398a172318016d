package replica

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

var (
	configMaps = Scope{Resource: schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}}
	pods       = Scope{Resource: schema.GroupVersionResource{Version: "v1", Resource: "pods"}}
	widgets    = Scope{Resource: schema.GroupVersionResource{Group: "example.com", Version: "v1", Resource: "widgets"}}
)

// thing is an object of the cloud at one version.
type thing struct {
	resource        string
	namespace, name string
	uid             string
	version         uint64
	labels          map[string]string
	value           string // a pod's is "NODE" or "NODE PHASE"
}

// pod returns what the value says of a pod.
func (th *thing) pod() (node, phase string) {
	node, phase, _ = strings.Cut(th.value, " ")
	return node, phase
}

func (th *thing) key() string { return th.resource + "|" + keyOf(th.namespace, th.name) }

// at returns the object with another version.
func (th *thing) at(version uint64) *thing {
	other := *th
	other.version = version
	return &other
}

func (th *thing) meta() metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: th.namespace, Name: th.name, UID: types.UID(th.uid), Labels: th.labels,
		ResourceVersion: strconv.FormatUint(th.version, 10),
	}
}

// data is the object in the encoding that the API server has for it.
func (th *thing) data(t testing.TB) []byte {
	t.Helper()
	var (
		out []byte
		err error
	)
	switch th.resource {
	case "configmaps":
		out, err = (&corev1.ConfigMap{ObjectMeta: th.meta(), Data: map[string]string{"value": th.value}}).Marshal()
	case "pods":
		node, phase := th.pod()
		out, err = (&corev1.Pod{
			ObjectMeta: th.meta(), Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: corev1.PodPhase(phase)},
		}).Marshal()
	default:
		out, err = json.Marshal(map[string]any{
			"apiVersion": "example.com/v1", "kind": "Widget", "metadata": th.meta(), "spec": map[string]string{"value": th.value},
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func kindOf(resource string) Kind {
	switch resource {
	case "configmaps":
		return Kind{APIVersion: "v1", Kind: "ConfigMap", Encoding: wire.Protobuf}
	case "pods":
		return Kind{APIVersion: "v1", Kind: "Pod", Encoding: wire.Protobuf}
	}
	return Kind{APIVersion: "example.com/v1", Kind: "Widget", Encoding: wire.JSON}
}

// change of the cloud's history. after is nil for a deletion.
type record struct {
	version       uint64
	before, after *thing
}

// fault is what goes wrong with one request.
type fault struct {
	status int // answered instead
	header http.Header
	body   string
	hang   bool // until the client gives up
	err    error
	cut    int // the answer breaks off after that many bytes
}

// cloud is a small API server in memory. It is an Upstream.
type cloud struct {
	t testing.TB

	mu        sync.Mutex // guards all below
	version   uint64
	objects   map[string]*thing
	history   []record
	compacted uint64
	changed   chan struct{} // closed at every change
	cuts      chan struct{} // closed to break all watches
	ends      chan struct{} // closed to end all watches in good order
	up        chan struct{} // closed while the link is up
	mute      bool          // no bookmarks
	fault     func(kind string, n int, token string) *fault
	asked     int
	lists     int // first pages
	watches   int
	continued map[string][]*thing // by token: what the next pages hold
}

func newCloud(t testing.TB) *cloud {
	up := make(chan struct{})
	close(up)
	return &cloud{
		t: t, version: 100, objects: map[string]*thing{}, changed: make(chan struct{}), cuts: make(chan struct{}),
		ends: make(chan struct{}), up: up, continued: map[string][]*thing{},
	}
}

func (c *cloud) Node() http.RoundTripper   { return roundTripper(c.answer) }
func (c *cloud) Bearer() http.RoundTripper { return roundTripper(c.answer) }

type roundTripper func(*http.Request) (*http.Response, error)

func (rt roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return rt(r) }

func (c *cloud) WaitUp(ctx context.Context) error {
	for {
		c.mu.Lock()
		up := c.up
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-up:
			return nil
		}
	}
}

func (c *cloud) online() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.up:
		return true
	default:
		return false
	}
}

// cut breaks the link until heal.
func (c *cloud) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.up:
		c.up = make(chan struct{})
	default:
	}
	close(c.cuts)
	c.cuts = make(chan struct{})
}

func (c *cloud) heal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.up:
	default:
		close(c.up)
	}
}

// endWatches ends all watches in good order, as a watch's time-out does.
func (c *cloud) endWatches() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.ends)
	c.ends = make(chan struct{})
}

func (c *cloud) compact() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.compacted = c.version
}

func (c *cloud) at() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.version
}

func (c *cloud) counts() (lists, watches int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lists, c.watches
}

func (c *cloud) setFault(f func(kind string, n int, token string) *fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault, c.asked = f, 0
}

// put makes or changes an object and returns its version.
func (c *cloud) put(resource, namespace, name, value string, l map[string]string) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version++
	th := &thing{resource: resource, namespace: namespace, name: name, version: c.version, labels: maps.Clone(l), value: value}
	old := c.objects[th.key()]
	th.uid = fmt.Sprintf("uid-%d", c.version)
	if old != nil {
		th.uid = old.uid
	}
	c.objects[th.key()] = th
	c.recordLocked(record{c.version, old, th})
	return c.version
}

func (c *cloud) remove(resource, namespace, name string) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := resource + "|" + keyOf(namespace, name)
	old := c.objects[key]
	if old == nil {
		return c.version
	}
	c.version++
	delete(c.objects, key)
	c.recordLocked(record{c.version, old, nil})
	return c.version
}

func (c *cloud) recordLocked(r record) {
	c.history = append(c.history, r)
	close(c.changed)
	c.changed = make(chan struct{})
}

// rewind restores the cloud to an older version, as from a backup.
func (c *cloud) rewind(version uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects = c.stateLocked(version)
	c.version = version
	c.history = slices.DeleteFunc(c.history, func(r record) bool { return r.version > version })
	close(c.cuts)
	c.cuts = make(chan struct{})
}

// state returns the objects of a scope at a version, by key.
func (c *cloud) state(scope Scope, version uint64) map[string]*thing {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]*thing{}
	for _, th := range c.stateLocked(version) {
		if selects(scope, th) {
			out[keyOf(th.namespace, th.name)] = th
		}
	}
	return out
}

func (c *cloud) stateLocked(version uint64) map[string]*thing {
	out := map[string]*thing{}
	for _, r := range c.history {
		if r.version > version {
			break
		}
		if r.after == nil {
			delete(out, r.before.key())
		} else {
			out[r.after.key()] = r.after
		}
	}
	return out
}

// selects is the cloud's own idea of which objects a scope holds.
func selects(s Scope, th *thing) bool {
	if th == nil || s.Resource.Resource != th.resource || (s.Namespace != "" && s.Namespace != th.namespace) {
		return false
	}
	if sel, err := labels.Parse(s.Labels); err != nil || !sel.Matches(labels.Set(th.labels)) {
		return false
	}
	for term := range strings.SplitSeq(s.Fields, ",") {
		if term == "" {
			continue
		}
		field, value, differs := strings.Cut(term, "!=")
		if !differs {
			field, value, _ = strings.Cut(strings.Replace(term, "==", "=", 1), "=")
		}
		have := map[string]string{"metadata.name": th.name, "metadata.namespace": th.namespace}
		if th.resource == "pods" {
			have["spec.nodeName"], have["status.phase"] = th.pod()
		}
		if (have[field] == value) == differs {
			return false
		}
	}
	return true
}

func scopeOfURL(u *url.URL) Scope {
	q := u.Query()
	s := Scope{Fields: q.Get("fieldSelector"), Labels: q.Get("labelSelector")}
	parts := strings.Split(strings.Trim(u.Path, "/"), "/")
	if parts[0] == "api" {
		s.Resource.Version, parts = parts[1], parts[2:]
	} else {
		s.Resource.Group, s.Resource.Version, parts = parts[1], parts[2], parts[3:]
	}
	if len(parts) > 1 {
		s.Namespace, parts = parts[1], parts[2:]
	}
	s.Resource.Resource = parts[0]
	return s
}

func (c *cloud) answer(r *http.Request) (*http.Response, error) {
	if !c.online() {
		return nil, errors.New("no route to host")
	}
	watching := r.URL.Query().Get("watch") != ""
	kind := "list"
	if watching {
		kind = "watch"
	}
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	var f *fault
	c.mu.Lock()
	c.asked++
	if c.fault != nil {
		f = c.fault(kind, c.asked, token)
	}
	c.mu.Unlock()
	switch {
	case f == nil:
	case f.err != nil:
		return nil, f.err
	case f.hang:
		<-r.Context().Done()
		return nil, r.Context().Err()
	case f.status != 0:
		header := f.header
		if header == nil {
			header = http.Header{"Content-Type": {"application/json"}}
		}
		return response(f.status, header, io.NopCloser(strings.NewReader(f.body))), nil
	}
	var resp *http.Response
	if watching {
		resp = c.watch(r)
	} else {
		resp = c.list(r)
	}
	if f != nil {
		resp.Body = &cutBody{ReadCloser: resp.Body, left: f.cut}
	}
	return resp, nil
}

func response(code int, header http.Header, body io.ReadCloser) *http.Response {
	return &http.Response{StatusCode: code, Status: fmt.Sprintf("%d %s", code, http.StatusText(code)), Header: header, Body: body}
}

// cutBody breaks off in the middle.
type cutBody struct {
	io.ReadCloser
	left int
}

func (b *cutBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, errors.New("connection reset by peer")
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

func status(code int32, reason metav1.StatusReason) string {
	text, _ := json.Marshal(&metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: code, Reason: reason,
	})
	return string(text)
}

func (c *cloud) list(r *http.Request) *http.Response {
	scope, q := scopeOfURL(r.URL), r.URL.Query()
	kind := kindOf(scope.Resource.Resource)
	limit, err := strconv.Atoi(q.Get("limit"))
	if err != nil {
		limit = 1 << 30
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	version := c.version
	var rest []*thing
	if token := q.Get("continue"); token != "" {
		var ok bool
		if rest, ok = c.continued[token]; !ok {
			return response(http.StatusGone, http.Header{"Content-Type": {"application/json"}},
				io.NopCloser(strings.NewReader(status(410, metav1.StatusReasonExpired))))
		}
		at, _, _ := strings.Cut(token, "-")
		version, _ = strconv.ParseUint(at, 10, 64)
	} else {
		c.lists++
		for _, th := range c.objects {
			if selects(scope, th) {
				rest = append(rest, th)
			}
		}
		slices.SortFunc(rest, func(a, b *thing) int { return strings.Compare(a.key(), b.key()) })
	}
	page := rest[:min(limit, len(rest))]
	header := wire.ListHeader{APIVersion: kind.APIVersion, Kind: kind.Kind + "List", Version: version}
	if len(rest) > len(page) {
		header.Continue = fmt.Sprintf("%d-%s-%d", version, r.URL.Path, len(rest))
		c.continued[header.Continue] = rest[len(page):]
	}
	var (
		items [][]byte
		size  int
	)
	for _, th := range page {
		data := th.data(c.t)
		items, size = append(items, data), size+wire.ItemSize(kind.Encoding, len(data))
	}
	body := wire.AppendListStart(nil, kind.Encoding, header, size)
	for i, item := range items {
		body = wire.AppendItem(body, kind.Encoding, i == 0, item)
	}
	body = wire.AppendListEnd(body, kind.Encoding, header)
	h := http.Header{"Content-Type": {contentTypeOf(kind.Encoding, false)}}
	if r.Header.Get("Accept-Encoding") == "gzip" && len(body) > 1<<10 {
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		_, _ = w.Write(body)
		_ = w.Close()
		body = packed.Bytes()
		h.Set("Content-Encoding", "gzip")
	}
	return response(http.StatusOK, h, io.NopCloser(bytes.NewReader(body)))
}

func contentTypeOf(enc wire.Encoding, watching bool) string {
	return form{Format: formatOf(enc)}.contentType(watching)
}

func (c *cloud) watch(r *http.Request) *http.Response {
	scope, q := scopeOfURL(r.URL), r.URL.Query()
	kind := kindOf(scope.Resource.Resource)
	from, err := strconv.ParseUint(q.Get("resourceVersion"), 10, 64)
	if err != nil {
		c.t.Errorf("watch from %q", q.Get("resourceVersion"))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watches++
	b := &watchBody{
		cloud: c, ctx: r.Context(), scope: scope, kind: kind, next: from,
		cuts: c.cuts, ends: c.ends, bookmark: time.NewTicker(time.Minute),
	}
	if from < c.compacted {
		b.buf = wire.AppendStatusEvent(nil, kind.Encoding, &metav1.Status{Status: "Failure", Code: 410, Reason: metav1.StatusReasonExpired})
		b.last = true
	}
	return response(http.StatusOK, http.Header{"Content-Type": {contentTypeOf(kind.Encoding, true)}}, b)
}

// watchBody is the answer to a watch.
type watchBody struct {
	cloud    *cloud
	ctx      context.Context
	scope    Scope
	kind     Kind
	next     uint64 // events after this version are sent
	cuts     chan struct{}
	ends     chan struct{}
	bookmark *time.Ticker
	buf      []byte
	last     bool // nothing follows buf
}

func (b *watchBody) Close() error {
	b.bookmark.Stop()
	return nil
}

func (b *watchBody) Read(p []byte) (int, error) {
	for len(b.buf) == 0 {
		if b.last {
			return 0, io.EOF
		}
		c := b.cloud
		c.mu.Lock()
		changed, mute, version := c.changed, c.mute, c.version
		for _, r := range c.history {
			if r.version > b.next {
				b.next = r.version
				b.add(r)
			}
		}
		c.mu.Unlock()
		if len(b.buf) > 0 {
			break
		}
		select {
		case <-b.ctx.Done():
			return 0, b.ctx.Err()
		case <-b.cuts:
			return 0, errors.New("connection reset by peer")
		case <-b.ends:
			return 0, io.EOF
		case <-changed:
		case <-b.bookmark.C:
			if !mute && version >= b.next {
				b.buf = wire.AppendBookmark(nil, b.kind.Encoding, b.kind.APIVersion, b.kind.Kind, version, false)
			}
		}
	}
	n := copy(p, b.buf)
	b.buf = b.buf[n:]
	return n, nil
}

// add encodes a change as the API server shows it to a selective watch.
func (b *watchBody) add(r record) {
	before, now := selects(b.scope, r.before), selects(b.scope, r.after)
	var typ string
	th := r.after
	switch {
	case before && now:
		typ = "MODIFIED"
	case now:
		typ = "ADDED"
	case before:
		typ, th = "DELETED", r.before.at(r.version)
	default:
		return
	}
	b.buf = wire.AppendEvent(b.buf, b.kind.Encoding, typ, b.kind.APIVersion, b.kind.Kind, th.data(b.cloud.t))
}
