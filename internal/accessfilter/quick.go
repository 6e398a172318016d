package accessfilter

import (
	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"github.com/google/cel-go/interpreter"
)

// quickly has programs of an expression read a.b.c, and has(a.b.c), by the
// names, and run loops over lists, where that is all there is to it: most of
// what expressions do is that.
func quickly(checked *cel.Ast) cel.ProgramOption {
	p := quickPlan{map[int64]bool{}, map[int64]macro{}, map[int64]interpreter.Interpretable{}}
	ast.PostOrderVisit(checked.NativeRep().Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		switch e.Kind() { //nolint:exhaustive // the others are planned as they are
		case ast.SelectKind:
			p.tests[e.ID()] = e.AsSelect().IsTestOnly()
		case ast.ComprehensionKind:
			if m, ok := macroOf(e); ok {
				p.macros[e.ID()] = m
			}
		}
	}))
	return cel.CustomDecorator(p.decorate)
}

// quickPlan is of one program. Its parts are planned before what they are in.
type quickPlan struct {
	tests  map[int64]bool  // members that are asked with has, by id
	macros map[int64]macro // by id
	parts  map[int64]interpreter.Interpretable
}

func (p *quickPlan) decorate(i interpreter.Interpretable) (interpreter.Interpretable, error) {
	attribute, ok := i.(interpreter.InterpretableAttribute)
	if !ok {
		m, ok := p.macros[i.ID()]
		over, asks := p.parts[m.over], p.parts[m.asks]
		if ok && over != nil && asks != nil {
			i = &loop{i, m, over, asks}
		}
		p.parts[i.ID()] = i
		return i, nil
	}
	if _, ok := i.(*quick); ok {
		return i, nil
	}
	if at, ok := attribute.Attr().(interpreter.NamespacedAttribute); !ok || len(at.CandidateVariableNames()) != 1 {
		return i, nil
	}
	q := &quick{InterpretableAttribute: attribute, plan: p}
	q.note()
	return q, nil
}

// quick is a variable and members of it.
type quick struct {
	interpreter.InterpretableAttribute
	plan     *quickPlan
	variable string // empty: it is not that simple
	names    []string
	has      bool // whether the last is there
}

func (q *quick) note() {
	q.variable, q.names, q.has = "", nil, false
	id := q.ID()
	at, ok := q.Attr().(interpreter.NamespacedAttribute)
	if !ok {
		return
	}
	var names []string
	has := false
	for _, part := range at.Qualifiers() {
		constant, ok := part.(interpreter.ConstantQualifier)
		if !ok || part.IsOptional() || has {
			return
		}
		name, ok := constant.Value().(types.String)
		if !ok {
			return
		}
		has = q.plan.tests[part.ID()]
		names = append(names, string(name))
		id = part.ID()
	}
	q.plan.parts[id] = q
	q.variable, q.names, q.has = at.CandidateVariableNames()[0], names, has
}

// AddQualifier adds a member.
func (q *quick) AddQualifier(part interpreter.Qualifier) (interpreter.Attribute, error) {
	out, err := q.InterpretableAttribute.AddQualifier(part)
	q.note()
	return out, err //nolint:wrapcheck // it is the planner's own
}

// Eval reads it.
func (q *quick) Eval(vars interpreter.Activation) ref.Val {
	if q.variable != "" {
		if v := q.read(vars); v != nil && !types.IsUnknownOrError(v) {
			return v
		}
	}
	return q.InterpretableAttribute.Eval(vars) // which knows what to say
}

func (q *quick) read(vars interpreter.Activation) ref.Val {
	names := q.names
	if q.has {
		names = names[:len(names)-1]
	}
	v := q.follow(vars, names)
	if m, ok := v.(*members); ok && q.has {
		v = m.member(q.names[len(names)])
		if v == nil || !types.IsUnknownOrError(v) {
			return types.Bool(v != nil)
		}
		return nil
	}
	if q.has {
		return nil
	}
	return v
}

// follow reads what some names lead to; nil: nothing.
func (q *quick) follow(vars interpreter.Activation, names []string) ref.Val {
	found, ok := vars.ResolveName(q.variable)
	if !ok {
		return nil
	}
	v, ok := found.(ref.Val)
	if !ok {
		return nil
	}
	for _, name := range names {
		m, ok := v.(*members)
		if !ok {
			return nil
		}
		if v = m.member(name); v == nil {
			return nil
		}
	}
	return v
}

// text reads a string without making a value of it; false: it is not that simple.
func (q *quick) text(vars interpreter.Activation) ([]byte, bool) {
	last := len(q.names) - 1
	if q.variable == "" || q.has || last < 0 {
		return nil, false
	}
	if m, ok := q.follow(vars, q.names[:last]).(*members); ok {
		return m.text(q.names[last])
	}
	return nil, false
}
