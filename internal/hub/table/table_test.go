package table_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/internal/hub/table"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

func configMap(t *testing.T) []byte {
	t.Helper()
	data, err := (&corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "a", ResourceVersion: "7", CreationTimestamp: metav1.NewTime(time.Now().Add(-50 * time.Hour))},
		Data:       map[string]string{"x": "1"},
	}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestOnlyTheFirstEventHasColumns(t *testing.T) {
	for _, columns := range []bool{true, false} {
		text, err := table.Object("v1", "ConfigMap", wire.Protobuf, configMap(t), "", columns)
		if err != nil {
			t.Fatal(err)
		}
		var got metav1.Table
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		if (len(got.ColumnDefinitions) == 3) != columns || strings.Contains(string(text), `"columnDefinitions":null`) == columns {
			t.Errorf("columns %t: got %s", columns, text)
		}
		if got.ResourceVersion != "7" || got.Rows[0].Cells[2] != "2d2h" {
			t.Errorf("got %s", text)
		}
	}
}

func TestLastInitialBookmarkKeepsItsAnnotation(t *testing.T) {
	object := wire.Bookmark(wire.Protobuf, "v1", "ConfigMap", 7, true)
	text, err := table.Object("v1", "ConfigMap", wire.Protobuf, object, metav1.IncludeNone, false)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), `"annotations":{"k8s.io/initial-events-end":"true"}`) {
		t.Errorf("got %s", text)
	}
}

func TestFailedAddLeavesTheTableAsItWas(t *testing.T) {
	b := table.New("v1", "ConfigMap", wire.ListHeader{Version: 7})
	if err := b.Add(wire.Protobuf, configMap(t), "Everything"); err == nil {
		t.Error("unknown include: want an error")
	}
	if err := b.Add(wire.Protobuf, []byte{0xff}, ""); err == nil {
		t.Error("damaged object: want an error")
	}
	text, err := b.AppendJSON(nil)
	if err != nil || !strings.HasSuffix(string(text), `"rows":[]}`) {
		t.Errorf("got %s, %v", text, err)
	}
}

func TestUnknownKindInProtobufShowsNameAndAge(t *testing.T) {
	text, err := table.Object("new.k8s.io/v1", "Thing", wire.Protobuf, configMap(t), "", true)
	if err != nil || !strings.Contains(string(text), `"cells":["a","2d2h"]`) {
		t.Errorf("got %s, %v", text, err)
	}
}
