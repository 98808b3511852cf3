# `make demo` and `make test` are all one needs; both work from a fresh clone and are quick the second time.
# `make quick` is for between two edits: the tests that need no export.

# python3.11 where it runs (a version manager may offer a name it cannot start), else python3.
PYTHON ?= $(shell python3.11 -c "import sys; print(sys.executable)" 2>/dev/null || echo python3)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(shell find src/visprune bench engines estimate evaluation export pruning quantize runtime serve demo -name '*.py')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Folders and files whose tests neither trace a model nor build an engine.
QUICK := tests/core tests/pruning tests/runtime tests/estimate tests/commands tests/bench/report \
	$(addprefix tests/evaluation/test_,answer_text.py formats.py intervals.py ledger.py metrics.py) \
	$(addprefix tests/quantize/test_,bad_input.py budget.py carriers.py forms.py linears.py numerics.py ranges.py) \
	tests/test_dependencies.py tests/test_layout.py

.PHONY: demo test quick docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

quick: $(VENV)/.dev
	$(BIN)/ruff check --quiet .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses=auto --dist=loadfile $(QUICK)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# An editable install (from `make test`) serves the demo too, and is not replaced.
$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	test -e $(VENV)/.dev || $(BIN)/pip install --quiet '.[cpu,export]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@
