package repo

import (
	"path"
	"regexp"
	"strings"
	"testing"
)

const guarantee = "docs/guarantees.md"

var (
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	quoted   = regexp.MustCompile("`([^`]+)`")
)

// promise is a list item of the guarantees and the tests that it names.
type promise struct {
	text  string
	tests []string
}

// promises returns the list items of a document. A table, and text outside a
// list, promise nothing by themselves.
func promises(doc string) []promise {
	var found []promise
	for line := range strings.Lines(doc) {
		switch {
		case strings.HasPrefix(line, "- "):
			found = append(found, promise{text: strings.TrimSpace(line)})
		case strings.HasPrefix(line, "  ") && len(found) > 0:
			found[len(found)-1].text += " " + strings.TrimSpace(line)
		}
	}
	for i, p := range found {
		if _, names, ok := strings.Cut(p.text, "Tests: "); ok {
			for _, m := range quoted.FindAllStringSubmatch(names, -1) {
				found[i].tests = append(found[i].tests, m[1])
			}
		}
	}
	return found
}

// TestPromisesNameTheirTests holds docs/guarantees.md to what it says of
// itself: each promise names a test, and the test is there.
func TestPromisesNameTheirTests(t *testing.T) {
	have := map[string]bool{}
	for _, name := range files(t, "*_test.go") {
		for _, m := range testFunc.FindAllStringSubmatch(read(t, name), -1) {
			have[m[1]] = true
		}
	}
	for _, name := range files(t, "*.txtar") {
		have[path.Base(name)] = true
	}
	made := promises(read(t, guarantee))
	if len(made) == 0 {
		t.Fatalf("%s promises nothing", guarantee)
	}
	for _, p := range made {
		if len(p.tests) == 0 {
			t.Errorf("%s: %.60q names no test", guarantee, p.text)
		}
		for _, name := range p.tests {
			if !have[name] {
				t.Errorf("%s: %.60q names %s, which does not exist", guarantee, p.text, name)
			}
		}
	}
}

func TestPromisesAreFound(t *testing.T) {
	got := promises("# A\n\n- **One.** Yes. Tests: `TestX`, `a.txtar`.\n- Two `x`.\n  More. Tests: `TestY`.\n- Three.\n\n| a | b |\n")
	if len(got) != 3 || strings.Join(got[0].tests, " ") != "TestX a.txtar" ||
		strings.Join(got[1].tests, " ") != "TestY" || got[2].tests != nil {
		t.Errorf("got %q", got)
	}
}
