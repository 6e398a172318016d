package machine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// packages are what a machine needs beside Debian's minimal base, so that it
// never asks for a package again.
var packages = []string{
	"systemd", "systemd-sysv", "dbus", "iproute2", "iptables", "nftables", "kmod", "procps", "curl",
	"ca-certificates", "conntrack", "socat", "ethtool", "ipset", "runc", "containernetworking-plugins",
	"iputils-ping", "util-linux", "mount", "less",
}

const suite = "bookworm"

// BaseRoot returns the directory of the root that all machines share below
// their own changes, and builds it below dir when it is missing. progress is
// told what is being done.
func BaseRoot(ctx context.Context, dir string, progress func(string)) (string, error) {
	sum := sha256.Sum256([]byte(suite + strings.Join(packages, ",")))
	root := filepath.Join(dir, "root-"+hex.EncodeToString(sum[:6]))
	if _, err := os.Stat(root); err == nil {
		return root, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("look for the machines' root: %w", err)
	}
	// Built aside and renamed, so that what stands there is whole.
	building := root + ".building"
	if err := os.RemoveAll(building); err != nil {
		return "", fmt.Errorf("clear %s: %w", building, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make %s: %w", dir, err)
	}
	// What debootstrap mounts and starts in the new root must not outlive
	// it: the next build removes everything below.
	script := `mount --make-rprivate / && mount -t proc proc /proc && exec debootstrap "$@"`
	cmd := exec.CommandContext(ctx, "sh", "-c", script, "sh", "--variant=minbase", "--include="+strings.Join(packages, ","), suite, building)
	out := &lastLines{tell: progress}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = isolated()
	if err := run(cmd); err != nil {
		return "", fmt.Errorf("debootstrap: %w: %s", err, out)
	}
	for _, path := range []string{"var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"} {
		if err := os.RemoveAll(filepath.Join(building, path)); err != nil {
			return "", fmt.Errorf("trim the machines' root: %w", err)
		}
	}
	if err := os.Rename(building, root); err != nil {
		return "", fmt.Errorf("finish the machines' root: %w", err)
	}
	return root, nil
}

// run runs cmd on a thread that lives as long as the child, to which the
// child's death signal is tied.
func run(cmd *exec.Cmd) error {
	done := make(chan error, 1)
	go func() { // ends with the child
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- cmd.Run()
	}()
	return <-done
}

// lastLines keeps the end of a program's output for its error.
type lastLines struct {
	tell  func(string)
	lines []string
}

func (l *lastLines) Write(p []byte) (int, error) {
	for line := range strings.SplitSeq(strings.TrimSpace(string(p)), "\n") {
		if line == "" {
			continue
		}
		if l.tell != nil {
			l.tell(line)
		}
		l.lines = append(l.lines, line)
		if len(l.lines) > 5 {
			l.lines = l.lines[1:]
		}
	}
	return len(p), nil
}

func (l *lastLines) String() string { return strings.Join(l.lines, "; ") }
