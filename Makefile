# Everything sets itself up: a .venv beside this file, filled from requirements.txt, once and again when that changes.
#   make test PYTHON=python3.12        another Python (3.10 or newer) for the .venv
#   make test VENV=none                no .venv: the Python in use (or PYTHON=...), with what it has installed
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"     the CPU build of torch
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=

ifeq ($(VENV),none)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# What runs, for who wants to run something else in its place.
DEMO = -m benchmarks.demo
DEMO_SEEDS = $(DEMO) --seeds
# One thread per process: with tiny tensors, more get in each other's way.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-seeds test test-slow lint clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Train a tiny model on the CPU: SFT, TraceRL, evaluation (minutes)
	@$(PY) $(DEMO)

demo-seeds: $(READY) ## The demo with three other seeds, and a control that must not learn
	@$(PY) $(DEMO_SEEDS)

test: lint ## The linter and all tests that are not slow
	@$(PY) -m pytest -q $(PYTEST_FLAGS)

test-slow: $(READY) ## The tests that take minutes
	@$(PY) -m pytest -q -m slow --timeout 3600 $(PYTEST_FLAGS)

lint: $(READY) ## The linter alone
	@$(PY) -m ruff check --quiet --output-format concise .

clean: ## Remove caches and the .venv made here; runs/ stays
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache unmask.egg-info
	@if [ -f "$(READY)" ]; then rm -rf "$(VENV)"; fi

ifneq ($(VENV),none)
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || \
	  { echo "error: $(PYTHON) is no Python 3.10 or newer: say which to use with PYTHON=..."; exit 2; }
	@echo "Setting up $(VENV) (about two minutes the first time; log: $(VENV)/setup.log) ..."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "error: no venv (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	@$(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt -e '.[dev]' > $(VENV)/setup.log 2>&1 || \
	  { tail -n 15 $(VENV)/setup.log; echo "error: pip failed, see $(VENV)/setup.log"; exit 2; }
	@touch $@
endif
