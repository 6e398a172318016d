package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/network"
)

// Step is one measured step of the timeline.
type Step struct {
	What string `json:"what"`
	// Took is the time on the edge machine with its link cut; Beside is the
	// same step on the cloud machine, which has no hub and the API server at
	// hand. Zero means that there is nothing to compare with.
	Took   time.Duration `json:"took"`
	Beside time.Duration `json:"beside,omitempty"`
}

// Report is the outcome of a demo.
type Report struct {
	Steps []Step   `json:"steps"`
	Fails []string `json:"fails,omitempty"`
}

// Passed reports whether all that must hold did.
func (r Report) Passed() bool { return len(r.Fails) == 0 }

// stepBudget bounds every wait of the demo.
const stepBudget = 90 * time.Second

// run is a demo under way.
type run struct {
	p      *playground.Playground
	out    io.Writer
	start  time.Time
	report Report
	victim string
	cloud  string
	others []string

	before map[string]string // containers of the others
	pods   []corev1.Pod      // of the victim
}

// Run shows the whole story on a playground that is up and returns what was
// measured. Its error is nil when every step was done; Report.Passed tells
// whether what must hold did.
func Run(ctx context.Context, p *playground.Playground, out io.Writer) (Report, error) {
	d := &run{p: p, out: out, start: time.Now()}
	for _, m := range p.Topology().Machines {
		switch {
		case m.Role == playground.RoleCloud:
			d.cloud = m.Name
		case m.Hub && d.victim == "":
			d.victim = m.Name
		default:
			d.others = append(d.others, m.Name)
		}
	}
	if d.victim == "" || d.cloud == "" {
		return d.report, errors.New("the demo needs a cloud machine and an edge machine with a hub")
	}
	for _, act := range []func(context.Context) error{
		d.deploy, d.baseline, d.powerCut, d.lookInside, d.heal, d.restarts, d.converge,
	} {
		if err := act(ctx); err != nil {
			d.fail("%v", err)
			d.print()
			return d.report, err
		}
	}
	d.print()
	return d.report, nil
}

func (d *run) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%6.1fs  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

func (d *run) fail(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	d.report.Fails = append(d.report.Fails, text)
	d.say("FAIL: %s", text)
}

func (d *run) note(what string, took, beside time.Duration) {
	d.report.Steps = append(d.report.Steps, Step{What: what, Took: took, Beside: beside})
	line := fmt.Sprintf("%s: %.1f s", what, took.Seconds())
	if beside > 0 {
		line += fmt.Sprintf(" (without a hub, API server at hand: %.1f s)", beside.Seconds())
	}
	d.say("%s", line)
}

// timed runs one step within its budget and returns how long it took.
func timed(ctx context.Context, step func(context.Context) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, stepBudget, fmt.Errorf("not done after %s", stepBudget))
	defer cancel()
	start := time.Now()
	err := step(ctx)
	return time.Since(start), err
}

func (d *run) deploy(ctx context.Context) error {
	d.say("deploying %d web servers to each pool", replicas)
	took, err := timed(ctx, func(ctx context.Context) error { return Deploy(ctx, d.p) })
	if err != nil {
		return err
	}
	d.note("web servers run in every pool", took, 0)
	out, err := d.p.Kubectl(ctx, "get", "pods", "-o", "wide")
	if err != nil {
		return err
	}
	fmt.Fprintln(d.out, out)
	return nil
}

// countOf is how many web pods the machine runs.
func (d *run) countOf(ctx context.Context, machine string) (int, error) {
	pods, err := Pods(ctx, d.p, machine)
	if err == nil && len(pods) == 0 {
		err = fmt.Errorf("no web server runs on %s", machine)
	}
	return len(pods), err
}

// cycle pulls the machine's plug, boots it, and measures until its web
// servers answer again.
func (d *run) cycle(ctx context.Context, machine string, between func() error) (time.Duration, error) {
	count, err := d.countOf(ctx, machine)
	if err != nil {
		return 0, err
	}
	if err := between(); err != nil {
		return 0, err
	}
	if err := d.p.PowerOff(ctx, machine); err != nil {
		return 0, err
	}
	cut := time.Now()
	return timed(ctx, func(ctx context.Context) error {
		if err := d.p.PowerOn(ctx, machine); err != nil {
			return err
		}
		return AwaitServing(ctx, d.p, machine, count, cut)
	})
}

func (d *run) baseline(ctx context.Context) error {
	d.say("for comparison: the plug of %s is pulled, which has no hub and the API server at hand", d.cloud)
	took, err := d.cycle(ctx, d.cloud, func() error { return nil })
	if err != nil {
		return fmt.Errorf("power cut of %s: %w", d.cloud, err)
	}
	d.report.Steps = append(d.report.Steps, Step{What: baselineStep, Took: took})
	d.say("%s: %.1f s", baselineStep, took.Seconds())
	return nil
}

const baselineStep = "power on to pods serving, no hub, API server at hand"

func (d *run) beside() time.Duration {
	for _, s := range d.report.Steps {
		if s.What == baselineStep {
			return s.Took
		}
	}
	return 0
}

func (d *run) powerCut(ctx context.Context) error {
	if err := d.remember(ctx); err != nil {
		return err
	}
	d.say("the link of %s goes silent, and then its plug is pulled", d.victim)
	took, err := d.cycle(ctx, d.victim, func() error {
		return d.p.Cut(ctx, d.victim, network.Blackhole)
	})
	if err != nil {
		return fmt.Errorf("power cut of %s: %w", d.victim, err)
	}
	d.note("power on to pods serving, cut off from the cloud", took, d.beside())
	return nil
}

// lookInside lists pods on the cut machine, through its hub.
func (d *run) lookInside(ctx context.Context) error {
	args := LocalKubectl("get", "pods", "-n", "default", "--field-selector", "spec.nodeName="+d.victim, "-o", "wide")
	var out string
	took, err := timed(ctx, func(ctx context.Context) error {
		var err error
		// The warning is on standard error; a person sees both.
		out, err = d.p.Exec(ctx, d.victim, "sh", "-c", strings.Join(args, " ")+" 2>&1")
		return err
	})
	if err != nil {
		return fmt.Errorf("kubectl through the hub: %w", err)
	}
	d.note("kubectl get pods on the cut machine", took, 0)
	fmt.Fprintf(d.out, "%s:~# %s\n%s\n", d.victim, strings.Join(args[:1], " ")+" "+strings.Join(args[4:], " "), out)
	if !strings.Contains(out, "this is the state of") {
		d.fail("kubectl through the hub gave no warning that its answer is old")
	}
	return nil
}

func (d *run) heal(ctx context.Context) error {
	took, err := timed(ctx, func(ctx context.Context) error {
		if err := d.p.Heal(ctx, d.victim); err != nil {
			return err
		}
		return d.settled(ctx)
	})
	if err != nil {
		return fmt.Errorf("heal %s: %w", d.victim, err)
	}
	d.note("link healed to node and pods ready in the cloud", took, 0)
	return d.judge(ctx, 1)
}

// settled waits until the cloud sees the victim and its pods as they are.
func (d *run) settled(ctx context.Context) error {
	return await(ctx, d.victim+" to be ready in the cloud", func() error {
		out, err := d.p.Kubectl(ctx, "get", "node", d.victim, "-o", "json")
		if err != nil {
			return err
		}
		var node corev1.Node
		if err := json.Unmarshal([]byte(out), &node); err != nil {
			return fmt.Errorf("read node: %w", err)
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				return fmt.Errorf("node is not ready: %w", errNotYet)
			}
		}
		pods, err := Pods(ctx, d.p, d.victim)
		if err != nil {
			return err
		}
		local, err := LocalPods(ctx, d.p, d.victim)
		if err != nil {
			return err
		}
		if len(pods) != len(local) {
			return fmt.Errorf("the cloud sees %d pods, the machine %d: %w", len(pods), len(local), errNotYet)
		}
		for i, pod := range pods {
			if !ready(pod) || pod.Status.PodIP != local[i].Status.PodIP {
				return fmt.Errorf("pod %s is not ready at its address: %w", pod.Name, errNotYet)
			}
		}
		return nil
	})
}

func ready(pod corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// restarts cuts the link the other way and restarts every service of the
// node: no container may notice.
func (d *run) restarts(ctx context.Context) error {
	d.say("the link of %s goes down, and its services are restarted one by one", d.victim)
	count, err := d.countOf(ctx, d.victim)
	if err != nil {
		return err
	}
	if err := d.p.Cut(ctx, d.victim, network.LinkDown); err != nil {
		return err
	}
	for _, unit := range []string{"kubelet", "containerd", "yurthub"} {
		took, err := timed(ctx, func(ctx context.Context) error {
			if _, err := d.p.Exec(ctx, d.victim, "systemctl", "restart", unit); err != nil {
				return err
			}
			return AwaitServing(ctx, d.p, d.victim, count, time.Time{})
		})
		if err != nil {
			return fmt.Errorf("restart %s on %s: %w", unit, d.victim, err)
		}
		d.note("restart of "+unit+" while cut off, pods serving", took, 0)
	}
	return nil
}

func (d *run) converge(ctx context.Context) error {
	took, err := timed(ctx, func(ctx context.Context) error {
		if err := d.p.Heal(ctx, d.victim); err != nil {
			return err
		}
		return d.settled(ctx)
	})
	if err != nil {
		return fmt.Errorf("heal %s: %w", d.victim, err)
	}
	d.note("link healed again to everything converged", took, 0)
	return d.judge(ctx, 1)
}

// remember takes note of every container before anything is done to the
// victim.
func (d *run) remember(ctx context.Context) error {
	var err error
	if d.before, err = Containers(ctx, d.p, d.others...); err != nil {
		return err
	}
	d.pods, err = Pods(ctx, d.p, d.victim)
	return err
}

// judge checks what must hold: no container of another machine changed, and
// the victim's pods are the same pods, restarted as often as the power failed.
func (d *run) judge(ctx context.Context, restarts int32) error {
	after, err := Containers(ctx, d.p, d.others...)
	if err != nil {
		return err
	}
	for _, diff := range differences(d.before, after) {
		d.fail("another machine was touched: %s", diff)
	}
	pods, err := Pods(ctx, d.p, d.victim)
	if err != nil {
		return err
	}
	if len(pods) != len(d.pods) {
		d.fail("%s has %d web pods, had %d", d.victim, len(pods), len(d.pods))
		return nil
	}
	for i, pod := range pods {
		if pod.UID != d.pods[i].UID {
			d.fail("pod %s was replaced by %s", d.pods[i].Name, pod.Name)
			continue
		}
		for j, c := range pod.Status.ContainerStatuses {
			if want := d.pods[i].Status.ContainerStatuses[j].RestartCount + restarts; c.RestartCount != want {
				d.fail("container %s of %s was restarted %d times, want %d", c.Name, pod.Name, c.RestartCount, want)
			}
		}
	}
	return nil
}

func (d *run) print() {
	fmt.Fprintln(d.out)
	w := tabwriter.NewWriter(d.out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "STEP\tTIME\tNO HUB, API AT HAND\tRATIO")
	for _, s := range d.report.Steps {
		beside, ratio := "-", "-"
		if s.Beside > 0 {
			beside = fmt.Sprintf("%.1f s", s.Beside.Seconds())
			ratio = fmt.Sprintf("%.2f", s.Took.Seconds()/s.Beside.Seconds())
		}
		fmt.Fprintf(w, "%s\t%.1f s\t%s\t%s\n", s.What, s.Took.Seconds(), beside, ratio)
	}
	_ = w.Flush() // the terminal may be gone
	if d.report.Passed() {
		fmt.Fprintf(d.out, "\nPASS in %s\n", time.Since(d.start).Round(time.Second))
		return
	}
	fmt.Fprintln(d.out)
	for _, f := range d.report.Fails {
		fmt.Fprintln(d.out, "FAIL:", f)
	}
}
