package hub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/yurt-edge/yurt/api/apps/v1beta2"
	"github.com/yurt-edge/yurt/api/network"
	"github.com/yurt-edge/yurt/api/network/v1alpha1"
	"github.com/yurt-edge/yurt/internal/accessfilter"
	"github.com/yurt-edge/yurt/internal/atomicfile"
	"github.com/yurt-edge/yurt/internal/hub/filter"
	"github.com/yurt-edge/yurt/internal/hub/replica"
)

const (
	// accessFiltersFile holds the last good state of each AccessFilter.
	accessFiltersFile = "accessfilters.json"
	// accessFiltersMost bounds the AccessFilters of a node, and accessChainMost
	// those of one component and resource: each may cost some milliseconds per
	// object.
	accessFiltersMost = 64
	accessChainMost   = 16
	// accessErrorMost bounds the bytes of an error in a node's report.
	accessErrorMost = 200
	// accessReportEvery is how often it is looked whether the node's report is
	// true, and accessReportGap the least time between two writes of it.
	accessReportEvery = 5 * time.Second
	accessReportGap   = 15 * time.Second
)

var (
	accessFiltersResource = schema.GroupVersionResource{
		Group: v1alpha1.GroupVersion.Group, Version: v1alpha1.GroupVersion.Version, Resource: "accessfilters",
	}
	// accessFiltersScope comes from where what the pool shares comes from,
	// accessFiltersOwn from the cloud itself: all there are, since that is no
	// name. It is followed only where that is needed, see beyond.
	accessFiltersScope = replica.Scope{Resource: accessFiltersResource}
	accessFiltersOwn   = replica.Scope{Resource: accessFiltersResource, Fields: "metadata.name!=-"}
	sharedAlways       = (&v1beta2.NodePool{}).Shared()
)

// accessFilters are the AccessFilters that the hub knows.
type accessFilters struct {
	// The table's maker alone uses these.
	known map[string]accessFilter
	read  bool // the file was
	asks  bool // accessFiltersOwn is pinned
	waits bool // and not held yet

	failures *prometheus.CounterVec
	// reports are read by whoever tells of them.
	reports atomic.Pointer[[]accessReport]
}

// accessFilter is one AccessFilter.
type accessFilter struct {
	uid        types.UID
	generation int64  // the newest
	version    string // its resource version
	own        bool   // the cloud itself said it
	problem    string // why that does not compile; empty: it does
	// good is what compiled last, from which program was made; nil: nothing.
	good    *v1alpha1.AccessFilter
	program *filter.Program
}

// accessReport is what becomes of a filter that selects the node.
type accessReport struct {
	name    string
	report  v1alpha1.AccessFilterReport
	program *filter.Program // nil: none is applied
}

func newAccessFailures(reg prometheus.Registerer) *prometheus.CounterVec {
	out := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "node_yurthub_access_filter_failures_total",
		Help: "Objects that an AccessFilter could not be applied to, and that were shown without it, by filter.",
	}, []string{"filter"})
	reg.MustRegister(out)
	return out
}

// readAccessFilters reads which AccessFilters are applied on the node.
func (h *Hub) readAccessFilters(s *filter.State) error {
	a := &h.filters.access
	var errs []error
	if !a.read {
		a.known = map[string]accessFilter{}
		if err := h.loadAccessFilters(); err != nil {
			errs = append(errs, err)
		}
		a.read = true
	}
	if _, ok := h.replica.Held(accessFiltersScope); ok {
		if err := h.compileAccessFilters(); err != nil {
			errs = append(errs, err)
		}
	}
	for _, f := range a.known {
		s.Saw(f.version)
	}
	if programs := a.choose(s.Place); !slices.Equal(programs, s.Programs) {
		s.Programs = programs
	}
	return errors.Join(errs...)
}

// errUnproved is why a filter that only a peer has told of is not applied.
var errUnproved = errors.New("the cloud itself has not said it yet, and of what the pool does not share other hubs are not believed")

// heard is an AccessFilter that the hub has heard of.
type heard struct {
	*v1alpha1.AccessFilter

	own bool  // the cloud itself said it
	err error // why it cannot be taken
}

// beyond reports whether a filter is about more than what every pool shares.
// A leader can tell its followers what it likes of that, and shall by way of
// filters not get at more: at the ConfigMaps that a kubelet gives to its pods,
// for example. So those filters count when the cloud itself says them.
func beyond(af *v1alpha1.AccessFilter) bool {
	return slices.ContainsFunc(af.Spec.Resources, func(r v1alpha1.AccessFilterResource) bool {
		return !slices.ContainsFunc(sharedAlways, func(s metav1.GroupVersionResource) bool { return s.Group == r.Group && s.Resource == r.Resource })
	})
}

func anyBeyond(all map[string]heard) bool {
	for _, af := range all {
		if beyond(af.AccessFilter) {
			return true
		}
	}
	return false
}

// hearAccessFilters returns the AccessFilters by name, of each the word that
// counts.
func (h *Hub) hearAccessFilters() (map[string]heard, error) {
	a := &h.filters.access
	out, _, err := h.listAccessFilters(accessFiltersScope)
	if err != nil {
		return nil, err
	}
	ask := anyBeyond(out)
	if !ask && !a.asks {
		return out, nil
	}
	if !a.asks {
		if err := h.replica.Pin(accessFiltersOwn); err != nil {
			return nil, err
		}
		a.asks = true
	}
	own, held, err := h.listAccessFilters(accessFiltersOwn)
	if err != nil {
		return nil, err
	}
	if a.waits = !held; held && !ask && !anyBeyond(own) {
		h.replica.Unpin(accessFiltersOwn)
		a.asks = false
	}
	for name, af := range out {
		said, ok := own[name]
		switch {
		case !beyond(af.AccessFilter):
		case ok:
			out[name] = said
		default:
			af.err = errUnproved
			out[name] = af
		}
	}
	for name, af := range own {
		if beyond(af.AccessFilter) {
			out[name] = af
		}
	}
	return out, nil
}

// listAccessFilters reads those of one scope by name, and whether it is held.
func (h *Hub) listAccessFilters(scope replica.Scope) (map[string]heard, bool, error) {
	out := map[string]heard{}
	held, err := h.replica.EachOf(scope, func(_ string, _ replica.Kind, data []byte) error {
		af := heard{AccessFilter: &v1alpha1.AccessFilter{}, own: scope == accessFiltersOwn}
		if err := json.Unmarshal(data, af.AccessFilter); err != nil {
			// Only its name is known, if that; what it was before stays.
			var named struct {
				metav1.ObjectMeta `json:"metadata"`
			}
			if err := json.Unmarshal(data, &named); err != nil {
				return fmt.Errorf("read AccessFilter: %w", err)
			}
			af.AccessFilter, af.err = &v1alpha1.AccessFilter{ObjectMeta: named.ObjectMeta}, fmt.Errorf("read AccessFilter: %w", err)
		}
		out[af.Name] = af
		return nil
	})
	return out, held, err
}

// compileAccessFilters compiles what has changed. Of a filter that does not
// compile the last that did stays.
func (h *Hub) compileAccessFilters() error {
	a := &h.filters.access
	found, err := h.hearAccessFilters()
	if err != nil {
		return err
	}
	changed := false
	for name := range a.known {
		if _, ok := found[name]; !ok {
			delete(a.known, name)
			a.failures.DeleteLabelValues(name)
			changed = true
		}
	}
	for name, af := range found {
		old, ok := a.known[name]
		same := ok && old.uid == af.UID
		if same && old.generation == af.Generation && old.own == af.own {
			continue
		}
		next := accessFilter{uid: af.UID, generation: af.Generation, version: af.ResourceVersion, own: af.own}
		var compiled *accessfilter.Filter
		if err = af.err; err == nil {
			compiled, err = accessfilter.Compile(af.AccessFilter)
		}
		if err != nil {
			next.problem = err.Error()
			if same {
				next.good, next.program = old.good, old.program
			}
			h.log.Warn("AccessFilter is not applied; its last good state stays", "filter", name, "generation", af.Generation, "err", err)
		} else {
			next.good, next.program = af.AccessFilter, a.program(compiled)
			changed = true
		}
		a.known[name] = next
	}
	if changed {
		return h.saveAccessFilters()
	}
	return nil
}

func (a *accessFilters) program(compiled *accessfilter.Filter) *filter.Program {
	return &filter.Program{Filter: compiled, OnFailure: a.failures.WithLabelValues(compiled.Name).Inc}
}

// choose returns the programs for a place, in order, and notes what becomes of
// each filter. Where the node stands must be known: a filter may be for others.
func (a *accessFilters) choose(place *filter.Place) []*filter.Program {
	if place == nil {
		return nil
	}
	var chosen []*accessfilter.Filter
	programs := map[*accessfilter.Filter]*filter.Program{}
	var reports []accessReport
	for name, f := range a.known {
		if f.program == nil {
			reports = append(reports, accessReport{name, v1alpha1.AccessFilterReport{Generation: f.generation, Error: brief(f.problem)}, nil})
			continue
		}
		if f.program.Selects(place.Pool, place.Labels) {
			chosen = append(chosen, f.program.Filter)
			programs[f.program.Filter] = f.program
		}
	}
	accessfilter.Order(chosen)
	var out []*filter.Program
	chains := map[accessUse]int{}
	for _, c := range chosen {
		f := a.known[c.Name]
		r := accessReport{c.Name, v1alpha1.AccessFilterReport{Generation: f.generation, Error: brief(f.problem)}, nil}
		if problem := fits(c, len(out), chains); problem != "" {
			r.report.Error = problem
		} else {
			r.report.Applied, r.program = c.Generation, programs[c]
			out = append(out, programs[c])
		}
		reports = append(reports, r)
	}
	slices.SortFunc(reports, func(x, y accessReport) int { return strings.Compare(x.name, y.name) })
	a.reports.Store(&reports)
	return out
}

type accessUse struct {
	component string
	resource  schema.GroupVersionResource
}

// fits counts a filter in, or says why there is no room for it.
func fits(f *accessfilter.Filter, before int, chains map[accessUse]int) string {
	if before >= accessFiltersMost {
		return fmt.Sprintf("the node has %d filters before this one, and takes no more", accessFiltersMost)
	}
	components, resources := f.Uses()
	for _, c := range components {
		for _, r := range resources {
			if chains[accessUse{c, r}] >= accessChainMost {
				return fmt.Sprintf("%s has %d filters for %s before this one, and takes no more", c, accessChainMost, r.Resource)
			}
		}
	}
	for _, c := range components {
		for _, r := range resources {
			chains[accessUse{c, r}]++
		}
	}
	return ""
}

// brief bounds an error in a report.
func brief(text string) string {
	if len(text) <= accessErrorMost {
		return text
	}
	return string([]rune(text[:accessErrorMost-4])) + "..."
}

// loadAccessFilters reads the last good states.
func (h *Hub) loadAccessFilters() error {
	a := &h.filters.access
	path := filepath.Join(h.cfg.RootDir, accessFiltersFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the last good AccessFilters: %w", err)
	}
	var list []*v1alpha1.AccessFilter
	if err := json.Unmarshal(text, &list); err != nil {
		return fmt.Errorf("read the last good AccessFilters in %s: %w; the file is written anew when a filter changes", path, err)
	}
	for _, af := range list {
		compiled, err := accessfilter.Compile(af)
		if err != nil {
			h.log.Warn("AccessFilter compiled once and does no more", "filter", af.Name, "err", err)
			continue
		}
		a.known[af.Name] = accessFilter{af.UID, af.Generation, af.ResourceVersion, beyond(af), "", af, a.program(compiled)}
	}
	return nil
}

// saveAccessFilters writes the last good states.
func (h *Hub) saveAccessFilters() error {
	list := []*v1alpha1.AccessFilter{}
	for _, f := range h.filters.access.known {
		if f.good != nil {
			list = append(list, &v1alpha1.AccessFilter{
				ObjectMeta: metav1.ObjectMeta{
					Name: f.good.Name, UID: f.good.UID, Generation: f.good.Generation, ResourceVersion: f.good.ResourceVersion,
				},
				Spec: f.good.Spec,
			})
		}
	}
	slices.SortFunc(list, func(x, y *v1alpha1.AccessFilter) int { return strings.Compare(x.Name, y.Name) })
	text, err := json.Marshal(list)
	if err == nil {
		err = atomicfile.WriteFile(filepath.Join(h.cfg.RootDir, accessFiltersFile), text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("keep the last good AccessFilters: %w", err)
	}
	return nil
}

// accessReports are what the node tells of its AccessFilters, as JSON has it;
// known is false until they were looked at.
func (h *Hub) accessReports() (text string, known bool) {
	reports := h.filters.access.reports.Load()
	if reports == nil {
		return "", false
	}
	out := map[string]v1alpha1.AccessFilterReport{}
	for _, r := range (*reports)[:min(len(*reports), accessFiltersMost)] {
		if r.program != nil && r.report.Error == "" {
			r.report.Error = brief(r.program.Failure())
		}
		out[r.name] = r.report
	}
	data, err := json.Marshal(out)
	if err != nil {
		return "", false // of such a type it always can
	}
	return string(data), true
}

// reportAccessFilters keeps the node's report true while there is a link.
func (h *Hub) reportAccessFilters(ctx context.Context) error {
	tick := time.NewTicker(accessReportEvery)
	defer tick.Stop()
	var next time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		want, known := h.accessReports()
		node, err := h.ownNode()
		if !known || err != nil || node == nil || !h.link.Online() || time.Now().Before(next) {
			continue
		}
		have, told := node.Annotations[network.AccessFiltersAnnotation]
		if have == want || !told && want == "{}" {
			continue
		}
		next = time.Now().Add(accessReportGap)
		if err := h.tellAccessFilters(ctx, want); err != nil {
			h.log.Warn("the node's report on its AccessFilters is not written", "err", err)
		}
	}
}

func (h *Hub) tellAccessFilters(ctx context.Context, report string) error {
	var value any = report
	if report == "{}" {
		value = nil // away with it
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"annotations": map[string]any{network.AccessFiltersAnnotation: value},
	}})
	if err != nil {
		return fmt.Errorf("write the node's report: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, accessReportGap)
	defer cancel()
	return h.sendOwn(ctx, http.MethodPatch, "/api/v1/nodes/"+url.PathEscape(h.cfg.NodeName), string(types.MergePatchType), patch)
}
