// Package table answers kubectl get: it turns objects of the replica into the
// meta.k8s.io/v1 Table that kube-apiserver would send, so that kubectl works
// while the cloud is away.
//
// Columns and cells are those of Kubernetes 1.36. A kind without a printer of
// its own gets the API server's default columns.
package table

import (
	"encoding/json"
	"fmt"
	"strconv"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// printer knows the table of one kind.
type printer struct {
	columns []metav1.TableColumnDefinition
	// row returns the cells of an object and, for a few, its conditions.
	row rowFunc
	// emptyNull says that the API server writes no rows as null.
	emptyNull bool
}

type rowFunc func(enc wire.Encoding, object []byte) (cells []any, conditions []metav1.TableRowCondition, err error)

type typeKey struct{ apiVersion, kind string }

var printers = sync.OnceValue(newPrinters)

func printerOf(apiVersion, kind string) *printer {
	if p, ok := printers()[typeKey{apiVersion, kind}]; ok {
		return p
	}
	if wire.Known(apiVersion, kind) {
		return defaultPrinter()
	}
	return customPrinter()
}

// Builder makes one Table. It is not safe for concurrent use.
type Builder struct {
	printer          *printer
	apiVersion, kind string
	header           wire.ListHeader
	headless         bool
	begun            bool // the table's head, and a row at least, have been taken
	rows             []byte
}

// New starts the table of objects of a kind. Of h only the version, the
// continue token and the remaining count matter.
func New(apiVersion, kind string, h wire.ListHeader) *Builder {
	return &Builder{printer: printerOf(apiVersion, kind), apiVersion: apiVersion, kind: kind, header: h}
}

// Add appends the row of an object. An empty include means Metadata. After an
// error the table is as it was.
func (b *Builder) Add(enc wire.Encoding, object []byte, include metav1.IncludeObjectPolicy) error {
	cells, conditions, err := b.printer.row(enc, object)
	if err != nil {
		return fmt.Errorf("print %s: %w", b.kind, err)
	}
	text, err := json.Marshal(cells)
	if err != nil {
		return fmt.Errorf("print %s: %w", b.kind, err)
	}
	embedded, err := b.embedded(enc, object, include)
	if err != nil {
		return fmt.Errorf("print %s: %w", b.kind, err)
	}
	if len(b.rows) > 0 || b.begun {
		b.rows = append(b.rows, ',')
	}
	b.rows = append(b.rows, `{"cells":`...)
	b.rows = append(b.rows, text...)
	if len(conditions) > 0 {
		text, err := json.Marshal(conditions)
		if err != nil {
			return fmt.Errorf("print %s: %w", b.kind, err)
		}
		b.rows = append(b.rows, `,"conditions":`...)
		b.rows = append(b.rows, text...)
	}
	b.rows = append(b.rows, `,"object":`...)
	b.rows = append(b.rows, embedded...)
	b.rows = append(b.rows, '}')
	return nil
}

func (b *Builder) embedded(enc wire.Encoding, object []byte, include metav1.IncludeObjectPolicy) ([]byte, error) {
	switch include {
	case metav1.IncludeNone:
		// The last bookmark of the initial events keeps its annotation.
		if _, end, err := wire.ReadBookmark(enc, object); err != nil || !end {
			return []byte("null"), nil //nolint:nilerr // then it is no bookmark
		}
	case metav1.IncludeObject:
		if enc == wire.JSON {
			return object, nil
		}
		return wire.ToJSON(nil, b.apiVersion, b.kind, object, true)
	case metav1.IncludeMetadata, "":
	default:
		return nil, fmt.Errorf("unknown includeObject %q", include)
	}
	partial, err := wire.PartialMetadataOf(enc, b.apiVersion, b.kind, object)
	if err != nil || enc == wire.JSON {
		return partial, err
	}
	return wire.ToJSON(nil, "meta.k8s.io/v1", "PartialObjectMetadata", partial, true)
}

// Size is about how many bytes AppendRows would append.
func (b *Builder) Size() int { return len(b.rows) }

// AppendRows appends the table as far as it goes, rows taken before excepted,
// so that a long one need not be held as a whole.
func (b *Builder) AppendRows(dst []byte) ([]byte, error) {
	if len(b.rows) == 0 {
		return dst, nil
	}
	if !b.begun {
		var err error
		if dst, err = b.appendHead(dst); err != nil {
			return dst, err
		}
		dst = append(dst, '[')
	}
	b.begun = true
	dst = append(dst, b.rows...)
	b.rows = b.rows[:0]
	return dst, nil
}

// AppendJSON appends the Table as JSON object data, or what AppendRows has
// left of it.
func (b *Builder) AppendJSON(dst []byte) ([]byte, error) {
	dst, err := b.AppendRows(dst)
	switch {
	case err != nil:
		return dst, err
	case b.begun:
		return append(dst, "]}"...), nil
	}
	if dst, err = b.appendHead(dst); err != nil {
		return dst, err
	}
	if b.printer.emptyNull {
		return append(dst, "null}"...), nil
	}
	return append(dst, "[]}"...), nil
}

func (b *Builder) appendHead(dst []byte) ([]byte, error) {
	meta := metav1.ListMeta{Continue: b.header.Continue, RemainingItemCount: b.header.Remaining}
	if b.header.Version != 0 {
		meta.ResourceVersion = strconv.FormatUint(b.header.Version, 10)
	}
	metaText, err := json.Marshal(&meta)
	if err != nil {
		return dst, fmt.Errorf("write table: %w", err)
	}
	columns := b.printer.columns
	if b.headless {
		columns = nil
	}
	columnText, err := json.Marshal(columns)
	if err != nil {
		return dst, fmt.Errorf("write table: %w", err)
	}
	dst = append(dst, `{"kind":"Table","apiVersion":"meta.k8s.io/v1","metadata":`...)
	dst = append(dst, metaText...)
	dst = append(dst, `,"columnDefinitions":`...)
	dst = append(dst, columnText...)
	return append(dst, `,"rows":`...), nil
}

// Object returns, as JSON object data, the Table of one object: the answer to
// a get, or the object of a watch event, bookmarks included. columns is false
// for all events of a watch but the first.
func Object(apiVersion, kind string, enc wire.Encoding, object []byte, include metav1.IncludeObjectPolicy, columns bool) ([]byte, error) {
	return single(New(apiVersion, kind, wire.ListHeader{}), enc, object, include, columns)
}

func single(b *Builder, enc wire.Encoding, object []byte, include metav1.IncludeObjectPolicy, columns bool) ([]byte, error) {
	meta, err := wire.ReadMeta(enc, object, false)
	if err != nil {
		return nil, err
	}
	b.header.Version, b.headless = meta.Version, !columns
	if err := b.Add(enc, object, include); err != nil {
		return nil, err
	}
	return b.AppendJSON(nil)
}

// decode fills a Go object from object data.
func decode(enc wire.Encoding, object []byte, into interface{ Unmarshal([]byte) error }) error {
	if enc == wire.Protobuf {
		return into.Unmarshal(object)
	}
	return utiljson.Unmarshal(object, into)
}

// defaultPrinter is for built-in kinds without a printer.
func defaultPrinter() *printer {
	return &printer{
		columns: []metav1.TableColumnDefinition{
			nameColumn(),
			column("Created At", "date", objectMeta("creationTimestamp")),
		},
		row:       metadataRow(func(created time.Time) any { return created.UTC().Format(time.RFC3339) }),
		emptyNull: true,
	}
}

// customPrinter is for custom resources, as if their definition named no
// columns: the replica need not have it.
func customPrinter() *printer {
	return &printer{
		columns: []metav1.TableColumnDefinition{nameColumn(), column("Age", "date", objectMeta("creationTimestamp"))},
		row: metadataRow(func(created time.Time) any {
			if created.IsZero() {
				return nil
			}
			return since(created)
		}),
	}
}

// metadataRow is a row of the name and what is said of the creation.
func metadataRow(say func(created time.Time) any) rowFunc {
	return func(enc wire.Encoding, object []byte) ([]any, []metav1.TableRowCondition, error) {
		partial, err := wire.PartialMetadata(enc, object)
		if err != nil {
			return nil, nil, err
		}
		var m metav1.PartialObjectMetadata
		if err := decode(enc, partial, &m); err != nil {
			return nil, nil, err
		}
		return []any{m.Name, say(m.CreationTimestamp.Time)}, nil, nil
	}
}

func objectMeta(field string) string { return metav1.ObjectMeta{}.SwaggerDoc()[field] }

func column(name, typ, description string) metav1.TableColumnDefinition {
	return metav1.TableColumnDefinition{Name: name, Type: typ, Description: description}
}

// wide is a column that kubectl shows with -o wide only.
func wide(name, description string) metav1.TableColumnDefinition {
	return metav1.TableColumnDefinition{Name: name, Type: "string", Description: description, Priority: 1}
}

func nameColumn() metav1.TableColumnDefinition {
	return metav1.TableColumnDefinition{Name: "Name", Type: "string", Format: "name", Description: objectMeta("name")}
}

func ageColumn() metav1.TableColumnDefinition {
	return column("Age", "string", objectMeta("creationTimestamp"))
}

// since is how long ago a moment was, in kubectl's words.
func since(t time.Time) string {
	if t.IsZero() {
		return "<unknown>"
	}
	return duration.HumanDuration(time.Since(t))
}

func age(m metav1.ObjectMeta) string { return since(m.CreationTimestamp.Time) }
