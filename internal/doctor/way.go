package doctor

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	hopLimit = 4 * time.Second
	skewMost = 2 * time.Minute
)

// way is what is known about the way to one server; each check uses what the
// ones before it found.
type way struct {
	settings *Settings
	url      *url.URL
	port     string
	ips      []net.IP
	cas      *x509.CertPool
	date     time.Time // of the server's clock
	asked    time.Time // when it said so
}

// way returns the checks of the way to a server.
func (s *Settings) way(server string) chain {
	u, err := url.Parse(server)
	if err != nil || u.Hostname() == "" {
		return chain{server, []check{{"dns", nil, hopLimit, func(context.Context) Result {
			return fail("%q is no URL of a server", server).so("mend --server-addr", "cat "+defaultsFile)
		}}}}
	}
	w := &way{settings: s, url: u, port: u.Port()}
	if w.port == "" {
		w.port = "443"
	}
	return chain{server, []check{
		{"dns", nil, hopLimit, w.dns},
		{"route", []string{"dns"}, hopLimit, w.route},
		{"connect", []string{"route"}, hopLimit + time.Second, w.connect},
		{"portal", []string{"connect"}, hopLimit, w.portal},
		{"tls", []string{"portal"}, hopLimit, w.tls},
		{"answer", []string{"tls"}, hopLimit, w.answer},
		{"time", []string{"tls"}, hopLimit, w.time},
		{"rbac", []string{"answer"}, hopLimit, w.rbac},
	}}
}

func (w *way) dns(ctx context.Context) Result {
	host := w.url.Hostname()
	if ip := net.ParseIP(host); ip != nil {
		w.ips = []net.IP{ip}
		return ok("an address, no name")
	}
	ips, err := net.DefaultResolver.LookupIP(ctx, "ip", host)
	if err != nil {
		return fail("%v", err).so("the name servers are in /etc/resolv.conf; an address in --server-addr needs none", "getent hosts "+host)
	}
	w.ips = ips
	return ok("%s is %v", host, ips)
}

func (w *way) route(context.Context) Result {
	var errs []error
	for _, ip := range w.ips {
		routes, err := netlink.RouteGet(ip)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", ip, err))
			continue
		}
		for _, r := range routes {
			via, out := "directly", "?"
			if r.Gw != nil {
				via = "via " + r.Gw.String()
			}
			if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
				out = l.Attrs().Name
			}
			return ok("%s %s on %s", ip, via, out)
		}
	}
	return fail("no route: %v", errors.Join(errs...)).so("is the cable in, the interface up, the gateway set?", "ip route; ip -brief link")
}

func (w *way) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, hopLimit)
	defer cancel()
	var d net.Dialer
	var errs []error
	for _, ip := range w.ips {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(ip.String(), w.port))
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func (w *way) connect(ctx context.Context) Result {
	begun := time.Now()
	c, err := w.dial(ctx)
	took := time.Since(begun).Round(100 * time.Microsecond)
	try := "ping -c 3 " + w.url.Hostname()
	switch {
	case err == nil:
		_ = c.Close()
		return ok("connected in %s", took)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fail("refused: the machine answers, and nothing listens on port %s", w.port).
			so("does the API server run? is the port right?", "curl -kv "+w.url.String()+"/readyz")
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fail("unreachable: %v", err).so("a router on the way has no route, or the machine is off", try)
	}
	if timeout, is := errors.AsType[net.Error](err); is && timeout.Timeout() || ctx.Err() != nil {
		return fail("black hole: no answer within %s", took.Round(time.Second)).
			so("packets are lost on the way: a cut uplink, or a firewall that drops them", "tracepath -n "+w.url.Hostname())
	}
	return fail("%v", err).so("", try)
}

// portal asks who answers, without trust and without any credential.
func (w *way) portal(ctx context.Context) Result {
	const login = "log in to the network, or have this node exempted"
	open := "curl -kv " + w.url.String() + "/version"
	c, err := w.dial(ctx)
	if err != nil {
		return fail("%v", err).so("the way is unsteady: try again", "yurtadm doctor")
	}
	defer c.Close() //nolint:errcheck // nothing was written that could be lost
	// Whoever it is: this connection only asks for its name.
	t := tls.Client(c, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}) //nolint:gosec // see above
	patient, cancel := context.WithTimeout(ctx, hopLimit/2)
	defer cancel()
	err = t.HandshakeContext(patient)
	if patient.Err() != nil {
		return hangs(w.url.Hostname())
	}
	if _, is := errors.AsType[tls.RecordHeaderError](err); is {
		return fail("captive portal: it speaks no TLS; over plain HTTP it says %q", w.plain(ctx)).so(login, open)
	}
	if err != nil {
		// What is wrong with it is for the next check.
		return ok("speaks TLS")
	}
	leaf := t.ConnectionState().PeerCertificates[0]
	answer, err := get(ctx, t, w.url.Host, "/version")
	if err != nil || answer.isAPI {
		return ok("a Kubernetes API server")
	}
	return fail("captive portal: %s answers, by a certificate of %s: %q", leaf.Subject, leaf.Issuer, answer.text).so(login, open)
}

func hangs(host string) Result {
	return fail("connected, and then no answer").
		so("large packets may be lost on the way (MTU), or the server hangs", "ping -M do -s 1400 -c 3 "+host)
}

// plain returns what a server that speaks no TLS says.
func (w *way) plain(ctx context.Context) string {
	c, err := w.dial(ctx)
	if err != nil {
		return err.Error()
	}
	defer c.Close() //nolint:errcheck // nothing was written that could be lost
	answer, err := get(ctx, c, w.url.Host, "/")
	if err != nil {
		return err.Error()
	}
	return answer.text
}

type answer struct {
	text  string // status line and where it leads
	isAPI bool
}

// get makes one request on a connection.
func get(ctx context.Context, c net.Conn, host, path string) (answer, error) {
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+path, nil)
	if err != nil {
		return answer{}, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return answer{}, err
	}
	a := answer{text: resp.Status}
	if to := resp.Header.Get("Location"); to != "" {
		a.text += " to " + to
	} else if typ := resp.Header.Get("Content-Type"); typ != "" {
		a.text += ", " + typ
	}
	a.isAPI = bytes.Contains(body, []byte("gitVersion")) || bytes.Contains(body, []byte(`"Status"`)) ||
		bytes.HasPrefix(body, []byte("k8s\x00"))
	return a, nil
}

func (w *way) tls(ctx context.Context) Result {
	bundle := w.settings.pki("ca.crt")
	text, err := os.ReadFile(bundle)
	if err != nil {
		return fail("the cluster's CA is not read: %v", err).so("the hub writes it once it has found the cluster", "journalctl -u yurthub -n 50")
	}
	w.cas = x509.NewCertPool()
	if !w.cas.AppendCertsFromPEM(text) {
		return fail("%s holds no certificate", bundle).so("put the cluster's CA there", "openssl x509 -noout -text -in "+bundle)
	}
	c, err := w.dial(ctx)
	if err != nil {
		return fail("%v", err).so("the way is unsteady: try again", "yurtadm doctor")
	}
	defer c.Close() //nolint:errcheck // nothing was written that could be lost
	show := fmt.Sprintf("openssl s_client -connect %s -showcerts </dev/null", net.JoinHostPort(w.url.Hostname(), w.port))
	t := tls.Client(c, &tls.Config{RootCAs: w.cas, ServerName: w.url.Hostname(), MinVersion: tls.VersionTLS12})
	err = t.HandshakeContext(ctx)
	if err == nil {
		leaf := t.ConnectionState().PeerCertificates[0]
		return ok("%s, valid until %s", leaf.Subject, stamp(leaf.NotAfter))
	}
	now := time.Now()
	var invalid x509.CertificateInvalidError
	var name x509.HostnameError
	var authority x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.Before(invalid.Cert.NotBefore):
		return fail("the server's certificate is valid from %s on, and it is %s here", stamp(invalid.Cert.NotBefore), stamp(now)).
			so("the clock here is behind, or the server's was ahead", "timedatectl")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fail("the server's certificate expired on %s, and it is %s here", stamp(invalid.Cert.NotAfter), stamp(now)).
			so("renew it in the cloud, or set the clock here", "kubeadm certs check-expiration")
	case errors.As(err, &name):
		return fail("the server's certificate is not for %s: %v", w.url.Hostname(), name).
			so("use one of its names in --server-addr, or have it made for this one", show)
	case errors.As(err, &authority):
		return fail("wrong CA: the server's certificate is of %q, which %s does not hold", authority.Cert.Issuer, bundle).
			so("is it the right cluster? after a change of its CA put the new one into the hub's --bootstrap-file, and restart the hub", show)
	case ctx.Err() != nil:
		return hangs(w.url.Hostname())
	}
	return fail("%v", err).so("", show)
}

// client is the node's own, as the hub is.
func (w *way) client() (*rest.Config, error) {
	config := &rest.Config{
		Host: w.url.String(), Timeout: hopLimit, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAFile: w.settings.pki("ca.crt")},
	}
	if _, err := tls.LoadX509KeyPair(w.settings.Credential, w.settings.Credential); err != nil {
		return config, fmt.Errorf("no credential of the node: %w", err)
	}
	config.CertFile, config.KeyFile = w.settings.Credential, w.settings.Credential
	return config, nil
}

func (w *way) answer(ctx context.Context) Result {
	config, without := w.client()
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return fail("%v", err)
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(w.url.String(), "/")+"/readyz", nil)
	if err != nil {
		return fail("%v", err)
	}
	w.asked = time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return fail("%v", err).so("the server takes connections and does not answer", "curl -kv "+w.url.String()+"/readyz")
	}
	defer resp.Body.Close()
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		w.date = date
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10)) // for the text only
	switch resp.StatusCode {
	case http.StatusOK, http.StatusForbidden, http.StatusTooManyRequests:
		if without != nil {
			return warn("the server is ready; as whom the hub is known to it was not tried: %v", without).so("name a certificate and key of the node with --credential", "")
		}
		return ok("the server is ready")
	case http.StatusUnauthorized:
		if without != nil {
			return warn("the server answers; as whom the hub is known to it was not tried: %v", without).so("name a certificate and key of the node with --credential", "")
		}
		return fail("the server does not accept the certificate in %s", w.settings.Credential).
			so("it may be of another cluster, or its CA was changed", "openssl x509 -noout -subject -issuer -enddate -in "+w.settings.Credential)
	}
	return fail("the server is not ready: %s: %.200s", resp.Status, bytes.TrimSpace(body)).
		so("that is for the cluster's administrator", "kubectl get --raw '/readyz?verbose'")
}

func (w *way) time(context.Context) Result {
	if w.date.IsZero() {
		return Result{Outcome: Skipped, Text: "not checked because the server did not say its time"}
	}
	// The header has whole seconds, and the answer took its time.
	skew := w.asked.Sub(w.date).Round(time.Second)
	way := "ahead of"
	if skew < 0 {
		way = "behind"
	}
	switch {
	case skew.Abs() > skewMost:
		return fail("the clock here is %s %s the server's", skew.Abs(), way).so("set it, and keep it by NTP", "timedatectl set-ntp true")
	case skew.Abs() > 10*time.Second:
		return warn("the clock here is %s %s the server's", skew.Abs(), way).so("keep it by NTP", "timedatectl set-ntp true")
	}
	return ok("the clock here agrees with the server's")
}

// rights are what the hub asks of the cluster as the node, beside what the
// Node authorizer decides object by object.
var rights = []authorizationv1.SelfSubjectAccessReviewSpec{
	resource("list", "", "services"), resource("watch", "", "services"),
	resource("list", "discovery.k8s.io", "endpointslices"), resource("watch", "discovery.k8s.io", "endpointslices"),
	resource("create", "", "events"),
	resource("create", "authorization.k8s.io", "subjectaccessreviews"),
	resource("create", "authentication.k8s.io", "tokenreviews"),
	resource("create", "certificates.k8s.io", "certificatesigningrequests"),
	path("/openid/v1/jwks"), path("/.well-known/openid-configuration"),
}

func resource(verb, group, name string) authorizationv1.SelfSubjectAccessReviewSpec {
	return authorizationv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Group: group, Resource: name},
	}
}

func path(p string) authorizationv1.SelfSubjectAccessReviewSpec {
	return authorizationv1.SelfSubjectAccessReviewSpec{
		NonResourceAttributes: &authorizationv1.NonResourceAttributes{Verb: "get", Path: p},
	}
}

func (w *way) rbac(ctx context.Context) Result {
	config, err := w.client()
	if err != nil {
		return Result{Outcome: Skipped, Text: "not checked because there is " + err.Error()}
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fail("%v", err)
	}
	var missing []string
	for _, spec := range rights {
		review, err := client.AuthorizationV1().SelfSubjectAccessReviews().
			Create(ctx, &authorizationv1.SelfSubjectAccessReview{Spec: spec}, metav1.CreateOptions{})
		if err != nil {
			return fail("the server cannot be asked: %v", err).so("", "kubectl --kubeconfig "+kubeletConfig()+" auth can-i --list")
		}
		if review.Status.Allowed {
			continue
		}
		if r := spec.ResourceAttributes; r != nil {
			missing = append(missing, r.Verb+" "+r.Resource)
		} else {
			missing = append(missing, "get "+spec.NonResourceAttributes.Path)
		}
	}
	if len(missing) > 0 {
		return fail("the node may not %s", strings.Join(missing, ", ")).
			so("bind these rights to the group system:nodes, see docs/guide/hub.md", "kubectl describe clusterrolebinding | grep -B5 system:nodes")
	}
	return ok("the node has the %d rights that the hub needs", len(rights))
}
