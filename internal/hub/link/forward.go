package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/yurt-edge/yurt/internal/httpx"
)

// Credential says as whom a request is forwarded. The zero value forwards
// nothing, so that forgetting it cannot lend the hub's rights to a caller.
type Credential struct {
	cred credential
	set  bool
	user user.Info // to impersonate; nil: nobody
}

// AsNode forwards with the hub's own certificate, for callers that have
// proved to be the node's own user.
func AsNode() Credential { return Credential{cred: node, set: true} }

// AsBearer passes the caller's Authorization header on and shows no
// certificate.
func AsBearer() Credential { return Credential{cred: bearer, set: true} }

// AsUser forwards with the hub's certificate and asks the API server to act
// as u. Whether the hub may is for the API server's RBAC to say.
func AsUser(u user.Info) Credential { return Credential{cred: node, set: true, user: u} }

// KeepLimit is the largest body that Forward holds for a Keep, and keepTotal
// what it holds of all that are on the way. What does not fit passes unkept.
const (
	KeepLimit = 4 << 20
	keepTotal = 32 << 20
)

// Keep is asked about each response once its header has come in, before
// the client gets it. It returns nil to let the body pass, or a function to
// be given the body, as encoded on the wire, once the client has all of it.
// That function is not called for a body that is cut short or larger than
// KeepLimit. It owns the body, and must not block. Neither may change resp.
type Keep func(resp *http.Response) func(body []byte)

// Forward sends r to the cloud and streams the answer to w. Everything
// passes: watches are flushed as they come, encodings stay as they are,
// trailers follow, upgrades become tunnels, and a client that goes away takes
// its request with it. Keep may be nil.
//
// Before the header is out, an error becomes a Status: 503 when the link is
// down, 504 or 502 when the answer failed to come. Retry-After is set when
// nothing was sent or r only reads; a write whose fate is unknown is for the
// client to judge. Later errors panic with [http.ErrAbortHandler], so that a
// client sees a body cut short and never a clean end; so does a client that
// has gone away. What recovers panics must pass this one on.
func (l *Link) Forward(w http.ResponseWriter, r *http.Request, as Credential, keep Keep) {
	if !as.set {
		httpx.WriteStatus(w, r, apierrors.NewInternalError(errors.New("no credential was chosen to forward with")))
		return
	}
	l.metrics.inFlight.Inc()
	defer l.metrics.inFlight.Dec()
	out := outgoing(r, as)
	if protocol := upgradeOf(r.Header); protocol != "" {
		l.upgrade(w, r, out, as.cred, protocol)
		return
	}
	resp, server, err := l.send(out, as.cred, wayOf(r))
	if err != nil {
		refuse(w, r, err)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	if err := unproved(as, resp); err != nil {
		refuse(w, r, err)
		return
	}
	l.reply(w, r, resp, server, keep)
}

// unproved returns an error for an answer by which the cloud does not take the
// hub's own certificate, as when that has expired. Whoever asked is known here,
// and must not be told that it is not.
func unproved(as Credential, resp *http.Response) error {
	if as.cred != node || resp.StatusCode != http.StatusUnauthorized {
		return nil
	}
	return &credentialError{errors.New("it does not take the hub's certificate; `yurtadm status` tells what to do")}
}

// reply streams resp to the client.
func (l *Link) reply(w http.ResponseWriter, r *http.Request, resp *http.Response, server int, keep Keep) {
	var kept func([]byte)
	if keep != nil {
		kept = keep(resp)
	}
	h := w.Header()
	copyHeader(h, resp.Header)
	for name := range resp.Trailer {
		h.Add("Trailer", name)
	}
	w.WriteHeader(resp.StatusCode)
	flush := func() error { return nil }
	if resp.ContentLength < 0 {
		// The length is not known, so this may be a stream, and each piece
		// may be all there is for an hour.
		flush = http.NewResponseController(w).Flush
		if mayWait(r) && flush() != nil {
			panic(http.ErrAbortHandler)
		}
	}
	held := &hold{total: &l.held, on: kept != nil}
	defer held.release()
	err := copyBody(w, resp.Body, flush, held)
	if err != nil {
		if !errors.Is(err, errClient) {
			_ = l.blame(r.Context(), nil, server, err)
		}
		panic(http.ErrAbortHandler)
	}
	maps.Copy(h, resp.Trailer)
	if held.on {
		kept(held.body)
	}
}

// hold is what is kept of a body on its way.
type hold struct {
	total *atomic.Int64 // of all holds
	on    bool          // all that has come so far is in body
	body  []byte
}

func (h *hold) add(p []byte) {
	if !h.on {
		return
	}
	n := int64(len(p))
	if h.total.Add(n) > keepTotal || len(h.body)+len(p) > KeepLimit {
		h.total.Add(-n)
		h.release()
		return
	}
	h.body = append(h.body, p...)
}

func (h *hold) release() {
	h.total.Add(-int64(len(h.body)))
	h.on, h.body = false, nil
}

// errClient says that the client would not take more of a body.
var errClient = errors.New("client is gone")

// copyBuffer is big enough for two TLS records.
type copyBuffer [32 << 10]byte

var copyBuffers = sync.Pool{New: func() any { return new(copyBuffer) }}

// copyBody copies src to dst, calling flush after each write, and adds it to
// held.
func copyBody(dst io.Writer, src io.Reader, flush func() error, held *hold) error {
	buf := copyBuffers.Get().(*copyBuffer) //nolint:errcheck // The pool holds nothing else.
	defer copyBuffers.Put(buf)
	for {
		n, readErr := src.Read(buf[:])
		if n > 0 {
			held.add(buf[:n])
			if _, err := dst.Write(buf[:n]); err != nil {
				return fmt.Errorf("%w: %w", errClient, err)
			}
			if err := flush(); err != nil {
				return fmt.Errorf("%w: %w", errClient, err)
			}
		}
		if readErr == io.EOF {
			return nil
		}
		if readErr != nil {
			return readErr
		}
	}
}

// outgoing is r as it is to be sent upstream, to a server still to be chosen.
func outgoing(r *http.Request, as Credential) *http.Request {
	u := *r.URL
	out := (&http.Request{
		Method:        r.Method,
		URL:           &u,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        make(http.Header, len(r.Header)+2),
		ContentLength: r.ContentLength,
		Trailer:       r.Trailer,
	}).WithContext(r.Context())
	if r.ContentLength != 0 {
		out.Body = r.Body
	}
	copyHeader(out.Header, r.Header)
	for name := range out.Header {
		if forbidden(name, as.cred) {
			delete(out.Header, name)
		}
	}
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = nil // not net/http's own
	}
	if as.user != nil {
		impersonate(out.Header, as.user)
	}
	return out
}

// forbidden tells the headers that would let a caller choose who it is.
// X-Remote-* are those of the API server's authenticating front proxy: ours
// is none, but no configuration of the cloud shall make it one.
func forbidden(name string, cred credential) bool {
	switch {
	case name == "Expect": // answered by our own server
		return true
	case strings.HasPrefix(name, "X-Remote-"):
		return true
	case name == "Authorization", strings.HasPrefix(name, "Impersonate-"):
		return cred == node
	}
	return false
}

func impersonate(h http.Header, u user.Info) {
	h.Set("Impersonate-User", u.GetName())
	for _, g := range u.GetGroups() {
		h.Add("Impersonate-Group", g)
	}
	if u.GetUID() != "" {
		h.Set("Impersonate-Uid", u.GetUID())
	}
	for k, values := range u.GetExtra() {
		for _, v := range values {
			h.Add("Impersonate-Extra-"+escapeKey(k), v)
		}
	}
}

// escapeKey makes k fit into the name of a header, as client-go does: what
// is no token, and the percent sign, is percent-encoded.
func escapeKey(k string) string {
	var b strings.Builder
	for i := range len(k) {
		c := k[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9',
			strings.IndexByte("!#$&'*+-.^_`|~", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// copyHeader copies what is meant for the other end and not for the next
// hop. Values are shared.
func copyHeader(dst, src http.Header) {
	for name, values := range src {
		switch name {
		case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization",
			"Te", "Trailer", "Transfer-Encoding", "Upgrade":
			continue
		}
		if have := dst[name]; have != nil { // such as our own Warning
			values = append(have, values...)
		}
		dst[name] = values
	}
	for _, line := range src["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			if name = textproto.TrimString(name); name != "" {
				dst.Del(name)
			}
		}
	}
	if src.Get("Te") == "trailers" {
		dst.Set("Te", "trailers")
	}
}

// isStream tells requests whose answer has no end in sight.
func isStream(r *http.Request) bool {
	if r.Method != http.MethodGet {
		return false
	}
	if q := r.URL.RawQuery; strings.Contains(q, "watch=") || strings.Contains(q, "follow=") {
		v := r.URL.Query()
		return isTrue(v.Get("watch")) || isTrue(v.Get("follow"))
	}
	return strings.Contains(r.URL.Path, "/watch/")
}

// mayWait tells requests whose answer may consist of a header and a long
// silence, so that the header must not wait for the body.
func mayWait(r *http.Request) bool { return isStream(r) || strings.Contains(r.URL.Path, "/proxy") }

func isTrue(s string) bool { return s != "" && s != "0" && !strings.EqualFold(s, "false") }

func readyPath(base *url.URL) string { return strings.TrimSuffix(base.EscapedPath(), "/") + "/readyz" }

// joinPath puts the path of u below that of a server behind a balancer.
func joinPath(base, u *url.URL) (path, rawPath string) {
	joined := *u
	joined.Path = strings.TrimSuffix(base.Path, "/") + u.Path
	joined.RawPath = ""
	if u.RawPath != "" || base.RawPath != "" {
		joined.RawPath = strings.TrimSuffix(base.EscapedPath(), "/") + u.EscapedPath()
	}
	return joined.Path, joined.RawPath
}

// clientError returns what is wrong with the request's own body, as its reader
// said; nil: nothing is.
func clientError(err error) error {
	if status := apierrors.APIStatus(nil); errors.As(err, &status) {
		return err
	}
	return nil
}

// refuse replies with the Status that err of a request comes to.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // nobody listens any more
	}
	if refused := clientError(err); refused != nil {
		httpx.WriteStatus(w, r, refused)
		return
	}
	var noConn *dialError
	var noCred *credentialError
	unsent := err == ErrDown || errors.As(err, &noConn) || errors.As(err, &noCred) //nolint:errorlint // bare: refused before sending
	status := metav1.Status{
		Status: metav1.StatusFailure,
		Code:   http.StatusBadGateway,
		Reason: metav1.StatusReasonServiceUnavailable,
	}
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, ErrDown), errors.As(err, &noCred):
		status.Code = http.StatusServiceUnavailable
	case errors.Is(err, ErrSlow), errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		status.Code, status.Reason = http.StatusGatewayTimeout, metav1.StatusReasonTimeout
	}
	status.Message = fmt.Sprintf("yurthub: forward to the cloud: %v", err)
	if !unsent {
		status.Message += "; the request may have been carried out"
	}
	if unsent || r.Method == http.MethodGet || r.Method == http.MethodHead {
		status.Details = &metav1.StatusDetails{RetryAfterSeconds: 1}
	}
	httpx.WriteStatus(w, r, &apierrors.StatusError{ErrStatus: status})
}
