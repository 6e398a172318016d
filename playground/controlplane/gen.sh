#!/bin/sh
# Writes go.mod for the versions below. k8s.io/kubernetes replaces its staging
# modules by folders of its own repository, which do not exist for a module
# that requires it, so each of them is replaced by its published twin.
# Run it after changing a version, then commit go.mod and go.sum.
set -eu
kube=1.36.3
etcd=3.7.3
cd "$(dirname "$0")"

mod=$(go mod download -json "k8s.io/kubernetes@v$kube" | sed -n 's/.*"GoMod": "\(.*\)",*/\1/p')
staging=$(sed -n 's|^	*\(k8s.io/[a-z0-9-]*\) => ./staging.*|\1|p' "$mod" | grep -v /sample-)
{
	echo "module github.com/yurt-edge/yurt/playground/controlplane"
	echo
	sed -n 's/^go /&/p' "$mod"
	echo
	echo "require ("
	echo "	k8s.io/kubernetes v$kube"
	echo "	go.etcd.io/etcd/server/v3 v$etcd"
	echo ")"
	echo
	echo "replace ("
	for m in $staging; do
		echo "	$m => $m v0.${kube#1.}"
	done
	echo ")"
} >go.mod
go mod tidy
