# One environment (.venv), made on first use; `make` alone lists the targets.
PYTHON   ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS     ?=
V        := .venv/bin
SOURCES  := settings.ini setup.py pyproject.toml
# One thread per process: the bits of a CPU run depend on the number of threads, and two cores carry two workers.
ONE      := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST    = $(ONE) $(V)/python -m pytest -n $(or $(JOBS),$$($(V)/python -c 'import os; print(min(4, os.cpu_count() or 1))')) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lab export clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  (PYTHON=python3.12 picks the interpreter, PIP_ARGS goes to pip install, PYTEST_ARGS and JOBS to pytest)"

demo: .venv/.installed ## install, then a whole pruning trial on real handwritten digits, about a minute
	$(V)/rethink-nb demo

test: .venv/.installed-dev ## the tests that protect daily work, under 15 minutes on 2 cores
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: .venv/.installed-dev ## every test, the slow ones too
	$(PYTEST) $(PYTEST_ARGS)

lab: .venv/.installed ## JupyterLab on the notebooks
	$(V)/jupyter lab nbs

export: export PATH := $(CURDIR)/$(V):$(PATH)
export: .venv/.installed ## notebooks to modules, notebooks without outputs (run before each commit)
	nbdev_export
	find nbs -name '*.ipynb' -not -path '*/.*' -exec jupyter nbconvert --clear-output --inplace --log-level WARN {} +
	nbdev_clean

clean: ## remove build outputs; runs/ and .venv stay
	rm -rf build dist _docs _proc .pytest_cache .ruff_cache *.egg-info
	find rethink_nb nbs tests -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

# An environment that already has pip is used as it is, so an interrupted install goes on where it stopped.
.venv/.made:
	@test -x $(V)/python || command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; install Python 3.11 or newer, or say PYTHON=/path/to/python" >&2; exit 1; }
	@set -e; py=$(PYTHON); if $(V)/python -c 'import pip' 2>/dev/null; then py=$(V)/python; fi; \
	$$py -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$py is $$($$py -V 2>&1), but rethink_nb needs Python 3.11 or newer; say PYTHON=python3.12 or the like (and remove an old .venv)" >&2; exit 1; }; \
	if [ "$$py" = "$(PYTHON)" ]; then \
	  $$py -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $$py has no venv or ensurepip; install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	  $$py -m venv .venv; fi
	@touch $@

.venv/.installed: $(SOURCES) | .venv/.made
	@echo "Installing into .venv; torch is large, so the first time takes some minutes"
	$(V)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e .
	@touch $@

.venv/.installed-dev: $(SOURCES) | .venv/.made
	@echo "Installing into .venv; torch is large, so the first time takes some minutes"
	$(V)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[dev]'
	@touch .venv/.installed $@
