# `make help` lists what there is. VENV=DIR puts the environment elsewhere, PYTHON=… chooses the interpreter it is made with.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
QUIET  := $(shell [ -t 2 ] || echo -qq)
# pip shows its progress to a person; to a log it says what went wrong

export OMP_NUM_THREADS ?= 1
unexport MPLBACKEND
# two notebooks run side by side, one thread each; the backend `agg` would take the figures out of their outputs

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-exports test-notebooks test-outputs test-wheel test-colab test-python export notebooks docs lab dist recipes clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | while IFS='|' read -r t d; do printf '  make %-15s %s\n' "$$t" "$$d"; done

# ---- the environment: a stamp file says what is installed; `make demo` is content with the package alone

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("restyle_nb needs Python 3.10 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11 …" if sys.version_info < (3, 10) else 0)'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -U pip

$(VENV)/.package: setup.py settings.ini | $(BIN)/python
	@echo "installing restyle_nb into $(VENV); the first time this fetches PyTorch (several GB)"
	@$(BIN)/python -m pip install $(QUIET) -e .
	@touch $@

$(VENV)/.dev: setup.py settings.ini | $(BIN)/python
	@echo "installing restyle_nb with its tools into $(VENV); the first time this fetches PyTorch (several GB)"
	@$(BIN)/python -m pip install $(QUIET) -e '.[dev]'
	@touch $(VENV)/.package $@

venv: $(VENV)/.dev  ## make .venv and install the package with everything to work on it

# ---- using it

demo: $(VENV)/.package  ## invert pictures the model has never seen; film strips and metrics.json in demo/
	@env -u OMP_NUM_THREADS $(BIN)/restyle_demo --out demo

lab: venv  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

# ---- checking it, in the order that fails fastest

STEPS := test-exports test-wheel test-colab test-notebooks test-outputs docs test-python
test: venv  ## everything a change must pass
	@for step in $(STEPS); do \
		echo "== $$step"; start=$$SECONDS; \
		$(MAKE) --no-print-directory $$step || { echo "== $$step failed"; exit 1; }; \
		echo "   $$step: $$((SECONDS-start)) s"; \
	done

test-exports: venv  ## is the package what the notebooks export?
	@$(BIN)/python tools/nbs.py exports

test-wheel: venv  ## do wheel and source archive hold everything, and work away from the repository?
	@$(BIN)/python tools/wheel.py

test-colab: venv  ## do two of the notebooks run where only the wheel is installed? NBS=--all: every one with a badge
	@$(BIN)/python tools/colab.py $(NBS)

test-notebooks: venv  ## nbdev_test: the examples in the notebooks
	@$(BIN)/nbdev_test --n_workers 2 --do_print

test-outputs: venv  ## are the outputs saved in the notebooks what the code prints today?
	@$(BIN)/python tools/nbs.py check

test-python: venv  ## pytest
	@$(BIN)/python -m pytest -q tests

# ---- working on it

export: venv  ## write the package from the notebooks
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

notebooks: export  ## run the notebooks, save their outputs, renew README.md
	@$(BIN)/python tools/nbs.py run
	@$(BIN)/python tools/docs.py --readme

docs: venv  ## README.md and the site in _docs/ (without Quarto)
	@$(BIN)/python tools/docs.py --force

dist: venv  ## wheel and source archive in dist/
	@$(BIN)/python tools/wheel.py --out dist

recipes:  ## how every embedded weight is made again
	@echo 'The recipes rebuild the files of restyle_nb/weights. They take minutes to hours, so no check runs them:'
	@for f in $(wildcard nbs/recipes/*.ipynb); do \
		printf '  %-42s %s\n' "$$f" "$$(grep -m1 -oE '"> [^"]+' $$f | sed -E 's/^"> //; s/\\n$$//')"; \
	done
	@echo 'Read and run them in `make lab`, or run one from end to end: $(BIN)/python tools/nbs.py run nbs/recipes/NAME.ipynb'

clean:  ## remove what was built (not .venv, not your results)
	@rm -rf _docs _proc build dist .pytest_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
