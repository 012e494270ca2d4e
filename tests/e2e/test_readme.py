"""The README runs as printed, outside the checkout, and what it names exists."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from printed import blocks, commands, run_python

from gatekv import cli
from gatekv.options import load
from gatekv.training.config import CPTConfig
from gatekv.training.less_config import LessConfig
from gatekv.training.options import load_config
from gatekv.training.sft_config import SFTConfig

TRAINING = {"cpt": CPTConfig, "less": LessConfig, "sft": SFTConfig}
ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
pytestmark = pytest.mark.xdist_group("real model")  # trained once


def recipe_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(recipe, its options) of a command that runs one, however it is started."""
    for i, word in enumerate(words):
        if word == "gatekv":
            return words[i + 1], words[i + 2 :]
        if found := re.fullmatch(r"(?:gatekv\.recipes\.|recipes/)(\w+?)(?:\.py)?", word):
            return found[1], words[i + 1 :]
    return None


def test_commands_name_real_recipes_options_and_targets():
    found = [recipe for words in commands(README) if (recipe := recipe_of(words))]
    assert len(found) >= 3
    for name, words in found:
        assert name in cli.recipes(), name
        module = import_module(f"gatekv.recipes.{name}")
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        if name in TRAINING:
            load_config(words, TRAINING[name])
        else:
            load(words, *own)
    targets = [words[1] for words in commands(README) if words[0] == "make"]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_python_runs_as_printed(tmp_path, printed_env):
    out = run_python(README, tmp_path, printed_env)
    assert len(blocks(README, "python")) >= 2 and "'ratio': 0.2" in out


def test_the_training_command_trains(trained):
    assert len(json.loads((trained / "training.json").read_text())["steps"]) == 2
