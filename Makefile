# make demo: the whole method on the embedded model.  make test: the tests.  make lint: style and types.
# Each makes the environment it needs in .venv when that is missing or its pins have changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.run
	$(BIN)/python scripts/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest

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
