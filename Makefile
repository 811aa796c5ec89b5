PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test check bench results page torture clean

# What running needs; test and check add the rest. Stamps keep a second call instant.
.venv/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maelab needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: .venv/.dev

quickstart: .venv/.base
	@$(BIN)/python examples/quickstart.py

test: .venv/.dev
	$(BIN)/python -m pytest

bench: .venv/.dev
	$(BIN)/maelab bench --out bench

results: .venv/.dev
	$(BIN)/python results/make.py $(PART) --jobs $(or $(JOBS),1)

page: .venv/.dev
	$(BIN)/python results/make.py --page

torture: .venv/.dev
	$(BIN)/python -m pytest -m 'slow or not slow'

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
