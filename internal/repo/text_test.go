package repo

import (
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// compareFile compares a reviewed file of this folder with what the tree says
// now, or rewrites it under -update.
func compareFile(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is stale; review the change, then `make generate`\ngot:\n%swant:\n%s", name, got, want)
	}
}

func TestLicence(t *testing.T) {
	text := read(t, "LICENSE")
	for _, want := range []string{"Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"} {
		if !strings.Contains(text, want) {
			t.Errorf("LICENSE lacks %q", want)
		}
	}
}

func TestMakefileIsShort(t *testing.T) {
	if n := strings.Count(read(t, "Makefile"), "\n"); n > 100 {
		t.Errorf("Makefile has %d lines, want at most 100", n)
	}
}

func TestScriptsParseAndRun(t *testing.T) {
	for _, name := range []string{".ci/run", ".ci/packages"} {
		info, err := os.Stat(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode()&0o111 == 0 {
			t.Errorf("%s is not executable", name)
		}
		if _, err := command("bash", "-n", name); err != nil {
			t.Error(err)
		}
		if !strings.Contains(read(t, name), "\nset -euo pipefail\n") {
			t.Errorf("%s goes on after an error", name)
		}
	}
}

var target = regexp.MustCompile(`(?m)^([a-z0-9][a-z0-9/-]*):`)

// targets returns the names of a Makefile's rules.
func targets(makefile string) map[string]bool {
	names := map[string]bool{}
	for _, m := range target.FindAllStringSubmatch(makefile, -1) {
		names[m[1]] = true
	}
	return names
}

var (
	fence    = regexp.MustCompile("(?ms)^```(sh|bash|shell|console)\n(.*?)^```$")
	makeCall = regexp.MustCompile(`(?m)^\s*(?:[$#] )?make((?: +[a-z0-9][a-z0-9/-]*)+)`)
)

// makeCalls returns the targets that a document's shell blocks call.
func makeCalls(doc string) []string {
	var called []string
	for _, block := range fence.FindAllStringSubmatch(doc, -1) {
		for _, m := range makeCall.FindAllStringSubmatch(block[2], -1) {
			called = append(called, strings.Fields(m[1])...)
		}
	}
	return called
}

func TestDocumentsCallTargetsThatExist(t *testing.T) {
	have := targets(read(t, "Makefile"))
	for _, name := range files(t, "*.md") {
		for _, called := range makeCalls(read(t, name)) {
			if !have[called] {
				t.Errorf("%s calls make %s, which does not exist", name, called)
			}
		}
	}
	calls := makeCalls(read(t, "README.md"))
	if len(calls) < 2 || calls[0] != "demo" || calls[1] != "test" {
		t.Errorf("README.md calls make %v, want demo and test first", calls)
	}
}

func TestMakeCallsAreFound(t *testing.T) {
	got := makeCalls("```sh\nmake demo   # show\n$ make test bench\nmaker x\n```\nmake none\n")
	if strings.Join(got, " ") != "demo test bench" {
		t.Errorf("got %q", got)
	}
}

var (
	code    = regexp.MustCompile("(?ms)^```.*?^```$|`[^`\n]*`")
	link    = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.+?) *$`)
	notSlug = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// links returns the targets of a document's links that stay in the
// repository.
func links(doc string) []string {
	var found []string
	for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(doc, ""), -1) {
		if !strings.Contains(m[1], "://") && !strings.HasPrefix(m[1], "mailto:") {
			found = append(found, m[1])
		}
	}
	return found
}

// anchors returns the fragments that a document's headings answer to.
func anchors(doc string) map[string]bool {
	found := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(doc, -1) {
		slug := notSlug.ReplaceAllString(strings.ToLower(m[1]), "")
		found[strings.ReplaceAll(slug, " ", "-")] = true
	}
	return found
}

func TestLinksResolve(t *testing.T) {
	for _, name := range files(t, "*.md") {
		doc := read(t, name)
		for _, l := range links(doc) {
			file, fragment, _ := strings.Cut(l, "#")
			to := name
			if file != "" {
				to = path.Join(path.Dir(name), file)
			}
			if _, err := os.Stat(filepath.Join(root, to)); err != nil {
				t.Errorf("%s: link %s leads nowhere", name, l)
			} else if fragment != "" && strings.HasSuffix(to, ".md") && !anchors(read(t, to))[fragment] {
				t.Errorf("%s: link %s: %s has no such heading", name, l, to)
			}
		}
	}
}

func TestLinksAreFound(t *testing.T) {
	doc := "# The hub's *store*\n[a](b.md#x) [web](https://a.b) `[no](code)`\n```\n[no](block)\n```\n[c](#the-hubs-store)"
	if got := links(doc); strings.Join(got, " ") != "b.md#x #the-hubs-store" {
		t.Errorf("got %q", got)
	}
	if !anchors(doc)["the-hubs-store"] {
		t.Errorf("got %v", anchors(doc))
	}
}

var entry = regexp.MustCompile(`^\* \[(CHANGE|FEATURE|ENHANCEMENT|PERF|BUGFIX|SECURITY)\] \S|^  \S|^## |^$`)

func TestChangelogEntriesAreTagged(t *testing.T) {
	_, log, found := strings.Cut(read(t, "CHANGELOG.md"), "\n## ")
	if !found {
		t.Fatal("CHANGELOG.md has no release")
	}
	for i, line := range strings.Split("## "+log, "\n") {
		if !entry.MatchString(line) {
			t.Errorf("CHANGELOG.md: line %d after the first release: %q has no tag", i, line)
		}
	}
}

// TestUnits lets systemd itself read the units that we ship.
func TestUnits(t *testing.T) {
	units := files(t, "*.service")
	if len(units) == 0 {
		t.Fatal("found no unit")
	}
	start := regexp.MustCompile(`(?m)^ExecStart=\S+`)
	for _, name := range units {
		// systemd wants the program to exist; ours is not installed here.
		unit := filepath.Join(t.TempDir(), path.Base(name))
		if err := os.WriteFile(unit, []byte(start.ReplaceAllString(read(t, name), "ExecStart=/bin/true")), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// TestHubUnit holds the unit to what the hub's promises rest on.
func TestHubUnit(t *testing.T) {
	unit := read(t, "deploy/systemd/yurthub.service")
	for _, want := range []string{
		"Type=notify", "Restart=always", "StartLimitIntervalSec=0", "OOMScoreAdjust=-999", "MemoryMax=",
		"ProtectSystem=strict", "NoNewPrivileges=yes", "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_BIND_SERVICE\n",
	} {
		if !strings.Contains(unit, want) {
			t.Errorf("yurthub.service lacks %s", want)
		}
	}
	for _, not := range []string{"network-online.target\n", "Requires=", "BindsTo="} {
		for line := range strings.Lines(unit) {
			if strings.Contains(line, not) && !strings.HasPrefix(line, "#") {
				t.Errorf("yurthub.service: %q ties an edge node to something that may be absent", line)
			}
		}
	}

	// A unit that waits for messages needs a hub that sends them.
	var hub strings.Builder
	for _, name := range files(t, "*.go") {
		if under(name, "internal/hub") || under(name, "cmd/yurthub") {
			hub.WriteString(read(t, name))
		}
	}
	for _, call := range []string{"daemon.Ready(", "daemon.Stopping(", "daemon.Watchdog("} {
		if !strings.Contains(hub.String(), call) {
			t.Errorf("the unit expects the hub to call %s...)", call)
		}
	}
}
