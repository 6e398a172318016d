package accessfilter

import (
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/interpreter"
)

// macro is a loop over the elements of something, each of which is asked the
// same: one of exists, all and filter.
type macro struct {
	over, asks int64 // ids of expressions
	variable   string
	// until ends exists and all: an answer that decides.
	until types.Bool
	// gathers is set for filter.
	gathers bool
}

// macroOf recognises one. What is asked has no loops of its own: an error has a
// loop run once more, and loops in loops would be run more often than that.
func macroOf(e ast.Expr) (macro, bool) {
	c := e.AsComprehension()
	step := c.LoopStep()
	if c.HasIterVar2() || step.Kind() != ast.CallKind {
		return macro{}, false
	}
	m := macro{over: c.IterRange().ID(), variable: c.IterVar()}
	var asks ast.Expr
	args := step.AsCall().Args()
	result := isVariable(c.Result(), c.AccuVar())
	switch start := c.AccuInit(); step.AsCall().FunctionName() {
	case operators.LogicalAnd, operators.LogicalOr:
		m.until = types.Bool(step.AsCall().FunctionName() == operators.LogicalOr)
		if !result || len(args) != 2 || !isVariable(args[0], c.AccuVar()) || start.Kind() != ast.LiteralKind || start.AsLiteral() != !m.until {
			return macro{}, false
		}
		asks = args[1]
	case operators.Conditional:
		m.gathers = true
		if !result || !isVariable(args[2], c.AccuVar()) || start.Kind() != ast.ListKind || start.AsList().Size() != 0 || !addsElement(args[1], c) {
			return macro{}, false
		}
		asks = args[0]
	default:
		return macro{}, false
	}
	m.asks = asks.ID()
	inner := false
	ast.PostOrderVisit(asks, ast.NewExprVisitor(func(e ast.Expr) { inner = inner || e.Kind() == ast.ComprehensionKind }))
	return m, !inner
}

// addsElement reports whether an expression adds the loop's element to what it
// gathers.
func addsElement(e ast.Expr, c ast.ComprehensionExpr) bool {
	if e.Kind() != ast.CallKind || e.AsCall().FunctionName() != operators.Add {
		return false
	}
	args := e.AsCall().Args()
	return isVariable(args[0], c.AccuVar()) && args[1].Kind() == ast.ListKind && args[1].AsList().Size() == 1 &&
		isVariable(args[1].AsList().Elements()[0], c.IterVar())
}

// loop runs a macro over a list of the object. Whatever is not as simple as
// that is left to the loop that CEL has planned.
type loop struct {
	interpreter.Interpretable
	macro
	over, asks interpreter.Interpretable
}

// Eval runs it.
func (l *loop) Eval(vars interpreter.Activation) ref.Val {
	over, ok := l.over.Eval(vars).(*list)
	if !ok {
		return l.Interpretable.Eval(vars)
	}
	round := scope{vars, l.variable, nil}
	var gathered []ref.Val
	for _, item := range over.items {
		round.value = item
		switch answer, ok := l.asks.Eval(&round).(types.Bool); {
		case !ok: // an error, which another element may make up for
			return l.Interpretable.Eval(vars)
		case l.gathers && bool(answer):
			gathered = append(gathered, item)
		case !l.gathers && answer == l.until:
			return answer
		}
	}
	if l.gathers {
		return types.NewRefValList(adapter{}, gathered)
	}
	return !l.until
}

// scope is where a loop's variable has a value.
type scope struct {
	interpreter.Activation
	name  string
	value ref.Val
}

// ResolveName returns the value of a variable.
func (s *scope) ResolveName(name string) (any, bool) {
	if name == s.name {
		return s.value, true
	}
	return s.Activation.ResolveName(name)
}

// Parent returns the scope around.
func (s *scope) Parent() interpreter.Activation { return s.Activation }
