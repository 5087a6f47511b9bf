# make train    set up, then train the quickstart (ARGS=--fresh trains it again in a new folder)
# make test     set up, then lint, types and every behaviour once
# make test-all the same with the slow tests, which repeat it in more cases
# make docs     set up, then the docs with the API reference, in build/docs
# make gpu      on a machine with CUDA, needs no setup: its tests and benchmarks (ARGS="--budget 500" for a part)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/quickstart.json
ARGS   ?=
# More words for pytest.
TESTS  ?=
# Where this is set, each interpreter that a test starts would compile all sources again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: train format types lint quick test test-all docs gpu
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	$(BIN)/narrowgauge build
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	test ! -e /usr/include/libaio.h || $(BIN)/narrowgauge build --aio
	touch $@

train: $(VENV)/.installed
	@ranks=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)') && \
	threads=$$(( $$(nproc) / ranks > 0 ? $$(nproc) / ranks : 1 )) && \
	OMP_NUM_THREADS=$$threads $(BIN)/torchrun --standalone --nproc_per_node $$ranks \
	    -m narrowgauge.launcher train $(CONFIG) $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

lint: format types

quick: $(VENV)/.installed-dev
	$(PYTEST) -m 'not slow and not alone' --numprocesses 3 --dist worksteal $(TESTS)

# Pyright takes one processor for a minute.
test: format
	$(MAKE) --jobs 2 types quick
	$(PYTEST) -m 'not slow and alone' $(TESTS)

test-all: lint
	$(PYTEST) -m 'not alone' --numprocesses 3 --dist worksteal $(TESTS)
	$(PYTEST) -m alone $(TESTS)

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env docs build/docs

gpu:
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); $$python -m benchmarks.gpu $(ARGS)
