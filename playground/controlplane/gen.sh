#!/bin/sh
# Writes a module file for each version of Kubernetes below: go.mod for that of
# the playground, kubernetes-X.Y.mod for those that tests of skew build beside
# it. k8s.io/kubernetes replaces its staging modules by folders of its own
# repository, which do not exist for a module that requires it, so each of them
# is replaced by its published twin.
# Run it after changing a version, then commit the .mod and .sum files.
set -eu
cd "$(dirname "$0")"

# write FILE KUBERNETES ETCD
write() {
	mod=$(go mod download -json "k8s.io/kubernetes@v$2" | sed -n 's/.*"GoMod": "\(.*\)",*/\1/p')
	staging=$(sed -n 's|^	*\(k8s.io/[a-z0-9-]*\) => ./staging.*|\1|p' "$mod" | grep -v /sample-)
	{
		echo "module github.com/yurt-edge/yurt/playground/controlplane"
		echo
		sed -n 's/^go /&/p' "$mod"
		echo
		echo "require ("
		echo "	k8s.io/kubernetes v$2"
		echo "	go.etcd.io/etcd/server/v3 v$3"
		echo ")"
		echo
		echo "replace ("
		for m in $staging; do
			echo "	$m => $m v0.${2#1.}"
		done
		echo ")"
	} >"$1"
	go mod tidy -modfile="$1"
}

write go.mod 1.36.3 3.7.3
write kubernetes-1.35.mod 1.35.4 3.6.8
write kubernetes-1.34.mod 1.34.4 3.6.8
