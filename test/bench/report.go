package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
)

// Row is one figure of the report. A nil figure does not apply. Direct is
// without what is measured, the hub or the sharing in a pool, and Hub with it.
type Row struct {
	Section string   `json:"section"`
	What    string   `json:"what"`
	Unit    string   `json:"unit"`
	Direct  *float64 `json:"direct,omitempty"`
	Hub     *float64 `json:"hub,omitempty"`
	Ratio   *float64 `json:"ratio,omitempty"`
	Bar     string   `json:"bar,omitempty"`
	OK      *bool    `json:"ok,omitempty"`
	Note    string   `json:"note,omitempty"`
}

// bar is what a figure must reach. The zero bar asks for nothing.
type bar struct {
	most  bool // the figure may not be larger; else not smaller
	limit float64
	ratio bool // of the ratio; else of the hub's figure
}

func atLeast(ratio float64) bar     { return bar{limit: ratio, ratio: true} }
func atMost(figure float64) bar     { return bar{most: true, limit: figure} }
func ratioAtMost(ratio float64) bar { return bar{most: true, limit: ratio, ratio: true} }

func (b bar) judge(r *Row) {
	if b == (bar{}) {
		return
	}
	sign, figure := "≥ ", r.Hub
	if b.most {
		sign = "≤ "
	}
	r.Bar = sign + strconv.FormatFloat(b.limit, 'g', -1, 64)
	if b.ratio {
		r.Bar, figure = r.Bar+" ×", r.Ratio
	}
	if figure != nil {
		ok := *figure >= b.limit
		if b.most {
			ok = *figure <= b.limit
		}
		r.OK = &ok
	}
}

// report collects rows in the order in which they are measured.
type report struct {
	rows    []Row
	section string
	columns [2]string // of Direct and Hub
	log     io.Writer
}

func (r *report) add(row Row, b bar) {
	row.Section = r.section
	b.judge(&row)
	r.rows = append(r.rows, row)
	line := []any{row.Section + ": " + row.What + ":"}
	for i, f := range []*float64{row.Direct, row.Hub, row.Ratio} {
		if f != nil {
			line = append(line, []string{r.columns[0], r.columns[1], "ratio"}[i], number(f))
		}
	}
	fmt.Fprintln(r.log, append(line, row.Unit, row.Note)...)
}

// pair adds a figure that both ways have.
func (r *report) pair(what, unit string, rounds rounds, b bar, note string) {
	direct, hub, ratio := rounds.medians()
	if spread := rounds.spread(); note == "" && len(rounds) > 1 {
		note = fmt.Sprintf("ratios %.2f to %.2f in %d rounds", spread[0], spread[1], len(rounds))
	}
	r.add(Row{What: what, Unit: unit, Direct: &direct, Hub: &hub, Ratio: &ratio, Note: note}, b)
}

// hub adds a figure that only the hub has.
func (r *report) hub(what, unit string, figure float64, b bar, note string) {
	r.add(Row{What: what, Unit: unit, Hub: &figure, Note: note}, b)
}

// merge adds the rows of another report, such as the demo's.
func (r *report) merge(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("merge figures: %w", err)
	}
	var more []Row
	if err := json.Unmarshal(text, &more); err != nil {
		return fmt.Errorf("merge figures of %s: %w", file, err)
	}
	r.rows = append(r.rows, more...)
	return nil
}

func (r *report) writeJSON(file string) error {
	text, err := json.MarshalIndent(r.rows, "", "  ")
	if err != nil {
		return fmt.Errorf("write figures: %w", err)
	}
	if err := os.WriteFile(file, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("write figures: %w", err)
	}
	return nil
}

// print writes the table in Markdown, which is also readable as it stands.
func (r *report) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	fmt.Fprintf(t, "| what\t| unit\t| %s\t| %s\t| ratio\t| bar\t|\t| note\t|\n", r.columns[0], r.columns[1])
	fmt.Fprintln(t, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, row := range r.rows {
		verdict := ""
		if row.OK != nil {
			verdict = map[bool]string{true: "ok", false: "MISS"}[*row.OK]
		}
		fmt.Fprintf(t, "| %s: %s\t| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t|\n", row.Section, row.What, row.Unit,
			number(row.Direct), number(row.Hub), number(row.Ratio), row.Bar, verdict, row.Note)
	}
	return t.Flush()
}

// number prints three significant digits, and integers in full.
func number(f *float64) string {
	switch {
	case f == nil:
		return ""
	case *f >= 100 || *f <= -100:
		return strconv.FormatFloat(*f, 'f', 0, 64)
	}
	return strconv.FormatFloat(*f, 'g', 3, 64)
}

// rounds are figures of the direct way and through the hub, round by round.
type rounds [][2]float64

func (r rounds) ratios() []float64 {
	out := make([]float64, len(r))
	for i, round := range r {
		out[i] = round[1] / round[0]
	}
	return out
}

func (r rounds) medians() (direct, hub, ratio float64) {
	var sides [2][]float64
	for _, round := range r {
		sides[0], sides[1] = append(sides[0], round[0]), append(sides[1], round[1])
	}
	return median(sides[0]), median(sides[1]), median(r.ratios())
}

func (r rounds) spread() [2]float64 {
	ratios := r.ratios()
	if len(ratios) == 0 {
		return [2]float64{}
	}
	return [2]float64{slices.Min(ratios), slices.Max(ratios)}
}

func median(of []float64) float64 { return quantile(of, 0.5) }

// quantile sorts its argument.
func quantile(of []float64, q float64) float64 {
	if len(of) == 0 {
		return 0
	}
	slices.Sort(of)
	return of[int(q*float64(len(of)-1)+0.5)]
}
