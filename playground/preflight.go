package playground

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	diskNeeded     = 8 << 30
	capSysResource = 24
)

// tools returns the programs that must be on the host, with the Debian package
// that has each.
func tools() map[string]string {
	return map[string]string{
		"debootstrap":    "debootstrap",
		"systemd-nspawn": "systemd-container",
		"nsenter":        "util-linux",
		"ip":             "iproute2",
		"nft":            "nftables",
		"go":             "golang-go",
	}
}

// preflight returns why this host cannot run the topology. It changes nothing.
func preflight(ctx context.Context, dir string, t Topology) error {
	for _, check := range []func() error{
		func() error { return checkRoot(os.Geteuid()) },
		func() error { return checkTools(exec.LookPath) },
		func() error { return checkKernel(ctx) },
		func() error { return checkDisk(dir, diskNeeded, freeBytes) },
		func() error { return checkAddresses(t) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func checkRoot(euid int) error {
	if euid == 0 {
		return nil
	}
	return WithHint(errors.New("the playground needs root: it makes network namespaces and boots machines"), "run it with sudo")
}

func checkTools(look func(string) (string, error)) error {
	var missing, packages []string
	for _, tool := range sortedKeys(tools()) {
		if _, err := look(tool); err != nil {
			missing = append(missing, tool)
			packages = append(packages, tools()[tool])
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return WithHint(fmt.Errorf("programs are missing: %s", strings.Join(missing, ", ")),
		"apt-get install -y "+strings.Join(packages, " "))
}

// checkKernel looks for what machines and their network are made of, by
// making it where nothing else can tell.
func checkKernel(ctx context.Context) error {
	if err := checkOverlay(); err != nil {
		return err
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return WithHint(errors.New("the kernel has no TUN devices (/dev/net/tun)"), "modprobe tun")
	}
	if out, err := exec.CommandContext(ctx, "nft", "list", "tables").CombinedOutput(); err != nil {
		return WithHint(fmt.Errorf("nftables does not work: %s", bytes.TrimSpace(out)), "modprobe nf_tables")
	}
	for _, kind := range []string{"veth", "bridge"} {
		if err := checkLinkType(kind); err != nil {
			return err
		}
	}
	return nil
}

func checkOverlay() error {
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(string(known)), "overlay") {
		return nil
	}
	return WithHint(errors.New("the kernel does not know the overlay file system"), "modprobe overlay")
}

// checkLinkType makes a link of the kind and removes it. The name is unlike
// any that a playground uses.
func checkLinkType(kind string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "yurtpf" + strconv.Itoa(os.Getpid()%100000)
	var link netlink.Link = &netlink.Bridge{LinkAttrs: attrs}
	if kind == "veth" {
		link = &netlink.Veth{LinkAttrs: attrs, PeerName: attrs.Name + "p"}
	}
	if err := netlink.LinkAdd(link); err != nil {
		return WithHint(fmt.Errorf("the kernel cannot make %s links: %w", kind, err), "modprobe "+kind)
	}
	return netlink.LinkDel(link)
}

func checkDisk(dir string, need uint64, free func(string) (uint64, error)) error {
	have, err := free(dir)
	if err != nil {
		return err
	}
	if have >= need {
		return nil
	}
	return WithHint(fmt.Errorf("%s has %.1f GB free, the playground needs %.0f GB", dir, gigabytes(have), gigabytes(need)),
		"make room, or name a folder of a larger disk with --dir")
}

func gigabytes(n uint64) float64 { return float64(n) / (1 << 30) }

// freeBytes asks the nearest folder above dir that exists.
func freeBytes(dir string) (uint64, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return st.Bavail * uint64(st.Bsize), nil
		}
		if !errors.Is(err, unix.ENOENT) || dir == filepath.Dir(dir) {
			return 0, fmt.Errorf("free space of %s: %w", dir, err)
		}
		dir = filepath.Dir(dir)
	}
}

// checkAddresses refuses a topology whose networks the host uses already.
func checkAddresses(t Topology) error {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	p := t.plan()
	taken := map[string]func(net.IP) bool{}
	for _, cidr := range append([]string{t.WAN, t.ServiceCIDR, t.ClusterCIDR}, subnets(t)...) {
		_, ipnet, err := net.ParseCIDR(cidr)
		if err != nil {
			return err
		}
		taken[cidr] = ipnet.Contains
	}
	for _, addr := range addrs {
		ipnet, ok := addr.(*net.IPNet)
		if !ok {
			continue
		}
		for cidr, contains := range taken {
			if contains(ipnet.IP) {
				return WithHint(fmt.Errorf("the host has address %s, which is in %s of the playground", ipnet.IP, cidr),
					fmt.Sprintf("run `yurtadm playground down` if playground %q is left over, or change the topology with --topology", p.Prefix))
			}
		}
	}
	return nil
}

func subnets(t Topology) []string {
	var all []string
	for _, p := range t.Pools {
		all = append(all, p.Subnet)
	}
	return all
}

// hasCapability reports whether this process may use a capability.
func hasCapability(bit uint) bool {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	for line := range strings.SplitSeq(string(status), "\n") {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			return err == nil && set&(1<<bit) != 0
		}
	}
	return false
}
