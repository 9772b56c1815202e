# Each target does its own set-up on a fresh Debian 12 machine that has Rust.

NOW := $(shell date +%Y%m%d-%H%M%S)
CONFIG ?= configs/quickstart.toml
PROGRAM := target/release/everstep
# What builds with RDMA: `make release` and all tests; not `make train`.
RDMA := --features everstep/rdma,everstep-transport/rdma
# Program, tests and examples in one build: apart, half of the packages would be built twice, as tests ask more of tokio.
BUILD_ALL := cargo build --workspace --all-targets $(RDMA)
PEERS := target/peers
# Small packages: a compiler of kernels, a trainer of tokenizers.
PYTHON := target/python
# Text that is the same everywhere: sources of packages that Cargo.lock pins.
TEXT := tokio syn rustls zerocopy chrono time quinn-proto winnow clap_builder ractor tokenizers futures-util proptest \
	tracing-subscriber rayon

.PHONY: train test rdma links kernels conformance precision rate recovery verify bench chaos chaos-full chaos-times chaos-scale \
	chaos-supervisors chaos-long simulate soak same-logs fuzz gpu-check release setup setup-test \
	setup-python setup-store setup-peers setup-rdma setup-vm build

## Build, then train the quickstart: a supervisor and three nodes on this machine.
train: build
	$(PROGRAM) train $(CONFIG) --set run.folder=runs/train-$(NOW)

## All tests: units, simulation, whole jobs of real processes, and every GPU kernel compiled.
test: setup-test setup-store setup-rdma kernels
	$(BUILD_ALL)
	cargo nextest run --workspace $(RDMA) -E 'not binary(rdma) and not test(on_a_device)'

## Sessions and a job over RDMA, in small machines with devices in software. By itself: an emulated processor wants the cores.
## RDMA_ROUNDS: how often the wire between two of them is disturbed over RoCE, and over iWARP.
RDMA_ROUNDS ?= 5
rdma: setup-test setup-rdma setup-vm
	$(BUILD_ALL)
	tests=$$(cargo test -p everstep-transport --features rdma --lib --no-run --message-format=json | \
		grep -o '"executable":"[^"]*"' | tail -n 1 | cut -d '"' -f 4) && \
	RDMA_ROUNDS=$(RDMA_ROUNDS) TRANSPORT_TESTS=$$tests cargo nextest run --workspace $(RDMA) -E 'binary(rdma)'

## Every kernel of kernels/hopper/ compiled, on any machine: fails where registers go to memory, or where the table is not true.
kernels: setup-rdma setup-python
	$(PYTHON)/bin/pip install --quiet nvidia-cuda-nvrtc==13.0.88
	$(BUILD_ALL)
	LD_LIBRARY_PATH=$$(echo $(PYTHON)/lib/python3*/site-packages/nvidia/cu13/lib) \
		target/debug/examples/compile_kernels > target/kernels.md
	grep '^|' docs/measurements/hopper-resources.md | diff - target/kernels.md

## The model against Hugging Face transformers on fresh models (some 3 GB of packages the first time).
conformance: build setup-test setup-peers
	cargo build
	$(PEERS)/bin/python tests/peers/live.py $(PROGRAM)

## Tokens a second beside Hugging Face transformers, on the same cores in one run.
rate: build setup-peers
	$(PEERS)/bin/python tests/peers/rate.py $(PROGRAM) small
	$(PEERS)/bin/python tests/peers/rate.py $(PROGRAM) large 6

## What failures cost by what failed, 200 of them; goodput beside torchrun and torchft under one schedule.
recovery: build setup-peers
	$(PEERS)/bin/pip install --quiet torchft==0.2.0
	$(PROGRAM) bench recovery --set run.folder=runs/recovery-$(NOW) --set job.nodes=4 --set job.pace=5e9 \
		--set train.steps=1400
	$(PEERS)/bin/python tests/peers/recovery.py $(PROGRAM) 600 20
	$(PEERS)/bin/python tests/peers/recovery.py $(PROGRAM) 600 5

## fp32, bf16 (in two orders of sums) and fp8 on the same samples, compared.
precision: build setup-python
	cargo vendor --locked target/vendor >/dev/null
	for crate in $(TEXT); do mkdir -p target/text/$$crate && cp -r target/vendor/$$crate/src target/text/$$crate/ || exit 1; done
	$(PYTHON)/bin/pip install --quiet tokenizers==0.23.3
	$(PYTHON)/bin/python tests/peers/bpe.py target/text 4096 target/text.json
	for run in fp32:fp32:2:1 bf16:bf16:2:1 bf16-order:bf16:1:2 fp8:fp8:2:1; do \
		set -- $$(echo $$run | tr : ' '); \
		$(PROGRAM) train configs/precision.toml --set run.folder=runs/precision-$(NOW)/$$1 --set train.precision=$$2 \
			--set job.lanes=$$3 --set job.micro_batches=$$4 || exit 1; done
	$(PROGRAM) compare runs/precision-$(NOW)/fp32 runs/precision-$(NOW)/bf16 runs/precision-$(NOW)/bf16-order \
		runs/precision-$(NOW)/fp8 --picture runs/precision-$(NOW)/precision.svg --mean 0.25 --largest 1

## How fast sessions are: over QUIC beside TCP, on this machine; over RDMA beside perftest, in the small one.
links: setup-rdma setup-vm
	cargo build --release -p everstep-actors --features rdma --example link_speed
	target/release/examples/link_speed
	target/release/examples/link_speed idle
	@command -v ib_write_bw >/dev/null || { apt-get update && apt-get install --yes perftest; }
	cargo run -p everstep-tests --example rdma_rate target/release/examples/link_speed

## Any bytes into every decoder of what comes from outside, for so long each.
SECONDS_OF_FUZZ ?= 600
fuzz: setup setup-rdma setup-fuzz
	cd tests/fuzz && for target in frames way rdma message manifest; do \
		RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir . $$target -- -max_total_time=$(SECONDS_OF_FUZZ) -rss_limit_mb=512 -timeout=5 || exit 1; done

## Formatting, lints, documentation and house rules; edits nothing.
verify: setup-rdma
	cargo xtask verify

## Figures as JSON lines, each with what bounds it.
bench: build
	$(PROGRAM) bench
	$(PROGRAM) bench control

## Train while a random process is killed every few seconds, and compare with the undisturbed run.
chaos: build
	$(PROGRAM) chaos configs/chaos/everything.toml $(CONFIG) --set run.folder=runs/chaos-$(NOW) --set train.steps=320

## Three supervisors, of which the one that leads is stopped or killed, 20 times.
chaos-supervisors: build
	$(PROGRAM) chaos configs/chaos/supervisors.toml $(CONFIG) --set run.folder=runs/chaos-supervisors-$(NOW) \
		--set recovery.supervisors=3 --set job.nodes=3 --set train.steps=1000

## The same with 50 kills on the tiny model.
chaos-full: build
	$(PROGRAM) chaos configs/chaos/full.toml configs/tiny.toml --set run.folder=runs/chaos-full-$(NOW) \
		--set train.steps=8000 --set checkpoint.every=100

## How soon deaths, hangs and cut links are known, and how soon the job goes on: 200 of each on the tiny model.
chaos-times: build
	$(PROGRAM) chaos configs/chaos/deaths.toml configs/tiny.toml --set run.folder=runs/deaths-$(NOW) \
		--set train.steps=30000 --set checkpoint.every=500
	$(PROGRAM) chaos configs/chaos/stops.toml configs/tiny.toml --set run.folder=runs/stops-$(NOW) \
		--set train.steps=60000 --set checkpoint.every=500
	$(PROGRAM) chaos configs/chaos/cuts.toml configs/tiny.toml --set run.folder=runs/cuts-$(NOW) \
		--set train.steps=60000 --set checkpoint.every=500

## From one node to eight and back to one, with kills on the way, on the tiny model.
chaos-scale: build
	$(PROGRAM) chaos configs/chaos/scale.toml configs/tiny.toml --set run.folder=runs/scale-$(NOW) --set job.nodes=1 \
		--set train.steps=4000 --set checkpoint.every=500

## Kills of all kinds, and faults that are more than that, in JOBS jobs of each beside each other, each with a seed of its own.
## PLANS=weather: what no process dies of.
JOBS ?= 1
LONG ?= 40000
PLANS ?= kills faults
chaos-long: build
	rm -rf target/chaos && mkdir -p target/chaos
	for n in $$(seq $(JOBS)); do for plan in $(PLANS); do \
		sed "s/^seed = .*/seed = $$n/" configs/chaos/$$plan.toml > target/chaos/$$plan-$$n.toml; \
		$(PROGRAM) chaos target/chaos/$$plan-$$n.toml configs/tiny.toml --set run.folder=runs/long-$(NOW)/$$plan-$$n \
			--set train.steps=$(LONG) --set checkpoint.every=20 > target/chaos/$$plan-$$n.txt 2>&1 \
			|| touch target/chaos/$$plan-$$n.failed & \
	done; done; wait
	tail -n 3 target/chaos/*.txt
	! ls target/chaos/*.failed 2>/dev/null

## Many seeds of the simulated job, then each planted bug, in a program that holds them.
simulate: build
	$(PROGRAM) simulate --seeds 0..100000
	cargo run --release --features plant --target-dir target/plant -- simulate --seeds 0..2000 --plant all

## Simulated seeds for HOURS, behind those of `make simulate`, from where the last soak stopped. What they showed: runs/soak/seeds.jsonl.
HOURS ?= 8
SOAK := runs/soak
soak: build
	mkdir -p $(SOAK)
	end=$$(($$(date +%s) + 3600 * $(HOURS))); while [ $$(date +%s) -lt $$end ]; do \
		from=$$(cat $(SOAK)/next 2>/dev/null || echo 100000); to=$$((from + 5000)); \
		$(PROGRAM) simulate --seeds $$from..$$to --json >> $(SOAK)/seeds.jsonl || { tail -n 1 $(SOAK)/seeds.jsonl; exit 1; }; \
		echo $$to > $(SOAK)/next; \
	done

## The same seeds in two builds, of which one is not optimised as far and checks more: every log has the same bytes.
same-logs: build
	cargo build
	$(PROGRAM) simulate --seeds 0..2000 > target/logs-release
	target/debug/everstep simulate --seeds 0..2000 > target/logs-debug
	grep 'all logs' target/logs-release && [ "$$(grep -o 'logs: .*' target/logs-release)" = "$$(grep -o 'logs: .*' target/logs-debug)" ]

## The CUDA backend against the CPU's, on a machine with a GPU.
gpu-check: setup
	cargo run --release -p everstep-kernels --features cuda --example gpu_check

build: setup
	cargo build --release

## The program with links over RDMA beside QUIC.
release: setup-rdma
	cargo build --release --features rdma

# A C compiler and linker, for crates that hold some C or assembly.
setup:
	@command -v cargo >/dev/null || { echo "Rust 1.95 or newer is needed: https://rustup.rs"; exit 1; }
	@command -v cc >/dev/null || { apt-get update && apt-get install --yes gcc libc6-dev; }

# Headers and libraries of RDMA, and what makes bindings of them.
setup-rdma: setup
	@pkg-config --exists libibverbs librdmacm 2>/dev/null && ls /usr/lib/llvm*/lib/libclang*.so* >/dev/null 2>&1 || \
		{ apt-get update && apt-get install --yes pkg-config libclang-dev libibverbs-dev librdmacm-dev; }

# What the machine with RDMA devices in software is made of.
setup-vm: setup
	@command -v qemu-system-x86_64 >/dev/null && command -v rdma >/dev/null && command -v depmod >/dev/null \
		&& test -x /bin/busybox && apt-cache show linux-image-amd64 >/dev/null 2>&1 || { apt-get update && \
		apt-get install --yes --no-install-recommends qemu-system-x86 busybox-static rdma-core ibverbs-utils iproute2 kmod; }

# A fuzzer, whose runtime is C++. The compiler's unstable flags that it needs are allowed for it alone.
setup-fuzz: setup
	@command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
	@command -v c++ >/dev/null || { apt-get update && apt-get install --yes g++; }

setup-python:
	@python3 -c 'import ensurepip' 2>/dev/null || { apt-get update && apt-get install --yes python3 python3-venv; }
	@test -x $(PYTHON)/bin/python || python3 -m venv $(PYTHON)

# A server that speaks S3's protocol.
setup-store: setup-python
	$(PYTHON)/bin/pip install --quiet 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5

setup-peers: setup-python
	@test -x $(PEERS)/bin/python || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet -r tests/peers/requirements.txt

setup-test: setup
	@command -v cargo-nextest >/dev/null || cargo install cargo-nextest --locked
	@command -v mount >/dev/null || { apt-get update && apt-get install --yes mount; }
	@command -v ip >/dev/null || { apt-get update && apt-get install --yes iproute2; }
