# `make demo` and `make test` work on a machine with Python >= 3.11, git and make; each makes .venv when it is not there.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FUZZ_INPUTS ?= 1000000
CORES ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help demo test lint format unit workflow bench peers fuzz guards test-cluster test-bucket test-browser screenshots docs clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# The stamp changes when what is installed should: the pins, or the project's own metadata.
$(VENV)/.stamp: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.stamp ## synthetic dataset, tiny models, tables and report
	$(BIN)/stagebench demo --cores $(CORES)

test: $(VENV)/.stamp lint unit workflow ## all that CI runs

lint: $(VENV)/.stamp ## ruff, mypy, snakefmt, snakemake --lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules fetch

format: $(VENV)/.stamp ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt Snakefile rules fetch

unit: $(VENV)/.stamp ## unit and reliability tests
	$(BIN)/python -m pytest tests/unit tests/reliability -q

fuzz: $(VENV)/.stamp ## FUZZ_INPUTS hostile inputs for each reader (hours)
	cd tests && OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 ../$(BIN)/python -m fuzz --inputs $(FUZZ_INPUTS)

guards: $(VENV)/.stamp ## take each guard out and see its test fail (minutes)
	$(BIN)/python tests/reliability/mutations.py
	$(BIN)/python tests/reliability/validity_guards.py

workflow: $(VENV)/.stamp ## Snakemake run for real
	$(BIN)/python -m pytest tests/workflow -q

# Slurm is Debian's; where it cannot be installed the tests say why they are skipped.
SLURM := slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins

test-cluster: $(VENV)/.stamp ## the demo through a real Slurm of three nodes, started here (root)
	command -v slurmctld >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM); } >/dev/null || \
	  echo "the packages of Slurm could not be installed: $(SLURM)"
	$(BIN)/python -m pytest tests/cluster -q -rs

# boto3 and constraints.txt disagree about python-dateutil, so what fetches from S3 has an environment of its own.
.s3-venv/.stamp: fetch/requirements-s3.txt tests/requirements-s3.txt
	$(PYTHON) -m venv .s3-venv
	.s3-venv/bin/python -m pip install --quiet --disable-pip-version-check -r fetch/requirements-s3.txt -r tests/requirements-s3.txt
	touch $@

test-bucket: $(VENV)/.stamp .s3-venv/.stamp ## a dataset from a bucket, served here
	$(BIN)/python -m pytest tests/workflow/test_s3.py -q -rs

# Peers have an environment of their own; without it (`make peers`) they are left out of the tables by name.
.peers/.stamp: benchmarks/requirements-peers.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[events]' -r benchmarks/requirements-peers.txt
	touch $@

peers: .peers/.stamp ## environment of what benchmarks/ compares with

BENCH_PYTHON = $(if $(wildcard .peers/.stamp),.peers/bin/python,$(BIN)/python)
BENCH_WAY ?= --quick
bench: $(VENV)/.stamp ## the store's benchmarks, minutes (BENCH_WAY= for the full ones)
	$(BENCH_PYTHON) benchmarks/store_read.py $(BENCH_WAY)
	$(if $(BENCH_WAY),$(BIN)/stagebench demo-data resources/bench --clips 2)
	$(BENCH_PYTHON) benchmarks/video.py $(if $(BENCH_WAY),--clips resources/bench/mp4/*/*.mp4 --seconds 4)
	$(BENCH_PYTHON) benchmarks/events.py $(BENCH_WAY)
	$(BENCH_PYTHON) benchmarks/events_store.py $(BENCH_WAY)
	$(BENCH_PYTHON) benchmarks/extract.py $(BENCH_WAY)
	$(BENCH_PYTHON) benchmarks/scale.py $(BENCH_WAY)
	$(BENCH_PYTHON) benchmarks/prefetch.py $(BENCH_WAY)

# The site's own environment: mkdocs is no part of what the pipeline needs.
.docs-venv/.stamp: constraints.txt
	$(PYTHON) -m venv .docs-venv
	.docs-venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs mkdocs-material
	touch $@

docs: .docs-venv/.stamp ## the documentation as a site, strict
	NO_MKDOCS_2_WARNING=1 .docs-venv/bin/mkdocs build --strict --quiet
	@echo site/index.html

# Chromium is Debian's; where it is missing and apt may not be used, the tests say so and are skipped.
test-browser: $(VENV)/.stamp ## the report in a real browser
	command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest tests/browser -q -rs

REPORT ?= results/demo/report.html
screenshots: $(VENV)/.stamp ## docs/assets again, from REPORT (after make test-browser, which installs Chromium's driver)
	$(BIN)/python tests/browser/screenshots.py --report $(REPORT)

clean: ## remove what the pipeline made (not .venv)
	rm -rf results cache resources/demo .snakemake
