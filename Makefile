# Everything here works from a fresh checkout on Debian 12; `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.PHONY: packages
packages:  ## install the Debian packages that are needed (as root)
	@tests/packages

$(VENV)/.installed: requirements-dev.txt pyproject.toml | packages
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.PHONY: venv
venv: packages $(VENV)/.installed  ## make the Python environment .venv

.PHONY: demo
demo: venv  ## show what srd does, on a kernel of its own; ONCE=1 ends it with the verdict
	@LAB_PROGRESS=1 LAB_HTTP=1 LAB_ONCE=$(ONCE) tests/lab/boot tests/lab/demo

.PHONY: lab
lab: venv  ## a cluster in the lab: SCRIPT=path runs it inside, without it a shell; NODES=3, or KERNELS=3
	@tests/lab/boot $(SCRIPT)

.PHONY: chaos
chaos: venv  ## a walk of faults in the lab, judged afterwards: SEED=, FAULTS=10, NODES=3 or KERNELS=3, WALK=file; see build/
	@mkdir -p build
	@LAB_BARE=1 LAB_HOST_DIR=build LAB_CHAOS_SEED=$(or $(SEED),$(shell echo $$RANDOM)) LAB_CHAOS_FAULTS=$(or $(FAULTS),10) \
		LAB_CHAOS_WALK=$(WALK) tests/lab/boot tests/chaos/suite

.PHONY: deb
deb: venv  ## build the Debian package, into dist/
	@packaging/build-deb

.PHONY: lint
lint: venv  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: test
test: lint  ## everything: lint, unit tests, real programs on loopback, the real kernel in the lab, a short walk of faults
	@# Three side by side on two CPUs: a lab takes one, the tests here wait most of their time. Beside the longest lab,
	@# which is first, the other labs come one after the other. The output of each comes when it is done.
	$(MAKE) --no-print-directory --jobs=3 --output-sync=target test-lab test-here test-primary test-kernels test-chaos

# That target first, if it is asked for, too.
after = $(filter $(1),$(MAKECMDGOALS))

OF_THE_PRIMARY := $(patsubst %,tests/real/test_%.py,adversity arbiter cold_start history in_memory maintenance primacy switchover)

.PHONY: test-here
test-here: venv
	$(BIN)/pytest $(addprefix --ignore=,$(OF_THE_PRIMARY))

.PHONY: test-primary
test-primary: venv
	$(BIN)/pytest $(OF_THE_PRIMARY)

.PHONY: test-lab
test-lab: venv
	LAB_BARE=1 tests/lab/boot tests/lab/suite --durations=12

.PHONY: test-kernels
test-kernels: venv | $(call after,test-here)
	KERNELS=3 LAB_BARE=1 tests/lab/boot tests/lab/suite

.PHONY: test-chaos
test-chaos: venv | $(call after,test-kernels)
	@mkdir -p build
	LAB_BARE=1 LAB_HOST_DIR=build tests/lab/boot tests/chaos/suite

.PHONY: image-test
image-test: venv  ## the Dockerfile: built without a registry of images (as root), and run by podman in the lab
	@tests/packages image
	tests/image/build
	LAB_BARE=1 tests/lab/boot tests/image/suite

.PHONY: bench
bench: venv  ## speed and size, each figure beside another's within one run
	$(BIN)/pytest -q -s tests/bench --ignore tests/bench/test_primacy.py
	tests/lab/boot tests/bench/esp
	KERNELS=3 LAB_SRD_KILLS=50 LAB_POWER_CUTS=3 LAB_CERT_RELOADS=100 LAB_BARE=1 tests/lab/boot tests/lab/suite -q -s
	LAB_REKEYS=100 LAB_BARE=1 tests/lab/boot tests/lab/suite -q -s -k "two_thousand_packets or no_packet_between_nodes"
	$(MAKE) --no-print-directory bench-primacy

.PHONY: bench-primacy
bench-primacy: venv  ## how soon writes are back and what is lost, beside plain Sentinel: FAILOVERS=20 SILENCES=10 SWITCHOVERS=20
	@# A figure that is missed does not keep the others from being measured and shown.
	@mkdir -p build && rm -f build/primacy.jsonl; missed=0; \
	BENCH_FAILOVERS=$(or $(FAILOVERS),20) BENCH_SWITCHOVERS=$(or $(SWITCHOVERS),20) \
		$(BIN)/pytest -q -s tests/bench/test_primacy.py || missed=1; \
	for nodes in 3 5; do \
		NODES=$$nodes LAB_BENCH_FAILOVERS=$(or $(FAILOVERS),20) LAB_BENCH_SILENCES=$(or $(SILENCES),10) \
			LAB_BENCH_SWITCHOVERS=$(or $(SWITCHOVERS),20) LAB_HOST_DIR=build LAB_BARE=1 \
			tests/lab/boot tests/bench/primacy/suite || missed=1; \
	done; \
	PYTHONPATH=tests $(BIN)/python -m bench.primacy.figures; exit $$missed

.PHONY: requirements
requirements:  ## pin the dependencies again (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		pyproject.toml -o requirements.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--extra dev -c requirements.txt pyproject.toml -o requirements-dev.txt
