package repo

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const (
	root   = "../.." // of the repository, seen from this folder
	module = "github.com/yurt-edge/yurt"
)

var update = flag.Bool("update", false, "rewrite the reviewed files in testdata")

// pkg is what `go list -json` tells of a package, as far as rules need it.
type pkg struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
	Standard     bool
	Module       *struct{ Path string }
	Error        *struct{ Err string }
}

// ours reports whether p belongs to this module.
func (p *pkg) ours() bool { return rel(p.ImportPath) != "" }

// all returns what p imports, its tests included.
func (p *pkg) all() []string {
	return append(append(append([]string{}, p.Imports...), p.TestImports...), p.XTestImports...)
}

// rel returns an import path of this module without the module's path, and
// the empty string for any other.
func rel(importPath string) string {
	r, ok := strings.CutPrefix(importPath, module+"/")
	if !ok {
		return ""
	}
	return r
}

// under reports whether path is dir or lies below it.
func under(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// command returns the output of a program run at the root.
func command(name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, errors.New(cmd.String() + ": " + err.Error() + "\n" + stderr.String())
	}
	return out, nil
}

var listed = sync.OnceValues(func() ([]*pkg, error) {
	out, err := command("go", "list", "-e", "-deps",
		"-json=ImportPath,Imports,TestImports,XTestImports,Deps,Standard,Module,Error", "./...")
	if err != nil {
		return nil, err
	}
	var pkgs []*pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		p := &pkg{}
		if err := dec.Decode(p); errors.Is(err, io.EOF) {
			return pkgs, nil
		} else if err != nil {
			return nil, err
		}
		pkgs = append(pkgs, p)
	}
})

// packages returns the packages of the root module and all they depend on.
func packages(t *testing.T) []*pkg {
	t.Helper()
	pkgs, err := listed()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pkgs {
		if p.ours() && p.Error != nil {
			t.Fatalf("%s does not load: %s", p.ImportPath, p.Error.Err)
		}
	}
	return pkgs
}

var tracked = sync.OnceValues(func() ([]string, error) {
	out, err := command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	if err != nil {
		return nil, err
	}
	var files []string
	for name := range strings.SplitSeq(strings.TrimRight(string(out), "\x00"), "\x00") {
		// A file that was deleted and not yet committed is still in the index.
		if _, err := os.Stat(filepath.Join(root, name)); err == nil {
			files = append(files, name)
		}
	}
	return files, nil
})

// files returns the repository's files whose base name matches the pattern,
// relative to the root; new ones that are not ignored are among them.
func files(t *testing.T, pattern string) []string {
	t.Helper()
	all, err := tracked()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, name := range all {
		ok, err := path.Match(pattern, path.Base(name))
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			found = append(found, name)
		}
	}
	return found
}

// read returns a file of the repository.
func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// source is one Go file.
type source struct {
	name string // Relative to the root.
	fset *token.FileSet
	file *ast.File
}

func (s *source) test() bool      { return strings.HasSuffix(s.name, "_test.go") }
func (s *source) dir() string     { return path.Dir(s.name) }
func (s *source) generated() bool { return ast.IsGenerated(s.file) }

// at returns the position of n as file:line.
func (s *source) at(n ast.Node) string {
	return s.name + ":" + strconv.Itoa(s.fset.Position(n.Pos()).Line)
}

// parse returns code as the file name.
func parse(name, code string) (*source, error) {
	s := &source{name: name, fset: token.NewFileSet()}
	var err error
	s.file, err = parser.ParseFile(s.fset, name, code, parser.ParseComments|parser.SkipObjectResolution)
	return s, err
}

var parsed = sync.OnceValues(func() ([]*source, error) {
	names, err := tracked()
	if err != nil {
		return nil, err
	}
	var all []*source
	for _, name := range names {
		if !strings.HasSuffix(name, ".go") || strings.Contains("/"+name, "/testdata/") {
			continue
		}
		code, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		s, err := parse(name, string(code))
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
})

// sources returns every Go file, those of nested modules included.
func sources(t *testing.T) []*source {
	t.Helper()
	all, err := parsed()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// report fails t once per violation.
func report(t *testing.T, violations []string) {
	t.Helper()
	for _, v := range violations {
		t.Error(v)
	}
}
