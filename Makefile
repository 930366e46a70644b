# The two commands a stranger needs are `make quickstart` and `make test`. Both create .venv themselves, from the
# exact versions in constraints.txt, and are quick the second time.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CHECKED := modeling trainers a2d_hf recipes scripts tests
# One process per core, each on one thread; a file stays in one process, which builds its fixtures once.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: help install quickstart test test-full quality style clean

help:
	@echo "make quickstart   the whole pipeline on a small model, offline, about five minutes on two cores"
	@echo "make test         the tests (make test-full adds the slow ones)"
	@echo "make quality      check style          make style   repair it"
	@echo "make clean        remove .venv and build leftovers (runs/ stays)"

install: $(INSTALLED)

# The file .venv/.installed is written last, so an interrupted install is started again, not believed.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: needs Python 3.11 or newer; found none (set it with: make PYTHON=/path/to/python3.11)" >&2; exit 1; }
	@$(PY) -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "Installing the versions of constraints.txt into .venv (a few minutes, the first time only)"
	@install() { $(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$$@"; }; \
	one_line() { if [ -t 1 ]; then awk '/^(Collecting|Installing|Building|  Downloading)/ \
		{ printf "\r\033[K  %s", substr($$0, 1, 76); fflush() } END { printf "\r\033[K" }'; else cat > /dev/null; fi; }; \
	install setuptools | one_line && install --no-build-isolation --editable ".[dev]" | one_line
	@touch $@

quickstart: $(INSTALLED)
	@$(VENV)/bin/a2d quickstart

test: $(INSTALLED)
	@$(PYTEST) -m "not slow and not network"

test-full: $(INSTALLED)
	@$(PYTEST) -m "not network"

quality: $(INSTALLED)
	@$(PY) -m ruff check $(CHECKED)
	@$(PY) -m ruff format --check $(CHECKED)

style: $(INSTALLED)
	@$(PY) -m ruff check --fix $(CHECKED)
	@$(PY) -m ruff format $(CHECKED)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
