# The commands people run are the commands CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help run test test-slow test-slurm lint types wheel bench clean

help:
	@echo "make run        install into .venv, run a sweep of 12 trainings, merge the results"
	@echo "make test       install what the tests need and run them"
	@echo "make test-slow  the soaks that take minutes"
	@echo "make test-slurm the tests on a real Slurm, installed if missing (root, Debian/Ubuntu)"
	@echo "make lint       ruff, mypy and the import contract"
	@echo "make wheel      build the wheel and try it outside the checkout"
	@echo "make bench      the launcher beside its peers, and how busy GPUs are kept (minutes)"
	@echo "make clean      remove .venv and build leftovers; outputs stay"

run: $(VENV)/.installed
	$(BIN)/python -m orchestrator -m training.epochs=10,50 'seed=range(6)'
	$(BIN)/orchestrator-aggregate outputs/

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" -n auto

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

test-slurm: $(VENV)/.installed-test
	tests/slurm/install.sh
	$(BIN)/python -m pytest tests/slurm -n 2 --dist loadfile

lint types: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python tests/packaging/wheel_smoke.sh

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/launch.py
	$(BIN)/python benchmarks/gpus.py --real
	if command -v slurmctld >/dev/null; then $(BIN)/python benchmarks/slurm.py; fi

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/.peers

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python >= 3.10 is needed; $(PYTHON) is `$(PYTHON) -V`. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
