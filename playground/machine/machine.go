package machine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Spec says what a machine is.
type Spec struct {
	// Name is the machine's host name; it must be unique on the host.
	Name string
	// Base is the root of BaseRoot, which stays as it is.
	Base string
	// Dir takes all that the machine writes, over boots.
	Dir string
	// Netns is the path of the network namespace that the machine lives in.
	Netns string
	// Files are put into the root before each boot.
	Files map[string]File
	Binds []Bind
	// Disks are paths of the machine that must be real directories: an
	// overlay cannot lie on an overlay.
	Disks []string
	// MemoryMax bounds the memory of all its processes; zero does not.
	MemoryMax int64
	// BeforeBoot, when set, is called before each boot, also that of a
	// reboot, while nothing of the machine runs.
	BeforeBoot func(context.Context) error
}

// identity returns the files that tell one machine from another.
func (s Spec) identity() map[string]File {
	id := sha256.Sum256([]byte("yurt machine " + s.Name))
	return map[string]File{
		"/etc/hostname":   {Data: []byte(s.Name + "\n")},
		"/etc/machine-id": {Mode: 0o444, Data: []byte(hex.EncodeToString(id[:16]) + "\n")},
	}
}

// File is a file of a machine. With Link it is a symbolic link.
type File struct {
	Mode os.FileMode
	Data []byte
	Link string
}

// Bind is a directory or file of the host inside a machine.
type Bind struct {
	Source, Target string
	ReadOnly       bool
}

const (
	rebootCode = 133 // of nspawn with --keep-unit when the guest reboots
	stopGrace  = 5 * time.Second
)

// Run boots the machine, boots it again whenever it reboots, and returns nil
// once it is powered off: by itself, by PowerOff, or because ctx ended.
// Nothing of it runs or is mounted then. When the calling process dies, all
// processes of the machine die with it.
func Run(ctx context.Context, spec Spec) error {
	unlock, err := lock(spec)
	if err != nil {
		return err
	}
	defer unlock()
	for {
		code, err := boot(ctx, spec)
		clean := context.WithoutCancel(ctx)
		if cleanErr := Cleanup(clean, spec.Name, spec.Dir); cleanErr != nil {
			return errors.Join(err, cleanErr)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if code != rebootCode {
			return nil
		}
	}
}

// boot runs the machine until it goes down and returns nspawn's exit code.
func boot(ctx context.Context, spec Spec) (int, error) {
	if err := Cleanup(ctx, spec.Name, spec.Dir); err != nil {
		return 0, err
	}
	root, err := mount(spec)
	if err != nil {
		return 0, err
	}
	for _, files := range []map[string]File{spec.identity(), spec.Files} {
		if err := writeFiles(root, files); err != nil {
			return 0, err
		}
	}
	if spec.BeforeBoot != nil {
		if err := spec.BeforeBoot(ctx); err != nil {
			return 0, fmt.Errorf("prepare boot of %s: %w", spec.Name, err)
		}
	}
	groups, err := makeCgroups(spec.Name, spec.MemoryMax)
	if err != nil {
		return 0, err
	}
	console, err := os.OpenFile(filepath.Join(spec.Dir, "console.log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, fmt.Errorf("open console of %s: %w", spec.Name, err)
	}
	defer console.Close() //nolint:errcheck // the child has its own descriptor

	//nolint:noctx // wait ends it with ctx, in its own way
	cmd := exec.Command("/bin/sh", append([]string{"-c", enterScript, "sh", strings.Join(groups, " ")}, nspawn(spec, root)...)...)
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_API_VFS_WRITABLE=1")
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = isolated()
	return wait(ctx, spec.Name, cmd)
}

// isolated puts a command and all that it starts into a process and a mount
// namespace that end with it, and it with this process. Killing nspawn alone
// would leave its guest running.
func isolated() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
}

// enterScript puts itself into the machine's cgroups and becomes nspawn.
const enterScript = `set -e
for g in $1; do echo 0 > $g/cgroup.procs; done
shift
mount --make-rslave /
mount -t proc proc /proc
mkdir -p /run/systemd/nspawn
mount -t tmpfs -o mode=755 tmpfs /run/systemd/nspawn
exec "$@"`

// lock keeps two machines from sharing a directory, as long as this process
// lives.
func lock(spec Spec) (unlock func(), err error) {
	if err := os.MkdirAll(spec.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("prepare machine %s: %w", spec.Name, err)
	}
	f, err := os.Create(filepath.Join(spec.Dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("lock machine %s: %w", spec.Name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("machine %s runs already: %w", spec.Name, err)
	}
	return func() { _ = f.Close() }, nil
}

func nspawn(spec Spec, root string) []string {
	args := []string{
		"systemd-nspawn", "--quiet", "--directory=" + root, "--machine=" + spec.Name, "--hostname=" + spec.Name,
		"--register=no", "--keep-unit", "--capability=all", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
		"--system-call-filter=@keyring @mount bpf perf_event_open",
		"--bind=/dev/kmsg", "--network-namespace-path=" + spec.Netns,
	}
	for _, disk := range spec.Disks {
		args = append(args, "--bind="+diskDir(spec.Dir, disk)+":"+disk)
	}
	for _, b := range spec.Binds {
		flag := "--bind="
		if b.ReadOnly {
			flag = "--bind-ro="
		}
		args = append(args, flag+b.Source+":"+b.Target)
	}
	return append(args, "--boot")
}

func diskDir(dir, disk string) string {
	return filepath.Join(dir, "disks", strings.ReplaceAll(strings.Trim(disk, "/"), "/", "-"))
}

// wait starts cmd on a thread that lives as long as the child, to which the
// child's death signal is tied, and powers the machine off when ctx ends.
func wait(ctx context.Context, name string, cmd *exec.Cmd) (int, error) {
	ended := make(chan error, 1)
	started := make(chan error, 1)
	go func() { // ends with the child
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return 0, fmt.Errorf("start machine %s: %w", name, err)
	}
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		if err := PowerOff(context.WithoutCancel(ctx), name); err != nil {
			return 0, err
		}
		err = <-ended
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		if exit.ExitCode() == -1 { // killed: a power cut
			return 0, nil
		}
		return exit.ExitCode(), nil
	}
	return 0, fmt.Errorf("run machine %s: %w", name, err)
}

func mount(spec Spec) (string, error) {
	root := filepath.Join(spec.Dir, "root")
	upper, work := filepath.Join(spec.Dir, "upper"), filepath.Join(spec.Dir, "work")
	dirs := []string{root, upper, work}
	for _, disk := range spec.Disks {
		dirs = append(dirs, diskDir(spec.Dir, disk))
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", fmt.Errorf("prepare machine %s: %w", spec.Name, err)
		}
	}
	options := "lowerdir=" + spec.Base + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		return "", fmt.Errorf("mount root of %s: %w", spec.Name, err)
	}
	return root, nil
}

func writeFiles(root string, files map[string]File) error {
	for path, f := range files {
		target := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("write %s: %w", path, err)
		}
		var err error
		if f.Link != "" {
			err = os.Symlink(f.Link, target)
		} else {
			mode := f.Mode
			if mode == 0 {
				mode = 0o644
			}
			err = os.WriteFile(target, f.Data, mode)
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	return nil
}

// Leader returns the host's id of the machine's process 1.
func Leader(name string) (int, error) {
	pids, err := processes(name)
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil {
			continue // it ended
		}
		for line := range bytes.SplitSeq(text, []byte("\n")) {
			ids := strings.Fields(string(line))
			// Process 1 in nspawn's namespace inside our own; a
			// container's process 1 is one level below.
			if len(ids) == 4 && ids[0] == "NSpid:" && ids[3] == "1" {
				return pid, nil
			}
		}
	}
	return 0, fmt.Errorf("machine %s does not run", name)
}

// Command returns a command that runs inside the machine when started.
func Command(ctx context.Context, name string, argv ...string) (*exec.Cmd, error) {
	leader, err := Leader(name)
	if err != nil {
		return nil, err
	}
	args := append([]string{
		"-t", strconv.Itoa(leader), "-m", "-u", "-i", "-n", "-p", "-C", "--",
		"/usr/bin/env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"TERM=" + os.Getenv("TERM"), "HOME=/root", "LANG=C.UTF-8",
	}, argv...)
	return exec.CommandContext(ctx, "nsenter", args...), nil
}

// Exec runs a program inside the machine and returns what it printed. The
// error quotes its standard error.
func Exec(ctx context.Context, name string, argv ...string) (string, error) {
	cmd, err := Command(ctx, name, argv...)
	if err != nil {
		return "", err
	}
	// nsenter forks to enter the process namespace: when ctx ends its child
	// must go too, and whatever it left may not hold our pipes open.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s on %s: %w: %s", strings.Join(argv, " "), name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(out), nil
}

// WaitBooted returns once systemd inside says that the boot is over, with
// units that failed or without.
func WaitBooted(ctx context.Context, name string) error {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		state, err := Exec(ctx, name, "systemctl", "is-system-running")
		if s := strings.TrimSpace(state); s == "running" || s == "degraded" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for boot of %s (%s): %w", name, strings.TrimSpace(state), errors.Join(context.Cause(ctx), err))
		case <-ticker.C:
		}
	}
}

// Reboot restarts the machine in good order. It returns once the order is
// given.
func Reboot(ctx context.Context, name string) error {
	_, err := Exec(ctx, name, "systemctl", "reboot", "--no-wall")
	return err
}

// PowerOff pulls the plug: every process of the machine ends at once and
// none of them learns of it first.
func PowerOff(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, stopGrace*2)
	defer cancel()
	return killAll(ctx, name)
}

// Cleanup removes what a machine leaves behind when it or its keeper dies:
// processes, mounts and cgroups. What the machine wrote stays.
func Cleanup(ctx context.Context, name, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, stopGrace*2)
	defer cancel()
	if err := killAll(ctx, name); err != nil {
		return err
	}
	if err := unmountBelow(dir); err != nil {
		return err
	}
	return removeCgroups(name)
}

// unmountBelow takes away every mount at or below dir, the last made first.
func unmountBelow(dir string) error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	var targets []string
	for line := range strings.SplitSeq(string(text), "\n") {
		fields := strings.Fields(line)
		if len(fields) > 4 && (fields[4] == dir || strings.HasPrefix(fields[4], dir+"/")) {
			targets = append(targets, fields[4])
		}
	}
	for _, target := range slices.Backward(targets) {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
	return nil
}
