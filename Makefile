PYTHON ?= python3
BIN := .venv/bin

# As many workers as cores, each with its share of the threads (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup

.PHONY: demo test test-all quick lint types docs peer wheel

demo: .venv/ready  ## train, generate, compare, draw: at most a quarter of an hour on two cores
	$(BIN)/gatekv demo

test: .venv/ready  ## every promise once, without a GPU: ten to fifteen minutes on two slow cores
	$(PYTEST) -m "not exhaustive"

test-all: .venv/ready  ## the rest too: whole matrices, every backend, the benchmarks and pages on the real model
	$(PYTEST)

quick: .venv/ready  ## the unit tests of `make test`
	$(PYTEST) -m "not exhaustive" tests/unit tests/idioms

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/ready  ## mypy over the package; its settings are in pyproject.toml
	$(BIN)/python -m mypy

wheel: .venv/ready  ## build the package, install it into an empty environment, use it in an empty folder
	rm -rf dist .venv-wheel && $(BIN)/python -m pip wheel -q --no-deps -w dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q -c constraints.txt torch
	.venv-wheel/bin/python -m pip install -q -c constraints.txt "$$(ls dist/*.whl)[demo,plot]"
	cd dist && ../.venv-wheel/bin/python ../tests/printed.py ../README.md

docs: .venv/ready  ## the documentation as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

peer:  ## the environment of `recipes/benchmark.py decode --peer kvpress`: it needs an older transformers
	test -d .venv-peer || $(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q "kvpress==0.5.5" "transformers<5.3" "torch==2.13.0"

.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@
