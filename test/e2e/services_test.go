package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/yurt-edge/yurt/playground"
	"github.com/yurt-edge/yurt/playground/demo"
)

// lonely MACHINE NAME: a web server of that name, with an account and a Service
// of its own, bound to the machine as a scheduler would bind it.
func lonely(ctx context.Context, args []string) (string, error) {
	return "", lab.Apply(ctx, strings.NewReplacer("@NAME@", args[1], "@MACHINE@", args[0], "@IMAGE@", playground.WebImage).Replace(`
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
metadata: {name: @NAME@, namespace: default}
spec:
  selector: {lonely: @NAME@}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: @NAME@, namespace: default, labels: {lonely: @NAME@}}
spec:
  nodeName: @MACHINE@
  serviceAccountName: @NAME@
  terminationGracePeriodSeconds: 1
  tolerations: [{operator: Exists}]
  containers:
  - name: web
    image: @IMAGE@
    imagePullPolicy: IfNotPresent
    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1, failureThreshold: 2}
    env: [{name: POD_NAME, value: @NAME@}, {name: NODE_NAME, value: @MACHINE@}]
`))
}

// locally TEXT MACHINE ARGS...: kubectl on the machine prints the text at last.
func locally(ctx context.Context, args []string) (string, error) {
	return "", poll(ctx, func() error {
		out, err := lab.Exec(ctx, args[1], demo.LocalKubectl(args[2:]...)...)
		if err == nil && !strings.Contains(out, args[0]) {
			err = fmt.Errorf("kubectl %s on %s printed %q, not %q", strings.Join(args[2:], " "), args[1], out, args[0])
		}
		return err
	})
}

// follows MACHINE NAME true|false: what the machine's hub shows of the Service's
// one endpoint is the address that its pod has there, ready or not.
func follows(ctx context.Context, args []string) (string, error) {
	machine, name, want := args[0], args[1], args[2]
	var address string
	err := poll(ctx, func() error {
		out, err := lab.Exec(ctx, machine, demo.LocalKubectl("get", "pod", name, "-n", "default", "-o", "json")...)
		if err != nil {
			return err
		}
		pod := &corev1.Pod{}
		if err := json.Unmarshal([]byte(out), pod); err != nil {
			return fmt.Errorf("read pod %s: %w", name, err)
		}
		out, err = lab.Exec(ctx, machine, demo.LocalKubectl("get", "endpointslices", "-n", "default", "-l", "kubernetes.io/service-name="+name, "-o", "json")...)
		if err != nil {
			return err
		}
		list := &discoveryv1.EndpointSliceList{}
		if err := json.Unmarshal([]byte(out), list); err != nil {
			return fmt.Errorf("read slices of %s: %w", name, err)
		}
		if len(list.Items) != 1 || len(list.Items[0].Endpoints) != 1 {
			return fmt.Errorf("%s has other slices than one with one endpoint: %s", name, out)
		}
		e := list.Items[0].Endpoints[0]
		address = e.Addresses[0]
		if address != pod.Status.PodIP || fmt.Sprint(*e.Conditions.Ready) != want {
			return fmt.Errorf("%s is at %s, its endpoint at %s, ready %v, want %s", name, pod.Status.PodIP, address, *e.Conditions.Ready, want)
		}
		return nil
	})
	return address + "\n", err
}

// reaches MACHINE NAME: the Service answers on the machine at its own address,
// by way of the machine's kube-proxy.
func reaches(ctx context.Context, args []string) (string, error) {
	address, err := lab.Kubectl(ctx, "get", "service", args[1], "-n", "default", "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		return "", err
	}
	var out string
	err = poll(ctx, func() error {
		out, err = lab.Exec(ctx, args[0], "curl", "-sf", "--max-time", "2", "http://"+strings.TrimSpace(address)+"/")
		return err
	})
	return out, err
}

// signal MACHINE NAME SIGNAL: to the web server of that name.
func signal(ctx context.Context, args []string) (string, error) {
	return lab.Exec(ctx, args[0], "sh", "-c",
		`for p in $(pgrep -x web); do if grep -qz '^POD_NAME=`+args[1]+`$' /proc/$p/environ; then kill -`+args[2]+` $p && echo $p; fi; done | grep .`)
}

// tokenOf is a shell command that prints a pod's own token, as its volume has
// it on the machine.
func tokenOf(ctx context.Context, machine, pod string) (string, error) {
	uid, err := lab.Exec(ctx, machine, demo.LocalKubectl("get", "pod", pod, "-n", "default", "-o", "jsonpath={.metadata.uid}")...)
	if err != nil {
		return "", err
	}
	return "cat /var/lib/kubelet/pods/" + strings.TrimSpace(uid) + "/volumes/kubernetes.io~projected/*/token", nil
}

// curlHub asks the hub at the address that pods use, with the token that the
// shell command prints.
const curlHub = `curl -sS --max-time 5 --cacert /var/lib/yurthub/pki/ca-bundle.crt -w '\n%{http_code}\n' -H @- https://169.254.2.1:10268`

// podasks MACHINE POD PATH: with the pod's own token.
func podAsks(ctx context.Context, args []string) (string, error) {
	token, err := tokenOf(ctx, args[0], args[1])
	if err != nil {
		return "", err
	}
	return lab.Exec(ctx, args[0], "sh", "-c", `echo "Authorization: Bearer $(`+token+`)" | `+curlHub+`'`+args[2]+`'`)
}

// accountasks MACHINE NAME PATH: with a token that the cloud makes now for the
// pod of that name, which need not run yet.
func accountAsks(ctx context.Context, args []string) (string, error) {
	token, err := lab.Kubectl(ctx, "create", "token", args[1], "-n", "default", "--bound-object-kind=Pod", "--bound-object-name="+args[1])
	if err != nil {
		return "", err
	}
	cmd, err := lab.ExecCommand(ctx, args[0], "sh", "-c", curlHub+`'`+args[2]+`'`)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout = strings.NewReader("Authorization: Bearer "+strings.TrimSpace(token)), &out
	err = cmd.Run()
	return out.String(), err
}

// tokenis MACHINE POD node|cloud: who made the token that the pod has, at last.
func tokenIs(ctx context.Context, args []string) (string, error) {
	token, err := tokenOf(ctx, args[0], args[1])
	if err != nil {
		return "", err
	}
	return "", poll(ctx, func() error {
		out, err := lab.Exec(ctx, args[0], "sh", "-c", token+` | cut -d. -f2 | tr '_-' '/+' | base64 -d 2>/dev/null | grep -o '"iss":"[^"]*"'`)
		if err == nil && strings.Contains(out, ".yurthub.local") != (args[2] == "node") {
			err = fmt.Errorf("the token of %s is from %s", args[1], out)
		}
		return err
	})
}

// inside MACHINE POD URL WANT: from within the pod, with its own variables,
// token and authority, the URL gives that at last: the beginning of status,
// address and port.
func inside(ctx context.Context, args []string) (string, error) {
	script := `P=$(for p in $(pgrep -x 'web|client'); do tr '\0' '\n' </proc/$p/environ | grep -qx HOSTNAME=` + args[1] + ` && echo $p; done)
export $(tr '\0' '\n' </proc/$P/environ | grep ^KUBERNETES_SERVICE_)
R=/proc/$P/root/var/run/secrets/kubernetes.io/serviceaccount
echo "Authorization: Bearer $(cat $R/token)" | nsenter -t $P -n curl -sS --max-time 5 -o /dev/null -H @- --cacert $R/ca.crt \
  -w '%{http_code} %{remote_ip} %{remote_port}' "` + args[2] + `"`
	return "", poll(ctx, func() error {
		out, err := lab.Exec(ctx, args[0], "sh", "-c", script)
		if err == nil && !strings.HasPrefix(out, args[3]) {
			err = fmt.Errorf("%s gives %q, not %q", args[2], out, args[3])
		}
		return err
	})
}
