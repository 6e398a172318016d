// Command yurt-manager has the controllers of Yurt, which run in the cloud.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/manager"
)

func main() {
	ctx, stop := daemon.SignalContext(context.Background())
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "yurt-manager:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var (
		flags   manager.Flags
		logging daemon.LogConfig
	)
	cmd := &cobra.Command{
		Use:   "yurt-manager",
		Short: "The controllers of node pools",
		Args:  cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		Version: daemon.ReadVersion().String(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := daemon.NewLogger(os.Stderr, logging)
			if err != nil {
				return err
			}
			if err := daemon.SetDefaultLogger(cmd.Context(), log); err != nil {
				return err
			}
			cfg, err := flags.Config()
			if err != nil {
				return err
			}
			cfg.Log = log
			return manager.Run(cmd.Context(), cfg)
		},
	}
	flags.Add(cmd.Flags())
	logging.AddFlags(cmd.Flags())
	return cmd
}
