package accessfilter

import (
	"fmt"
	"sync"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/decls"
	"k8s.io/apimachinery/pkg/util/version"
	apiservercel "k8s.io/apiserver/pkg/cel"
	"k8s.io/apiserver/pkg/cel/environment"
)

// The variables of an expression.
const (
	objectVariable    = "object"
	nodeVariable      = "node"
	poolVariable      = "pool"
	componentVariable = "component"
)

// language is the version of Kubernetes whose CEL new filters are written in:
// that of the oldest API server that we support, whose policies have the same.
// Filters that are stored may use what newer ones have.
var language = version.MajorMinor(1, 35)

// scene are the types of the variables that tell where an object is seen.
var scene = map[string]*apiservercel.DeclType{
	nodeVariable: structType("yurt.Node", map[string]*apiservercel.DeclType{
		"name":   apiservercel.StringType,
		"labels": apiservercel.NewMapType(apiservercel.StringType, apiservercel.StringType, -1),
	}),
	poolVariable: structType("yurt.Pool", map[string]*apiservercel.DeclType{
		"name":  apiservercel.StringType,
		"nodes": apiservercel.NewMapType(apiservercel.StringType, apiservercel.BoolType, -1),
	}),
	componentVariable: apiservercel.StringType,
}

func structType(name string, types map[string]*apiservercel.DeclType) *apiservercel.DeclType {
	fields := map[string]*apiservercel.DeclField{}
	for field, t := range types {
		fields[field] = apiservercel.NewDeclField(field, t, true, nil, nil)
	}
	return apiservercel.NewObjectType(name, fields)
}

// environments are those in which filters run. Fields of an object are
// found when they are asked for.
type environments struct{ counted, uncounted *cel.Env }

var anyObject = sync.OnceValues(func() (environments, error) { return newEnvironments(environment.StoredExpressions) })

func newEnvironments(t environment.Type) (environments, error) {
	counted, err := newEnvironment(apiservercel.DynType, t)
	if err != nil {
		return environments{}, err
	}
	free, err := uncounted(counted)
	return environments{counted, free}, err
}

// uncounted returns an environment that runs what another compiled, without
// counting what it costs. Programs of the API server's environments count, and
// cannot be told not to.
func uncounted(env *cel.Env) (*cel.Env, error) {
	// Optional values are a part of the language that comes with an evaluation
	// of its own.
	bare, err := cel.NewCustomEnv(cel.OptionalTypes())
	if err != nil {
		return nil, fmt.Errorf("make an environment without costs: %w", err)
	}
	var more []*decls.FunctionDecl
	for name, f := range env.Functions() {
		if bare.Functions()[name] == nil {
			more = append(more, f)
		}
	}
	out, err := cel.NewCustomEnv(
		cel.OptionalTypes(), cel.FunctionDecls(more...), cel.CustomTypeAdapter(adapter{}), cel.CustomTypeProvider(env.CELTypeProvider()),
	)
	if err != nil {
		return nil, fmt.Errorf("make an environment without costs: %w", err)
	}
	return out, nil
}

// newEnvironment returns the API server's environment with our variables.
func newEnvironment(object *apiservercel.DeclType, t environment.Type) (*cel.Env, error) {
	options := environment.VersionedOptions{
		IntroducedVersion: version.MajorMinor(1, 0),
		ProgramOptions:    []cel.ProgramOption{cel.CostLimit(mostCost)},
	}
	declare := func(name string, t *apiservercel.DeclType) {
		options.EnvOptions = append(options.EnvOptions, cel.Variable(name, t.CelType()))
		if t.IsObject() || t.IsMap() || t.IsList() {
			options.DeclTypes = append(options.DeclTypes, t)
		}
	}
	declare(objectVariable, object)
	for name, t := range scene {
		declare(name, t)
	}
	set, err := environment.MustBaseEnvSet(language).Extend(options)
	if err != nil {
		return nil, fmt.Errorf("make the environment of expressions: %w", err)
	}
	env, err := set.Env(t)
	if err != nil {
		return nil, fmt.Errorf("make the environment of expressions: %w", err)
	}
	return env, nil
}
