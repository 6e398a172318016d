// Package repo holds the rules of this repository as tests: who may import
// whom, what every package documents, which names and calls are not used,
// and that documents and build files say what is true.
//
// A rule that is executed does not rot. Each rule is a function over plain
// data with its own test on made-up input, and one test that applies it to
// the tree. The package has no code that anything else could use.
package repo
