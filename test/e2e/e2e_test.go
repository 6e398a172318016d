package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/demo"
	"github.com/yurt-edge/yurt/playground/network"
)

// stepBudget bounds every wait of a script.
const stepBudget = 2 * time.Minute

var lab *playground.Playground // set once by TestMain, before any test

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "yurt-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	topology, err := playground.DefaultTopology()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	lab, err = playground.Up(ctx, playground.Config{
		Dir: dir, Topology: topology, Wait: true, Progress: playground.NewProgress(os.Stdout),
		ControllerManagerFlags: []string{"--node-monitor-grace-period=" + gracePeriod},
		ManagerValues:          map[string]any{"nodeMonitorGracePeriod": gracePeriod},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err, playground.Hint(err))
		return 1
	}
	defer func() {
		if err := lab.Stop(context.WithoutCancel(ctx)); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	if err := demo.Deploy(ctx, lab); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := loadClient(ctx, dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// TestCuts runs one script for both kinds of cut, each restart and each
// moment of it. Machines take their share at the same time.
func TestCuts(t *testing.T) {
	machines := edgeMachines()
	share := map[string][]map[string]string{}
	n := 0
	for _, mode := range []string{"down", "blackhole"} {
		for _, what := range []string{"kubelet", "containerd", "yurthub", "machine"} {
			for _, when := range []string{"before", "during", "after"} {
				node := machines[n%len(machines)]
				n++
				share[node] = append(share[node], map[string]string{"node": node, "mode": mode, "what": what, "when": when})
			}
		}
	}
	for _, node := range machines {
		t.Run(node, func(t *testing.T) {
			t.Parallel()
			for _, vars := range share[node] {
				t.Run(fmt.Sprintf("%s cut, %s restarted %s", vars["mode"], vars["what"], vars["when"]), func(t *testing.T) {
					testscript.Run(t, params("testdata/cuts", vars))
				})
			}
		})
	}
}

// TestScenarios runs every script of testdata, one after the other: they share
// machines and cut the links of whole pools.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("scripts: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			p := params("", nil)
			p.Files = []string{file}
			testscript.Run(t, p)
		})
	}
}

func edgeMachines() []string {
	var out []string
	for _, m := range lab.Topology().Machines {
		if m.Hub {
			out = append(out, m.Name)
		}
	}
	return out
}

func params(dir string, vars map[string]string) testscript.Params {
	return testscript.Params{
		Dir: dir,
		Setup: func(env *testscript.Env) error {
			for _, name := range slices.Sorted(maps.Keys(vars)) {
				env.Setenv(name, vars[name])
			}
			targets := map[string]bool{}
			env.Values[targetsKey{}] = targets
			ways := map[string]bool{}
			env.Values[wayKey{}] = ways
			env.Defer(func() {
				// Whatever a script did to its links, the next one finds
				// them whole.
				ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
				defer cancel()
				for target := range targets {
					if err := lab.Heal(ctx, target); err != nil {
						fmt.Fprintln(os.Stderr, "heal", target, err)
					}
				}
				for machine := range ways {
					if err := setWay(ctx, machine, "open"); err != nil {
						fmt.Fprintln(os.Stderr, "open the way of", machine, err)
					}
				}
			})
			return nil
		},
		Condition: func(cond string) (bool, error) {
			// [is:WANT:HAVE], for scripts that are run with variables.
			parts := strings.Split(cond, ":")
			if len(parts) != 3 || parts[0] != "is" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return vars[parts[1]] == parts[2], nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"cut":      cut,
			"heal":     simple(1, func(ctx context.Context, a []string) (string, error) { return "", lab.Heal(ctx, a[0]) }),
			"poweroff": simple(1, func(ctx context.Context, a []string) (string, error) { return "", lab.PowerOff(ctx, a[0]) }),
			"poweron":  simple(1, func(ctx context.Context, a []string) (string, error) { return "", lab.PowerOn(ctx, a[0]) }),
			"restart":  simple(2, restart),
			"sigkill":  simple(2, sigkill),
			"on":       simple(2, func(ctx context.Context, a []string) (string, error) { return lab.Exec(ctx, a[0], a[1:]...) }),
			"kubectl":  simple(1, func(ctx context.Context, a []string) (string, error) { return lab.Kubectl(ctx, a...) }),
			"hubctl": simple(2, func(ctx context.Context, a []string) (string, error) {
				return lab.Exec(ctx, a[0], "sh", "-c", quote(demo.LocalKubectl(a[1:]...))+" 2>&1")
			}),
			"operator":    simple(2, operator),
			"forwarded":   simple(2, forwarded),
			"inpod":       simple(2, inPod),
			"load":        simple(2, load),
			"serving":     simple(1, serving),
			"lonely":      simple(2, lonely),
			"locally":     simple(3, locally),
			"follows":     simple(3, follows),
			"reaches":     simple(2, reaches),
			"signal":      simple(3, signal),
			"podasks":     simple(3, podAsks),
			"inside":      simple(4, inside),
			"tokenis":     simple(3, tokenIs),
			"accountasks": simple(3, accountAsks),
			"settled":     simple(1, settled),
			"nodeis":      simple(2, nodeIs),
			"waitlocal":   simple(2, waitLocal),
			"eventually":  simple(1, eventually),
			"printed":     simple(3, printed),
			"roaming":     simple(2, roaming),
			"moved":       simple(2, moved),
			"managed":     simple(1, managed),
			"following":   simple(1, following),
			"changed":     simple(1, changed),
			"sees":        simple(2, sees),
			"unfollowed":  simple(1, unfollowed),
			"client":      simple(2, client),
			"within":      simple(3, within),
			"resolves":    simple(4, resolves),
			"asked":       simple(3, asked),
			"near":        simple(2, near),
			"hits":        simple(5, hits),
			"moves":       simple(2, moves),
			"addressof":   addressOf,
			"outside":     outside,
			"crowd":       simple(3, crowd),
			"hubflags":    simple(1, hubFlags),
			"doomed":      simple(1, doomed),
			"waits":       simple(3, waits),
			"turns":       simple(3, turns),
			"led":         led,
			"whereis":     whereIs,
			"stay":        stay,
			"way":         way,
			"remember":    remember,
			"untouched":   untouched,
		},
	}
}

// simple makes a script command of a function that returns its output.
func simple(least int, run func(context.Context, []string) (string, error)) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if len(args) < least {
			ts.Fatalf("want at least %d arguments", least)
		}
		ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
		defer cancel()
		start := time.Now()
		out, err := run(ctx, args)
		_, _ = fmt.Fprint(ts.Stdout(), out)
		ts.Logf("(%.1f s)", time.Since(start).Seconds())
		switch {
		case err != nil && !neg:
			ts.Fatalf("%v", err)
		case err == nil && neg:
			ts.Fatalf("unexpected success")
		case err != nil:
			_, _ = fmt.Fprint(ts.Stderr(), err)
		}
	}
}

func quote(args []string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

// targetsKey is the key of the targets that a script has cut.
type targetsKey struct{}

// cut is the command cut TARGET [down|blackhole].
func cut(ts *testscript.TestScript, neg bool, args []string) {
	if targets, ok := ts.Value(targetsKey{}).(map[string]bool); ok && len(args) > 0 {
		targets[args[0]] = true
	}
	simple(1, func(ctx context.Context, args []string) (string, error) {
		mode := network.Blackhole
		if len(args) > 1 {
			mode = network.Mode(args[1])
		}
		return "", lab.Cut(ctx, args[0], mode)
	})(ts, neg, args)
}

// restart is the command restart MACHINE UNIT|machine.
func restart(ctx context.Context, args []string) (string, error) {
	if args[1] != "machine" {
		return lab.Exec(ctx, args[0], "systemctl", "restart", args[1])
	}
	if err := lab.PowerOff(ctx, args[0]); err != nil {
		return "", err
	}
	return "", lab.PowerOn(ctx, args[0])
}

// sigkill MACHINE UNIT: its main process, with no warning.
func sigkill(ctx context.Context, args []string) (string, error) {
	return lab.Exec(ctx, args[0], "systemctl", "kill", "--signal=KILL", "--kill-who=main", args[1])
}

// operatorConfig is a kubeconfig on a machine by which an operator, a cluster
// admin with a ServiceAccount token, talks to the machine's hub.
const operatorConfig = "/run/operator.kubeconfig"

// operators puts operatorConfig onto the machine.
func operators(ctx context.Context, machine string) error {
	err := lab.Apply(ctx, `
apiVersion: v1
kind: ServiceAccount
metadata: {name: operator, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: operator}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: ServiceAccount, name: operator, namespace: kube-system}]
`)
	if err != nil {
		return err
	}
	token, err := lab.Kubectl(ctx, "create", "token", "operator", "-n", "kube-system")
	if err != nil {
		return err
	}
	text, err := clientcmd.Write(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{"hub": {
			Server: "https://127.0.0.1:10268", CertificateAuthority: "/var/lib/yurthub/pki/ca-bundle.crt",
		}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"operator": {Token: strings.TrimSpace(token)}},
		Contexts:       map[string]*clientcmdapi.Context{"hub": {Cluster: "hub", AuthInfo: "operator"}},
		CurrentContext: "hub",
	})
	if err != nil {
		return err
	}
	// Through standard input: an error quotes a command line.
	cmd, err := lab.ExecCommand(ctx, machine, "sh", "-c", "umask 077; cat > "+operatorConfig)
	if err != nil {
		return err
	}
	cmd.Stdin = bytes.NewReader(text)
	return cmd.Run()
}

// onMachine takes the machine's name from the arguments, and the wish for
// SPDY, in which kubectl then upgrades connections in place of WebSocket.
func onMachine(ctx context.Context, args []string) (machine, env string, rest []string, err error) {
	if args[0] == "spdy" {
		env = "export KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false KUBECTL_PORT_FORWARD_WEBSOCKETS=false; "
		args = args[1:]
	}
	return args[0], env, args[1:], operators(ctx, args[0])
}

// operator [spdy] MACHINE ARGS...: kubectl on the machine through its hub.
func operator(ctx context.Context, args []string) (string, error) {
	machine, env, args, err := onMachine(ctx, args)
	if err != nil {
		return "", err
	}
	return lab.Exec(ctx, machine, "sh", "-c", env+"kubectl --kubeconfig "+operatorConfig+" "+quote(args)+" 2>&1")
}

// forwarded [spdy] MACHINE TARGET: a port-forward through the hub to a web
// server answers.
func forwarded(ctx context.Context, args []string) (string, error) {
	machine, env, args, err := onMachine(ctx, args)
	if err != nil {
		return "", err
	}
	// The forwarder says when it listens; that line is waited for.
	return lab.Exec(ctx, machine, "bash", "-c", env+
		`exec 3< <(exec kubectl --kubeconfig `+operatorConfig+` port-forward `+args[0]+` 18080:8080 2>&1); `+
		`read -t 20 -u 3 line; echo "$line"; curl -sf --max-time 5 http://127.0.0.1:18080/; rc=$?; kill $!; exit $rc`)
}

// inPod MACHINE ARGS...: the web program with these arguments inside a web pod
// of the machine. The machine does it by itself: the cloud may be away.
func inPod(ctx context.Context, args []string) (string, error) {
	return lab.Exec(ctx, args[0], "sh", "-c", `nsenter -t $(pgrep -x web | head -1) -m -n /web `+quote(args[1:])+` 2>&1`)
}

// load MACHINE N: N lists through the hub at the same time, again and again,
// by the unit "load". Errors are allowed, for hubs that die.
func load(ctx context.Context, args []string) (string, error) {
	machine, _, args, err := onMachine(ctx, args)
	if err != nil {
		return "", err
	}
	_, err = lab.Exec(ctx, machine, "systemd-run", "--unit=load", "bash", "-c",
		`while :; do for i in $(seq `+args[0]+`); do kubectl --kubeconfig `+operatorConfig+
			` get pods -A --request-timeout=3s >/dev/null 2>&1 & done; wait; done`)
	return "", err
}

// serving MACHINE: all web servers of the machine answer, from within it.
func serving(ctx context.Context, args []string) (string, error) {
	count := 0
	err := poll(ctx, func() (err error) {
		// As the machine's own API tells, which may be cut off.
		pods, err := demo.LocalPods(ctx, lab, args[0])
		if err == nil && len(pods) == 0 {
			err = fmt.Errorf("no web server is on %s", args[0])
		}
		count = len(pods)
		return err
	})
	if err != nil {
		return "", err
	}
	return "", demo.AwaitServing(ctx, lab, args[0], count, time.Time{})
}

// settled MACHINE: the machine's hub is online and holds what the next outage
// will need.
func settled(ctx context.Context, args []string) (string, error) {
	if err := operators(ctx, args[0]); err != nil {
		return "", err
	}
	return "", poll(ctx, func() error {
		out, err := lab.Exec(ctx, args[0], "sh", "-c", `curl -sf --max-time 3 -H "Authorization: Bearer $(sed -n 's/ *token: //p' `+
			operatorConfig+`)" http://127.0.0.1:10267/v1/status`)
		if err != nil {
			return err
		}
		var report struct {
			Online, Discovery bool
			Scopes            []struct {
				Scope          string
				Synced, Stored bool
			}
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			return err
		}
		if !report.Online || !report.Discovery {
			return fmt.Errorf("hub of %s is not ready for an outage", args[0])
		}
		// The web pods mount this ConfigMap, so the kubelet follows it once it
		// has found the hub again, which may take it half a minute.
		for _, needed := range []string{"/v1/pods?fields=spec.nodeName", "kube-root-ca.crt&namespace=default"} {
			held := slices.ContainsFunc(report.Scopes, func(s struct {
				Scope          string
				Synced, Stored bool
			},
			) bool {
				return s.Synced && s.Stored && strings.Contains(s.Scope, needed)
			})
			if !held {
				return fmt.Errorf("hub of %s does not hold %s", args[0], needed)
			}
		}
		return nil
	})
}

// nodeis MACHINE True|False|Unknown: the node's Ready condition in the cloud.
func nodeIs(ctx context.Context, args []string) (string, error) {
	return "", poll(ctx, func() error {
		out, err := lab.Kubectl(ctx, "get", "node", args[0], "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && strings.TrimSpace(out) != args[1] {
			err = fmt.Errorf("node %s is %s, want %s", args[0], out, args[1])
		}
		return err
	})
}

// waitlocal MACHINE STATUS [CONDITION]: the node's condition, Ready if none is
// named, as the machine's own hub shows it.
func waitLocal(ctx context.Context, args []string) (string, error) {
	typ := "Ready"
	if len(args) > 2 {
		typ = args[2]
	}
	return "", poll(ctx, func() error {
		out, err := lab.Exec(ctx, args[0], demo.LocalKubectl("get", "node", args[0],
			"-o", `jsonpath={.status.conditions[?(@.type=="`+typ+`")].status}`)...)
		if err == nil && strings.TrimSpace(out) != args[1] {
			err = fmt.Errorf("node %s says of itself %q, want %s", args[0], out, args[1])
		}
		return err
	})
}

// eventually TEXT COMMAND...: kubectl in the cloud prints the text at last.
func eventually(ctx context.Context, args []string) (string, error) {
	return "", poll(ctx, func() error {
		out, err := lab.Kubectl(ctx, args[1:]...)
		if err == nil && !strings.Contains(out, args[0]) {
			err = fmt.Errorf("kubectl %s printed %q, not %q", strings.Join(args[1:], " "), out, args[0])
		}
		return err
	})
}

// printed TEXT MACHINE COMMAND...: the command prints the text at last,
// whatever its exit code.
func printed(ctx context.Context, args []string) (string, error) {
	return "", poll(ctx, func() error {
		out, err := lab.Exec(ctx, args[1], args[2:]...)
		if !strings.Contains(out, args[0]) {
			return fmt.Errorf("%s printed %q, not %q (%w)", strings.Join(args[2:], " "), out, args[0], err)
		}
		return nil
	})
}

func poll(ctx context.Context, ready func() error) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		err := ready()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // not that of a command that was broken off
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited in vain: %w", last)
		case <-tick.C:
		}
	}
}

// remember FILE MACHINE...: the containers of these machines.
func remember(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(containers(ts, args[1:])), 0o600))
}

// untouched FILE MACHINE... [+N]: the same containers, each restarted N times
// more at the end.
func untouched(ts *testscript.TestScript, _ bool, args []string) {
	text, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	machines := args[1:]
	more := 0
	if last := machines[len(machines)-1]; strings.HasPrefix(last, "+") {
		more, err = strconv.Atoi(last)
		ts.Check(err)
		machines = machines[:len(machines)-1]
	}
	want := strings.Split(string(text), "\n")
	ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
	defer cancel()
	err = poll(ctx, func() error {
		have := strings.Split(containers(ts, machines), "\n")
		if more == 0 {
			if !slices.Equal(have, want) {
				return fmt.Errorf("containers were\n%s\nand are\n%s", strings.Join(want, "\n"), strings.Join(have, "\n"))
			}
			return nil
		}
		return restarted(want, have, more)
	})
	ts.Check(err)
}

// restarted compares names and restart counts; ids are new after a restart.
func restarted(want, have []string, more int) error {
	if len(want) != len(have) {
		return fmt.Errorf("%d containers, were %d", len(have), len(want))
	}
	for i := range want {
		var nameA, idA, nameB, idB string
		var a, b int
		if _, err := fmt.Sscan(want[i], &nameA, &idA, &a); err != nil {
			return fmt.Errorf("read %q: %w", want[i], err)
		}
		if _, err := fmt.Sscan(have[i], &nameB, &idB, &b); err != nil {
			return fmt.Errorf("read %q: %w", have[i], err)
		}
		if nameA != nameB || b != a+more {
			return fmt.Errorf("%s had %d restarts; %s has %d, want %d", nameA, a, nameB, b, a+more)
		}
	}
	return nil
}

// containers lists the web servers' containers on the machines: name, id and
// restarts, one a line.
func containers(ts *testscript.TestScript, machines []string) string {
	ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
	defer cancel()
	var lines []string
	for _, m := range machines {
		pods, err := demo.Pods(ctx, lab, m)
		ts.Check(err)
		for _, pod := range pods {
			for _, c := range pod.Status.ContainerStatuses {
				lines = append(lines, fmt.Sprintf("%s/%s/%s %s %d", m, pod.Name, c.Name, filepath.Base(c.ContainerID), c.RestartCount))
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
