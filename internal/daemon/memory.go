package daemon

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// HideMemory keeps the memory of this process out of core dumps, and from
// being read by processes of the same user. A process that holds keys calls
// it before it has any.
func HideMemory() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hide memory: %w", err)
	}
	return nil
}
