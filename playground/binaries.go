package playground

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

// KubernetesVersion is the version of the control plane and of the nodes,
// unless [Versions] says otherwise.
const KubernetesVersion = "v1.36.3"

// Versions are the releases of Kubernetes that a playground runs. Tests of
// version skew choose them by the environment: YURT_KUBERNETES for the control
// plane and YURT_KUBELET for kubelet and kube-proxy, each a minor version such
// as 1.35.
type Versions struct{ ControlPlane, Node string }

// ChosenVersions returns the versions that the environment asks for. The error
// names the versions that can be had.
func ChosenVersions() (Versions, error) {
	var v Versions
	for variable, to := range map[string]*string{"YURT_KUBERNETES": &v.ControlPlane, "YURT_KUBELET": &v.Node} {
		*to = KubernetesVersion
		minor := os.Getenv(variable)
		if minor == "" {
			continue
		}
		var ok bool
		if *to, ok = releases()[minor]; !ok {
			return v, fmt.Errorf("%s=%q is not one of %s", variable, minor, strings.Join(sortedKeys(releases()), ", "))
		}
	}
	return v, nil
}

// releases are the versions that playground/controlplane has a module file
// for, by their minor version.
func releases() map[string]string {
	return map[string]string{"1.36": KubernetesVersion, "1.35": "v1.35.4", "1.34": "v1.34.4"}
}

const rootModule = "github.com/yurt-edge/yurt"

// Binaries says where the programs of a playground are.
type Binaries struct {
	// Root is the checkout that they were built from.
	Root string
	// Dir holds one file or link per program: etcd, kube-apiserver, kubectl,
	// kubelet, containerd and so on.
	Dir string
}

// Path returns the path of one program.
func (b Binaries) Path(name string) string { return filepath.Join(b.Dir, name) }

// part is a set of programs that one `go build` makes.
type part struct {
	name    string
	dir     string            // module folder below the checkout
	target  string            // what to build, "tool" for a module's tool lines
	modfile string            // in place of go.mod
	tags    string            // build tags
	ldflags string            // beside -s -w
	outputs []string          // files that the build makes
	links   map[string]string // names by which programs are found, and the output of each; the outputs' own if empty
	inputs  []string          // globs of the files that the cache key covers
}

func parts(v Versions) []part {
	return []part{
		kubernetesPart(v.ControlPlane, "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"),
		kubernetesPart(v.Node, "kubelet", "kube-proxy"),
		{
			name:    "containerd",
			dir:     "playground/controlplane/containerd",
			target:  "tool",
			tags:    "no_btrfs no_zfs no_devmapper",
			outputs: []string{"containerd", "containerd-shim-runc-v2", "ctr"},
			inputs:  []string{"go.mod", "go.sum"},
		},
		{
			name:    "coredns",
			dir:     "playground/controlplane/coredns",
			target:  ".",
			outputs: []string{"coredns"},
			inputs:  []string{"go.mod", "go.sum", "*.go"},
		},
	}
}

// kubernetesPart is the control plane's binary in one version, under the names of
// some of its programs.
func kubernetesPart(version string, programs ...string) part {
	p := part{
		name:    "controlplane",
		dir:     "playground/controlplane",
		target:  ".",
		ldflags: versionFlags(version),
		outputs: []string{"controlplane"},
		links:   map[string]string{},
		inputs:  []string{"go.mod", "go.sum", "*.go"},
	}
	if version != KubernetesVersion {
		module := "kubernetes-" + version[1:strings.LastIndex(version, ".")]
		p.modfile = module + ".mod"
		p.inputs = []string{p.modfile, module + ".sum", "*.go"}
	}
	for _, program := range programs {
		p.links[program] = "controlplane"
	}
	return p
}

// versionFlags are linker flags without which version negotiation between
// components misbehaves, because a `go build` of Kubernetes calls itself
// v0.0.0-master.
func versionFlags(version string) string {
	major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ := strings.Cut(rest, ".")
	var flags []string
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags = append(flags,
			"-X "+pkg+".gitVersion="+version,
			"-X "+pkg+".gitMajor="+major,
			"-X "+pkg+".gitMinor="+minor,
			"-X "+pkg+".gitCommit=", "-X "+pkg+".gitTreeState=clean")
	}
	return strings.Join(flags, " ")
}

// EnsureBinaries builds what is missing of the programs that a playground runs
// and returns where they are. Builds are cached by the content of their module
// files in $YURT_CACHE, or in .cache of the checkout, and may be called for by
// several processes at once.
func EnsureBinaries(ctx context.Context, progress Progress) (Binaries, error) {
	v, err := ChosenVersions()
	if err != nil {
		return Binaries{}, err
	}
	return ensure(ctx, progress, parts(v))
}

// EnsureControlPlane is [EnsureBinaries] for those who need no machines.
func EnsureControlPlane(ctx context.Context, progress Progress) (Binaries, error) {
	v, err := ChosenVersions()
	if err != nil {
		return Binaries{}, err
	}
	return ensure(ctx, progress, parts(v)[:1])
}

// EnsureCoreDNS is [EnsureBinaries] for those who need nothing but coredns.
func EnsureCoreDNS(ctx context.Context, progress Progress) (Binaries, error) {
	all := parts(Versions{ControlPlane: KubernetesVersion, Node: KubernetesVersion})
	return ensure(ctx, progress, slices.DeleteFunc(all, func(p part) bool { return p.name != "coredns" }))
}

func ensure(ctx context.Context, progress Progress, wanted []part) (Binaries, error) {
	root, err := checkout()
	if err != nil {
		return Binaries{}, err
	}
	bin := Binaries{Root: root, Dir: filepath.Join(root, "bin")}
	cache := cacheDir(root)
	for _, dir := range []string{bin.Dir, cache} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return Binaries{}, err
		}
	}
	for _, p := range wanted {
		if err := p.ensure(ctx, root, cache, bin.Dir, progress); err != nil {
			return Binaries{}, fmt.Errorf("build %s: %w", p.name, err)
		}
	}
	return bin, nil
}

func cacheDir(root string) string {
	if dir := os.Getenv("YURT_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join(root, ".cache")
}

func (p part) ensure(ctx context.Context, root, cache, bin string, progress Progress) error {
	key, err := p.key(filepath.Join(root, p.dir))
	if err != nil {
		return err
	}
	dir := filepath.Join(cache, p.name+"-"+key)
	unlock, err := lockFile(ctx, filepath.Join(cache, p.name+".lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if !p.complete(dir) {
		if err := p.build(ctx, filepath.Join(root, p.dir), dir, progress); err != nil {
			return err
		}
	}
	return p.link(dir, bin)
}

// key covers everything of ours that decides what the build makes.
func (p part) key(src string) (string, error) {
	var files []string
	for _, glob := range p.inputs {
		found, err := filepath.Glob(filepath.Join(src, glob))
		if err != nil {
			return "", err
		}
		files = append(files, found...)
	}
	slices.Sort(files)
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.Version(), runtime.GOARCH, p.target, p.tags, p.ldflags)
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(sum, filepath.Base(file), len(content))
		sum.Write(content)
	}
	return hex.EncodeToString(sum.Sum(nil))[:16], nil
}

func (p part) complete(dir string) bool {
	for _, out := range p.outputs {
		if _, err := os.Stat(filepath.Join(dir, out)); err != nil {
			return false
		}
	}
	return true
}

// build makes the outputs in a folder beside dir and renames it, so that dir
// either holds all of them or does not exist.
func (p part) build(ctx context.Context, src, dir string, progress Progress) error {
	step := progress.Start("build " + strings.Join(append(slices.Clone(p.outputs), sortedKeys(p.links)...), ", "))
	args := []string{
		"build", "-v", "-trimpath", "-buildvcs=false",
		"-tags", p.tags, "-ldflags", "-s -w " + p.ldflags,
	}
	if p.modfile != "" {
		args = append(args, "-modfile="+p.modfile)
	}
	temp, err := os.MkdirTemp(filepath.Dir(dir), p.name+"-build-")
	if err != nil {
		return step.Fail(err)
	}
	defer os.RemoveAll(temp) //nolint:errcheck // renamed when all went well
	if err := os.Chmod(temp, 0o755); err != nil {
		return step.Fail(err)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "-o", temp+"/", p.target)...)
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	var output bytes.Buffer
	packages := 0
	cmd.Stderr = lineWriter(func(line string) {
		// -v prints one package path per compiled package.
		if packages++; !strings.ContainsAny(line, " :") {
			step.Update(fmt.Sprintf("%d packages, %s", packages, line))
			return
		}
		output.WriteString(line + "\n")
	})
	if err := cmd.Run(); err != nil {
		return step.Fail(fmt.Errorf("go build in %s: %w\n%s", src, err, tail(output.String(), 20)))
	}
	if err := os.RemoveAll(dir); err != nil {
		return step.Fail(err)
	}
	if err := os.Rename(temp, dir); err != nil {
		return step.Fail(err)
	}
	step.Done()
	return nil
}

func (p part) link(dir, bin string) error {
	links := p.links
	if len(links) == 0 {
		links = map[string]string{}
		for _, out := range p.outputs {
			links[out] = out
		}
	}
	for name, out := range links {
		path, target := filepath.Join(bin, name), filepath.Join(dir, out)
		if have, err := os.Readlink(path); err == nil && have == target {
			continue
		}
		// Another process may start the program at this moment: replace the
		// link in one step.
		temp := path + ".new"
		_ = os.Remove(temp)
		if err := os.Symlink(target, temp); err != nil {
			return err
		}
		if err := os.Rename(temp, path); err != nil {
			return err
		}
	}
	return nil
}

// errNoCheckout is a sentinel so that the command line can add its hint.
var errNoCheckout = errors.New("source of " + rootModule + " not found")

// checkout finds the source tree: above the working folder, or above the
// running program.
func checkout() (string, error) {
	var starts []string
	if dir, err := os.Getwd(); err == nil {
		starts = append(starts, dir)
	}
	if exe, err := os.Executable(); err == nil {
		starts = append(starts, filepath.Dir(exe))
	}
	for _, dir := range starts {
		for {
			content, err := os.ReadFile(filepath.Join(dir, "go.mod"))
			if err == nil && bytes.HasPrefix(content, []byte("module "+rootModule+"\n")) {
				return dir, nil
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return "", err
			}
			if dir == filepath.Dir(dir) {
				break
			}
			dir = filepath.Dir(dir)
		}
	}
	return "", WithHint(errNoCheckout, "run it in a checkout: the playground builds Kubernetes from there")
}

// lockFile waits for an exclusive lock on path. The lock ends with the process
// at the latest.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	err = poll(ctx, lockPoll, func() (bool, error) {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = file.Close() }, nil
}
