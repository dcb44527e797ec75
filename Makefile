# The only interface to this project: a person, .ci/run and the documentation call the same targets.
# It needs Python 3.11 or newer, make, git and a pip index; whatever else it takes goes into .venv.
# Written for GNU make 3.81 (macOS) and newer.

PYTHON ?= python3
# For each database in `make torture`: so many SIGKILLs, or so many minutes of them; and which ones
KILLS ?= 200
MINUTES ?=
SEED ?= 1
# More arguments for pytest: make test ARGS="tests/core -k ping"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DLT := .cache/dlt/.ready
PYTEST := $(BIN)/python -m pytest
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

export LETTA_INGEST_KILLS := $(KILLS)
export LETTA_INGEST_MINUTES := $(MINUTES)
export LETTA_INGEST_SEED := $(SEED)

.DEFAULT_GOAL := help
.PHONY: help demo test check format reference docs torture faults soak mutants wheel real bench bench-smoke setup constraints clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## See it work: a talkative server, a worker killed again and again, and the count at the end
	@$(BIN)/letta-ingest demo

test: $(READY) ## Run the tests, on SQLite and on a real PostgreSQL (three to four minutes on 2 cores)
	$(PYTEST) -n 3 $(ARGS)

check: $(READY) ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy worker
	$(BIN)/lint-imports

format: $(READY) ## Format the code and repair what ruff can repair
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

reference: $(READY) ## Write the tables of docs/ anew that are made of the code
	$(BIN)/python -m docs.generate

docs: ## Build the documentation as a site in .cache/site; a warning fails it
	@test -x .cache/docs/bin/mkdocs || { "$(PYTHON)" -m venv .cache/docs \
		&& .cache/docs/bin/python $(PIP_INSTALL) --constraint constraints.txt --upgrade pip \
		&& .cache/docs/bin/python $(PIP_INSTALL) --constraint docs/constraints.txt --group docs; }
	.cache/docs/bin/mkdocs build --strict

torture: $(READY) ## Kill the worker KILLS times (200), or for MINUTES, on each database, and count what was stored
	$(PYTEST) -s -m campaign tests/torture $(ARGS)

faults: $(READY) ## The faults of network, database and upstream at their full size (tens of minutes)
	$(PYTEST) -s -m campaign tests/faults $(ARGS)

soak: $(READY) ## Let a worker live for MINUTES (2) under a steady load on each database: its size must stay the same
	$(PYTEST) -s -m campaign tests/soak $(ARGS)

mutants: $(READY) ## Plant one-line bugs in a copy, one after the other: each is noticed by the test it names (minutes)
	$(PYTEST) -s -m "not real" tests/mutants $(ARGS)

wheel: $(READY) ## Build sdist and wheel, install the wheel into an empty virtualenv, and use it there
	$(PYTEST) -m campaign tests/system/test_wheel.py

real: $(READY) ## Follow a real Letta server, installed for it, and kill the worker mid-run (minutes)
	@# The behaviour suite comes last: it leaves runs behind that never end, and a worker would follow them all.
	$(PYTEST) -s -m real tests/real_letta tests/behaviour $(ARGS)

bench: $(READY) $(DLT) ## Measure the worker against a floor and what others would do, all in one run (tens of minutes)
	$(BIN)/python -m benchmarks $(ARGS)

bench-smoke: $(READY) ## Fail when a chunk costs half as much CPU again, in units of the floor, as was recorded
	$(BIN)/python -m benchmarks --smoke

$(DLT): benchmarks/contenders/dlt-requirements.txt
	@rm -rf .cache/dlt && mkdir -p .cache
	@"$(PYTHON)" -m venv .cache/dlt
	@.cache/dlt/bin/python $(PIP_INSTALL) --requirement benchmarks/contenders/dlt-requirements.txt
	@touch $(DLT)

setup: $(READY) ## Build .venv, if pyproject.toml or constraints.txt changed

# Built anew rather than updated: a package that was dropped from pyproject.toml must not stay importable.
$(READY): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "make: $(PYTHON) not found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: letta-ingest needs Python 3.11 or newer, and $(PYTHON) is `"$(PYTHON)" --version 2>&1`;" \
			"name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; a minute or two)"
	@rm -rf $(VENV)
	@"$(PYTHON)" -m venv $(VENV) || { \
		echo "make: $(PYTHON) cannot make a virtualenv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@# pip first: dependency groups need 25.1, and build constraints 25.3
	@$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --upgrade pip
	@$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --build-constraint constraints.txt --group dev --editable .
	@touch $(READY)

constraints: ## Renew constraints.txt with the newest versions that pyproject.toml allows
	@rm -rf .cache/constraints && mkdir -p .cache
	@"$(PYTHON)" -m venv .cache/constraints
	@.cache/constraints/bin/python $(PIP_INSTALL) --upgrade pip
	@.cache/constraints/bin/python $(PIP_INSTALL) --group dev --editable . editables hatchling
	@sed -n '/^#/p;/^[^#]/q' constraints.txt > .cache/constraints.txt
	@.cache/constraints/bin/python -m pip freeze --all --exclude-editable --exclude setuptools \
		| grep '^[A-Za-z0-9._-]*==' >> .cache/constraints.txt
	@mv .cache/constraints.txt constraints.txt
	@rm -rf .cache/constraints
	@echo "constraints.txt is renewed: run make check test, then commit it"

clean: ## Remove everything that these targets made
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
