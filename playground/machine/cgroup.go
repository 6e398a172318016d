package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	cgroupMount = "/sys/fs/cgroup"
	// cgroupParent holds one group per machine, in every hierarchy.
	cgroupParent = "yurt-playground"
)

// unified reports whether the host mounts the one cgroup v2 hierarchy and
// nothing else.
func unified() bool {
	var st unix.Statfs_t
	return unix.Statfs(cgroupMount, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// CgroupDriver is the kubelet's and containerd's way to make cgroups in a
// machine of this host.
func CgroupDriver() string {
	if unified() {
		return "systemd"
	}
	return "cgroupfs"
}

// hierarchies returns the mount points in which a machine gets its group.
func hierarchies() ([]string, error) {
	if unified() {
		return []string{cgroupMount}, nil
	}
	entries, err := os.ReadDir(cgroupMount)
	if err != nil {
		return nil, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	var out []string
	for _, e := range entries {
		// Names such as cpu,cpuacct are real; others may be links to them.
		if e.IsDir() {
			out = append(out, filepath.Join(cgroupMount, e.Name()))
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	return out, nil
}

// makeCgroups makes the machine's group everywhere and returns their paths.
func makeCgroups(name string, memoryMax int64) ([]string, error) {
	mounts, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, mount := range mounts {
		dir := mount
		for _, part := range []string{cgroupParent, name} {
			if unified() {
				if err := enableControllers(dir); err != nil {
					return nil, err
				}
			}
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
				return nil, fmt.Errorf("make cgroup: %w", err)
			}
			if err := inheritCPUSet(dir); err != nil {
				return nil, err
			}
		}
		if err := limitMemory(dir, memoryMax); err != nil {
			return nil, err
		}
		out = append(out, dir)
	}
	return out, nil
}

// enableControllers lets children of a v2 group have every controller that
// the group has.
func enableControllers(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("read cgroup controllers: %w", err)
	}
	for c := range strings.FieldsSeq(string(have)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return fmt.Errorf("enable cgroup controller %s in %s: %w", c, dir, err)
		}
	}
	return nil
}

// inheritCPUSet fills what a new v1 cpuset lacks: without it nothing may run.
func inheritCPUSet(dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, os.ErrNotExist) || len(bytes.TrimSpace(value)) > 0 {
			continue
		}
		if err == nil {
			value, err = os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		}
		if err == nil && len(bytes.TrimSpace(value)) > 0 {
			err = os.WriteFile(filepath.Join(dir, file), value, 0)
		}
		if err != nil {
			return fmt.Errorf("set %s: %w", file, err)
		}
	}
	return nil
}

// limitMemory bounds the memory of a group in the hierarchy that counts it.
func limitMemory(dir string, limit int64) error {
	if limit == 0 {
		return nil
	}
	for _, file := range []string{"memory.limit_in_bytes", "memory.max"} {
		err := os.WriteFile(filepath.Join(dir, file), strconv.AppendInt(nil, limit, 10), 0)
		// Nothing can be created there, which the kernel calls EACCES.
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("limit memory: %w", err)
		}
	}
	return nil
}

// groupsOf returns the machine's groups that exist.
func groupsOf(name string) ([]string, error) {
	mounts, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, mount := range mounts {
		dir := filepath.Join(mount, cgroupParent, name)
		if _, err := os.Stat(dir); err == nil {
			out = append(out, dir)
		}
	}
	return out, nil
}

// processes returns the host's ids of all processes of the machine.
func processes(name string) ([]int, error) {
	groups, err := groupsOf(name)
	if err != nil {
		return nil, err
	}
	seen := map[int]bool{}
	for _, group := range groups {
		err := filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) {
				return nil // it went while we walked
			}
			if err != nil || d.Name() != "cgroup.procs" {
				return err
			}
			text, err := os.ReadFile(path)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
				return nil
			}
			if err != nil {
				return err
			}
			for field := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
					seen[pid] = true
				}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list processes of %s: %w", name, err)
		}
	}
	var out []int
	for pid := range seen {
		out = append(out, pid)
	}
	slices.Sort(out)
	return out, nil
}

// freeze stops or resumes all processes of the machine at once, where the
// host can do that.
func freeze(name string, on bool) {
	if unified() {
		value := "0"
		if on {
			value = "1"
		}
		_ = os.WriteFile(filepath.Join(cgroupMount, cgroupParent, name, "cgroup.freeze"), []byte(value), 0)
		return
	}
	value := "THAWED"
	if on {
		value = "FROZEN"
	}
	_ = os.WriteFile(filepath.Join(cgroupMount, "freezer", cgroupParent, name, "freezer.state"), []byte(value), 0)
}

// killAll ends every process of the machine, none of which gets to run
// again, and returns once they are gone.
func killAll(ctx context.Context, name string) error {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	groups, err := groupsOf(name)
	if err != nil {
		return err
	}
	for _, group := range groups {
		// Since Linux 5.14 a v2 group dies whole by one write, with what
		// it forks meanwhile. The loop does the rest, and older kernels.
		_ = os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0)
	}
	for {
		freeze(name, true)
		pids, err := processes(name)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may be gone
		}
		freeze(name, false)
		if len(pids) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill %s: %d processes are left: %w", name, len(pids), context.Cause(ctx))
		case <-ticker.C:
		}
	}
}

// removeCgroups removes the machine's groups, and the parent when it is the
// last.
func removeCgroups(name string) error {
	groups, err := groupsOf(name)
	if err != nil {
		return err
	}
	for _, group := range groups {
		var dirs []string
		err := filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("list cgroups of %s: %w", name, err)
		}
		slices.Reverse(dirs) // children first
		for _, dir := range dirs {
			if err := removeCgroup(dir); err != nil {
				return err
			}
		}
		_ = os.Remove(filepath.Dir(group)) // fails while other machines are there
	}
	return nil
}

// removeCgroup waits out the moment in which the kernel still counts the
// processes that just died.
func removeCgroup(dir string) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// Memory returns the bytes that the machine's processes hold, as its cgroup
// counts them, without the page cache where the host can tell.
func Memory(name string) (int64, error) {
	file, key := filepath.Join(cgroupMount, "memory", cgroupParent, name, "memory.stat"), "total_rss"
	if unified() {
		file, key = filepath.Join(cgroupMount, cgroupParent, name, "memory.stat"), "anon"
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("read memory of %s: %w", name, err)
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if name, value, ok := strings.Cut(line, " "); ok && name == key {
			return strconv.ParseInt(value, 10, 64)
		}
	}
	return 0, fmt.Errorf("read memory of %s: no %s in %s", name, key, file)
}
