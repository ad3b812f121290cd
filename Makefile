# `make` or `make help` lists the commands.
PYTHON ?= $(shell command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ORACLE_PYTHON ?= python3
RUN ?= runs/nano
# The type checker runs while the compilers for absent hardware are downloaded.
MAKEFLAGS += --jobs=2

# Python compiles modules to bytecode when they are first imported; compiling all of them at once takes half a minute.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help setup setup-dev setup-aot train test tests test-slow test-aot test-oracle mutants soak docs lint clean

help:
	@echo "make train      trains the 'nano' preset on Python's own source code and writes the run to $(RUN): 3 to 5 minutes on 2 cores"
	@echo "make test       runs the linter, the type checker and the tests: under 10 minutes on 2 cores"
	@echo "make test-slow  runs tests of meshes, processes, resuming, notebooks and compilers for absent hardware: 15 minutes"
	@echo "make test-aot   compiles every kernel in every tiling and size and writes their resources: 4 minutes"
	@echo "make test-oracle compares with torch and transformers, which it installs into .venv-oracle (the rest never imports them)"
	@echo "make mutants    makes known mistakes one at a time and checks that the tests notice each: 10 minutes"
	@echo "make soak       kills runs, damages their files and mistreats their processes at random: hours"
	@echo "make lint       runs the linter and the type checker only: 1 minute"
	@echo "make setup      installs the package and the command dsv3 into $(VENV)"
	@echo "make setup-dev  installs the tools of the tests and notebooks as well"
	@echo "make setup-aot  installs the compilers for GPUs and TPUs that this machine does not have"
	@echo "make docs       builds the manual in docs/_build"
	@echo "make clean      deletes $(VENV), compiled programs and build files; runs and data stay"

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev
setup-aot: $(VENV)/aot/.installed

$(BIN)/python:
	@case "$$(uname -sm)" in "Darwin x86_64"|MINGW*|MSYS*|CYGWIN*) \
	  echo "JAX has no version for this machine: use Linux (on Windows, WSL 2) or a Mac with an Apple processor"; exit 1;; esac
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev,notebooks]'
	@touch $@ $(VENV)/.installed

# Compilers for hardware this machine may lack, kept off the default path (see ARCHITECTURE.md). Without them the
# tests that compile ahead skip and say so.
$(VENV)/aot/.installed: pyproject.toml | $(BIN)/python
	$(PIP) --no-deps --upgrade --target $(VENV)/aot \
	  'jax-cuda13-plugin>=0.11.2,<0.12' 'jax-cuda13-pjrt>=0.11.2,<0.12' 'libtpu==0.0.48.*' 'nvidia-cuda-nvdisasm==13.*'
	@touch $@

train: setup
	$(BIN)/dsv3 train --preset nano --out $(RUN)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -q --durations=20

# The linter and the type checker run beside the tests: they wait for files while the tests wait for each other.
test: lint tests

tests: setup-dev
	$(PYTEST)

test-slow: setup-dev setup-aot
	$(PYTEST) -m 'slow or aot'

test-aot: setup-dev setup-aot
	$(BIN)/python experiments/kernel_resources.py

# torch lives in an environment of its own, as a second process: the golden data and the parity checks come from it.
.venv-oracle/.installed: pyproject.toml
	$(ORACLE_PYTHON) -m venv .venv-oracle
	.venv-oracle/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  'torch==2.13.0' 'transformers>=5.23' 'safetensors>=0.8' 'numpy>=2' 'lm-eval>=0.4.13' 'accelerate>=1'
	@touch $@

test-oracle: setup-dev .venv-oracle/.installed
	$(PIP) -e '.[eval]'
	$(BIN)/python -m pytest -q -m oracle tests/interop tests/oracle

mutants: setup-dev
	$(BIN)/python -m pytest -n 2 -q -m mutant tests/mutants
	$(BIN)/python tests/mutants/run.py --out experiments/results/mutants.md

soak: setup-dev
	$(BIN)/python experiments/soak.py $(SOAK)

docs: setup-dev
	$(PIP) -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

clean:
	rm -rf $(VENV) .jax_cache build docs/_build *.egg-info
