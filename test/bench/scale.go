package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/yurt-edge/yurt/test/bed"
)

// scale is the size of what is measured with -scale.
type scale struct {
	pools, hubs, slices, changes int
	objects, uplink              int
	leases                       int
	side                         string
	quiet                        time.Duration // how long a fleet at rest is looked at
	settle                       time.Duration // how long hubs may take to find their leaders
	spread                       time.Duration // within which the hubs behind that uplink start
}

// defaultScale is what design.md asks for.
var defaultScale = scale{
	pools: 50, hubs: 20, slices: 20, changes: 20, objects: 1000, uplink: 50, leases: 10000, quiet: 15 * time.Second, settle: time.Minute,
	spread: 20 * time.Second,
}

func (s *scale) flags(fs *flag.FlagSet) {
	fs.IntVar(&s.pools, "pools", s.pools, "with -scale: pools of the fleet")
	fs.IntVar(&s.hubs, "hubs", s.hubs, "with -scale: hubs in each pool, at most 250")
	fs.IntVar(&s.slices, "slices", s.slices, "with -scale: EndpointSlices in the cluster, of 12 KB")
	fs.IntVar(&s.changes, "changes", s.changes, "with -scale: changes of one EndpointSlice that are measured")
	fs.IntVar(&s.objects, "objects", s.objects, "with -scale: Services, and EndpointSlices, for the bytes on one pool's uplink")
	fs.IntVar(&s.uplink, "machines", s.uplink, "with -scale: machines behind that uplink, beside one")
	fs.StringVar(&s.side, "sharing", "", "with -scale: on or off, to measure one of them (default both)")
	fs.IntVar(&s.leases, "leases", s.leases, "with -scale: nodes, in pools of 20, of which one in a pool has a link")
}

// scaleSections have budgets, so that one that fails leaves the others their
// time.
func scaleSections() []section {
	return []section{
		{"fleet", 11 * time.Minute, (*bench).fleet},
		{"uplink", 3 * time.Minute, (*bench).sharedUplink},
		{"leases", 8 * time.Minute, (*bench).vouched},
	}
}

const (
	sharedSpace = "shared"
	// changeEvery leaves the machine, on which the whole fleet runs, time to
	// come to rest between two changes.
	changeEvery = 500 * time.Millisecond
	// changesBudget is how long single changes are measured: what takes the
	// whole fleet long is measured less often, at least three times.
	changesBudget = 40 * time.Second
	changesLeast  = 3
)

// haveBudget is how long hubs may take to have what they are to have, which is
// for this machine's processors to send and to take.
func haveBudget(hubs int) time.Duration {
	return time.Minute + time.Duration(hubs)*120*time.Millisecond
}

// fleet measures many hubs in many pools, with sharing and then as many others
// without it, which costs more. What one side, or one part of it, cannot show
// here is told, and the rest is measured.
func (b *bench) fleet(ctx context.Context) error {
	if err := b.slices(ctx, sharedSpace, b.scale.slices); err != nil {
		return err
	}
	if err := b.startPools(ctx); err != nil {
		return err
	}
	w, err := b.newWriter(sharedSpace, endpoints, b.scale.slices, 1000)
	if err != nil {
		return err
	}
	var sides [2]outcome
	var failed []error
	for _, i := range []int{1, 0} {
		if b.scale.side != "" && b.scale.side != []string{"off", "on"}[i] {
			continue
		}
		if sides[i], err = b.side(ctx, w, i == 1); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", b.columns[i], err))
			continue
		}
		fmt.Fprintf(b.log, "%s is measured\n", b.columns[i])
	}
	b.compare(sides)
	return errors.Join(failed...)
}

// side measures a fleet of one kind, and takes it away.
func (b *bench) side(ctx context.Context, w *writer, shared bool) (o outcome, err error) {
	others, err := b.apiServer(ctx)
	if err != nil {
		return o, err
	}
	begin := time.Now()
	f, err := b.startFleet(ctx, b.scale.pools, b.scale.hubs, b.scale.slices, shared, 0)
	if err != nil {
		return o, err
	}
	defer f.close(ctx)
	o.start, o.workers, o.had[started] = time.Since(begin).Seconds(), len(f.workers), true
	if shared {
		if err := f.settle(ctx, others.shared+float64(b.scale.pools)*streamsPerLeader); err != nil {
			return o, err
		}
	}
	took := func(p part, err error) error {
		o.had[p] = err == nil
		return err
	}
	err = errors.Join(
		took(atWork, f.profile(ctx, "changes", 10*time.Second, func() error { return f.spread(ctx, w, others, &o) })),
		took(returned, f.profile(ctx, "return", b.cut+10*time.Second, func() error { return f.reconnect(ctx, w, &o) })),
		took(held, f.costs(&o)),
	)
	return o, err
}

// streamsPerLeader are a hub's watches of what pools share: EndpointSlices, all
// Services, and those that a kubelet asks for.
const streamsPerLeader = 3

// settle waits until the API server has as few watches of what pools share as
// it should. A hub that started before its leader takes the cloud, and moves
// within a minute; who has not moved by then counts.
func (f *fleet) settle(ctx context.Context, most float64) error {
	end := time.Now().Add(f.bench.scale.settle)
	return until(ctx, f.bench.scale.settle+time.Minute, time.Second, func() (bool, error) {
		a, err := f.bench.apiServer(ctx)
		return a.shared <= most || time.Now().After(end), err
	})
}

// startPools starts the manager, unless it runs, and gives nodes the
// right to read what they share also where no pool shares anything: then a
// node has it for its kube-proxy.
func (b *bench) startPools(ctx context.Context, flags ...string) error {
	if b.manager != nil {
		return nil
	}
	err := b.cloud.Apply(ctx, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: scale}
rules:
- {apiGroups: [""], resources: [services], verbs: [get, list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: scale}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: scale}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:nodes"}
`)
	if err != nil {
		return err
	}
	b.manager, err = b.startManager(ctx, flags...)
	return err
}

// part is a part of what is measured of a fleet. One may fail alone.
type part int

const (
	started part = iota
	atWork
	met // what the API server meets when they return
	returned
	held
	parts
)

// outcome is what one way of doing it came to.
type outcome struct {
	had [parts]bool

	start   float64 // s until all have started
	workers int

	streams, shared float64 // watches at the API server: all, and of what a pool shares
	idle            float64 // requests a second at rest
	idleKinds       string  // what is asked for most then
	changes         int     // measured
	bytes           float64 // over all uplinks, per change
	server, hubs    float64 // ms of processors per change: of the API server, of all hubs with their watchers
	p50, p99, last  float64 // ms until a hub has a change

	current  float64 // s until all are current after the cut
	requests float64 // begun in the busiest second, while they come back
	kinds    string  // what was asked for most then
	refused  float64 // in all
	peak     float64 // processors that the API server takes in its busiest second
	catchUp  float64 // MB over all uplinks
	broken   float64

	manager, hub, heap float64 // MB: of the manager; of a hub, and what of it is no file's
}

// spread measures single changes, beside the same time without any. Others is
// what the API server did before there was a fleet.
func (f *fleet) spread(ctx context.Context, w *writer, others state, o *outcome) error {
	if err := f.calm(ctx); err != nil {
		return err
	}
	rest, err := f.during(ctx, func() error { return pause(ctx, f.bench.scale.quiet) })
	if err != nil {
		return err
	}
	o.idle, o.idleKinds = rest.requests/rest.took.Seconds(), rest.kinds
	first := w.next
	var sent []int64
	work, err := f.during(ctx, func() error {
		begin := time.Now()
		for len(sent) < f.bench.scale.changes && (len(sent) < changesLeast || time.Since(begin) < changesBudget) {
			at := time.Now().UnixNano()
			n, _, err := w.write(ctx, 1, 0)
			if err != nil {
				return err
			}
			if err := f.have(ctx, haveBudget(len(f.members)), n, n); err != nil {
				return fmt.Errorf("change %d: %w", len(sent)+1, err)
			}
			sent = append(sent, at)
			if err := pause(ctx, changeEvery); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	a, err := f.bench.apiServer(ctx)
	if err != nil {
		return err
	}
	n, ratio := float64(len(sent)), work.took.Seconds()/rest.took.Seconds()
	o.streams, o.shared, o.changes = a.streams-others.streams, a.shared-others.shared, len(sent)
	o.bytes = (work.bytes - rest.bytes*ratio) / n
	o.server = (work.server.Seconds() - rest.server.Seconds()*ratio) * 1000 / n
	o.hubs = (work.hubs.Seconds() - rest.hubs.Seconds()*ratio) * 1000 / n
	var all, last []float64
	for i, at := range sent {
		var took []float64
		for _, had := range f.times(first + i) {
			took = append(took, ms(had-at))
		}
		all, last = append(all, took...), append(last, slices.Max(took))
	}
	o.p50, o.p99, o.last = quantile(all, 0.5), quantile(all, 0.99), median(last)
	return nil
}

// calm waits until hubs have done what they do after a start or a change of
// their pool: some of it comes a second after the rest.
func (f *fleet) calm(ctx context.Context) error {
	last, looks := f.bytes(), 0
	return until(ctx, time.Minute, min(2*time.Second, f.bench.scale.quiet), func() (bool, error) {
		now := f.bytes()
		looks++
		if now-last > float64(len(f.members))*2000 {
			looks = 0
		}
		last = now
		return looks == 3, nil
	})
}

// reconnect cuts every uplink, changes every slice meanwhile, and looks at the
// API server until all hubs have caught up.
func (f *fleet) reconnect(ctx context.Context, w *writer, o *outcome) error {
	broken, before := f.broken(), f.bytes()
	if err := f.cut(bed.Down); err != nil {
		return err
	}
	end := time.Now().Add(f.bench.cut)
	n := min(f.bench.scale.slices, f.bench.scale.changes)
	first, _, err := w.write(ctx, n, 0)
	if err == nil {
		err = pause(ctx, time.Until(end))
	}
	if err != nil {
		return errors.Join(err, f.cut(bed.Whole))
	}
	at, err := f.bench.apiServer(ctx)
	if err != nil {
		return err
	}
	begin, refused := time.Now(), at.refused
	if err := f.cut(bed.Whole); err != nil {
		return err
	}
	all := make(chan error, 1)
	go func() { // ends within its budget
		all <- f.have(ctx, haveBudget(len(f.members)), first, first+n-1)
		close(all)
	}()
	// It goes on for a while after all are current: not all is asked for at once.
	for rest := time.Duration(-1); rest < 0 || time.Since(begin) < rest; {
		select {
		case err, open := <-all:
			if err != nil {
				o.had[met] = o.requests > 0
				return fmt.Errorf("after the cut: %w", err)
			}
			if open {
				rest = time.Since(begin) + f.bench.scale.quiet*2/3
			}
		default:
		}
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
		now, err := f.bench.apiServer(ctx)
		if err != nil {
			return err
		}
		took := now.at.Sub(at.at).Seconds()
		if begun := now.begunSince(at) / took; begun > o.requests {
			o.requests, o.kinds = begun, now.mostSince(at)
		}
		o.peak, o.refused = max(o.peak, (now.cpu-at.cpu).Seconds()/took), now.refused-refused
		at = now
	}
	o.had[met] = true
	o.catchUp = (f.bytes() - before) / 1e6
	o.broken = float64(f.broken() - broken)
	// When the last came, not when it was noticed.
	var last int64
	for i := range n {
		last = max(last, slices.Max(f.times(first+i)))
	}
	o.current = time.Unix(0, last).Sub(begin).Seconds()
	return nil
}

// compare adds the rows of both ways.
func (b *bench) compare(of [2]outcome) {
	pair := func(in part, what, unit string, figure func(outcome) float64, most bar, note string) {
		row := Row{What: what, Unit: unit, Note: note}
		for i, o := range of {
			if !o.had[in] {
				row.Note += "; not had here with " + b.columns[i]
				continue
			}
			n := figure(o)
			*[]**float64{&row.Direct, &row.Hub}[i] = &n
		}
		if row.Direct != nil && row.Hub != nil && *row.Direct != 0 {
			ratio := *row.Hub / *row.Direct
			row.Ratio = &ratio
		}
		b.add(row, most)
	}
	hubs := fmt.Sprintf("%d hubs", b.scale.pools*b.scale.hubs)
	all := fmt.Sprintf("all hubs and their watchers share %d processors with the API server, which comes first", goruntime.NumCPU())
	perPool := ratioAtMost(math.Round(1200/float64(b.scale.hubs)) / 1000)
	pair(started, "until all have started, with nothing on disk", "s", func(o outcome) float64 { return o.start }, bar{},
		fmt.Sprintf("%s in %d pools: whole hubs with a watcher each, in %d processes on this machine, %d starting at a time; nodes have no kubelet",
			hubs, b.scale.pools, max(of[0].workers, of[1].workers), readyAtOnce*max(of[0].workers, of[1].workers)))
	pair(atWork, "watches at the API server", "", func(o outcome) float64 { return o.streams }, bar{}, hubs)
	pair(atWork, "watches at the API server of what pools share", "", func(o outcome) float64 { return o.shared }, perPool,
		"the bar is a fifth more than one hub in each pool")
	pair(atWork, "bytes from the cloud per change of a 12 KB slice", "KB", func(o outcome) float64 { return o.bytes / 1e3 }, perPool,
		"whole fleet, over all uplinks, TLS and all")
	pair(atWork, "processor time of the API server per change", "ms", func(o outcome) float64 { return o.server }, bar{}, "less what it takes at rest")
	pair(atWork, "processor time of all hubs and watchers per change", "ms", func(o outcome) float64 { return o.hubs }, bar{}, "less what they take at rest")
	pair(atWork, "change to a hub's watcher, p50", "ms", func(o outcome) float64 { return o.p50 }, bar{}, all)
	pair(atWork, "change to a hub's watcher, p99", "ms", func(o outcome) float64 { return o.p99 }, bar{}, all)
	pair(atWork, "change to the last hub's watcher", "ms", func(o outcome) float64 { return o.last }, bar{},
		fmt.Sprintf("median of %d and %d changes, one at a time", of[0].changes, of[1].changes))
	pair(atWork, "requests at rest", "1/s", func(o outcome) float64 { return o.idle }, bar{}, fmt.Sprintf("no kubelets: theirs come on top; in %s off: %s; on: %s", b.scale.quiet, of[0].idleKinds, of[1].idleKinds))
	cut := fmt.Sprintf("all uplinks cut for %s, every slice changed: ", b.cut)
	pair(returned, cut+"return to all hubs current", "s", func(o outcome) float64 { return o.current }, bar{}, all)
	pair(met, cut+"requests in the busiest second", "1/s", func(o outcome) float64 { return o.requests }, ratioAtMost(1.2),
		"begun at the API server, watches too; off: "+of[0].kinds+"; on: "+of[1].kinds)
	pair(met, cut+"requests that the API server refused", "", func(o outcome) float64 { return o.refused }, atMost(0), "429: too many")
	pair(met, cut+"processors in the busiest second", "", func(o outcome) float64 { return o.peak }, bar{}, "of the API server")
	pair(returned, cut+"bytes from the cloud", "MB", func(o outcome) float64 { return o.catchUp }, bar{}, "whole fleet, over all uplinks")
	pair(returned, cut+"streams of local watchers that ended", "", func(o outcome) float64 { return o.broken }, atMost(0), "of "+hubs)
	pair(held, "resident memory of yurt-manager", "MB", func(o outcome) float64 { return o.manager }, atMost(250),
		fmt.Sprintf("%d pools, %d nodes", b.scale.pools, b.scale.pools*b.scale.hubs))
	pair(held, "resident memory of a hub, in a process of many", "MB", func(o outcome) float64 { return o.hub }, bar{}, "its watcher's too")
	pair(held, "anonymous memory of a hub, in a process of many", "MB", func(o outcome) float64 { return o.heap }, bar{}, "the same without files")
	_, lives := b.manager.now()
	b.hub("yurt-manager ended and was started again", "", float64(lives-1), bar{}, "times, on both sides: it ends when it cannot renew its lease")
}

// costs adds what the fleet takes of this machine, and the manager.
func (f *fleet) costs(o *outcome) error {
	p, err := f.bench.manager.cost()
	if err != nil {
		return err
	}
	resident, anonymous, err := f.memory()
	n := float64(len(f.members))
	o.manager, o.hub, o.heap = p.resident, resident/n, anonymous/n
	return err
}

// state is what the API server tells of itself.
type state struct {
	at                time.Time
	streams, shared   float64
	requests, refused float64
	writes            float64            // of nodes and leases
	kinds             map[string]float64 // requests that ended, and watches under way, by kind
	cpu               time.Duration
}

// begunSince is how many requests have begun since then: a watch counts among
// the requests only when it ends.
func (s state) begunSince(then state) float64 {
	return s.requests - then.requests + s.streams - then.streams
}

// mostSince names what was begun most since then.
func (s state) mostSince(then state) string {
	kinds := slices.SortedFunc(maps.Keys(s.kinds), func(a, b string) int {
		return cmp.Compare(s.kinds[b]-then.kinds[b], s.kinds[a]-then.kinds[a])
	})
	var most []string
	for _, k := range kinds[:min(12, len(kinds))] {
		if s.kinds[k] <= then.kinds[k] {
			break
		}
		most = append(most, fmt.Sprintf("%.0f %s", s.kinds[k]-then.kinds[k], k))
	}
	return strings.Join(most, ", ")
}

// difference is what happened meanwhile.
type difference struct {
	took, server, hubs time.Duration // processors' time but for the first
	bytes, requests    float64
	kinds              string // what was asked for most
}

func (f *fleet) during(ctx context.Context, do func() error) (d difference, err error) {
	before, err := f.bench.apiServer(ctx)
	if err != nil {
		return d, err
	}
	bytes := f.bytes()
	hubs, err := f.busy()
	if err != nil {
		return d, err
	}
	if err := do(); err != nil {
		return d, err
	}
	d.bytes = f.bytes() - bytes
	if d.hubs, err = f.busy(); err != nil {
		return d, err
	}
	after, err := f.bench.apiServer(ctx)
	d.hubs, d.kinds = d.hubs-hubs, after.mostSince(before)
	d.took, d.server, d.requests = after.at.Sub(before.at), after.cpu-before.cpu, after.requests-before.requests
	return d, err
}

// profileServer takes a profile of the API server for a time while something is
// done, if profiles are wanted.
func (b *bench) profileServer(ctx context.Context, name string, d time.Duration, do func() error) error {
	if b.profiles == "" {
		return do()
	}
	if err := os.MkdirAll(b.profiles, 0o750); err != nil {
		return fmt.Errorf("take profile: %w", err)
	}
	server := make(chan error, 1)
	go func() { // ends with the profile
		text, err := b.admin.RESTClient().Get().AbsPath("/debug/pprof/profile").Param("seconds", fmt.Sprintf("%.0f", d.Seconds())).DoRaw(ctx)
		if err == nil {
			err = os.WriteFile(b.profileFile(name+"-apiserver"), text, 0o600)
		}
		server <- err
	}()
	err := do()
	return errors.Join(err, <-server)
}

func (b *bench) profileFile(name string) string { return filepath.Join(b.profiles, name+".cpu") }

func (b *bench) apiServer(ctx context.Context) (s state, err error) {
	text, err := b.admin.RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return s, fmt.Errorf("ask the API server for its metrics: %w", err)
	}
	s.at, s.kinds = time.Now(), map[string]float64{}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		line := lines.Text()
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || line[0] == '#' {
			continue
		}
		name, labels, _ := strings.Cut(line[:at], "{")
		has := func(label, value string) bool { return strings.Contains(labels, label+`="`+value+`"`) }
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return s, fmt.Errorf("read the API server's metrics: %w", err)
		}
		switch {
		case name == "apiserver_longrunning_requests" && has("verb", "WATCH"):
			s.streams += value
			s.kinds[kindOf(labels)] += value
			if has("resource", "services") || has("resource", "endpointslices") {
				s.shared += value
			}
		case name == "apiserver_request_total":
			s.requests += value
			s.kinds[kindOf(labels)] += value
			if has("code", "429") {
				s.refused += value
			}
			if (has("resource", "leases") || has("resource", "nodes")) && !has("verb", "GET") && !has("verb", "LIST") && !has("verb", "WATCH") {
				s.writes += value
			}
		case name == "process_cpu_seconds_total":
			s.cpu = time.Duration(value * float64(time.Second))
		}
	}
	return s, nil
}

// kindOf names what is asked for, by the labels of a metric.
func kindOf(labels string) string {
	of := func(label string) string {
		_, rest, _ := strings.Cut(","+labels, ","+label+`="`)
		value, _, _ := strings.Cut(rest, `"`)
		return value
	}
	what := of("resource")
	if sub := of("subresource"); sub != "" {
		what += "/" + strings.TrimPrefix(sub, "/")
	}
	return of("verb") + " " + strings.TrimPrefix(what, "/")
}

// sharedUplink measures what passes over the uplink of one pool that shares,
// with one machine and with many.
func (b *bench) sharedUplink(ctx context.Context) error {
	if err := b.startPools(ctx); err != nil {
		return err
	}
	const space = "uplink"
	objects := b.scale.objects
	if err := b.create(ctx, slicePath, space, objects, variedSliceIn(space)); err != nil {
		return err
	}
	if err := b.create(ctx, servicePath, space+"-services", objects, newServiceIn(space+"-services")); err != nil {
		return err
	}
	w, err := b.newWriterOf(space, objects, 2*objects, variedSliceIn(space))
	if err != nil {
		return err
	}
	var of [2]crossed
	for i, n := range []int{1, b.scale.uplink} {
		if of[i], err = b.poolOf(ctx, n, w); err != nil {
			return fmt.Errorf("%d machines: %w", n, err)
		}
	}
	// In these rows the sides are one machine and many.
	ratio := func(what string, figure func(crossed) float64, most bar, note string) {
		one, many := figure(of[0])/1e6, figure(of[1])/1e6
		r := many / one
		b.add(Row{
			What: fmt.Sprintf("bytes of a pool of %d machines, of one machine's: %s", b.scale.uplink, what), Unit: "MB", Hub: &many, Ratio: &r,
			Note: fmt.Sprintf("one machine %.1f MB; %s", one, note),
		}, most)
	}
	once := ratioAtMost(1.1)
	started := fmt.Sprintf("%d services, %d slices; all start within %s, in any order, on this machine's processors", objects, objects, b.scale.spread)
	ratio("what they share, first start of all at once", func(c crossed) float64 { return c.sharedFirst }, once, started)
	ratio("what they share, every slice changed once", func(c crossed) float64 { return c.sharedLater }, once,
		fmt.Sprintf("%d changes a second", perSecond(b.scale.uplink)))
	own := (of[1].first - of[0].first) / 1e3 / float64(max(b.scale.uplink-1, 1))
	ratio("all, first start of all at once", func(c crossed) float64 { return c.first }, bar{},
		fmt.Sprintf("each further machine %.0f KB: handshakes, its Node, its lease", own))
	ratio("all, every slice changed once", func(c crossed) float64 { return c.later }, bar{}, "TLS and all")
	ratio("all, both", func(c crossed) float64 { return c.first + c.later }, bar{}, "TLS and all")
	return nil
}

// crossed are the bytes that crossed an uplink until all had all, and while
// every slice changed: all of them, and those of what the pool shares.
type crossed struct{ first, later, sharedFirst, sharedLater float64 }

// perSecond is the pace at which slices change. All hubs of the pool and their
// watchers are on this machine: as many changes reach as many hubs of a site
// whose every machine has processors of its own without any of them being late.
func perSecond(machines int) int { return max(1, min(50, 800/machines)) }

// poolOf starts a pool of n machines that have nothing yet, and returns the
// bytes on its uplink.
func (b *bench) poolOf(ctx context.Context, n int, w *writer) (c crossed, err error) {
	others, err := b.apiServer(ctx)
	if err != nil {
		return c, err
	}
	f, err := b.startFleet(ctx, 1, n, b.scale.slices, true, b.scale.spread)
	if err != nil {
		return c, err
	}
	defer f.close(ctx)
	// Who took the cloud at its start takes the changes from there too, until
	// it has come back to a leader.
	if err := f.settle(ctx, others.shared+streamsPerLeader); err != nil {
		return c, err
	}
	if err := f.calm(ctx); err != nil {
		return c, err
	}
	c.first = f.bytes()
	if c.sharedFirst, err = f.shared(ctx); err != nil {
		return c, err
	}
	first, _, err := w.write(ctx, len(w.bodies), perSecond(n))
	if err != nil {
		return c, err
	}
	if err := f.have(ctx, haveBudget(n), first, w.next-1); err != nil {
		return c, err
	}
	c.later = f.bytes() - c.first
	all, err := f.shared(ctx)
	c.sharedLater = all - c.sharedFirst
	return c, err
}

const servicePath = "/api/v1/namespaces/%s/services"

// newServiceIn makes a Service of about 1 KB.
func newServiceIn(namespace string) func(string) runtime.Object {
	return func(name string) runtime.Object {
		return &corev1.Service{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
			ObjectMeta: metav1.ObjectMeta{
				Namespace: namespace, Name: name, Annotations: map[string]string{"bench": filler(600)},
			},
			Spec: corev1.ServiceSpec{
				Selector: map[string]string{"app": name}, Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}},
			},
		}
	}
}
