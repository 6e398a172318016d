package conform

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/test/bed"
)

// podAddress stands for 169.254.2.1, which a test without machines of its own
// cannot have.
const podAddress = "127.0.0.2"

// peerAddress stands for the node's own, where the hubs of its pool come.
const peerAddress = "127.0.0.3"

// fullHub is a hub with every listener that a hub can have, once it has joined
// a pool.
type fullHub struct {
	*bed.Hub
	link  *bed.Link
	plain string // URL of the plain listener
	pods  string // URL of the listener for pods
	peers string // URL of the listener for the pool's hubs
	dns   string // address of the listeners for DNS
}

func newFullHub(t *testing.T, node string) *fullHub {
	t.Helper()
	free := func(address string) string {
		t.Helper()
		ports, err := playground.FreePorts(t.Context(), address, 1)
		if err != nil {
			t.Fatal(err)
		}
		return strconv.Itoa(ports[0])
	}
	plain, peers, dns := free("127.0.0.1"), free(peerAddress), free(podAddress)
	hub, link := busy.hub(t, node,
		"--enable-dummy-if", "--dummy-if-ip="+podAddress,
		"--insecure-loopback", "--proxy-port="+plain,
		"--node-ip="+peerAddress, "--multiplexer-port="+peers, "--dns-port="+dns)
	return &fullHub{
		Hub: hub, link: link,
		plain: "http://127.0.0.1:" + plain,
		pods:  strings.Replace(hub.URL, "127.0.0.1", podAddress, 1),
		peers: "https://" + net.JoinHostPort(peerAddress, peers),
		dns:   net.JoinHostPort(podAddress, dns),
	}
}

// join puts the hub's node, which exists, into a pool with others, and waits
// until the hub serves them.
func (h *fullHub) join(t *testing.T, pool string, others ...string) {
	t.Helper()
	mustAwait(t, func(ctx context.Context) error {
		return busy.Cloud.Apply(ctx, fmt.Sprintf(`
apiVersion: apps.openyurt.io/v1beta2
kind: NodePool
metadata: {name: %s}
spec: {type: Edge, interConnectivity: true}
`, pool))
	})
	// What the manager does.
	status, err := json.Marshal(map[string]any{"status": map[string]any{"nodes": append(others, h.Node)}})
	if err != nil {
		t.Fatal(err)
	}
	err = busy.admin.RESTClient().Patch(types.MergePatchType).AbsPath("/apis/apps.openyurt.io/v1beta2/nodepools/" + pool + "/status").
		Body(status).Do(t.Context()).Error()
	if err != nil {
		t.Fatal(err)
	}
	label := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, apps.NodePoolLabel, pool)
	if _, err := busy.admin.CoreV1().Nodes().Patch(t.Context(), h.Node, types.MergePatchType, label, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	mustAwait(t, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", strings.TrimPrefix(h.peers, "https://"))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
}

// listening returns the addresses at which a process takes connections or
// datagrams of the network, by what the kernel says.
func listening(t *testing.T, pid int) []string {
	t.Helper()
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
		if inode, ok := strings.CutPrefix(target, "socket:["); err == nil && ok {
			own[strings.TrimSuffix(inode, "]")] = true
		}
	}
	var out []string
	for _, protocol := range []string{"tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6"} {
		file, err := os.Open(filepath.Join(proc, "net", protocol))
		if errors.Is(err, os.ErrNotExist) {
			continue // this kernel has none
		}
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(file)
		lines.Scan() // names of columns
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			const listens = "0A"
			if len(f) < 10 || !own[f[9]] || (strings.HasPrefix(protocol, "tcp") && f[3] != listens) {
				continue
			}
			out = append(out, protocol+" "+kernelAddress(t, f[1]))
		}
		file.Close()
	}
	slices.Sort(out)
	return out
}

// kernelAddress reads an address as /proc/net prints it: words in the
// machine's order, of which the tests know the little end first.
func kernelAddress(t *testing.T, text string) string {
	t.Helper()
	ip, port, _ := strings.Cut(text, ":")
	raw := make([]byte, len(ip)/2)
	for i := range raw {
		b, err := strconv.ParseUint(ip[2*i:2*i+2], 16, 8)
		if err != nil {
			t.Fatal(err)
		}
		raw[i/4*4+3-i%4] = byte(b)
	}
	addr, ok := netip.AddrFromSlice(raw)
	p, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		t.Fatalf("no address: %s", text)
	}
	return netip.AddrPortFrom(addr, uint16(p)).String()
}

// TestListeners looks at the sockets of hubs: there are those that
// docs/security.md lists and no others, online and offline.
func TestListeners(t *testing.T) {
	t.Parallel()
	host := func(raw string) string {
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		return "tcp " + u.Host
	}
	full := newFullHub(t, "edge-listen")
	all := []string{
		host(full.URL), host(full.pods), host(full.Health), host(full.plain), "tcp " + full.dns, "udp " + full.dns,
	}
	busy.node(t, full.Node)
	for _, c := range []struct {
		name   string
		pid    int
		want   []string
		before func() error
	}{
		{name: "by default", pid: busy.Hub.PID(), want: []string{host(busy.Hub.URL), host(busy.Hub.Health)}},
		{name: "with all, in no pool", pid: full.PID(), want: all},
		{
			name: "with all", pid: full.PID(), want: append(all, host(full.peers)),
			before: func() error { full.join(t, "listening"); return nil },
		},
		{
			name: "with all, cut", pid: full.PID(), want: append(all, host(full.peers)),
			before: func() error { return full.link.Cut(bed.Down) },
		},
	} {
		if c.before != nil {
			if err := c.before(); err != nil {
				t.Fatal(err)
			}
		}
		slices.Sort(c.want)
		mustAwait(t, func(context.Context) error {
			if got := listening(t, c.pid); !slices.Equal(got, c.want) {
				return fmt.Errorf("%s: the hub listens at %q, want %q", c.name, got, c.want)
			}
			return nil
		})
		for _, at := range listening(t, c.pid) {
			if addr := netip.MustParseAddrPort(strings.Fields(at)[1]); !addr.Addr().IsLoopback() {
				t.Errorf("%s: %s can be reached from elsewhere", c.name, at)
			}
		}
	}
	if err := full.link.Heal(); err != nil {
		t.Fatal(err)
	}
	full.certificates(t)
}

// approve approves the hub's requests for serving certificates, as an
// operator does. There may be several: a cut can cost the answer to one.
func (h *fullHub) approve(ctx context.Context) error {
	requests := busy.admin.CertificatesV1().CertificateSigningRequests()
	all, err := requests.List(ctx, metav1.ListOptions{FieldSelector: "spec.signerName=" + certificatesv1.KubeletServingSignerName})
	if err != nil {
		return err
	}
	for i := range all.Items {
		csr := &all.Items[i]
		if csr.Spec.Username != "system:node:"+h.Node || len(csr.Status.Conditions) > 0 {
			continue
		}
		csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{
			{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test"},
		}
		if _, err := requests.UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// certificates looks at what each listener shows: on the node's own address a
// certificate that no other node's clients trust, to pods one of the cluster.
func (h *fullHub) certificates(t *testing.T) {
	t.Helper()
	cluster, bundle := x509.NewCertPool(), x509.NewCertPool()
	cluster.AppendCertsFromPEM(busy.Cloud.CA.CertPEM)
	text, err := os.ReadFile(filepath.Join(h.Dir, "pki", "ca-bundle.crt"))
	if err != nil {
		t.Fatal(err)
	}
	bundle.AppendCertsFromPEM(text)
	dial := func(ctx context.Context, base string, roots *x509.CertPool) error {
		d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
		conn, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(base, "https://"))
		if err == nil {
			err = conn.Close()
		}
		return err
	}
	mustAwait(t, func(ctx context.Context) error { return errors.Join(h.approve(ctx), dial(ctx, h.pods, cluster)) })
	if err := dial(t.Context(), h.URL, bundle); err != nil {
		t.Errorf("programs on the node: %v", err)
	}
	if err := dial(t.Context(), h.URL, cluster); err == nil {
		t.Error("the cluster signed a certificate for 127.0.0.1")
	}
	for _, insecure := range []uint16{tls.VersionTLS10, tls.VersionTLS11} {
		d := tls.Dialer{Config: &tls.Config{RootCAs: bundle, MinVersion: insecure, MaxVersion: insecure}} //nolint:gosec // that is the point
		if conn, err := d.DialContext(t.Context(), "tcp", strings.TrimPrefix(h.URL, "https://")); err == nil {
			conn.Close()
			t.Errorf("the hub speaks TLS version %x", insecure)
		}
	}
}
