package conform

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/test/bed"
)

// A disk state is what a hub may find when it starts.
type diskState struct {
	name string
	// make turns a sound root directory into the state.
	make func(t *testing.T, root string)
	// kept is set when the replica must be served with the link cut.
	kept bool
	// says is what readiness must say; empty when the hub must be ready.
	says string
}

func storeFile(root string) string { return filepath.Join(root, "store", "hub.db") }

var diskStates = []diskState{
	{name: "sound", make: func(*testing.T, string) {}, kept: true},
	{name: "store empty", make: func(t *testing.T, root string) { put(t, storeFile(root), nil) }},
	{name: "store is noise", make: func(t *testing.T, root string) { put(t, storeFile(root), bytes.Repeat([]byte("noise"), 9999)) }},
	{name: "store cut off", make: func(t *testing.T, root string) { do(t, os.Truncate(storeFile(root), 3*4096+100)) }},
	{name: "store of another version", make: func(t *testing.T, root string) {
		data := get(t, storeFile(root))
		data[16+4]++
		data[4096+16+4]++
		put(t, storeFile(root), data)
	}},
	{name: "store is a folder, and what was set aside too", make: func(t *testing.T, root string) {
		do(t, os.Remove(storeFile(root)))
		do(t, os.MkdirAll(storeFile(root)+"/x", 0o700))
		do(t, os.MkdirAll(storeFile(root)+".damaged/y", 0o700))
	}},
	{name: "store is a dangling link", make: func(t *testing.T, root string) {
		do(t, os.Remove(storeFile(root)))
		do(t, os.Symlink("/nowhere/store", storeFile(root)))
	}},
	{name: "store is a pipe", make: func(t *testing.T, root string) {
		do(t, os.Remove(storeFile(root)))
		do(t, syscall.Mkfifo(storeFile(root), 0o600))
	}},
	{name: "folder of the store is a file", says: "not on disk", make: func(t *testing.T, root string) {
		do(t, os.RemoveAll(filepath.Dir(storeFile(root))))
		put(t, filepath.Dir(storeFile(root)), nil)
	}},
	{name: "keys and certificates empty", make: func(t *testing.T, root string) {
		eachKey(t, root, func(name string) { put(t, name, nil) })
	}},
	{name: "keys and certificates are noise", make: func(t *testing.T, root string) {
		eachKey(t, root, func(name string) { put(t, name, []byte("\x00\xff noise")) })
	}},
	{name: "keys and certificates are folders", make: func(t *testing.T, root string) {
		eachKey(t, root, func(name string) { do(t, os.Remove(name)); do(t, os.MkdirAll(name+"/x", 0o700)) })
	}},
	{name: "nothing there", make: func(t *testing.T, root string) { do(t, os.RemoveAll(root)) }},
	{name: "root is a file", says: "not a directory", make: func(t *testing.T, root string) {
		do(t, os.RemoveAll(root))
		put(t, root, nil)
	}},
	{name: "read-only", says: "read-only", kept: true, make: func(t *testing.T, root string) {
		small(t, root, "size=64m")
		do(t, syscall.Mount("none", root, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	}},
	{name: "read-only and damaged", says: "read-only", make: func(t *testing.T, root string) {
		put(t, storeFile(root), bytes.Repeat([]byte("noise"), 9999))
		small(t, root, "size=64m")
		do(t, syscall.Mount("none", root, "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	}},
	{name: "full", says: "no space", kept: true, make: func(t *testing.T, root string) {
		small(t, root, "size=4m")
		f, err := os.Create(filepath.Join(root, "fill"))
		do(t, err)
		defer f.Close()
		if _, err := io.Copy(f, zeros{}); err == nil {
			t.Fatal("the disk takes everything")
		}
	}},
	{name: "no inodes", says: "no space", kept: true, make: func(t *testing.T, root string) {
		small(t, root, "size=64m,nr_inodes=100")
		for i := range 100 {
			if err := os.Mkdir(filepath.Join(root, fmt.Sprint(i)), 0o700); err != nil {
				return
			}
		}
		t.Fatal("the disk takes every file")
	}},
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, name string, data []byte) {
	t.Helper()
	do(t, os.WriteFile(name, data, 0o600))
}

func get(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	do(t, err)
	return data
}

func eachKey(t *testing.T, root string, fn func(name string)) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, "pki"))
	do(t, err)
	for _, e := range entries {
		fn(filepath.Join(root, "pki", e.Name()))
	}
	if len(entries) == 0 {
		t.Fatal("no keys")
	}
}

// small moves root to a file system of its own.
func small(t *testing.T, root, options string) {
	t.Helper()
	before := root + ".before"
	do(t, os.Rename(root, before))
	do(t, os.Mkdir(root, 0o700))
	if err := syscall.Mount("none", root, "tmpfs", 0, options); err != nil {
		t.Fatalf("mount a small file system, as root: %v", err)
	}
	t.Cleanup(func() { do(t, syscall.Unmount(root, syscall.MNT_DETACH)) })
	do(t, os.CopyFS(root, os.DirFS(before)))
}

// The hub starts from any disk state and serves the node: from the cloud what
// the disk has lost, from the disk what it still has while the link is cut.
func TestHubStartsFromAnyDisk(t *testing.T) {
	t.Parallel()
	hub, link := busy.hub(t, "edge-disk")
	_, edge := busy.sides(t, hub, "reader")
	warm(t, edge, "/api/v1/namespaces/conform-a/configmaps")
	warm(t, edge, "/api/v1/services")
	hub.Stop()
	for _, state := range diskStates {
		t.Run(state.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			do(t, os.Mkdir(root, 0o700))
			for _, part := range []string{"pki", "store"} {
				do(t, os.CopyFS(filepath.Join(root, part), os.DirFS(filepath.Join(hub.Dir, part))))
			}
			state.make(t, root)
			hub.Args = []string{"--root-dir", root}
			mode := bed.Whole
			if state.kept {
				mode = bed.Down
			}
			do(t, link.Cut(mode))
			do(t, hub.Launch())
			// One that works in memory cleans up behind itself.
			end := hub.Kill
			if state.says != "" {
				end = hub.Stop
			}
			defer end()
			startedHub(t, hub, state)
		})
	}
}

// startedHub checks what a hub that was just launched does.
func startedHub(t *testing.T, hub *bed.Hub, state diskState) {
	t.Helper()
	// The CA of a hub that has lost it is new.
	client := newSide(t, "hub", &rest.Config{
		Host: hub.URL, QPS: -1, BearerToken: busy.tokens["reader"], TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	})
	mustAwait(t, func(ctx context.Context) error {
		a, err := client.ask(ctx, question{path: "/api/v1/namespaces/conform-a/configmaps?resourceVersion=0"})
		if err == nil && (a.code != http.StatusOK || !bytes.Contains(a.body, []byte("ConfigMapList"))) {
			err = fmt.Errorf("%d: %.200s", a.code, a.body)
		}
		return err
	})
	mustAwait(t, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, hub.Health+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		said := strings.ToLower(string(text))
		if err == nil && ((resp.StatusCode == http.StatusOK) != (state.says == "") || !strings.Contains(said, state.says)) {
			err = fmt.Errorf("readyz: %d: %s", resp.StatusCode, text)
		}
		return err
	})
}
