package hub

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/yurt-edge/yurt/internal/atomicfile"
	"github.com/yurt-edge/yurt/internal/hub/store"
)

const (
	// diskEvery is how often a hub that runs without its disk looks at it.
	diskEvery = time.Minute
	// memoryDir holds what a hub writes that has no disk.
	memoryDir = "/dev/shm"
	maxCopy   = 1 << 20
)

// tryDisk returns an error unless files can be made and written in dir.
func tryDisk(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("use disk: %w", err)
	}
	probe := filepath.Join(dir, ".probe")
	// More than a file system may find room for in a file's own record.
	if err := atomicfile.WriteFile(probe, make([]byte, 8<<10), 0o600); err != nil {
		return fmt.Errorf("use disk: %w", err)
	}
	return os.Remove(probe)
}

// settleDisk lets the hub start whatever the disk is like: one that is full,
// read-only or broken must not take the node's API down with it. The hub then
// works on a copy of its keys and certificates in memory, and opens its store
// there if it must.
func (h *Hub) settleDisk() error {
	h.cfg.StoreDir = filepath.Dir(h.cfg.storePath())
	h.disk = tryDisk(h.cfg.RootDir)
	if h.disk == nil {
		return clearKeys(filepath.Join(h.cfg.RootDir, "pki"))
	}
	h.rootDir = h.cfg.RootDir
	name := fmt.Sprintf("yurthub-%x", sha256.Sum256([]byte(h.rootDir)))
	shadow := filepath.Join(memoryDir, name[:24])
	h.log.Error("disk cannot be written, the hub works in memory and keeps no writes", "path", h.rootDir, "err", h.disk)
	if err := os.RemoveAll(shadow); err != nil { // of an earlier life
		return fmt.Errorf("work in memory: %w", err)
	}
	// It must be ours: anybody may make a folder in that place.
	if err := os.Mkdir(shadow, 0o700); err != nil {
		return fmt.Errorf("work in memory: %w", err)
	}
	h.cfg.RootDir = shadow
	for _, part := range []string{"", "pki"} {
		if err := copyFiles(filepath.Join(shadow, part), filepath.Join(h.rootDir, part)); err != nil {
			return fmt.Errorf("work in memory: %w", err)
		}
	}
	return nil
}

// copyFiles copies the small files of a folder as far as they can be read.
func copyFiles(to, from string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return nil //nolint:nilerr // there is nothing to go on from
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !e.Type().IsRegular() || info.Size() > maxCopy {
			continue
		}
		data, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err != nil {
			continue // what it held is made anew
		}
		if err := os.WriteFile(filepath.Join(to, e.Name()), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// clearKeys sets folders aside that stand where files of dir should.
func clearKeys(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look through keys: %w", err)
	}
	for _, e := range entries {
		if !e.IsDir() || strings.HasSuffix(e.Name(), ".damaged") {
			continue
		}
		name := filepath.Join(dir, e.Name())
		if err := errors.Join(os.RemoveAll(name+".damaged"), os.Rename(name, name+".damaged")); err != nil {
			return fmt.Errorf("set folder aside: %w", err)
		}
	}
	return nil
}

// diskHealth returns why the hub cannot keep what it is given, or nil.
func (h *Hub) diskHealth() error { return errors.Join(h.disk, h.store.Health()) }

// leaveDisk removes what was written in memory.
func (h *Hub) leaveDisk() {
	if h.disk == nil {
		return
	}
	if err := os.RemoveAll(h.cfg.RootDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.log.Warn("copy in memory not removed", "err", err)
	}
}

// awaitDisk ends the hub once the disk can be used again, so that its next
// life keeps what it is given. A hub that has its disk waits for nothing.
func (h *Hub) awaitDisk(ctx context.Context) error {
	if h.disk == nil && h.store.Durable() == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(diskEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if h.disk != nil && tryDisk(h.rootDir) != nil {
			continue
		}
		if h.store.Durable() == nil {
			break
		}
		s, err := store.Open(ctx, store.Config{Path: h.cfg.storePath(), Key: h.keys.DataKey()})
		if err == nil && s.Close() == nil {
			break
		}
	}
	return errors.New("the disk can be used again: start anew to use it")
}

// countStore adds what the store tells of itself to the metrics.
func (h *Hub) countStore(reg prometheus.Registerer) {
	reg.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "node_yurthub_store_damaged_total", Help: "Stored objects that were damaged and set aside.",
		}, func() float64 { return float64(h.store.Stats().Damaged) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "node_yurthub_store_written_bytes_total", Help: "Bytes written to the store's file, in whole pages.",
		}, func() float64 { return float64(h.store.Stats().BytesWritten) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "node_yurthub_store_commits_total", Help: "Transactions of the store.",
		}, func() float64 { return float64(h.store.Stats().Commits) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "node_yurthub_store_healthy", Help: "1 when what the hub is given is kept on disk.",
		}, func() float64 {
			if h.diskHealth() != nil {
				return 0
			}
			return 1
		}),
	)
}
