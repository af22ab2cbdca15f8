# Every target does its own set-up in .venv; run them on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-out

.PHONY: help demo test lint bench clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

$(BIN)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(BIN)/.installed ## adapt a ViT to digits it has never seen; writes a table and a picture to OUT=demo-out
	$(BIN)/vapt-fast demo --output $(OUT)

test: $(BIN)/.installed ## all tests
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(BIN)/.installed ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(BIN)/.installed ## the benchmarks, as a comparison of backends
	$(BIN)/python -m pytest bench --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds

clean: ## remove what the targets above made
	rm -rf $(VENV) build dist *.egg-info $(OUT) .pytest_cache .ruff_cache .benchmarks
