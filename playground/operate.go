package playground

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/yurt-edge/yurt/playground/machine"
	"github.com/yurt-edge/yurt/playground/network"
)

// Command is an order for the owner of a playground.
type Command struct {
	// Op is one of the constants below.
	Op string `json:"op"`
	// Target is a machine, or a pool where a link is meant.
	Target string `json:"target"`
	// Mode and Direction are for cuts, Direction for shapes too.
	Mode      network.Mode      `json:"mode,omitempty"`
	Direction network.Direction `json:"direction,omitempty"`
	Shape     network.Shape     `json:"shape"`
	On        bool              `json:"on,omitempty"`
}

// What a [Command] orders.
const (
	opCut      = "cut"
	opHeal     = "heal"
	opShape    = "shape"
	opNAT      = "nat"
	opPowerOn  = "poweron"
	opPowerOff = "poweroff"
	opReboot   = "reboot"
)

// Cut cuts the link of a machine or the uplink of a pool, in both directions,
// until [Playground.Heal].
func (p *Playground) Cut(ctx context.Context, target string, mode network.Mode) error {
	return p.CutDirection(ctx, target, mode, network.Both)
}

// CutDirection is [Playground.Cut] for one direction; only a black hole can
// have one.
func (p *Playground) CutDirection(ctx context.Context, target string, mode network.Mode, dir network.Direction) error {
	return p.order(ctx, Command{Op: opCut, Target: target, Mode: mode, Direction: dir})
}

// Heal mends every cut of a target. It does not change its shape.
func (p *Playground) Heal(ctx context.Context, target string) error {
	return p.order(ctx, Command{Op: opHeal, Target: target})
}

// Shape narrows the link of a target in both directions; the zero shape makes
// it wide again.
func (p *Playground) Shape(ctx context.Context, target string, shape network.Shape) error {
	return p.order(ctx, Command{Op: opShape, Target: target, Direction: network.Both, Shape: shape})
}

// SetNAT puts a pool behind NAT or takes it out.
func (p *Playground) SetNAT(ctx context.Context, pool string, on bool) error {
	return p.order(ctx, Command{Op: opNAT, Target: pool, On: on})
}

// PowerOn boots a machine that is off. It returns as soon as the machine
// starts to boot; see [Playground.WaitBooted].
func (p *Playground) PowerOn(ctx context.Context, name string) error {
	return p.order(ctx, Command{Op: opPowerOn, Target: name})
}

// PowerOff pulls a machine's plug and returns when nothing of it runs.
func (p *Playground) PowerOff(ctx context.Context, name string) error {
	return p.order(ctx, Command{Op: opPowerOff, Target: name})
}

// Reboot shuts a machine down in good order and boots it again. It returns
// when the machine starts to boot.
func (p *Playground) Reboot(ctx context.Context, name string) error {
	return p.order(ctx, Command{Op: opReboot, Target: name})
}

// order has a command done by the owner, which may be this process.
func (p *Playground) order(ctx context.Context, c Command) error {
	if p.stop == nil {
		return orderKeeper(ctx, p.dir, c)
	}
	return p.do(ctx, c)
}

func (p *Playground) do(ctx context.Context, c Command) error {
	switch c.Op {
	case opCut:
		return p.targetErr(p.net.Cut(ctx, c.Target, c.Mode, c.Direction))
	case opHeal:
		return p.targetErr(p.net.Heal(ctx, c.Target))
	case opShape:
		return p.targetErr(p.net.Shape(ctx, c.Target, c.Direction, c.Shape))
	case opNAT:
		return p.targetErr(p.net.SetNAT(ctx, c.Target, c.On))
	}
	if err := p.known(c.Target); err != nil {
		return err
	}
	o := p.power[c.Target]
	o.op.Lock()
	defer o.op.Unlock()
	switch c.Op {
	case opPowerOn:
		return p.powerOn(ctx, o)
	case opPowerOff:
		return p.powerOff(ctx, o)
	case opReboot:
		return p.reboot(ctx, o)
	}
	return fmt.Errorf("unknown order %q", c.Op)
}

// targetErr adds the names that would have been right.
func (p *Playground) targetErr(err error) error {
	if !errors.Is(err, network.ErrUnknownTarget) {
		return err
	}
	var names []string
	for _, pool := range p.topology.Pools {
		names = append(names, pool.Name)
	}
	for _, m := range p.topology.Machines {
		names = append(names, m.Name)
	}
	return WithHint(err, "pools and machines are "+strings.Join(names, ", "))
}

// powerOn is called with o.op held.
func (p *Playground) powerOn(ctx context.Context, o *outlet) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life.Err() != nil {
		return errors.New("the playground is ending")
	}
	if o.off != nil && !closed(o.off) {
		return nil
	}
	if err := p.net.Reset(ctx, o.spec.Name); err != nil {
		return err
	}
	off := make(chan struct{})
	o.off, o.err = off, nil
	go func() { // ends when the machine is off; Stop waits for it
		defer close(off)
		if err := machine.Run(p.life, o.spec); err != nil {
			p.log.Error("machine ended", "node", o.spec.Name, "err", err)
			p.mu.Lock()
			o.err = err
			p.mu.Unlock()
		}
	}()
	return nil
}

// powerOff is called with o.op held.
func (p *Playground) powerOff(ctx context.Context, o *outlet) error {
	off := p.offOf(o)
	if off == nil || closed(off) {
		return nil
	}
	if err := machine.PowerOff(ctx, o.spec.Name); err != nil {
		return err
	}
	return waitClosed(ctx, off)
}

// reboot is called with o.op held. It is a shutdown and a new start rather
// than systemd's own reboot, so that the network namespace, which outlives the
// container, forgets what the machine put into it.
func (p *Playground) reboot(ctx context.Context, o *outlet) error {
	off := p.offOf(o)
	if off == nil || closed(off) {
		return WithHint(fmt.Errorf("machine %s is off", o.spec.Name), "use poweron")
	}
	if _, err := machine.Exec(ctx, o.spec.Name, "systemctl", "poweroff", "--no-wall"); err != nil && !closed(off) {
		return err
	}
	if err := waitClosed(ctx, off); err != nil {
		return fmt.Errorf("wait until %s is down: %w", o.spec.Name, err)
	}
	return p.powerOn(ctx, o)
}

func (p *Playground) offOf(o *outlet) chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return o.off
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func waitClosed(ctx context.Context, c chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// WaitBooted returns when systemd on the machine says that the boot is over.
func (p *Playground) WaitBooted(ctx context.Context, name string) error {
	if err := p.known(name); err != nil {
		return err
	}
	return machine.WaitBooted(ctx, name)
}

// Exec runs a program on a machine and returns its standard output. The error
// quotes its standard error.
func (p *Playground) Exec(ctx context.Context, name string, argv ...string) (string, error) {
	if err := p.known(name); err != nil {
		return "", err
	}
	return machine.Exec(ctx, name, argv...)
}

// ExecCommand returns a command that runs on a machine once it is started, for
// those who need its standard input or a terminal.
func (p *Playground) ExecCommand(ctx context.Context, name string, argv ...string) (*exec.Cmd, error) {
	if err := p.known(name); err != nil {
		return nil, err
	}
	cmd, err := machine.Command(ctx, name, argv...)
	if err != nil {
		return nil, WithHint(err, "boot it with `yurtadm playground poweron "+name+"`")
	}
	return cmd, nil
}

// Kubectl runs kubectl as a cluster admin, directly at the API server, and
// returns its standard output. The error quotes its standard error.
func (p *Playground) Kubectl(ctx context.Context, args ...string) (string, error) {
	return kubectl(ctx, p.bin, p.kubeconfig(), "", args...)
}

// Apply applies manifests in YAML.
func (p *Playground) Apply(ctx context.Context, manifests string) error {
	_, err := kubectl(ctx, p.bin, p.kubeconfig(), manifests, "apply", "--server-side", "--filename=-")
	return err
}

// KubectlCommand returns a command that runs kubectl as a cluster admin, for
// those who need its standard input or a terminal.
func (p *Playground) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, p.bin.Path("kubectl"), append([]string{"--kubeconfig=" + p.kubeconfig()}, args...)...)
}

// RESTConfig returns the configuration of a cluster admin's client without a
// rate limit.
func (p *Playground) RESTConfig() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", p.kubeconfig())
	if err != nil {
		return nil, err
	}
	config.QPS = -1
	return config, nil
}

// Client returns a client of a cluster admin.
func (p *Playground) Client() (*kubernetes.Clientset, error) {
	config, err := p.RESTConfig()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

const waitPoll = 200 * time.Millisecond

// WaitNodes waits until every node that is switched on is ready. An empty list
// means all machines of the topology.
func (p *Playground) WaitNodes(ctx context.Context, names ...string) error {
	return p.waitNodes(ctx, func(string) {}, names...)
}

func (p *Playground) waitNodes(ctx context.Context, update func(string), names ...string) error {
	if len(names) == 0 {
		for _, m := range p.topology.Machines {
			names = append(names, m.Name)
		}
	}
	client, err := p.Client()
	if err != nil {
		return err
	}
	var missing []string
	err = poll(ctx, waitPoll, func() (bool, error) {
		if err := p.broken(); err != nil {
			return false, err
		}
		nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, nil //nolint:nilerr // the API server may be away for a moment
		}
		missing = slices.Clone(names)
		for _, n := range nodes.Items {
			if nodeReady(n) {
				missing = slices.DeleteFunc(missing, func(name string) bool { return name == n.Name })
			}
		}
		update(fmt.Sprintf("%d of %d nodes ready", len(names)-len(missing), len(names)))
		return len(missing) == 0, nil
	})
	if err != nil {
		return fmt.Errorf("wait for nodes, not ready %v: %w", missing, err)
	}
	return nil
}

// broken returns why waiting is in vain. Only the owner can tell.
func (p *Playground) broken() error {
	if p.cp == nil {
		return nil
	}
	if err := p.cp.Err(); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.power {
		if o.err != nil {
			return o.err
		}
	}
	return nil
}

func nodeReady(n corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

func podReady(pod corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// WaitPods waits until exactly count pods match a label selector and all of
// them are ready.
func (p *Playground) WaitPods(ctx context.Context, namespace, selector string, count int) error {
	return p.waitPods(ctx, namespace, selector, count, func(string) {})
}

func (p *Playground) waitPods(ctx context.Context, namespace, selector string, count int, update func(string)) error {
	client, err := p.Client()
	if err != nil {
		return err
	}
	state := "none seen"
	err = poll(ctx, waitPoll, func() (bool, error) {
		if err := p.broken(); err != nil {
			return false, err
		}
		pods, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return false, nil //nolint:nilerr // the API server may be away for a moment
		}
		ready := 0
		for _, pod := range pods.Items {
			if podReady(pod) {
				ready++
			}
		}
		state = fmt.Sprintf("%d of %d pods ready, %d exist", ready, count, len(pods.Items))
		update(state)
		return ready == count && len(pods.Items) == count, nil
	})
	if err != nil {
		return fmt.Errorf("wait for pods %s in %s (%s): %w", selector, namespace, state, err)
	}
	return nil
}

// LoadImage loads an image archive into every machine that is on and returns
// the names of the machines.
func (p *Playground) LoadImage(ctx context.Context, archive string) ([]string, error) {
	var loaded []string
	for _, m := range p.topology.Machines {
		if _, err := machine.Leader(m.Name); err != nil {
			continue
		}
		if err := p.loadImage(ctx, m.Name, archive); err != nil {
			return loaded, err
		}
		loaded = append(loaded, m.Name)
	}
	return loaded, nil
}

func (p *Playground) loadImage(ctx context.Context, name, archive string) error {
	file, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // read only
	cmd, err := p.ExecCommand(ctx, name, "ctr", "-n", "k8s.io", "images", "import", "--local", "-")
	if err != nil {
		return err
	}
	cmd.Stdin = file
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("load %s into %s: %w: %s", filepath.Base(archive), name, err, tail(string(out), 3))
	}
	return nil
}

// Images returns the names of the images that a machine has.
func (p *Playground) Images(ctx context.Context, name string) ([]string, error) {
	out, err := p.Exec(ctx, name, "ctr", "-n", "k8s.io", "images", "ls", "-q")
	if err != nil {
		return nil, err
	}
	var tags []string
	for line := range strings.Lines(out) {
		if tag := strings.TrimSpace(line); tag != "" && !strings.HasPrefix(tag, "sha256:") {
			tags = append(tags, tag)
		}
	}
	slices.Sort(tags)
	return tags, nil
}

// LogCommand returns a command that prints the journal of a machine, of one of
// its units if units has one, or the log of a component of the control plane
// or of the keeper.
func (p *Playground) LogCommand(ctx context.Context, follow bool, name string, units ...string) (*exec.Cmd, error) {
	if _, ok := p.topology.Machine(name); ok {
		argv := []string{"journalctl", "--no-pager"}
		if follow {
			argv = append(argv, "--follow")
		}
		for _, unit := range units {
			argv = append(argv, "--unit="+unit)
		}
		return p.ExecCommand(ctx, name, argv...)
	}
	path := filepath.Join(p.controlPlaneDir(), name+".log")
	if name == "keeper" {
		path = filepath.Join(p.dir, "keeper.log")
	}
	if _, err := os.Stat(path); err != nil {
		return nil, WithHint(fmt.Errorf("%q is no machine and no component", name),
			"components are etcd, kube-apiserver, kube-controller-manager, kube-scheduler, keeper")
	}
	argv := []string{"--lines=+1", path}
	if follow {
		argv = append(argv, "--follow")
	}
	return exec.CommandContext(ctx, "tail", argv...), nil
}
