package machine

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const keeperEnv = "YURT_TEST_KEEPER"

// keeperSpec is the machine that a process of its own keeps.
func keeperSpec(dir string) Spec {
	return Spec{
		Name: "yurt-test-k1", Dir: dir, Netns: "/var/run/netns/yurt-test-k1",
		Files: Files(), Disks: []string{"/var/lib/containerd"}, MemoryMax: 1 << 30,
	}
}

// A keeper killed with -9 takes its machine along, and what it could not
// clean up does not hinder the next.
func TestMachineDiesWithItsKeeper(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	base, err := BaseRoot(ctx, cacheDir(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if dir := os.Getenv(keeperEnv); dir != "" {
		spec := keeperSpec(dir)
		spec.Base = base
		if err := Run(ctx, spec); err != nil {
			t.Fatal(err)
		}
		return
	}
	mounts := mountsOf(t)
	spec := keeperSpec(t.TempDir())
	spec.Base = base
	newNamespace(t, spec.Name)
	settings := hostSettings(t)

	keeper := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestMachineDiesWithItsKeeper$")
	keeper.Env = append(os.Environ(), keeperEnv+"="+spec.Dir)
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	if err := WaitBooted(ctx, spec.Name); err != nil {
		t.Fatal(err)
	}
	if err := Run(ctx, spec); err == nil {
		t.Error("a machine runs twice")
	}
	// What a kubelet would set is set in its eyes only.
	if out, err := Exec(ctx, spec.Name, "sh", "-c", "echo 7 > /proc/sys/kernel/panic; cat /proc/sys/kernel/panic"); err != nil || out != "7\n" {
		t.Errorf("setting in the machine: %q, %v", out, err)
	}
	if got := hostSettings(t); got != settings {
		t.Errorf("settings of the host changed: %s, were %s", got, settings)
	}
	id, err := Exec(ctx, spec.Name, "cat", "/etc/machine-id", "/etc/hostname")
	if err != nil || !strings.HasSuffix(id, spec.Name+"\n") || len(id) < 40 {
		t.Errorf("identity: %q, %v", id, err)
	}
	if err := keeper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = keeper.Wait()
	await(t, ctx, "the machine's end", func() bool {
		pids, err := processes(spec.Name)
		return err == nil && len(pids) == 0
	})
	for range 2 {
		if err := Cleanup(ctx, spec.Name, spec.Dir); err != nil {
			t.Fatal(err)
		}
	}
	if after := mountsOf(t); after != mounts {
		t.Errorf("mounts left:\n%s", after)
	}
	if groups, _ := groupsOf(spec.Name); len(groups) > 0 {
		t.Errorf("cgroups left: %v", groups)
	}
}

// Two machines run at the same time; one is cut off its power in the middle
// of its work while its neighbour does not notice.
func TestPowerCutHitsOneMachine(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	base, err := BaseRoot(ctx, cacheDir(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	boots := 0
	spec := func(name string) Spec {
		return Spec{
			Name: name, Base: base, Dir: t.TempDir(), Netns: newNamespace(t, name),
			Files: Files(), Disks: []string{"/var/lib/containerd"},
		}
	}
	one, two := spec("yurt-test-p1"), spec("yurt-test-p2")
	one.BeforeBoot = func(context.Context) error { boots++; return nil }
	run, stop := context.WithCancel(ctx)
	defer stop()
	first, second := start(t, run, one), start(t, run, two)
	neighbour, err := Leader(two.Name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Exec(ctx, one.Name, "systemd-run", "--unit=busy", "sh", "-c",
		"while :; do echo x >> /var/lib/containerd/busy; (sleep 60 &) ; done"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := PowerOff(ctx, one.Name); err != nil {
		t.Fatal(err)
	}
	t.Logf("power cut took %s", time.Since(began))
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if now, err := Leader(two.Name); err != nil || now != neighbour {
		t.Errorf("neighbour: %d, %v; was %d", now, err, neighbour)
	}
	began = time.Now()
	first = start(t, run, one)
	t.Logf("boot took %s", time.Since(began))
	if boots != 2 {
		t.Errorf("prepared %d boots, want 2", boots)
	}
	stop()
	for _, done := range []<-chan error{first, second} {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func hostSettings(t *testing.T) string {
	t.Helper()
	var all []string
	for _, key := range []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/pid_max", "fs/protected_fifos"} {
		value, err := os.ReadFile("/proc/sys/" + key)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		all = append(all, key+"="+strings.TrimSpace(string(value)))
	}
	return strings.Join(all, " ")
}
