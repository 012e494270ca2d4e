PYTHON ?= python3
BIN := .venv/bin

# As many workers as cores, each with its share of the threads (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup

.PHONY: demo test test-all quick lint peer

demo: .venv/ready  ## train, reload, generate, compare, draw: a quarter of an hour on two cores
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/cpt.py
	$(BIN)/python recipes/generate.py --adapter checkpoints/demo --budget .25
	$(BIN)/python recipes/evaluate.py --adapter checkpoints/demo

test: .venv/ready  ## every promise once, without a GPU: at most ten minutes on two cores
	$(PYTEST) -m "not exhaustive"

test-all: .venv/ready  ## the rest too: whole matrices, every backend, the benchmarks and pages on the real model
	$(PYTEST)

quick: .venv/ready  ## the unit tests of `make test`
	$(PYTEST) -m "not exhaustive" tests/unit

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

peer:  ## the environment of `recipes/benchmark.py decode --peer kvpress`: it needs an older transformers
	test -d .venv-peer || $(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q "kvpress==0.5.5" "transformers<5.3" "torch==2.13.0"

.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,eval,dev]"
	touch $@
