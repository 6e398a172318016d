package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	corev1 "k8s.io/api/core/v1"

	"github.com/yurt-edge/yurt/playground"
)

// gracePeriod is after how long without a sign a node is Unknown, and dead if
// others of its pool are heard. Kubelets give a sign every ten seconds.
const gracePeriod = "20s"

// roaming POOL NAME: a web server on each machine of the pool that another
// machine may have after two seconds without a node.
func roaming(ctx context.Context, args []string) (string, error) {
	pool, name := args[0], args[1]
	count := 0
	for _, m := range lab.Topology().Machines {
		if m.Pool == pool {
			count++
		}
	}
	err := lab.Apply(ctx, strings.NewReplacer("@NAME@", name, "@POOL@", pool, "@IMAGE@", playground.WebImage, "@COUNT@", fmt.Sprint(count)).Replace(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: @NAME@, namespace: default}
spec:
  replicas: @COUNT@
  selector: {matchLabels: {roaming: @NAME@}}
  template:
    metadata: {labels: {roaming: @NAME@}}
    spec:
      nodeSelector: {apps.openyurt.io/nodepool: @POOL@}
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector: {matchLabels: {roaming: @NAME@}}
      terminationGracePeriodSeconds: 1
      tolerations:
      - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 2}
      - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 2}
      containers:
      - name: web
        image: @IMAGE@
        imagePullPolicy: IfNotPresent
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        env: [{name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}, {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
`))
	if err != nil {
		return "", err
	}
	return "", lab.WaitPods(ctx, "default", "roaming="+name, count)
}

// roamers returns the pods of a Deployment that roams, in order.
func roamers(ctx context.Context, name string) ([]corev1.Pod, error) {
	out, err := lab.Kubectl(ctx, "get", "pods", "-n", "default", "-l", "roaming="+name, "--sort-by=.metadata.name", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list corev1.PodList
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("read pods of %s: %w", name, err)
	}
	return list.Items, nil
}

// moved NAME MACHINE: all that roams runs on the machine, at last.
func moved(ctx context.Context, args []string) (string, error) {
	return "", poll(ctx, func() error {
		d, err := lab.Kubectl(ctx, "get", "deployment", args[0], "-n", "default", "-o", "jsonpath={.spec.replicas}")
		if err != nil {
			return err
		}
		pods, err := roamers(ctx, args[0])
		if err != nil {
			return err
		}
		there := 0
		for _, p := range pods {
			ready := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			})
			if p.Spec.NodeName == args[1] && p.DeletionTimestamp == nil && ready {
				there++
			}
		}
		if fmt.Sprint(there) != d {
			return fmt.Errorf("%d of %s pods of %s are ready on %s", there, d, args[0], args[1])
		}
		return nil
	})
}

// whereabouts lists the pods that roam, one a line. It is an error if one of
// them is being deleted.
func whereabouts(ctx context.Context, name string) (string, error) {
	pods, err := roamers(ctx, name)
	if err != nil {
		return "", err
	}
	var lines []string
	for _, p := range pods {
		if p.DeletionTimestamp != nil {
			return "", fmt.Errorf("pod %s on %s is being deleted", p.Name, p.Spec.NodeName)
		}
		lines = append(lines, fmt.Sprintf("%s %s %s", p.Name, p.UID, p.Spec.NodeName))
	}
	return strings.Join(lines, "\n"), nil
}

// whereis FILE NAME: writes down the pods that roam.
func whereIs(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
	defer cancel()
	now, err := whereabouts(ctx, args[1])
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(now), 0o600))
}

// stay FILE NAME DURATION [MACHINE...]: for that long no pod that roams is
// evicted, and these nodes are ready. What does not happen can only be watched.
func stay(ts *testscript.TestScript, _ bool, args []string) {
	want, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	watch, err := time.ParseDuration(args[2])
	ts.Check(err)
	ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
	defer cancel()
	over := time.After(watch)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		now, err := whereabouts(ctx, args[1])
		ts.Check(err)
		if now != string(want) {
			ts.Fatalf("pods were\n%s\nand are\n%s", want, now)
		}
		for _, m := range args[3:] {
			out, err := lab.Kubectl(ctx, "get", "node", m, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
			ts.Check(err)
			if out != "True" {
				ts.Fatalf("node %s is %s, want True", m, out)
			}
		}
		select {
		case <-over:
			return
		case <-tick.C:
		}
	}
}

// wayKey is the key of the machines whose way to the cloud a script has
// closed.
type wayKey struct{}

// way MACHINE out|in|both|open: packets of the machine to the control plane,
// or from it, are lost, while its peers are reached as before.
func way(ts *testscript.TestScript, neg bool, args []string) {
	if machines, ok := ts.Value(wayKey{}).(map[string]bool); ok && len(args) > 0 {
		machines[args[0]] = true
	}
	simple(2, func(ctx context.Context, args []string) (string, error) { return "", setWay(ctx, args[0], args[1]) })(ts, neg, args)
}

func setWay(ctx context.Context, machine, what string) error {
	host := lab.Topology().Host
	script := `nft delete table inet way 2>/dev/null || true`
	drops := map[string][]string{
		"open": nil,
		"out":  {"output ip daddr " + host},
		"in":   {"input ip saddr " + host},
		"both": {"output ip daddr " + host, "input ip saddr " + host},
	}
	rules, ok := drops[what]
	if !ok {
		return errors.New("a way is out, in, both or open")
	}
	for i, r := range rules {
		hook, match, _ := strings.Cut(r, " ")
		script += fmt.Sprintf(`
nft add table inet way
nft add chain inet way c%d '{ type filter hook %s priority -300; }'
nft add rule inet way c%d %s drop`, i, hook, i, match)
	}
	_, err := lab.Exec(ctx, machine, "sh", "-ec", script)
	return err
}

// managed N: yurt-manager has N replicas that are ready, and no other.
func managed(ctx context.Context, args []string) (string, error) {
	if _, err := lab.Kubectl(ctx, "scale", "deployment", "yurt-manager", "-n", "kube-system", "--replicas="+args[0]); err != nil {
		return "", err
	}
	if args[0] != "0" {
		return "", lab.WaitManager(ctx)
	}
	return "", lab.WaitPods(ctx, "kube-system", "app.kubernetes.io/name=yurt-manager", 0)
}

// led POOL: sets $leader and $follower to the pool's machines, once one leads.
func led(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
	defer cancel()
	var leader string
	ts.Check(poll(ctx, func() (err error) {
		leader, err = lab.Kubectl(ctx, "get", "nodepool", args[0], "-o", "jsonpath={.status.leaderEndpoints[0].nodeName}")
		if err == nil && leader == "" {
			err = fmt.Errorf("nobody leads %s", args[0])
		}
		return err
	}))
	for _, m := range lab.Topology().Machines {
		if m.Pool == args[0] && m.Name != leader {
			ts.Setenv("follower", m.Name)
		}
	}
	ts.Setenv("leader", leader)
}

// watchUnit watches Services at the hub of its machine. It ends with the watch,
// and nothing begins it anew.
const watchUnit = "watch-services"

// following MACHINE: watches Services at the machine's hub from now on.
func following(ctx context.Context, args []string) (string, error) {
	_, err := lab.Exec(ctx, args[0], "sh", "-ec", `
k="kubectl --kubeconfig /var/lib/kubelet/kubeconfig"
v=$($k get --raw '/api/v1/namespaces/default/services?resourceVersion=0' | sed -n 's/.*"metadata":{"resourceVersion":"\([0-9]*\)"},"items".*/\1/p')
systemd-run --unit=`+watchUnit+` sh -c "exec $k get --raw '/api/v1/namespaces/default/services?watch=true&resourceVersion=$v' > /run/`+watchUnit+`"`)
	return "", err
}

// changed NAME: the cloud has a new Service of that name.
func changed(ctx context.Context, args []string) (string, error) {
	return "", lab.Apply(ctx, `{apiVersion: v1, kind: Service, metadata: {name: follow-`+args[0]+`, namespace: default, labels: {follow: "true"}}, spec: {ports: [{port: 80}]}}`)
}

// sees MACHINE NAME...: the watch that began with following has shown these
// Services, each once and in this order, and goes on.
func sees(ctx context.Context, args []string) (string, error) {
	var want []string
	for _, name := range args[1:] {
		want = append(want, "follow-"+name)
	}
	return "", poll(ctx, func() error {
		out, err := lab.Exec(ctx, args[0], "sh", "-ec", "systemctl is-active -q "+watchUnit+"; cat /run/"+watchUnit)
		if err != nil {
			return fmt.Errorf("the watch has ended: %w", err)
		}
		var have []string
		for line := range strings.Lines(out) {
			var event struct {
				Type   string
				Object struct{ Metadata struct{ Name string } }
			}
			if err := json.Unmarshal([]byte(line), &event); err != nil {
				return fmt.Errorf("read %q: %w", line, err)
			}
			if event.Type == "ADDED" {
				have = append(have, event.Object.Metadata.Name)
			}
		}
		if !slices.Equal(have, want) {
			return fmt.Errorf("the watch has shown %v, want %v", have, want)
		}
		return nil
	})
}

// unfollowed MACHINE: ends the watch, and the Services go.
func unfollowed(ctx context.Context, args []string) (string, error) {
	if _, err := lab.Exec(ctx, args[0], "systemctl", "stop", watchUnit); err != nil {
		return "", err
	}
	return lab.Kubectl(ctx, "delete", "services", "-n", "default", "-l", "follow=true")
}
