package nameserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"runtime/debug"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	// userAgent makes the name server the component "coredns" to whatever
	// tells components apart: it sees what a CoreDNS on this node would.
	userAgent = "coredns/yurthub"
	// followAgain is how long after the end of a watch the next one begins. It
	// doubles up to followLast while watches end before that: the hub may have
	// asked the cloud for each of them.
	followAgain = 200 * time.Millisecond
	followLast  = 10 * time.Second
	maxFrame    = 4 << 20 // etcd's own limit is less
)

// errExpired means that the history does not reach back to the version.
var errExpired = errors.New("resource version too old")

var errPanic = errors.New("a fault of the hub")

// resource is one of those that the index is made of.
type resource struct {
	path string
	// set reads an object into the index and returns its key and version. An
	// object that is deleted is only named.
	set func(x *index, data []byte, deleted bool) (key, string, error)
	// keep takes everything out of the index but what was seen.
	keep func(x *index, seen map[key]struct{})
}

var (
	services = resource{
		path: "/api/v1/services",
		set: func(x *index, data []byte, deleted bool) (key, string, error) {
			var in corev1.Service
			if err := in.Unmarshal(data); err != nil {
				return key{}, "", fmt.Errorf("read service: %w", err)
			}
			k := key{namespace: in.Namespace, name: in.Name}
			if deleted {
				x.setService(k, nil)
			} else {
				x.setService(k, readService(&in))
			}
			return k, in.ResourceVersion, nil
		},
		keep: (*index).keepServices,
	}
	endpointSlices = resource{
		path: "/apis/discovery.k8s.io/v1/endpointslices",
		set: func(x *index, data []byte, deleted bool) (key, string, error) {
			var in discoveryv1.EndpointSlice
			if err := in.Unmarshal(data); err != nil {
				return key{}, "", fmt.Errorf("read endpoint slice: %w", err)
			}
			k := key{namespace: in.Namespace, name: in.Name}
			if deleted {
				x.setSlice(k, nil)
			} else {
				x.setSlice(k, readSlice(&in))
			}
			return k, in.ResourceVersion, nil
		},
		keep: (*index).keepSlices,
	}
)

// follow keeps the index at what the API says of the resource, until ctx ends.
// It calls synced whenever the index holds all of it.
func (s *Server) follow(ctx context.Context, r resource, synced func()) error {
	version, again := "", followAgain
	for {
		began := time.Now()
		err := s.survive(func() error { return s.watch(ctx, r, &version, synced) })
		if errors.Is(err, errExpired) {
			version = ""
		}
		s.cfg.Log.Debug("watch ended", "path", r.path, "err", err)
		if time.Since(began) >= followLast {
			again = followAgain
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(again):
		}
		again = min(2*again, followLast)
	}
}

// survive makes a panic an error: it must not take the node's API down.
func (s *Server) survive(fn func() error) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			s.metrics.panics.Inc()
			s.cfg.Log.Error("DNS panicked", "cause", daemon.PanicCause(cause), "stack", string(debug.Stack()))
			err = errPanic
		}
	}()
	return fn()
}

// watch follows from the version on, or from the beginning if there is none,
// and moves it along.
func (s *Server) watch(ctx context.Context, r resource, version *string, synced func()) error {
	// A failure leaves no connection behind.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	body, err := s.openWatch(ctx, r, *version)
	if err != nil {
		return fmt.Errorf("watch %s: %w", r.path, err)
	}
	defer body.Close()
	var seen map[key]struct{} // nil: nothing is listed
	if *version == "" {
		seen = map[key]struct{}{}
	}
	events := wire.NewEventReader(body, wire.Protobuf, maxFrame)
	for {
		e, err := events.Read()
		if err != nil {
			return fmt.Errorf("watch %s: %w", r.path, err)
		}
		switch watch.EventType(e.Type) {
		case watch.Added, watch.Modified, watch.Deleted:
			k, at, err := r.set(s.index, e.Object, e.Type == string(watch.Deleted))
			if err != nil {
				// The others are still good.
				s.cfg.Log.Warn("object left out", "path", r.path, "err", err)
				continue
			}
			if seen != nil {
				seen[k] = struct{}{}
			} else if at != "" {
				*version = at
			}
		case watch.Bookmark:
			at, end, err := wire.ReadBookmark(wire.Protobuf, e.Object)
			if err != nil {
				return fmt.Errorf("watch %s: %w", r.path, err)
			}
			if end && seen != nil {
				r.keep(s.index, seen)
				seen = nil
				synced()
			}
			if seen == nil {
				*version = strconv.FormatUint(at, 10)
			}
		case watch.Error:
			status, err := wire.ReadStatus(wire.Protobuf, e.Object)
			if err != nil {
				return fmt.Errorf("watch %s: %w", r.path, err)
			}
			if status.Code == http.StatusGone {
				return errExpired
			}
			return fmt.Errorf("watch %s: the hub ended it: %s", r.path, status.Message)
		}
	}
}

// openWatch asks for events after the version, or for all there is and what
// comes then.
func (s *Server) openWatch(ctx context.Context, r resource, version string) (io.ReadCloser, error) {
	query := url.Values{"watch": {"true"}, "allowWatchBookmarks": {"true"}}
	if version == "" {
		query.Set("sendInitialEvents", "true")
		query.Set("resourceVersionMatch", string(metav1.ResourceVersionMatchNotOlderThan))
	} else {
		query.Set("resourceVersion", version)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://hub"+r.path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/vnd.kubernetes.protobuf;stream=watch")
	req.Header.Set("User-Agent", userAgent)
	resp, err := s.cfg.API.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	contentType, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	switch {
	case resp.StatusCode == http.StatusGone:
		err = errExpired
	case resp.StatusCode != http.StatusOK:
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10)) // for the error only
		err = fmt.Errorf("the hub answered %d: %.200q", resp.StatusCode, text)
	case err != nil || contentType != "application/vnd.kubernetes.protobuf":
		err = fmt.Errorf("the hub answered in %q", resp.Header.Get("Content-Type"))
	}
	if err != nil {
		_ = resp.Body.Close()
		return nil, err
	}
	return resp.Body, nil
}
