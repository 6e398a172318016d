// Package playgroundcli is the command line of the playground: it reads flags,
// calls package playground and prints. It decides nothing.
package playgroundcli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/network"
)

// New returns the command "playground" with all commands below it.
func New() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "playground",
		Short: "A real cluster with real edge machines on this host",
	}
	g := &global{}
	cmd.PersistentFlags().StringVar(&g.dir, "dir", playground.DefaultDir, "folder of the playground's state")
	cmd.AddCommand(
		g.up(), g.keeper(), g.down(), g.build(), g.demo(), g.status(),
		g.cut(), g.heal(), g.shape(), g.nat(),
		g.power("reboot", "Shut a machine down in good order and boot it again", (*playground.Playground).Reboot),
		g.power("poweroff", "Pull the plug of a machine", (*playground.Playground).PowerOff),
		g.power("poweron", "Boot a machine that is off", (*playground.Playground).PowerOn),
		g.shell(), g.kubectl(), g.logs(), g.image(),
	)
	return cmd
}

// global is what every command shares.
type global struct {
	dir string
}

// run wraps a command that needs a running playground.
func (g *global) run(f func(ctx context.Context, p *playground.Playground, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		p, err := playground.Attach(g.dir)
		if err != nil {
			return err
		}
		return f(cmd.Context(), p, args)
	}
}

type upFlags struct {
	topology   string
	withoutHub bool
}

func (f *upFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.topology, "topology", "", "YAML file of machines and pools in place of the default (see playground/topology.yaml)")
	cmd.Flags().BoolVar(&f.withoutHub, "without-hub", false, "let every machine talk to the API server directly")
}

func (g *global) up() *cobra.Command {
	var f upFlags
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Build what is missing and start the playground",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Faults of the file are told before anything starts.
			if _, err := playground.ReadTopology(f.topology); err != nil {
				return err
			}
			return g.spawn(cmd, f)
		},
	}
	f.add(cmd)
	return cmd
}

// spawn starts this program as the keeper.
func (g *global) spawn(cmd *cobra.Command, f upFlags) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(g.dir)
	if err != nil {
		return err
	}
	args := []string{"playground", "keeper", "--dir", dir, fmt.Sprintf("--without-hub=%t", f.withoutHub)}
	if f.topology != "" {
		path, err := filepath.Abs(f.topology)
		if err != nil {
			return err
		}
		args = append(args, "--topology", path)
	}
	out := cmd.OutOrStdout()
	// Not CommandContext: the keeper takes down what it made when it is told
	// to stop, and must not be killed at that.
	keeper := exec.Command(exe, args...) //nolint:noctx // see above
	if err := playground.Spawn(cmd.Context(), keeper, out); err != nil {
		return err
	}
	fmt.Fprintln(out, "The playground is up. Try:\n  yurtadm playground status\n  yurtadm playground kubectl get nodes")
	return nil
}

func (g *global) keeper() *cobra.Command {
	var f upFlags
	cmd := &cobra.Command{
		Use:    "keeper",
		Short:  "Own a playground (started by up)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := playground.ReadTopology(f.topology)
			if err != nil {
				return err
			}
			log := &lateFile{path: filepath.Join(g.dir, "keeper.log")}
			defer log.Close() //nolint:errcheck // nobody is left to be told
			logger, err := daemon.NewLogger(log, daemon.LogConfig{})
			if err != nil {
				return err
			}
			return playground.RunKeeper(cmd.Context(), playground.Config{
				Dir: g.dir, Topology: t, WithoutHub: f.withoutHub, Log: logger,
			})
		},
	}
	f.add(cmd)
	return cmd
}

// lateFile is a log that opens with its first line: its folder does not exist
// before the playground makes it.
type lateFile struct {
	path string
	file *os.File
}

func (l *lateFile) Write(p []byte) (int, error) {
	if l.file == nil {
		file, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return 0, err
		}
		l.file = file
	}
	return l.file.Write(p)
}

func (l *lateFile) Close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}

func (g *global) down() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Stop the playground and remove every trace of it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return playground.Down(cmd.Context(), g.dir)
		},
	}
}

func (g *global) build() *cobra.Command {
	return &cobra.Command{
		Use:   "build",
		Short: "Build everything that up needs and start nothing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return playground.Build(cmd.Context(), playground.NewProgress(cmd.OutOrStdout()))
		},
	}
}

func (g *global) status() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show machines, links and nodes",
		Args:  cobra.NoArgs,
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.RunE = g.run(func(ctx context.Context, p *playground.Playground, _ []string) error {
		if output != "table" && output != "json" {
			return playground.WithHint(fmt.Errorf("unknown output %q", output), "use table or json")
		}
		s, err := p.Status(ctx)
		if err != nil {
			return err
		}
		if output == "json" {
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetIndent("", "  ")
			return enc.Encode(s)
		}
		return printStatus(cmd.OutOrStdout(), s)
	})
	return cmd
}

func printStatus(out io.Writer, s playground.Status) error {
	fmt.Fprintf(out, "Kubernetes %s at %s, %d MiB in all, files in %s\n", s.Version, s.Server, s.Memory>>20, s.Dir)
	if s.ControlPlaneError != "" {
		fmt.Fprintf(out, "control plane: %s\n", s.ControlPlaneError)
	}
	fmt.Fprintf(out, "yurt-manager: %d of %d replicas ready, %s works\n", s.Manager.Ready, s.Manager.Replicas, cmp.Or(s.Manager.Leader, "none"))
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "\nPOOL\tTYPE\tUPLINK\tNAT\tREADY\tLEADERS")
	for _, p := range s.Pools {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d/%d\t%s\n", p.Name, p.Type, p.Link, onOff(p.NAT), p.NodesReady, p.Nodes, strings.Join(p.Leaders, ","))
	}
	fmt.Fprintln(w, "\nMACHINE\tPOOL\tROLE\tADDRESS\tHUB\tPOWER\tLINK\tREADY\tPODS\tMEMORY")
	for _, m := range s.Machines {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d/%d\t%d MiB\n", m.Name, m.Pool, m.Role, m.Address,
			onOff(m.Hub), onOff(m.On), m.Link, m.Ready, m.PodsReady, m.Pods, m.Memory>>20)
	}
	return w.Flush()
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func (g *global) cut() *cobra.Command {
	var mode, direction string
	cmd := &cobra.Command{
		Use:   "cut MACHINE|POOL",
		Short: "Cut the link of a machine or the uplink of a pool",
		Args:  cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&mode, "mode", string(network.LinkDown), "down (clients see an error at once) or blackhole (they see nothing)")
	cmd.Flags().StringVar(&direction, "direction", string(network.Both), "both, in or out; only a blackhole has one")
	cmd.RunE = g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
		return p.CutDirection(ctx, args[0], network.Mode(mode), network.Direction(direction))
	})
	return cmd
}

func (g *global) heal() *cobra.Command {
	return &cobra.Command{
		Use:   "heal MACHINE|POOL",
		Short: "Mend the cuts of a machine or a pool",
		Args:  cobra.ExactArgs(1),
		RunE: g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
			return p.Heal(ctx, args[0])
		}),
	}
}

func (g *global) shape() *cobra.Command {
	var (
		delay, jitter time.Duration
		rate          string
		loss          float64
	)
	cmd := &cobra.Command{
		Use:     "shape MACHINE|POOL",
		Short:   "Narrow a link; without flags make it wide again",
		Example: "  yurtadm playground shape hangzhou --delay=40ms --rate=2mbit --loss=0.01",
		Args:    cobra.ExactArgs(1),
	}
	cmd.Flags().DurationVar(&delay, "delay", 0, "delay added in each direction")
	cmd.Flags().DurationVar(&jitter, "jitter", 0, "how much the delay varies")
	cmd.Flags().StringVar(&rate, "rate", "", "bits per second in each direction, as 500kbit, 2mbit or 1gbit")
	cmd.Flags().Float64Var(&loss, "loss", 0, "share of packets lost, from 0 to 1")
	cmd.RunE = g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
		bits, err := parseRate(rate)
		if err != nil {
			return err
		}
		return p.Shape(ctx, args[0], network.Shape{Delay: delay, Jitter: jitter, Rate: bits, Loss: loss})
	})
	return cmd
}

// parseRate reads a rate in bits per second; the empty text is no limit.
func parseRate(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	number, factor := text, 1.0
	for suffix, f := range map[string]float64{"kbit": 1e3, "mbit": 1e6, "gbit": 1e9} {
		if rest, ok := strings.CutSuffix(text, suffix); ok {
			number, factor = rest, f
		}
	}
	var value float64
	var rest string
	if n, _ := fmt.Sscanf(number, "%g%s", &value, &rest); n != 1 || value <= 0 {
		return 0, playground.WithHint(fmt.Errorf("rate %q is not a positive number of bits per second", text), "write it as 500kbit, 2mbit or 1gbit")
	}
	return int64(value * factor), nil
}

func (g *global) nat() *cobra.Command {
	return &cobra.Command{
		Use:       "nat POOL on|off",
		Short:     "Put a pool behind NAT or take it out",
		Args:      cobra.ExactArgs(2),
		ValidArgs: []string{"on", "off"},
		RunE: g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
			if args[1] != "on" && args[1] != "off" {
				return playground.WithHint(fmt.Errorf("unknown state %q", args[1]), "use on or off")
			}
			return p.SetNAT(ctx, args[0], args[1] == "on")
		}),
	}
}

func (g *global) power(use, short string, do func(*playground.Playground, context.Context, string) error) *cobra.Command {
	return &cobra.Command{
		Use:   use + " MACHINE",
		Short: short,
		Args:  cobra.ExactArgs(1),
		RunE: g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
			return do(p, ctx, args[0])
		}),
	}
}

func (g *global) shell() *cobra.Command {
	return &cobra.Command{
		Use:   "shell MACHINE [-- COMMAND...]",
		Short: "Run a shell or a command on a machine",
		Args:  cobra.MinimumNArgs(1),
		RunE: g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
			argv := args[1:]
			if len(argv) == 0 {
				argv = []string{"/bin/bash", "-l"}
			}
			cmd, err := p.ExecCommand(ctx, args[0], argv...)
			if err != nil {
				return err
			}
			return foreground(cmd)
		}),
	}
}

func (g *global) kubectl() *cobra.Command {
	return &cobra.Command{
		Use:   "kubectl [ARGS...]",
		Short: "Run kubectl as a cluster admin at the API server",
		// The arguments are kubectl's; --dir must stand before the word.
		DisableFlagParsing: true,
		RunE: g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
			return foreground(p.KubectlCommand(ctx, args...))
		}),
	}
}

// foreground gives a command this process's terminal and exit code.
func foreground(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return &ExitError{Code: exit.ExitCode()}
	}
	return err
}

// ExitError is the end of a program that has said itself what was wrong.
type ExitError struct{ Code int }

func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Code) }

func (g *global) logs() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:   "logs MACHINE [UNIT] | logs COMPONENT",
		Short: "Show the journal of a machine, or the log of a control-plane component",
		Example: "  yurtadm playground logs hangzhou-1 yurthub\n" +
			"  yurtadm playground logs kube-apiserver\n  yurtadm playground logs keeper",
		Args: cobra.RangeArgs(1, 2),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on as lines come")
	cmd.RunE = g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
		c, err := p.LogCommand(ctx, follow, args[0], args[1:]...)
		if err != nil {
			return err
		}
		return foreground(c)
	})
	return cmd
}

func (g *global) image() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Images of the machines; there is no registry"}
	load := &cobra.Command{
		Use:   "load FILE",
		Short: "Load an image archive (docker or OCI) into every machine that is on",
		Args:  cobra.ExactArgs(1),
	}
	load.RunE = g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
		names, err := p.LoadImage(ctx, args[0])
		if err != nil {
			return err
		}
		fmt.Fprintf(load.OutOrStdout(), "loaded into %s\n", strings.Join(names, ", "))
		return nil
	})
	list := &cobra.Command{
		Use:   "list [MACHINE]",
		Short: "List the images of a machine, or of all",
		Args:  cobra.MaximumNArgs(1),
	}
	list.RunE = g.run(func(ctx context.Context, p *playground.Playground, args []string) error {
		if len(args) == 0 {
			for _, m := range p.Topology().Machines {
				args = append(args, m.Name)
			}
		}
		w := tabwriter.NewWriter(list.OutOrStdout(), 0, 4, 2, ' ', 0)
		for _, name := range args {
			tags, err := p.Images(ctx, name)
			if err != nil {
				return err
			}
			for _, tag := range tags {
				fmt.Fprintf(w, "%s\t%s\n", name, tag)
			}
		}
		return w.Flush()
	})
	cmd.AddCommand(load, list)
	return cmd
}
