package filtercli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	sigsjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/yurt-edge/yurt/api/crds"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
)

// fileMost bounds what is read of a file.
const fileMost = 8 << 20

// document is an AccessFilter and where it is from.
type document struct {
	file   string
	filter *v1alpha1.AccessFilter
}

// read reads the AccessFilters of a file, or of the standard input if that is
// called -. What the API server would refuse is an error, and so is a field
// that is not known: it would be left out without a word.
func read(stdin io.Reader, file string) ([]document, error) {
	in := stdin
	if file == "-" {
		file = "standard input"
	} else {
		f, err := os.Open(filepath.Clean(file))
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // it was only read
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, fileMost+1))
	if err != nil {
		return nil, err
	}
	if len(text) > fileMost {
		return nil, fmt.Errorf("%s has more than %d MiB", file, fileMost>>20)
	}
	var out []document
	docs := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	defer docs.Close()
	buffer := make([]byte, len(text)+1)
	for n := 1; ; n++ {
		size, err := docs.Read(buffer)
		if errors.Is(err, io.EOF) {
			break
		}
		var filters []*v1alpha1.AccessFilter
		if err == nil {
			filters, err = parse(buffer[:size])
		}
		if err != nil {
			return nil, fmt.Errorf("document %d of %s: %w", n, file, err)
		}
		for _, f := range filters {
			out = append(out, document{file, f})
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s has no AccessFilter", file)
	}
	return out, nil
}

// parse reads an AccessFilter, or a list of them as kubectl writes it.
func parse(doc []byte) ([]*v1alpha1.AccessFilter, error) {
	object, err := yaml.YAMLToJSONStrict(doc)
	if err != nil {
		return nil, err
	}
	var tree any
	if err := json.Unmarshal(object, &tree); err != nil {
		return nil, err
	}
	if tree == nil {
		return nil, nil // comments
	}
	members, _ := tree.(map[string]any) // what is no object has no kind
	apiVersion, kind := members["apiVersion"], members["kind"]
	if items, ok := members["items"].([]any); ok && (kind == "List" || kind == "AccessFilterList") {
		var out []*v1alpha1.AccessFilter
		for i, item := range items {
			text, err := json.Marshal(item)
			if err != nil {
				return nil, err
			}
			filters, err := parse(text)
			if err != nil {
				return nil, fmt.Errorf("items[%d]: %w", i, err)
			}
			out = append(out, filters...)
		}
		return out, nil
	}
	if kind != "AccessFilter" || apiVersion != v1alpha1.GroupVersion.String() {
		return nil, fmt.Errorf("kind %v of apiVersion %v is given, and AccessFilter of %s is wanted", text(kind), text(apiVersion), v1alpha1.GroupVersion)
	}
	validator, err := definition()
	if err != nil {
		return nil, err
	}
	if list := validation.ValidateCustomResource(nil, tree, validator); len(list) > 0 {
		return nil, list.ToAggregate()
	}
	f := &v1alpha1.AccessFilter{}
	strict, err := sigsjson.UnmarshalStrict(object, f)
	if err == nil {
		err = errors.Join(strict...)
	}
	if err == nil && f.Name == "" {
		err = errors.New("metadata.name: Required value")
	}
	return []*v1alpha1.AccessFilter{f}, err
}

// text is a member for an error.
func text(x any) string {
	if s, ok := x.(string); ok && s != "" {
		return s
	}
	return "(none)"
}

// definition checks objects as the API server does by the type's definition,
// but for its rules in CEL.
var definition = sync.OnceValues(func() (validation.SchemaValidator, error) {
	var crd apiextensionsv1.CustomResourceDefinition
	if err := yaml.Unmarshal(crds.YAML()["network.openyurt.io_accessfilters.yaml"], &crd); err != nil {
		return nil, fmt.Errorf("read the definition of AccessFilters: %w", err)
	}
	var schema apiextensions.JSONSchemaProps
	if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(crd.Spec.Versions[0].Schema.OpenAPIV3Schema, &schema, nil); err != nil {
		return nil, fmt.Errorf("read the definition of AccessFilters: %w", err)
	}
	validator, _, err := validation.NewSchemaValidator(&schema)
	return validator, err
})
