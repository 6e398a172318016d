package playground

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/yurt-edge/yurt/playground/machine"
	"github.com/yurt-edge/yurt/playground/network"
)

const (
	// DefaultDir holds a playground's state.
	DefaultDir = "/var/lib/yurt-playground"

	topologyFile = "topology.json"
	readyBudget  = 5 * time.Minute
)

// Config says how to bring a playground up. The zero value is the default
// playground.
type Config struct {
	// Dir takes the playground's files and is removed by [Down]. Empty means
	// [DefaultDir].
	Dir string
	// Topology is what to build. The zero value means [DefaultTopology].
	Topology Topology
	// WithoutHub makes every machine talk to the API server directly.
	WithoutHub bool
	// ManagerValues overlay the values of yurt-manager's chart.
	ManagerValues map[string]any
	// ControllerManagerFlags are added to those of kube-controller-manager.
	ControllerManagerFlags []string
	// Wait waits for another playground on this host to end, where otherwise
	// it is an error.
	Wait bool
	// Progress tells a person what happens. The zero value is silent.
	Progress Progress
	// Log takes what happens while the playground runs; nil discards it.
	Log *slog.Logger

	// lockAddress is for tests whose topology shares no name with another.
	lockAddress string
}

func (c Config) withDefaults() (Config, error) {
	c.Dir = orDefault(c.Dir, DefaultDir)
	c.lockAddress = orDefault(c.lockAddress, lockAddress)
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return c, err
	}
	c.Dir = dir
	if c.Topology.Name == "" {
		if c.Topology, err = DefaultTopology(); err != nil {
			return c, err
		}
	}
	c.Topology.Machines = slices.Clone(c.Topology.Machines)
	if c.WithoutHub {
		for i := range c.Topology.Machines {
			c.Topology.Machines[i].Hub = false
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, c.Topology.Validate()
}

// Playground is a running playground, owned by this process when it comes from
// [Up] and by a keeper when it comes from [Attach]. Its methods may be called
// concurrently.
type Playground struct {
	dir      string
	topology Topology
	bin      Binaries

	// The fields below are set in the owner only.

	managerValues   map[string]any
	controllerFlags []string

	net     *network.Network
	cp      *ControlPlane
	log     *slog.Logger
	life    context.Context //nolint:containedctx // ends with Stop; machines outlive the calls that boot them
	stop    context.CancelFunc
	release func()
	tasks   sync.WaitGroup

	mu    sync.Mutex // guards power
	power map[string]*outlet
}

// outlet is what a machine is plugged into.
type outlet struct {
	spec machine.Spec
	// op serialises switching on and off.
	op sync.Mutex
	// off is closed when the machine is off; nil means that it never ran.
	// Guarded by Playground.mu, as err is.
	off chan struct{}
	err error
}

// Up builds what is missing, brings a playground up and returns when all nodes
// and yurt-manager are ready and cluster DNS answers. The playground belongs to this process
// and dies with it; call [Playground.Stop] to end it. When Up returns an error
// nothing is left.
func Up(ctx context.Context, cfg Config) (_ *Playground, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := checkRoot(os.Geteuid()); err != nil {
		return nil, err
	}
	if err := checkFolder(cfg.Dir); err != nil {
		return nil, err
	}
	release, err := cfg.lock(ctx)
	if err != nil {
		return nil, err
	}
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	p := &Playground{
		dir: cfg.Dir, topology: cfg.Topology, log: cfg.Log,
		managerValues: cfg.ManagerValues, controllerFlags: cfg.ControllerManagerFlags,
		life: life, stop: stop, release: release, power: map[string]*outlet{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Stop(context.WithoutCancel(ctx)))
		}
	}()
	// Nobody holds the lock, so whatever is there belongs to a dead one.
	if err := sweep(ctx, cfg.Dir, cfg.Topology.Name); err != nil {
		return nil, fmt.Errorf("remove what an earlier playground left: %w", err)
	}
	if err := preflight(ctx, cfg.Dir, cfg.Topology); err != nil {
		return nil, err
	}
	base, err := p.build(ctx, cfg.Progress)
	if err != nil {
		return nil, err
	}
	return p, p.start(ctx, cfg.Progress, base)
}

func (c Config) lock(ctx context.Context) (func(), error) {
	if c.Wait {
		return acquireWait(ctx, c.lockAddress, c.Dir)
	}
	return acquire(ctx, c.lockAddress, c.Dir)
}

// build makes everything that is kept between playgrounds and returns the
// machines' base root.
func (p *Playground) build(ctx context.Context, progress Progress) (base string, err error) {
	if p.bin, err = EnsureBinaries(ctx, progress); err != nil {
		return "", err
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return "", err
	}
	content, err := json.Marshal(p.topology)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(p.dir, topologyFile), content, 0o600); err != nil {
		return "", err
	}
	step := progress.Start("build images and the hub")
	if err := ensureImages(ctx, p.bin, p.imagesDir()); err != nil {
		return "", step.Fail(err)
	}
	if slices.ContainsFunc(p.topology.Machines, func(m Machine) bool { return m.Hub }) {
		for _, program := range []string{"yurthub", "yurtadm"} {
			if err := goBuild(ctx, p.bin, program, "./cmd/"+program); err != nil {
				return "", step.Fail(err)
			}
		}
	}
	step.Done()
	return baseRoot(ctx, p.bin, progress)
}

func baseRoot(ctx context.Context, bin Binaries, progress Progress) (string, error) {
	step := progress.Start("machines' base root (debootstrap)")
	base, err := machine.BaseRoot(ctx, filepath.Join(cacheDir(bin.Root), "machine"), step.Update)
	if err != nil {
		return "", step.Fail(err)
	}
	step.Done()
	return base, nil
}

// Build makes everything that is kept between playgrounds, so that the next
// [Up] is quick. It starts nothing. Without root it leaves out the machines'
// base root.
func Build(ctx context.Context, progress Progress) error {
	bin, err := EnsureBinaries(ctx, progress)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return nil
	}
	_, err = baseRoot(ctx, bin, progress)
	return err
}

func (p *Playground) start(ctx context.Context, progress Progress, base string) (err error) {
	t := p.topology
	step := progress.Start(fmt.Sprintf("network of %d pools", len(t.Pools)))
	if p.net, err = network.Up(ctx, t.plan()); err != nil {
		return step.Fail(err)
	}
	step.Done()

	step = progress.Start("control plane at " + t.Host)
	p.cp, err = StartControlPlane(ctx, ControlPlaneConfig{
		Dir: p.controlPlaneDir(), Binaries: p.bin, Address: t.Host, Port: t.Port,
		ServiceCIDR: t.ServiceCIDR, ClusterCIDR: t.ClusterCIDR,
		ControllerManager: true, Scheduler: true, ControllerManagerFlags: p.controllerFlags,
	})
	if err != nil {
		return step.Fail(err)
	}
	client, err := p.cp.Client()
	if err != nil {
		return step.Fail(err)
	}
	cidrs := &podCIDRs{client: client, topology: t, log: p.log}
	p.tasks.Go(func() { cidrs.run(p.life) })
	if err := p.applyDNS(ctx); err != nil {
		return step.Fail(err)
	}
	step.Done()

	step = progress.Start("install yurt-manager")
	if err := p.installManager(ctx); err != nil {
		return step.Fail(err)
	}
	step.Done()

	step = progress.Start(fmt.Sprintf("boot %d machines", len(t.Machines)))
	creds, err := newCredentials(ctx, p.cp)
	if err != nil {
		return step.Fail(err)
	}
	for _, m := range t.Machines {
		spec, err := p.spec(m, base, creds)
		if err != nil {
			return step.Fail(err)
		}
		p.power[m.Name] = &outlet{spec: spec}
	}
	if err := p.bootAll(ctx); err != nil {
		return step.Fail(err)
	}
	step.Done()

	step = progress.Start("nodes, yurt-manager and cluster DNS ready")
	ctx, cancel := context.WithTimeoutCause(ctx, readyBudget, fmt.Errorf("nodes, yurt-manager or cluster DNS not ready after %s", readyBudget))
	defer cancel()
	if err := p.waitNodes(ctx, step.Update); err != nil {
		return step.Fail(err)
	}
	if err := p.waitManager(ctx, step.Update); err != nil {
		return step.Fail(err)
	}
	withoutHub := 0
	for _, m := range t.Machines {
		if !m.Hub {
			withoutHub++
		}
	}
	if err := p.waitPods(ctx, "kube-system", "k8s-app=kube-dns", withoutHub, step.Update); err != nil {
		return step.Fail(err)
	}
	step.Done()
	return nil
}

func (p *Playground) bootAll(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, m := range p.topology.Machines {
		group.Go(func() error {
			if err := p.PowerOn(ctx, m.Name); err != nil {
				return err
			}
			return machine.WaitBooted(ctx, m.Name)
		})
	}
	return group.Wait()
}

func (p *Playground) applyDNS(ctx context.Context) error {
	text, err := manifestFiles.ReadFile("manifests/coredns.yaml")
	if err != nil {
		return err
	}
	manifest, err := renderText("coredns.yaml", string(text), map[string]any{"DNS": p.topology.DNS, "Image": CoreDNSImage})
	if err != nil {
		return err
	}
	return p.cp.Apply(ctx, string(manifest))
}

// Stop ends the playground and removes every trace of it. It may be called
// more than once. In a process that is not the owner it asks the keeper to end
// and does what the keeper left undone.
func (p *Playground) Stop(ctx context.Context) error {
	if p.stop == nil {
		return Down(ctx, p.dir)
	}
	p.stop()
	p.mu.Lock()
	var off []chan struct{}
	for _, o := range p.power {
		if o.off != nil {
			off = append(off, o.off)
		}
	}
	p.mu.Unlock()
	for _, done := range off {
		<-done
	}
	p.tasks.Wait()
	var errs []error
	if p.cp != nil {
		p.cp.Stop()
	}
	if p.net != nil {
		errs = append(errs, p.net.Close())
	}
	errs = append(errs, sweep(ctx, p.dir, p.topology.Name))
	p.release()
	return errors.Join(errs...)
}

// sweep removes what a playground left in dir and in the kernel. It needs no
// record of what was made: names start with the topology's name or are below
// dir.
func sweep(ctx context.Context, dir, prefix string) error {
	var errs []error
	if t, err := savedTopology(dir); err == nil && t.Name != prefix {
		errs = append(errs, network.Down(ctx, t.Name))
	}
	machines, err := os.ReadDir(filepath.Join(dir, "machines"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, m := range machines {
		errs = append(errs, machine.Cleanup(ctx, m.Name(), filepath.Join(dir, "machines", m.Name())))
	}
	errs = append(errs, network.Down(ctx, prefix))
	if err := errors.Join(errs...); err != nil {
		// What is still mounted must not be deleted through its mount.
		return err
	}
	return removeDir(dir)
}

// removeDir deletes the folder of a playground, and refuses to delete any
// other: the name may be a slip of the pen. The topology is what tells them
// apart, so it goes last.
func removeDir(dir string) error {
	if err := checkFolder(dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == topologyFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(dir, topologyFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Remove(dir)
}

// checkFolder returns an error when dir holds anything but a playground.
func checkFolder(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	ours := func(e fs.DirEntry) bool { return e.Name() == topologyFile }
	if len(entries) == 0 || slices.ContainsFunc(entries, ours) {
		return nil
	}
	return WithHint(fmt.Errorf("%s is not empty and is not the folder of a playground", dir),
		"name an empty or a new folder with --dir")
}

func savedTopology(dir string) (Topology, error) {
	content, err := os.ReadFile(filepath.Join(dir, topologyFile))
	if err != nil {
		return Topology{}, err
	}
	return ParseTopology(content)
}

func (p *Playground) controlPlaneDir() string       { return filepath.Join(p.dir, "controlplane") }
func (p *Playground) imagesDir() string             { return filepath.Join(p.dir, "images") }
func (p *Playground) machineDir(name string) string { return filepath.Join(p.dir, "machines", name) }

func (p *Playground) kubeconfig() string {
	return filepath.Join(p.controlPlaneDir(), "admin.kubeconfig")
}
func keeperSocket(dir string) string { return filepath.Join(dir, "keeper.sock") }

// Topology is what the playground was built from.
func (p *Playground) Topology() Topology { return p.topology }

// ErrUnknownMachine is returned for a name that is not in the topology.
var ErrUnknownMachine = errors.New("no such machine")

func (p *Playground) known(name string) error {
	if _, ok := p.topology.Machine(name); ok {
		return nil
	}
	var names []string
	for _, m := range p.topology.Machines {
		names = append(names, m.Name)
	}
	return WithHint(fmt.Errorf("%w: %q", ErrUnknownMachine, name), fmt.Sprintf("machines are %v", names))
}
