# al-loop: `make help` lists what there is. Everything lives in .venv; a stamp there remembers what it was installed from.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help run stop install install-dft test test-slow crash-test lint format clean system-libraries dft-libraries

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DFT_STAMP := $(VENV)/.installed-dft
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c config/constraints.txt
# Options of pip for torch alone, e.g. to take its CPU build from an index that has one.
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
# How many test modules run at once.
TEST_WORKERS ?= 2
# How often `make crash-test` kills, and the seed of its random moments.
KILLS ?= 100
SEED ?= 0

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(STAMP)  ## install, start everything, run the quickstart through its deployment and watch it
	@$(BIN)/python -m flows.quickstart

stop:  ## end what `make run` or `al-loop up` started
	@if [ -x $(BIN)/al-loop ]; then $(BIN)/al-loop down; else echo "nothing is installed here, so nothing runs"; fi

install: $(STAMP)  ## make .venv and install what is pinned

install-dft: $(DFT_STAMP)  ## add GPAW (built here: libxc, OpenBLAS, a C compiler), D3 and what the vasp calculator uses

test: $(STAMP)  ## the quick tests
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP)  ## all tests, those with the long ones too
	$(BIN)/python -m pytest $(PYTEST_ARGS)

crash-test: $(STAMP)  ## kill runs KILLS=100 times at random moments (SEED=0), count what was lost and what was done twice
	$(BIN)/python tests/crash/campaign.py --kills $(KILLS) --seed $(SEED)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and caches (runs and labels stay in al-loop's data folder)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml config/constraints.txt | system-libraries
	@python=""; for p in python3 python3.13 python3.12 python3.11; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then echo "al-loop needs Python 3.11 or later: sudo apt-get install python3 python3-venv" >&2; exit 2; fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$python cannot make virtual environments: sudo apt-get install python3-venv" >&2; exit 2; fi; \
	echo "making $(VENV) with $$($$python --version); the first time this takes a few minutes"; \
	$$python -m venv $(VENV)
	@$(PIP) $(TORCH_PIP_ARGS) torch
	@$(PIP) -e '.[mongodb,teachers,dev]'
	@touch $@

# GPAW reads how it is to be built from the file that GPAW_CONFIG names.
$(DFT_STAMP): $(STAMP) | dft-libraries
	@printf '%s\n' "mpi = False" "compiler = 'gcc'" "libraries = ['xc', 'openblas']" > $(VENV)/gpaw-siteconfig.py
	@GPAW_CONFIG='$(CURDIR)/$(VENV)/gpaw-siteconfig.py' $(PIP) -e '.[gpaw,dispersion,vasp]'
	@touch $@

dft-libraries:
	@printf '#include <xc.h>\nint main(void) { return 0; }\n' | gcc -x c - -lxc -lopenblas -o /dev/null 2>/dev/null || { \
	  echo "GPAW is built from source and lacks a C compiler, Python's headers, libxc or OpenBLAS:" \
	    "sudo apt-get install gcc libc6-dev python3-dev libxc-dev libopenblas-dev" >&2; exit 2; }

# The embedded mongod links these; a server of one's own (AL_LOOP_MONGODB_URI) needs none of them.
system-libraries:
	@[ "$$(uname -s)" = Linux ] && [ -z "$$AL_LOOP_MONGODB_URI" ] || exit 0; \
	known=$$(PATH="$$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null) || exit 0; packages=""; \
	for pair in libcurl.so.4:libcurl4 libssl.so.3:libssl3 libcrypto.so.3:libssl3; do \
	  case "$$known" in *"$${pair%%:*} "*) ;; *) echo "missing system library: $${pair%%:*}" >&2; packages="$$packages $${pair##*:}";; esac; \
	done; \
	if [ -n "$$packages" ]; then \
	  packages=$$(printf '%s\n' $$packages | sort -u | tr '\n' ' '); \
	  echo "MongoDB needs it: sudo apt-get install $$packages" >&2; exit 2; fi
