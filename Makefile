PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test kernels check bench results page docs torture clean

# What running needs; test and check add the rest. Stamps keep a second call instant.
.venv/.base: pyproject.toml constraints.txt setup.py $(wildcard maelab/native/kernels/*)
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

# Every variant of the native kernels that runs here or under qemu-aarch64, the wheel, and the plain variant sanitized.
SANITIZED := build/sanitized
kernels: .venv/.dev
	$(BIN)/python -m pytest -m 'slow or not slow' -n 2 --dist load tests/test_native.py
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r maelab tests pyproject.toml setup.py $(SANITIZED)
	CFLAGS='-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all' \
	$(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	cd $(SANITIZED) && LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 MAELAB_NATIVE=portable PYTHONPATH=. ../../$(BIN)/python -m pytest -n 2 --dist load tests/test_fast.py

bench: .venv/.dev
	$(BIN)/maelab bench --out bench

results: .venv/.dev
	$(BIN)/python results/make.py $(PART) --jobs $(or $(JOBS),1)

page: .venv/.dev
	$(BIN)/python results/make.py --page

# build/docs/index.html. Runs docs/notebook.ipynb, which takes six minutes. Any warning stops it.
docs: .venv/.dev
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/docs

# About an hour on two cores. Less, or the same again: make torture INPUTS=1000 KILLS=20 SEED=1.
torture: .venv/.dev
	$(BIN)/python -m pytest -m 'slow or not slow' --ignore tests/torture
	@: > torture.log; tail -f torture.log & trap "kill $$!" EXIT; seed=$(or $(SEED),$$(date +%s)); echo "SEED=$$seed"; \
	TORTURE_INPUTS=$(or $(INPUTS),10000) TORTURE_KILLS=$(or $(KILLS),200) TORTURE_SEED=$$seed TORTURE_LOG=torture.log \
	$(BIN)/python -m pytest -m 'slow or not slow' --dist load tests/torture

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
