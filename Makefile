PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick lint docs peer

demo: .venv/ready  ## train, reload, generate, compare, draw: a quarter of an hour on two cores
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/cpt.py
	$(BIN)/python recipes/generate.py --adapter checkpoints/demo --budget .25
	$(BIN)/python recipes/evaluate.py --adapter checkpoints/demo

test: .venv/ready  ## everything that needs no GPU
	$(BIN)/python -m pytest

quick: .venv/ready  ## unit tests only
	$(BIN)/python -m pytest tests/unit

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: .venv/ready  ## the documentation as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

peer:  ## the environment of `recipes/benchmark.py decode --peer kvpress`: it needs an older transformers
	test -d .venv-peer || $(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q "kvpress==0.5.5" "transformers<5.3" "torch==2.13.0"

.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,eval,dev,docs]"
	touch $@
