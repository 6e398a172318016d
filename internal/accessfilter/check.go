package accessfilter

import (
	"fmt"
	"strconv"

	"github.com/google/cel-go/cel"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiservercel "k8s.io/apiserver/pkg/cel"
	"k8s.io/apiserver/pkg/cel/common"
	"k8s.io/apiserver/pkg/cel/environment"
	"k8s.io/apiserver/pkg/cel/openapi"
	"k8s.io/kube-openapi/pkg/validation/spec"

	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// Schemas returns the OpenAPI schema of a resource, with its references
// resolved; nil if it is not known, and the resource is not checked.
type Schemas func(schema.GroupVersionResource) (*spec.Schema, error)

// Check compiles a filter for each of its resources, whose fields have the
// types that the cluster says. The error is of type [Problems], or that of
// schemas.
func Check(af *v1alpha1.AccessFilter, schemas Schemas) error {
	// What is wrong for any resource is said once.
	run, err := newEnvironments(environment.NewExpressions)
	if err != nil {
		return err
	}
	c := compiler{env: run.counted, uncounted: run.uncounted}
	if c.filter(af); len(c.problems) > 0 {
		return c.problems
	}
	var out Problems
	for _, r := range af.Spec.Resources {
		gvr := schema.GroupVersionResource{Group: r.Group, Version: r.Version, Resource: r.Resource}
		s, err := schemas(gvr)
		if err != nil {
			return fmt.Errorf("find the schema of %s: %w", gvr, err)
		}
		if s == nil {
			continue
		}
		problems, err := checkFor(af, s)
		if err != nil {
			return fmt.Errorf("check for %s: %w", gvr, err)
		}
		for _, p := range problems {
			p.Resource = gvr.GroupResource().String() + " " + gvr.Version
			out = append(out, p)
		}
	}
	return out.err()
}

func checkFor(af *v1alpha1.AccessFilter, s *spec.Schema) (Problems, error) {
	object := common.SchemaDeclType(asJSON{&openapi.Schema{Schema: s}}, true)
	if object == nil {
		return nil, nil
	}
	object = object.MaybeAssignTypeName("object.of")
	env, err := newEnvironment(object, environment.NewExpressions)
	if err != nil {
		return nil, err
	}
	c := compiler{env: env, value: func(text string, p pointer) (*cel.Type, int, error) { return find(object, text, p) }}
	c.filter(af)
	return c.problems, nil
}

// find returns the type of what a path leads to in an object, or where it
// leads nowhere.
func find(t *apiservercel.DeclType, text string, p pointer) (*cel.Type, int, error) {
	for i, part := range p {
		at := place(text, i)
		switch {
		case t.IsObject():
			name, ok := apiservercel.Escape(part)
			f, found := t.Fields[name]
			if !ok || !found {
				return nil, at, fmt.Errorf("there is no field %q", part)
			}
			t = f.Type
		case t.IsMap():
			t = t.ElemType
		case t.IsList():
			if _, err := strconv.ParseUint(part, 10, 31); err != nil {
				return nil, at, fmt.Errorf("%q is no index of a list", part)
			}
			t = t.ElemType
		case t.CelType().IsExactType(cel.DynType):
			return nil, 0, nil
		default:
			return nil, at, fmt.Errorf("a %s has no field %q", t.CelType(), part)
		}
	}
	// What is built in an expression is a map, and a number of JSON any number.
	if got := t.CelType(); got.IsExactType(cel.StringType) || got.IsExactType(cel.BoolType) || got.IsExactType(cel.IntType) {
		return got, 0, nil
	}
	return nil, 0, nil
}

// asJSON is a schema of objects as filters see them, which is as JSON has
// them: dates and bytes are strings. What has no type, or fields that are not
// told, may be anything.
type asJSON struct{ *openapi.Schema }

func (s asJSON) IsXIntOrString() bool {
	kind := s.Type()
	return s.Schema.IsXIntOrString() || kind == "" ||
		kind == "object" && s.Schema.Schema.AdditionalProperties == nil && len(s.Schema.Schema.Properties) == 0 ||
		kind == "object" && s.IsXPreserveUnknownFields() || kind == "array" && s.Schema.Schema.Items == nil
}

func (asJSON) Format() string { return "" }

func (s asJSON) Items() common.Schema { return wrap(s.Schema.Items()) }

func (s asJSON) Properties() map[string]common.Schema {
	out := s.Schema.Properties()
	for name, p := range out {
		out[name] = wrap(p)
	}
	return out
}

func (s asJSON) AdditionalProperties() common.SchemaOrBool {
	if p := s.Schema.AdditionalProperties(); p != nil {
		return schemaOrBool{p}
	}
	return nil
}

func (s asJSON) WithTypeAndObjectMeta() common.Schema { return wrap(s.Schema.WithTypeAndObjectMeta()) }

type schemaOrBool struct{ common.SchemaOrBool }

func (s schemaOrBool) Schema() common.Schema { return wrap(s.SchemaOrBool.Schema()) }

func wrap(s common.Schema) common.Schema {
	if o, ok := s.(*openapi.Schema); ok && o != nil {
		return asJSON{o}
	}
	return nil
}
