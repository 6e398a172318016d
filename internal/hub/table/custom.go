package table

import (
	"bytes"
	"fmt"
	"reflect"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/client-go/util/jsonpath"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// customColumn is one column of a custom resource.
type customColumn struct {
	path *jsonpath.JSONPath
	typ  string
}

// customPrinter prints custom resources; without columns their name and age.
func customPrinter(columns []apiextensionsv1.CustomResourceColumnDefinition) *printer {
	if len(columns) == 0 {
		columns = []apiextensionsv1.CustomResourceColumnDefinition{{
			Name: "Age", Type: "date", JSONPath: ".metadata.creationTimestamp",
			Description: objectMeta("creationTimestamp"),
		}}
	}
	p := &printer{columns: []metav1.TableColumnDefinition{nameColumn()}}
	var paths []customColumn
	for _, c := range columns {
		path := jsonpath.New(c.Name).AllowMissingKeys(true)
		if err := path.Parse("{" + c.JSONPath + "}"); err != nil {
			break
		}
		description := c.Description
		if description == "" {
			description = fmt.Sprintf("Custom resource definition column (in JSONPath format): %s", c.JSONPath)
		}
		paths = append(paths, customColumn{path: path, typ: c.Type})
		p.columns = append(p.columns, metav1.TableColumnDefinition{
			Name: c.Name, Type: c.Type, Format: c.Format, Description: description, Priority: c.Priority,
		})
	}
	p.row = func(enc wire.Encoding, object []byte) ([]any, []metav1.TableRowCondition, error) {
		content, err := contentOf(enc, object)
		if err != nil {
			return nil, nil, err
		}
		cells := []any{(&unstructured.Unstructured{Object: content}).GetName()}
		for _, c := range paths {
			cells = append(cells, c.cell(content))
		}
		return cells, nil, nil
	}
	return p
}

// contentOf decodes an object. Of an object in Protobuf, one of an aggregated
// API or newer than this build, only the metadata can be known.
func contentOf(enc wire.Encoding, object []byte) (content map[string]any, err error) {
	if enc == wire.Protobuf {
		if object, err = wire.PartialMetadata(enc, object); err != nil {
			return nil, err
		}
		if object, err = wire.ToJSON(nil, "meta.k8s.io/v1", "PartialObjectMetadata", object, true); err != nil {
			return nil, err
		}
	}
	err = utiljson.Unmarshal(object, &content)
	return content, err
}

// cell is nil where the object has no value of the column's type.
func (c customColumn) cell(content map[string]any) any {
	results, err := c.path.FindResults(content)
	if err != nil || len(results) == 0 || len(results[0]) == 0 {
		return nil
	}
	value := results[0][0].Interface()
	switch c.typ {
	case "string":
		var text bytes.Buffer
		if err := c.path.PrintResults(&text, []reflect.Value{reflect.ValueOf(value)}); err != nil {
			return nil
		}
		return text.String()
	case "integer":
		switch v := value.(type) {
		case int64:
			return v
		case float64:
			return int64(v)
		}
	case "number":
		switch v := value.(type) {
		case int64:
			return float64(v)
		case float64:
			return v
		}
	case "boolean":
		if v, ok := value.(bool); ok {
			return v
		}
	case "date":
		if v, ok := value.(string); ok {
			var at metav1.Time
			if err := at.UnmarshalQueryParameter(v); err != nil {
				return "<invalid>"
			}
			return since(at.Time)
		}
	}
	return nil
}
