# `make demo` and `make test` are all that a fresh machine with Python 3.11 and git needs.
.DEFAULT_GOAL := help
.PHONY: help venv demo check test test-all test-light test-light-short bench lint docs clean

PYTHON ?= python3
OUT ?= demo
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint jobs/constraints.txt
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.installed-demo
# The light set: the same pins but for torch, of which this one has a CPU build under its plain name in some indexes.
LIGHT := .venv-light
LIGHT_TORCH := 2.13.0
LIGHT_PINS := $(LIGHT)/constraints.txt
LIGHT_PIP = $(LIGHT)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LIGHT_PINS)
LIGHT_TESTS ?= tests/unit tests/equivalence tests/contract
LIGHT_SHORT := tests/unit/test_kernels.py tests/unit/test_extras.py tests/unit/test_audio.py tests/unit/test_stream.py \
    tests/unit/model/test_checkpoint.py tests/contract/test_portable.py
# Much of a test's time is Ray starting: two files at a time, each with a Ray of its own, and those of tests/cluster first:
# a long file that starts last would leave one process idle.
SIDE_BY_SIDE := --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=12
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
export PYTHONUNBUFFERED := 1

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP)  ## Make .venv with everything that demo and tests need

$(STAMP): pyproject.toml jobs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[all,dev]'
	# The reference that the tests hold our Mamba against: its plain PyTorch parts, without CUDA.
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) --no-deps --no-build-isolation 'mamba-ssm>=2.3'
	touch $(STAMP) $(DEMO)

$(DEMO): pyproject.toml jobs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed 's/^torch==.*/torch==$(LIGHT_TORCH)/' jobs/constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt \
	    --editable '.[demo]'
	touch $(DEMO)

demo: $(DEMO)  ## Make speech, extract, train, score, evaluate and report it (OUT=demo)
	$(BIN)/python jobs/demo.py --out $(OUT)

check: lint  ## Lint, types and the unit tests but the long ones (before every commit)
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m 'not long and not slow and not perf and not gpu' \
	    tests/unit tests/contract/test_structure.py tests/contract/test_prose.py

test: lint  ## Lint, types and the quick tests (12 minutes on 2 cores at most)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: lint  ## All tests, the kill matrices too (hours)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not perf and not gpu'

$(LIGHT)/.installed-demo: pyproject.toml jobs/constraints.txt Makefile
	test -x $(LIGHT)/bin/python || $(PYTHON) -m venv $(LIGHT)
	sed 's/^torch==.*/torch==$(LIGHT_TORCH)/' jobs/constraints.txt > $(LIGHT_PINS)
	$(LIGHT_PIP) --editable '.[demo]' pytest pytest-timeout pytest-xdist psutil
	touch $@

$(LIGHT)/.installed: $(LIGHT)/.installed-demo
	$(LIGHT_PIP) --editable '.[demo,dev]'
	touch $@

test-light: $(LIGHT)/.installed  ## Unit, equivalence, contract tests and the demo without torchaudio, SpeechBrain, CUDA
	$(LIGHT)/bin/python -m pytest $(SIDE_BY_SIDE) $(LIGHT_TESTS)
	$(LIGHT)/bin/vaemo demo --out $(LIGHT)/demo

test-light-short: $(LIGHT)/.installed-demo  ## What of it shows in a minute that the light set works
	$(LIGHT)/bin/python -m pytest -n0 $(LIGHT_SHORT)
	$(LIGHT)/bin/vaemo --help

bench: $(STAMP)  ## The benchmarks, one report each
	$(BIN)/python -m pytest tests/perf -m perf -s

lint: $(STAMP)  ## ruff, mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(STAMP)  ## The pages and the reference as HTML, in .docs; fails on any warning
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs .docs

clean:  ## Remove .venv and caches
	rm -rf $(VENV) .docs $(LIGHT) .mypy_cache .pytest_cache .ruff_cache *.egg-info
