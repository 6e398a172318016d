// Command yurtadm is the operator's tool.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/doctor"
	"github.com/yurt-edge/yurt/internal/filtercli"
	"github.com/yurt-edge/yurt/internal/playgroundcli"
	"github.com/yurt-edge/yurt/playground"
)

func main() {
	ctx, stop := daemon.SignalContext(context.Background())
	defer stop()
	err := command().ExecuteContext(ctx)
	if exit, ok := errors.AsType[*playgroundcli.ExitError](err); ok {
		os.Exit(exit.Code)
	}
	if errors.Is(err, doctor.ErrUnhealthy) {
		os.Exit(1) // it has told what is wrong
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "yurtadm:", err)
		if hint := playground.Hint(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
}

func command() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "yurtadm",
		Short:         "Run and operate edge clusters",
		Version:       daemon.ReadVersion().String(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.AddCommand(playgroundcli.New(), doctor.NewStatus(), doctor.NewDoctor(), filtercli.New())
	groups(cmd)
	return cmd
}

// groups has commands that only hold others refuse a word that is none of them.
// Cobra shows their help then, which a script takes for success.
func groups(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		if groups(c); c.HasSubCommands() && !c.Runnable() {
			c.Args, c.RunE = cobra.NoArgs, func(c *cobra.Command, _ []string) error { return c.Help() }
		}
	}
}
