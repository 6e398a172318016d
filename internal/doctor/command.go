package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// ErrUnhealthy is returned when the commands worked and found trouble, which
// they have told.
var ErrUnhealthy = errors.New("the hub is not well")

// overrides are what an operator may know better than Discover.
type overrides struct {
	servers                                []string
	rootDir, runDir, kubeconfig, unit, out string
	credential                             string
	given                                  func(string) bool
}

func (o *overrides) add(cmd *cobra.Command, all bool) {
	fs := cmd.Flags()
	fs.StringVar(&o.rootDir, "root-dir", "", "the hub's directory, where it is not found")
	fs.StringVar(&o.runDir, "run-dir", "", "directory of the hub's socket")
	fs.StringVar(&o.unit, "unit", unitName, "the hub's unit; empty where systemd does not run it")
	fs.StringVarP(&o.out, "output", "o", "", "json, for programs")
	o.given = fs.Changed
	if all {
		fs.StringSliceVar(&o.servers, "server-addr", nil, "URLs of the API servers")
		fs.StringVar(&o.kubeconfig, "kubelet-kubeconfig", "", "the kubelet's kubeconfig")
		fs.StringVar(&o.credential, "credential", "", "PEM file with a certificate of the node and its key (the kubelet's if not given)")
	}
}

func (o *overrides) settings(ctx context.Context) (Settings, error) {
	if o.out != "" && o.out != "json" {
		return Settings{}, fmt.Errorf("--output %q is not known: give json, or nothing for a table", o.out)
	}
	s := Discover(ctx)
	for _, f := range []struct {
		value string
		to    *string
	}{{o.rootDir, &s.RootDir}, {o.runDir, &s.RunDir}, {o.kubeconfig, &s.Kubeconfig}, {o.credential, &s.Credential}} {
		if f.value != "" {
			*f.to = f.value
		}
	}
	if len(o.servers) > 0 {
		s.Servers = o.servers
	}
	if o.given("unit") {
		s.Unit, s.State = o.unit, nil
		if o.unit != "" {
			s.State = unitState(ctx, o.unit)
		}
	}
	return s, nil
}

// NewDoctor returns the command "doctor".
func NewDoctor() *cobra.Command {
	var o overrides
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find out which hop fails between this node and the cloud",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := o.settings(cmd.Context())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			tell := func(r Result) { printResult(out, r) }
			if o.out == "json" {
				tell = func(Result) {}
			} else {
				fmt.Fprintf(out, "Settings of the hub from %s. This takes less than %s.\n", s.Source, budget)
			}
			results := Examine(cmd.Context(), s, tell)
			bad, failed := first(results)
			if o.out == "json" {
				if err := writeJSON(out, struct {
					Healthy bool     `json:"healthy"`
					First   *Result  `json:"first,omitempty"` // the failure to mend first
					Checks  []Result `json:"checks"`
				}{!failed, pointer(bad, failed), results}); err != nil {
					return err
				}
			} else {
				printVerdict(out, results)
			}
			if failed {
				return ErrUnhealthy
			}
			return nil
		},
	}
	o.add(cmd, true)
	return cmd
}

func pointer(r Result, there bool) *Result {
	if !there {
		return nil
	}
	return &r
}

func writeJSON(out io.Writer, v any) error {
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func (r Result) name() string {
	if r.Target == "" {
		return r.Check
	}
	return r.Check + " " + r.Target
}

func printResult(out io.Writer, r Result) {
	fmt.Fprintf(out, "%-7s  %s: %s\n", r.Outcome, r.name(), r.Text)
	if r.Hint != "" {
		fmt.Fprintf(out, "%9s%s\n", "", r.Hint)
	}
	if r.Command != "" {
		fmt.Fprintf(out, "%9s$ %s\n", "", r.Command)
	}
}

func printVerdict(out io.Writer, results []Result) {
	bad, failed := first(results)
	if failed {
		fmt.Fprintf(out, "\nMend this first: %s: %s\n", bad.name(), bad.Text)
		return
	}
	for _, r := range results {
		if r.Outcome == Warn {
			fmt.Fprintln(out, "\nNothing fails. See the warnings.")
			return
		}
	}
	fmt.Fprintln(out, "\nAll is well.")
}
