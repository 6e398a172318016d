package main

import (
	"io"
	"strings"
	"testing"
)

// TestUnknownCommands: a slip of the pen is an error for scripts, too.
func TestUnknownCommands(t *testing.T) {
	for _, line := range []string{"filtre", "filter tset", "playground cutt hangzhou-1", "playground image pul", "status poool", "doctor all"} {
		cmd := command()
		cmd.SetArgs(strings.Fields(line))
		cmd.SetOut(io.Discard)
		if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "unknown command") {
			t.Errorf("yurtadm %s: %v", line, err)
		}
	}
	for _, line := range []string{"", "filter", "playground", "filter test --help"} {
		cmd := command()
		out := &strings.Builder{}
		cmd.SetArgs(strings.Fields(line))
		cmd.SetOut(out)
		if err := cmd.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), "Usage:") {
			t.Errorf("yurtadm %s: %v, %s", line, err, out)
		}
	}
}
