package doctor

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/yurt-edge/yurt/internal/report"
)

const (
	leastBytes  = 64 << 20  // free, for the store to grow
	fewBytes    = 256 << 20 // below it is warned
	leastInodes = 1000
	slowSync    = time.Second
	manyStarts  = 5
)

// local are the checks of the node itself.
func (s *Settings) local() []check {
	return []check{
		{"clock", nil, time.Second, s.clock},
		{"disk", nil, 3 * time.Second, s.disk},
		{"unit", nil, time.Second, s.unit},
		{"ports", nil, time.Second, s.ports},
		{"address", []string{"unit"}, time.Second, s.address},
		{"certificate", nil, time.Second, s.certificate},
		{"hub", []string{"unit", "ports"}, 3 * time.Second, s.hub},
		{"names", []string{"hub", "address"}, 3 * time.Second, s.names},
		{"kubelet", nil, 2 * time.Second, s.kubelet},
	}
}

// clock compares the time with what was written before, which is not of the
// future.
func (s *Settings) clock(context.Context) Result {
	const command = "timedatectl"
	var newest time.Time
	var witness string
	see := func(at time.Time, what string) {
		if at.After(newest) {
			newest, witness = at, what
		}
	}
	for _, dir := range []string{filepath.Join(s.RootDir, "pki"), filepath.Join(s.RootDir, "store")} {
		entries, _ := os.ReadDir(dir) // what is not there says nothing
		for _, e := range entries {
			if info, err := e.Info(); err == nil {
				see(info.ModTime(), filepath.Join(dir, e.Name())+" was written")
			}
		}
	}
	for _, name := range []string{"ca.crt", "hub-client.pem"} {
		if c, err := readCertificate(s.pki(name)); err == nil {
			see(c.NotBefore, "the certificate in "+s.pki(name)+" begins")
		}
	}
	now := time.Now()
	if newest.After(now.Add(time.Minute)) {
		return fail("it is %s here, but %s at %s", stamp(now), witness, stamp(newest)).so("the clock is behind: set it", command)
	}
	var t unix.Timex
	if state, err := unix.Adjtimex(&t); err == nil && state == unix.TIME_ERROR {
		return warn("%s; nothing keeps the clock right", stamp(now)).so("turn on NTP", command+" set-ntp true")
	}
	return ok("%s", stamp(now))
}

func (s *Settings) disk(ctx context.Context) Result {
	dir := s.RootDir
	df := "df -h " + dir
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fail("%s does not exist: no hub was ever started", dir).so("start it", "systemctl start "+unitName)
		}
		return fail("%s: %v", dir, err).so("look at the mounts and the kernel's log", "dmesg --level=err,warn")
	}
	if fs.Flags&unix.ST_RDONLY != 0 {
		return fail("%s is read-only", dir).so("the kernel does so after an error of the disk", "dmesg --level=err,warn")
	}
	free := int64(fs.Bavail) * fs.Bsize //nolint:gosec // sizes of a disk
	if free < leastBytes {
		return fail("%s has %d MiB left", dir, free>>20).so("free some space", df)
	}
	if fs.Files > 0 && fs.Ffree < leastInodes {
		return fail("%s has %d inodes left", dir, fs.Ffree).so("remove many small files", "df -i "+dir)
	}
	took, err := trySync(dir)
	switch {
	case err != nil:
		return fail("a file cannot be written to %s: %v", dir, err).so("look at the kernel's log", "dmesg --level=err,warn")
	case ctx.Err() != nil || took > slowSync:
		return warn("a small file took %s to reach the disk", took.Round(time.Millisecond)).so("the disk is slow or dying", "dmesg --level=err,warn")
	case free < fewBytes:
		return warn("%s has %d MiB left", dir, free>>20).so("free some space", df)
	}
	return ok("%s has %d MiB left; a small file is on the disk in %s", dir, free>>20, took.Round(100*time.Microsecond))
}

// trySync writes a small file as the store would, and takes it away again.
func trySync(dir string) (took time.Duration, err error) {
	f, err := os.CreateTemp(dir, ".doctor-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	begun := time.Now()
	if _, err = f.Write(make([]byte, 4096)); err == nil {
		err = f.Sync()
	}
	return time.Since(begun), err
}

func (s *Settings) unit(context.Context) Result {
	if s.Unit == "" {
		return ok("not run by systemd")
	}
	const logs = "journalctl -u yurthub -n 50"
	state := s.State
	switch {
	case state == nil:
		return warn("systemd cannot be asked").so("is this the node itself?", "systemctl status yurthub")
	case state["LoadState"] != "loaded":
		return fail("%s is %s", s.Unit, state["LoadState"]).so("install the unit", "systemctl status yurthub")
	case state["ActiveState"] == "activating" && state["SubState"] == "auto-restart":
		return fail("%s ends again and again (%s, %s restarts)", s.Unit, state["Result"], state["NRestarts"]).so("its log says why", logs)
	case state["ActiveState"] != "active" && state["ActiveState"] != "activating":
		return fail("%s is %s (%s)", s.Unit, state["ActiveState"], state["Result"]).so("start it; its log says why it ended", "systemctl start yurthub; "+logs)
	case state["ActiveState"] == "activating":
		return warn("%s waits for its first certificate", s.Unit).so("its log says what for", logs)
	case state["UnitFileState"] != "enabled" && state["UnitFileState"] != "enabled-runtime":
		return warn("%s is active, but would not start at boot (%s)", s.Unit, state["UnitFileState"]).so("enable it", "systemctl enable yurthub")
	}
	if n, err := strconv.Atoi(state["NRestarts"]); err == nil && n > manyStarts {
		return warn("%s is active, after %d restarts", s.Unit, n).so("its log says why", logs)
	}
	return ok("%s is active", s.Unit)
}

// ports sees whether the hub has its ports, or could have them.
func (s *Settings) ports(ctx context.Context) Result {
	var free, held []string
	var lc net.ListenConfig
	for _, port := range []int{s.Proxy, s.Health} {
		addr := net.JoinHostPort(s.Bind, strconv.Itoa(port))
		l, err := lc.Listen(ctx, "tcp", addr)
		if err == nil {
			_ = l.Close()
			free = append(free, addr)
			continue
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return fail("%s cannot be used: %v", addr, err).so("", "ip address show lo")
		}
		pid, name := listener(port)
		if s.Unit != "" && s.State != nil && pid != 0 && strconv.Itoa(pid) != s.State["MainPID"] {
			return fail("%s is taken by %s (process %d)", addr, name, pid).so("stop that, or give the hub another port", "ss -ltnp")
		}
		held = append(held, addr)
	}
	switch {
	case len(free) == 0:
		return ok("the hub listens on %s", strings.Join(held, " and "))
	case len(held) == 0 && s.State["ActiveState"] != "active":
		return ok("%s are free", strings.Join(free, " and "))
	}
	return fail("nobody listens on %s", strings.Join(free, " and ")).so("the hub's log says why", "journalctl -u yurthub -n 50")
}

// listener finds the process that listens on a TCP port. Zero: not known.
func listener(port int) (pid int, name string) {
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		text, _ := os.ReadFile(table) // without IPv6 there is no second
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) > 9 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				inodes["socket:["+f[9]+"]"] = true
			}
		}
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is valid
	for _, link := range links {
		if target, err := os.Readlink(link); err != nil || !inodes[target] {
			continue
		}
		dir := filepath.Dir(filepath.Dir(link))
		pid, _ = strconv.Atoi(filepath.Base(dir)) // the pattern says so
		text, _ := os.ReadFile(filepath.Join(dir, "comm"))
		return pid, strings.TrimSpace(string(text))
	}
	return 0, ""
}

// address sees whether pods have an address to reach the hub at.
func (s *Settings) address(context.Context) Result {
	if s.DummyIP == "" {
		return ok("pods do not reach the hub, as it was told")
	}
	links, err := netlink.LinkList()
	if err != nil {
		return warn("interfaces cannot be listed: %v", err).so("", "ip address")
	}
	for _, l := range links {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if a.IP.String() != s.DummyIP {
				continue
			}
			if l.Type() != "dummy" {
				return ok("%s is on %s; an interface of its own needs the kernel module dummy", s.DummyIP, l.Attrs().Name)
			}
			return ok("%s is on %s", s.DummyIP, l.Attrs().Name)
		}
	}
	return fail("%s is on no interface: pods cannot reach the hub", s.DummyIP).
		so("the hub puts it back within 30 s; its log says what keeps it from that", "journalctl -u yurthub | grep link-local")
}

// readCertificate reads the first certificate of a PEM file.
func readCertificate(path string) (*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
	}
	return nil, fmt.Errorf("%s holds no certificate", path)
}

func (s *Settings) certificate(context.Context) Result {
	path := s.pki("hub-client.pem")
	c, err := readCertificate(path)
	if errors.Is(err, os.ErrNotExist) {
		path = s.Credential // with --bootstrap-mode=kubeletcertificate it is the hub's too
		c, err = readCertificate(path)
	}
	const renew = "kubeadm token create"
	if err != nil {
		return fail("the hub has no client certificate: %v", err).
			so("make a bootstrap token where the cluster's administrator is, put it into the hub's --bootstrap-file, restart the hub", renew)
	}
	now, left := time.Now(), time.Until(c.NotAfter)
	switch {
	case left <= 0:
		return fail("%s expired on %s", path, stamp(c.NotAfter)).
			so("the hub asks for another when the cloud is in reach; where that is refused, give it a new bootstrap token", renew)
	case now.Before(c.NotBefore):
		return fail("%s is valid from %s on", path, stamp(c.NotBefore)).so("the clock is behind: set it", "timedatectl")
	case left < c.NotAfter.Sub(c.NotBefore)/10:
		return warn("%s expires on %s and should have been renewed", path, stamp(c.NotAfter)).
			so("see that the link is up and the request is approved", "kubectl get csr")
	}
	return ok("valid until %s", stamp(c.NotAfter))
}

// hub asks the hub itself.
func (s *Settings) hub(ctx context.Context) Result {
	r, err := report.Ask(ctx, s.RunDir)
	if err != nil {
		return fail("the hub does not answer: %v", err).so("its log may say why", "journalctl -u yurthub -n 50")
	}
	var bad []string
	for _, c := range r.Conditions {
		if c.Status == report.False && c.Type != "YurtHubLinkReady" { // the way to the cloud is looked at below
			bad = append(bad, c.Type+" "+c.Reason+": "+c.Message)
		}
	}
	if len(bad) > 0 {
		return warn("%s", strings.Join(bad, "; ")).so("", "yurtadm status")
	}
	if !r.Online {
		return warn("the hub is offline since %s: %s", stamp(r.Since), r.Reason).so("the hop that fails is below", "")
	}
	return ok("online since %s", stamp(r.Since))
}

// kubelet sees whether the kubelet asks the hub and can trust it.
func (s *Settings) kubelet(ctx context.Context) Result {
	path := s.Kubeconfig
	if path == "" {
		path = kubeletConfig()
	}
	config, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return warn("the kubelet's kubeconfig is not read: %v", err).so("name it with --kubelet-kubeconfig", "")
	}
	c, there := config.Contexts[config.CurrentContext]
	if !there || config.Clusters[c.Cluster] == nil {
		return fail("%s has no cluster for its context %q", path, config.CurrentContext).so("", "kubectl --kubeconfig "+path+" config view")
	}
	cluster := config.Clusters[c.Cluster]
	if cluster.Server != s.hubURL() {
		return fail("%s points at %s, not at the hub: the kubelet stops with the link", path, cluster.Server).
			so("point it at the hub and restart the kubelet",
				fmt.Sprintf("kubectl --kubeconfig %s config set-cluster %s --server=%s --certificate-authority=%s", path, c.Cluster, s.hubURL(), s.pki("ca-bundle.crt")))
	}
	ca := cluster.CertificateAuthorityData
	if len(ca) == 0 {
		file := cluster.CertificateAuthority
		if file != "" && !filepath.IsAbs(file) {
			file = filepath.Join(filepath.Dir(path), file)
		}
		if ca, err = os.ReadFile(file); err != nil {
			return fail("the CA that %s names is not read: %v", path, err).so("the hub writes it", "ls -l "+s.pki("ca-bundle.crt"))
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	d := tls.Dialer{Config: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	conn, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(s.hubURL(), "https://"))
	if wrong, is := errors.AsType[*tls.CertificateVerificationError](err); is {
		return fail("the CA of %s does not vouch for the hub: %v", path, wrong.Err).
			so("name the hub's bundle in it", "kubectl --kubeconfig "+path+" config set-cluster "+c.Cluster+" --certificate-authority="+s.pki("ca-bundle.crt"))
	}
	if err == nil {
		_ = conn.Close()
	}
	return ok("%s points at the hub", path)
}

// kubeletConfig returns the kubeconfig of the kubelet that runs, or where one
// would be.
func kubeletConfig() string {
	const name = "--kubeconfig"
	names, _ := filepath.Glob("/proc/[0-9]*/comm") // the pattern is valid
	for _, file := range names {
		if text, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(text)) != "kubelet" {
			continue
		}
		line, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
		args := strings.Split(string(bytes.Trim(line, "\x00")), "\x00")
		for i, a := range args {
			if value, is := strings.CutPrefix(a, name+"="); is {
				return value
			}
			if a == name && i+1 < len(args) {
				return args[i+1]
			}
		}
	}
	for _, path := range []string{"/etc/kubernetes/kubelet.conf", "/var/lib/openyurt/kubelet.conf"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return "/var/lib/kubelet/kubeconfig"
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
