package request

import (
	"mime"
	"net/http"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/hub/wire"
)

// View is the shape in which a client wants objects.
type View uint8

// The views of the API: whole objects, their metadata, or a table's rows. The
// metadata of a list is another view than that of an object: the API serves
// neither in place of the other.
const (
	Whole View = iota
	Metadata
	MetadataList
	Table
)

// Format is one acceptable form of an answer.
type Format struct {
	View     View
	Encoding wire.Encoding
	// Any is true when the client takes any encoding (a wildcard, or no
	// Accept header); Encoding is then JSON.
	Any bool
}

// Formats reads the Accept header: the forms that this hub can produce, the
// most wanted first. It is empty when the client accepts none of them, CBOR
// only for instance.
func Formats(h http.Header) []Format {
	values := h.Values("Accept")
	if h.Get("Accept") == "" {
		return []Format{{Encoding: wire.JSON, Any: true}}
	}
	type weighted struct {
		Format
		q float64
	}
	var found []weighted
	for _, value := range values {
		for clause := range strings.SplitSeq(value, ",") {
			f, q, ok := parseClause(clause)
			if !ok {
				continue
			}
			// Stable insertion by weight: equal weights keep their order.
			i := len(found)
			for i > 0 && found[i-1].q < q {
				i--
			}
			found = append(found, weighted{})
			copy(found[i+1:], found[i:])
			found[i] = weighted{f, q}
		}
	}
	out := make([]Format, len(found))
	for i, f := range found {
		out[i] = f.Format
	}
	return out
}

func parseClause(clause string) (Format, float64, bool) {
	media, params, err := mime.ParseMediaType(strings.TrimSpace(clause))
	if err != nil {
		return Format{}, 0, false
	}
	var f Format
	switch media {
	case "application/json":
		f.Encoding = wire.JSON
	case "application/vnd.kubernetes.protobuf":
		f.Encoding = wire.Protobuf
	case "*/*", "application/*":
		f.Encoding, f.Any = wire.JSON, true
	default:
		return Format{}, 0, false
	}
	q := 1.0
	if v, ok := params["q"]; ok {
		if q, err = strconv.ParseFloat(v, 64); err != nil || q <= 0 {
			return Format{}, 0, false
		}
	}
	as, ok := params["as"]
	if !ok {
		return f, q, true
	}
	if params["g"] != metav1.GroupName || params["v"] != "v1" {
		return Format{}, 0, false
	}
	switch as {
	case "Table":
		if f.Encoding == wire.Protobuf {
			return Format{}, 0, false // tables have no protobuf form
		}
		f.View = Table
	case "PartialObjectMetadata":
		f.View = Metadata
	case "PartialObjectMetadataList":
		f.View = MetadataList
	default:
		return Format{}, 0, false
	}
	return f, q, true
}
