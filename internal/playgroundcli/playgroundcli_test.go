package playgroundcli

import (
	"strings"
	"testing"

	"github.com/yurt-edge/yurt/playground"
)

func TestParseRate(t *testing.T) {
	for text, want := range map[string]int64{
		"": 0, "800": 800, "500kbit": 500_000, "2mbit": 2_000_000, "1.5mbit": 1_500_000, "1gbit": 1_000_000_000,
	} {
		if got, err := parseRate(text); err != nil || got != want {
			t.Errorf("parseRate(%q): want %d, got %d, %v", text, want, got, err)
		}
	}
	for _, text := range []string{"fast", "-1mbit", "0", "2mb", "2mbitx"} {
		if _, err := parseRate(text); err == nil || playground.Hint(err) == "" {
			t.Errorf("parseRate(%q): want an error with a hint, got %v", text, err)
		}
	}
}

func TestCommandsNeedARunningPlayground(t *testing.T) {
	for _, args := range []string{"status", "cut hangzhou", "heal hangzhou", "poweroff hangzhou-1", "nat hangzhou on", "image list"} {
		cmd := New()
		cmd.SetArgs(append([]string{"--dir", t.TempDir()}, strings.Fields(args)...))
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		err := cmd.ExecuteContext(t.Context())
		if err == nil || !strings.Contains(err.Error(), "no playground runs in") || !strings.Contains(playground.Hint(err), "up") {
			t.Errorf("%s: want that no playground runs and how to start one, got %v", args, err)
		}
	}
}
