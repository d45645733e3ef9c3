# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors alone: the warnings of pip and of its builds are not yours to act on.
PIP := PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
# A CPU build of torch where the index has one; with a GPU, install your own torch in .venv first.
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all docs models bases mutations system check format clean

demo: $(INSTALLED)
	$(BIN)/rlr-ray train --config configs/digits.yaml --set name=demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m tests.budget test

test-all: $(INSTALLED)
	$(BIN)/python -m tests.budget test-all

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

models: $(INSTALLED)
	$(BIN)/python -m tests.models.table

bases: $(INSTALLED)  # what these packages cost at each start, or say there, is kept out of the other tests
	$(PIP) --no-deps --upgrade --target build/bases gguf torchao bitsandbytes
	PYTHONPATH=.:build/bases $(BIN)/python -m pytest -q tests/models/test_files.py tests/models/test_quantized.py

mutations: $(INSTALLED)
	$(BIN)/python -m tests.mutations.run

system: $(INSTALLED)
	$(BIN)/python -m pytest -m system

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
