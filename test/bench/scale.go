package main

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"math"
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
	quiet                        time.Duration // how long a fleet at rest is looked at
	settle                       time.Duration // how long hubs may take to find their leaders
	spread                       time.Duration // within which the hubs behind that uplink start
}

// defaultScale is what design.md asks for.
var defaultScale = scale{
	pools: 50, hubs: 20, slices: 20, changes: 20, objects: 1000, uplink: 50, leases: 2000, quiet: 15 * time.Second, settle: 75 * time.Second,
	spread: 20 * time.Second,
}

func (s *scale) flags(fs *flag.FlagSet) {
	fs.IntVar(&s.pools, "pools", s.pools, "with -scale: pools of the fleet")
	fs.IntVar(&s.hubs, "hubs", s.hubs, "with -scale: hubs in each pool, at most 250")
	fs.IntVar(&s.slices, "slices", s.slices, "with -scale: EndpointSlices in the cluster, of 12 KB")
	fs.IntVar(&s.changes, "changes", s.changes, "with -scale: changes of one EndpointSlice that are measured")
	fs.IntVar(&s.objects, "objects", s.objects, "with -scale: Services, and EndpointSlices, for the bytes on one pool's uplink")
	fs.IntVar(&s.uplink, "machines", s.uplink, "with -scale: machines behind that uplink, beside one")
	fs.IntVar(&s.leases, "leases", s.leases, "with -scale: nodes, in pools of 20, of which one in a pool has a link")
}

func scaleSections() []section {
	return []section{
		{"fleet", (*bench).fleet},
		{"uplink", (*bench).sharedUplink},
		{"leases", (*bench).vouched},
	}
}

const (
	sharedSpace = "shared"
	// changeEvery leaves the machine, on which the whole fleet runs, time to
	// come to rest between two changes.
	changeEvery = 500 * time.Millisecond
	// haveBudget is how long the fleet may take to have what it is to have.
	haveBudget = 2 * time.Minute
	// scaleBudget bounds the whole. What is not measured by then is not.
	scaleBudget = 20 * time.Minute
)

// fleet measures many hubs in many pools, first without sharing and then as
// many others with it.
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
	for i, on := range []bool{false, true} {
		if sides[i], err = b.side(ctx, w, on); err != nil {
			return fmt.Errorf("%s: %w", b.columns[i], err)
		}
		fmt.Fprintf(b.log, "%s is measured\n", b.columns[i])
	}
	b.compare(sides)
	return nil
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
	defer f.close()
	o.start = time.Since(begin).Seconds()
	if shared {
		if err := f.settle(ctx, others.shared+float64(b.scale.pools)*streamsPerLeader); err != nil {
			return o, err
		}
	}
	if err := f.spread(ctx, w, &o); err != nil {
		return o, err
	}
	o.streams -= others.streams
	o.shared -= others.shared
	if err := f.reconnect(ctx, w, &o); err != nil {
		return o, err
	}
	if err := f.costs(&o); err != nil {
		return o, err
	}
	f.halt()
	return o, b.forget(ctx, f.pools)
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

// outcome is what one way of doing it came to.
type outcome struct {
	streams, shared         float64 // watches at the API server: all, and of what a pool shares
	bytes                   float64 // over all uplinks, per change
	cpu                     float64 // ms of the API server, per change
	p50, p99, last          float64 // ms until a hub has a change
	current                 float64 // s until all are current after the cut
	requests, idle, refused float64 // a second: at the most while they come back, before the cut; in all
	peak                    float64 // processors that the API server takes meanwhile
	catchUp                 float64 // MB over all uplinks meanwhile
	broken                  int
	start                   float64 // s until all have started
	manager, hub, heap      float64 // MB: of the manager; of a hub, and what of it is no file's
	workers                 int
}

// spread measures single changes, beside the same time without any.
func (f *fleet) spread(ctx context.Context, w *writer, o *outcome) error {
	if err := f.calm(ctx); err != nil {
		return err
	}
	rest, err := f.during(ctx, func() error { return pause(ctx, f.bench.scale.quiet) })
	if err != nil {
		return err
	}
	first := w.next
	var sent []int64
	work, err := f.during(ctx, func() error {
		for range f.bench.scale.changes {
			sent = append(sent, time.Now().UnixNano())
			n, _, err := w.write(ctx, 1, 0)
			if err != nil {
				return err
			}
			if err := f.have(ctx, haveBudget, n, n); err != nil {
				return err
			}
			if err := pause(ctx, changeEvery); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	n, ratio := float64(f.bench.scale.changes), work.took.Seconds()/rest.took.Seconds()
	a, err := f.bench.apiServer(ctx)
	if err != nil {
		return err
	}
	o.streams, o.shared, o.idle = a.streams, a.shared, rest.requests/rest.took.Seconds()
	o.bytes = (work.bytes - rest.bytes*ratio) / n
	o.cpu = (work.cpu.Seconds() - rest.cpu.Seconds()*ratio) * 1000 / n
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
// their pool.
func (f *fleet) calm(ctx context.Context) error {
	last := f.bytes()
	return until(ctx, time.Minute, min(2*time.Second, f.bench.scale.quiet), func() (bool, error) {
		now := f.bytes()
		calm := now-last < float64(len(f.members))*2000
		last = now
		return calm, nil
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
		return err
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
		all <- f.have(ctx, haveBudget, first, first+n-1)
		close(all)
	}()
	// It goes on for a while after all are current: not all is asked for at once.
	for rest := time.Duration(-1); rest < 0 || time.Since(begin) < rest; {
		select {
		case err, open := <-all:
			if err != nil {
				return err
			}
			if open {
				o.current = time.Since(begin).Seconds()
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
		o.requests = max(o.requests, (now.requests-at.requests)/took)
		o.peak = max(o.peak, (now.cpu-at.cpu).Seconds()/took)
		at = now
	}
	o.refused = at.refused - refused
	o.catchUp = (f.bytes() - before) / 1e6
	o.broken = f.broken() - broken
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
	pair := func(what, unit string, figure func(outcome) float64, most bar, note string) {
		off, on := figure(of[0]), figure(of[1])
		row := Row{What: what, Unit: unit, Direct: &off, Hub: &on, Note: note}
		if ratio := on / off; off != 0 {
			row.Ratio = &ratio
		}
		b.add(row, most)
	}
	hubs := fmt.Sprintf("%d hubs", b.scale.pools*b.scale.hubs)
	all := "all hubs and their watchers share the processors with the API server"
	perPool := ratioAtMost(math.Round(1200/float64(b.scale.hubs)) / 1000)
	pair("until all have started, with nothing on disk", "s", func(o outcome) float64 { return o.start }, bar{},
		fmt.Sprintf("%s in %d pools, whole hubs, in %d processes beside the API server", hubs, b.scale.pools, of[0].workers))
	pair("watches at the API server", "", func(o outcome) float64 { return o.streams }, bar{}, hubs)
	pair("watches at the API server of what pools share", "", func(o outcome) float64 { return o.shared }, perPool,
		"the bar is a fifth more than one hub in each pool")
	pair("bytes from the cloud per change of a 12 KB slice", "KB", func(o outcome) float64 { return o.bytes / 1e3 }, perPool,
		"whole fleet, over all uplinks, TLS and all")
	pair("processor time of the API server per change", "ms", func(o outcome) float64 { return o.cpu }, bar{}, "less what it takes at rest")
	pair("change to a hub's watcher, p50", "ms", func(o outcome) float64 { return o.p50 }, bar{}, all)
	pair("change to a hub's watcher, p99", "ms", func(o outcome) float64 { return o.p99 }, bar{}, all)
	pair("change to the last hub's watcher", "ms", func(o outcome) float64 { return o.last }, bar{}, fmt.Sprintf("median of %d changes", b.scale.changes))
	pair("requests at rest", "1/s", func(o outcome) float64 { return o.idle }, bar{}, "no kubelets: theirs come on top")
	cut := fmt.Sprintf("all uplinks cut for %s, every slice changed: ", b.cut)
	pair(cut+"return to all hubs current", "s", func(o outcome) float64 { return o.current }, bar{}, all)
	pair(cut+"requests in the busiest second", "1/s", func(o outcome) float64 { return o.requests },
		ratioAtMost(1.2), "at the API server")
	pair(cut+"requests that the API server refused", "", func(o outcome) float64 { return o.refused }, atMost(0), "429: too many")
	pair(cut+"processors in the busiest second", "", func(o outcome) float64 { return o.peak }, bar{}, "of the API server")
	pair(cut+"bytes from the cloud", "MB", func(o outcome) float64 { return o.catchUp }, bar{}, "whole fleet, over all uplinks")
	pair(cut+"streams of local watchers that ended", "", func(o outcome) float64 { return float64(o.broken) }, atMost(0), "of "+hubs)
	pair("resident memory of yurt-manager", "MB", func(o outcome) float64 { return o.manager }, atMost(250),
		fmt.Sprintf("%d pools, %d nodes", b.scale.pools, b.scale.pools*b.scale.hubs))
	pair("resident memory of a hub, in a process of many", "MB", func(o outcome) float64 { return o.hub }, bar{}, "its watcher's too")
	pair("anonymous memory of a hub, in a process of many", "MB", func(o outcome) float64 { return o.heap }, bar{}, "the same without files")
}

// costs adds what the fleet takes of this machine, and the manager.
func (f *fleet) costs(o *outcome) error {
	p, err := readProcess(f.bench.manager.cmd.Process.Pid)
	if err != nil {
		return err
	}
	resident, anonymous, err := f.memory()
	n := float64(len(f.members))
	o.manager, o.hub, o.heap, o.workers = p.resident, resident/n, anonymous/n, len(f.workers)
	return err
}

// state is what the API server tells of itself.
type state struct {
	at                time.Time
	streams, shared   float64
	requests, refused float64
	writes            float64 // of nodes and leases
	cpu               time.Duration
}

// difference is what happened meanwhile.
type difference struct {
	took, cpu       time.Duration
	bytes, requests float64
}

func (f *fleet) during(ctx context.Context, do func() error) (d difference, err error) {
	before, err := f.bench.apiServer(ctx)
	if err != nil {
		return d, err
	}
	bytes := f.bytes()
	if err := do(); err != nil {
		return d, err
	}
	d.bytes = f.bytes() - bytes
	after, err := f.bench.apiServer(ctx)
	d.took, d.cpu, d.requests = after.at.Sub(before.at), after.cpu-before.cpu, after.requests-before.requests
	return d, err
}

func (b *bench) apiServer(ctx context.Context) (s state, err error) {
	text, err := b.admin.RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return s, fmt.Errorf("ask the API server for its metrics: %w", err)
	}
	s.at = time.Now()
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
			if has("resource", "services") || has("resource", "endpointslices") {
				s.shared += value
			}
		case name == "apiserver_request_total":
			s.requests += value
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
	defer f.close()
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
	if err := f.have(ctx, haveBudget, first, w.next-1); err != nil {
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
