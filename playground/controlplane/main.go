// Command controlplane is the Kubernetes of the playground in one binary: etcd,
// kube-apiserver, kube-controller-manager, kube-scheduler, kubectl, kubelet and
// kube-proxy, chosen by the name it is started under or by its first argument.
//
// It is a module of its own because k8s.io/kubernetes needs a replace for each
// of its staging modules, which must not leak into the module of Yurt.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectlcli "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	os.Exit(run())
}

func run() int {
	name := filepath.Base(os.Args[0])
	if !slices.Contains(names(), name) {
		if len(os.Args) < 2 || !slices.Contains(names(), os.Args[1]) {
			fmt.Fprintf(os.Stderr, "usage: %s %s [flags]\n", name, strings.Join(names(), "|"))
			return 2
		}
		name = os.Args[1]
		os.Args = os.Args[1:]
	}
	switch name {
	case "etcd":
		etcdmain.Main(os.Args)
		return 0
	case "kubectl":
		cmd := kubectlcli.NewDefaultKubectlCommand()
		if err := cli.RunNoErrOutput(cmd); err != nil {
			kubectlutil.CheckErr(err)
		}
		return 0
	}
	return cli.Run(commands()[name]())
}

// commands are built on demand: to make one registers its flags and metrics,
// which must not meet those of another.
func commands() map[string]func() *cobra.Command {
	return map[string]func() *cobra.Command{
		"kube-apiserver":          apiserver.NewAPIServerCommand,
		"kube-controller-manager": controllermanager.NewControllerManagerCommand,
		"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
		"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
		"kube-proxy":              proxy.NewProxyCommand,
	}
}

func names() []string {
	all := []string{"etcd", "kubectl"}
	for name := range commands() {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}
