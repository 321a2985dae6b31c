# Every target sets up what it needs in .venv; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu lint format docs picture count bench soak real-pair lab clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 12

# torch goes first and alone: with the CPU build in place nothing below asks for another one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev -e .
	touch $(READY)

setup: $(READY)  ## make .venv with the pinned versions

demo: $(READY)  ## distil the bundled lab pairs, evaluate, print the table and where the report lies
	$(BIN)/moe-svd-distill demo

test: $(READY)  ## run every test (slow campaigns excepted, see bench and soak)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-gpu: $(READY)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(READY)  ## formatting, lint, types, and the one-way imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## build the manual into build/docs; a broken link or a warning is an error
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

picture: $(READY)  ## run the demo and draw what it prints for README
	$(BIN)/python -m docs.generate.terminal

count:  ## count lines, files, dataclasses and long signatures of src/
	$(PYTHON) -m benchmarks.count

bench: $(READY)  ## measure the kernels, k-means and a whole run against plain methods (about 25 minutes)
	$(BIN)/python -m benchmarks

soak: $(READY)  ## try every model type, kill runs at random moments and bound their memory (about 30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m all_types
	$(BIN)/python -m benchmarks.soak

real-pair: $(READY)  ## fetch a pair of real models and text for benchmarks/real_pair (2 GiB, outside the repository)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group real-pair
	$(BIN)/python -m benchmarks.real_pair fetch
	$(BIN)/python -m benchmarks.real_pair text
	@echo "Next: benchmarks/real_pair/README.md"

lab: $(READY)  ## train the lab's models anew (about an hour); DOCUMENTATION=folder of the Python docs
	$(BIN)/python -m lab.train $(if $(DOCUMENTATION),--documentation $(DOCUMENTATION))

clean:  ## delete the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build out
