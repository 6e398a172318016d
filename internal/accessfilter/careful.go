package accessfilter

import (
	"fmt"
	"maps"
	"regexp/syntax"
	"strings"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/functions"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/common/types/traits"
	"github.com/google/cel-go/interpreter"
)

// CEL counts a function's cost when it has returned, and takes some for cheap
// that are not. Here is what keeps one call from taking seconds, or gigabytes:
// what it is going to do is counted as work before it begins.

// workVariable leads a call to the work of its run. No expression can name it.
const workVariable = "#work"

// effort says how much a call is going to do, in values that are read.
type effort func(args []ref.Val) int

// tooMuch is more than any run may do.
const tooMuch = 2 * mostWork

// efforts are those of the functions that may do much.
var efforts = map[string]effort{
	"distinct":              func(args []ref.Val) int { return product(length(args[0]), length(args[0])) },
	"sets.contains":         pairs,
	"sets.equivalent":       pairs,
	"sets.intersects":       pairs,
	"lists.range":           rangeOf,
	"flatten":               func(args []ref.Val) int { return deep(args[0], 0) },
	"sort":                  sorting,
	"@sortByAssociatedKeys": sorting,
	"join":                  joining,
	"format":                formatting,
	"quantity":              parsing,
	"isQuantity":            parsing,
	"replace":               replacing,
	"matches":               matching,
	"find":                  matching,
	"findAll":               matching,
	"reverse":               first,
	"slice":                 first,
	"split":                 first,
	"sum":                   first,
	"min":                   first,
	"max":                   first,
	"isSorted":              first,
	"indexOf":               pairs,
	"lastIndexOf":           pairs,
	"strings.quote":         first,
}

func first(args []ref.Val) int   { return length(args[0]) }
func sorting(args []ref.Val) int { return product(20, length(args[0])) }
func pairs(args []ref.Val) int   { return product(length(args[0]), length(args[1])) }

// comparing and looking are the efforts of what is called for each element of
// many a list.
func comparing(a, b ref.Val) int { return min(length(a), length(b)) }

func looking(_, in ref.Val) int {
	if _, ok := in.(*members); ok {
		return 1
	}
	if _, ok := in.(traits.Lister); ok {
		return length(in)
	}
	return 1
}

func rangeOf(args []ref.Val) int {
	if n, ok := args[0].(types.Int); ok && n > 0 {
		return int(min(n, tooMuch))
	}
	return 0
}

// joining looks at the strings themselves, of which some may be one.
func joining(args []ref.Val) int {
	out := deep(args[0], 0)
	if len(args) > 1 {
		out += product(length(args[0]), chars(args[1]))
	}
	return out
}

// formatting refuses digits by the thousand: "%.100000f".
func formatting(args []ref.Val) int {
	text, _ := args[0].(types.String)
	digits := 0
	for _, c := range string(text) {
		if digits++; c < '0' || c > '9' {
			digits = 0
		}
		if digits > 3 {
			return tooMuch
		}
	}
	return deep(args[1], 0) + chars(text)
}

// parsing refuses exponents by the hundred: a quantity of 1e2000000000 has two
// billion digits.
func parsing(args []ref.Val) int {
	text, _ := args[0].(types.String)
	if i := strings.LastIndexAny(string(text), "eE"); i >= 0 && len(strings.TrimLeft(string(text)[i+1:], "+-0")) > 2 {
		return tooMuch
	}
	return product(chars(text), chars(text))
}

func replacing(args []ref.Val) int { return product(chars(args[0])+1, chars(args[2])+1) }

// matching takes what each character may cost for a part of a pattern.
func matching(args []ref.Val) int {
	pattern, _ := args[1].(types.String)
	return product(chars(args[0])+1, instructions(string(pattern))) / 2
}

// instructions are the steps of a pattern's program. Repetitions multiply them.
func instructions(pattern string) int {
	if !strings.Contains(pattern, "{") {
		return len(pattern) + 1
	}
	parsed, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return 1
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		return 1
	}
	return len(program.Inst)
}

// chars is a string's length, in values of a list.
func chars(v ref.Val) int {
	switch v := v.(type) {
	case types.String:
		return len(v) / 16
	case types.Bytes:
		return len(v) / 16
	}
	return 1
}

// length is that of a list, a map or a string.
func length(v ref.Val) int {
	switch v := v.(type) {
	case types.String, types.Bytes:
		return chars(v)
	case traits.Sizer:
		if n, ok := v.Size().(types.Int); ok {
			return int(min(n, tooMuch))
		}
	}
	return 1
}

func product(a, b int) int { return min(min(a, tooMuch)*min(b, tooMuch), tooMuch) }

// deep is the length of all that is in a value.
func deep(v ref.Val, depth int) int {
	if depth > deepest {
		return tooMuch
	}
	out := 1
	switch v := v.(type) {
	case traits.Lister:
		for it := v.Iterator(); out < tooMuch && it.HasNext() == types.True; {
			out += deep(it.Next(), depth+1)
		}
	case traits.Mapper:
		for it := v.Iterator(); out < tooMuch && it.HasNext() == types.True; {
			key := it.Next()
			out += chars(key) + deep(v.Get(key), depth+1)
		}
	default:
		out += chars(v)
	}
	return out
}

// careful has programs count the work of such functions.
func careful(env *cel.Env) cel.ProgramOption {
	return cel.CustomDecorator(func(i interpreter.Interpretable) (interpreter.Interpretable, error) {
		call, ok := i.(interpreter.InterpretableCall)
		if !ok {
			return i, nil
		}
		switch call.Function() {
		case operators.Equals:
			return newCarefulPair(call, comparing, types.Equal), nil
		case operators.NotEquals:
			return newCarefulPair(call, comparing, differ), nil
		case operators.In:
			return newCarefulPair(call, looking, contains), nil
		}
		effort, ok := efforts[call.Function()]
		if !ok {
			return i, nil
		}
		does, err := implementation(env, call)
		if err != nil {
			return nil, err
		}
		return &carefulCall{call, call.Args(), effort, does}, nil
	})
}

func differ(a, b ref.Val) ref.Val { return types.Bool(types.Equal(a, b) != types.True) }

func contains(item, in ref.Val) ref.Val {
	if m, ok := in.(*members); ok {
		return m.Contains(item)
	}
	if c, ok := in.(traits.Container); ok {
		return c.Contains(item)
	}
	return types.MaybeNoSuchOverloadErr(in)
}

// carefulPair is carefulCall for two arguments.
type carefulPair struct {
	interpreter.InterpretableCall
	args   []interpreter.Interpretable
	effort func(a, b ref.Val) int
	does   func(a, b ref.Val) ref.Val
	// field is the first argument if it is one that can be read as a text.
	field *quick
}

func newCarefulPair(call interpreter.InterpretableCall, effort func(a, b ref.Val) int, does func(a, b ref.Val) ref.Val) *carefulPair {
	c := &carefulPair{InterpretableCall: call, args: call.Args(), effort: effort, does: does}
	c.field, _ = c.args[0].(*quick)
	return c
}

// quickly compares a field with a text, or looks for it in a set, as the
// function does, but makes no value of the field; nil: it cannot.
func (c *carefulPair) quickly(vars interpreter.Activation, b ref.Val) ref.Val {
	switch b := b.(type) {
	case types.String:
		if text, ok := c.field.text(vars); ok && c.Function() != operators.In {
			return types.Bool((string(text) == string(b)) == (c.Function() == operators.Equals))
		}
	case *members:
		if set, ok := b.Members.(nodeSet); ok && c.Function() == operators.In {
			if text, ok := c.field.text(vars); ok {
				_, in := set.nodes[string(text)]
				return types.Bool(in)
			}
		}
	}
	return nil
}

// Args returns the arguments.
func (c *carefulPair) Args() []interpreter.Interpretable { return c.args }

// Eval calls the function.
func (c *carefulPair) Eval(vars interpreter.Activation) ref.Val {
	b := c.args[1].Eval(vars)
	if c.field != nil {
		if v := c.quickly(vars, b); v != nil {
			return v
		}
	}
	a := c.args[0].Eval(vars)
	switch {
	case types.IsUnknownOrError(a):
		return a
	case types.IsUnknownOrError(b):
		return b
	}
	if failed := begin(vars, c.effort(a, b)); failed != nil {
		return failed
	}
	return types.LabelErrNode(c.ID(), c.does(a, b))
}

// begin counts the work that a call is going to do.
func begin(vars interpreter.Activation, effort int) ref.Val {
	if effort <= 1 {
		return nil
	}
	if w, ok := vars.ResolveName(workVariable); ok {
		return w.(*work).take(effort) //nolint:errcheck // there is no other
	}
	return nil
}

// implementation returns what a call does with its arguments.
func implementation(env *cel.Env, call interpreter.InterpretableCall) (functions.FunctionOp, error) {
	f, ok := env.Functions()[call.Function()]
	if !ok {
		return nil, fmt.Errorf("there is no function %s", call.Function())
	}
	bindings, err := f.Bindings()
	if err != nil {
		return nil, fmt.Errorf("find function %s: %w", call.Function(), err)
	}
	var found *functions.Overload
	for _, b := range bindings {
		if b.Operator == call.OverloadID() || found == nil && b.Operator == call.Function() {
			found = b
		}
	}
	switch {
	case found == nil:
	case found.Function != nil:
		return found.Function, nil
	case found.Binary != nil && len(call.Args()) == 2:
		return func(args ...ref.Val) ref.Val {
			if found.OperandTrait != 0 && !args[0].Type().HasTrait(found.OperandTrait) {
				return types.MaybeNoSuchOverloadErr(args[0])
			}
			return found.Binary(args[0], args[1])
		}, nil
	case found.Unary != nil && len(call.Args()) == 1:
		return func(args ...ref.Val) ref.Val { return found.Unary(args[0]) }, nil
	}
	return nil, fmt.Errorf("function %s is nothing that can be called", call.Function())
}

// carefulCall counts what it is going to do.
type carefulCall struct {
	interpreter.InterpretableCall
	args   []interpreter.Interpretable
	effort effort
	does   functions.FunctionOp
}

// Args returns the arguments.
func (c *carefulCall) Args() []interpreter.Interpretable { return c.args }

// Eval calls the function.
func (c *carefulCall) Eval(vars interpreter.Activation) ref.Val {
	args := make([]ref.Val, len(c.args))
	for i, arg := range c.args {
		if args[i] = arg.Eval(vars); types.IsUnknownOrError(args[i]) {
			return args[i]
		}
	}
	if failed := begin(vars, c.effort(args)); failed != nil {
		return failed
	}
	return types.LabelErrNode(c.ID(), c.does(args...))
}

// A value may hold another twice, and that one a third twice, so that a few of
// them have more in them than any loop could get through. How often a value may
// hold those that it was made of has a bound.

const (
	mostWeight = 4096
	// valueWeight is what a variable counts for, and constWeight a constant.
	valueWeight = 16
	constWeight = 1
)

// scales weigh the values of an expression.
type scales struct {
	ast  *ast.AST
	vars map[string]int // the weights of those that expressions bind
	// heavy is set if one weighs too much.
	heavy bool
}

func tooHeavy(checked *cel.Ast) bool {
	s := scales{ast: checked.NativeRep(), vars: map[string]int{}}
	s.weigh(s.ast.Expr())
	return s.heavy
}

// weigh returns how often a value holds others, at most.
func (s *scales) weigh(e ast.Expr) int {
	out := constWeight
	switch e.Kind() {
	case ast.IdentKind:
		w, ok := s.vars[e.AsIdent()]
		if !ok {
			w = valueWeight
		}
		return w
	case ast.SelectKind:
		out = s.weigh(e.AsSelect().Operand())
	case ast.ListKind:
		for _, item := range e.AsList().Elements() {
			out += s.weigh(item)
		}
	case ast.MapKind:
		for _, entry := range e.AsMap().Entries() {
			out += s.weigh(entry.AsMapEntry().Key()) + s.weigh(entry.AsMapEntry().Value())
		}
	case ast.CallKind:
		c := e.AsCall()
		if c.IsMemberFunction() {
			out += s.weigh(c.Target())
		}
		for i, arg := range c.Args() {
			if w := s.weigh(arg); c.FunctionName() != operators.Conditional {
				out += w
			} else if i > 0 {
				out = max(out, w)
			}
		}
	case ast.ComprehensionKind:
		out = s.loop(e.AsComprehension())
	}
	if out > mostWeight {
		s.heavy = true
		return mostWeight // enough is known
	}
	switch s.ast.GetType(e.ID()).Kind() { //nolint:exhaustive // those that hold no others
	case types.BoolKind, types.IntKind, types.UintKind, types.DoubleKind, types.StringKind, types.BytesKind:
		return constWeight
	}
	return out
}

// loop weighs what one round gathers; how many there are is counted.
func (s *scales) loop(c ast.ComprehensionExpr) int {
	over, start := s.weigh(c.IterRange()), s.weigh(c.AccuInit())
	vars := maps.Clone(s.vars)
	s.vars[c.IterVar()], s.vars[c.IterVar2()], s.vars[c.AccuVar()] = over, over, constWeight
	s.weigh(c.LoopCondition())
	step := s.weigh(c.LoopStep())
	s.vars = maps.Clone(vars)
	s.vars[c.AccuVar()] = max(start, step)
	out := s.weigh(c.Result())
	s.vars = vars
	return out
}
