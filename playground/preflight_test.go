package playground

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// refusal checks that err is one line with a hint.
func refusal(t *testing.T, err error, message, hint string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), message) || strings.Contains(err.Error(), "\n") {
		t.Errorf("want one line with %q, got %v", message, err)
	}
	if got := Hint(err); !strings.Contains(got, hint) {
		t.Errorf("want a hint with %q, got %q", hint, got)
	}
}

func TestPreflightNeedsRoot(t *testing.T) {
	refusal(t, checkRoot(1000), "needs root", "sudo")
	if err := checkRoot(0); err != nil {
		t.Error(err)
	}
}

func TestPreflightNamesThePackagesOfMissingTools(t *testing.T) {
	err := checkTools(func(tool string) (string, error) {
		if tool == "nft" || tool == "systemd-nspawn" {
			return "", os.ErrNotExist
		}
		return "/usr/bin/" + tool, nil
	})
	refusal(t, err, "programs are missing: nft, systemd-nspawn", "apt-get install -y nftables systemd-container")
}

func TestPreflightMeasuresTheDisk(t *testing.T) {
	free := func(n uint64) func(string) (uint64, error) {
		return func(string) (uint64, error) { return n, nil }
	}
	refusal(t, checkDisk("/data", diskNeeded, free(3<<30)), "/data has 3.0 GB free, the playground needs 8 GB", "--dir")
	if err := checkDisk("/data", diskNeeded, free(diskNeeded)); err != nil {
		t.Error(err)
	}
	broken := errors.New("input/output error")
	if err := checkDisk("/data", 1, func(string) (uint64, error) { return 0, broken }); !errors.Is(err, broken) {
		t.Errorf("want the error of the disk, got %v", err)
	}
}

func TestFreeBytesOfAFolderThatIsNotThereYet(t *testing.T) {
	n, err := freeBytes(t.TempDir() + "/a/b/c")
	if err != nil || n == 0 {
		t.Errorf("want the free bytes of the folder above, got %d, %v", n, err)
	}
}

func TestPreflightFindsTakenAddresses(t *testing.T) {
	top, err := DefaultTopology()
	if err != nil {
		t.Fatal(err)
	}
	top.WAN = "127.0.0.0/24"
	refusal(t, checkAddresses(top), "the host has address 127.0.0.1, which is in 127.0.0.0/24", "--topology")
}
