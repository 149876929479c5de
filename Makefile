# Each command sets up what it needs in .venv, once: Python, the pinned packages of constraints.txt, and zoo itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help demo test lint bench clean

help:
	@echo "make demo    match pictures and captions with the packaged model, without network; writes demo/"
	@echo "make test    ruff, then all tests that need neither network nor GPU"
	@echo "make lint    ruff alone"
	@echo "make bench   the benchmarks, each against its reference"
	@echo "make clean   remove what was made, but not .venv"

# The stamp is written last: an installation that was interrupted is begun again.
$(READY): setup.py constraints.txt
	@echo "Installing zoo and its packages into .venv. Once; it takes a minute or more."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".[tensorboard,test]"
	@touch $@

demo: $(READY)
	@$(BIN)/zoo demo --out demo

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

test: lint
	@$(BIN)/pytest

bench: $(READY)
	@set -e; for file in benchmarks/bench_*.py; do echo "$$file"; $(BIN)/python "$$file"; done

clean:
	@rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
