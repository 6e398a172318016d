// Package disktest is a disk for tests that fails on request and tells what a
// power cut would have left of it.
//
// A Disk is a FUSE file system of one folder. It sees every write, truncation,
// sync and rename that the kernel hands down, in their order, whoever makes
// them; so what a program really does is known, and nothing has to be assumed
// of the libraries in it. Log.PowerCuts builds the states that may be on the
// disk after a cut at any moment.
//
// A program that maps files of the Disk into its memory must be another
// process than the test: a page fault cannot be served by a Go program that
// waits for it. Such a process steers the disk through Control.
package disktest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Kind is what an operation does.
type Kind string

// Kinds of operations. Any is for faults only.
const (
	Create   Kind = "create"
	Write    Kind = "write"
	Truncate Kind = "truncate"
	Sync     Kind = "sync" // fsync or fdatasync of a file
	Rename   Kind = "rename"
	Remove   Kind = "remove"
	SyncDir  Kind = "syncdir"
	Mark     Kind = "mark" // no operation: the program says something
	Any      Kind = "any"
)

// An Op is one operation as it came down from the kernel.
type Op struct {
	Kind   Kind
	File   int    // number of the file
	Name   string // Create, Rename, Remove; the text of a Mark
	To     string // Rename
	Offset int64  // Write; the size for Truncate
	Data   []byte // Write: what was taken
	// Failed is set for a Sync or SyncDir that returned an error. Other
	// operations that fail leave nothing and are not in the log.
	Failed bool
}

// Log is what was done to a Disk, in order.
type Log []Op

// Disk is a mounted file system of one folder.
type Disk struct {
	Dir string // where it is mounted

	mu    sync.Mutex // guards all below
	log   Log
	files int
	fault fault
	hit   int // times that a fault was met
}

type fault struct {
	kind  Kind
	after int // operations that pass before the first that fails
	times int // that fail; negative: all
	errno syscall.Errno
}

// short is the error of a write that takes half of its bytes. What follows of
// it fails with ENOSPC.
const short = syscall.Errno(0)

// Mount makes an empty Disk, which goes away with the test. It needs root and
// /dev/fuse.
func Mount(tb testing.TB) *Disk {
	tb.Helper()
	d := &Disk{Dir: tb.TempDir()}
	forever := time.Hour
	server, err := fs.Mount(d.Dir, &folder{disk: d}, &fs.Options{
		EntryTimeout: &forever, AttrTimeout: &forever, // only the kernel changes anything
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "disktest", Name: "disktest", MaxWrite: 1 << 20},
	})
	if err != nil {
		tb.Fatalf("mount a disk to fail, as root and with /dev/fuse: %v", err)
	}
	tb.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			tb.Errorf("unmount: %v", err)
		}
		server.Wait()
	})
	return d
}

// Log returns what was done so far.
func (d *Disk) Log() Log {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.log)
}

// Fail lets the next operations of the kind pass and then some fail. Zero for
// errno makes a write short. Negative times: until Heal.
func (d *Disk) Fail(kind Kind, pass, times int, errno syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault, d.hit = fault{kind, pass, times, errno}, 0
}

// Heal ends what Fail began and returns how many operations failed.
func (d *Disk) Heal() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = fault{}
	return d.hit
}

// Mark writes text into the log.
func (d *Disk) Mark(text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, Op{Kind: Mark, Name: text})
}

// failing reports whether an operation of the kind shall fail, and how.
func (d *Disk) failing(kind Kind) (syscall.Errno, bool) {
	f := &d.fault
	if f.times == 0 || f.kind != kind && f.kind != Any {
		return 0, false
	}
	if f.after > 0 {
		f.after--
		return 0, false
	}
	if f.times > 0 {
		f.times--
	}
	d.hit++
	return f.errno, true
}

// do runs an operation unless it shall fail.
func (d *Disk) do(op Op, apply func()) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	errno, fails := d.failing(op.Kind)
	if fails && errno == short {
		errno = syscall.ENOSPC
	}
	if fails {
		if op.Kind == Sync || op.Kind == SyncDir {
			op.Failed = true
			d.log = append(d.log, op)
		}
		return errno
	}
	if apply != nil {
		apply()
	}
	d.log = append(d.log, op)
	return 0
}

// folder is the root.
type folder struct {
	fs.Inode
	disk *Disk
}

var (
	_ = fs.NodeOnAdder((*folder)(nil))
	_ = fs.NodeCreater((*folder)(nil))
	_ = fs.NodeUnlinker((*folder)(nil))
	_ = fs.NodeRenamer((*folder)(nil))
	_ = fs.NodeFsyncer((*folder)(nil))
)

// OnAdd adds the file by which a program steers the disk.
func (n *folder) OnAdd(ctx context.Context) {
	c := n.NewPersistentInode(ctx, &control{disk: n.disk}, fs.StableAttr{Mode: syscall.S_IFREG})
	n.AddChild(controlName, c, true)
}

// Create makes a file.
func (n *folder) Create(ctx context.Context, name string, _, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	f := &file{disk: n.disk, mode: mode & 0o7777}
	n.disk.mu.Lock()
	n.disk.files++
	f.number = n.disk.files
	n.disk.mu.Unlock()
	if errno := n.disk.do(Op{Kind: Create, File: f.number, Name: name}, nil); errno != 0 {
		return nil, nil, 0, errno
	}
	out.Mode = syscall.S_IFREG | f.mode
	return n.NewPersistentInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG}), nil, 0, 0
}

// Unlink removes a name.
func (n *folder) Unlink(_ context.Context, name string) syscall.Errno {
	return n.disk.do(Op{Kind: Remove, Name: name}, nil)
}

// Rename gives a file another name.
func (n *folder) Rename(_ context.Context, name string, _ fs.InodeEmbedder, to string, flags uint32) syscall.Errno {
	if flags != 0 {
		return syscall.EINVAL
	}
	return n.disk.do(Op{Kind: Rename, Name: name, To: to}, nil)
}

// Fsync makes the names durable.
func (n *folder) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return n.disk.do(Op{Kind: SyncDir}, nil)
}

// file is a regular file. Its disk's mutex guards it.
type file struct {
	fs.Inode
	disk   *Disk
	number int
	mode   uint32
	data   []byte // as programs see it, which is not what a power cut leaves
}

var (
	_ = fs.NodeOpener((*file)(nil))
	_ = fs.NodeReader((*file)(nil))
	_ = fs.NodeWriter((*file)(nil))
	_ = fs.NodeFsyncer((*file)(nil))
	_ = fs.NodeGetattrer((*file)(nil))
	_ = fs.NodeSetattrer((*file)(nil))
)

// Open needs no handle.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

// Read returns bytes.
func (f *file) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if off >= int64(len(f.data)) {
		return fuse.ReadResultData(nil), 0
	}
	n := copy(dest, f.data[off:])
	return fuse.ReadResultData(dest[:n]), 0
}

// Write takes bytes, or some of them.
func (f *file) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if errno, fails := f.disk.failing(Write); fails {
		if errno != short {
			return 0, errno
		}
		f.disk.fault = fault{Write, 0, 1, syscall.ENOSPC}
		data = data[:len(data)/2]
	}
	op := Op{Kind: Write, File: f.number, Offset: off, Data: bytes.Clone(data)}
	f.data = op.apply(f.data)
	f.disk.log = append(f.disk.log, op)
	return uint32(len(data)), 0
}

// Fsync makes the bytes durable.
func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return f.disk.do(Op{Kind: Sync, File: f.number}, nil)
}

// Getattr tells size and mode.
func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	out.Mode, out.Size = syscall.S_IFREG|f.mode, uint64(len(f.data))
	out.Blocks = (out.Size + 511) / 512
	return 0
}

// Setattr changes size and mode.
func (f *file) Setattr(ctx context.Context, h fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if mode, ok := in.GetMode(); ok {
		f.disk.mu.Lock()
		f.mode = mode & 0o7777
		f.disk.mu.Unlock()
	}
	if size, ok := in.GetSize(); ok {
		op := Op{Kind: Truncate, File: f.number, Offset: int64(size)}
		if errno := f.disk.do(op, func() { f.data = op.apply(f.data) }); errno != 0 {
			return errno
		}
	}
	return f.Getattr(ctx, h, out)
}

// apply returns the content of a file after the operation.
func (op *Op) apply(data []byte) []byte {
	end := op.Offset + int64(len(op.Data))
	switch {
	case op.Kind == Truncate && end < int64(len(data)):
		return data[:end]
	case end > int64(len(data)):
		data = append(data, make([]byte, end-int64(len(data)))...)
	}
	copy(data[op.Offset:], op.Data)
	return data
}

// String tells of the operation in a failed test.
func (op *Op) String() string {
	text := []string{string(op.Kind)}
	if op.Name != "" {
		text = append(text, op.Name)
	}
	if op.To != "" {
		text = append(text, "to", op.To)
	}
	if op.Kind == Write || op.Kind == Truncate {
		text = append(text, fmt.Sprintf("file %d, %d bytes at %d", op.File, len(op.Data), op.Offset))
	}
	if op.Failed {
		text = append(text, "(failed)")
	}
	return strings.Join(text, " ")
}
