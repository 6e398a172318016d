// Package playground runs a real Kubernetes cluster with real edge machines on
// one Linux machine: the demo, the development loop and the test bed are this
// one library.
//
// A control plane (etcd, kube-apiserver, kube-controller-manager and
// kube-scheduler, built from their Go modules) runs as ordinary processes; see
// [StartControlPlane], which works without root and without machines. Machines
// are systemd-nspawn containers that boot Debian with systemd, containerd,
// kubelet and kube-proxy behind the router of their pool; see [Up].
//
// A playground leaves nothing behind: every process dies with its owner, and
// [Down] removes what is left of a playground whose owner was killed. Its data
// is disposable by design: no file is synced, and every [Up] starts an empty
// cluster.
package playground
