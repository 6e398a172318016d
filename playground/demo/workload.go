package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/template"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/yurt-edge/yurt/playground"
)

// replicas is how many web servers each pool runs.
const replicas = 3

// manifest deploys the web server to one pool.
var manifest = template.Must(template.New("web").Parse(`
apiVersion: v1
kind: Service
metadata:
  name: web-{{.Pool}}
  labels: {app: web, pool: {{.Pool}}}
spec:
  selector: {app: web, pool: {{.Pool}}}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web-{{.Pool}}
spec:
  replicas: {{.Replicas}}
  selector: {matchLabels: {app: web, pool: {{.Pool}}}}
  template:
    metadata:
      labels: {app: web, pool: {{.Pool}}}
    spec:
      nodeSelector: {apps.openyurt.io/nodepool: {{.Pool}}}
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: {{.Image}}
        imagePullPolicy: IfNotPresent
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
`))

// Deploy puts the web server onto every pool and waits until all serve.
func Deploy(ctx context.Context, p *playground.Playground) error {
	var text strings.Builder
	pools := p.Topology().Pools
	for i, pool := range pools {
		if i > 0 {
			text.WriteString("---\n")
		}
		err := manifest.Execute(&text, struct {
			Pool, Image string
			Replicas    int
		}{pool.Name, playground.WebImage, replicas})
		if err != nil {
			return fmt.Errorf("render web server: %w", err)
		}
	}
	if err := p.Apply(ctx, text.String()); err != nil {
		return fmt.Errorf("deploy web server: %w", err)
	}
	for _, pool := range pools {
		if _, err := p.Kubectl(ctx, "rollout", "status", "deployment/web-"+pool.Name, "--timeout=120s"); err != nil {
			return fmt.Errorf("wait for web server of pool %s: %w", pool.Name, err)
		}
	}
	return nil
}

// Answer is what a web server says.
type Answer struct {
	Pod     string    `json:"pod"`
	Node    string    `json:"node"`
	Started time.Time `json:"start"`
	Token   bool      `json:"token"`
}

// Pods returns the web pods of a machine as the cloud sees them.
func Pods(ctx context.Context, p *playground.Playground, machine string) ([]corev1.Pod, error) {
	out, err := p.Kubectl(ctx, "get", "pods", "-l", "app=web", "--field-selector", "spec.nodeName="+machine, "-o", "json")
	if err != nil {
		return nil, err
	}
	return decodePods(out)
}

// LocalPods returns the web pods of a machine as its own API shows them: its
// hub, or the cloud for a machine without one.
func LocalPods(ctx context.Context, p *playground.Playground, machine string) ([]corev1.Pod, error) {
	// What is entered in the middle of a boot may hang for ever.
	ctx, cancel := context.WithTimeout(ctx, lookBudget)
	defer cancel()
	out, err := p.Exec(ctx, machine, LocalKubectl("get", "pods", "-n", "default", "-l", "app=web",
		"--field-selector", "spec.nodeName="+machine, "-o", "json")...)
	if err != nil {
		return nil, err
	}
	return decodePods(out)
}

// LocalKubectl is a kubectl command line for a machine, with the node's own
// credential.
func LocalKubectl(args ...string) []string {
	return append([]string{"kubectl", "--kubeconfig", "/var/lib/kubelet/kubeconfig", "--request-timeout=10s"}, args...)
}

func decodePods(text string) ([]corev1.Pod, error) {
	// kubectl's warnings go to standard error; this is only the object.
	var list corev1.PodList
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, fmt.Errorf("read pods: %w", err)
	}
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return list.Items, nil
}

// lookBudget bounds one look into a machine.
const lookBudget = 5 * time.Second

// errNotYet is the reason for which a condition is waited for.
var errNotYet = errors.New("not yet")

// Serving asks every web server of a machine, from the machine itself, and
// returns their answers. It fails unless want of them answer.
func Serving(ctx context.Context, p *playground.Playground, machine string, want int) ([]Answer, error) {
	pods, err := LocalPods(ctx, p, machine)
	if err != nil {
		return nil, err
	}
	var out []Answer
	for _, pod := range pods {
		if pod.Status.PodIP == "" {
			return nil, fmt.Errorf("pod %s has no address: %w", pod.Name, errNotYet)
		}
		text, err := p.Exec(ctx, machine, "curl", "-sf", "--max-time", "1", "http://"+pod.Status.PodIP+":8080/")
		if err != nil {
			return nil, fmt.Errorf("pod %s does not answer: %w", pod.Name, errNotYet)
		}
		var a Answer
		if err := json.Unmarshal([]byte(text), &a); err != nil {
			return nil, fmt.Errorf("answer of %s: %w", pod.Name, err)
		}
		if a.Pod != pod.Name {
			return nil, fmt.Errorf("address of %s belongs to %s: %w", pod.Name, a.Pod, errNotYet)
		}
		out = append(out, a)
	}
	if len(out) != want {
		return nil, fmt.Errorf("%d web servers answer, want %d: %w", len(out), want, errNotYet)
	}
	return out, nil
}

// AwaitServing waits until want web servers of the machine answer that
// started after since.
func AwaitServing(ctx context.Context, p *playground.Playground, machine string, want int, since time.Time) error {
	return await(ctx, fmt.Sprintf("%d web servers on %s", want, machine), func() error {
		answers, err := Serving(ctx, p, machine, want)
		if err != nil {
			return err
		}
		for _, a := range answers {
			if a.Started.Before(since) {
				return fmt.Errorf("pod %s has not started again: %w", a.Pod, errNotYet)
			}
			if !a.Token {
				return fmt.Errorf("pod %s cannot read its token", a.Pod)
			}
		}
		return nil
	})
}

// await polls until ready returns nil or ctx ends, and then says why not.
func await(ctx context.Context, what string, ready func() error) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (last: %w)", what, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// Containers returns, for every container of a machine's pods, its id and
// how often it was restarted: what must not change when only a link fails.
func Containers(ctx context.Context, p *playground.Playground, machines ...string) (map[string]string, error) {
	out, err := p.Kubectl(ctx, "get", "pods", "-A", "-o", "json")
	if err != nil {
		return nil, err
	}
	pods, err := decodePods(out)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, pod := range pods {
		if !slices.Contains(machines, pod.Spec.NodeName) {
			continue
		}
		for _, c := range pod.Status.ContainerStatuses {
			found[pod.Spec.NodeName+" "+pod.Namespace+"/"+pod.Name+"/"+c.Name] = fmt.Sprintf("%s, %d restarts", c.ContainerID, c.RestartCount)
		}
	}
	return found, nil
}

// differences lists what changed from before to after.
func differences(before, after map[string]string) []string {
	var out []string
	for name, old := range before {
		if now, ok := after[name]; !ok {
			out = append(out, name+" is gone")
		} else if now != old {
			out = append(out, fmt.Sprintf("%s: was %s, is %s", name, old, now))
		}
	}
	slices.Sort(out)
	return out
}
