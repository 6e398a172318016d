package disktest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// controlName is the file by which a program on the Disk steers it.
const controlName = ".control"

// Control steers the Disk that is mounted at a folder, from any process.
type Control struct{ dir string }

// At returns the Control of the Disk mounted at dir.
func At(dir string) Control { return Control{dir} }

// Mark writes text into the log, in order with what the process does.
func (c Control) Mark(text string) error { return c.send("mark " + text) }

// Fail is Disk.Fail.
func (c Control) Fail(kind Kind, pass, times int, errno syscall.Errno) error {
	return c.send(fmt.Sprintf("fail %s %d %d %d", kind, pass, times, int(errno)))
}

// Heal is Disk.Heal.
func (c Control) Heal() (failed int, err error) {
	if err := c.send("heal"); err != nil {
		return 0, err
	}
	text, err := os.ReadFile(filepath.Join(c.dir, controlName))
	if err != nil {
		return 0, fmt.Errorf("steer disk: %w", err)
	}
	_, err = fmt.Sscan(string(text), &failed)
	return failed, err
}

func (c Control) send(text string) error {
	f, err := os.OpenFile(filepath.Join(c.dir, controlName), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("steer disk: %w", err)
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// control is the file itself: a command is written, the count of faults read.
type control struct {
	fs.Inode
	disk *Disk
}

var (
	_ = fs.NodeOpener((*control)(nil))
	_ = fs.NodeReader((*control)(nil))
	_ = fs.NodeWriter((*control)(nil))
	_ = fs.NodeGetattrer((*control)(nil))
)

// Open keeps the kernel from caching.
func (c *control) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

// Getattr says that it may be written.
func (c *control) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = syscall.S_IFREG | 0o600
	return 0
}

// Read returns how many operations failed by the last Fail.
func (c *control) Read(_ context.Context, _ fs.FileHandle, _ []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	c.disk.mu.Lock()
	defer c.disk.mu.Unlock()
	text := fmt.Append(nil, c.disk.hit)
	return fuse.ReadResultData(text[min(off, int64(len(text))):]), 0
}

// Write takes one command.
func (c *control) Write(_ context.Context, _ fs.FileHandle, data []byte, _ int64) (uint32, syscall.Errno) {
	verb, rest, _ := strings.Cut(string(data), " ")
	switch verb {
	case "mark":
		c.disk.Mark(rest)
	case "heal":
		c.disk.Heal()
	case "fail":
		var (
			kind              Kind
			pass, times, code int
		)
		if _, err := fmt.Sscan(rest, &kind, &pass, &times, &code); err != nil {
			return 0, syscall.EINVAL
		}
		c.disk.Fail(kind, pass, times, syscall.Errno(code))
	default:
		return 0, syscall.EINVAL
	}
	return uint32(len(data)), 0
}
