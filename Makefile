# make demo: the whole method on the embedded model.  make lint: style and types.
# make test: all tests, one worker per core and one thread each.  make test-fast: without the slow ones.
# make families: the whole method on a tiny model of every family of transformers (docs/MODELS.md).
# make faults: every command killed at each of its file operations (docs/RELIABILITY.md).
# make test-portable: all tests under other kernels and numbers of threads (scripts/test_portable.sh).
# make gpu: all measurements on a GPU, and its tests, with the Python that is there (docs/BENCHMARKS.md).
# make mutants: faults put into the modules that decide results; MODULES="optim/ topk" for some (docs/MUTANTS.md).
# ARGS="-k masks" goes to pytest, WORKERS=0 runs in one process, OMP_NUM_THREADS=2 gives each two threads.
# Each makes the environment it needs in .venv when that is missing or its pins have changed.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup

.PHONY: demo families faults gpu test test-fast test-portable mutants lint clean

demo: .venv/.run
	$(BIN)/python scripts/demo.py

test: .venv/.dev
	$(PYTEST) $(ARGS)

test-fast: .venv/.dev
	$(PYTEST) -m "not slow" $(ARGS)

families: .venv/.dev
	$(BIN)/python -m scripts.families --jobs 2 --write docs/MODELS.md $(ARGS)

faults: .venv/.dev
	$(BIN)/python -m scripts.faults all $(ARGS)

test-portable: .venv/.dev
	PYTHON=$(BIN)/python scripts/test_portable.sh $(ARGS)

gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

mutants: .venv/.dev
	$(BIN)/python -m scripts.mutants $(MODULES) $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv demo

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The checkout itself is installed too, so that its scripts find lota/ and tasks/ from wherever they are started.
.venv/.run: requirements.txt pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@
