// Package crds holds the CustomResourceDefinitions of Yurt, generated from the
// types in api. The chart, the tests and the playground all read them here.
package crds

import (
	"embed"
	"io/fs"
)

//go:generate go tool -modfile=../../go.tools.mod controller-gen object:headerFile=/dev/null crd:generateEmbeddedObjectMeta=true paths=../... output:crd:dir=.

//go:embed *.yaml
var files embed.FS

// YAML returns the definitions, each a YAML document, by file name.
func YAML() map[string][]byte {
	out := map[string][]byte{}
	names, err := fs.Glob(files, "*.yaml")
	if err != nil {
		panic(err) // the pattern is a constant
	}
	for _, name := range names {
		text, err := files.ReadFile(name)
		if err != nil {
			panic(err) // it was found a line ago
		}
		out[name] = text
	}
	return out
}
