# Everything here sets itself up: a virtual environment in .venv with the versions of constraints.txt. A stamp
# file remembers that it is done. Needed beforehand: Python >= 3.11, make, git.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt
WORKERS ?= auto
TESTS ?= tests

.PHONY: demo test test-slow lint types docs bench setup clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1	/' | expand -t 12

demo: .venv/.demo ## train the default model privately on real data, with certificate and report, under runs/
	$(BIN)/dpfa train

test: .venv/.dev ## run the tests
	$(BIN)/python -m pytest --quiet --numprocesses $(WORKERS) $(TESTS)

test-slow: .venv/.dev ## run the tests that take minutes
	$(BIN)/python -m pytest --quiet -m slow $(TESTS)

lint: .venv/.dev ## style, import arrows, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: .venv/.dev ## build the pages into site/; a broken link is an error
	$(BIN)/mkdocs build --strict --quiet

bench: .venv/.dev ## run every benchmark and keep its measurements
	@device=$$($(BIN)/python benchmarks/_harness.py) || exit 1; for file in benchmarks/[a-z]*.py; do \
		echo "$$file"; result="benchmarks/results/$$(basename "$$file" .py)-$$device.json"; \
		$(BIN)/python "$$file" --json > "$$result.part" && mv "$$result.part" "$$result" || exit 1; \
	done

setup: .venv/.dev ## install everything and run nothing

clean: ## remove the environment and what was built
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than 3.11: run make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.demo: $(INPUTS) | $(BIN)/python
	@echo "Installing the pinned dependencies into .venv (once, some minutes) ..."
	@$(PIP) --editable '.[demo]'
	@touch $@

.venv/.dev: $(INPUTS) | $(BIN)/python
	@echo "Installing the pinned development dependencies into .venv (once, some minutes) ..."
	@$(PIP) --editable '.[dev]'
	@touch $@ .venv/.demo
