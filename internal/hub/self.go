package hub

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/httpx"
	"github.com/yurt-edge/yurt/internal/hub/cert"
	"github.com/yurt-edge/yurt/internal/hub/condition"
	"github.com/yurt-edge/yurt/internal/hub/link"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/report"
)

// self is what the hub remembers of itself, to tell others.
type self struct {
	started time.Time

	born time.Time // when the link began, not probed yet

	mu   sync.Mutex      // guards the following
	link link.State      // as last seen
	last *report.Cut     // the last that is over
	held map[string]bool // scopes that were on the disk, by id
}

// see takes note of the link's state and returns the last cut that is over.
func (s *self) see(now link.State) *report.Cut {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.link
	// Who has not seen the link whole does not know when it was cut.
	if now.Up && !before.Up && before.Since.After(s.born) {
		s.last = &report.Cut{From: before.Since, To: now.Since, How: condition.HowCut(before.Reason)}
	}
	s.link = now
	return s.last
}

func (h *Hub) newConditions() *condition.Writer {
	return condition.New(condition.Config{
		NodeName: h.cfg.NodeName, Off: !h.cfg.Conditions, Facts: h.facts, Node: h.ownNode,
		PatchStatus: h.patchOwnStatus, AddEvent: h.addOwnEvent,
		Log: h.log, Registerer: h.cfg.Registerer,
	})
}

// facts is what the hub knows of itself now.
func (h *Hub) facts() condition.Facts {
	state := h.link.State()
	f := condition.Facts{Link: condition.LinkFacts{
		Up: state.Up, Since: state.Since, Reason: state.Reason, Last: h.about.see(state),
	}}
	f.Store = condition.StoreFacts{
		Damaged: h.store.Stats().Damaged, Rebuilt: h.store.Rebuilt(), KeyLost: h.keys.Lost(),
		Dir: filepath.Dir(h.cfg.storePath()),
	}
	if err := h.diskHealth(); err != nil {
		f.Store.Err = err.Error()
		f.Store.Full = errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
	}
	if err := h.keys.Problem(); err != nil {
		f.Store.Key = err.Error()
	}
	f.Certificate = certificateFacts(h.certs.Status())
	f.Clock.Skew, f.Clock.Known = h.clock.Skew()
	waiting := h.journal.Stats()
	f.Journal = condition.JournalFacts{
		Status: waiting.Status, Events: waiting.Events, Oldest: waiting.Oldest, Dropped: waiting.Displaced,
	}
	f.Missing = h.missing()
	return f
}

// certificateFacts is what the certificates' state means for the hub's own:
// without the cluster's authority it cannot be renewed either.
func certificateFacts(all []cert.Status) (f condition.CertificateFacts) {
	for _, s := range all {
		if s.Name == cert.Client {
			f.NotBefore, f.NotAfter = s.NotBefore, s.NotAfter
		}
		if (s.Name == cert.Client || s.Name == cert.Authority) && f.Stuck == "" {
			f.Stuck, f.Remedy = s.Problem, s.Hint
		}
	}
	return f
}

// missing names the scopes that the hub was told to hold and does not. One
// that was on the disk once stays there: what waits to be written to it are
// changes of the last second.
func (h *Hub) missing() []string {
	stored := map[string]bool{}
	for _, s := range h.replica.Status() {
		stored[s.Scope] = s.Stored && s.Synced && s.Damage == ""
		if s.Damage != "" {
			h.about.forget(s.Scope)
		}
	}
	h.about.mu.Lock()
	defer h.about.mu.Unlock()
	var out []string
	for _, scope := range h.pinned {
		id := scope.ID()
		if stored[id] {
			h.about.held[id] = true
		}
		if !h.about.held[id] {
			out = append(out, id)
		}
	}
	return out
}

func (s *self) forget(scope string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, scope)
}

func (h *Hub) ownNodeInfo() request.Info {
	return request.Info{Verb: "get", IsResource: true, Resource: nodesResource, Name: h.cfg.NodeName}
}

func (h *Hub) ownNode() (*corev1.Node, error) {
	held, err := h.replica.Get(h.ownNodeInfo(), 0)
	if err != nil {
		return nil, err
	}
	node := &corev1.Node{}
	if err := node.Unmarshal(held.Data); err != nil {
		return nil, fmt.Errorf("read own node: %w", err)
	}
	return node, nil
}

// patchOwnStatus goes the way of the kubelet's status: to the cloud, or into
// the journal while that is away or an older write waits.
func (h *Hub) patchOwnStatus(ctx context.Context, patch []byte) error {
	if h.link.Online() && !h.journal.Pending(nodesResource, "", h.cfg.NodeName) {
		return h.sendOwn(ctx, http.MethodPatch, "/api/v1/nodes/"+url.PathEscape(h.cfg.NodeName)+"/status",
			string(types.StrategicMergePatchType), patch)
	}
	current, err := h.replica.Get(h.ownNodeInfo(), 0)
	if err != nil {
		return err
	}
	_, err = h.journal.PatchStatus(ctx, nodesResource, types.StrategicMergePatchType, patch, current)
	return err
}

func (h *Hub) addOwnEvent(ctx context.Context, namespace string, event []byte) error {
	path := "/api/v1/namespaces/" + namespace + "/events"
	if h.link.Online() {
		return h.sendOwn(ctx, http.MethodPost, path, runtime.ContentTypeJSON, event)
	}
	_, err := h.journal.AddEvent(ctx, path, namespace, event)
	return err
}

// sendOwn makes a write of the hub's own, as the node.
func (h *Hub) sendOwn(ctx context.Context, method, path, contentType string, body []byte) error {
	target := url.URL{Scheme: "https", Host: "upstream", Path: path}
	req, err := http.NewRequestWithContext(ctx, method, target.String(), bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Accept", runtime.ContentTypeJSON)
	req.Header.Set("User-Agent", "yurthub")
	resp, err := h.link.Node().RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // for the error only
	if resp.StatusCode/100 != 2 {
		status := new(apierrors.StatusError)
		if json.Unmarshal(text, &status.ErrStatus) == nil && status.ErrStatus.Reason != "" {
			return fmt.Errorf("%s %s: the cloud answered %d: %w", method, path, resp.StatusCode, status)
		}
		return fmt.Errorf("%s %s: the cloud answered %d: %.200q", method, path, resp.StatusCode, text)
	}
	return nil
}

func (h *Hub) report() report.Report {
	state := h.link.State()
	out := report.Report{
		Node: h.cfg.NodeName, Pool: h.cfg.PoolName, Version: daemon.ReadVersion().Version, Started: h.about.started,
		Online: state.Up, Since: state.Since, Reason: state.Reason, Cut: h.about.see(state),
		StoreBytes: h.store.Stats().DiskBytes, StoreHealth: "ok",
		StoreDamaged: h.store.Stats().Damaged, StoreRebuilt: h.store.Rebuilt(),
		Conditions: h.conditions.Now(),
	}
	if !state.Up && state.Since.After(h.about.born) {
		out.Cut = &report.Cut{From: state.Since, How: condition.HowCut(state.Reason)}
	}
	if m := h.pool.Membership(); m.Pool != "" {
		out.Pool, out.Sharing = m.Pool, h.sharing()
	}
	waiting := h.journal.Stats()
	out.StatusPending, out.EventsPending = waiting.Status, waiting.Events
	out.Journal = report.Journal{
		Bytes: waiting.StatusBytes + waiting.EventBytes, Oldest: h.asMachine(waiting.Oldest), Delivered: waiting.Delivered, Dropped: waiting.Dropped,
	}
	_, err := h.answers.document(&url.URL{Path: "/apis"}, http.Header{})
	out.Discovery = err == nil
	out.KeySource = string(h.keys.Source())
	if err := h.keys.Problem(); err != nil {
		out.KeyProblem = err.Error()
	}
	if err := h.diskHealth(); err != nil {
		out.StoreHealth = err.Error()
	}
	for _, s := range h.certs.Status() {
		out.Certificates = append(out.Certificates, report.Certificate(s))
	}
	ahead, known := h.clock.Skew()
	out.Clock = report.Clock{Now: h.clock.Now(), Machine: h.clock.Machine(), Known: known, AheadSeconds: ahead.Seconds()}
	for _, s := range h.replica.Status() {
		s.Contact = h.asMachine(s.Contact)
		out.Scopes = append(out.Scopes, report.Scope(s))
	}
	out.Endings = h.endings()
	by, carries := "", h.vouch.Carries()
	if !state.Up {
		by = h.vouch.Carrier()
	}
	if by != "" || len(carries) > 0 {
		out.Vouching = &report.Vouching{By: by, For: carries}
	}
	return out
}

// asMachine is a time of the hub's clock for those who will take its age by the
// machine's.
func (h *Hub) asMachine(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return h.clock.Machine().Add(-h.clock.Since(t))
}

// socket returns the server for an operator on the node, who is root and may
// have no other credential that is good offline. Nil: there is none, which is
// no reason to keep the node without its API.
func (h *Hub) socket(ctx context.Context) *httpx.Server {
	if h.cfg.RunDir == "" {
		return nil
	}
	path := filepath.Join(h.cfg.RunDir, report.SocketName)
	l, err := listenRoot(ctx, path)
	if err != nil {
		h.log.Warn("no socket for yurtadm status", "path", path, "err", err)
		return nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+report.StatusPath, h.status)
	mux.Handle("GET /metrics", promhttp.HandlerFor(h.cfg.Gatherer, promhttp.HandlerOpts{}))
	return &httpx.Server{Listener: l, Handler: h.survive(mux), Grace: stopGrace, Log: h.log}
}

// listenRoot listens on a socket that root alone can open, and that closes the
// connection of anybody else who got hold of it.
func listenRoot(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	var d net.Dialer
	if c, err := d.DialContext(ctx, "unix", path); err == nil {
		_ = c.Close()
		return nil, errors.New("another hub listens on it")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return rootOnly{l}, nil
}

// rootOnly accepts connections of root, and of the hub's own user for tests.
type rootOnly struct{ net.Listener }

func (l rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := unixPeer(c); err == nil && (uid == 0 || uid == os.Geteuid()) {
			return c, nil
		}
		_ = c.Close()
	}
}

// unixPeer returns the user at the other end of a unix socket.
func unixPeer(c net.Conn) (int, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T is no unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("ask who calls: %w", err)
	}
	return int(cred.Uid), nil
}
