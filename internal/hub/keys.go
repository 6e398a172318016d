package hub

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/yurt-edge/yurt/internal/hub/keyring"
)

// KeyConfig says where the key comes from that seals the store and the hub's
// private keys.
type KeyConfig struct {
	Source         keyring.Source
	TPMDevice      string
	PassphraseFile string
}

func (c Config) storePath() string {
	dir := c.StoreDir
	if dir == "" {
		dir = filepath.Join(c.RootDir, "store")
	}
	return filepath.Join(dir, "hub.db")
}

func (c Config) keyring() keyring.Config {
	pki := filepath.Join(c.RootDir, "pki")
	return keyring.Config{
		Dir: pki, Sealed: []string{c.storePath()}, Adopt: filepath.Join(pki, "store.key"),
		Source: c.Keys.Source, TPMDevice: c.Keys.TPMDevice, PassphraseFile: c.Keys.PassphraseFile, Log: c.Log,
	}
}

// keyFlags are a KeyConfig as it stands on the command line.
type keyFlags struct{ source, device, passphrase string }

func (f *keyFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&f.source, "store-key-source", string(keyring.Auto), "where the node key comes from: auto, tpm, file or passphrase")
	f.addPlaces(fs)
}

func (f *keyFlags) addPlaces(fs *pflag.FlagSet) {
	fs.StringVar(&f.device, "tpm-device", keyring.DefaultTPM, "device, or socket, of the TPM")
	fs.StringVar(&f.passphrase, "store-key-passphrase-file", "",
		"file with the passphrase (default the systemd credential "+keyring.Credential+")")
}

func (f *keyFlags) config() (KeyConfig, error) {
	cfg := KeyConfig{TPMDevice: f.device, PassphraseFile: f.passphrase}
	var err error
	if cfg.Source, err = keyring.ParseSource(f.source); err != nil {
		return cfg, fmt.Errorf("--store-key-source: %w", err)
	}
	return cfg, nil
}

// KeyCommand returns the command with which an operator looks at the node key
// and changes it. The hub may run meanwhile.
func KeyCommand() *cobra.Command {
	var (
		cfg   Config
		flags keyFlags
	)
	cmd := &cobra.Command{Use: "key", Short: "Look at the node key, which seals what is on disk, and change it", Args: cobra.NoArgs}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() } // else a slip of the pen ends well
	cmd.PersistentFlags().StringVar(&cfg.RootDir, "root-dir", "/var/lib/yurthub", "the hub's --root-dir")
	status := &cobra.Command{
		Use: "status", Short: "Say where the node key comes from", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := keyring.ReadStatus(cfg.keyring().Dir)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "source %s, since %s\n", s.Source, s.Made.Format(time.RFC3339))
			return nil
		},
	}
	var to, next string
	rotate := &cobra.Command{
		Use: "rotate", Short: "Replace the node key by a new one, from the same source or another", Args: cobra.NoArgs,
		Long: "Replace the node key by a new one. The store stays as it is, and a hub that runs\n" +
			"goes on. Whatever interrupts this command, the old key or the new one opens.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			source, err := keyring.ParseSource(to)
			if err != nil {
				return fmt.Errorf("--to: %w", err)
			}
			if cfg.Keys, err = flags.config(); err != nil {
				return err
			}
			cfg.Log = slog.Default()
			if err := keyring.Rotate(cmd.Context(), cfg.keyring(), source, next); err != nil {
				return err
			}
			s, err := keyring.ReadStatus(cfg.keyring().Dir)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "the node key is new, from %s\n", s.Source)
			return nil
		},
	}
	flags.source = string(keyring.Auto)
	flags.addPlaces(rotate.Flags())
	rotate.Flags().StringVar(&to, "to", string(keyring.Auto), "source of the new key: tpm, file, passphrase, or auto for the present one")
	rotate.Flags().StringVar(&next, "new-passphrase-file", "", "file with the new passphrase (default the present one)")
	cmd.AddCommand(status, rotate)
	return cmd
}
