package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
	"github.com/rogpeppe/go-internal/testscript"
	corev1 "k8s.io/api/core/v1"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/demo"
)

// clientImage has test/e2e/client, which no playground has by itself.
const clientImage = "yurt.local/client:1"

// loadClient builds the client and gives its image to all machines.
func loadClient(ctx context.Context, dir string) error {
	program, archive := filepath.Join(dir, "client"), filepath.Join(dir, "client.tar")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./client")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build test/e2e/client: %w\n%s", err, out)
	}
	if err := playground.WriteImage(archive, clientImage, program); err != nil {
		return err
	}
	_, err := lab.LoadImage(ctx, archive)
	return err
}

// client [host] MACHINE NAME [DNSNAME...]: a pod of that name, on the
// machine's own network if so wished, that asks for the DNS names from its
// start on. It has an account that may read pods, a Service NAME and a headless
// one, NAME-each. The machine's kubectl is in it.
func client(ctx context.Context, args []string) (string, error) {
	network := ""
	if args[0] == "host" {
		network, args = "  hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet\n", args[1:]
	}
	command, err := json.Marshal(append([]string{"serve"}, args[2:]...))
	if err != nil {
		return "", err
	}
	err = lab.Apply(ctx, strings.NewReplacer("@NAME@", args[1], "@MACHINE@", args[0], "@IMAGE@", clientImage, "@ARGS@", string(command), "@NETWORK@\n", network).Replace(`
apiVersion: v1
kind: ServiceAccount
metadata: {name: @NAME@, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: @NAME@, namespace: default}
rules: [{apiGroups: [""], resources: [pods], verbs: [get, list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: @NAME@, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: @NAME@}
subjects: [{kind: ServiceAccount, name: @NAME@, namespace: default}]
---
apiVersion: v1
kind: Service
metadata: {name: @NAME@, namespace: default, labels: {client: @NAME@}}
spec: {selector: {client: @NAME@}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: @NAME@-each, namespace: default, labels: {client: @NAME@}}
spec: {clusterIP: None, selector: {client: @NAME@}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: @NAME@, namespace: default, labels: {client: @NAME@}}
spec:
@NETWORK@
  nodeName: @MACHINE@
  serviceAccountName: @NAME@
  terminationGracePeriodSeconds: 1
  tolerations: [{operator: Exists}]
  volumes: [{name: kubectl, hostPath: {path: /usr/local/bin/kubectl, type: File}}]
  containers:
  - name: client
    image: @IMAGE@
    imagePullPolicy: IfNotPresent
    args: @ARGS@
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    volumeMounts: [{name: kubectl, mountPath: /kubectl, readOnly: true}]
`))
	return "", err
}

// ownPod returns a pod as the machine's own API shows it.
func ownPod(ctx context.Context, machine, name string) (*corev1.Pod, error) {
	out, err := lab.Exec(ctx, machine, demo.LocalKubectl("get", "pod", name, "-n", "default", "-o", "json")...)
	if err != nil {
		return nil, err
	}
	pod := &corev1.Pod{}
	if err := json.Unmarshal([]byte(out), pod); err != nil {
		return nil, fmt.Errorf("read pod %s: %w", name, err)
	}
	return pod, nil
}

// within MACHINE POD COMMAND...: in the pod's container, as its own programs
// run there. The machine does it by itself: the cloud may be away.
func within(ctx context.Context, args []string) (string, error) {
	var id string
	err := poll(ctx, func() error {
		pod, err := ownPod(ctx, args[0], args[1])
		if err != nil {
			return err
		}
		if len(pod.Status.ContainerStatuses) != 1 || pod.Status.ContainerStatuses[0].State.Running == nil {
			return fmt.Errorf("%s does not run", args[1])
		}
		id = strings.TrimPrefix(pod.Status.ContainerStatuses[0].ContainerID, "containerd://")
		return nil
	})
	if err != nil {
		return "", err
	}
	return lab.Exec(ctx, args[0], append([]string{"ctr", "-n", "k8s.io", "tasks", "exec", "--exec-id", "e2e", id}, args[2:]...)...)
}

// addressOf VAR MACHINE POD: sets $VAR to the address of the pod as the
// machine's own API shows it, once it is ready.
func addressOf(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
	defer cancel()
	ts.Check(poll(ctx, func() error {
		pod, err := ownPod(ctx, args[1], args[2])
		if err != nil {
			return err
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				ts.Setenv(args[0], pod.Status.PodIP)
				return nil
			}
		}
		return fmt.Errorf("%s is not ready", args[2])
	}))
}

// resolves MACHINE POD NAME ADDRESS: within the pod, the name has that address
// at last and no other.
func resolves(ctx context.Context, args []string) (string, error) {
	return "", poll(ctx, func() error {
		out, err := within(ctx, []string{args[0], args[1], "/client", "lookup", args[2]})
		if have := strings.TrimSpace(out); err == nil && have != args[3] {
			err = fmt.Errorf("%s is at %q, want %q", args[2], have, args[3])
		}
		return err
	})
}

// asked [lost] MACHINE POD N: the client has N answers more than now, at last,
// and never had another than the right one. None was lost, unless that is
// allowed.
func asked(ctx context.Context, args []string) (string, error) {
	lost := args[0] == "lost"
	if lost {
		args = args[1:]
	}
	least, err := strconv.Atoi(args[2])
	if err != nil {
		return "", err
	}
	var out string
	var tally struct{ Answered, Servfail, Wrong, Lost int }
	before := -1
	err = poll(ctx, func() error {
		pod, err := ownPod(ctx, args[0], args[1])
		if err != nil {
			return err
		}
		if out, err = lab.Exec(ctx, args[0], "curl", "-sf", "--max-time", "2", "http://"+net.JoinHostPort(pod.Status.PodIP, "8080")+"/"); err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &tally); err != nil {
			return fmt.Errorf("read %q: %w", out, err)
		}
		if before < 0 {
			before = tally.Answered
		}
		if tally.Answered < before+least {
			return fmt.Errorf("want %d answers more than %d, have %s", least, before, out)
		}
		return nil
	})
	if err == nil && (tally.Servfail+tally.Wrong > 0 || tally.Lost > 0 && !lost) {
		err = fmt.Errorf("of names that are there, %s", out)
	}
	return out, err
}

// near NAME KEY: a Service of all web servers with openyurt.io/topologyKeys.
func near(ctx context.Context, args []string) (string, error) {
	return "", lab.Apply(ctx, strings.NewReplacer("@NAME@", args[0], "@KEY@", args[1]).Replace(`
apiVersion: v1
kind: Service
metadata: {name: @NAME@, namespace: default, annotations: {openyurt.io/topologyKeys: @KEY@}}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`))
}

// hits MACHINE POD SERVICE N WANT...: of N requests from within the pod all are
// answered, at last, by each of the web servers of the machines WANT, and by no
// other from the moment on that these are known.
func hits(ctx context.Context, args []string) (string, error) {
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return "", err
	}
	var want []string
	for _, machine := range args[4:] {
		pods, err := demo.Pods(ctx, lab, machine)
		if err != nil {
			return "", err
		}
		for i := range pods {
			want = append(want, pods[i].Name)
		}
	}
	slices.Sort(want)
	count := func(n int) (out string, have map[string]int, err error) {
		out, err = within(ctx, []string{args[0], args[1], "/client", "hits", args[2] + ".default.svc.cluster.local.", strconv.Itoa(n)})
		have = map[string]int{}
		var names []string
		for line := range strings.Lines(out) {
			var name string
			var times int
			if _, err := fmt.Sscan(line, &name, &times); err != nil {
				return out, nil, fmt.Errorf("read %q: %w", line, err)
			}
			have[name] = times
			names = append(names, name)
		}
		if err == nil && !slices.Equal(names, want) {
			err = fmt.Errorf("%s was answered by\n%swant %v", args[2], out, want)
		}
		return out, have, err
	}
	for {
		// kube-proxy takes its time with what it is told.
		if err := poll(ctx, func() error { _, _, err := count(20 * len(want)); return err }); err != nil {
			return "", err
		}
		out, have, err := count(n)
		for name, times := range have {
			if !slices.Contains(want, name) {
				return out, fmt.Errorf("%s is not of %v: %w", name, want, err)
			}
			if err == nil && times*len(want)*2 < n {
				err = fmt.Errorf("%s has too few of %d requests:\n%s", name, n, out)
			}
		}
		// After a cut the cloud may take those of another node for not ready,
		// for as long as its kubelet needs to say otherwise.
		if err == nil || ctx.Err() != nil {
			return out, err
		}
	}
}

// outside MACHINE: the machine's name server is one on the WAN, until the
// script ends or the machine boots. It knows the names below "example".
func outside(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), stepBudget)
	defer cancel()
	conn, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp", net.JoinHostPort(lab.Topology().Host, "53"))
	ts.Check(err)
	server := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		name := q.Question[0].Name
		switch {
		case !dns.IsSubDomain("example.", name):
			m.Rcode = dns.RcodeNameError
		case q.Question[0].Qtype == dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1},
				A:   net.IPv4(192, 0, 2, 80),
			})
		}
		_ = w.WriteMsg(m) // who gets none asks again
	})}
	done := make(chan error, 1)
	go func() { done <- server.ActivateAndServe() }()
	ts.Defer(func() {
		_ = server.Shutdown()
		<-done
	})
	_, err = lab.Exec(ctx, args[0], "sh", "-c", "echo nameserver "+lab.Topology().Host+" > /etc/resolv.conf")
	ts.Check(err)
}

// moves MACHINE POOL: the node is of that pool from now on.
func moves(ctx context.Context, args []string) (string, error) {
	return lab.Kubectl(ctx, "label", "node", args[0], "--overwrite", "apps.openyurt.io/nodepool="+args[1])
}
