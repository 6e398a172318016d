package accessfilter

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// pointer is a field's path: a JSON pointer in its parts.
type pointer []string

// partsMost bounds how deep a pointer leads.
const partsMost = 32

// parsePointer reads a JSON pointer. at is where it is wrong, in characters
// from 1 on.
func parsePointer(text string) (p pointer, at int, err error) {
	if !strings.HasPrefix(text, "/") {
		return nil, 1, errors.New("a path begins with a slash, as in /metadata/labels")
	}
	at = 1
	for part := range strings.SplitSeq(text[1:], "/") {
		at++
		if part == "" {
			return nil, at, errors.New("a part of the path is empty")
		}
		for i := 0; i < len(part); i++ {
			if part[i] == '~' && (i+1 == len(part) || part[i+1] != '0' && part[i+1] != '1') {
				return nil, at + i, errors.New("~ is written ~0 in a path, and / within a name ~1")
			}
		}
		p = append(p, strings.NewReplacer("~1", "/", "~0", "~").Replace(part))
		at += len(part)
	}
	if len(p) > partsMost {
		return nil, 1, fmt.Errorf("the path has %d parts, more than %d", len(p), partsMost)
	}
	return p, 0, p.check()
}

// identity is what tells an object from others, and how new it is. A component
// that saw it otherwise would take the object for another, and what is removed
// here is the API server's alone to say.
var identity = []pointer{
	{"apiVersion"},
	{"kind"},
	{"metadata", "name"},
	{"metadata", "namespace"},
	{"metadata", "uid"},
	{"metadata", "resourceVersion"},
	{"metadata", "generation"},
	{"metadata", "generateName"},
	{"metadata", "creationTimestamp"},
	{"metadata", "deletionTimestamp"},
	{"metadata", "deletionGracePeriodSeconds"},
}

func (p pointer) check() error {
	if slices.Equal(p, pointer{"metadata"}) {
		return errors.New("metadata as a whole cannot be changed; name the label or annotation")
	}
	for _, no := range identity {
		if len(p) >= len(no) && slices.Equal(p[:len(no)], no) {
			return fmt.Errorf("%s says which object it is, and cannot be changed", strings.Join(no, "."))
		}
	}
	return nil
}

// place returns where part i begins in the pointer's text, from 1 on.
func place(text string, i int) int {
	at := 0
	for range i {
		at += 1 + strings.IndexByte(text[at+1:], '/')
	}
	return at + 2
}
