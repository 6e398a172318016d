package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/api/apps"
	"github.com/yurt-edge/yurt/test/bed"
)

const (
	// hubsPerWorker keeps a worker below the 20 000 files that a process may
	// have open in many a container.
	hubsPerWorker = 250
	workerEnd     = 30 * time.Second
	makers        = 16 // requests at once that make objects
)

// fleet is many hubs in pools. Each pool has a link of its own, as a site has
// its uplink; within the pool hubs reach each other by loopback addresses.
type fleet struct {
	bench   *bench
	dir     string
	pools   []string
	links   []*bed.Link // by pool
	members []member
	workers []*workerProcess
	number  int           // of the bench's fleets
	within  time.Duration // of their start; 0: in order, leaders first
	held    int           // slices that a hub has when it is ready

	mu    sync.Mutex // guards the following
	ready int
	seen  []map[int]int64 // by hub: when its watcher got which update first
	lost  int             // streams that ended
	said  int             // workers that have said what they took
	took  float64         // bytes, in all
	fault error           // of workers
}

// workerProcess is a worker seen from here.
type workerProcess struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	ended chan struct{}
}

// startFleet makes pools and their nodes, starts their hubs and waits until
// each holds that many slices and has a watcher. All start within spread; if it
// is 0, one after the other, as a fleet grows.
func (b *bench) startFleet(ctx context.Context, pools, hubs, held int, shared bool, spread time.Duration) (_ *fleet, err error) {
	b.fleets++
	f := &fleet{bench: b, number: b.fleets, held: held, within: spread}
	defer func() {
		if err != nil {
			f.close(ctx)
		}
	}()
	// The data of many hubs on one disk would measure the disk.
	if f.dir, err = os.MkdirTemp(memoryDir(), "yurt-scale-"); err != nil {
		return nil, err
	}
	for p := range pools {
		name := fmt.Sprintf("fleet-%d-%02d", b.fleets, p)
		link, err := bed.NewLink(b.cloud.URL)
		if err != nil {
			return nil, err
		}
		f.pools, f.links = append(f.pools, name), append(f.links, link)
		for h := range hubs {
			i := len(f.members)
			f.members = append(f.members, member{
				Index: i, Node: fmt.Sprintf("%s-%03d", name, h), Pool: name, Server: link.URL(),
				// Two benches on one machine should not meet.
				IP:  fmt.Sprintf("127.%d.%d.%d", 32+(os.Getpid()+b.fleets*7)%200, p, h+1),
				Dir: filepath.Join(f.dir, strconv.Itoa(i)),
			})
			f.seen = append(f.seen, map[int]int64{})
		}
	}
	if err := b.makePools(ctx, f.pools, shared); err != nil {
		return nil, err
	}
	if err := f.makeNodes(ctx); err != nil {
		return nil, err
	}
	if err := b.poolsKnow(ctx, f.pools, hubs, shared); err != nil {
		return nil, err
	}
	if shared && spread == 0 {
		if err := f.leadersFirst(ctx); err != nil {
			return nil, err
		}
	}
	return f, f.launch(ctx)
}

// leadersFirst orders the hubs as they are to start. A few start at a time, and
// one that holds nothing waits for its leader.
func (f *fleet) leadersFirst(ctx context.Context) error {
	all, err := f.bench.listPools(ctx)
	if err != nil {
		return err
	}
	leads := map[string]bool{}
	for i := range all {
		for _, l := range all[i].Status.LeaderEndpoints {
			leads[l.NodeName] = true
		}
	}
	slices.SortStableFunc(f.members, func(a, b member) int {
		switch {
		case leads[a.Node] == leads[b.Node]:
			return 0
		case leads[a.Node]:
			return -1
		}
		return 1
	})
	return nil
}

// launch starts the hubs, on what they have on disk, and waits until all are
// ready.
func (f *fleet) launch(ctx context.Context) error {
	for hubs := range slices.Chunk(f.members, hubsPerWorker) {
		if err := f.startWorker(ctx, order{Slices: f.held, Debug: f.bench.logs != "", Spread: f.within, Hubs: hubs}); err != nil {
			return err
		}
	}
	return f.await(ctx, readyBudget+time.Duration(len(f.members))*time.Second/2, "hubs ready", func() (int, int) {
		return f.ready, len(f.members)
	})
}

// halt ends the hubs in good order.
func (f *fleet) halt() {
	for _, w := range f.workers {
		_ = w.stdin.Close()
	}
	late := time.After(workerEnd)
	for _, w := range f.workers {
		select {
		case <-w.ended:
		case <-late:
			_ = w.cmd.Process.Kill()
			<-w.ended
			late = time.After(0)
		}
	}
	f.workers = nil
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ready = 0
}

func memoryDir() string {
	const dir = "/dev/shm"
	if s, err := os.Stat(dir); err == nil && s.IsDir() {
		return dir
	}
	return "" // the usual one
}

// makeNodes makes the nodes, and what a hub has on disk after its first start:
// its certificates. No kubelet runs, so each node says once that it is ready.
func (f *fleet) makeNodes(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(makers)
	for i := range f.members {
		g.Go(func() error {
			m := &f.members[i]
			if _, err := f.bench.makeNode(ctx, m.Node, m.Pool, m.IP); err != nil {
				return err
			}
			// As a kubelet does: hubs would ask for it again and again.
			drivers := &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: m.Node}}
			if _, err := f.bench.admin.StorageV1().CSINodes().Create(ctx, drivers, metav1.CreateOptions{}); err != nil {
				return fmt.Errorf("make node: %w", err)
			}
			return f.bench.makeCertificates(m)
		})
	}
	return g.Wait()
}

func (b *bench) makeNode(ctx context.Context, node, pool, ip string) (*corev1.Node, error) {
	now := metav1.Now()
	made, err := b.admin.CoreV1().Nodes().Create(ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: node, Labels: map[string]string{apps.NodePoolLabel: pool}},
		Status: corev1.NodeStatus{
			Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}},
			Conditions: []corev1.NodeCondition{{
				Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Bench", LastHeartbeatTime: now, LastTransitionTime: now,
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("make node: %w", err)
	}
	return made, nil
}

func (b *bench) makeCertificates(m *member) (err error) {
	if m.Cert, m.Key, err = b.cloud.CA.Client("system:node:"+m.Node, "system:nodes"); err != nil {
		return err
	}
	cert, key, err := b.cloud.CA.Server("system:node:"+m.Node, m.IP, "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.cluster.local")
	if err != nil {
		return err
	}
	dir := filepath.Join(m.Dir, "pki")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, text := range map[string][]byte{
		"ca.crt": b.cloud.CA.CertPEM, "hub-client.pem": slices.Concat(m.Cert, m.Key), "hub-server-cluster.pem": slices.Concat(cert, key),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (f *fleet) startWorker(ctx context.Context, o order) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	// In the field hubs take nothing from the API server's processors: here it
	// comes first, with its etcd, the manager and the relays.
	cmd := exec.Command("nice", "-n", "5", self) //nolint:noctx // it ends with its input, in good order
	// Ceilings are for one hub; these are many.
	cmd.Env = append(os.Environ(), workerEnv+"=1", "GOMEMLIMIT=off", "GOGC=200")
	log, err := os.OpenFile(f.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // the child has its own descriptor
	cmd.Stderr = log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start worker: %w", err)
	}
	p := &workerProcess{cmd: cmd, stdin: stdin, ended: make(chan struct{})}
	f.workers = append(f.workers, p)
	go func() { // ends with the process
		defer close(p.ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			f.hear(lines.Text())
		}
		if err := cmd.Wait(); err != nil {
			f.mu.Lock()
			f.fault = errors.Join(f.fault, fmt.Errorf("worker: %w", err))
			f.mu.Unlock()
		}
	}()
	if _, err := io.Copy(stdin, bytes.NewReader(append(text, '\n'))); err != nil {
		return fmt.Errorf("tell worker: %w", err)
	}
	return ctx.Err()
}

// logFile is what the fleet's workers log to.
func (f *fleet) logFile() string {
	if f.bench.logs == "" {
		return filepath.Join(f.dir, "workers.log")
	}
	return filepath.Join(f.bench.logs, fmt.Sprintf("fleet-%d.log", f.number))
}

// lastWords are the last lines that workers logged.
func (f *fleet) lastWords() string {
	text, err := os.ReadFile(f.logFile())
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-1000):])
}

func (f *fleet) hear(line string) {
	word, rest, _ := strings.Cut(line, " ")
	fields := strings.Fields(rest)
	f.mu.Lock()
	defer f.mu.Unlock()
	switch word {
	case "ready":
		f.ready++
	case "shared":
		n, _ := strconv.ParseFloat(rest, 64)
		f.said, f.took = f.said+1, f.took+n
	case "lost":
		f.lost++
		fmt.Fprintf(f.bench.log, "stream of a watcher ended: hub %s\n", rest)
	case "seen":
		var n [3]int64
		for i, text := range fields[:min(len(n), len(fields))] {
			n[i], _ = strconv.ParseInt(text, 10, 64)
		}
		if at := f.seen[n[0]]; at[int(n[1])] == 0 {
			at[int(n[1])] = n[2]
		}
	}
}

// await waits until count, which is called with mu held, says that all are
// done.
func (f *fleet) await(ctx context.Context, budget time.Duration, what string, count func() (done, all int)) error {
	var done, all int
	said := time.Now()
	err := until(ctx, budget, 50*time.Millisecond, func() (bool, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		done, all = count()
		if time.Since(said) > 10*time.Second {
			fmt.Fprintf(f.bench.log, "%s: %d of %d\n", what, done, all)
			said = time.Now()
		}
		return done >= all, f.fault
	})
	if err != nil {
		return fmt.Errorf("%s: %d of %d: %w; workers said: %s", what, done, all, err, f.lastWords())
	}
	return nil
}

// have waits until every hub has updates first to last.
func (f *fleet) have(ctx context.Context, budget time.Duration, first, last int) error {
	return f.await(ctx, budget, "deliveries", func() (int, int) {
		done := 0
		for _, at := range f.seen {
			for n := first; n <= last; n++ {
				if at[n] != 0 {
					done++
				}
			}
		}
		return done, len(f.seen) * (last - first + 1)
	})
}

// times returns, by hub, when it had an update.
func (f *fleet) times(update int) []int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]int64, len(f.seen))
	for i, at := range f.seen {
		out[i] = at[update]
	}
	return out
}

func (f *fleet) broken() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lost
}

// bytes are those that passed over the uplinks of all pools, both ways.
func (f *fleet) bytes() float64 {
	sum := 0.0
	for _, l := range f.links {
		up, down := l.Bytes()
		sum += float64(up + down)
	}
	return sum
}

// shared are the bytes of what pools share that hubs took from the cloud, by
// their own count: lists as they came, packed, and watches.
func (f *fleet) shared(ctx context.Context) (float64, error) {
	f.mu.Lock()
	f.said, f.took = 0, 0
	f.mu.Unlock()
	for _, w := range f.workers {
		if _, err := io.WriteString(w.stdin, "shared\n"); err != nil {
			return 0, fmt.Errorf("ask worker: %w", err)
		}
	}
	err := f.await(ctx, workerEnd, "workers asked", func() (int, int) { return f.said, len(f.workers) })
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.took, err
}

// cut cuts, or heals, every uplink.
func (f *fleet) cut(m bed.Mode) error {
	for _, l := range f.links {
		if err := l.Cut(m); err != nil {
			return err
		}
	}
	return nil
}

// memory is the memory of the workers in MB: all, and what is no file's.
func (f *fleet) memory() (resident, anonymous float64, err error) {
	for _, w := range f.workers {
		p, err := readProcess(w.cmd.Process.Pid)
		if err != nil {
			return 0, 0, err
		}
		resident, anonymous = resident+p.resident, anonymous+p.anonymous
	}
	return resident, anonymous, nil
}

// busy is the processor time that the workers have taken.
func (f *fleet) busy() (time.Duration, error) {
	pids := make([]int, len(f.workers))
	for i, w := range f.workers {
		pids[i] = w.cmd.Process.Pid
	}
	return busy(pids...)
}

// profile takes profiles of the first worker and of the API server while it
// does something, if profiles are wanted: the server's for a time.
func (f *fleet) profile(ctx context.Context, name string, d time.Duration, do func() error) error {
	name = fmt.Sprintf("fleet-%d-%s", f.number, name)
	return f.bench.profileServer(ctx, name, d, func() error {
		if f.bench.profiles == "" {
			return do()
		}
		_, err := fmt.Fprintf(f.workers[0].stdin, "profile %s\n", f.bench.profileFile(name+"-worker"))
		err = errors.Join(err, do())
		_, perr := fmt.Fprintln(f.workers[0].stdin, "profile")
		return errors.Join(err, perr)
	})
}

// close ends the hubs and takes their nodes and pools away.
func (f *fleet) close(ctx context.Context) {
	f.halt()
	for _, l := range f.links {
		l.Close()
	}
	_ = os.RemoveAll(f.dir) // it is temporary
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := f.bench.forget(ctx, f.pools); err != nil {
		fmt.Fprintf(f.bench.log, "take the fleet away: %v\n", err)
	}
}
