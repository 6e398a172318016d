package playground

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/yurt-edge/yurt/playground/machine"
)

// Status is what a playground looks like now.
type Status struct {
	Dir     string `json:"dir"`
	Server  string `json:"server"`
	Version string `json:"version"`
	// ControlPlaneError tells why the control plane is not whole; empty when
	// it is.
	ControlPlaneError string `json:"controlPlaneError,omitempty"`
	// Memory is what the playground's processes use alone plus their part of
	// what they share, in bytes.
	Memory   int64           `json:"memory"`
	Manager  ManagerStatus   `json:"manager"`
	Pools    []PoolStatus    `json:"pools"`
	Machines []MachineStatus `json:"machines"`
}

// PoolStatus is a pool's uplink and its NodePool.
type PoolStatus struct {
	Name string `json:"name"`
	Link string `json:"link"`
	NAT  bool   `json:"nat"`
	// Type is Edge or Cloud, empty without a NodePool. NodesReady counts the
	// pool's ready nodes and Nodes all of them, as yurt-manager does.
	Type       string   `json:"type"`
	NodesReady int      `json:"nodesReady"`
	Nodes      int      `json:"nodes"`
	Leaders    []string `json:"leaders"`
}

// MachineStatus is one machine with its node.
type MachineStatus struct {
	Machine
	On bool `json:"on"`
	// Link is up, down, blackhole (with the direction when it is one), and
	// what narrows it.
	Link string `json:"link"`
	// Ready is the node's condition: True, False, Unknown or absent.
	Ready string `json:"ready"`
	// Pods counts the node's ready pods and all of them.
	PodsReady int   `json:"podsReady"`
	Pods      int   `json:"pods"`
	Memory    int64 `json:"memory"`
}

// Status returns the state of machines, links and nodes. Nodes are as the API
// server knows them: of a machine that is cut off, that is old news.
func (p *Playground) Status(ctx context.Context) (Status, error) {
	if p.stop != nil {
		return p.status(ctx)
	}
	var answer struct {
		Status
		reply
	}
	if err := askKeeper(ctx, p.dir, "/status", nil, &answer); err != nil {
		return Status{}, err
	}
	return answer.Status, answer.err()
}

func (p *Playground) status(ctx context.Context) (Status, error) {
	versions, err := ChosenVersions()
	if err != nil {
		return Status{}, err
	}
	s := Status{Dir: p.dir, Server: p.cp.URL, Version: versions.ControlPlane}
	if err := p.cp.Err(); err != nil {
		s.ControlPlaneError = err.Error()
	}
	links, err := p.net.State(ctx)
	if err != nil {
		return s, err
	}
	link := map[string]string{}
	nat := map[string]bool{}
	for _, l := range links {
		var words []string
		if l.Down {
			words = append(words, "down")
		}
		if l.Blackhole != "" {
			words = append(words, "blackhole "+string(l.Blackhole))
		}
		if l.Relayed {
			words = append(words, fmt.Sprintf("shaped in %v out %v", l.In, l.Out))
		}
		if len(words) == 0 {
			words = []string{"up"}
		}
		link[l.Target], nat[l.Target] = strings.Join(words, ", "), l.NAT
	}
	for _, pool := range p.topology.Pools {
		s.Pools = append(s.Pools, PoolStatus{Name: pool.Name, Link: link[pool.Name], NAT: nat[pool.Name]})
	}
	nodes := p.nodes(ctx, &s)
	p.managed(ctx, &s)
	for _, m := range p.topology.Machines {
		ms := MachineStatus{Machine: m, Link: link[m.Name], Ready: "absent"}
		if n, ok := nodes[m.Name]; ok {
			ms.Ready, ms.Pods, ms.PodsReady = n.ready, n.pods, n.podsReady
		}
		if leader, err := machine.Leader(m.Name); err == nil {
			ms.On = true
			ms.Memory = memoryOfTree(leader)
		}
		s.Memory += ms.Memory
		s.Machines = append(s.Machines, ms)
	}
	for _, pid := range append(p.cp.pids(), os.Getpid()) {
		s.Memory += memoryOf(pid)
	}
	return s, nil
}

// managed asks the API server for what yurt-manager does. When it does not
// answer, s says so.
func (p *Playground) managed(ctx context.Context, s *Status) {
	if s.ControlPlaneError != "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	pools, err := p.nodePools(ctx)
	if err == nil {
		s.Manager, err = p.managerStatus(ctx)
	}
	if err != nil {
		s.ControlPlaneError = err.Error()
	}
	for i := range s.Pools {
		pool := pools[s.Pools[i].Name]
		s.Pools[i].Type = string(pool.Spec.Type)
		s.Pools[i].NodesReady = int(pool.Status.ReadyNodeNum)
		s.Pools[i].Nodes = int(pool.Status.ReadyNodeNum + pool.Status.UnreadyNodeNum)
		for _, l := range pool.Status.LeaderEndpoints {
			s.Pools[i].Leaders = append(s.Pools[i].Leaders, l.NodeName)
		}
	}
}

type nodeState struct {
	ready           string
	pods, podsReady int
}

// nodes asks the API server. When it does not answer, s says so and the nodes
// are absent.
func (p *Playground) nodes(ctx context.Context, s *Status) map[string]nodeState {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	states := map[string]nodeState{}
	client, err := p.cp.Client()
	var nodes *corev1.NodeList
	var pods *corev1.PodList
	if err == nil {
		nodes, err = client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	}
	if err == nil {
		pods, err = client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	}
	if err != nil {
		s.ControlPlaneError = strings.TrimSpace(s.ControlPlaneError + "\n" + err.Error())
		return states
	}
	for _, n := range nodes.Items {
		state := nodeState{ready: string(corev1.ConditionUnknown)}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady {
				state.ready = string(c.Status)
			}
		}
		for _, pod := range pods.Items {
			if pod.Spec.NodeName == n.Name {
				state.pods++
				if podReady(pod) {
					state.podsReady++
				}
			}
		}
		states[n.Name] = state
	}
	return states
}

func (cp *ControlPlane) pids() []int {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	var pids []int
	for _, p := range cp.processes {
		pids = append(pids, p.pid)
	}
	return pids
}

// memoryOf returns the proportional set size of a process: its own pages and
// its part of shared ones, so that sums count each page once. It is 0 when the
// process is gone.
func memoryOf(pid int) int64 {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "Pss:"); ok {
			kilobytes, _ := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			return kilobytes << 10
		}
	}
	return 0
}

// memoryOfTree sums a process and all processes below it.
func memoryOfTree(pid int) int64 {
	sum := memoryOf(pid)
	for _, task := range children(pid) {
		sum += memoryOfTree(task)
	}
	return sum
}

func children(pid int) []int {
	var all []int
	dir := "/proc/" + strconv.Itoa(pid) + "/task"
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, task := range tasks {
		text, err := os.ReadFile(dir + "/" + task.Name() + "/children")
		if err != nil {
			continue
		}
		for field := range strings.FieldsSeq(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				all = append(all, child)
			}
		}
	}
	return all
}
