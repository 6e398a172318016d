// Package grafanatest checks a dashboard against what Grafana takes and against
// the metrics that there are.
package grafanatest

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// dashboard is what Grafana needs of one, as of schema 41.
type dashboard struct {
	UID, Title    string
	SchemaVersion int
	Panels        []panel
	Templating    struct {
		List []struct {
			Name, Type string
			Definition string
			Datasource *datasource
		}
	}
}

type datasource struct{ Type, UID string }

type panel struct {
	ID          int
	Type, Title string
	Datasource  datasource
	GridPos     struct{ H, W, X, Y int }
	Targets     []struct {
		RefID      string
		Expr       string
		Datasource datasource
	}
}

func read(t *testing.T, file string) dashboard {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// Check fails for what Grafana takes amiss: places, numbers, kinds of panels,
// data sources and variables.
func Check(t *testing.T, file string) {
	t.Helper()
	d := read(t, file)
	if d.UID == "" || len(d.UID) > 40 || d.Title == "" || d.SchemaVersion < 36 {
		t.Errorf("uid %q, title %q, schema %d", d.UID, d.Title, d.SchemaVersion)
	}
	variables := map[string]bool{"__rate_interval": true}
	for _, v := range d.Templating.List {
		variables[v.Name] = true
	}
	if v := d.Templating.List[0]; v.Name != "datasource" || v.Type != "datasource" {
		t.Errorf("the first variable is %+v: all data come from it", v)
	}
	ids, cells := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if p.ID == 0 || ids[p.ID] {
			t.Errorf("panel %q has the number %d", p.Title, p.ID)
		}
		ids[p.ID] = true
		p.place(t, cells)
		if p.Type == "row" {
			continue
		}
		if p.Type != "timeseries" || p.Title == "" || p.Datasource != ours || len(p.Targets) == 0 {
			t.Errorf("panel %q: type %s, from %+v, %d targets", p.Title, p.Type, p.Datasource, len(p.Targets))
		}
		p.queries(t, variables)
	}
}

// ours is where all data come from.
var ours = datasource{"prometheus", "${datasource}"}

// place enters the panel in the cells that it covers.
func (p *panel) place(t *testing.T, cells map[[2]int]string) {
	t.Helper()
	g := p.GridPos
	if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
		t.Errorf("panel %q is at %+v", p.Title, g)
	}
	for x := g.X; x < g.X+g.W; x++ {
		for y := g.Y; y < g.Y+g.H; y++ {
			if other, taken := cells[[2]int{x, y}]; taken {
				t.Fatalf("panel %q covers %q", p.Title, other)
			}
			cells[[2]int{x, y}] = p.Title
		}
	}
}

var variable = regexp.MustCompile(`\$\{?(\w+)`)

func (p *panel) queries(t *testing.T, variables map[string]bool) {
	t.Helper()
	refs := map[string]bool{}
	for _, q := range p.Targets {
		if q.RefID == "" || refs[q.RefID] || q.Datasource != ours {
			t.Errorf("panel %q: target %q from %+v", p.Title, q.RefID, q.Datasource)
		}
		refs[q.RefID] = true
		if strings.Count(q.Expr, "(") != strings.Count(q.Expr, ")") {
			t.Errorf("panel %q: %s", p.Title, q.Expr)
		}
		for _, m := range variable.FindAllStringSubmatch(q.Expr, -1) {
			if !variables[m[1]] {
				t.Errorf("panel %q: variable %s is not there", p.Title, m[1])
			}
		}
	}
}

// words are those of PromQL, and labels, that the dashboard uses.
var words = []string{
	"sum", "max", "by", "on", "group_left", "rate", "increase", "histogram_quantile", "label_values",
	"pool", "job", "instance", "kind", "upstream", "to", "le", "name", "controller", "h",
}

// Metrics returns the names of the metrics that a dashboard asks for, each with
// one of the expressions that do.
func Metrics(t *testing.T, file string) map[string]string {
	t.Helper()
	d := read(t, file)
	var exprs []string
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			exprs = append(exprs, q.Expr)
		}
	}
	for _, v := range d.Templating.List {
		exprs = append(exprs, v.Definition)
	}
	selector := regexp.MustCompile(`([a-z_:]+)\{[^}]*\}`)
	used := map[string]string{}
	for _, e := range exprs {
		for _, m := range selector.FindAllStringSubmatch(e, -1) {
			used[strings.TrimSuffix(m[1], "_bucket")] = e
		}
		rest := regexp.MustCompile(`\$\w+`).ReplaceAllString(selector.ReplaceAllString(e, ""), "")
		for _, word := range regexp.MustCompile(`[a-z_]+`).FindAllString(rest, -1) {
			if !slices.Contains(words, word) {
				t.Errorf("%q is no word of PromQL that is known here, nor a metric with a selector: %s", word, e)
			}
		}
	}
	return used
}

// Names returns the names of all metrics of a collector.
func Names(t *testing.T, c prometheus.Collector) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	all := make(chan *prometheus.Desc)
	go func() {
		defer close(all)
		c.Describe(all)
	}()
	for d := range all {
		_, rest, ok := strings.Cut(d.String(), `fqName: "`)
		name, _, _ := strings.Cut(rest, `"`)
		if !ok || name == "" {
			t.Fatalf("what is the name of %s?", d)
		}
		out[name] = true
	}
	return out
}
