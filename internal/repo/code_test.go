package repo

import (
	"go/ast"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// junk are names that say nothing about what a package holds.
var junk = []string{
	"util", "utils", "common", "helper", "helpers", "base", "types", "constants", "consts", "misc", "shared", "impl", "lib",
}

// call returns the receiver and name of a call such as fmt.Println, if the
// receiver is a plain identifier.
func call(n ast.Node) (recv, name string) {
	c, ok := n.(*ast.CallExpr)
	if !ok {
		return "", ""
	}
	sel, ok := c.Fun.(*ast.SelectorExpr)
	if !ok {
		return "", ""
	}
	id, ok := sel.X.(*ast.Ident)
	if !ok {
		return "", ""
	}
	return id.Name, sel.Sel.Name
}

// codeViolations applies the rules that need only one file. Sleeping inside
// a synctest bubble only moves its clock; a helper that does so takes no part
// in this exception, since nothing says who calls it.
func codeViolations(s *source) []string {
	if s.generated() {
		return nil
	}
	var bad []string
	say := func(n ast.Node, what string) { bad = append(bad, s.at(n)+": "+what) }

	main := s.file.Name.Name == "main"
	testCode := s.test() || under(s.name, "test") || strings.HasSuffix(s.file.Name.Name, "test")
	mayPrint := main || s.test() || under(s.name, "cmd") || under(s.name, "playground")
	mayExit := main || s.test() // TestMain and the children of crash tests end by os.Exit.

	for _, d := range s.file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
			say(f, "init hides what a program does; call it from Run or main")
		}
	}
	bubble := token.NoPos // End of the synctest bubble that n may be in.
	for n := range ast.Preorder(s.file) {
		recv, name := call(n)
		if recv == "synctest" && name == "Test" {
			bubble = n.End()
		}
		switch fn := recv + "." + name; {
		case fn == "time.Sleep" && testCode && n.Pos() > bubble:
			say(n, "a test waits for a condition, or in a synctest bubble, not for a time")
		case slices.Contains([]string{"t", "b", "f", "tb"}, recv) && strings.HasPrefix(name, "Skip") && testCode,
			fn == "testing.Short":
			say(n, "a test that is skipped proves nothing")
		case fn == "context.TODO":
			say(n, "pass the context down")
		case recv == "fmt" && strings.HasPrefix(name, "Print") && !mayPrint:
			say(n, "only commands and the playground print")
		case fn == "os.Exit" && !mayExit, recv == "log" && strings.HasPrefix(name, "Fatal") && !mayExit:
			say(n, "only main ends the process; return an error")
		}
	}
	return bad
}

func TestCode(t *testing.T) {
	for _, s := range sources(t) {
		report(t, codeViolations(s))
	}
}

func TestCodeRulesBite(t *testing.T) {
	for _, tc := range []struct {
		file, body string
		want       int
	}{
		{"internal/hub/hub_test.go", "time.Sleep(1)", 1},
		{"test/e2e/run.go", "time.Sleep(1)", 1},
		{"internal/hub/hub.go", "time.Sleep(1)", 0},
		{"internal/hub/hub_test.go", "synctest.Test(t, func(t *testing.T) { time.Sleep(1) })", 0},
		{"internal/hub/hub_test.go", "synctest.Test(t, f)\ntime.Sleep(1)", 1},
		{"internal/hub/hub_test.go", `t.Skip("slow")`, 1},
		{"internal/hub/hub_test.go", "if testing.Short() { return }", 1},
		{"internal/hub/hub_test.go", "return filepath.SkipDir", 0},
		{"internal/hub/hub.go", "context.TODO()", 1},
		{"internal/hub/hub.go", "fmt.Println()", 1},
		{"internal/hub/hub.go", "fmt.Fprintln(w)", 0},
		{"playground/progress.go", "fmt.Println()", 0},
		{"internal/hub/hub.go", "os.Exit(1)", 1},
		{"internal/hub/crash_test.go", "os.Exit(1)", 0},
		{"internal/hub/hub.go", "log.Fatalf(``)", 1},
	} {
		s, err := parse(tc.file, "package hub\nfunc f() {\n"+tc.body+"\n}\n")
		if err != nil {
			t.Fatal(err)
		}
		if got := codeViolations(s); len(got) != tc.want {
			t.Errorf("%s with %s: got %q, want %d violations", tc.file, tc.body, got, tc.want)
		}
	}
	s, err := parse("internal/hub/hub.go", "package hub\nfunc init() {}\n")
	if err != nil {
		t.Fatal(err)
	}
	if got := codeViolations(s); len(got) != 1 {
		t.Errorf("init: got %q, want one violation", got)
	}
}

// packageViolations applies the rules on names and documentation to the files
// of one folder.
func packageViolations(dir string, in []*source) []string {
	var bad []string
	var doc, name string
	for _, s := range in {
		if s.file.Doc != nil && doc == "" {
			doc = s.file.Doc.Text()
		}
		if !strings.HasSuffix(s.file.Name.Name, "_test") || name == "" {
			name = s.file.Name.Name
		}
	}
	want := "Package " + strings.TrimSuffix(name, "_test") + " "
	if name == "main" {
		want = "Command " + path.Base(dir) + " "
	}
	if !strings.HasPrefix(doc, want) {
		bad = append(bad, dir+": no package comment that starts with \""+want+"\"")
	}
	for _, n := range []string{name, path.Base(dir)} {
		if slices.Contains(junk, n) {
			bad = append(bad, dir+": "+n+" is no name; say what the package holds")
			break
		}
	}
	return bad
}

func TestPackages(t *testing.T) {
	dirs := map[string][]*source{}
	for _, s := range sources(t) {
		dirs[s.dir()] = append(dirs[s.dir()], s)
	}
	for dir, in := range dirs {
		report(t, packageViolations(dir, in))
	}
}

func TestPackageRulesBite(t *testing.T) {
	for _, tc := range []struct {
		dir, code string
		want      int
	}{
		{"internal/hub/store", "// Package store keeps.\npackage store", 0},
		{"internal/hub/store", "package store", 1},
		{"internal/hub/store", "// This package keeps.\npackage store", 1},
		{"internal/utils", "// Package utils keeps.\npackage utils", 1},
		{"cmd/yurthub", "// Command yurthub is the hub.\npackage main", 0},
		{"cmd/yurthub", "// Package main is the hub.\npackage main", 1},
	} {
		s, err := parse(tc.dir+"/x.go", tc.code)
		if err != nil {
			t.Fatal(err)
		}
		if got := packageViolations(tc.dir, []*source{s}); len(got) != tc.want {
			t.Errorf("%s: got %q, want %d violations", tc.code, got, tc.want)
		}
	}
}

func TestMainsAreShort(t *testing.T) {
	for _, name := range files(t, "main.go") {
		if n := strings.Count(read(t, name), "\n"); under(name, "cmd") && n > 60 {
			t.Errorf("%s has %d lines, want at most 60: flags, Config, Run", name, n)
		}
	}
}

var counterOrGauge = regexp.MustCompile(`^(node_yurthub|yurt)(_[a-z0-9]+)+$`)

// metricViolations checks the names of the metrics that s defines: the hub's
// begin with node_yurthub_, as dashboards for OpenYurt expect, all others
// with yurt_; a counter ends in _total. A name is read where it is a literal
// or a constant of the file.
func metricViolations(s *source, consts map[string]string) []string {
	var bad []string
	check := func(n ast.Node, kind, name string) {
		prefix := "yurt_"
		if under(s.dir(), "internal/hub") {
			prefix = "node_yurthub_"
		}
		switch {
		case !counterOrGauge.MatchString(name), !strings.HasPrefix(name, prefix):
			bad = append(bad, s.at(n)+": metric \""+name+"\" is not "+prefix+"words_in_lower_case")
		case kind == "CounterOpts" && !strings.HasSuffix(name, "_total"):
			bad = append(bad, s.at(n)+": counter "+name+" does not end in _total")
		}
	}
	for n := range ast.Preorder(s.file) {
		if recv, name := call(n); recv == "prometheus" && name == "NewDesc" {
			arg := n.(*ast.CallExpr).Args[0]
			if r, f := call(arg); r == "prometheus" && f == "BuildFQName" {
				var words []string
				for _, a := range arg.(*ast.CallExpr).Args {
					if w := text(a, consts); w != "" {
						words = append(words, w)
					}
				}
				check(n, "", strings.Join(words, "_"))
			} else {
				check(n, "", text(arg, consts))
			}
		}
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			continue
		}
		sel, ok := lit.Type.(*ast.SelectorExpr)
		if !ok {
			continue
		}
		id, ok := sel.X.(*ast.Ident)
		if !ok || id.Name != "prometheus" || !slices.Contains([]string{"Opts", "CounterOpts", "GaugeOpts", "HistogramOpts", "SummaryOpts"}, sel.Sel.Name) {
			continue
		}
		fields := map[string]string{}
		for _, e := range lit.Elts {
			if kv, ok := e.(*ast.KeyValueExpr); ok {
				if key, ok := kv.Key.(*ast.Ident); ok {
					fields[key.Name] = text(kv.Value, consts)
				}
			}
		}
		kind := sel.Sel.Name
		if fields["Name"] == "" && fields["Namespace"] != "" {
			// A function that makes options of its arguments: the prefix
			// stands here, and the words with the callers.
			kind, fields["Name"] = "", "x"
		}
		var words []string
		for _, f := range []string{"Namespace", "Subsystem", "Name"} {
			if fields[f] != "" {
				words = append(words, fields[f])
			}
		}
		check(lit, kind, strings.Join(words, "_"))
	}
	return bad
}

// text returns the value of a string literal, of a sum of them or of one of
// consts, and the empty string for anything else.
func text(e ast.Expr, consts map[string]string) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil {
			return s
		}
	case *ast.Ident:
		return consts[e.Name]
	case *ast.BinaryExpr:
		if e.Op == token.ADD {
			return text(e.X, consts) + text(e.Y, consts)
		}
	}
	return ""
}

// stringConsts returns the file's string constants by name.
func stringConsts(s *source) map[string]string {
	consts := map[string]string{}
	for n := range ast.Preorder(s.file) {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			continue
		}
		for i, v := range spec.Values {
			if i < len(spec.Names) {
				consts[spec.Names[i].Name] = text(v, consts)
			}
		}
	}
	return consts
}

func TestMetricNames(t *testing.T) {
	for _, s := range sources(t) {
		if !s.test() {
			report(t, metricViolations(s, stringConsts(s)))
		}
	}
}

func TestMetricRulesBite(t *testing.T) {
	for _, tc := range []struct {
		file, code string
		want       int
	}{
		{"internal/hub/metrics.go", `prometheus.CounterOpts{Name: "node_yurthub_requests_total"}`, 0},
		{"internal/hub/metrics.go", `prometheus.CounterOpts{Namespace: ns, Name: "requests_total"}`, 0},
		{"internal/hub/metrics.go", `prometheus.CounterOpts{Name: "node_yurthub_requests"}`, 1},
		{"internal/hub/metrics.go", `prometheus.GaugeOpts{Name: "yurt_link_up"}`, 1},
		{"internal/manager/metrics.go", `prometheus.GaugeOpts{Name: "yurt_pools"}`, 0},
		{"internal/manager/metrics.go", `prometheus.GaugeOpts{Name: dynamic()}`, 1},
		{"internal/hub/metrics.go", `prometheus.Opts{Namespace: ns, Name: name}`, 0},
		{"internal/hub/metrics.go", `prometheus.Opts{Namespace: "yurt", Name: name}`, 1},
		{"internal/manager/metrics.go", `prometheus.NewDesc(prometheus.BuildFQName("yurt", "", "pools"), "", nil, nil)`, 0},
		{"internal/manager/metrics.go", `prometheus.NewDesc("pools", "", nil, nil)`, 1},
	} {
		s, err := parse(tc.file, "package x\nconst ns = \"node_yurthub\"\nvar _ = "+tc.code+"\n")
		if err != nil {
			t.Fatal(err)
		}
		if got := metricViolations(s, stringConsts(s)); len(got) != tc.want {
			t.Errorf("%s: got %q, want %d violations", tc.code, got, tc.want)
		}
	}
}
