// Command yurthub is the agent of an edge node: the Kubernetes API of the
// node, with the cloud or without.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/yurt-edge/yurt/internal/daemon"
	"github.com/yurt-edge/yurt/internal/hub"
)

func main() {
	ctx, stop := daemon.SignalContext(context.Background())
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "yurthub:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var (
		flags   hub.Flags
		logging daemon.LogConfig
	)
	cmd := &cobra.Command{
		Use:   "yurthub",
		Short: "The Kubernetes API of an edge node, with the cloud or without",
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
			registry := prometheus.NewRegistry()
			registry.MustRegister(daemon.Collectors()...)
			cfg.Log, cfg.Registerer, cfg.Gatherer = log, registry, registry
			return hub.Run(cmd.Context(), cfg)
		},
	}
	flags.Add(cmd.Flags())
	logging.AddFlags(cmd.Flags())
	cmd.AddCommand(hub.KeyCommand())
	return cmd
}
