package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Ready tells systemd that the service is up. It does nothing when systemd
// did not start the process. So do the functions below.
func Ready() error { return notify(daemon.SdNotifyReady) }

// Stopping tells systemd that an orderly stop has begun.
func Stopping() error { return notify(daemon.SdNotifyStopping) }

// Status sets the line that `systemctl status` shows.
func Status(line string) error { return notify("STATUS=" + line) }

func notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("notify systemd of %s: %w", state, err)
	}
	return nil
}

// Watchdog returns a run for Group that tells systemd at half the unit's
// WatchdogSec that the service is alive, as long as healthy returns nil. When
// healthy fails or hangs, the sign of life stays away and systemd restarts
// the service. healthy must not depend on the cloud: a cut link must never
// restart a hub.
func Watchdog(log *slog.Logger, healthy func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		timeout, err := daemon.SdWatchdogEnabled(false)
		if err != nil {
			return fmt.Errorf("read watchdog settings: %w", err)
		}
		if timeout == 0 {
			return nil
		}
		tick := time.NewTicker(timeout / 2)
		defer tick.Stop()
		for {
			if err := healthy(ctx); err != nil {
				log.Error("watchdog withheld", "err", err)
			} else if err := notify(daemon.SdNotifyWatchdog); err != nil {
				log.Error("watchdog not delivered", "err", err)
			}
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
	}
}
