# make train: set up, then train the laptop-size model on the default corpus.   make test: set up, then run all checks.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/nano

.PHONY: help setup setup-dev setup-aot train test lint clean

help:
	@echo "make train   train the 'nano' preset on Python's own source code (about 5 minutes on 2 cores) into $(RUN)"
	@echo "make test    lint, type check and run the whole test suite (about a quarter of an hour on 2 cores)"
	@echo "make setup   only create $(VENV) with the package and the dsv3 command in it"

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev
setup-aot: $(VENV)/aot/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,notebooks]'
	@touch $@ $(VENV)/.installed

# Compilers for hardware this machine may lack, kept off the default path (see ARCHITECTURE.md). Without them the
# tests that compile ahead skip and say so.
$(VENV)/aot/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/aot \
	  'jax-cuda13-plugin>=0.11.2,<0.12' 'jax-cuda13-pjrt>=0.11.2,<0.12' 'libtpu==0.0.48.*'
	@touch $@

# Huge pages: a step allocates and frees hundreds of megabytes, and a seventh of it was the kernel clearing small pages.
train: setup
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/dsv3 train --preset nano --out $(RUN)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup-dev setup-aot lint
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -q

clean:
	rm -rf $(VENV) .jax_cache build *.egg-info
