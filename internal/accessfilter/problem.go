package accessfilter

import (
	"fmt"
	"strings"

	"github.com/google/cel-go/cel"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Problem is one thing that is wrong with a filter.
type Problem struct {
	// Field is where, as in spec.set[0].value, and Text what stands there.
	Field *field.Path
	Text  string
	// Line and Column are the place in Text, from 1 on; 0: all of it.
	Line, Column int
	// Resource names the resource for which it is wrong; empty: for any.
	Resource string
	Message  string
}

// Error is one line: spec.drop:1:8: undefined field 'foo'.
func (p Problem) Error() string {
	out := p.Field.String()
	if p.Line > 0 {
		out += fmt.Sprintf(":%d:%d", p.Line, p.Column)
	}
	out += ": " + p.Message
	if p.Resource != "" {
		out += " (for " + p.Resource + ")"
	}
	return out
}

// Excerpt is the line of the text with a mark under the column; empty if the
// problem has no place.
func (p Problem) Excerpt() string {
	lines := strings.Split(p.Text, "\n")
	if p.Line < 1 || p.Line > len(lines) {
		return ""
	}
	line := []rune(strings.ReplaceAll(lines[p.Line-1], "\t", " "))
	at := min(max(p.Column-1, 0), len(line))
	// A window around the column keeps what an API server answers short.
	from, to := max(at-excerptMost/2, 0), min(at+excerptMost/2, len(line))
	return string(line[from:to]) + "\n" + strings.Repeat(" ", at-from) + "^"
}

// excerptMost bounds an excerpt's characters.
const excerptMost = 120

// Problems are all that is wrong with a filter, in the order of its fields.
type Problems []Problem

// Error is one line for each.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// Fields are the problems as an API server answers them.
func (ps Problems) Fields() field.ErrorList {
	var out field.ErrorList
	for _, p := range ps {
		detail := p.Message
		if p.Line > 0 {
			detail = fmt.Sprintf("%d:%d: %s", p.Line, p.Column, p.Message)
		}
		if p.Resource != "" {
			detail += " (for " + p.Resource + ")"
		}
		if e := p.Excerpt(); e != "" {
			detail += "\n" + e
		}
		out = append(out, field.Invalid(p.Field, p.Text, detail))
	}
	return out
}

func (ps Problems) err() error {
	if len(ps) == 0 {
		return nil
	}
	return ps
}

// issuesMost bounds the problems of one expression.
const issuesMost = 10

// fromIssues are the problems that the compiler found.
func fromIssues(at *field.Path, text string, issues *cel.Issues) Problems {
	var out Problems
	for _, e := range issues.Errors() {
		if len(out) == issuesMost {
			break
		}
		// The first line says it; the parser adds what it might have expected.
		message, _, _ := strings.Cut(e.Message, "\n")
		out = append(out, Problem{
			Field: at, Text: text, Line: max(e.Location.Line(), 1), Column: max(e.Location.Column(), 0) + 1, Message: message,
		})
	}
	return out
}
