package repo

import (
	"regexp"
	"strings"
	"testing"
)

var (
	flagAdded = regexp.MustCompile(`\.\w+VarP?\([^"\n]*"([a-z][a-z0-9-]*)"`)
	metric    = regexp.MustCompile(`"((?:node_yurthub|yurt_manager)_[a-z_]+[a-z])"`)
)

// TestGuideNamesFlagsAndMetrics: what an operator can set and see on a node and
// in the cloud is in the guide.
func TestGuideNamesFlagsAndMetrics(t *testing.T) {
	var guide strings.Builder
	for _, name := range files(t, "*.md") {
		if strings.HasPrefix(name, "docs/") {
			guide.WriteString(read(t, name))
		}
	}
	wanted := map[string]string{} // and where it is made
	for _, name := range files(t, "*.go") {
		if !strings.HasPrefix(name, "internal/hub/") && !strings.HasPrefix(name, "internal/manager/") && !strings.HasPrefix(name, "internal/daemon/") ||
			strings.HasSuffix(name, "_test.go") {
			continue
		}
		text := read(t, name)
		for _, m := range flagAdded.FindAllStringSubmatch(text, -1) {
			wanted["--"+m[1]] = name
		}
		for _, m := range metric.FindAllStringSubmatch(text, -1) {
			wanted[m[1]] = name
		}
	}
	if len(wanted) < 80 {
		t.Fatalf("only %d flags and metrics are found", len(wanted))
	}
	for what, where := range wanted {
		if !regexp.MustCompile(regexp.QuoteMeta(what) + `\b`).MatchString(guide.String()) {
			t.Errorf("%s has %s, and docs/ does not", where, what)
		}
	}
}
