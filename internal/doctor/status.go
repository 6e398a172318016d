package doctor

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/yurt-edge/yurt/internal/report"
)

const askBudget = 5 * time.Second

// NewStatus returns the command "status".
func NewStatus() *cobra.Command {
	var o overrides
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how this node's hub does, with the cloud or without",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := o.ask(cmd)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if o.out == "json" {
				err = writeJSON(out, r)
			} else {
				err = printReport(out, r, time.Now())
			}
			if err != nil {
				return err
			}
			if !r.Healthy() {
				return ErrUnhealthy
			}
			return nil
		},
	}
	cmd.AddCommand(newStatusPool())
	o.add(cmd, false)
	return cmd
}

// ask asks the hub how it does. Of one that does not answer it tells what can
// be read.
func (o *overrides) ask(cmd *cobra.Command) (*report.Report, error) {
	s, err := o.settings(cmd.Context())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), askBudget)
	defer cancel()
	r, err := report.Ask(ctx, s.RunDir)
	if err == nil {
		return r, nil
	}
	d := s.down(err)
	if o.out == "json" {
		err = writeJSON(cmd.OutOrStdout(), d)
	} else {
		err = d.print(cmd.OutOrStdout())
	}
	if err == nil {
		err = ErrUnhealthy
	}
	return nil, err
}

// down is what can be read of a hub that does not answer, from its files and
// from systemd. It opens nothing that the hub locks.
type down struct {
	Error        string               `json:"error"`
	Unit         map[string]string    `json:"unit,omitempty"`
	Certificates []report.Certificate `json:"certificates"`
	Files        []file               `json:"files"`
}

type file struct {
	Path  string    `json:"path"`
	Bytes int64     `json:"bytes"`
	Time  time.Time `json:"time"`
}

func (s *Settings) down(err error) down {
	d := down{Error: err.Error(), Unit: s.State}
	for _, name := range []string{"hub-client.pem", "hub-server-local.pem", "hub-server-cluster.pem"} {
		if c, err := readCertificate(s.pki(name)); err == nil {
			d.Certificates = append(d.Certificates, report.Certificate{Name: name, NotBefore: c.NotBefore, NotAfter: c.NotAfter})
		}
	}
	paths, _ := filepath.Glob(filepath.Join(s.RootDir, "store", "*")) // the pattern is valid
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil {
			d.Files = append(d.Files, file{path, info.Size(), info.ModTime()})
		}
	}
	return d
}

func (d *down) print(out io.Writer) error {
	fmt.Fprintf(out, "The hub does not answer: %s\n", d.Error)
	if d.Unit != nil {
		fmt.Fprintf(out, "systemd says: %s, %s/%s, result %s, %s restarts\n",
			d.Unit["LoadState"], d.Unit["ActiveState"], d.Unit["SubState"], d.Unit["Result"], d.Unit["NRestarts"])
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if len(d.Certificates)+len(d.Files) > 0 {
		fmt.Fprintln(t, "\nON DISK\t\t")
	}
	now := time.Now()
	for _, c := range d.Certificates {
		fmt.Fprintf(t, "%s\t%s\n", c.Name, life(c, now))
	}
	for _, f := range d.Files {
		fmt.Fprintf(t, "%s\t%s, written %s ago\n", f.Path, size(f.Bytes), age(f.Time, now))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprint(out, "\nPods go on. What helps: yurtadm doctor; journalctl -u yurthub -n 50\n")
	return nil
}

func printReport(out io.Writer, r *report.Report, now time.Time) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, a ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, a...)) }
	pool := ""
	if r.Pool != "" {
		pool = ", pool " + r.Pool
	}
	row("node", "%s%s; hub %s, up for %s", r.Node, pool, r.Version, age(r.Started, now))
	if r.Online {
		row("link", "up for %s", age(r.Since, now))
		if r.Cut != nil {
			row("", "cut before, for %s until %s (%s)", r.Cut.To.Sub(r.Cut.From).Round(time.Second), stamp(r.Cut.To), r.Cut.How)
		}
	} else {
		row("link", "DOWN for %s: %s", age(r.Since, now), r.Reason)
	}
	if r.Sharing != nil {
		row("shared", "%s", sharing(r.Sharing))
	}
	store := ""
	if r.StoreRebuilt {
		store += ", begun anew at the start"
	}
	if r.StoreDamaged > 0 {
		store += fmt.Sprintf(", %d damaged objects set aside", r.StoreDamaged)
	}
	row("store", "%s, %s%s, key from %s", r.StoreHealth, size(r.StoreBytes), store, r.KeySource)
	for _, c := range r.Certificates {
		row("certificate", "%s, %s", c.Name, life(c, now))
	}
	oldest := ""
	if !r.Journal.Oldest.IsZero() {
		oldest = fmt.Sprintf(", %s, the oldest for %s", size(int64(r.Journal.Bytes)), age(r.Journal.Oldest, now))
	}
	row("journal", "%d status, %d events wait for the cloud%s", r.StatusPending, r.EventsPending, oldest)
	row("", "%d delivered, %d dropped since the start", r.Journal.Delivered, r.Journal.Dropped)
	if n := len(r.Endings); n > 0 {
		row("pods", "%d will be stopped: yurtadm status pool", n)
	}
	if !r.Discovery {
		row("kubectl", "cannot work without the cloud yet")
	}
	fmt.Fprintln(t, "\nCONDITION\tSTATUS\tREASON\tMESSAGE")
	for _, c := range r.Conditions {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", c.Type, c.Status, c.Reason, c.Message)
	}
	printPeers(t, r.Sharing, now)
	fmt.Fprintln(t, "\nSCOPE\tOBJECTS\tWATCHERS\tAGE\tON DISK")
	slices.SortFunc(r.Scopes, func(a, b report.Scope) int { return strings.Compare(a.Scope, b.Scope) })
	for _, s := range r.Scopes {
		disk := "yes"
		switch {
		case s.Damage != "":
			disk = "DAMAGED: " + s.Damage
		case !s.Synced:
			disk = "not fetched yet"
		case !s.Stored:
			disk = "in a second"
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\t%s\n", s.Scope, s.Objects, s.Watchers, age(s.Contact, now), disk)
	}
	return t.Flush()
}

// sharing tells in a line how the hub comes by what its pool shares.
func sharing(s *report.Sharing) string {
	from := "the cloud"
	if s.Upstream != report.Cloud {
		from = "node " + s.Upstream
	}
	live := "which hears the cloud"
	switch {
	case s.Upstream == report.Cloud && s.Live:
		live = "which answers"
	case s.Upstream == report.Cloud:
		live = "which does NOT ANSWER"
	case !s.Live:
		live = "which does NOT HEAR THE CLOUD"
	}
	at := "peers do not reach this hub"
	if s.Address != "" {
		at = "peers reach this hub at " + s.Address
	}
	return fmt.Sprintf("%s; services and the like come from %s, %s; %s", s.Role, from, live, at)
}

func printPeers(out io.Writer, s *report.Sharing, now time.Time) {
	if s == nil || len(s.Peers) == 0 {
		return
	}
	fmt.Fprintln(out, "\nPEER\tADDRESS\tROLE\tLINK\tHEARS THE CLOUD\tSEEN")
	for _, p := range s.Peers {
		role := report.RoleMember
		if p.Leader {
			role = report.RoleLeader
		}
		fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Node, p.Address, role, yes(p.Link), yes(p.Live), age(p.Seen, now))
	}
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func life(c report.Certificate, now time.Time) string {
	switch left := c.NotAfter.Sub(now); {
	case c.NotAfter.IsZero():
		return "none yet"
	case left <= 0:
		return fmt.Sprintf("EXPIRED %s ago, on %s", age(c.NotAfter, now), stamp(c.NotAfter))
	case now.Before(c.NotBefore):
		return "NOT VALID before " + stamp(c.NotBefore)
	default:
		return fmt.Sprintf("valid for %s more, until %s", age(now, now.Add(left)), stamp(c.NotAfter))
	}
}

// age is a time span for people.
func age(from, to time.Time) string {
	switch d := to.Sub(from); {
	case from.IsZero():
		return "never"
	case d < 2*time.Minute:
		return d.Round(time.Second).String()
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
}

func size(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%d KiB", (n+1023)>>10)
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}
