package playground

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/yurt-edge/yurt/playground/network"
)

// keeperDir in the environment makes the test binary a keeper of that folder.
const keeperDir = "YURT_TEST_KEEPER_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(keeperDir); dir != "" {
		if err := keep(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func keep(dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	top, err := smallTopology()
	if err != nil {
		return err
	}
	return RunKeeper(ctx, Config{Dir: dir, Topology: top, WithoutHub: true, lockAddress: smallLock})
}

// The small playground runs beside the default one, with which it shares
// neither names nor addresses nor the lock.
const (
	smallLock = "@yurt-playground-small"
	smallName = "yurttest"
)

// smallTopology is one cloud machine and one edge machine.
func smallTopology() (Topology, error) {
	return ParseTopology([]byte(`
name: ` + smallName + `
wan: 10.91.0.0/24
host: 10.91.0.1
serviceCIDR: 10.112.0.0/16
clusterCIDR: 10.245.0.0/16
dns: 10.112.0.10
pools:
- {name: sky, subnet: 10.91.1.0/24}
- {name: ground, subnet: 10.91.2.0/24}
machines:
- {name: test-sky, pool: sky, role: cloud, address: 10.91.1.11, podCIDR: 10.245.1.0/24}
- {name: test-ground, pool: ground, role: edge, address: 10.91.2.11, podCIDR: 10.245.2.0/24}
`))
}

// spawnKeeper starts a playground that another process owns.
func spawnKeeper(t *testing.T, dir string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), keeperDir+"="+dir)
	cmd.Stderr = os.Stderr
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*keeperStopBudget)
		defer cancel()
		if err := down(ctx, dir, smallLock, smallName); err != nil {
			t.Error(err)
		}
	})
	if err := Spawn(t.Context(), cmd, t.Output()); err != nil {
		t.Fatal(err)
	}
}

// leftovers returns what of a playground is still on the host.
func leftovers(t *testing.T, dir, prefix string, machines []Machine) []string {
	t.Helper()
	var left []string
	if there, err := network.Exists(prefix); err != nil {
		t.Fatal(err)
	} else if there {
		left = append(left, "network "+prefix)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		left = append(left, "folder "+dir)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		left = append(left, "mounts below "+dir)
	}
	for _, m := range machines {
		groups, err := filepath.Glob("/sys/fs/cgroup/yurt-playground/" + m.Name)
		if err != nil {
			t.Fatal(err)
		}
		v1, err := filepath.Glob("/sys/fs/cgroup/*/yurt-playground/" + m.Name)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, append(groups, v1...)...)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range processes {
		line, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(line), dir) {
			left = append(left, "process "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return left
}

// The incident: cut, heal, plug pulled and put back, then the keeper is killed
// with everything running.
func TestDownAfterAKilledKeeper(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "p")
	spawnKeeper(t, dir)
	p, err := Attach(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	edge := p.Topology().Machines[1]

	reaches := func() bool {
		// Any HTTP answer will do; curl fails when there is none.
		_, err := p.Exec(ctx, edge.Name, "curl", "--silent", "--insecure", "--max-time", "1", "https://10.91.0.1:6443/version")
		return err == nil
	}
	for _, mode := range []network.Mode{network.LinkDown, network.Blackhole} {
		if err := p.Cut(ctx, edge.Name, mode); err != nil {
			t.Fatal(err)
		}
		if reaches() {
			t.Errorf("machine reaches the API server with its link cut (%s)", mode)
		}
		if err := p.Heal(ctx, edge.Name); err != nil {
			t.Fatal(err)
		}
		if err := poll(ctx, waitPoll, func() (bool, error) { return reaches(), nil }); err != nil {
			t.Fatalf("machine does not reach the API server after the heal of a cut (%s): %v", mode, err)
		}
	}
	if err := p.Cut(ctx, "nowhere", network.LinkDown); err == nil || !strings.Contains(Hint(err), edge.Name) {
		t.Errorf("cut of an unknown target: want the known ones in a hint, got %v (%s)", err, Hint(err))
	}

	boot := func() string {
		t.Helper()
		if err := p.WaitBooted(ctx, edge.Name); err != nil {
			t.Fatal(err)
		}
		id, err := p.Exec(ctx, edge.Name, "systemctl", "show", "--property=UserspaceTimestampMonotonic")
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	first := boot()
	if err := p.PowerOff(ctx, edge.Name); err != nil {
		t.Fatal(err)
	}
	if s, err := p.Status(ctx); err != nil || s.Machines[1].On || !s.Machines[0].On {
		t.Errorf("want only %s off, got %+v, %v", edge.Name, s.Machines, err)
	}
	if err := p.PowerOn(ctx, edge.Name); err != nil {
		t.Fatal(err)
	}
	second := boot()
	if first == second {
		t.Error("machine did not boot anew after its power cut")
	}
	if err := p.Reboot(ctx, edge.Name); err != nil {
		t.Fatal(err)
	}
	if third := boot(); third == second {
		t.Error("machine did not boot anew after its reboot")
	}
	// The API server reaches the kubelet, whose serving certificate the
	// keeper approved. The node's condition is from before the reboot.
	err = poll(ctx, waitPoll, func() (bool, error) {
		out, err := p.Kubectl(ctx, "get", "--raw", "/api/v1/nodes/"+edge.Name+"/proxy/healthz")
		return err == nil && out == "ok", nil
	})
	if err != nil {
		t.Errorf("healthz of the kubelet through the API server: %v", err)
	}
	if err := p.WaitNodes(ctx); err != nil {
		t.Error(err)
	}

	h, err := lockHolder(ctx, smallLock)
	if err != nil || h.dir != dir {
		t.Fatalf("want the keeper of %s to hold the lock, got %+v, %v", dir, h, err)
	}
	if err := syscall.Kill(h.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := down(ctx, dir, smallLock, smallName); err != nil {
			t.Fatal(err)
		}
	}
	if left := leftovers(t, dir, smallName, p.Topology().Machines); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
