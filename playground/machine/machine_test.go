package machine

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// cacheDir is where the playground keeps the root too.
func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("YURT_CACHE"); dir != "" {
		return filepath.Join(dir, "machine")
	}
	dir, err := filepath.Abs("../../.cache/machine")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func newNamespace(t *testing.T, name string) string {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if _, err := netns.NewNamed(name); err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(old); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netns.DeleteNamed(name) })
	return "/var/run/netns/" + name
}

func start(t *testing.T, ctx context.Context, spec Spec) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- Run(ctx, spec) }()
	if err := WaitBooted(ctx, spec.Name); err != nil {
		console, _ := os.ReadFile(filepath.Join(spec.Dir, "console.log"))
		t.Fatalf("%v\n%s", err, console)
	}
	return done
}

func bootID(t *testing.T, ctx context.Context, name string) string {
	t.Helper()
	// The kernel's boot id is the host's; systemd's is the machine's.
	id, err := Exec(ctx, name, "stat", "-c", "%Y", "/proc/1")
	if err != nil {
		t.Fatal(err)
	}
	leader, err := Leader(name)
	if err != nil {
		t.Fatal(err)
	}
	return id + string(rune(leader))
}

func TestMachineBootsRebootsAndLosesPower(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	base, err := BaseRoot(ctx, cacheDir(t), func(line string) { t.Log(line) })
	if err != nil {
		t.Fatal(err)
	}
	mounts := mountsOf(t)
	spec := Spec{
		Name: "yurt-test-m1", Base: base, Dir: t.TempDir(), Netns: newNamespace(t, "yurt-test-m1"),
		Files: Files(), Disks: []string{"/var/lib/containerd"},
	}
	spec.Files["/etc/hello"] = File{Data: []byte("hello\n")}
	run, stop := context.WithCancel(ctx)
	defer stop()
	done := start(t, run, spec)

	if out, err := Exec(ctx, spec.Name, "cat", "/etc/hello"); err != nil || out != "hello\n" {
		t.Fatalf("file in the machine: %q, %v", out, err)
	}
	if _, err := Exec(ctx, spec.Name, "mkdir", "/sys/fs/cgroup/pids/inner"); err != nil {
		t.Errorf("a service cannot make cgroups: %v", err)
	}
	if m, err := Memory(spec.Name); err != nil || m <= 0 {
		t.Errorf("memory: %d, %v", m, err)
	}

	before := bootID(t, ctx, spec.Name)
	if _, err := Exec(ctx, spec.Name, "touch", "/var/lib/containerd/kept", "/root/kept"); err != nil {
		t.Fatal(err)
	}
	if err := Reboot(ctx, spec.Name); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "another boot", func() bool {
		leader, err := Leader(spec.Name)
		return err == nil && leader > 0 && !strings.HasSuffix(before, string(rune(leader)))
	})
	if err := WaitBooted(ctx, spec.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := Exec(ctx, spec.Name, "ls", "/var/lib/containerd/kept", "/root/kept"); err != nil {
		t.Errorf("after a reboot: %v", err)
	}

	if _, err := Exec(ctx, spec.Name, "systemd-run", "--unit=busy", "sh", "-c", "while :; do echo x >> /root/busy; done"); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "the busy loop to write", func() bool {
		_, err := Exec(ctx, spec.Name, "test", "-s", "/root/busy")
		return err == nil
	})
	if err := PowerOff(ctx, spec.Name); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatalf("run after a power cut: %v", err)
	}
	if after := mountsOf(t); after != mounts {
		t.Errorf("mounts left:\n%s", after)
	}
	if groups, _ := groupsOf(spec.Name); len(groups) > 0 {
		t.Errorf("cgroups left: %v", groups)
	}

	done = start(t, run, spec)
	if _, err := Exec(ctx, spec.Name, "ls", "/root/busy"); err != nil {
		t.Errorf("after a power cut: %v", err)
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if pids, _ := processes(spec.Name); len(pids) > 0 {
		t.Errorf("processes left: %v", pids)
	}
}

func await(t *testing.T, ctx context.Context, what string, ready func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		case <-tick.C:
		}
	}
}

// mountsOf returns the mount points that machines could have left.
func mountsOf(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.SplitSeq(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 4 && !strings.HasPrefix(f[4], "/var/run/netns") && !strings.HasPrefix(f[4], "/run/netns") {
			out = append(out, f[4])
		}
	}
	return strings.Join(out, "\n")
}
