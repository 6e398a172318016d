package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const namespaceDir = "/var/run/netns"

// openNamespace opens a named namespace, or the host's for the empty name.
func openNamespace(name string) (netns.NsHandle, error) {
	path := filepath.Join(namespaceDir, name)
	if name == "" {
		path = "/proc/self/ns/net"
	}
	h, err := netns.GetFromPath(path)
	if err != nil {
		return h, fmt.Errorf("open namespace %s: %w", path, err)
	}
	return h, nil
}

// withHandle calls f with a netlink handle of a namespace.
func withHandle(name string, f func(*netlink.Handle) error) error {
	ns, err := openNamespace(name)
	if err != nil {
		return err
	}
	defer ns.Close() //nolint:errcheck // read only
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open netlink in namespace %s: %w", name, err)
	}
	defer h.Close()
	return f(h)
}

// inside calls f on a thread that is in a namespace: for what asks the
// kernel in the name of the calling thread, as sysctls, TAPs and nft do.
func inside(name string, f func() error) error {
	ns, err := openNamespace(name)
	if err != nil {
		return err
	}
	defer ns.Close() //nolint:errcheck // read only
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own namespace: %w", err)
	}
	defer home.Close() //nolint:errcheck // read only
	if err := netns.Set(ns); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace %s: %w", name, err)
	}
	err = f()
	if back := netns.Set(home); back != nil {
		// The thread stays locked and dies with its goroutine, so that
		// nobody else runs in the wrong namespace.
		return errors.Join(err, fmt.Errorf("leave namespace %s: %w", name, back))
	}
	runtime.UnlockOSThread()
	return err
}

func createNamespace(name string) error {
	// The thread comes back to where it was, whatever NewNamed does.
	return inside("", func() error {
		ns, err := netns.NewNamed(name)
		if err != nil {
			return fmt.Errorf("create namespace %s: %w", name, err)
		}
		return ns.Close()
	})
}

// deleteNamespace takes the links out of a namespace and removes its name.
// A process still inside, or a copy of the mount in another mount namespace,
// then holds on to an empty shell only.
func deleteNamespace(name string) error {
	path := filepath.Join(namespaceDir, name)
	var errs []error
	var st unix.Statfs_t
	// The file of a half-made namespace is an ordinary one.
	if err := unix.Statfs(path, &st); err == nil && st.Type == unix.NSFS_MAGIC {
		errs = append(errs, withHandle(name, func(h *netlink.Handle) error {
			return deleteLinks(h, "lo")
		}))
	}
	// Each creation that was interrupted and repeated left a mount.
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
			break
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove namespace: %w", err))
	}
	return errors.Join(errs...)
}

// deleteLinks removes every link except those named. Deleting one end of a
// pair deletes the other, so a link that is gone is no fault.
func deleteLinks(h *netlink.Handle, except ...string) error {
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var errs []error
	for _, l := range links {
		keep := false
		for _, name := range except {
			keep = keep || l.Attrs().Name == name
		}
		if keep {
			continue
		}
		err := h.LinkDel(l)
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) {
			errs = append(errs, fmt.Errorf("delete link %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// namespaces lists the namespaces that a prefix owns.
func namespaces(prefix string) ([]string, error) {
	entries, err := os.ReadDir(namespaceDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix+"-") || strings.HasPrefix(e.Name(), prefix+".") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// sysctl writes settings of the namespace of the calling thread.
func sysctl(values map[string]string) error {
	for key, value := range values {
		path := "/proc/sys/" + key
		if err := os.WriteFile(path, []byte(value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set %s: %w", key, err)
		}
	}
	return nil
}
