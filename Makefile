# `make demo` and `make test` do all the set-up themselves; nothing is fetched but packages.

VENV := .venv
PY := $(VENV)/bin/python -P
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH := 2.13.0
GPU_PYTHON := 3.12
SECONDS := 200
OUT := benchmarks/results/gpu
CPU_INDEX := https://download.pytorch.org/whl/cpu

# the first of these that is new enough; override with `make PYTHON=/path/to/python test`
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# named after the place of the checkout: a moved one is installed anew
STAMP := $(VENV)/.installed-$(shell printf %s '$(CURDIR)' | cksum | cut -d' ' -f1)

# One process per CPU, at most eight, for each holds torch and diffusers in memory; each takes a run of neighbours, which
# share fixtures, and a process that is done early takes tests from the end of another's.
PYTEST := $(PY) -m pytest -n logical --maxprocesses=8 --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo gallery test test-all lint kernels benchmark gpu wheels plots accuracy clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /make \1	/' | expand -t 18

setup: $(STAMP) ## a virtual environment in .venv with pinned packages

demo: $(STAMP) ## dress drawn people with the pocket model and record it; pictures in demo/
	$(PY) -m i2am demo --overwrite -o demo

gallery: $(STAMP) ## make the pictures of docs/gallery.md again
	$(PY) docs/gallery.py

test: lint ## formatter, linter, types, and every test that is not slow
	$(PYTEST) -m "not slow" $(COVERAGE)

# A prerequisite takes this setting over: no test runs twice, and all of them together must cover 95 %.
test-all: COVERAGE = --cov=i2am.kernels --cov=i2am.attribution --cov-report=term:skip-covered
test-all: test ## `make test` with coverage, then the slow tests: before a release, and in CI
	$(PYTEST) -m slow $(COVERAGE) --cov-append --cov-fail-under=95

lint: $(STAMP) ## formatter, linter and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	@rm -rf build/mypy && mkdir -p build/mypy/i2am
	@ln -s "$(CURDIR)"/i2am/* "$(CURDIR)/kernels" build/mypy/i2am/
	$(PY) -m mypy

kernels: $(STAMP) ## compile every Triton kernel ahead of time for real GPU targets (needs no GPU)
	$(PY) -m i2am.kernels.fused.ahead_of_time

benchmark: $(STAMP) ## time the operator and a recorded UNet step
	@mkdir -p .benchmarks
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-json=.benchmarks/latest.json
	$(PY) benchmarks/report.py .benchmarks/latest.json .benchmarks/result.json

# on a machine with a GPU, torch, triton, numpy and pytest; without network, .wheels is carried along
gpu: ## what only a GPU tells: make gpu SECONDS=200, then make gpu SECONDS=400 goes on
	$(PYTHON) benchmarks/gpu.py --seconds $(SECONDS) -o $(OUT)

wheels: $(STAMP) ## packages for `make gpu` without network, in .wheels (for GPU_PYTHON=3.12)
	@rm -rf .wheels
	$(PIP) download -q -c constraints.txt -d .wheels --only-binary=:all: --python-version $(GPU_PYTHON) \
		--implementation cp $(addprefix --platform manylinux,_2_28_x86_64 _2_17_x86_64 2014_x86_64 1_x86_64) \
		diffusers hypothesis pytest-xdist pytest-timeout
	@rm -f .wheels/numpy-*  # comes with torch

plots: $(STAMP) ## draw the scaling plots of the last GPU result (needs matplotlib)
	$(VENV)/bin/python benchmarks/scaling_plots.py benchmarks/results/gpu/rows.jsonl docs/scaling.png

accuracy: $(STAMP) ## score the pocket model's attribution against the truth
	$(VENV)/bin/python benchmarks/attribution_accuracy.py

clean: ## remove everything that make made
	rm -rf $(VENV) build demo .benchmarks .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info

# A CPU build of torch where there is no NVIDIA GPU: from what pip is configured with, else from
# PyTorch's own index, else (last resort, large) the default build.
$(STAMP): setup.py pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { \
		echo "error: i2am needs Python 3.11 or newer; none of python3, python3.13, python3.12, python3.11 is" >&2; \
		echo "       (name one with: make PYTHON=/path/to/python test)" >&2; exit 1; }
	@rm -f $(VENV)/.installed-*
	@$(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| $(PYTHON) -m venv --clear $(VENV)
	@echo "installing packages into $(VENV) (the first time takes a few minutes) ..."
	@$(PIP) install -qq -c constraints.txt --upgrade pip setuptools wheel
	@if nvidia-smi -L >/dev/null 2>&1; then \
		$(PIP) install -qq "torch==$(TORCH)"; \
	else \
		$(PIP) install -qq --no-deps "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(PIP) install -qq --no-deps --retries 1 --index-url $(CPU_INDEX) "torch==$(TORCH)" 2>/dev/null \
		|| $(PIP) install -qq "torch==$(TORCH)"; \
	fi
	@$(PIP) install -qq --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@
