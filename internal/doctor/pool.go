package doctor

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/yurt-edge/yurt/internal/report"
)

// poolView is what a hub says of its pool, and what waits on its node.
type poolView struct {
	Node     string           `json:"node"`
	Pool     string           `json:"pool,omitempty"`
	Online   bool             `json:"online"`
	Since    time.Time        `json:"since"`
	Sharing  *report.Sharing  `json:"sharing,omitempty"`
	Vouching *report.Vouching `json:"vouching,omitempty"`
	Endings  []report.Ending  `json:"endings"`
}

func newStatusPool() *cobra.Command {
	var o overrides
	cmd := &cobra.Command{
		Use:   "pool",
		Short: "Show this node's part in its pool, and which pods will be stopped and why",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := o.ask(cmd)
			if err != nil {
				return err
			}
			v := poolView{r.Node, r.Pool, r.Online, r.Since, r.Sharing, r.Vouching, append([]report.Ending{}, r.Endings...)}
			if o.out == "json" {
				return writeJSON(cmd.OutOrStdout(), v)
			}
			return v.print(cmd.OutOrStdout(), time.Now())
		},
	}
	o.add(cmd, false)
	return cmd
}

func (v *poolView) print(out io.Writer, now time.Time) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, a ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, a...)) }
	pool := "in no pool"
	if v.Pool != "" {
		pool = "pool " + v.Pool
	}
	row("node", "%s, %s", v.Node, pool)
	link := "DOWN"
	if v.Online {
		link = "up"
	}
	row("link", "%s for %s", link, age(v.Since, now))
	if v.Vouching != nil && v.Vouching.By != "" {
		row("vouched for", "by %s", v.Vouching.By)
	}
	if v.Vouching != nil && len(v.Vouching.For) > 0 {
		row("vouches for", "%s", strings.Join(v.Vouching.For, ", "))
	}
	if v.Sharing != nil {
		row("shared", "%s", sharing(v.Sharing))
	}
	printPeers(t, v.Sharing, now)
	if err := t.Flush(); err != nil {
		return err
	}
	if len(v.Endings) == 0 {
		fmt.Fprintln(out, "\nNo pod waits to be stopped.")
		return nil
	}
	fmt.Fprintln(t, "\nPOD THAT WILL BE STOPPED\tIN ABOUT\tWHY")
	for _, e := range v.Endings {
		fmt.Fprintf(t, "%s\t%s\t%s in the cloud while the node was away\n", e.Pod, max(0, e.Due.Sub(now)).Round(time.Second), e.Why)
	}
	return t.Flush()
}
