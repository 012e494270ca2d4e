PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick lint types wheel peer

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

types: .venv/ready  ## mypy over the package; its settings are in pyproject.toml
	$(BIN)/python -m mypy

wheel:  ## build the wheel, install it into an empty environment, import it in an empty folder
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel -q --no-deps -w dist .
	.venv-wheel/bin/python -m pip install -q -c constraints.txt dist/*.whl
	cd "$$(mktemp -d)" && "$(CURDIR)/.venv-wheel/bin/python" -c "import gatekv; print('gatekv', gatekv.__version__, gatekv.__file__)"

peer:  ## the environment of `recipes/benchmark.py decode --peer kvpress`: it needs an older transformers
	test -d .venv-peer || $(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install -q "kvpress==0.5.5" "transformers<5.3" "torch==2.13.0"

.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,eval,dev]"
	touch $@
