# Every target does its own set-up in .venv; run them on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-out

.PHONY: help demo test test-rest test-all test-nightly mutants lint lint-only docs docs-only bench gpu gpu-dry clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

STYLED := $(wildcard $(foreach kind,h cpp cu cuh,csrc/*.$(kind) csrc/*/*.$(kind)))

# Compiled by the installation, where there is nvcc.
CUDA_SOURCES := csrc/CMakeLists.txt $(filter-out csrc/emulation/%,$(STYLED))

$(BIN)/.installed: pyproject.toml setup.py $(CUDA_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(BIN)/.installed ## adapt a ViT to digits it has never seen; writes a table and a picture to OUT=demo-out
	$(BIN)/vapt-fast demo --output $(OUT) --overwrite

PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: $(BIN)/.installed ## the tests of what breaks in practice
	$(PYTEST) -m "not full"

test-rest: $(BIN)/.installed ## the tests that make test leaves out
	$(PYTEST) -m full

test-all: $(BIN)/.installed ## both: all tests but the nightly ones
	$(PYTEST)

test-nightly: mutants ## what takes longest: mutants of the kernels, and random sizes in great number
	$(PYTEST) -m nightly

mutants: $(BIN)/.installed ## mutation tests of the kernels, after they have changed
	$(BIN)/python tests/tools/kill_mutants.py
	$(BIN)/python tests/tools/cuda_mutants.py

lint: $(BIN)/.installed ## style, of Python and of csrc, and types
	@$(MAKE) --no-print-directory lint-only

lint-only: # with what BIN holds, installing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(STYLED)

docs: $(BIN)/.installed ## the documentation, in docs/_build/index.html; warnings and broken links are errors
	@$(MAKE) --no-print-directory docs-only

docs-only: # with what BIN holds, installing nothing
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build

bench: $(BIN)/.installed ## the backends on this machine, whole models and single ops
	$(BIN)/vapt-fast bench
	$(BIN)/python -m pytest bench --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds

# In the environment of PYTHON, and without a network: machines with a GPU are often set up already.
gpu: OUT = gpu-out
gpu: ## all that needs a GPU, tests and benchmarks, in 12 minutes; writes to OUT=gpu-out; LONG=1 also autotunes
	$(PYTHON) bench/gpu.py --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(LONG),--long --minutes 20)

gpu-dry: OUT = gpu-out
gpu-dry: $(BIN)/.installed ## the same on a CPU with tiny sizes, to see that it runs
	$(BIN)/python bench/gpu.py --out $(OUT) --dry

clean: ## remove what the targets above made
	rm -rf $(VENV) build dist docs/_build *.egg-info $(OUT) gpu-out .pytest_cache .ruff_cache .benchmarks
