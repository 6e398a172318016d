package playground

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/yurt-edge/yurt/internal/daemon"
)

// Images that machines have, CoreDNS those without a hub; see also
// [ManagerImage]. There is no registry: a tag that a machine does not have can
// not be pulled.
const (
	PauseImage   = "yurt.local/pause:1"
	WebImage     = "yurt.local/web:1"
	CoreDNSImage = "yurt.local/coredns:1.15.0"
)

// WriteImage writes a docker archive with an image whose only file is a static
// program, which is its entry point too.
func WriteImage(archive, tag, program string) error {
	content, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	ref, err := name.NewTag(tag)
	if err != nil {
		return fmt.Errorf("image tag: %w", err)
	}
	entry := "/" + filepath.Base(program)
	layer, err := fileLayer(entry, content)
	if err != nil {
		return err
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = runtime.GOARCH, "linux"
	config.Config.Entrypoint = []string{entry}
	image, err = mutate.ConfigFile(image, config)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(archive, ref, image)
}

func fileLayer(path string, content []byte) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o755, Size: int64(len(content))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(content); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	})
}

// ensureImages builds the programs of the images and writes the archives into
// dir, those for cloud machines alone into dir/cloud, and those for machines
// without a hub into dir/nohub.
func ensureImages(ctx context.Context, bin Binaries, dir string) error {
	for _, sub := range []string{RoleCloud, "nohub"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	for _, i := range []struct{ tag, program, pkg, archive string }{
		{PauseImage, "pause", "./playground/images/pause", "pause.tar"},
		{WebImage, "web", "./playground/images/web", "web.tar"},
		{CoreDNSImage, "coredns", "", "nohub/coredns.tar"},
		{ManagerImage, "yurt-manager", "./cmd/yurt-manager", RoleCloud + "/yurt-manager.tar"},
	} {
		if i.pkg != "" {
			if err := goBuild(ctx, bin, i.program, i.pkg); err != nil {
				return err
			}
		}
		if err := WriteImage(filepath.Join(dir, i.archive), i.tag, bin.Path(i.program)); err != nil {
			return fmt.Errorf("make image %s: %w", i.tag, err)
		}
	}
	return nil
}

// goBuild builds a package of this module into the folder of programs, as of
// the version that this program has. Go's own cache makes it quick when nothing
// changed.
func goBuild(ctx context.Context, bin Binaries, program, pkg string) error {
	ldflags := "-s -w -X github.com/yurt-edge/yurt/internal/daemon.version=" + daemon.ReadVersion().Version
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", ldflags, "-o", bin.Path(program), pkg)
	cmd.Dir = bin.Root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", program, err, tail(string(out), 20))
	}
	return nil
}
