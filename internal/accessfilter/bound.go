package accessfilter

import (
	"math/bits"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/types"
)

// What an expression costs is known while it runs, if CEL counts it, which is
// most of what it costs then. Many expressions need no counting: what they read
// says how much they can cost at most. This file computes that, as an upper
// bound of what CEL's counter would say, for the expressions that filters are
// mostly made of. All others are counted.

// endless is the cost, or the size, of what has no bound here.
const endless = 1 << 40

func add(a, b uint64) uint64 { return min(a+b, endless) }

func times(a, b uint64) uint64 {
	if high, low := bits.Mul64(a, b); high == 0 {
		return min(low, endless)
	}
	return endless
}

// bound is of an expression's value. size is that of the longest list, map or
// string in it, itself included.
type bound struct{ cost, size uint64 }

// bounds finds them, while lists, maps and strings of the object are no longer
// than longest.
type bounds struct {
	ast     *ast.AST
	longest uint64
	vars    map[string]uint64 // the sizes of those that expressions bind
}

// costOf returns the most that an expression may cost.
func costOf(checked *cel.Ast, longest uint64) uint64 {
	b := bounds{checked.NativeRep(), longest, map[string]uint64{}}
	return b.of(b.ast.Expr()).cost
}

// aName bounds the names of nodes, pools and components, and a node's labels.
const aName = 256

func (b *bounds) of(e ast.Expr) bound {
	switch e.Kind() {
	case ast.LiteralKind:
		switch v := e.AsLiteral().(type) {
		case types.String:
			return bound{0, uint64(len(v))}
		case types.Bytes:
			return bound{0, uint64(len(v))}
		}
		return bound{0, 1}
	case ast.IdentKind:
		return bound{1, b.variable(e.AsIdent())}
	case ast.SelectKind:
		return b.part(e, b.of(e.AsSelect().Operand()))
	case ast.ListKind:
		out := bound{10, uint64(len(e.AsList().Elements()))}
		for _, item := range e.AsList().Elements() {
			out = out.with(b.of(item))
		}
		return out
	case ast.CallKind:
		return b.call(e)
	case ast.ComprehensionKind:
		return b.loop(e)
	}
	return bound{endless, endless}
}

// with is what both cost, and the larger of the sizes.
func (x bound) with(y bound) bound { return bound{add(x.cost, y.cost), max(x.size, y.size)} }

func (b *bounds) variable(name string) uint64 {
	if size, ok := b.vars[name]; ok {
		return size
	}
	if name == objectVariable {
		return b.longest
	}
	if name == componentVariable {
		return aName
	}
	return endless // a pool may have any number of nodes
}

// part is a member or an element of something. The strings of a scene are names.
func (b *bounds) part(e ast.Expr, of bound) bound {
	if of.size == endless && b.ast.GetType(e.ID()).Kind() == types.StringKind {
		of.size = aName
	}
	return bound{add(of.cost, 1), of.size}
}

// call knows the functions that need no counting. Traversing a string costs a
// tenth of its length.
func (b *bounds) call(e ast.Expr) bound {
	c := e.AsCall()
	args := c.Args()
	if c.IsMemberFunction() {
		args = append([]ast.Expr{c.Target()}, args...)
	}
	var all bound
	of := make([]bound, len(args))
	for i, arg := range args {
		of[i] = b.of(arg)
		all = all.with(of[i])
	}
	tenth := func(n uint64) uint64 { return n/10 + 1 }
	switch c.FunctionName() {
	case operators.Index, operators.OptIndex, operators.OptSelect:
		return b.part(e, all)
	case operators.LogicalAnd, operators.LogicalOr, operators.LogicalNot, operators.Conditional, operators.NotStrictlyFalse,
		"hasValue", "value", "or", "orValue", "dyn", "size":
		return bound{add(all.cost, 1), all.size}
	case operators.Equals, operators.NotEquals, operators.Less, operators.LessEquals, operators.Greater, operators.GreaterEquals:
		return bound{add(all.cost, tenth(min(of[0].size, of[1].size))), 1}
	case operators.In:
		if b.ast.GetType(args[1].ID()).Kind() == types.MapKind {
			return bound{add(all.cost, 1), 1}
		}
		return bound{add(all.cost, add(of[1].size, 1)), 1}
	case "startsWith", "endsWith":
		return bound{add(all.cost, tenth(of[0].size)), 1}
	case "contains":
		return bound{add(all.cost, times(tenth(of[0].size), tenth(of[1].size))), 1}
	}
	return bound{endless, endless}
}

// loop is one of the macros exists, exists_one, all, filter and map: what it
// gathers is a bool, a number, or a list that grows by one element each time.
func (b *bounds) loop(e ast.Expr) bound {
	c := e.AsComprehension()
	over := b.of(c.IterRange())
	if c.HasIterVar2() || over.size == endless {
		return bound{endless, endless}
	}
	start, step := b.of(c.AccuInit()), c.LoopStep()
	scoped := func(name string, size uint64) func() {
		old, ok := b.vars[name]
		b.vars[name] = size
		return func() {
			if b.vars[name] = old; !ok {
				delete(b.vars, name)
			}
		}
	}
	defer scoped(c.IterVar(), over.size)()
	var gathered, each bound // each is what a round costs
	switch {
	case c.AccuInit().Kind() == ast.LiteralKind:
		defer scoped(c.AccuVar(), 1)()
		if kind := c.AccuInit().AsLiteral().Type(); kind != types.BoolType && kind != types.IntType {
			return bound{endless, endless}
		}
		gathered.size = 1
		if n, ok := counting(step, c.AccuVar()); ok {
			each = b.of(n)
			each.cost = add(each.cost, 3)
		} else {
			each = b.of(step)
		}
	case c.AccuInit().Kind() == ast.ListKind && c.AccuInit().AsList().Size() == 0:
		defer scoped(c.AccuVar(), over.size)()
		more := step
		if step.Kind() == ast.CallKind && step.AsCall().FunctionName() == operators.Conditional {
			args := step.AsCall().Args()
			each, more = b.of(args[0]), args[1]
			if !isVariable(args[2], c.AccuVar()) {
				return bound{endless, endless}
			}
		}
		if more.Kind() != ast.CallKind || more.AsCall().FunctionName() != operators.Add || !isVariable(more.AsCall().Args()[0], c.AccuVar()) {
			return bound{endless, endless}
		}
		item := more.AsCall().Args()[1]
		if item.Kind() != ast.ListKind || item.AsList().Size() != 1 {
			return bound{endless, endless}
		}
		added := b.of(item)
		each = bound{add(each.cost, add(added.cost, 4)), 1}
		gathered.size = max(over.size, added.size)
	default:
		return bound{endless, endless}
	}
	each = each.with(b.of(c.LoopCondition()))
	gathered.cost = add(add(over.cost, start.cost), times(over.size, add(each.cost, 1)))
	b.vars[c.AccuVar()] = gathered.size
	return bound{add(gathered.cost, b.of(c.Result()).cost), gathered.size}
}

func isVariable(e ast.Expr, name string) bool {
	return e.Kind() == ast.IdentKind && e.AsIdent() == name
}

// counting returns on what it depends whether a step counts one more.
func counting(step ast.Expr, variable string) (ast.Expr, bool) {
	if step.Kind() != ast.CallKind || step.AsCall().FunctionName() != operators.Conditional {
		return nil, false
	}
	args := step.AsCall().Args()
	one := args[1]
	return args[0], isVariable(args[2], variable) && one.Kind() == ast.CallKind && one.AsCall().FunctionName() == operators.Add &&
		isVariable(one.AsCall().Args()[0], variable) && one.AsCall().Args()[1].Kind() == ast.LiteralKind
}
