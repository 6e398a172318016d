# Everything that a person or CI runs. CI calls these targets and nothing else.
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/yurt-edge/yurt/internal/daemon.version=$(VERSION)
TOOL    := go tool -modfile=go.tools.mod
CMDS    := $(notdir $(patsubst %/main.go,%,$(wildcard cmd/*/main.go)))
# Packages whose tests must pass under the race detector on every change.
RACE    ?= ./internal/...
# Inputs of each fuzz target, and kills. No durations: golang/go#75804.
FUZZTIME  ?= 10000x
CYCLES    ?= 10000
# What runs on clusters and machines measures, and shares two cores: one package
# at a time. Other packages wait more than they work.
ALONE     := ./playground/... ./test/...
TESTFLAGS ?= # more flags for `make test`, for example -v
export YURT_CACHE ?= $(CURDIR)/.cache

# No target is a file: Go and the playground know what is up to date.
.PHONY: help demo test check lint race e2e test-skew conform-skew fuzz torture bench bench-scale soak bin fmt vuln bin/controlplane packages setup generate verify clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z0-9\/-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' Makefile

demo: setup ## Set up this machine, then lose a link and a node, and show that pods run on.
	bin/yurtadm playground demo

test: setup ## Set up this machine, then run every test.
	@failed=0; \
	go test -count=1 -p 2 -timeout 45m $(TESTFLAGS) $$(comm -23 <(go list ./... | sort) <(go list $(ALONE) | sort)) || failed=1; \
	go test -count=1 -p 1 -timeout 45m $(TESTFLAGS) $(ALONE) || failed=1; \
	exit $$failed

check: lint race ## Linters, go vet, race tests and repository rules.
	go vet ./...
	go test -count=1 ./internal/repo

lint: ## Run golangci-lint.
	$(TOOL) golangci-lint run ./...

fmt: ## Format, and mend what the linters can mend.
	$(TOOL) golangci-lint run --fix ./...

vuln: ## Look for known vulnerabilities in what we link.
	$(TOOL) govulncheck ./...

race: packages ## Run RACE (./internal/... unless given) under the race detector.
	@# Power cuts are tried by one goroutine, byte by byte: a quarter of an hour here.
	CGO_ENABLED=1 go test -race -count=1 -p 2 -timeout 20m -skip '^TestEvery(PowerCut|FailedOperation)' $(RACE)

e2e: setup ## Run the scenarios on a playground.
	go test -count=1 -timeout 45m $(TESTFLAGS) ./test/e2e/...

test-skew: setup conform-skew ## Cuts with an older kubelet, and with an older API server, and conformance with that.
	YURT_KUBELET=1.34 go test -count=1 -timeout 20m $(TESTFLAGS) -run TestCuts ./test/e2e
	YURT_KUBERNETES=1.35 YURT_KUBELET=1.35 go test -count=1 -timeout 20m $(TESTFLAGS) -run TestCuts ./test/e2e

conform-skew: setup ## Conformance with an older API server.
	YURT_KUBERNETES=1.35 go test -count=1 -timeout 20m $(TESTFLAGS) ./test/conform

fuzz: ## Run every fuzz target with FUZZTIME (10000x) inputs; what it finds goes to testdata/fuzz, to be kept.
	@.ci/fuzz $(FUZZTIME)

torture: setup ## Kill the store CYCLES (10000) times under load, and a whole hub a fiftieth of that.
	STORE_KILL_CYCLES=$(CYCLES) go test -count=1 -v -timeout 24h -run '^TestKillUnderLoadLosesNothingAcknowledged$$' ./internal/hub/store
	HUB_KILL_CYCLES=$$(($(CYCLES) / 50)) go test -count=1 -v -timeout 24h -run '^TestKilledHubLosesNoAcknowledgedWrite$$' ./test/conform

bench: setup ## Measure direct against through the hub (BENCHFLAGS=-short is quick).
	go run ./test/bench $(BENCHFLAGS)

bench-scale: setup ## Measure 1 000 hubs in 50 pools, with sharing and without: 17 minutes, 2 processors, 20 GiB.
	go run ./test/bench -scale -cut 20s $(BENCHFLAGS)

soak: setup ## A day's churn in SOAK (10m unless given): nothing may grow.
	go test -count=1 -v -timeout 2h -run 'TestSoak' ./test/soak -soak $(or $(SOAK),10m)

bin: ## Build our binaries into bin/.
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(CMDS:%=./cmd/%)

bin/controlplane: bin ## Build Kubernetes, etcd, containerd and CoreDNS, once per version.
	bin/yurtadm playground build

packages: ## Install the Debian packages that are missing.
	@.ci/packages

setup: packages bin bin/controlplane ## Do all that demo and test need.

generate: ## Rewrite generated files and reviewed lists.
	go generate ./...
	go test -count=1 -run TestHubDependencies ./internal/repo -update

verify: generate ## Fail when generated files or golden lists are stale.
	git diff --exit-code

clean: ## Remove binaries and caches of this checkout.
	rm -rf bin .cache
