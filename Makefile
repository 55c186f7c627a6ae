# Each target does its own set-up in .venv: `make demo` and `make test` are all a newcomer types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-full lint clean

KERNELS := $(wildcard src/isomorph/kernels/csrc/*)

$(READY): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	$(BIN)/python -m compileall -q src
	touch $@

demo: $(READY)
	$(BIN)/isomorph demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers with a thread of torch's each: threads beyond the cores wait for one another. The kernels' pool keeps two.
test: lint
	OMP_NUM_THREADS=1 ISOMORPH_NUM_THREADS=2 $(BIN)/pytest -m 'not full' -n 2 --dist loadfile

# Longer checks; the last result is committed as docs/records/test-full.md.
test-full: lint
	$(BIN)/python tests/full.py

clean:
	rm -rf $(VENV) .venv-vllm .pytest_cache .mypy_cache .ruff_cache demo-report
