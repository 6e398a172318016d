package playgroundcli

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/demo"
)

// demo is the main job: it brings a playground up, unless one runs already,
// tells the story on it and takes down what it brought up.
func (g *global) demo() *cobra.Command {
	var (
		report string
		keep   bool
	)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Cut a link, pull a plug, and show that the pods run on",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			p, err := playground.Attach(g.dir)
			if err != nil {
				if err := g.spawn(cmd, upFlags{}); err != nil {
					return err
				}
				if p, err = playground.Attach(g.dir); err != nil {
					return err
				}
				if !keep {
					defer func() { err = errors.Join(err, playground.Down(cmd.Context(), g.dir)) }()
				}
			}
			result, err := demo.Run(cmd.Context(), p, cmd.OutOrStdout())
			if report != "" {
				text, jsonErr := json.MarshalIndent(result, "", "  ")
				if jsonErr == nil {
					jsonErr = os.WriteFile(report, append(text, '\n'), 0o644)
				}
				err = errors.Join(err, jsonErr)
			}
			if err == nil && !result.Passed() {
				err = fmt.Errorf("%d of the demo's claims do not hold", len(result.Fails))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&report, "report", "", "write the measured steps to this file as JSON")
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the playground up")
	return cmd
}
