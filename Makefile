# Everything goes into .venv, which is set up on first use and again when what it is made from changes.
PYTHON ?= python3
PIP_ARGS ?= -c constraints.txt
PYTEST_ARGS ?=
BENCH_ARGS ?=
CLAIMS_ARGS ?=

BIN := .venv/bin
# Named by content, not by time: changing branches back and forth installs nothing.
READY := .venv/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help venv train test test-all bench claims check format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## set up .venv (PYTHON=python3.12 chooses the interpreter, PIP_ARGS= drops the pins)

train: $(READY) ## train the digits over a parameter server and over all-reduce, and compare
	$(BIN)/dtrain compare digits --backends ps,allreduce --workers 2 --epochs 10

test: $(READY) ## the tests of every commit (PYTEST_ARGS="-k ring -x")
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile $(PYTEST_ARGS)

test-all: $(READY) ## every test, the slow ones too
	$(BIN)/pytest $(PYTEST_ARGS)

bench: $(READY) ## short benchmarks, ten minutes, and a page of what they found (BENCH_ARGS="--only sync norm")
	$(BIN)/python benchmarks/page.py --run $(BENCH_ARGS)

claims: $(READY) ## what the literature says of large batches, tried in short on this code, a quarter of an hour
	$(BIN)/python benchmarks/claims/run.py --quick $(CLAIMS_ARGS)

check: $(READY) ## style, types, and which module may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

format: $(READY) ## mend the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches and build output
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf .venv

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'dtrain needs Python 3.10 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo '$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv' >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo 'Installing dtrain and its tools into .venv (a minute or two the first time) ...'
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e '.[dev]'
	@rm -f .venv/.ready-* && touch $@
